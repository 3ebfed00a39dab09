"""Safetensors: the tensors of a checkpoint's folder read one at a time, and a file written one tensor at a time.

Tensors are read with pread, not mapped, so that what was read does not stay in this process's memory. Other formats
are not read: `pytorch_model.bin` is a pickle, which may run code.
"""

import json
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from r3jax.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorFiles:
    """The safetensors files of a folder, those that its index names if it has one.

    Attributes:
      shapes: {tensor: shape} of all of them, from the headers; nothing else is read yet.

    Raises UserError for a folder without safetensors, a damaged or missing file, a tensor in two files, one that the
    index does not name, and a dtype that is not fp32, bf16 or fp16.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, pathlib.Path] = {}
        named = _index(folder)
        for file in sorted({folder / name for name in named.values()} or folder.glob("*.safetensors")):
            self._add(file)
        if not self.shapes:
            pickled = "; pytorch_model.bin is not read, convert it first" if any(folder.glob("*.bin")) else ""
            raise UserError(f"{folder} holds no *.safetensors{pickled}; give a folder with a Qwen-2.5 checkpoint.")
        for name, where in named.items():
            if self._file.get(name) != folder / where:
                raise UserError(f"{folder / where} has no tensor {name!r}, which {INDEX} promises; fetch it again.")
        if named and (extra := self.shapes.keys() - named.keys()):
            raise UserError(
                f"{self._file[min(extra)]} holds the tensor {min(extra)!r}, which {INDEX} does not name; "
                "fetch both again."
            )

    def _add(self, file: pathlib.Path) -> None:
        with _opened(file) as tensors:
            for name in tensors.offset_keys():
                if name in self.shapes:
                    raise UserError(f"{self.folder} holds the tensor {name!r} in two files; leave one of them.")
                part = tensors.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{file}: the tensor {name!r} is {part.get_dtype()}; give a checkpoint in {', '.join(DTYPES)}."
                    )
                self.shapes[name], self._file[name] = tuple(part.get_shape()), file

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some rows of it, in the dtype of its file; the caller's own to change."""
        with _opened(self._file[name]) as tensors:
            try:
                return tensors.get_tensor(name) if rows is None else tensors.get_slice(name)[rows]
            except (SafetensorError, OSError) as e:
                raise UserError(f"{self._file[name]} cannot be read ({e}); fetch it again.") from None


def _opened(file: pathlib.Path):
    try:
        return safe_open(file, framework="np", backend="pread")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} cannot be read ({e}); fetch it again.") from None


def _index(folder: pathlib.Path) -> dict[str, str]:
    """{tensor: file} of the folder's index; empty without one."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # A plain name: an index must not lead out of its folder.
        fits = all(isinstance(f, str) and f.endswith(".safetensors") and "/" not in f for f in named.values())
    except (ValueError, LookupError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{path} is not an index of safetensors files; fetch it again.")
    return named


def write_file(
    path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any, read: Callable[[str], np.ndarray]
) -> None:
    """Writes tensors of one dtype to a safetensors file; `read` gives each when its turn comes.

    The format: the header's length (uint64, little endian), the header (JSON, padded with blanks to 8 bytes), the
    tensors' bytes. https://huggingface.co/docs/safetensors
    """
    dtype = jnp.dtype(dtype)
    code = {ours: theirs for theirs, ours in DTYPES.items()}[dtype.name]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = np.ascontiguousarray(read(name))
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, not {dtype}{shape}")
            file.write(tensor.reshape(-1).view(np.uint8).data)
