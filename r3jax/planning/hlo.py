"""A compiled program's text as its instructions, by computation: what `costs` reads."""

import dataclasses
import math
import re

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits // 8 for kind in "fsuc" for bits in (8, 16, 32, 64, 128)
}


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    shapes: tuple[Shape, ...]
    code: str
    operands: tuple[str, ...]
    inside: str  # what stands between its parentheses
    attributes: str
    root: bool

    def named(self, attribute: str) -> list[str]:
        """Computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []

    @property
    def called(self) -> list[str]:
        """Computations it runs once (a loop's are not among them)."""
        names = ["calls", "called_computations", "branch_computations", "true_computation", "false_computation"]
        if self.code in ("call", "async-start"):
            names.append("to_apply")
        return [name for attribute in names for name in self.named(attribute)]


def parse(text: str) -> tuple[dict[str, list[Op]], str]:
    """{computation: its instructions}, and which one is the entry."""
    module: dict[str, list[Op]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            current = module.setdefault(head[2], []) if head and not line.startswith("HloModule") else None
            if head and head[1]:
                entry = head[2]
        elif current is not None and " = " in line:
            current.append(_op(line))
    return module, entry


def _op(line: str) -> Op:
    left, _, right = line.partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    inside = rest[opens + 1 : closes]
    name = left.replace("ROOT", "").strip().lstrip("%")
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Op(name, _shapes(kind), rest[:opens], operands, inside, rest[closes + 1 :], "ROOT " in left)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in re.finditer(r"[()]", text[start:]):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return start + place.start()
    raise ValueError(f"unbalanced: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    pattern = r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?"
    found = re.findall(pattern, text)
    return tuple(
        Shape(kind, tuple(int(d) for d in dims.split(",") if d), "S(1)" in layout) for kind, dims, layout in found
    )
