"""What a GPU gets done, beside transformers on the same card: python -m bench.gpu [SIZE] [--rounds=N]

In bfloat16, by default at the 1.5B shape: the step of `bench.sft` with XLA's attention and with cuDNN's (weights and
moments in float32; torch's all in bfloat16), and `bench.rollout`'s 64 new tokens for 256 rows, with their shares of the
device's own peaks: a product of 8192 x 8192 in bfloat16, and a copy of 1 GiB, read and written. A decoding step must
read all weights, each prompt's keys and values once, and each row's own. Then what must be equal: the loss of one batch
at 25m, here and on CPU in float32, and attention's gradients at lengths of 64 modulo 128, where cuDNN's have been NaN.

Where there is no GPU the same runs on CPU, to see that it does: its figures mean nothing.
"""

import functools
import subprocess
import sys
import time

from bench import models, rollout, sft
from bench.turns import command, in_turns, table

ROWS = 256  # of a rollout
NEW = 64
HALF = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
LENGTHS = (64, 192, 320)
OTHERS = ("seconds", "peak", "spread")  # what every worker's answer holds


def has_gpu() -> bool:
    try:
        return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return False


GPU = has_gpu()
PLATFORMS, DEVICE = ("cuda,cpu", "cuda") if GPU else ("cpu", "cpu")
KERNELS = ("xla", "cudnn") if GPU else ("xla",)


def peaks():
    """Operations and bytes per second of the device."""
    import jax
    import jax.numpy as jnp

    size = 8192 if GPU else 1024
    a, long = jnp.ones((size, size), jnp.bfloat16), jnp.ones(2**28 if GPU else 2**22)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)

    def rate(work, amount: float) -> float:
        work().block_until_ready()
        begin = time.perf_counter()
        for done in [work() for _ in range(10)]:  # given to the device one after the other, without waiting
            done.block_until_ready()
        return 10 * amount / (time.perf_counter() - begin)

    return lambda: {
        "seconds": 1.0,
        "product": rate(lambda: multiply(a, a), 2 * size**3),
        "copy": rate(lambda: copy(long), 2 * long.nbytes),
    }


def parity(folder: str):
    """The first loss of bench.sft's batches: on CPU in float32, and in bfloat16 by each kernel."""
    import jax

    def first(**changes) -> float:
        step = sft.Step(folder, sft.PAIRS["25m"], **changes)
        return step(step.batches[0])

    exact = first(devices=jax.devices("cpu")[:1])
    here = {kernel: first(compute_dtype="bfloat16", attention=kernel) for kernel in KERNELS}
    return lambda: {"seconds": 1.0, "float32": exact} | here


def gradients():
    """By kernel and length: how far attention's gradients in bfloat16 are from float32's, of the largest of these; NaN
    where one is not finite."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from r3jax.model.attention import attend, visible

    def gradient(length: int, dtype: str, kernel: str):
        rng = np.random.default_rng(length)
        q = rng.normal(size=(2, length, 2, 6, 64)) / 8
        keys, values = rng.normal(size=(2, 2, length, 2, 64))
        lengths = np.array([length, length - 9])
        real = jnp.asarray(np.arange(length) < lengths[:, None])

        def total(*x):
            mixed = attend(*x, visible(real), kernel).astype(jnp.float32)
            return jnp.sin(jnp.where(real[..., None, None, None], mixed, 0)).sum()

        given = (jnp.asarray(x, dtype) for x in (q, keys, values))
        found = jax.jit(jax.grad(total, (0, 1, 2)))(*given)
        return np.concatenate([np.asarray(x, np.float32).ravel() for x in found])

    found = {}
    for length in LENGTHS:
        with jax.default_matmul_precision("highest"):
            exact = gradient(length, "float32", "xla")
        for kernel in KERNELS:
            error = np.abs(gradient(length, "bfloat16", kernel) - exact)
            found[f"{kernel} {length}"] = float(error.max() / np.abs(exact).max())
    return lambda: {"seconds": 1.0} | found


def read_a_step(size: str, prompts: int, width: int) -> float:
    """Bytes of weights, keys and values that a decoding step reads, at half of the new tokens."""
    layers, _, _, kv_heads, head_dim, *_ = models.SIZES[size]
    weights = sum(models.products(size, 1, logits=1).values())  # two operations a weight, two bytes
    return weights + layers * 2 * kv_heads * head_dim * 2 * (prompts * width + ROWS * NEW / 2)


MAKERS = {
    "peaks": peaks,
    "parity": parity,
    "gradients": gradients,
    **{f"step {kernel}": functools.partial(sft.ours, compute_dtype="bfloat16", attention=kernel) for kernel in KERNELS},
    "step torch": functools.partial(sft.torch, dtype="bfloat16", device=DEVICE),
    "rollout ours": functools.partial(rollout.ours, **HALF),
    "rollout torch": functools.partial(rollout.transformers, dtype="bfloat16", device=DEVICE),
}


def device() -> str:
    if not GPU:
        return "no GPU: a rehearsal on CPU, whose figures mean nothing"
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def run(names: list[str], options: dict, rounds: int) -> dict[str, dict]:
    return in_turns("bench.gpu", names, options, rounds, together=False, platforms=PLATFORMS)


def main(sizes: list[str], rounds: int) -> None:
    print(f"{device()}, {time.strftime('%Y-%m-%d')}\n")
    [peak] = run(["peaks"], {}, 1).values()
    if "failure" in peak:
        print(f"error: its peaks could not be measured: {peak['failure']}.", file=sys.stderr)
        sys.exit(1)
    print(f"{peak['product'] / 1e12:.1f} TFLOP/s in a bfloat16 product, {peak['copy'] / 1e9:.0f} GB/s in a copy\n")
    for size in sizes:
        with models.folder(size) as folder:
            steps, rows = [name for name in MAKERS if name.startswith("step")], []
            for name, x in run(steps, {"folder": folder, "pairs": sft.PAIRS[size]}, rounds).items():
                if "failure" not in x:
                    need = 3 * sum(models.products(size, x["computed"], logits=x["answers"]).values()) / x["seconds"]
                    share = f"{100 * need / peak['product']:.0f} %"
                    rows.append([name, f"{x['rate']:,.0f}", share, f"{x['first']:.4f}", f"{100 * x['spread']:.0f} %"])
                else:
                    rows.append([name, x["failure"], *[""] * 3])
            print(
                table([f"{size}, {sft.PAIRS[size]} pairs", "tokens/s", "of the peak", "first loss", "spread"], rows),
                "\n",
            )
            prompts, rows = ROWS // rollout.GROUP, []
            width = max(map(len, models.prompts(folder, prompts)))
            options = {"folder": folder, "new": NEW, "stops": False, "prompts": prompts}
            for name, x in run(["rollout ours", "rollout torch"], options, rounds).items():
                if "failure" not in x:
                    rate = read_a_step(size, prompts, width) * NEW / x["seconds"]
                    share = f"{100 * rate / peak['copy']:.0f} %"
                    rows.append([name, f"{x['rate']:,.0f}", share, f"{100 * x['spread']:.0f} %"])
                else:
                    rows.append([name, x["failure"], *[""] * 2])
            print(
                table([f"{size}, {ROWS} rows", "tokens/s", "of a copy's bandwidth", "spread"], rows), "\n", flush=True
            )
    with models.folder("25m") as folder:
        [losses] = run(["parity"], {"folder": folder}, 1).values()
    [errors] = run(["gradients"], {}, 1).values()
    for what, found in (("first loss at 25m", losses), ("error of attention's gradients", errors)):
        said = found.get("failure") or ", ".join(f"{k} {x:.5g}" for k, x in found.items() if k not in OTHERS)
        print(f"{what}: {said}")


if __name__ == "__main__":
    command(MAKERS, main, ["1.5b"])
