"""A plan as figures of one chip, and as text."""

import dataclasses
from typing import Any

from r3jax.planning import roofline
from r3jax.planning.compiled import Compiled
from r3jax.planning.costs import Costs
from r3jax.planning.programs import Program, on_one
from r3jax.planning.topologies import GIB, Chip


def figures(program: Program, found: Compiled, state: Any, chip: Chip, chips: int, useful_weights: float) -> dict:
    """One program's row: bytes, costs and times of one chip.

    state: the TrainState that lies in memory meanwhile, whether the program takes it or not.
    useful_weights: those that a token is multiplied with: without the tables.
    """
    held = {"parameters": on_one(state.params), "optimiser": on_one((state.step, state.opt_state))}
    held["reference"] = on_one(state.reference)
    given = on_one(program.args) + on_one([x for x in program.kwargs.values() if hasattr(x, "sharding")])
    memory = held | {
        "weights for decoding": program.copied,
        "batch": given - on_one(program.args[0]) - program.cache,  # its first argument is the state, or its weights
        "cache": program.cache,
        "temporaries": found.temporaries,
        "results and code": found.results + found.code,
        # The compiler's layouts pad what lies in memory; what a program does not look at is none of its arguments.
        "padding": max(0.0, found.arguments - given),
    }
    row: dict[str, Any] = {"program": program.name, "limit": chip.memory, "compiling": [found.took, found.worked]}
    if found.short:
        beside = sum(held.values()) - (on_one(program.args[0]) - program.copied)
        return row | {"memory": held, "total": chip.memory + found.short + beside, "fits": False}
    total = sum(memory.values())
    row |= {"memory": memory, "total": total, "fits": total <= chip.memory}
    parts: dict[str, tuple[Costs, float]] = {program.name: (found.once, 6 * program.trained + 2 * program.read)}
    if program.trips > 1:
        token = 2 * program.written / program.trips
        parts = {
            f"decoding, before each {program.kwargs['look']} tokens": (found.once, 0),
            "decoding, a token": (found.again, token),
        }
    row["parts"] = [_costs(name, *part, chip, chips, useful_weights) for name, part in parts.items()]
    return row


def _costs(name: str, costs: Costs, passes: float, chip: Chip, chips: int, weights: float) -> dict:
    times = roofline.times(costs, chip)
    useful = passes * weights / chips
    return {
        "name": name,
        "flops": costs.flops,
        "bytes": costs.bytes,
        "collectives": [dataclasses.asdict(c) for c in costs.collectives],
        "seconds": dataclasses.asdict(times) | {"overlapped": times.overlapped, "added": times.added},
        "limit": times.limit,
        "mfu": [roofline.utilisation(useful, s, chip) for s in (times.added, times.overlapped)],
    }


def text(plan: dict) -> str:
    """For people."""
    mesh = " × ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    lines = [
        f"{plan['config']} on {plan['topology']}: {plan['chips']} × {plan['chip']}, mesh {mesh}",
        plan["basis"],
        "",
    ]
    for row in plan["programs"]:
        lines.append(
            f"{row['program']}: {row['total'] / GIB:.2f} GiB of {row['limit'] / GIB:.2f} per chip, " + verdict(row)
        )
        lines.append("  " + ", ".join(f"{k} {v / GIB:.2f}" for k, v in row["memory"].items() if v >= 0.005 * GIB))
        for part in row.get("parts", []):
            s = part["seconds"]
            lines.append(
                f"  {part['name']}: {part['flops'] / 1e12:.3g} TFLOP, {part['bytes'] / 1e9:.3g} GB of HBM; "
                f"{_time(s['overlapped'])} ({part['limit']}) to {_time(s['added'])} (nothing overlaps); "
                f"MFU {part['mfu'][1]:.0%} to {part['mfu'][0]:.0%}"
            )
            for c in part["collectives"]:
                lines.append(
                    f"    {c['kind']} over {c['group']}: {c['count']} × {c['operand_bytes'] / c['count'] / 1e6:.3g} MB "
                    f"in, {c['wire_bytes'] / 1e9:.3g} GB sent"
                )
        lines.append("")
    if plan["tried"]:
        lines += ["tried:", *(f"  {line}" for line in plan["tried"]), ""]
    return "\n".join([*lines, "use: " + " ".join(plan["flags"])])


def verdict(row: dict) -> str:
    return "fits" if row["fits"] else f"does not fit: {row['total'] - row['limit']:,.0f} bytes too many"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
