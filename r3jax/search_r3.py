"""`SearchR3`: a trained model for use from Python, with sentence-transformers' names.

    model = SearchR3.from_pretrained("runs/rl-tiny")
    queries = model.encode_query(["how do I list files"])       # the model thinks first
    documents = model.encode_document(["ls: list a directory"])
    model.similarity(queries, documents)

Axes: N texts, D width, W windows.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from r3jax import weights
from r3jax.errors import UserError
from r3jax.model.hub import local_folder
from r3jax.model.hugging_face import HEAD
from r3jax.model.hugging_face_config import read_config, read_dtype
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sharding import make_mesh
from r3jax.model.tensor_files import TensorFiles
from r3jax.reader import Reader
from r3jax.run import config as run_config
from r3jax.run.log import quiet_libraries
from r3jax.text import settings
from r3jax.text import tokenizer as tokenizers
from r3jax.text.prompts import ChatFormat, Prompts

DTYPES = ("float32", "bfloat16")
# Of a Hugging Face folder that names none in config.json; those of configs/base.py.
LIMITS = {"max_query_tokens": 64, "max_doc_tokens": 256, "max_thought_tokens": 255}
BATCH_SIZE = 32  # as sentence-transformers
log = logging.getLogger("r3jax")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Vectors and how they came about, for N texts."""

    vectors: np.ndarray  # [N, D]
    thoughts: list[str]  # what the model wrote before the embed token; "" without reasoning
    emitted: np.ndarray  # [N] bool; False: the thought did not end in time, and the direct answer was put after it
    truncated: np.ndarray  # [N] bool; the text was longer than max_length and its end was not read


@dataclasses.dataclass(frozen=True)
class Windows:
    """Vectors of documents read in overlapping windows; document i has those from starts[i] to starts[i + 1]."""

    vectors: np.ndarray  # [W, D]
    starts: np.ndarray  # [N + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """Vectors [windows of document i, D]."""
        return self.vectors[self.starts[i] : self.starts[i + 1]]


class SearchR3:
    """Texts to unit vectors in fp32 whose cosine is their relevance.

    A query is read after the model has thought about it (or not: reasoning=False), a document directly. One string
    gives one vector [D], a list of N strings [N, D], in its order; batch size and neighbours do not change a vector.
    Methods raise a ValueError that names the argument and the fix.

    What their arguments mean:
      prompt: system text in place of the model's own for this mode.
      batch_size: rows read at a time, on CPU fewer long ones; batches are filled up, so that few shapes are compiled.
      show_progress_bar: on stderr.
      truncate_dim: keep only the first so many dimensions.
      normalize_embeddings: whether vectors that were cut to truncate_dim become unit vectors again; whole ones are.
      return_details: an `Encoded` instead of the vectors; one string is then a list of one.
    """

    def __init__(self, params, reader: Reader, max_document: int):
        """`from_pretrained` is the usual way. max_document: tokens of a document's text."""
        self.params, self.reader, self.max_document = params, reader, max_document

    @classmethod
    def from_pretrained(
        cls,
        path: str | pathlib.Path,
        max_length: int | None = None,
        batch_size: int | None = None,
        *,
        max_thought_length: int | None = None,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "SearchR3":
        """The model of a run of ours (the best weights of its last stage), a Hugging Face folder or a hub id.

        Args:
          path: a folder, or `owner/name` on the hub. A Hugging Face folder's config.json may hold the model's
            own prompts and limits.
          max_length: tokens of a text that are read (the chat around it comes on top); default: as trained.
          batch_size: default of the methods' batch_size.
          max_thought_length: tokens that the model may write; default: as trained.
          dtype: float32 or bfloat16, to compute in (and, from a Hugging Face folder, to keep the weights in);
            default: the folder's own.
          mesh: of `r3jax.model.sharding.make_mesh`; default: weights split over all devices.

        Raises:
          UserError: the folder holds no model, or one that this code or the mesh does not fit, or whose positions
            max_length exceeds.
        """
        for name, value in (
            ("max_length", max_length),
            ("max_thought_length", max_thought_length),
            ("batch_size", batch_size),
        ):
            _check_positive(name, value)
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
        folder = local_folder(str(path), "path")
        mesh = mesh or make_mesh()
        load = _load_run if weights.is_run(str(folder)) else _load_hugging_face
        read_params, model, chat, limits = load(folder, mesh, dtype)
        max_new = (max_thought_length or limits["max_thought_tokens"]) + 1
        if max_length:
            _check_positions(max_length, max_new, model, chat)
        reader = Reader(
            model=model,
            mesh=mesh,
            chat=chat,
            max_query=max_length or limits["max_query_tokens"],
            max_new=max_new,
            batch_size=batch_size or limits.get("batch_size", BATCH_SIZE),
        )
        return cls(read_params(), reader, max_length or limits["max_doc_tokens"])

    @property
    def thinks(self) -> bool:
        """Whether the model can write: sentence-transformers saves an untied one without its head."""
        return self.reader.model.tied or "unembed" in self.params

    def generate(
        self,
        queries: str | Iterable[str],
        *,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> str | list[str]:
        """What the model writes about each query before the embed token, greedily."""
        texts, single = _texts(queries, "queries")
        found = self._think(texts, prompt, batch_size, show_progress_bar)
        return found.thoughts[0] if single else found.thoughts

    def encode_query(
        self,
        texts: str | Iterable[str],
        *,
        reasoning: bool = True,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        return_details: bool = False,
    ) -> "np.ndarray | Encoded":
        """Vectors of queries, read after the model's own thought about them, or without one."""
        texts, single = _texts(texts, "texts")
        if reasoning:
            found = self._think(texts, prompt, batch_size, show_progress_bar)
        else:
            reader = self._reader(prompt, batch_size, reasoning=False)
            found = self._direct(reader, texts, reader.max_query, show_progress_bar)
        vectors = self._cut(found.vectors, truncate_dim, normalize_embeddings)
        if return_details:
            return dataclasses.replace(found, vectors=vectors)
        return vectors[0] if single else vectors

    def encode_document(
        self,
        texts: str | Iterable[str],
        *,
        window_overlap: int | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        return_details: bool = False,
    ) -> "np.ndarray | Encoded | Windows":
        """Vectors of documents, read without reasoning.

        window_overlap: tokens that neighbouring windows share. With it a document longer than max_length is read
          whole, in windows of max_length, and the result is a `Windows`; without, its end is cut off.
        """
        texts, single = _texts(texts, "texts")
        reader = self._reader(prompt, batch_size, reasoning=False)
        if window_overlap is not None:
            if return_details:
                raise ValueError("return_details has nothing to add to windows; leave one of the two out.")
            windows = self._windows(reader, texts, window_overlap, show_progress_bar)
            vectors = self._cut(windows.vectors, truncate_dim, normalize_embeddings)
            return dataclasses.replace(windows, vectors=vectors)
        found = self._direct(reader, texts, self.max_document, show_progress_bar)
        vectors = self._cut(found.vectors, truncate_dim, normalize_embeddings)
        if return_details:
            return dataclasses.replace(found, vectors=vectors)
        return vectors[0] if single else vectors

    encode = encode_document

    @staticmethod
    def similarity(a: "np.ndarray | Windows", b: "np.ndarray | Windows") -> np.ndarray:
        """Cosines [A, B] of vectors [A, D] and [B, D]; of `Windows`, a document's best window counts.

        One vector [D] counts as one row.
        """
        left, right = (_unit(x.vectors if isinstance(x, Windows) else np.atleast_2d(x)) for x in (a, b))
        if left.shape[1] != right.shape[1]:
            raise ValueError(
                f"a has {left.shape[1]} dimensions and b {right.shape[1]}; encode both with the same truncate_dim."
            )
        scores = left @ right.T
        if isinstance(a, Windows):
            scores = np.maximum.reduceat(scores, a.starts[:-1], axis=0)
        if isinstance(b, Windows):
            scores = np.maximum.reduceat(scores, b.starts[:-1], axis=1)
        return scores

    def _reader(self, prompt: str | None, batch_size: int | None, reasoning: bool) -> Reader:
        _check_positive("batch_size", batch_size)
        reader = dataclasses.replace(self.reader, batch_size=batch_size or self.reader.batch_size)
        if prompt is None:
            return reader
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a string, not {type(prompt).__name__}.")
        field = "reasoning_system" if reasoning else "direct_system"
        prompts = dataclasses.replace(reader.chat.prompts, **{field: prompt})
        return dataclasses.replace(reader, chat=ChatFormat(reader.chat.tokenizer, prompts))

    def _think(self, texts: list[str], prompt, batch_size, show) -> Encoded:
        if not self.thinks:
            raise ValueError(
                f"this folder has no {HEAD}, which sentence-transformers does not save and thoughts need; "
                "pass reasoning=False, or give the folder that was exported."
            )
        reader = self._reader(prompt, batch_size, reasoning=True)
        ids, truncated = _limited(reader.chat.tokens(texts), reader.max_query)
        with _progress(show, len(ids), "thinking") as on_rows:
            found = reader.think(self.params, [reader.chat.to_reason(i) for i in ids], on_rows=on_rows)
        thoughts = [reader.chat.tokenizer.decode(t) for t in found.thoughts]
        return Encoded(found.vectors, thoughts, found.emitted == 1, truncated)

    def _direct(self, reader: Reader, texts: list[str], limit: int, show) -> Encoded:
        ids, truncated = _limited(reader.chat.tokens(texts), limit)
        with _progress(show, len(ids), "encoding") as on_rows:
            vectors = reader.encode(self.params, [reader.chat.direct(i) for i in ids], on_rows)
        return Encoded(vectors, [""] * len(ids), np.ones(len(ids), bool), truncated)

    def _windows(self, reader: Reader, texts: list[str], overlap: int, show) -> Windows:
        size = self.max_document
        if not 0 <= overlap < size:
            raise ValueError(f"window_overlap must be at least 0 and below max_length ({size}), not {overlap}.")
        rows: list[list[int]] = []
        starts = [0]
        for ids in reader.chat.tokens(texts):
            firsts = range(0, max(len(ids) - overlap, 1), size - overlap)
            rows += [reader.chat.direct(ids[first : first + size]) for first in firsts]
            starts.append(len(rows))
        split = int((np.diff(starts) > 1).sum())
        if split:
            log.warning(
                "%d of %d documents are longer than %d tokens and were read in windows, %d in all.",
                *(split, len(texts), size, len(rows)),
            )
        with _progress(show, len(rows), "encoding") as on_rows:
            return Windows(reader.encode(self.params, rows, on_rows), np.array(starts))

    def _cut(self, vectors: np.ndarray, dimensions: int | None, normalise: bool) -> np.ndarray:
        if dimensions is None:
            return vectors
        if not 1 <= dimensions <= vectors.shape[1]:
            raise ValueError(f"truncate_dim must be between 1 and {vectors.shape[1]}, not {dimensions}.")
        return _unit(vectors[:, :dimensions]) if normalise else vectors[:, :dimensions]


def _texts(texts: Any, name: str) -> tuple[list[str], bool]:
    """The texts as a list, and whether they were one string."""
    if isinstance(texts, str):
        return [texts], True
    if not isinstance(texts, Iterable):
        raise ValueError(f"{name} must be a string or a list of strings, not {type(texts).__name__}.")
    listed = list(texts)
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{i}] must be a string, not {type(text).__name__}.")
    return listed, False


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}.")


def _check_positions(max_length: int, max_new: int, model: ModelConfig, chat: ChatFormat) -> None:
    """UserError where a text of `max_length` tokens, with chat and thought around it, is too long for the model."""
    positions = max(model.max_positions, int(model.rope_factor * model.rope_original_length))
    around = max(chat.direct_extra, chat.reasoning_extra + max_new + len(chat.direct_after([])))
    if max_length + around > positions:
        raise UserError(
            f"max_length is {max_length:,}, and up to {around} tokens come around a text; the model has {positions:,} "
            f"positions: give at most {positions - around:,}."
        )


def _limited(rows: list[list[int]], limit: int) -> tuple[list[list[int]], np.ndarray]:
    """Rows of at most `limit` ids, and which were longer; says how many."""
    truncated = np.array([len(ids) > limit for ids in rows], bool)
    if truncated.any():
        log.warning(
            "%d of %d texts are longer than %d tokens; their ends are not read.", truncated.sum(), len(rows), limit
        )
    return [ids[:limit] for ids in rows], truncated


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


@contextlib.contextmanager
def _progress(show: bool | None, total: int, what: str) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda rows: None
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda rows: bar.advance(task, rows)


Loaded = tuple[Callable[[], Any], ModelConfig, ChatFormat, dict[str, int]]  # the first reads the weights


def _load_run(folder: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str | None) -> Loaded:
    quiet_libraries()  # of reading checkpoints
    config = run_config.load_saved(folder / run_config.SAVED_NAME)
    tokenizer = tokenizers.load(folder / "tokenizer")
    model = weights.model_config(config, tokenizer)
    if dtype:
        model = dataclasses.replace(model, compute_dtype=dtype)
    model = weights.here(model, mesh)
    limits = {name: config.data[name] for name in LIMITS} | {"batch_size": config.evaluate.batch_size}
    stage = weights.trained_stage(folder)
    read_params = functools.partial(weights.load_params, folder, model, mesh, stage)
    return read_params, model, ChatFormat(tokenizer, Prompts(**config.prompts)), limits


def _load_hugging_face(folder: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str | None) -> Loaded:
    fields = read_config(folder)
    dtype = dtype or read_dtype(folder)
    model = ModelConfig(**fields, compute_dtype=dtype, param_dtype=dtype)
    prompts, limits, lowercase = Prompts(), dict(LIMITS), False
    if known := settings.read(folder):
        prompts, limits = known.prompts, {name: getattr(known, name) for name in LIMITS}
        lowercase = known.lowercase
    tokenizer = tokenizers.load(folder, lowercase)
    read = model
    if HEAD not in TensorFiles(folder).shapes:  # sentence-transformers saves none: vectors do without, thoughts do not
        read = dataclasses.replace(model, tied=True)
    read_params = functools.partial(weights.load_published, folder, read, mesh, tokenizer)
    return read_params, model, ChatFormat(tokenizer, prompts), limits
