"""An encoded corpus on disk, made shard by shard so that a killed run goes on where it was.

    vectors.npy       float32 or float16 [N, D], unit rows; to be mapped: numpy.load(…, mmap_mode="r")
    documents.jsonl   {"_id", "text"} of row i in line i; offsets.npy says where lines begin
    manifest.json     what the vectors depend on, and counts; it is written last

Shards hold SHARD documents in the order of the corpus, so a shard's batches, and its bytes, do not depend on which
process encodes it, or on how often the run was killed. While it runs, vectors are in vectors.npy.part, and progress/
has one small file for each shard that is safely there.

Axes: N documents, D width.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import r3jax
from r3jax.corpus import documents as stored
from r3jax.corpus import manifest
from r3jax.corpus.documents import StoredDocuments
from r3jax.corpus.manifest import refuse_to_mix
from r3jax.data.documents import Documents
from r3jax.errors import UserError, writing
from r3jax.processes import Processes
from r3jax.run import lock
from r3jax.search.checks import UNIT_TOLERANCE

MANIFEST, VECTORS, PROGRESS, BEGUN = "manifest.json", "vectors.npy", "progress", "begun.json"
SHARD = 4096
BLOCK = 1 << 16  # documents scored at a time
FORMAT = 1

# Texts to their vectors [n, D], and how many of the texts were cut; calls the function with each number just read.
Encode = Callable[[Sequence[str], Callable[[int], None]], tuple[np.ndarray, int]]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A finished folder, opened."""

    folder: pathlib.Path
    vectors: np.ndarray  # [N, D], mapped
    documents: StoredDocuments
    manifest: dict[str, Any]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows [Q, k] of each query [Q, D] and their scores, descending, ties to the lower row.

        Exact, a block of the mapped vectors at a time: nothing is loaded before, and little held.
        """
        best = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in queries]
        for first in range(0, len(self.vectors), BLOCK):
            scores = queries @ np.asarray(self.vectors[first : first + BLOCK], np.float32).T
            for i, (rows, known) in enumerate(best):
                rows = np.concatenate([rows, np.arange(first, first + scores.shape[1])])
                known = np.concatenate([known, scores[i]])
                if len(known) > k:
                    kept = known >= np.partition(known, -k)[-k]  # and all that tie with the last
                    rows, known = rows[kept], known[kept]
                order = np.lexsort((rows, -known))[:k]
                best[i] = rows[order], known[order]
        return np.stack([rows for rows, _ in best]).astype(np.int32), np.stack([known for _, known in best])


def encode_corpus(
    documents: Documents,
    out: pathlib.Path,
    identity: Mapping[str, Any],
    source: str,
    encode: Encode,
    width: int,
    dtype: str,
    progress: Callable[..., contextlib.AbstractContextManager],
    processes: Processes = Processes(),  # noqa: B008  frozen
    shard: int = SHARD,
) -> dict[str, Any]:
    """Fills the folder `out`, or goes on filling it, and returns its manifest.

    Args:
      identity: what the vectors depend on; a folder begun with another one is refused.
      source: the model's folder or name, for those who search.
      width: D.
      dtype: of the vectors, float32 or float16.
      progress: as `run.progress.progress`.
      processes: where several share a file system, each encodes every count-th shard.

    Raises:
      UserError: another identity or other data, a bad document, a vector that is lost, or a folder that cannot be
        written.

    The manifest's `skipped` counts the lines that `documents` dropped.
    """
    if processes.index == 0:
        check_out(out)
    wanted = {"data": documents.fingerprint(), **identity, "dtype": dtype, "shard": shard}
    with writing("OUT", out):
        if (out / MANIFEST).is_file():
            try:
                finished = manifest.read(out / MANIFEST)
            except ValueError:
                raise UserError(f"OUT names {out}, where something else is; name another folder.") from None
            refuse_to_mix(f"OUT: {out}", finished, wanted, "name another folder")
            return finished
        if processes.index == 0:
            _begin(documents, out, wanted, width, dtype)
        processes.wait("begun")
        texts = StoredDocuments(out)
        shards = range(-(-len(texts) // shard))
        mine = [i for i in shards if i % processes.count == processes.index]
        left = [i for i in mine if not _mark(out, i).is_file()]
        before = sum(min(shard, len(texts) - i * shard) for i in mine if i not in set(left))
        total = sum(min(shard, len(texts) - i * shard) for i in mine)
        with (out / f"{VECTORS}.part").open("r+b") as file, progress("encoding", total, before) as advance:
            start = _header(file, len(texts), width, dtype)
            for i in left:
                rows = [text for _, text in texts.slice(i * shard, (i + 1) * shard)]
                vectors, cut = encode(rows, advance)
                refuse_lost(vectors)
                file.seek(start + i * shard * width * np.dtype(dtype).itemsize)
                file.write(np.ascontiguousarray(vectors, dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
                manifest.write(_mark(out, i), {"truncated": cut})
        processes.wait("encoded")
        if processes.index == 0:
            counts = {
                "documents": len(texts),
                "width": width,
                "truncated": sum(manifest.read(_mark(out, i))["truncated"] for i in shards),
                "skipped": manifest.read(out / PROGRESS / BEGUN).get("skipped", 0),
            }
            (out / f"{VECTORS}.part").replace(out / VECTORS)
            manifest.write(
                out / MANIFEST, {"format": FORMAT, "r3jax": r3jax.__version__, "source": source, **counts, **wanted}
            )
            shutil.rmtree(out / PROGRESS)
        processes.wait("finished")
        return manifest.read(out / MANIFEST)


def check_out(out: pathlib.Path) -> None:
    """UserError where `out` holds something else, or cannot be written: known before a model is read."""
    with writing("OUT", out):
        if out.exists() and (not out.is_dir() or not _is_ours(out)):
            raise UserError(f"OUT names {out}, where something else is; name another folder.")
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


def _is_ours(out: pathlib.Path) -> bool:
    """Whether a folder holds an encoding, the beginning of one, or nothing."""
    begun = {PROGRESS, f"{VECTORS}.part", lock.FILE} | {
        x + y for x in (stored.TEXTS, stored.OFFSETS) for y in ("", ".part")
    }
    if (out / MANIFEST).is_file() or (out / PROGRESS / BEGUN).is_file():
        return True
    return {file.name for file in out.iterdir()} <= begun


def refuse_lost(vectors: np.ndarray) -> None:
    """UserError where a row of [N, D] is no unit vector: of NaN, or zeros after an overflow."""
    lost = int((~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT_TOLERANCE)).sum())
    if lost:
        raise UserError(f"MODEL gives {lost} of {len(vectors)} documents no unit vector; r3jax doctor may say why.")


def open_encoding(folder: str | pathlib.Path, field: str = "ENCODED") -> Encoding:
    """The encoding in a folder; UserError where there is none that is whole."""
    folder = pathlib.Path(folder)
    if (folder / PROGRESS).is_dir() and not (folder / MANIFEST).is_file():
        raise UserError(f"{field}: {folder} is not finished; give the command that began it again.")
    try:
        known = manifest.read(folder / MANIFEST)
        vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
        documents = StoredDocuments(folder)
        if vectors.shape != (known["documents"], known["width"]) or len(documents) != len(vectors):
            raise ValueError("its files disagree")
    except (OSError, EOFError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"{field}: {folder} holds no encoded corpus ({e}); make one with r3jax encode.") from None
    return Encoding(folder, vectors, documents, known)


def _begin(documents: Documents, out: pathlib.Path, wanted: dict[str, Any], width: int, dtype: str) -> None:
    """Leaves texts, a file for the vectors and begun.json in the folder, or finds them there."""
    begun = out / PROGRESS / BEGUN
    if begun.is_file():
        refuse_to_mix(f"OUT: {out}", manifest.read(begun), wanted, "name another folder")
        if (out / VECTORS).is_file():  # killed between the vectors' last name and the manifest
            (out / VECTORS).replace(out / f"{VECTORS}.part")
        return
    (out / PROGRESS).mkdir(parents=True, exist_ok=True)
    count = stored.write(documents, out)
    with (out / f"{VECTORS}.part").open("wb") as file:
        start = _header(file, count, width, dtype)
        file.truncate(start + count * width * np.dtype(dtype).itemsize)
    manifest.write(begun, {**wanted, "skipped": documents.skipped})


def _header(file, count: int, width: int, dtype: str) -> int:
    """Writes the header of the vectors' file and returns where they begin."""
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(file, description)
    return file.tell()


def _mark(out: pathlib.Path, shard: int) -> pathlib.Path:
    return out / PROGRESS / f"{shard:06d}.json"
