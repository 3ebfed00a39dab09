"""What this machine can do at most, measured: python -m bench.peaks

Operations per second of a float32 matrix product, the best of numpy's, jax's and torch's, whichever are installed;
bytes per second of a copy of 256 MiB, read and written, and of reading alone, all cores at once. The other benchmarks
state their shares of these.
"""

import concurrent.futures
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SIZE = 2048  # one of 4096 is within 5 % and takes eight times as long, before each benchmark
REPEATS = 7


def best(work: Callable[[], object]) -> float:
    """Seconds of the quickest of REPEATS runs."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def products() -> dict[str, float]:
    """Operations per second of a product of square matrices, by library."""
    found: dict[str, float] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        work()
        found[name] = 2 * SIZE**3 / best(work)

    a = np.random.default_rng(0).random((SIZE, SIZE), np.float32)
    note("numpy", lambda: a @ a)
    if importlib.util.find_spec("torch"):
        import torch

        b = torch.from_numpy(a)
        note("torch", lambda: b @ b)
    if importlib.util.find_spec("jax"):
        import jax
        import jax.numpy as jnp

        c, multiply = jnp.asarray(a), jax.jit(jnp.matmul)
        note("jax", lambda: multiply(c, c).block_until_ready())
    return found


def bandwidth() -> dict[str, float]:
    """Bytes per second: of a copy, each counted where it is read and where it is written; of reading alone."""
    cores = len(os.sched_getaffinity(0))
    sources = np.array_split(np.ones(2**26, np.float32), cores)
    targets = [np.zeros_like(part) for part in sources]
    size = sum(part.nbytes for part in sources)
    with concurrent.futures.ThreadPoolExecutor(len(sources)) as threads:  # numpy lets others run meanwhile
        copying = best(lambda: list(threads.map(np.copyto, targets, sources)))
        reading = best(lambda: list(threads.map(np.max, sources)))
    return {"copy": 2 * size / copying, "read": size / reading}


def measure() -> dict:
    """The peaks, measured in a process of their own: {"product", "by", "copy", "read"}."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.peaks", "--json"], env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def device() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def sentence(found: dict) -> str:
    """The peaks in words."""
    each = ", ".join(f"{name} {x / 1e9:,.0f}" for name, x in found["by"].items())
    return (
        f"{device()}, {time.strftime('%Y-%m-%d')}: {found['product'] / 1e9:,.0f} GFLOP/s in a float32 matrix product "
        f"({each}), {found['copy'] / 1e9:.1f} GB/s read and written in a copy, {found['read'] / 1e9:.1f} read alone."
    )


if __name__ == "__main__":
    by = products()
    result = {"product": max(by.values()), "by": by} | bandwidth()
    print(json.dumps(result) if "--json" in sys.argv else sentence(result))
