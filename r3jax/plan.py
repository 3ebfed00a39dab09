"""What a run costs on chips that are not here: memory, time and communication of its real programs, compiled for them.

    python -m r3jax.plan --config=configs/rl.py:SIZE --topology=NAME [--json] [--config.KEY=VALUE ...]

NAME is a TPU slice (v5e:16x16, v5e-16, v6e-256, v5p-128), for which the TPU compiler compiles without a TPU (pip
install -r requirements-plan.txt), or graphics processors (h100:32, a100:8), estimated from the same programs
partitioned for as many fake CPU devices. The mesh and the chunks of gradient caching that fit are looked for, unless
the command line gives them (--config.mesh.fsdp=16). Compiling takes minutes a program; what was compiled is kept in
.cache/plan. For example:

    python -m r3jax.plan --config=configs/rl.py:qwen2_5_7b --topology=v5e:16x16
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, ClassVar

import jax
from ml_collections import ConfigDict

from r3jax import assembly, weights
from r3jax.data.beir import Dataset
from r3jax.errors import UserError
from r3jax.model import params as model_params
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sharding import AXES, batch_parts, make_mesh
from r3jax.planning import programs, report, search, topologies
from r3jax.planning.compiled import compiled
from r3jax.planning.programs import Program
from r3jax.planning.topologies import Topology
from r3jax.run import config as run_config
from r3jax.run.config import run_main
from r3jax.run.log import quiet_libraries
from r3jax.stages.sft import PairTransform
from r3jax.stages.state import TrainState
from r3jax.text import tokenizer as tokenizers
from r3jax.text.prompts import ChatFormat, Prompts

CACHE = pathlib.Path(".cache/plan")
ROWS = {"sft": "batch_size", "rl": "prompts"}  # the field that says how many rows a stage's batch has
# What a config runs, in the order in which it is compiled: decoding last, for it is unrolled over the layers.
PROGRAMS = {
    "sft": ("SFT step",),
    "rl": ("policy update",),
    "encode": ("encoding",),
    "rollout": ("prefill", "decoding"),
}
BASIS = {
    True: "compiled by the TPU compiler; rows as long as the config lets them be",
    False: "an ESTIMATE: partitioned for fake CPU devices, whose compiler fuses less and multiplies bf16 as fp32, so "
    "temporaries and traffic are too high",
}


def main(argv: list[str]) -> None:
    argv, as_json = [word for word in argv if word != "--json"], "--json" in argv
    flags = {"topology": "the chips, such as v5e:16x16, v5e-16, v5p-128, h100:32"}
    parsed = run_config.parse(argv, "r3jax.plan", flags)
    if not parsed.flags["topology"]:
        raise UserError("--topology is missing; name the chips, such as --topology=v5e:16x16.")
    topology = topologies.read(parsed.flags["topology"])
    quiet_libraries()
    topologies.prepare(topology)
    config = parsed.config
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the plan's
        weights.adopt(config, parsed.given)
    with config.unlocked():
        config.from_scratch = True  # no weights are looked at
    run_config.validate(_plain(config))
    if config.model.attention != "xla":
        raise UserError(
            f"config.model.attention={config.model.attention!r}: a kernel's operations and memory are not counted yet; "
            "plan with 'xla', whose memory is more."
        )
    found = make(config, topology, parsed.given, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(found, indent=1) if as_json else report.text(found))


def make(
    config: ConfigDict,
    topology: Topology,
    given: Iterable[str] = (),
    say: Callable[[str], None] = lambda line: None,
    cache: pathlib.Path | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda plan: None,
) -> dict[str, Any]:
    """The plan: the first mesh on which every program fits, else the last that was tried.

    Args:
      given: keys of the config that are not to be changed: "mesh.…", "sft.chunks", "rl.chunks".
      say: gets a line when a program's turn begins.
      cache: where compiled programs' figures are kept, in place of CACHE.
      keep: gets the plan after each program; what it lacks by then is in its "missing".
    """
    devices, chip = topologies.devices(topology), topology.chip
    parts = _parts(config)
    per_weight = search.STATE + search.REFERENCE * any(config[name].kl_weight for name in ROWS if name in config)
    if parts.model.lora:
        per_weight = 2  # the frozen base; the adapter is small beside it
    if any(key.startswith("mesh.") for key in given):
        options = [tuple(make_mesh(**config.mesh, devices=devices).shape.values())]
    else:
        options = list(search.meshes(parts.model, topology.chips, chip.memory, per_weight))
    plan = {
        "config": config.name,
        "topology": topology.name,
        "chips": topology.chips,
        "chip": chip.name,
        "basis": BASIS[topology.is_tpu],
        "tried": [],
        "missing": [],
    }
    if not options:
        return plan | _too_large(parts, devices, chip)
    there = _There(topology, cache or CACHE, frozenset(given), say)
    names = [name for name in PROGRAMS if name in config or name == "encode" or (name == "rollout" and "rl" in config)]
    for sizes in options:
        data, fsdp, tensor = sizes
        mesh = make_mesh(data, fsdp, tensor, devices)
        fitted, flags = _whole_rows(config, mesh)
        plan |= {"mesh": dict(zip(AXES, sizes, strict=True)), "chunks": {}, "programs": []}
        plan["flags"] = [*(f"--config.mesh.{axis}={size}" for axis, size in plan["mesh"].items()), *flags]
        plan["missing"] = [program for name in names for program in PROGRAMS[name]]
        keep(plan)
        for name in names:
            for row in _fitting(name, fitted, mesh, there, plan):
                plan["programs"].append(row)
                plan["missing"].remove(row["program"])
                keep(plan)
            if not all(row["fits"] for row in plan["programs"]):
                break
        if all(row["fits"] for row in plan["programs"]):
            break
    plan["missing"] = []  # what comes after a program that does not fit is of no use
    return plan


def _plain(config: ConfigDict) -> ConfigDict:
    """Without an adapter, which wants a base on disk."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.lora.rank = 0
    return config


@dataclasses.dataclass(frozen=True)
class _There:
    """What programs are compiled for, and how: as `make` is told."""

    topology: Topology
    cache: pathlib.Path
    given: frozenset[str]
    say: Callable[[str], None]


def _whole_rows(config: ConfigDict, mesh) -> tuple[ConfigDict, list[str]]:
    """The config with batches that split over the mesh, and the flags that say so."""
    config, flags, parts = config.copy_and_resolve_references(), [], batch_parts(mesh)
    for name, field in ROWS.items():
        if name in config and (lacking := -config[name][field] % parts):
            config[name][field] += lacking
            flags.append(f"--config.{name}.{field}={config[name][field]}")
    return config, flags


def _fitting(name: str, config: ConfigDict, mesh, there: _There, plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a stage's programs up to one that does not fit, with the fewest chunks that do (noted in the plan)."""
    if name not in ROWS:
        yield from _rows(name, config, mesh, there)
        return
    per_chip = config[name][ROWS[name]] // batch_parts(mesh)
    counts = [config[name].chunks]
    if f"{name}.chunks" in there.given and per_chip % counts[0]:
        raise UserError(f"config.{name}.chunks ({counts[0]}) must divide the {per_chip} rows of a chip.")
    if f"{name}.chunks" not in there.given:
        least = _least_chunks(name, config, there.topology, mesh)
        counts = [n for n in range(least, per_chip + 1) if per_chip % n == 0]
    before = float("inf")
    for count in counts[: search.TRIALS]:
        config[name].chunks = plan["chunks"][name] = count
        (row,) = _rows(name, config, mesh, there)
        if row["fits"]:
            break
        miss = f"{name} in {count} chunks, mesh {tuple(mesh.shape.values())}: {report.verdict(row)}"
        plan["tried"].append(f"{miss}; compiled in {row['compiling'][0]:.0f} s")
        if row["total"] >= before:
            break  # what does not fit is not the rows
        before = row["total"]
    plan["flags"].append(f"--config.{name}.chunks={count}")
    yield row


def _least_chunks(name: str, config: ConfigDict, topology: Topology, mesh) -> int:
    """Where to begin: by arithmetic, on a batch in one chunk."""
    config[name].chunks = 1
    ((program, state, model),) = _programs(name, config, mesh)
    left = topology.chip.memory - programs.on_one(state) - programs.on_one(state.params)  # the gradient is as large
    parts = batch_parts(mesh)
    rows = config[name][ROWS[name]] // parts
    return search.chunks(model, rows, program.trained // parts, left, mesh.shape["tensor"])


def _rows(name: str, config: ConfigDict, mesh, there: _There) -> Iterator[dict[str, Any]]:
    """Figures of a stage's programs, up to the first that does not fit."""
    topology = there.topology
    for program, state, model in _programs(name, config, mesh):
        chunks = f", {config[name].chunks} chunks" if name in ROWS else ""
        there.say(f"{program.name} on {topology.name}, mesh {tuple(mesh.shape.values())}{chunks}")
        found = compiled(program, topology, mesh, there.cache)
        useful = search.weights(model) - model.vocab * model.width * (1 if model.tied else 2)
        row = report.figures(program, found, state, topology.chip, topology.chips, useful)
        there.say(f"  {report.verdict(row)}; compiled in {found.took:.0f} s")
        yield row
        if not row["fits"]:
            break


def _programs(name: str, config: ConfigDict, mesh) -> Iterator[tuple[Program, TrainState, ModelConfig]]:
    """(program, the TrainState that lies beside it, model) of a name of PROGRAMS."""
    parts = _parts(config)
    there = dataclasses.replace(parts, mesh=mesh)
    state = _state(name if name in ROWS else "rl" if "rl" in config else "sft", there)
    c, m = config, parts.model
    if name == "encode":
        longest = parts.chat.direct_extra + c.data.max_doc_tokens
        yield programs.encoding(m, state.weights, mesh, c.evaluate.batch_size, longest), state, m
        return
    # On a device of this machine, for it keeps keys there.
    stage: Any = assembly.make_stage("sft" if name == "sft" else "rl", parts, None)
    if name == "sft":
        transform = PairTransform(parts.source, parts.dataset, parts.chat, parts.lengths, 0.0)
        yield programs.supervised(stage, state, mesh, transform, parts.source[0], c.sft.batch_size), state, m
    elif name == "rl":
        yield programs.policy_update(stage, state, mesh, c.rl.prompts), state, m
    else:
        for program in programs.sampling(stage, state.weights, mesh, c.rl.prompts):
            yield program, state, m


def _state(name: str, parts: assembly.Parts) -> TrainState:
    """A stage's TrainState on abstract arrays; an adapter's base is its reference."""
    state: Any = assembly.abstract_stage_state(name, parts)
    return state.replace(reference=model_params.abstract(parts.model, parts.mesh)) if parts.model.lora else state


class _Longest(assembly.Parts):
    """Parts of a run whose texts are all longer than the config reads, with nothing on disk."""

    thinker = None
    most_positives = 1
    grades: ClassVar[dict[int, list[int]]] = {}

    @cached_property
    def source(self):
        text = self.dataset.doc_texts[0]
        return [{"query": text, "query_row": 0, "positives": [0], "thought": text}]


def _parts(config: ConfigDict) -> _Longest:
    """With a tokenizer that knows every word of the prompts, as a published one nearly does."""
    d, prompts = config.data, Prompts(**config.prompts)
    text = " and" * max(d.max_doc_tokens, d.max_query_tokens, d.max_thought_tokens)
    count = config.rl.reward.k if "rl" in config else 1
    dataset = Dataset("plan", [str(i) for i in range(count)], [text] * count, ["q"], [text], {}, {}, [], "")
    tokenizer = tokenizers.train_bpe([text, *vars(prompts).values()], 2000)
    chat = ChatFormat(tokenizer, prompts)
    here = make_mesh(devices=jax.devices("cpu")[:1])
    return _Longest(config, pathlib.Path(), here, dataset, chat, weights.model_config(config, tokenizer))


def _too_large(parts: _Longest, devices: list, chip) -> dict[str, Any]:
    """A plan without a program: what the weights and their optimiser alone take, split over as many chips as can be."""
    fsdp, tensor = max(search.splits(parts.model, len(devices)), key=lambda split: split[0] * split[1])
    mesh = make_mesh(-1, fsdp, tensor, devices=devices)
    name = next(name for name in ROWS if name in parts.config)
    state = _state(name, dataclasses.replace(parts, mesh=mesh))
    memory = {field: programs.on_one(getattr(state, field)) for field in ("params", "opt_state", "reference")}
    memory["gradient"] = memory["params"]
    total = sum(memory.values())
    row = {"program": "state", "memory": memory, "total": total, "limit": chip.memory, "fits": False}
    return {"mesh": dict(mesh.shape), "chunks": {}, "programs": [row], "flags": []}


if __name__ == "__main__":
    run_main(main)
