"""What every array must satisfy before a search backend sees it.

ScaNN 1.4 does not raise on bad input: a NaN row, a batch of size zero or an inf in an upsert ends the
process, a NaN query or a k above the index's size gives quietly wrong rows. So the index checks first, and
these checks raise ValueError that names the argument.
"""

import numpy as np

# Rows are cosines' operands: their length is 1 up to what bfloat16 encoders leave (8 bits of mantissa).
UNIT_TOLERANCE = 1e-2
# Longer queries overflow in a float32 score.
LONGEST = 1e30


def matrix(name: str, value, width: int | None = None) -> np.ndarray:
    """`value` as a finite, C-contiguous float32 matrix [rows, width]; a copy only where the input differs."""
    array = _array(name, value)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} must hold floating-point numbers, not {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must be a matrix [rows, width], not an array of shape {array.shape}")
    if array.shape[1] == 0 or (width is not None and array.shape[1] != width):
        expected = "at least 1" if width is None else width
        raise ValueError(f"{name} has rows of width {array.shape[1]}, expected {expected}")
    with np.errstate(over="ignore"):  # an overflow becomes inf, which the next line reports
        array = np.ascontiguousarray(array, dtype=np.float32)
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise ValueError(f"{name} has a NaN or an infinity in row {int(np.argmax(bad))}")
    return array


def bounded_rows(name: str, array: np.ndarray) -> np.ndarray:
    """`array` [rows, width], whose rows must be so short that no score overflows."""
    lengths = np.linalg.norm(array.astype(np.float64), axis=1)
    if (lengths > LONGEST).any():
        row = int(np.argmax(lengths))
        raise ValueError(f"{name} must be of moderate length, row {row} has length {lengths[row]:.4g}")
    return array


def unit_rows(name: str, array: np.ndarray) -> np.ndarray:
    """`array` [rows, width], whose rows must have length 1."""
    lengths = np.linalg.norm(array, axis=1)
    bad = np.abs(lengths - 1.0) > UNIT_TOLERANCE
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"{name} must be L2-normalised, row {row} has length {lengths[row]:.4g}")
    return array


def holds_document(vectors: np.ndarray) -> np.ndarray:
    """Which rows [...] of `vectors` [..., D] hold a document; a row of zeros is a deleted one."""
    return np.asarray(vectors.any(axis=-1))


def row_ids(name: str, value, size: int) -> np.ndarray:
    """`value` as int64 [rows]: unique row numbers in [0, size)."""
    array = _array(name, value)
    if array.ndim != 1:
        raise ValueError(f"{name} must be a list of row numbers, not an array of shape {array.shape}")
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, not {array.dtype}")
    outside = (array < 0) | (array >= size)
    if outside.any():
        raise ValueError(f"{name} names row {int(array[np.argmax(outside)])}, the index holds rows 0..{size - 1}")
    array = array.astype(np.int64)
    if np.unique(array).size != array.size:
        raise ValueError(f"{name} names the same row twice")
    return array


def integers(name: str, value, count: int) -> np.ndarray:
    """`value` as int64 [count], each within an int32 and not negative."""
    array = _array(name, value)
    if array.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), not {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, not {array.dtype}")
    if ((array < 0) | (array > np.iinfo(np.int32).max)).any():
        raise ValueError(f"{name} must lie in 0..{np.iinfo(np.int32).max}")
    return array.astype(np.int64)


def whole(name: str, value, low: int, high: int) -> int:
    """`value` as an int in [low, high]; booleans and fractions are refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")
    return int(value)


def _array(name: str, value) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as e:  # whatever numpy or the object's own __array__ raises: rows of unequal length and worse
        raise ValueError(f"{name} cannot be made an array: {e}") from None
