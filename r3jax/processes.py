"""Several processes as one job: how they find each other, and what they tell each other from host to host.

What travels here is small (figures, lists of the best) or lies on the hosts anyway (the index), so it goes between the
processes' CPUs, beside whatever the accelerators are at. With one process nothing travels.

Axis legend: P processes.
"""

import dataclasses
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import cloud_tpu_init, distributed  # whether this is a TPU VM, and the job's store: no public names
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
AXIS = "process"
MEET = 300  # seconds that processes have to find each other
PATIENCE = 12  # times that where a scheduler may start them one by one, as nodes come
LISTEN = 1000  # milliseconds of waiting between which signals are seen
_waits = itertools.count()


@dataclasses.dataclass(frozen=True)
class Processes:
    """Who shares the work: this process, how many there are, and how they wait for and hear from each other."""

    index: int = 0
    count: int = 1
    wait: Callable[[str], None] = lambda what: None
    gather: Callable[[np.ndarray], np.ndarray] = lambda x: np.asarray(x)[None]  # [...] -> [P, ...]

    def share(self, size: int) -> slice:
        """This process's rows of `size`: blocks of equal length, in order; the last may be shorter.

        Raises UserError where a process would have none.
        """
        block = -(-size // self.count)
        if (self.count - 1) * block >= size:
            raise UserError(f"{size:,} documents are too few for {self.count} processes; start fewer.")
        return slice(self.index * block, min(size, (self.index + 1) * block))


def connect(saves: bool = False) -> None:
    """Joins the other processes of this job, where there are any; to be called before jax is asked for a device.

    saves: whether the work asks JAX when to stop and save; without, a SIGTERM is not JAX's.

    JAX recognises Slurm, TPU pods and OpenMPI by itself. Elsewhere (Kubernetes, launch/local.sh) the VARIABLES tell:
    process 0 as host:port, how many there are, and which one this is.

    Raises UserError where they do not fit together.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", saves)
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not given:
        env = os.environ
        alone = all(env.get(name, "1") == "1" for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
        if not alone or cloud_tpu_init.running_in_cloud_tpu_vm:
            _initialise()
        return
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise UserError(f"the environment sets {', '.join(given)} but not {', '.join(missing)}; set all three or none.")
    address, *numbers = given.values()
    if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        raise UserError(
            f"JAX_PROCESS_ID={numbers[1]} must be a whole number from 0 to below JAX_NUM_PROCESSES={numbers[0]}."
        )
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address} must be the host and port of process 0, such as n1:8476.")
    if int(numbers[0]) > 1:
        _initialise(coordinator_address=address, num_processes=int(numbers[0]), process_id=int(numbers[1]))


def _initialise(**given: Any) -> None:
    told, met = bool(given), threading.Event()
    limit = MEET * PATIENCE if told else MEET

    def watch() -> None:
        for left in range(limit - MEET, -1, -MEET):
            if met.wait(MEET):
                return
            if left:
                print(f"waiting for the other processes of this job, {left} s more", file=sys.stderr, flush=True)
        print(f"error: {_lost(f'some had not come after {limit} s', told)}", file=sys.stderr, flush=True)
        os._exit(2)  # JAX would abort, with a trace

    threading.Thread(target=watch, daemon=True).start()
    try:
        jax.distributed.initialize(**given, initialization_timeout=2 * limit)
    except (ValueError, RuntimeError) as e:
        raise UserError(_lost(str(e).splitlines()[0], told)) from None
    finally:
        met.set()
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        # Only process 0 would find kept programs: it would be too far ahead of those that compile, and a program that
        # is read back was seen to sum in another order than one just compiled, which gloo does not survive. Before
        # anything is compiled: JAX asks once.
        jax.config.update("jax_enable_compilation_cache", False)
    # Gloo gives a group of devices 30 seconds to meet for the first time. Now all are here; later one may compile.
    gather(np.zeros(1, np.uint8))
    if on_cpu:
        with jax.set_mesh(_line(jax.devices())):
            ones = jax.jit(partial(jnp.ones, jax.device_count()), out_shardings=P(AXIS))
            jax.block_until_ready(jnp.sum(ones()))


def _lost(why: str, told: bool) -> str:
    hint = f", and set {', '.join(VARIABLES)} for each" if told else ""
    return f"the processes of this job do not find each other ({why}); start all{hint}."


def rank() -> int:
    """This process's number, by which process 0 is the coordinator.

    Not `jax.process_index()`: on a TPU slice that is the host's place in it, another order.
    """
    return distributed.global_state.process_id


def here() -> Processes:
    """This process among those that jax knows of."""
    if jax.process_count() == 1:
        return Processes()
    return Processes(rank(), jax.process_count(), lambda what: _wait(), gather)


def leads() -> bool:
    """Whether this is process 0, which writes what is to be written once."""
    return rank() == 0


def in_turn(work: Callable[[bool], Any]) -> Any:
    """`work(first)` of process 0 and, when that is done, of the others, which find what it has left on disk.

    All leave together.
    """
    result = work(True) if leads() else None
    if jax.process_count() > 1:
        _wait()
        result = result if leads() else work(False)
        _wait()
    return result


def _wait() -> None:
    """Until all have come here, however long that takes (a collective of gloo's gives up after half an hour)."""
    store, turn = distributed.global_state.client, next(_waits)
    store.key_value_set(f"r3jax/{turn}/{rank()}", "")
    for other in range(jax.process_count()):
        while True:
            try:
                store.blocking_key_value_get(f"r3jax/{turn}/{other}", LISTEN)
                break
            except jax.errors.JaxRuntimeError as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise


def gather(x: np.ndarray) -> np.ndarray:
    """Every process's `x`, of one shape and dtype, as [P, *x.shape], bit for bit, in the order of their ranks."""
    x = np.asarray(x)
    if jax.process_count() == 1:
        return x[None]
    raw = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)  # jax would make 32 bits of 64
    with jax.transfer_guard("allow"), jax.set_mesh(hosts()):
        whole = _replicated(spread(raw, raw.size * jax.process_count()))
        found = np.asarray(whole.addressable_data(0)).tobytes()
    return np.frombuffer(found, x.dtype).reshape(jax.process_count(), *x.shape)


@jax.jit
def _replicated(x: jax.Array) -> jax.Array:
    return jax.reshard(x, P(None))


@functools.cache
def hosts() -> jax.sharding.Mesh:
    """A mesh with one CPU of each process, in the order of their ranks."""
    first: dict[int, Any] = {}
    for device in jax.devices("cpu"):
        first.setdefault(device.process_index, device)
    return _line([first[i] for i in sorted(first)])


def _line(devices: list) -> jax.sharding.Mesh:
    """Not by `jax.make_mesh`: to it each machine's CPUs, and GPUs, are a slice, and it takes no two."""
    return jax.sharding.Mesh(np.array(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Explicit,))


def spread(mine: np.ndarray, size: int) -> jax.Array:
    """Rows [n, …] of each process as one array in the hosts' memory: what a checkpoint can write and read in parts.

    The processes' rows are those of `Processes.share(size)`; zeros fill the last blocks up.
    """
    block = -(-size // jax.process_count())
    if len(mine) < block:
        mine = np.concatenate([mine, np.zeros((block - len(mine), *mine.shape[1:]), mine.dtype)])
    sharding = NamedSharding(hosts(), P(AXIS))
    shape = (block * jax.process_count(), *mine.shape[1:])
    device = hosts().devices[rank()]
    return jax.make_array_from_single_device_arrays(shape, sharding, [jax.device_put(mine, device)])


def is_spread(leaf: Any) -> bool:
    """Whether a leaf (an array, or its shape) is one of `spread`'s."""
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == (AXIS,)


def own(array: jax.Array) -> np.ndarray:
    """This process's block of what `spread` made."""
    return np.asarray(array.addressable_data(0))
