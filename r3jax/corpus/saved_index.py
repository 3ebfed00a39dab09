"""An index on disk: a VersionedIndex's state without pickle, the documents' texts, and what the vectors depend on.

    manifest.json     kind, counts, identity, and which folder beside it holds
    NUMBER/           index.npz, documents.jsonl, offsets.npy
    .lock             held by whoever changes it: of two at once the second is refused

A change writes a new folder, then the manifest, then removes the old folder: whoever is killed leaves the old index or
the new one. It builds anew over all vectors, so that deleted documents leave neither vector nor text behind.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import r3jax
from r3jax.corpus import documents as stored
from r3jax.corpus import manifest
from r3jax.corpus.documents import StoredDocuments
from r3jax.corpus.encoding import MANIFEST, Encoding
from r3jax.errors import UserError, writing
from r3jax.run import lock
from r3jax.run.progress import waiting
from r3jax.search.index import VersionedIndex

STATE = "index.npz"
FORMAT = 1
VECTORS = ("model", "system", "answer", "max_length", "compute_dtype")  # what two encodings must share


@dataclasses.dataclass(frozen=True)
class SavedIndex:
    """An index, opened; row i of the index is document i."""

    folder: pathlib.Path
    index: VersionedIndex
    documents: StoredDocuments
    manifest: dict[str, Any]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`VersionedIndex.search`."""
        return self.index.search(queries, k)


def is_index(folder: str | pathlib.Path) -> bool:
    """Whether a folder holds an index, or says so."""
    try:
        return "generation" in manifest.read(pathlib.Path(folder) / MANIFEST)
    except (OSError, ValueError, TypeError):
        return False


def build_index(encoding: Encoding, out: pathlib.Path, kind: str) -> None:
    """Builds an index of `kind`, scann or exact, over an encoding; UserError where something is already."""
    about = {name: encoding.manifest[name] for name in ("source", *VECTORS)} | {"kind": kind, "generation": 0}
    with writing("OUT", out):
        if out.exists() and not _is_left_behind(out):
            raise UserError(f"OUT names {out}, where something is already; name another folder or remove that one.")
        with lock.alone(out, "OUT"):
            _write(out, about, encoding.documents, np.asarray(encoding.vectors))


def add(folder: pathlib.Path, encoding: Encoding) -> tuple[int, int]:
    """Adds an encoding's documents; one whose id is there replaces the old one. Returns how many came and replaced."""
    with _changing(folder) as old:
        refused = {name: encoding.manifest[name] for name in VECTORS}
        manifest.refuse_to_mix(f"INDEX: {folder}", old.manifest, refused, "encode the documents as those were")
        new = {name: row for row, (name, _) in enumerate(encoding.documents)}
        replaced = {row: new[name] for row, (name, _) in enumerate(old.documents) if name in new}
        came = sorted(set(new.values()) - set(replaced.values()))
        vectors = np.concatenate([old.index.vectors, np.asarray(encoding.vectors[came], np.float32)])
        vectors[list(replaced)] = encoding.vectors[list(replaced.values())]
        given = encoding.documents

        def documents() -> Iterable[tuple[str, str]]:
            for row, document in enumerate(old.documents):
                yield given[replaced[row]] if row in replaced else document
            yield from (given[row] for row in came)

        _write(folder, old.manifest, documents(), vectors)
        return len(came), len(replaced)


def delete(folder: pathlib.Path, names: Sequence[str]) -> int:
    """Deletes documents by id and returns how many are left; UserError for an unknown id, or where none is left."""
    with _changing(folder) as old:
        unwanted = set(names)
        gone = {name: row for row, (name, _) in enumerate(old.documents) if name in unwanted}
        if unwanted - gone.keys():
            raise UserError(f"INDEX: {folder} has no document {min(unwanted - gone.keys())!r}; nothing was deleted.")
        if len(gone) == len(old.documents):
            raise UserError(f"INDEX: {folder} would be left without a document; remove the folder instead.")
        kept = (document for document in old.documents if document[0] not in gone)
        _write(folder, old.manifest, kept, np.delete(old.index.vectors, list(gone.values()), axis=0))
        return len(old.documents) - len(gone)


def open_index(folder: str | pathlib.Path, field: str = "INDEX") -> SavedIndex:
    """The index in a folder; UserError where there is none."""
    folder = pathlib.Path(folder)
    try:
        about = manifest.read(folder / MANIFEST)
        if "generation" not in about:
            raise ValueError("its manifest names no generation")
        inside = folder / str(about["generation"])
        with np.load(inside / STATE, allow_pickle=False) as state:
            index = VersionedIndex.from_state(dict(state))
        documents = StoredDocuments(inside)
        if len(index) != len(documents):
            raise ValueError("its files disagree")
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(f"{field}: {folder} holds no index ({e}); make one with r3jax index build.") from None
    return SavedIndex(folder, index, documents, about)


@contextlib.contextmanager
def _changing(folder: pathlib.Path) -> Iterator[SavedIndex]:
    """The index, for whoever alone may change it."""
    if not is_index(folder):
        open_index(folder)  # says why not
    with lock.alone(folder, "INDEX"):
        yield open_index(folder)


def _is_left_behind(folder: pathlib.Path) -> bool:
    """Whether a folder is empty, or holds what a build that was killed has left: a first generation, no manifest."""
    first, texts = folder / "1", {name + end for name in (stored.TEXTS, stored.OFFSETS) for end in ("", ".part")}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {first.name, lock.FILE, f".{MANIFEST}"}:
        return False
    return not first.exists() or first.is_dir() and {path.name for path in first.iterdir()} <= {STATE, *texts}


def _write(
    folder: pathlib.Path, about: Mapping[str, Any], documents: Iterable[tuple[str, str]], vectors: np.ndarray
) -> None:
    """Writes the next generation, and removes the one before."""
    generation = about["generation"] + 1
    inside = folder / str(generation)
    shutil.rmtree(inside, ignore_errors=True)  # of an attempt that was killed
    inside.mkdir()
    count = stored.write(documents, inside)
    with waiting(f"building an index over {count:,} documents"):
        state = VersionedIndex.build(vectors, 0, about["kind"]).state()
    # savez takes **arrays; none of the names is a keyword of its own
    np.savez(inside / STATE, **state)  # type: ignore[arg-type]
    now = {"format": FORMAT, "r3jax": r3jax.__version__, "generation": generation, "documents": count}
    manifest.write(folder / MANIFEST, {**about, **now})
    shutil.rmtree(folder / str(generation - 1), ignore_errors=True)
