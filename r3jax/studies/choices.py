"""Studies of one choice each: stage 2 with every value of a field, from the same stage 1, with equal steps."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from r3jax.rl.algorithms import ADVANTAGES
from r3jax.rl.rewards import REWARDS
from r3jax.studies.cells import DEFAULT, Lab, Outcome, mean, p_better, table
from r3jax.studies.plot import Panel, figure


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field of the config and the values that are compared."""

    field: str
    values: tuple[Any, ...]


CHOICES = {
    "reward": Choice("rl.reward.name", tuple(REWARDS)),
    "advantage": Choice("rl.advantage", ADVANTAGES),
    "contrastive": Choice("rl.contrastive_weight", (0.0, 0.1, 0.3, 1.0)),
}


def run(lab: Lab, name: str, current: Any) -> tuple[str, str]:
    """Trains what is missing of the choice `name`; its section (markdown) and its plot (SVG).

    current: the config's own value, which is compared with whatever else the choice lists.
    """
    choice = CHOICES[name]
    outcomes: dict[Any, list[Outcome]] = {}
    for value in (*choice.values, *({current} - set(choice.values))):
        changes = [f"--config.{choice.field}={value}"]
        label = DEFAULT if value == current else f"{name}-{value}"
        outcomes[value] = [lab.outcome(lab.run(seed, label, changes)) for seed in lab.seeds]
    return section(choice.field, current, outcomes), plot(choice.field, outcomes)


def section(field: str, current: Any, outcomes: Mapping[Any, list[Outcome]]) -> str:
    """The table, and which value wins."""
    splits = list(outcomes[current][0].held_out)
    head = [f"`{field}`", "validation, reasoning", "direct"]
    for split in splits:
        head += [f"{split}, reasoning", "direct", "p"]
    rows = []
    for value, found in outcomes.items():
        row = [f"**{value} (the default)**" if value == current else str(value)]
        row += [f"{mean(o.validation[mode] for o in found):.4f}" for mode in ("reasoning", "direct")]
        for split in splits:
            row += [f"{mean(o.held_out[split][mode] for o in found):.4f}" for mode in ("reasoning", "direct")]
            row.append("" if value == current else f"{two_sided(found, outcomes[current], split):.3f}")
        row += [f"{mean(o.thought_tokens for o in found):.1f}", f"{mean(o.seconds for o in found):.0f}"]
        rows.append(row)
    best = {
        "the validation split": max(outcomes, key=lambda v: mean(o.validation["reasoning"] for o in outcomes[v])),
        f"the mean of {' and '.join(splits)}": max(
            outcomes, key=lambda v: mean(o.held_out[s]["reasoning"] for o in outcomes[v] for s in splits)
        ),
    }
    verdict = "; ".join(
        f"on {where} `{value}` is best" + (", which is the default" if value == current else f" (default: `{current}`)")
        for where, value in best.items()
    )
    return (
        "nDCG@10, mean over the seeds; p: two-sided paired randomisation test against the default, with reasoning, by "
        "query, each query's score its mean over the seeds.\n\n"
        + table([*head, "thought tokens", "seconds"], rows)
        + f"\n\nWith reasoning, {verdict}.\n"
    )


def two_sided(ours: list[Outcome], theirs: list[Outcome], split: str) -> float:
    """Twice the smaller of the two one-sided p, at most 1."""
    return min(1.0, 2 * min(p_better(ours, theirs, split), p_better(theirs, ours, split)))


def plot(field: str, outcomes: Mapping[Any, list[Outcome]]) -> str:
    """Held-out nDCG@10 of each value, seed by seed."""
    first = next(iter(outcomes.values()))
    panels = []
    for split in first[0].held_out:
        series: dict[str, list[float | None]] = {}
        for mode in ("reasoning", "direct"):
            for seed in range(len(first)):
                values = [found[seed].held_out[split][mode] for found in outcomes.values()]
                series[f"{mode}, seed {seed + 1} of {len(first)}"] = list(values)
        panels.append(Panel(f"nDCG@10 on {split}", [str(v) for v in outcomes], series, field))
    return figure(panels)


def put_section(page: str, title: str, text: str) -> str:
    """`page` with its section `## title` replaced, or with the section at its end; all else stays."""
    section = f"## {title}\n\n{text.rstrip()}\n\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if found:
        return page[: found.start()] + section + page[found.end() :].lstrip("\n")
    return page.rstrip("\n") + "\n\n" + section
