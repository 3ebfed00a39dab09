"""What one device does in a compiled program: floating-point operations, memory traffic and collectives, from its HLO.

XLA's own `cost_analysis` counts the body of a loop once, whatever its length, and layers, chunks of gradient caching
and decoding are loops. Here each computation counts as often as it runs. A loop whose length only a run knows (that of
decoding) has no count in the program: the caller says how long to take it for. Of a choice all branches count.

Traffic is that of HBM: operands and results of everything that is not inside a fusion, without what the TPU compiler
has put into on-chip memory (`S(1)` in a layout). A fusion that reads a slice of an operand, or writes one in place, is
charged the slice: else each layer of a scan would be charged the weights of all.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from r3jax.planning.hlo import Op, Shape, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind over one number of devices, summed over a program.

    Attributes:
      count: how often it runs.
      operand_bytes: what a device puts in.
      wire_bytes: what a device sends in a ring, the least that any algorithm sends.
    """

    kind: str
    group: int
    spread: int  # largest difference between device numbers of a group
    count: int
    operand_bytes: float
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one device: multiplications and additions of matrix products, bytes of HBM, collectives."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]

    @property
    def wire_bytes(self) -> float:
        return sum(c.wire_bytes for c in self.collectives)


def analyse(text: str, devices: int, trips: int = 1) -> Costs:
    """Costs of a compiled program.

    Args:
      text: `compiled.as_text()`.
      devices: how many the program runs on: collectives without groups are among all of them.
      trips: how often a loop runs whose length the program does not tell.
    """
    module, entry = parse(text)
    times = _times(module, entry, trips)
    fused = {name for ops in module.values() for op in ops if op.code == "fusion" for name in op.called}
    flops = traffic = 0.0
    found: dict[tuple[str, int, int], list[float]] = {}
    seen: set[tuple[str, str]] = set()
    for name, often in times.items():
        ops = {op.name: op for op in module[name]}
        for op in ops.values():
            flops += often * _flops(op, ops)
            if name not in fused:
                traffic += often * _traffic(op, ops, module)
            kind = op.code.removesuffix("-start")
            channel = re.search(r"channel_id=(\d+)", op.attributes)
            # The TPU compiler spreads one over several fusions, which all name it: what runs meanwhile, and its end.
            # Those that it adds itself are numbered anew, by kind.
            if kind in COLLECTIVES and not (channel and (kind, channel[1]) in seen):
                if channel:
                    seen.add((kind, channel[1]))
                size = sum(s.bytes for o in op.operands if o in ops for s in ops[o].shapes)
                group, spread = _group(op, devices)
                if name in fused and _scatters(op, module[name], size / group):
                    kind = "reduce-scatter"
                total = found.setdefault((kind, group, spread), [0, 0.0, 0.0])
                for i, value in enumerate((1, size, size * _sent(kind, group))):
                    total[i] += often * value
    collectives = (Collective(*key, int(n), size, sent) for key, (n, size, sent) in sorted(found.items()))
    return Costs(flops, traffic, tuple(collectives))


def unmeasured(text: str) -> list[str]:
    """The loops that run and whose length the program does not tell."""
    module, entry = parse(text)
    times = _times(module, entry, 1)
    return [
        op.name for name in times for op in module[name] if op.code == "while" and _rounds(op, name, module) is None
    ]


def less(more: Costs, fewer: Costs) -> Costs:
    """`more` without `fewer`, as what one more round of a loop costs."""
    sums = {(c.kind, c.group, c.spread): c for c in fewer.collectives}
    rest = []
    for c in more.collectives:
        had = sums.get((c.kind, c.group, c.spread), dataclasses.replace(c, count=0, operand_bytes=0, wire_bytes=0))
        sizes = (c.operand_bytes - had.operand_bytes, c.wire_bytes - had.wire_bytes)
        if c.count > had.count:
            rest.append(Collective(c.kind, c.group, c.spread, c.count - had.count, *sizes))
    return Costs(more.flops - fewer.flops, more.bytes - fewer.bytes, tuple(rest))


def _scatters(op: Op, inner: list[Op], part: float) -> bool:
    """Whether a fusion keeps only a device's part of its all-reduce: so the TPU compiler writes a reduce-scatter."""
    users = list(_users(inner, op.name, ("bitcast", "get-tuple-element")))
    sliced = sum(s.bytes for user in users for s in user.shapes)
    return op.code == "all-reduce" and all(user.code == "dynamic-slice" for user in users) and sliced == part


def _sent(kind: str, group: int) -> float:
    """Bytes sent for each byte that a device puts in."""
    if kind == "collective-permute":
        return 1.0
    return {"all-gather": group - 1.0, "all-reduce": 2 * (group - 1) / group}.get(kind, (group - 1) / group)


def _times(module: dict[str, list[Op]], entry: str, trips: int) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = {}

    def visit(name: str, often: int) -> None:
        times[name] = times.get(name, 0) + often
        for op in module[name]:
            if op.code == "while":
                rounds = _rounds(op, name, module)
                rounds = trips if rounds is None else rounds
                for inner, more in (("body", 0), ("condition", 1)):
                    for called in op.named(inner):
                        visit(called, often * (rounds + more))
            else:
                for called in op.called:
                    visit(called, often)

    visit(entry, 1)
    return {name: often for name, often in times.items() if often}


def _rounds(loop: Op, where: str, module: dict[str, list[Op]]) -> int | None:
    """How often a loop runs: as XLA noted it, or by its counter (TPU programs have no note). None: a run decides."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = ({op.name: op for op in module[loop.named(name)[0]]} for name in ("condition", "body"))
    test = next(op for op in condition.values() if op.root)
    test = _seen_through(test, condition, ("bitcast", "copy"))
    direction = re.search(r"direction=(LT|LE)", test.attributes)
    if test.code != "compare" or not direction:
        return None
    counter, bound = (condition[name] for name in test.operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    if counter.code != "get-tuple-element" or bound.code != "constant" or not place:
        return None
    index = int(place[1])
    end = next(op for op in body.values() if op.root)
    after = _seen_through(body[end.operands[index]], body, ("bitcast", "copy"))
    outer = {op.name: op for op in module[where]}
    start = _seen_through(outer[loop.operands[0]], outer, ("bitcast",))
    before = outer[start.operands[index]] if start.code == "tuple" else start
    first = _constant(_seen_through(before, outer, ("bitcast", "copy")))
    step = next((n for name in after.operands if (n := _constant(body[name])) is not None), None)
    if after.code != "add" or first is None or not step:
        return None
    last = _constant(bound) + (direction[1] == "LE")
    return max(0, -(-(last - first) // step))


def _seen_through(op: Op, ops: dict[str, Op], codes: tuple[str, ...]) -> Op:
    while op.code in codes:
        op = ops[op.operands[0]]
    return op


def _constant(op: Op) -> int | None:
    return int(op.inside) if op.code == "constant" and re.fullmatch(r"-?\d+", op.inside) else None


def _flops(op: Op, ops: dict[str, Op]) -> float:
    if op.code not in ("dot", "convolution"):
        return 0.0
    left, right = (ops[name].shapes[0] for name in op.operands[:2])
    if op.code == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        depth = math.prod(left.dims[int(d)] for d in dims[1].split(",") if d) if dims else 1
        return 2.0 * op.shapes[0].size * depth
    return 2.0 * _products(op, left, right)


def _products(op: Op, left: Shape, right: Shape) -> float:
    """Multiplications of a convolution: the TPU compiler makes one of every matrix product.

    Batch dimensions become spatial ones, of which each output sees one element: positions outside the input and in
    the holes of a dilation are not counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    assert labels is not None
    lhs, rhs, out = labels[1], labels[2], labels[3]
    total = op.shapes[0].dims[out.index("b")] * op.shapes[0].dims[out.index("f")] * right.dims[rhs.index("i")]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", op.attributes) or ["", ""])[1]))
    spatial = [label for label in out if label.isdigit()]
    for label in spatial:
        i = int(label)

        def part(name: str, default: str, i: int = i) -> str:
            values = window.get(name, "").split("x")
            return values[i] if window.get(name) else default

        size, given = op.shapes[0].dims[out.index(label)], left.dims[lhs.index(label)]
        taps = right.dims[rhs.index(label)]
        low = int(part("pad", "0_0").split("_")[0])
        stride, hole, spread = (int(part(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        place = np.arange(size)[:, None] * stride + np.arange(taps)[None, :] * spread - low
        total *= int(((place >= 0) & (place % hole == 0) & (place < (given - 1) * hole + 1)).sum())
    groups = re.search(r"batch_group_count=(\d+)", op.attributes)
    return total / (int(groups[1]) if groups else 1)


def _traffic(op: Op, ops: dict[str, Op], module: dict[str, list[Op]]) -> float:
    """Bytes of HBM that an instruction outside of fusions reads and writes."""
    if op.code in FREE or op.code.endswith("-done") or op.code == "async-start":
        return 0.0
    inputs = [ops[name].shapes for name in op.operands if name in ops]
    if op.code == "dynamic-update-slice":
        return 2 * _hbm(inputs[1])
    if op.code in SLICES:
        return 2 * _hbm(op.shapes)
    if op.code.endswith("-start"):  # its result repeats its operands
        return 2 * sum(map(_hbm, inputs)) if op.code == "copy-start" else sum(map(_hbm, inputs))
    if op.code != "fusion":
        return _hbm(op.shapes) + sum(map(_hbm, inputs))
    inner = module[op.called[0]]
    # Fusions that run while a collective does hold its buffers too; its start has been charged for them.
    passing = op.name.startswith("async-collective-done") or op.called[0].startswith("async_collective_fusion")
    read = sum(_read(inner, place, shapes, passing) for place, shapes in enumerate(inputs))
    return read + _written(inner, op.shapes, passing)


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(s.bytes for s in shapes if not s.on_chip)


def _read(inner: list[Op], place: int, shapes: tuple[Shape, ...], passing: bool) -> float:
    """What a fusion reads of its operand number `place`."""
    whole = _hbm(shapes)
    parameter = next((op.name for op in inner if op.code == "parameter" and op.inside.strip() == str(place)), None)
    users = list(_users(inner, parameter))
    if not whole or not users:
        return 0.0
    if all(op.code in SLICES for op in users):
        return min(whole, sum(s.bytes for op in users for s in op.shapes))
    if all(op.code == "dynamic-update-slice" and op.operands[0] == parameter for op in users):
        return 0.0  # changed in place
    if passing and all(op.code in (*COLLECTIVES, "tuple") for op in users):
        return 0.0
    return whole


def _users(inner: list[Op], name: str | None, through: tuple[str, ...] = ("bitcast",)) -> Iterator[Op]:
    """Who uses a value, seen through bitcasts."""
    for op in inner:
        if name in op.operands:
            if op.code in through:
                yield from _users(inner, op.name, through)
            else:
                yield op


def _written(inner: list[Op], shapes: tuple[Shape, ...], passing: bool) -> float:
    """What a fusion writes: an update in place counts as what is updated."""
    by_name = {op.name: op for op in inner}
    root = next(op for op in inner if op.root)
    ends = [by_name[name] for name in root.operands] if root.code == "tuple" else [root]
    total = 0.0
    for end, shape in zip(ends, shapes, strict=False):
        end = _seen_through(end, by_name, ("bitcast",))
        if shape.on_chip or (passing and end.code in (*COLLECTIVES, "parameter")):
            continue
        update = end.code == "dynamic-update-slice"
        total += _hbm(by_name[end.operands[1]].shapes) if update else shape.bytes
    return total


def _group(op: Op, devices: int) -> tuple[int, int]:
    """How many devices a collective's group has, and how far apart their numbers lie at most."""
    if op.code.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", op.attributes)
        ends = re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else []
        return 2, max((abs(int(a) - int(b)) for a, b in ends), default=0)
    if axes := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", op.attributes):
        groups = _mesh_groups(axes[1], axes[2], axes[3])
        return groups.shape[-1], int((groups.max(-1) - groups.min(-1)).max())
    if tiles := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.attributes):
        shape = [int(d) for d in tiles[1].split(",")]
        groups = _counted(tiles[2], tiles[3]).reshape(shape)
        return shape[-1], int((groups.max(-1) - groups.min(-1)).max())
    if lists := re.search(r"replica_groups=\{(\{.*?\})\}", op.attributes):
        listed = [[int(d) for d in group.split(",") if d] for group in re.findall(r"\{([\d,\s]*)\}", lists[1])]
        return len(listed[0]), max(max(g) - min(g) for g in listed)
    return devices, devices - 1


def _counted(dims: str, order: str | None) -> np.ndarray:
    """0, 1, … in the shape `dims`, transposed."""
    shape = [int(d) for d in dims.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose([int(d) for d in order.split(",")]) if order else numbers


def _mesh_groups(mesh: str, ids: str | None, axes: str) -> np.ndarray:
    """[groups, devices] of "'x'=2,'y'=4", the devices' numbers if they are not in order, "'y':(1)2".

    "(before)size" is a part of an axis: of size `size`, with `before` larger parts outside of it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    chosen = {name: (before, part) for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)}
    shape: list[int] = []
    moved: list[int] = []
    for name, size in sizes.items():
        before, part = (int(n or 0) for n in chosen.get(name, ("", "")))
        pieces = [before, part, size // (before * part)] if part else [size]
        if name in chosen:
            moved.append(len(shape) + (1 if part else 0))
        shape += pieces
    if ids and (tiles := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)):
        numbers = _counted(tiles[1], tiles[2])
    else:
        numbers = np.array(ids.split(","), int) if ids else np.arange(math.prod(shape))
    numbers = np.moveaxis(numbers.reshape(shape), moved, range(-len(moved), 0))
    return numbers.reshape(-1, math.prod(shape[i] for i in moved))
