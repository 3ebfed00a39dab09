"""Imports inside r3jax go downward only, in the order that the README's block "Layers" gives."""

import ast
import pathlib
import re
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = {"bench", "configs", "launch", "tests"}  # they stand on the library, never under it


def read_layers(text: str) -> dict[str, int]:
    """{room: layer} of the block under "## Layers"; a room is a folder or, right under r3jax, a file."""
    block = text.split("## Layers", 1)[1].split("\n## ", 1)[0]
    layers = {}
    for line in block.splitlines():
        if match := re.match(r" {4}(\d+) ", line):
            for path in re.findall(r"r3jax/[\w/]+", line):
                room = "/".join(path.split("/")[:2])
                assert room not in layers or layers[room] == int(match[1]), f"{room} stands in two layers"
                layers[room] = int(match[1])
    return layers


def imports(file: pathlib.Path, root: pathlib.Path) -> Iterable[tuple[int, str]]:
    """(line, dotted name) of a file's imports, those inside functions too; relative ones made absolute."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def upward_edges(root: pathlib.Path, layers: dict[str, int]) -> list[str]:
    """One sentence for each import that does not go downward, and for each file without a layer."""
    wrong = []
    entry_points = {room for room, layer in layers.items() if layer == max(layers.values())}
    for file in sorted((root / "r3jax").rglob("*.py")):
        name = file.relative_to(root).with_suffix("").as_posix()
        room = "/".join(name.split("/")[:2])
        if name.endswith("/__main__"):  # python -m r3jax.FOLDER: an entry point, wherever it lies
            room = "r3jax/__main__"
        if room not in layers and room != "r3jax/__init__":
            wrong.append(f"{name}.py has no layer")
            continue
        for line, target in imports(file, root):
            parts = target.split(".")
            if parts[0] in OUTSIDE:
                wrong.append(f"{name}.py:{line} imports {target}, which is not part of the library")
            if parts[0] != "r3jax" or len(parts) < 2:
                continue
            other = "/".join(parts[:2])
            if other == room or {room, other} <= entry_points:
                continue
            if layers.get(other, 99) >= layers.get(room, 0):
                wrong.append(f"{name}.py:{line} imports {target}, which is not below it")
    return wrong


def test_the_library_imports_downward_only():
    layers = read_layers((ROOT / "README.md").read_text(encoding="utf-8"))
    assert layers["r3jax/errors"] == 0 and layers["r3jax/train"] == max(layers.values())
    assert upward_edges(ROOT, layers) == []


FAKE_LAYERS = {"r3jax/errors": 0, "r3jax/data": 1, "r3jax/text": 1, "r3jax/run": 4, "r3jax/train": 7}
FAKE_LAYERS["r3jax/__main__"] = 7


@pytest.mark.parametrize(
    "path, code, complaint",
    [
        ("data/a.py", "from r3jax.run import config", "data/a.py:1 imports r3jax.run.config"),
        ("data/a.py", "from r3jax import train", "imports r3jax.train"),
        ("data/a.py", "import r3jax.run.config as c", "imports r3jax.run.config"),
        ("data/a.py", "def f():\n    from ..run.log import RunLog", "data/a.py:2 imports r3jax.run.log"),
        ("data/a.py", "from r3jax.text import prompts", "which is not below it"),
        ("run/a.py", "from r3jax.unknown import x", "imports r3jax.unknown"),
        ("run/a.py", "import tests.conftest", "which is not part of the library"),
        ("odd/a.py", "", "has no layer"),
        ("data/__main__.py", "from r3jax.run import config\nfrom r3jax.train import main", None),
        ("__init__.py", "from r3jax.errors import UserError", "imports r3jax.errors"),
        (
            "run/a.py",
            "import json\nfrom r3jax.data import beir\nfrom .log import x\nfrom r3jax import errors",
            None,
        ),
    ],
)
def test_the_walk_finds_what_is_not_downward(tmp_path, path, code, complaint):
    file = tmp_path / "r3jax" / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    wrong = upward_edges(tmp_path, FAKE_LAYERS)
    assert (len(wrong) == 1 and complaint in wrong[0]) if complaint else wrong == []


def test_a_room_cannot_stand_in_two_layers():
    with pytest.raises(AssertionError, match="two layers"):
        read_layers("## Layers\n\n    3 a   r3jax/rl/{x}.py\n    2 b   r3jax/rl/y.py\n")
