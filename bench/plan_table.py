"""The plans of every size on four TPU slices, as markdown: python -m bench.plan_table [SIZE:SLICE ...] [--only-print]

Plans that are not yet in bench/plans/ are made (minutes each; `pip install -r requirements-plan.txt` first) and kept
there; the tables are printed from what is there, and say what is missing. Batches grow with the chips, 16 queries and 4
prompts a chip (the defaults of 16 chips), so that rows of a size show weak scaling.
"""

import json
import pathlib
import sys

from r3jax import plan
from r3jax.errors import UserError
from r3jax.planning import topologies
from r3jax.planning.topologies import GIB
from r3jax.run import config as run_config

SIZES = ("0_5b", "7b", "72b", "1_5b", "32b")  # in the order in which they are worth waiting for
SLICES = ("v5e-16", "v5e-256", "v6e-256", "v5p-128")
PAIRS, PROMPTS = 16, 4  # of a chip
KEPT = pathlib.Path(__file__).parent / "plans"


def main(words: list[str]) -> None:
    wanted = [tuple(w.split(":")) for w in words if ":" in w] or [(size, name) for size in SIZES for name in SLICES]
    for size, name in [] if "--only-print" in words else wanted:
        file = KEPT / f"{size}-{name}.json"
        if file.is_file():
            continue
        topology = topologies.read(name)
        topologies.prepare(topology)
        config = run_config.load(f"configs/rl.py:qwen2_5_{size}")
        with config.unlocked():
            config.sft.batch_size, config.rl.prompts = PAIRS * topology.chips, PROMPTS * topology.chips
            config.evaluate.batch_size = PAIRS * topology.chips
        made = plan.make(config, topology, say=lambda line: print(line, file=sys.stderr, flush=True))
        KEPT.mkdir(exist_ok=True)
        file.write_text(json.dumps(made, indent=1) + "\n")
    plans = {(size, name): KEPT / f"{size}-{name}.json" for size in SIZES for name in SLICES}
    found = {key: json.loads(file.read_text()) for key, file in plans.items() if file.is_file()}
    print(table(found))
    print(scaling(found))
    missing = [":".join(key) for key in plans if key not in found]
    if missing:
        print("not compiled yet: " + ", ".join(missing))


def table(found: dict) -> str:
    """A line for each program of each plan."""
    head = (
        "size | slice | mesh | program | GiB a chip | fits | TFLOP | HBM, GB | sent, GB | at best | limit | MFU at most"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for (size, name), made in sorted(found.items()):
        mesh = "×".join(str(n) for n in made["mesh"].values())
        for row in made["programs"]:
            gib = f"{row['total'] / GIB:.1f} of {row['limit'] / GIB:.1f}"
            fits = "yes" if row["fits"] else f"no: {row['total'] - row['limit']:,.0f} bytes too many"
            for part in row.get("parts", [{}]):
                cells = [size, name, mesh, part.get("name", row["program"]), gib, fits]
                if part:
                    sent = sum(c["wire_bytes"] for c in part["collectives"])
                    cells += [f"{part['flops'] / 1e12:.3g}", f"{part['bytes'] / 1e9:.3g}", f"{sent / 1e9:.3g}"]
                    cells += [f"{part['seconds']['overlapped']:.3g} s", part["limit"], f"{part['mfu'][1]:.0%}"]
                lines.append("| " + " | ".join(cells + [""] * (12 - len(cells))) + " |")
    return "\n".join(lines) + "\n"


def scaling(found: dict) -> str:
    """What one chip sends in a step of training, by kind, at 16 chips and at 256."""
    lines = ["| size | program | v5e-16, GB sent | v5e-256, GB sent | ratio |", "|---|---|---|---|---|"]
    for size in SIZES:
        small, large = (_sent(found.get((size, name))) for name in ("v5e-16", "v5e-256"))
        for program in small.keys() & large.keys():
            a, b = small[program], large[program]
            lines.append(f"| {size} | {program} | {a / 1e9:.3g} | {b / 1e9:.3g} | {b / a if a else 1:.2f} |")
    return "\n".join(lines) + "\n"


def _sent(made: dict | None) -> dict[str, float]:
    rows = [part for row in (made or {"programs": []})["programs"] for part in row.get("parts", [])]
    return {part["name"]: sum(c["wire_bytes"] for c in part["collectives"]) for part in rows}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"error: {e}")
