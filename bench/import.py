"""Peak host memory and seconds of importing a published checkpoint, beside transformers: python -m bench.import [SIZE]

Writes a checkpoint of the size (default 1_5b) in bf16 with random weights by transformers to a temporary folder, then
reads it in a fresh process each: by r3jax on 1 and on 8 fake devices, by transformers. Memory is VmHWM, the most that
the process ever held, with the interpreter and all libraries. On CPU the devices' shards are host memory too. The
bound: shards that are kept + the largest tensor, as it is held, + 1 GiB.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from bench import models, peaks
from bench.turns import memory

GIB = 2**30
READERS = {
    "r3jax, 1 device, bf16": ("ours", 1, "bfloat16"),
    "r3jax, 8 devices, bf16": ("ours", 8, "bfloat16"),
    "r3jax, 1 device, fp32": ("ours", 1, "float32"),
    "r3jax, 8 devices, fp32": ("ours", 8, "float32"),
    "transformers, bf16": ("theirs", 1, "bfloat16"),
    "transformers, fp32": ("theirs", 1, "float32"),
}


def write(folder: str, size: str) -> dict:
    import torch
    from transformers import Qwen2ForCausalLM

    from configs.base import QWEN2_5

    *shape, tied = QWEN2_5[f"qwen2_5_{size}"]
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(models.qwen2_config(shape, tied))
    model.save_pretrained(folder, max_shard_size="2GB")
    return {}


def ours(folder: str, dtype: str) -> dict:
    import jax

    from r3jax.model.hugging_face import load_hugging_face
    from r3jax.model.hugging_face_config import read_config
    from r3jax.model.qwen2 import ModelConfig
    from r3jax.model.sharding import make_mesh

    mesh = make_mesh(1, -1, 2 if jax.device_count() > 1 else 1)
    config = ModelConfig(**read_config(pathlib.Path(folder)), param_dtype=dtype)
    begin = time.time()
    params = jax.block_until_ready(load_hugging_face(pathlib.Path(folder), config, mesh, 151665))
    seconds = time.time() - begin
    kept = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    return {"seconds": seconds, "kept": kept}


def theirs(folder: str, dtype: str) -> dict:
    import torch
    from transformers import Qwen2ForCausalLM

    begin = time.time()
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    seconds = time.time() - begin
    kept = sum(w.nbytes for w in model.parameters())
    float(sum(w.float().sum() for w in model.parameters()))  # mapped pages count once they are touched
    return {"seconds": seconds, "kept": kept}


def largest_tensor(folder: pathlib.Path) -> int:
    from r3jax.model.tensor_files import TensorFiles

    return max(2 * math.prod(shape) for shape in TensorFiles(folder).shapes.values())  # two bytes a weight


def in_a_process(what: str, *args: str, devices: int = 1) -> dict:
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.import", what, *args], env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(size: str) -> int:
    print(peaks.sentence(peaks.measure()), "\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="r3jax-import-") as name:
        folder = pathlib.Path(name)
        in_a_process("write", name, size)
        files = list(folder.glob("*.safetensors"))
        largest = largest_tensor(folder)
        print(
            f"{size}: {sum(f.stat().st_size for f in files) / GIB:.2f} GiB of bf16 in {len(files)} files (in the page "
            f"cache), largest tensor {largest / GIB:.2f} GiB\n"
        )
        print(
            "| | seconds | peak, GiB | kept, GiB | peak - kept, GiB | bound for that, GiB |\n|---|---|---|---|---|---|"
        )
        broken = 0
        for label, (reader, devices, dtype) in READERS.items():
            found = in_a_process(reader, name, dtype, devices=devices)
            over, bound = found["peak"] - found["kept"], largest * (2 if dtype == "float32" else 1) + GIB
            broken += reader == "ours" and over > bound
            figures = (found["peak"], found["kept"], over, bound if reader == "ours" else None)
            cells = [f"{x / GIB:.2f}" if x is not None else "" for x in figures]
            print(f"| {label} | {found['seconds']:.1f} | " + " | ".join(cells) + " |", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    word, *rest = sys.argv[1:] or ["1_5b"]
    if word in ("write", "ours", "theirs"):
        result = {"write": write, "ours": ours, "theirs": theirs}[word](*rest)
        print(json.dumps(result | {"peak": memory("VmHWM")}))
    else:
        sys.exit(main(word))
