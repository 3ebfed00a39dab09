"""Studies of one choice each: stage 2 with every value of a field, from the same stage 1, with equal steps."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from r3jax.rl.algorithms import ADVANTAGES
from r3jax.rl.rewards import REWARDS
from r3jax.studies.cells import DEFAULT, Lab, Outcome, each, mean, p_better, table
from r3jax.studies.plot import Panel, figure


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field of the config and the values that are compared."""

    field: str
    values: tuple[Any, ...]
    note: str = ""  # what else changes with it


CHOICES = {
    "reward": Choice("rl.reward.name", tuple(REWARDS)),
    "advantage": Choice(
        "rl.advantage",
        ADVANTAGES,
        "An advantage also sets how much the policy's term weighs beside InfoNCE: `rloo` is `dr_grpo` times "
        "G / (G - 1) for groups of G, and `grpo` divides by the group's spread.",
    ),
    "contrastive": Choice("rl.contrastive_weight", (0.0, 0.3, 1.0, 3.0)),
}


def variants(name: str) -> list[dict[str, Any]]:
    """The fields that a choice's runs change."""
    return [{CHOICES[name].field: value} for value in CHOICES[name].values]


def run(lab: Lab, name: str, current: Any) -> tuple[str, str]:
    """Trains what is missing of the choice `name`; its section (markdown) and its plot (SVG).

    current: the config's own value, which is compared with whatever else the choice lists.
    """
    choice = CHOICES[name]
    outcomes: dict[Any, list[Outcome]] = {}
    for value in (*choice.values, *({current} - set(choice.values))):
        label = DEFAULT if value == current else f"{name}-{value}"
        outcomes[value] = [lab.outcome(lab.run(seed, label, {choice.field: value})) for seed in lab.seeds]
    return section(choice, current, outcomes), plot(choice.field, outcomes)


def section(choice: Choice, current: Any, outcomes: Mapping[Any, list[Outcome]]) -> str:
    """The table, and which value wins: by the validation split, for that is what a choice is made by."""
    splits = list(outcomes[current][0].held_out)
    head = [f"`{choice.field}`", "validation, reasoning", "direct"]
    for split in splits:
        head += [f"{split}, reasoning", "direct", "p"]
    rows = []
    for value, found in outcomes.items():
        row = [f"**{value} (the config's)**" if value == current else str(value)]
        row += [each([o.validation["reasoning"] for o in found]), f"{mean(o.validation['direct'] for o in found):.4f}"]
        for split in splits:
            row += [each([o.held_out[split]["reasoning"] for o in found])]
            row += [f"{mean(o.held_out[split]['direct'] for o in found):.4f}"]
            row.append("" if value == current else f"{two_sided(found, outcomes[current], split):.3f}")
        rows.append(
            [*row, f"{mean(o.thought_tokens for o in found):.1f}", f"{mean(o.step_seconds for o in found):.2f}"]
        )
    best = max(outcomes, key=lambda v: mean(o.validation["reasoning"] for o in outcomes[v]))
    better = [(v, s) for v in outcomes for s in splits if v != current and _told(outcomes, v, current, s, up=True)]
    worse = [(v, s) for v in outcomes for s in splits if v != current and _told(outcomes, v, current, s, up=False)]
    verdict = f"On the validation split `{best}` has the highest mean with reasoning"
    verdict += ", which is the config's. " if best == current else f" (the config's: `{current}`). "
    verdict += f"Told apart from the config's (p < .05): better {_list(better)}; worse {_list(worse)}."
    return (
        "The same steps each, from the same stage 1. nDCG@10, mean over the seeds and each seed's; p: two-sided paired "
        "randomisation test against the config's value, with reasoning, by query, each query's score its mean over the "
        f"seeds. Seconds: a step's median. {choice.note}".rstrip()
        + "\n\n"
        + table([*head, "thought tokens", "s a step"], rows)
        + f"\n\n{verdict}\n"
    )


def _told(outcomes: Mapping[Any, list[Outcome]], value: Any, current: Any, split: str, up: bool) -> bool:
    """Whether a value is better (`up`) or worse than the config's on a split beyond chance."""
    ours, theirs = (mean(o.held_out[split]["reasoning"] for o in outcomes[v]) for v in (value, current))
    return (ours > theirs) == up and two_sided(outcomes[value], outcomes[current], split) < 0.05


def _list(found: list[tuple[Any, str]]) -> str:
    return ", ".join(f"`{value}` on {split}" for value, split in found) or "none"


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
