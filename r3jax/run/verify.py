"""How a checkpoint proves that it is whole: a checksum for each array, one for its description, one verdict for all.

Orbax does not see a flipped bit: it restores silently. Single flips always change a sum, wherever they are.
"""

import json
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.processes import gather, is_spread, own


class DamagedError(Exception):
    """A checkpoint that cannot be read or does not match its checksums; says why."""


def checksums(leaves: list[Any]) -> list[int]:
    """One uint32 for each array: the wrap-around sum of its bits, however it is sharded or filled up with zeros."""
    on_device = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not is_spread(leaf)]
    sums = jax.device_get(_device_sums([leaves[i] for i in on_device]))
    result = {i: int(s) for i, s in zip(on_device, sums, strict=True)}
    return [result[i] if i in result else _host_sum(leaf) for i, leaf in enumerate(leaves)]


@jax.jit
def _device_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        words = jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def _host_sum(x: Any) -> int:
    if is_spread(x):
        return int(gather(np.array(_host_sum(own(x)), np.uint32)).sum(dtype=np.uint32))
    words = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * min(4, x.dtype.itemsize)}")
    return int(np.sum(words, dtype=np.uint32))


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """JSON with its checksum, as `unseal` reads it."""
    text = json.dumps(content, sort_keys=True)
    return {"text": text, "crc": zlib.crc32(text.encode())}


def unseal(file: pathlib.Path) -> dict[str, Any]:
    """What `seal` made, from a JSON file; DamagedError where it is not there or not as it was written."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        text, crc = kept["text"], kept["crc"]
        if zlib.crc32(text.encode()) == crc:
            return json.loads(text)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise DamagedError(first_line(e)) from None
    raise DamagedError("its description does not match its checksum")


def agree(why: str) -> None:
    """Raises DamagedError on all processes if one of them has a reason."""
    if gather(np.array(bool(why))).any():
        raise DamagedError(why or "another process could not read it")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
