"""The memory that reading a published checkpoint takes: the shards that are kept and one tensor, not a second copy."""

import json
import math
import pathlib

import jax
import pytest

from r3jax.export import write_weights
from r3jax.model import params as model_params
from r3jax.model.hugging_face_config import to_config
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sharding import make_mesh
from r3jax.model.tensor_files import TensorFiles
from tests import fixtures

MIB = 2**20
# Both with Qwen-2.5's table, for the id of its new token. In fp32 12 layers of 10 MiB and 37 of table; and 5 in all.
LARGE = ModelConfig(layers=12, width=64, heads=4, kv_heads=2, head_dim=16, ffn=13568, vocab=151936)
SMALL = ModelConfig(layers=2, width=8, heads=4, kv_heads=2, head_dim=4, ffn=16, vocab=151936)
SLACK = 48 * MIB


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("devices", [1, 8])
def test_the_host_holds_the_shards_and_one_tensor(tmp_path, devices):
    """The issue's bound, over what a process takes that does the same with a small checkpoint.

    The issue's slack of 1 GiB is for checkpoints of many, and would hide a second copy of this one. 48 MiB leave room
    for the allocator; with the largest tensor they are not two thirds of such a copy.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    readers = []
    for name, config in (("small", SMALL), ("large", LARGE)):
        folder = tmp_path / name
        folder.mkdir()
        write_weights(folder, model_params.init(config, mesh, 0), config, 64 * MIB)
        (folder / "config.json").write_text(json.dumps(to_config(config, bos_id=1, eos_id=2, pad_id=1)))
        readers.append(fixtures.run_python("-m", "bench.import", "ours", str(folder), "float32", devices=devices))
    said = [reader.communicate() for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0], said
    small, large = (json.loads(out.splitlines()[-1]) for out, _ in said)
    largest = max(4 * math.prod(shape) for shape in TensorFiles(tmp_path / "large").shapes.values())
    over = large["peak"] - large["kept"] - (small["peak"] - small["kept"])
    print(f"{over / MIB:.0f} MiB over the {large['kept'] / MIB:.0f} that are kept; largest tensor {largest / MIB:.0f}")
    assert largest + SLACK < 2 / 3 * large["kept"]
    assert over <= largest + SLACK
