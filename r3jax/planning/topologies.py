"""Chips, and meshes of chips that are not here.

v5e:4x4   v5e-16   v6e:16x16   v5p:4x4x4   v5p-128 (counts cores, as Google Cloud does: 64 chips)
h100:32   a100:8   (graphics processors, eight to a host)
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax

from r3jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at most.

    Attributes:
      flops: bf16 operations per second.
      memory, bandwidth: of HBM, bytes and bytes per second.
      links: bytes per second that it sends to the chips of its slice or host.
      host_links: the same to other hosts, where that is another network; 0 where not.
      per_host: chips of one host's fast network; 0: of the whole slice.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    host_links: float = 0.0
    per_host: int = 0


# TPU: cloud.google.com/tpu/docs/{v5e,v6e,v5p}; half of the "bidirectional ICI bandwidth per chip" is what it sends.
# v5e has 16 GiB, of which the compiler gives programs 15.75; v6e 32 (31.25); v5p 95 (95.74 GiB are there).
# GPU: NVIDIA's data sheets (SXM, dense, 80 GB), half of NVLink's figure; one 400 Gbit/s (A100: 200) port each, and
# what JAX leaves free at XLA_PYTHON_CLIENT_MEM_FRACTION=.92.
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 200e9),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1640e9, 400e9),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    "h100": Chip("NVIDIA H100", 989e12, 0.92 * 80e9, 3350e9, 450e9, 50e9, 8),
    "a100": Chip("NVIDIA A100", 312e12, 0.92 * 80e9, 2039e9, 300e9, 25e9, 8),
}
SIDES = {"v5e": 2, "v6e": 2, "v5p": 3}
LARGEST = {"v5e": (16, 16), "v6e": (16, 16), "v5p": (16, 16, 24), "h100": (4096,), "a100": (4096,)}
# The shapes behind names that count: v5e and v6e chips, v5p cores.
SHAPES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind; `shape` is their torus, or one number."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        return self.kind in SIDES

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def read(text: str) -> Topology:
    """A topology by its name; UserError in one sentence for one that does not exist."""
    match = re.fullmatch(r"(\w+?)([:-])(\d+(?:x\d+)*)", text)
    if not match or match[1] not in CHIPS:
        raise UserError(
            f"--topology must be one of {', '.join(CHIPS)} and a size, such as v5e:16x16, v5p-128 or h100:32, "
            f"not {text!r}."
        )
    kind, sign, size = match.groups()
    if kind in SIDES and "x" not in size:
        known = CUBES if kind == "v5p" else SHAPES
        counts = "cores" if kind == "v5p" else "chips"
        if sign == ":" or int(size) not in known:
            names = ", ".join(f"{kind}-{n}" for n in known)
            raise UserError(f"--topology: {text} is no size of {kind}; use one of {names} ({counts}), or its shape.")
        size = known[int(size)]
    shape = tuple(int(part) for part in size.split("x"))
    largest = LARGEST[kind]
    if len(shape) != len(largest):
        raise UserError(f"--topology: {kind} takes {_form(kind)}, not {size}.")
    if not all(1 <= n <= most for n, most in zip(sorted(shape), sorted(largest), strict=True)):
        raise UserError(f"--topology: {text} is not between 1 chip and {kind}:{'x'.join(map(str, largest))}.")
    return Topology(kind, shape)


def _form(kind: str) -> str:
    return {2: "a shape such as 4x4", 3: "a shape such as 2x2x4"}.get(SIDES.get(kind, 1), "a number of processors")


def devices(topology: Topology) -> list:
    """Devices to compile for: the TPU compiler's own, or as many fake CPU devices.

    Raises UserError where libtpu is missing, or knows no such slice, or there are too few CPU devices.
    """
    if not topology.is_tpu:
        fake = jax.devices("cpu")
        if len(fake) < topology.chips:
            raise UserError(f"--topology: {topology.name} needs {topology.chips} fake devices, there are {len(fake)}.")
        return fake[: topology.chips]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: the TPU compiler is not installed; pip install -r requirements-plan.txt.")
    from jax.experimental import topologies as described

    try:
        found = list(described.get_topology_desc(topology.name, platform="tpu").devices)
    except Exception as e:  # the compiler's own, of several types
        said = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"--topology: the TPU compiler cannot describe {topology.name}: {said}.") from None
    if len(found) != topology.chips:  # it could count cores
        raise UserError(
            f"--topology: {topology.name} has {topology.chips} chips, and {len(found)} devices by the TPU compiler."
        )
    return found


def prepare(topology: Topology) -> None:
    """Sets what must be set before JAX looks for devices: no TPU is asked for, and fake processors are made."""
    jax.config.update("jax_platforms", "cpu")
    if topology.is_tpu:
        # libtpu looks for a machine otherwise, and waits; the type only has to exist, whatever is compiled for.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
        os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is taken, so several may compile at a time
    else:
        with contextlib.suppress(RuntimeError):  # JAX has its devices already; `devices` counts them
            jax.config.update("jax_num_cpu_devices", topology.chips)
