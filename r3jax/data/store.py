"""Training records on disk: a TFDS builder writes a data set's split to ArrayRecord once, by content.

A record is one query of the split that has a relevant document:

    {"query_row": int, "query": str, "positives": list[int] (document rows, best grade first), "thought": str}

The cache folder is named by a hash of everything that goes into the records, so another data set, split or
set of thoughts never meets an old one. It appears by one rename of a finished folder: what a killed build
leaves (`*.part-*`, free to delete) is never read.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from r3jax.data.beir import Dataset
from r3jax.errors import UserError

Record = dict[str, Any]
_FORMAT = 1  # part of the cache key: raise it whenever the records change
_SPLIT = "records"  # TFDS's name for the one split of a folder


class TrainingPairs(tfds.core.GeneratorBasedBuilder):
    """One split's records, in the order of queries.jsonl."""

    VERSION = tfds.core.Version(f"{_FORMAT}.0.0")

    def __init__(self, records: list[Record], data_dir: str):
        self._records = records
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "query_row": tfds.features.Scalar(np.int64),
            "query": tfds.features.Text(),
            "positives": tfds.features.Sequence(tfds.features.Scalar(np.int64)),
            "thought": tfds.features.Text(),
        }
        # The stream shuffles; on disk record i is query i of the split.
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Record]]:
        yield from enumerate(self._records)


class TrainingSource:
    """Random access to the records of a finished cache folder; can be pickled to data workers."""

    def __init__(self, folder: pathlib.Path):
        self._rows = tfds.builder_from_directory(folder).as_data_source(split=_SPLIT)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return {
            "query_row": int(row["query_row"]),
            "query": row["query"].decode(),
            "positives": [int(doc) for doc in row["positives"]],
            "thought": row["thought"].decode(),
        }


def training_source(
    dataset: Dataset, split: str, cache_dir: str | pathlib.Path, thoughts: Mapping[str, str]
) -> TrainingSource:
    """Opens the records of a split, writing them first if this content was never written to cache_dir.

    Args:
      dataset: a loaded BEIR folder.
      split: the judgements to train on; queries without a relevant document give no record.
      cache_dir: where folders of records are kept; several processes may share it.
      thoughts: query id → supervised reasoning; a query without one gets "".

    Raises:
      UserError: unknown split, no query with a relevant document, or cache_dir cannot be written.
    """
    records = [
        {
            "query_row": dataset.query_row[query],
            "query": dataset.query_texts[dataset.query_row[query]],
            "positives": rows,
            "thought": thoughts.get(query, ""),
        }
        for query, rows in dataset.positives(split).items()
    ]
    key = hashlib.sha256(f"{_FORMAT}\0{dataset.fingerprint}\0{split}\0".encode())
    key.update(json.dumps([record["thought"] for record in records]).encode())
    final = pathlib.Path(cache_dir) / f"{dataset.name}-{split}-{key.hexdigest()[:16]}"
    if not final.is_dir():
        try:
            _write(records, final)
        except OSError as error:
            raise UserError(f"data cache {cache_dir} cannot be written ({error}); free or choose another.") from error
    try:
        return TrainingSource(final)
    except (OSError, ValueError) as error:
        raise UserError(f"data cache {final} is damaged ({type(error).__name__}); delete that folder.") from error


def _write(records: list[Record], final: pathlib.Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(prefix=f"{final.name}.part-", dir=final.parent))
    try:
        builder = TrainingPairs(records, data_dir=str(part))
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download; there is none
            builder.download_and_prepare()
        try:
            os.rename(builder.data_dir, final)
        except OSError:
            if not final.is_dir():  # else another process finished the same content first
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
