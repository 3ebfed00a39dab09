"""The plans of every size on four TPU slices, as markdown: python -m bench.plan_table [SIZE:SLICE ...] [--only-print]

Plans that are not yet whole in bench/plans/ are made (minutes a program; `make plan-deps` and PYTHONPATH=.venv/libtpu
first). Each program's figures are kept in bench/plans/programs/ as soon as it is compiled, so a row that was broken off
goes on where it was, and a row that fails does not end the others. The tables are printed from what is there, and say
what is missing. Batches grow with the chips, 16 queries and 4 prompts a chip (the defaults of 16 chips), so that rows
of a size show weak scaling.
"""

import json
import pathlib
import sys

from r3jax import plan
from r3jax.errors import UserError
from r3jax.planning import topologies
from r3jax.planning.topologies import GIB
from r3jax.run import config as run_config

SIZES = ("0_5b", "1_5b", "7b", "32b", "72b")
SLICES = ("v5e-16", "v5e-256", "v6e-256", "v5p-128")
PAIRS, PROMPTS = 16, 4  # of a chip
KEPT = pathlib.Path(__file__).parent / "plans"


def main(words: list[str]) -> None:
    wanted = [tuple(w.split(":")) for w in words if ":" in w] or [(size, name) for size in SIZES for name in SLICES]
    for size, name in [] if "--only-print" in words else wanted:
        made(size, name)
    files = {(size, name): KEPT / f"{size}-{name}.json" for size in SIZES for name in SLICES}
    found = {key: json.loads(file.read_text()) for key, file in files.items() if file.is_file()}
    print(table(found))
    print(scaling(found))
    for line in missing(found):
        print(line)


def made(size: str, name: str) -> None:
    """Makes a plan, or what it lacks of one; writes it after each program, and why it is not whole."""
    file = KEPT / f"{size}-{name}.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        if not kept["missing"]:
            return
    topology = topologies.read(name)
    topologies.prepare(topology)
    config = run_config.load(f"configs/rl.py:qwen2_5_{size}")
    with config.unlocked():
        config.sft.batch_size, config.rl.prompts = PAIRS * topology.chips, PROMPTS * topology.chips
        config.evaluate.batch_size = PAIRS * topology.chips
    latest: dict = {}

    def keep(found: dict) -> None:
        latest.update(found)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(file)

    KEPT.mkdir(exist_ok=True)
    try:
        keep(plan.make(config, topology, say=_say, cache=KEPT / "programs", keep=keep))
    except UserError:
        raise
    except Exception as e:  # the compiler's own, of several types; the other rows want their turn
        said = next(iter(str(e).splitlines()), "")
        _say(f"{size} on {name}: {type(e).__name__}: {said}")
        if latest:
            keep(latest | {"error": f"{type(e).__name__}: {said[:300]}"})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


HEAD = (
    "size | slice | mesh | program | chunks | GiB a chip | fits | TFLOP | HBM, GB | sent, GB | at best | limit | "
    "MFU at most | compiled in"
)
CHUNKED = {"SFT step": "sft", "policy update": "rl"}


def table(found: dict) -> str:
    """A line for each program of each plan, and for each that it lacks."""
    lines = [f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1)]
    for (size, name), plan_ in found.items():
        for cells in _lines(plan_):
            cells = [size, name, "×".join(str(n) for n in plan_["mesh"].values()), *cells]
            lines.append("| " + " | ".join(cells + [""] * (HEAD.count("|") + 1 - len(cells))) + " |")
    return "\n".join(lines) + "\n"


def _lines(plan_: dict):
    """Cells from the program's name on."""
    for row in plan_["programs"]:
        chunks = str(plan_["chunks"].get(CHUNKED.get(row["program"]), ""))
        gib = f"{row['total'] / GIB:.1f} of {row['limit'] / GIB:.1f}"
        fits = "yes" if row["fits"] else f"no: {row['total'] - row['limit']:,.0f} bytes too many"
        took = _compiling(*row["compiling"]) if "compiling" in row else ""
        if not row.get("parts"):
            yield [row["program"], chunks, gib, fits, *[""] * 6, took]
        for part in row.get("parts", []):
            costs = [f"{part['flops'] / 1e12:.3g}", f"{part['bytes'] / 1e9:.3g}", f"{_sum(part) / 1e9:.3g}"]
            costs += [_time(part["seconds"]["overlapped"]), part["limit"], f"{part['mfu'][1]:.0%}"]
            yield [part["name"], chunks, gib, fits, *costs, took]
    for program in plan_["missing"]:
        yield [program, "", "", "not compiled yet"]


def _compiling(took: float, worked: float) -> str:
    return f"{took:.0f} s" + (f" ({worked:.0f} of CPU)" if worked else "")


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _sum(part: dict) -> float:
    return sum(c["wire_bytes"] for c in part["collectives"])


def scaling(found: dict) -> str:
    """What one chip sends in each program, by kind of collective, at 16 chips and at 256."""
    head = "size | program | collective | v5e-16: mesh, chunks | GB sent | v5e-256: mesh, chunks | GB sent | ratio"
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for size in SIZES:
        small, large = (found.get((size, name)) for name in ("v5e-16", "v5e-256"))
        for program, how in (_how(small) if small else {}).items():
            if not large or program not in _how(large):
                continue
            a, b = _sent(small, program), _sent(large, program)
            for kind in (*sorted(a.keys() | b.keys()), "all"):
                x, y = (sum(sent.values()) if kind == "all" else sent.get(kind, 0.0) for sent in (a, b))
                ratio = f"{y / x:.2f}" if x else ""
                cells = [size, program, kind, how, f"{x / 1e9:.3g}", _how(large)[program], f"{y / 1e9:.3g}", ratio]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _how(plan_: dict) -> dict[str, str]:
    """{program: its mesh and chunks}, of those that have costs."""
    mesh = "×".join(str(n) for n in plan_["mesh"].values())
    chunks = {row["program"]: plan_["chunks"].get(CHUNKED.get(row["program"])) for row in plan_["programs"]}
    return {
        part["name"]: f"{mesh}, {chunks[row['program']]}" if chunks[row["program"]] else mesh
        for row in plan_["programs"]
        for part in row.get("parts", [])
    }


def _sent(plan_: dict, program: str) -> dict[str, float]:
    """{kind: bytes}."""
    sent: dict[str, float] = {}
    for row in plan_["programs"]:
        for part in row.get("parts", []):
            for c in part["collectives"] if part["name"] == program else ():
                sent[c["kind"]] = sent.get(c["kind"], 0.0) + c["wire_bytes"]
    return sent


def missing(found: dict) -> list[str]:
    """What the tables lack, in words."""
    rows = [f"{size}:{name}" for size in SIZES for name in SLICES if (size, name) not in found]
    lines = ["Not begun: " + ", ".join(rows) + "."] if rows else []
    for (size, name), plan_ in found.items():
        if plan_["missing"]:
            why = f" ({plan_['error']})" if "error" in plan_ else ""
            lines.append(f"{size}:{name} lacks {', '.join(plan_['missing'])}{why}.")
    return lines


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"error: {e}")
