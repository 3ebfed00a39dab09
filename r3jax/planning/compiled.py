"""A program compiled for chips that are not here: bytes and costs, kept on disk by what was compiled.

A compilation takes minutes; the same program for the same chips is the same answer.
"""

import dataclasses
import hashlib
import json
import pathlib
import re

import jax

from r3jax.planning import hlo
from r3jax.planning.programs import Program
from r3jax.planning.topologies import Topology

VERSION = 1  # of what is kept; a change of hlo.py that changes figures needs another


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device.

    Attributes:
      arguments, results, temporaries, code: bytes of HBM; results without those that take an argument's place.
      once, again: costs without a round of the loop whose length only a run knows, and those of a round.
      short: bytes beyond the memory, where the compiler refused; the others are then 0.
    """

    arguments: float = 0
    results: float = 0
    temporaries: float = 0
    code: float = 0
    once: hlo.Costs = hlo.Costs(0, 0, ())
    again: hlo.Costs = hlo.Costs(0, 0, ())
    short: float = 0

    @property
    def total(self) -> float:
        return self.arguments + self.results + self.temporaries + self.code


def compiled(program: Program, topology: Topology, mesh: jax.sharding.Mesh, cache: pathlib.Path) -> Compiled:
    """Compiles, or remembers. Raises what the compiler raises, except that memory does not suffice."""
    lowered = program.lower(mesh)
    text = lowered.as_text()
    key = f"{VERSION} {jax.__version__} {topology.name} {dict(mesh.shape)} {text}"
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if file.is_file():
        return _from_json(json.loads(file.read_text()))
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
        once, with_one = (hlo.analyse(code, topology.chips, trips) for trips in (0, 1))
        result = Compiled(
            arguments=memory.argument_size_in_bytes,
            results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            once=once,
            again=hlo.less(with_one, once),
        )
    cache.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(result)))
    part.replace(file)
    return result


def _short(message: str) -> float | None:
    """Bytes that were missing, from the compiler's message; None if it complains of something else."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMGT]?)", message)
    return float(found[1]) * units[found[2]] if found else None


def _from_json(kept: dict) -> Compiled:
    for name in ("once", "again"):
        collectives = tuple(hlo.Collective(**c) for c in kept[name].pop("collectives"))
        kept[name] = hlo.Costs(**kept[name], collectives=collectives)
    return Compiled(**kept)
