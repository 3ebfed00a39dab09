"""The mesh and the one rules table: which logical axis lies on which mesh axis.

The mesh is Explicit, so a wrong sharding is a type error at trace time,
on one CPU device already. Parameters are stored sharded over `fsdp` and `tensor`; a layer gathers its
weights over `fsdp` just before it uses them (ZeRO-3), and gradients scatter back by transposition.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# logical axis -> mesh axis of stored weights
RULES = {"embed": "fsdp", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """An Explicit (data, fsdp, tensor) mesh over all devices; one size may be -1: what is left.

    Raises UserError for a size that is neither positive nor -1, when the sizes do not multiply to the
    number of devices, and for devices of several slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = [data, fsdp, tensor]
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis} must be at least 1, or -1 for all devices left, not {size}.")
    if sizes.count(-1) > 1:
        raise UserError("config.mesh: only one of data, fsdp and tensor can be -1; give the others a size.")
    if -1 in sizes:
        known = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        asked = " x ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise UserError(
            f"config.mesh: {asked} does not multiply to the {len(devices)} devices there are; "
            "change one size or set it to -1."
        )
    # Of GPUs and CPUs each machine has a slice_index.
    if len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) > 1:
        raise UserError("config.mesh: the devices are of several TPU slices; start the job on one.")
    # `jax.make_mesh` refuses 128 x 2 on a torus of 16 x 16, but for v5e.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def stored(axes: tuple[str | None, ...]) -> P:
    """Where a parameter with these logical axes lives between steps."""
    return P(*(RULES[a] if a else None for a in axes))


def used(axes: tuple[str | None, ...]) -> P:
    """Where it lies while a layer uses it: gathered over `fsdp`, still split over `tensor`."""
    return P(*(m if m != "fsdp" else None for m in stored(axes)))


def where(axes: tuple[str | None, ...], gathered: bool) -> tuple[P, str | tuple[str, ...]]:
    """Where a weight lies while a layer uses it, and over what the rows are split that meet it there.

    Gathered over `fsdp` (`used`), the rows stay where they are: right for a step, which has many. A decoding step has
    few: there the weight stays as it is stored and the rows come to it, split over `data` alone, each device with its
    part of their width; the products' sums go back to the rows' own devices. What moves is then rows times widths, not
    weights (Pope et al., arXiv 2211.05102, section 3.2).
    """
    return (used(axes), BATCH) if gathered else (stored(axes), "data")


def brought(weight: jax.Array, axes: tuple[str | None, ...], gathered: bool = True) -> jax.Array:
    """The stored weight where `where` says.

    On the way back the gradient's sum over the batch goes in two steps, each device keeping its part of the first, over
    `fsdp`; summed over `data` is then that part alone. Said at once, all is summed over both and then cut.
    """
    if not gathered or not has_mesh():
        return place(weight, where(axes, gathered)[0])
    weight = jax.reshard(weight, P(*stored(axes), reduced={"data"}))
    return jax.reshard(weight, P(*used(axes), reduced=set(BATCH)))


def same_sums(weight: jax.Array, spec: P) -> P | None:
    """`out` of a spec for what is made from a weight alone: its gradient is still to be summed, as the weight's is."""
    return out(P(*spec, reduced=jax.typeof(weight).sharding.spec.reduced)) if has_mesh() else None


def few(rows: int, width: int) -> bool:
    """Whether so many rows, of all devices, are cheaper to send to the weights than weights of this width to them."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1 and rows // mesh.shape["data"] < width


def has_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


_meant: contextvars.ContextVar[str | None] = contextvars.ContextVar("meant", default=None)


@contextlib.contextmanager
def lowered_for(platform: str) -> Iterator[None]:
    """What is traced here is for this platform, though its mesh is of others: a plan for GPUs has fake CPU devices."""
    token = _meant.set(platform)
    try:
        yield
    finally:
        _meant.reset(token)


def platform() -> str:
    """Of the devices that the program is for, which need not be here."""
    if meant := _meant.get():
        return meant
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def place(x: jax.Array, spec: P) -> jax.Array:
    """`jax.reshard` under a mesh; nothing without one, so that the model also runs bare."""
    return jax.reshard(x, spec) if has_mesh() else x


def out(spec: P) -> P | None:
    """The `out_sharding=` argument: the spec under a mesh, None without one."""
    return spec if has_mesh() else None


def batch_parts(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Into how many parts the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(i, n): this process's devices hold share i of n of every batch; where `tensor` spans processes, several do.

    Raises UserError for a mesh on which the processes' shares are not of one size.
    """
    held = _held(mesh)
    shares = sorted(set(held.values()))
    if sum(map(len, shares)) != batch_parts(mesh) or len(set(map(len, shares))) > 1:
        raise UserError(
            "config.mesh: a process's devices must hold parts of the batch of their own; let mesh.tensor divide "
            f"the {jax.local_device_count()} devices of a process, or be a multiple of them."
        )
    return shares.index(held[jax.process_index()]), len(shares)


def _held(mesh: jax.sharding.Mesh) -> dict[int, tuple[int, ...]]:
    """The parts of the batch that each process's devices hold."""
    held: dict[int, set[int]] = {}
    for part, devices in enumerate(mesh.devices.reshape(batch_parts(mesh), -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(part)
    return {process: tuple(sorted(parts)) for process, parts in held.items()}


def own_rows(mesh: jax.sharding.Mesh, batch):
    """Of a whole batch (a pytree of numpy arrays), the rows that this process's devices hold: for `put_batch`."""
    if jax.process_count() == 1:
        return batch
    parts = list(_held(mesh)[jax.process_index()])

    def cut(x):
        x = np.asarray(x)
        return x.reshape(batch_parts(mesh), -1, *x.shape[1:])[parts].reshape(-1, *x.shape[1:])

    return jax.tree.map(cut, batch)


def put_batch(mesh: jax.sharding.Mesh, batch):
    """This process's rows of a batch (a pytree of numpy arrays) as global arrays, split over the batch."""

    def put(x):
        x = np.asarray(x)
        sharding = NamedSharding(mesh, P(BATCH, *([None] * (x.ndim - 1))))
        return jax.make_array_from_process_local_data(sharding, x)

    with jax.transfer_guard_host_to_device("allow"):  # meant, though jax takes it for unasked where processes share it
        return jax.tree.map(put, batch)


def everywhere(mesh: jax.sharding.Mesh, x) -> jax.Array:
    """A host array, the same on every process, on every device."""
    x = np.asarray(x)
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda index: x[index])


def to_host(tree):
    """Device arrays (a pytree), whole, as numpy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    places = jax.tree.map(lambda x: NamedSharding(x.sharding.mesh, P()), tree)
    return jax.device_get(jax.jit(_same, out_shardings=places)(tree))


def _same(tree):
    return tree
