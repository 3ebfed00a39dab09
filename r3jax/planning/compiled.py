"""A program compiled for chips that are not here: bytes and costs, kept on disk by what was compiled.

A compilation takes minutes; the same program for the same chips by the same compiler is the same answer.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time

import jax

from r3jax.model.sharding import lowered_for
from r3jax.planning.costs import Collective, Costs, analyse, less, unmeasured
from r3jax.planning.programs import Program
from r3jax.planning.topologies import Topology

VERSION = 4  # of what is kept; a change of hlo.py or costs.py that changes figures needs another


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device.

    Attributes:
      arguments, results, temporaries, code: bytes of HBM; results without those that take an argument's place,
        temporaries at the fullest moment (for graphics processors: all, an upper bound).
      once, again: costs without a round of the loop whose length only a run knows, and those of a round.
      short: bytes beyond the memory, where the compiler refused; the others are then 0.
      took, worked: seconds that the compilation took, and of processors; 0 where that was not measured.
    """

    arguments: float = 0
    results: float = 0
    temporaries: float = 0
    code: float = 0
    once: Costs = Costs(0, 0, ())
    again: Costs = Costs(0, 0, ())
    short: float = 0
    took: float = 0
    worked: float = 0

    @property
    def total(self) -> float:
        return self.arguments + self.results + self.temporaries + self.code


def compiled(program: Program, topology: Topology, mesh: jax.sharding.Mesh, cache: pathlib.Path) -> Compiled:
    """Compiles, or remembers. Raises what the compiler raises, except that memory does not suffice.

    Raises ValueError where the lengths of the program's loops are not known: its costs would be too small.
    """
    with lowered_for("tpu" if topology.is_tpu else "gpu"):
        lowered = program.lower(mesh)
    key = f"{VERSION} {jax.__version__} {_compiler(topology)} {topology.name} {dict(mesh.shape)} {lowered.as_text()}"
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if file.is_file():
        return _from_json(json.loads(file.read_text()))
    began, work = time.monotonic(), time.process_time()
    try:
        # Without the cache of compiled programs: it would keep what nobody can run here.
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        short = _short(str(e))
        if short is None:
            raise
        result = Compiled(short=short)
    else:
        memory, code = done.memory_analysis(), done.as_text()
        once, again = _costs(code, topology.chips, program)
        arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = memory.temp_size_in_bytes
        if topology.is_tpu:
            # Of these not all lie in memory at a time: the compiler accepts programs whose sum is gigabytes too much,
            # and refuses by the peak.
            temporaries = memory.peak_memory_in_bytes - arguments - results
        result = Compiled(
            arguments=arguments,
            results=results,
            temporaries=temporaries,
            code=memory.generated_code_size_in_bytes,
            once=once,
            again=again,
        )
    result = dataclasses.replace(result, took=time.monotonic() - began, worked=time.process_time() - work)
    cache.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    # The first two are for people.
    kept = {"program": program.name, "on": f"{topology.name} {dict(mesh.shape)}"} | dataclasses.asdict(result)
    part.write_text(json.dumps(kept, indent=1) + "\n")
    part.replace(file)
    return result


def _compiler(topology: Topology) -> str:
    """What else decides what comes out: the TPU compiler's version and its flags."""
    if not topology.is_tpu:
        return os.environ.get("XLA_FLAGS", "")
    return f"libtpu {importlib.metadata.version('libtpu')} {os.environ.get('LIBTPU_INIT_ARGS', '')}"


def _costs(code: str, chips: int, program: Program) -> tuple[Costs, Costs]:
    """(without a round of the loop whose length only a run knows, of a round); the second is empty without such a loop.

    Raises ValueError where another number of loops has no length in the program than the one of decoding.
    """
    unknown, want = unmeasured(code), int(program.trips > 1)
    if len(unknown) != want:
        raise ValueError(
            f"{program.name}: {want} loop may have a length that only a run knows, not {unknown}; "
            "planning/costs._rounds must learn to read them."
        )
    once, with_one = (analyse(code, chips, trips) for trips in (0, 1))
    return once, less(with_one, once)


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)"


def _short(message: str) -> float | None:
    """Bytes that were missing, from any of the compiler's messages; None if it complains of something else."""

    def sizes(pattern: str) -> list[float]:
        found = re.search(pattern, message, re.IGNORECASE)
        groups = found.groups() if found else ()
        return [float(n) * UNITS[unit.upper()] for n, unit in zip(groups[::2], groups[1::2], strict=True)]

    if over := sizes(rf"exceeded hbm capacity by {SIZE}"):
        return over[0]
    if used := sizes(
        rf"TensorCore hbm usage: {SIZE}, SparseCore hbm usage:? {SIZE}, exceeding available bytes: {SIZE}"
    ):
        dense, sparse, there = used
        return dense + sparse - there
    # Whatever it says, arguments are among these: it refuses by the sum.
    if over := sizes(rf"total memory required for HLO temporaries \({SIZE}\) exceeds available HBM \({SIZE}\)"):
        return over[0] - over[1]
    return None


def _from_json(kept: dict) -> Compiled:
    del kept["program"], kept["on"]
    for name in ("once", "again"):
        collectives = tuple(Collective(**c) for c in kept[name].pop("collectives"))
        kept[name] = Costs(**kept[name], collectives=collectives)
    return Compiled(**kept)
