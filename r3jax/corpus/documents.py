"""A corpus on disk: documents.jsonl, one {"_id", "text"} a line, and offsets.npy int64 [N + 1], where lines begin.

Reading a document is a seek; nothing but the offsets is mapped into memory.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from r3jax.data.documents import to_line
from r3jax.data.lines import parse
from r3jax.errors import UserError

TEXTS, OFFSETS = "documents.jsonl", "offsets.npy"


class StoredDocuments:
    """The documents that `write` left in a folder; row i is document i. ValueError where the files disagree."""

    def __init__(self, folder: pathlib.Path):
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        self._file = (folder / TEXTS).open("rb")
        if self._offsets[-1] != self._file.seek(0, os.SEEK_END):
            raise ValueError(f"{TEXTS} is not as long as {OFFSETS} says")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> tuple[str, str]:
        """(id, text) of a row."""
        return self.slice(row, row + 1)[0]

    def slice(self, first: int, last: int) -> list[tuple[str, str]]:
        """(id, text) of the rows from `first` up to `last`, which may lie beyond the end."""
        last = min(last, len(self))
        begin, end = (int(self._offsets[row]) for row in (first, last))
        self._file.seek(begin)
        rows = map(parse, self._file.read(end - begin).decode().split("\n")[:-1])
        return [(row["_id"], row["text"]) for row in rows]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """All of them, in order, a block at a time."""
        for first in range(0, len(self), 1024):
            yield from self.slice(first, first + 1024)


def write(documents: Iterable[tuple[str, str]], folder: pathlib.Path) -> int:
    """Writes documents to a folder, one at a time, and returns their number; the files appear whole or not at all.

    Eight bytes a document are held, and as many again to sort them, to find ids that occur twice.

    Raises:
      UserError: an id that occurs twice, or no document at all.
    """
    digests = bytearray()
    texts, offsets = (folder / f"{name}.part" for name in (TEXTS, OFFSETS))
    with texts.open("wb") as lines, offsets.open("wb") as starts:
        _header(starts, 0)
        count, place = 0, 0
        starts.write(place.to_bytes(8, "little"))
        for name, text in documents:
            place += lines.write(to_line(name, text))
            starts.write(place.to_bytes(8, "little"))
            digests += hashlib.blake2b(name.encode(), digest_size=8).digest()
            count += 1
        starts.seek(0)
        _header(starts, count + 1)
        for file in (lines, starts):
            file.flush()
            os.fsync(file.fileno())
    if not count:
        raise UserError("DATA holds no document; add at least one line.")
    texts.replace(folder / TEXTS)
    offsets.replace(folder / OFFSETS)
    if name := _twice(np.frombuffer(digests, np.uint64), folder):
        raise UserError(f"DATA holds two documents with the id {name!r}; give every document its own id.")
    return count


def _twice(digests: np.ndarray, folder: pathlib.Path) -> str | None:
    """An id that two documents of the folder have. Digests of 64 bits meet by chance: the ids themselves decide."""
    inorder = np.sort(digests)
    doubtful = inorder[1:][inorder[1:] == inorder[:-1]]
    if not len(doubtful):
        return None
    seen, documents = set(), StoredDocuments(folder)
    for row in np.flatnonzero(np.isin(digests, doubtful)):
        name = documents[int(row)][0]
        if name in seen:
            return name
        seen.add(name)
    return None


def _header(file: BinaryIO, size: int) -> None:
    """Of an int64 vector; numpy leaves room for any size, so that it can be written anew in the same place."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (size,)})
