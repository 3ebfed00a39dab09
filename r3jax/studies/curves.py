"""Where reasoning starts to pay: whole runs, of both stages, over model size and training budget.

Over the length of the thought no run is needed: `python -m r3jax.evaluate RUN --budgets=0,2,4,8` cuts thoughts short.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from r3jax.studies.cells import DEFAULT, MODES, Lab, Outcome, mean, p_mode, table
from r3jax.studies.plot import Panel, figure


@dataclasses.dataclass(frozen=True)
class Axis:
    """Fields of the config that grow together: each is multiplied by every factor and rounded down, to 1 at least."""

    title: str
    shown: str  # the field that names a run in the table
    fields: tuple[str, ...]
    factors: tuple[float, ...]


AXES = {
    # The head's width stays, and with it the number of query heads per key head.
    "size": Axis(
        "model size", "model.width", ("model.width", "model.ffn", "model.heads", "model.kv_heads"), (0.25, 0.5, 1.0)
    ),
    "budget": Axis("training budget", "sft.steps", ("sft.steps", "rl.steps"), (0.25, 0.5, 1.0)),
}


def changed(axis: Axis, factor: float, config: Mapping[str, Any]) -> dict[str, int]:
    """The axis' fields at a factor, of a config's leaves; what is off stays off."""
    return {field: max(1, int(config[field] * factor)) if config[field] else 0 for field in axis.fields}


def variants(config: Mapping[str, Any]) -> list[dict[str, int]]:
    """The fields that the runs change, of a config's leaves."""
    return [changed(axis, factor, config) for axis in AXES.values() for factor in axis.factors]


def run(lab: Lab, config: Mapping[str, Any]) -> tuple[str, str]:
    """Trains what is missing; the section (markdown) and its plot (SVG). config: the leaves of what is varied."""
    found: dict[str, dict[float, list[Outcome]]] = {}
    for name, axis in AXES.items():
        found[name] = {}
        for factor in axis.factors:
            outcomes = found[name][factor] = []
            for seed in lab.seeds:
                changes = changed(axis, factor, config)
                of = lab.run(seed, DEFAULT, {}) if factor == 1 else lab.whole(seed, f"{name}-{factor:g}", changes)
                outcomes.append(lab.outcome(of))
    return section(found, config), plot(found, config)


def section(found: Mapping[str, Mapping[float, list[Outcome]]], config: Mapping[str, Any]) -> str:
    """A table per split, a row per run."""
    together = "; ".join(f"{axis.title}: {', '.join(f'`{field}`' for field in axis.fields)}" for axis in AXES.values())
    parts = [
        "Runs of both stages, nDCG@10 after stage 2, mean over the seeds: what the same model finds by the query alone "
        "(direct), after its own thought (reasoning) and after an empty one. p: one-sided paired randomisation test "
        "that reasoning is better, by query, each query's score its mean over the seeds. What grows together: "
        f"{together}."
    ]
    for split in found["size"][1.0][0].held_out:
        rows = []
        for name, runs in found.items():
            axis = AXES[name]
            for factor, outcomes in runs.items():
                label = f"{axis.title}: `{axis.shown}` {changed(axis, factor, config)[axis.shown]}"
                row = [f"**{label} (the config's)**" if factor == 1 else label]
                row += [f"{mean(o.held_out[split][mode] for o in outcomes):.4f}" for mode in MODES]
                row += [f"{p_mode(outcomes, split, 'reasoning', other):.4f}" for other in ("direct", "empty")]
                rows.append([*row, f"{mean(o.thought_tokens for o in outcomes):.1f}"])
        parts += [f"**{split}**", table(["run", *MODES, "p(> direct)", "p(> empty)", "thought tokens"], rows)]
    return "\n\n".join(parts) + "\n"


def plot(found: Mapping[str, Mapping[float, list[Outcome]]], config: Mapping[str, Any]) -> str:
    """nDCG@10 on the first split over each axis, a line per way to search."""
    split = next(iter(found["size"][1.0][0].held_out))
    panels = []
    for name, runs in found.items():
        axis = AXES[name]
        series = {
            mode: [mean(o.held_out[split][mode] for o in outcomes) for outcomes in runs.values()] for mode in MODES
        }
        columns = [str(changed(axis, factor, config)[axis.shown]) for factor in runs]
        panels.append(Panel(f"nDCG@10 on {split}: {axis.title}", columns, series, axis.shown))
    return figure(panels)
