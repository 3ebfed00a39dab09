"""The plan: what is compiled and kept, roofline, names of topologies, and the smallest plan of all."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench import plan_table
from configs.base import QWEN2_5
from r3jax import plan
from r3jax.errors import UserError
from r3jax.model import attention, sampler
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sharding import make_mesh
from r3jax.planning import programs, roofline, search, topologies
from r3jax.planning.compiled import _compiler, _short, compiled
from r3jax.planning.costs import Collective, Costs
from r3jax.planning.programs import Program
from r3jax.run import config as run_config

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied")


def shape(size: str) -> ModelConfig:
    return ModelConfig(**dict(zip(FIELDS, QWEN2_5[f"qwen2_5_{size}"], strict=True)))


def test_a_loop_whose_length_is_not_known_is_not_passed_over(tmp_path):
    """Only decoding may have one: taken as no round at all it would make any other program cheap."""

    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() < 5, lambda x: x @ x, x)

    mesh, here = make_mesh(devices=jax.devices()[:1]), topologies.read("h100:1")
    program = Program("a step", jax.jit(run), (jax.ShapeDtypeStruct((16, 16), jnp.float32),), {})
    with pytest.raises(ValueError, match="a step: 0 loop may have a length that only a run knows, not \\['while"):
        compiled(program, here, mesh, tmp_path)
    assert not list(tmp_path.iterdir())
    found = compiled(dataclasses.replace(program, trips=9), here, mesh, tmp_path)
    assert (found.once.flops, found.again.flops) == (0, 2 * 16**3)


def test_another_compiler_is_asked_anew(tmp_path, monkeypatch):
    mesh, here = make_mesh(devices=jax.devices()[:1]), topologies.read("h100:1")
    program = Program("a step", jax.jit(jnp.sin), (jax.ShapeDtypeStruct((16,), jnp.float32),), {})
    first = compiled(program, here, mesh, tmp_path)
    assert compiled(program, here, mesh, tmp_path) == first and first.took > 0
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --other")
    compiled(program, here, mesh, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    names = []
    for flags in ("", "--xla_tpu_x=1"):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
        names.append(_compiler(topologies.read("v5e-16")))
    assert names == ["libtpu 1 ", "libtpu 1 --xla_tpu_x=1"]


def test_sampling_is_what_the_sampler_runs(monkeypatch):
    """Prefill as `sample` calls it, and decoding as it does once the cache has grown to its full size."""
    config = run_config.load("configs/rl.py")
    with config.unlocked():
        config.from_scratch, config.data.max_thought_tokens = True, 39
    mesh = make_mesh(2, 2, 1, jax.devices()[:4])
    (first, state, model), (then, _, _) = plan._programs("rollout", config, mesh)
    rows, width = config.rl.prompts // 4, first.args[1].shape[1]  # of a device
    slots = rows * (width + config.rl.group_size * 40)
    assert then.cache == 2 * model.layers * slots * model.kv_heads * model.head_dim * 4 + rows * width  # and a mask
    assert then.copied == programs.on_one(state.params["layers"])
    calls = []

    def watch(run):
        def watched(*args, **kwargs):
            calls.append((run, placed(args), kwargs))
            return run(*args, **kwargs)

        return watched

    for name in ("prefill", "decode"):
        monkeypatch.setattr(sampler, name, watch(getattr(sampler, name)))

    def placed(tree):
        return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]

    def made(x):
        return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)

    with jax.set_mesh(mesh):
        params, *batch = jax.tree.map(made, first.args)
        key = jax.device_put(jax.random.key(0), NamedSharding(mesh, P()))
        options = {"temperature": 1.0} | {name: then.kwargs[name] for name in ("embed_id", "stop_ids", "temperature")}
        # Weights of 0 make every token as likely, so hardly a row ends early and none leaves.
        given = {name: value for name, value in first.kwargs.items() if name != "room"}
        sampler.sample(params, *batch, key, **given | options)
    for program, (run, args, kwargs) in zip((first, then), (calls[0], calls[-1]), strict=True):
        assert (program.function, program.kwargs) == (run, kwargs)
        assert placed(program.args) == args


def test_roofline():
    """The slowest decides; beyond a host the slower network."""
    near, far = (Collective("all-gather", n, n - 1, 1, 1, 1e9) for n in (8, 16))
    tpu, gpu = topologies.CHIPS["v5e"], topologies.CHIPS["h100"]
    times = roofline.times(Costs(197e12, 819e9 / 2, (near, far)), tpu)
    assert (times.arithmetic, times.memory, times.network) == (1, 0.5, 2e9 / 200e9)
    assert (times.limit, times.overlapped, times.added) == ("arithmetic", 1, 1.51)
    times = roofline.times(Costs(0, 0, (near, far)), gpu)
    assert times.network == 1e9 / 450e9 + 1e9 / 50e9 and times.limit == "network"
    assert roofline.utilisation(98.5e12, 2, tpu) == 0.25


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e-16", "v5e:4x4", 16),
        ("v6e-256", "v6e:16x16", 256),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p:2x2x2", "v5p:2x2x2", 8),
        ("h100:32", "h100:32", 32),
    ],
)
def test_topologies(text, name, chips):
    found = topologies.read(text)
    assert (found.name, found.chips) == (name, chips)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v7x:4x4", "must be one of v5e"),
        ("pod", "must be one of v5e"),
        ("v5e:16", "no size of v5e"),
        ("v5e-17", "no size of v5e"),
        ("v5e:4x4x4", "takes a shape such as 4x4"),
        ("v5p:4x4", "takes a shape such as 2x2x4"),
        ("v5e:32x32", "not between 1 chip and v5e:16x16"),
        ("h100:0", "not between 1 chip and h100:4096"),
        ("h100:2x4", "takes a number of processors"),
    ],
)
def test_topologies_that_are_none(text, said):
    with pytest.raises(UserError, match=said):
        plan.main(["--config=configs/rl.py", f"--topology={text}"])


def test_no_memory_is_told_from_other_complaints():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm. "
    assert _short(said + "Exceeded hbm capacity by 4.36G.") == 4.36 * 2**30
    assert _short("INTERNAL: something else") is None
    said = "RESOURCE_EXHAUSTED: TPU TensorCore Hbm usage: 34.82G, SparseCore Hbm usage 174.10G, exceeding available "
    assert _short(said + "bytes: 95.74G") == pytest.approx((34.82 + 174.10 - 95.74) * 2**30)
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.64G) exceeds "
    )
    assert _short(said + "available HBM (15.75G).") == pytest.approx((18.64 - 15.75) * 2**30)


def test_as_many_devices_as_chips(monkeypatch):
    """A compiler that counts cores would have costs per chip be wrong without a word."""
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: True)
    described = types.SimpleNamespace(devices=[None] * 8)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lambda name, platform: described)
    assert len(topologies.devices(topologies.read("v5p:2x2x2"))) == 8
    with pytest.raises(UserError, match="v5p:2x2x1 has 4 chips, and 8 devices"):
        topologies.devices(topologies.read("v5p:2x2x1"))


def test_the_order_of_trials():
    """No tensor axis where none is needed; a model that no mesh holds has none; chunks divide the rows."""
    small, large = shape("0_5b"), shape("72b")
    memory = topologies.CHIPS["v5e"].memory
    assert next(search.meshes(small, 16, memory, 20)) == (8, 2, 1)
    assert list(search.meshes(large, 16, memory, 20)) == []
    assert next(search.meshes(large, 256, memory, 20)) == (1, 256, 1)
    assert search.weights(small) == 494_032_768  # as transformers counts them
    counts = [search.chunks(small, 16, 16 * 1300, left, 1) for left in (1e12, 3e9, 1e9)]
    assert counts[0] == 1 < counts[1] <= counts[2] == 16


def planned(words, capsys):
    capsys.readouterr()
    plan.main(words)
    return capsys.readouterr().out


def test_a_plan_for_graphics_processors(capsys, monkeypatch, tmp_path):
    """The whole verb, on fake devices: bytes by hand, the mesh it suggests, and what it remembers."""
    monkeypatch.setattr(plan, "CACHE", tmp_path)
    monkeypatch.setattr(attention, "_in_blocks", lambda *_: pytest.fail("lowered for CPU"))
    words = ["--config=configs/sft.py", "--topology=h100:8", "--config.model.layers=1", "--config.sft.batch_size=24"]
    found = json.loads(planned([*words, "--config.sft.kl_weight=0.1", "--json"], capsys))
    assert "ESTIMATE" in found["basis"] and found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert [row["program"] for row in found["programs"]] == ["SFT step", "encoding"]
    step, encoding = found["programs"]
    config = ModelConfig(1, 128, 4, 2, 32, 512, 4096)
    for row in (step, encoding):
        memory = row["memory"]
        assert memory["parameters"] == memory["reference"] == 4 * search.weights(config)
        assert memory["optimiser"] == pytest.approx(8 * search.weights(config), rel=1e-4)
        assert row["fits"] and row["total"] == sum(memory.values()) < row["limit"]
    sent = {c["kind"]: c for c in step["parts"][0]["collectives"]}
    # Each chip reduces the gradients of all weights at least once.
    assert sent["all-reduce"]["operand_bytes"] >= 4 * search.weights(config)
    # 8 rows of 40 tokens a chip, whose keys and values are all wanted (the table is looked up); the rest of the only
    # layer, the scores and what they mix, for the last token.
    keys_and_values, rest = 128 * 2 * 64, 128 * (2 * 128 + 3 * 512)
    assert encoding["parts"][0]["flops"] == 2 * 8 * (40 * keys_and_values + rest + 2 * 40 * 128)
    assert len(list(tmp_path.iterdir())) == 2

    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: pytest.fail("compiled again"))
    said = planned([*words, "--config.sft.kl_weight=0.1"], capsys)
    assert "SFT step: 0." in said and "fits" in said
    assert "use: --config.mesh.data=8 --config.mesh.fsdp=1 --config.mesh.tensor=1 --config.sft.chunks=1" in said


def test_a_model_that_no_mesh_holds(capsys, monkeypatch, tmp_path):
    """Nothing is compiled; the bytes that lack are said."""
    monkeypatch.setattr(plan, "CACHE", tmp_path)
    words = ["--config=configs/sft.py:qwen2_5_72b", "--topology=h100:8", "--json"]
    (row,) = json.loads(planned(words, capsys))["programs"]
    assert not row["fits"] and not list(tmp_path.iterdir())
    assert row["total"] == pytest.approx(search.weights(shape("72b")) * 20 / 8, rel=0.01)
    assert f"{row['total'] - row['limit']:,.0f} bytes too many" in planned(words[:2], capsys)


def test_an_adapter_is_planned_without_its_base(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "CACHE", tmp_path)
    words = ["--topology=h100:8", "--config.model.layers=1", "--config.sft.batch_size=32", "--config.lora.rank=4"]
    found = json.loads(planned(["--config=configs/sft.py", *words, "--json"], capsys))
    memory = found["programs"][0]["memory"]
    assert 0 < memory["parameters"] < memory["reference"] / 4 and memory["optimiser"] < 3 * memory["parameters"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--topology is missing"),
        (["--topology=h100:8", "--config.mesh.fsdp=3"], "does not multiply to the 8 devices"),
        (["--topology=h100:4096"], "needs 4096 fake devices, there are 8"),
        (["--topology=h100:8", "--config.model.attention=cudnn"], "are not counted yet; plan with 'xla'"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(UserError, match=said):
        plan.main(["--config=configs/sft.py", *words])


def test_a_row_that_fails_ends_no_other(monkeypatch, tmp_path, capsys):
    """The table of plans: what is compiled is kept, what lacks is named, and a second call goes on."""
    monkeypatch.setattr(plan_table, "KEPT", tmp_path)
    monkeypatch.setattr(topologies, "prepare", lambda topology: None)
    part = {"name": "SFT step", "flops": 1e12, "bytes": 1e9, "limit": "memory", "mfu": [0.1, 0.2]}
    part |= {"seconds": {"overlapped": 0.5}}
    begun, broken = [], True

    def make(config, topology, say, cache, keep):
        begun.append((config.name, topology.chips))
        sent = [{"kind": "all-reduce", "wire_bytes": 1e9 * topology.chips}]
        row = {"program": "SFT step", "total": 2**30, "limit": 2**31, "fits": True, "compiling": [7.0, 5.0]}
        row["parts"] = [part | {"collectives": sent}]
        found = {"mesh": {"data": 8, "fsdp": 2, "tensor": 1}, "chunks": {"sft": 4}, "missing": ["encoding"]}
        keep(found | {"programs": [row]})
        if broken and topology.chips == 16:
            raise RuntimeError("INTERNAL: the compiler fell over\nand more")
        return found | {"programs": [row], "missing": []}

    monkeypatch.setattr(plan, "make", make)
    words = ["0_5b:v5e-16", "0_5b:v5e-256"]
    plan_table.main(words)
    said = capsys.readouterr().out
    row = "| 0_5b | v5e-16 | 8×2×1 |"
    assert f"{row} SFT step | 4 | 1.0 of 2.0 | yes | 1 | 1 | 16 | 500 ms | memory | 20% | 7 s (5 of CPU) |" in said
    assert f"{row} encoding |  |  | not compiled yet |" in said
    assert "0_5b:v5e-16 lacks encoding (RuntimeError: INTERNAL: the compiler fell over)." in said
    assert "| 0_5b | SFT step | all-reduce | 8×2×1, 4 | 16 | 8×2×1, 4 | 256 | 16.00 |" in said
    broken = False
    plan_table.main(words)
    assert begun == [("rl-qwen2_5_0_5b", n) for n in (16, 256, 16)]
    assert "lacks" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_tpu_compiler():
    """A plan for four hosts of four, by the TPU compiler, without a TPU (`make plan-deps` brings the compiler)."""
    words = ["--config=configs/rl.py", "--topology=v5e:4x4", "--config.model.layers=1", "--json"]
    command = [sys.executable, "-m", "r3jax.plan", *words]
    paths = os.pathsep.join([str(ROOT / ".venv" / "libtpu"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = [part["name"] for row in found["programs"] for part in row["parts"]]
    decoding = ["decoding, before each 32 tokens", "decoding, a token"]
    assert names == ["SFT step", "policy update", "encoding", "prefill", *decoding] and not found["missing"]
    assert all(row["fits"] for row in found["programs"]) and found["basis"].startswith("compiled by the TPU compiler")
    step = found["programs"][0]["parts"][0]
    assert step["flops"] > 0 and step["seconds"]["overlapped"] > 0 and 0 < step["mfu"][0] <= step["mfu"][1] < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e-256", "v6e-256", "v5p-128"])
def test_every_split_of_a_slice_is_a_mesh(name):
    """128 x 2 wants an axis of the torus in parts."""
    code = f"""
from r3jax.planning import topologies
topology = topologies.read("{name}")
topologies.prepare(topology)
from r3jax.model.sharding import make_mesh
devices = topologies.devices(topology)
for tensor in (1, 2, 4):
    for fsdp in (2**i for i in range(9) if 2**i * tensor <= len(devices)):
        assert make_mesh(-1, fsdp, tensor, devices).size == len(devices)
"""
    paths = os.pathsep.join([str(ROOT / ".venv" / "libtpu"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": ""})
    assert done.returncode == 0


def test_no_import_chooses_devices():
    """Fake devices, and a cluster's processes, must be asked for before JAX first looks for devices."""
    code = "import r3jax.plan, jax\nassert not jax._src.xla_bridge._backends"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
