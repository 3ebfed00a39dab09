"""The charts of a report's sections, made from the lines of ``metrics.jsonl``."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r3jax.results import charts
from r3jax.results.table import number

Line = Mapping[str, Any]


@dataclass(frozen=True)
class _Plot:
    """One chart: ``keys`` maps keys of the metrics to names; ``scale`` multiplies the values."""

    title: str
    keys: Mapping[str, str]
    unit: str = ""
    note: str = ""
    scale: float = 1.0
    zero: bool = False
    top: float | None = None
    band: tuple[str, str] | None = None  # keys of the low and high ends around the first curve
    stacked: bool = False
    cut: bool = False


_TERMS = [
    _Plot("Loss, weighted sum", {"loss": "loss"}),
    _Plot("Cross-entropy of the answer", {"loss/ce": "CE"}, "nats per token"),
    _Plot("InfoNCE", {"loss/infonce": "InfoNCE"}, "nats"),
    _Plot("Triplet margin", {"loss/triplet": "triplet"}, zero=True),
    _Plot("KL to the frozen start", {"loss/kl": "KL"}, "nats per token", zero=True),
    _Plot("Gradient norm", {"grad_norm": "norm"}, zero=True),
    _Plot("Throughput", {"tokens_per_second": "rate"}, "tokens per second", zero=True),
]
_REWARD = [
    _Plot(
        "Reward",
        {"reward/mean": "mean"},
        note="The band is one standard deviation to either side.",
        band=("low", "high"),
    ),
    _Plot(
        "Reward terms",
        {"reward/retrieval": "retrieval", "reward/format": "format", "reward/length": "length"},
        zero=True,
    ),
    _Plot(
        "Spread of the reward terms",
        {"reward/retrieval_std": "retrieval", "reward/format_std": "format", "reward/length_std": "length"},
        note="Standard deviation over the rollouts.",
        zero=True,
    ),
    _Plot(
        "Ends of the completions",
        {"completion/token_rate": "with the token", "completion/cut": "cut at the limit"},
        "%",
        scale=100,
        top=100,
    ),
    _Plot(
        "Completion length",
        {"completion/length_mean": "mean"},
        "tokens",
        "The band reaches from the shortest to the longest.",
        zero=True,
        band=("completion/length_min", "completion/length_max"),
    ),
    _Plot("Policy entropy", {"policy/entropy": "entropy"}, "nats per token", zero=True),
    _Plot("KL to the reference", {"policy/kl": "KL"}, "nats per token", zero=True),
    _Plot(
        "Clipped ratios",
        {"policy/clip_low": "below", "policy/clip_high": "above"},
        "% of tokens",
        scale=100,
        zero=True,
    ),
    _Plot(
        "Groups without spread",
        {"policy/flat_groups": "share"},
        "%",
        "All rewards equal: no gradient.",
        scale=100,
        zero=True,
    ),
    _Plot(
        "Sampler against trainer",
        {"policy/logp_gap": "gap"},
        "nats",
        "Difference of their log-probabilities of the same tokens.",
        zero=True,
    ),
    _Plot("Gradient norm", {"grad_norm": "norm"}, zero=True),
    _Plot("Throughput", {"tokens_per_second": "rate"}, "tokens per second", zero=True),
]
# Of choices that are off by default: drawn where they were made.
_CHOSEN = [
    _Plot("Soft punishment of overlong thoughts", {"reward/overlong": "mean"}),
    _Plot("Groups dropped for their rewards", {"reward/dropped": "share"}, "%", scale=100, zero=True),
    _Plot(
        "Groups refilled",
        {"refill/share": "refilled", "refill/missing": "still flat", "refill/drawn_flat": "flat among the fresh"},
        "%",
        "Groups without spread, replaced by fresh prompts’.",
        scale=100,
        top=100,
    ),
    _Plot(
        "Importance weights",
        {"policy/importance": "mean", "policy/importance_cut": "share cut off"},
        note="Trainer over sampler, at the first of several epochs.",
        zero=True,
    ),
]
_INDEX = [
    _Plot("Documents re-encoded per step", {"index/reencoded": "documents"}, zero=True),
    _Plot("Share of the corpus re-encoded", {"index/share": "share"}, "%", scale=100, zero=True),
    _Plot("Age of the vectors", {"index/age_max": "oldest", "index/age_mean": "mean"}, "steps", zero=True),
    _Plot(
        "Reward error on probe steps",
        {"probe/reward_error": "error"},
        note="Mean absolute difference to the reward from a fully re-encoded corpus.",
        zero=True,
    ),
    _Plot(
        "Probe recall",
        {"index/probe_recall": "recall"},
        note="Of the index's search against exact search over the same vectors: below a threshold it is rebuilt.",
        top=1.0,
    ),
    _Plot(
        "Stale recall on probe steps",
        {"probe/stale_recall": "recall"},
        note="Of the index before the step's refresh against exact search in a fully re-encoded corpus.",
        top=1.0,
    ),
    _Plot(
        "Probe drift",
        {"index/probe_drift": "cosine"},
        note="Stored vectors of the probe set against fresh ones, which are not written back.",
    ),
]
_TIME = _Plot(
    "Time of a reinforcement step",
    {
        "time/rollout": "rollout",
        "time/encode": "encode",
        "time/search": "search",
        "time/reward": "reward",
        "time/update": "update",
    },
    "seconds",
    "Peaks are cut at three times the median; a first step compiles.",
    stacked=True,
    cut=True,
)
_EVAL = _Plot(
    "nDCG@10 on the validation split",
    {"eval/ndcg@10/reasoning": "with reasoning", "eval/ndcg@10/direct": "direct"},
    zero=True,
)
_STAGES = {"sft": "supervised", "rl": "reinforcement", "evaluate": "evaluation"}


def clean(lines: Iterable[Line]) -> list[Line]:
    """Lines with a stage and a step, in order; lines of one step merge, the last one wins.

    Each stage counts from 1: the second's steps are moved behind the first's.
    """
    kept: dict[tuple[str, float], dict[str, Any]] = {}
    for line in lines:
        step, stage = number(line.get("step")), line.get("stage")
        if step is not None and stage in ("sft", "rl"):
            kept[stage, step] = {**kept.get((stage, step), {}), **line, "step": step}
    last = max((step for stage, step in kept if stage == "sft"), default=0)
    for (stage, _), line in kept.items():
        line["step"] += last if stage == "rl" else 0
    return sorted(kept.values(), key=lambda line: line["step"])


def learning(lines: Sequence[Line]) -> str:
    """nDCG by stage and the terms of the supervised loss."""
    first_rl = next((line["step"] for line in lines if line["stage"] == "rl"), None)
    sft = [line for line in lines if line["stage"] == "sft"]
    grid = _grid([_draw(_EVAL, lines, first_rl), *(_draw(plot, sft) for plot in _TERMS)])
    note = (
        '<p class="note">Over optimiser steps, counted through both stages. Where steps are drawn together, '
        "the line is their mean and the band reaches from the least to the greatest.</p>"
    )
    return note + grid if grid else ""


def reinforcement(lines: Sequence[Line]) -> str:
    """Reward, completions and the policy."""
    rl = []
    for line in _rl(lines):
        mean, spread = number(line.get("reward/mean")), number(line.get("reward/std"))
        if mean is not None and spread is not None:
            line = {**line, "low": mean - spread, "high": mean + spread}
        rl.append(line)
    return _grid([_draw(plot, rl) for plot in (*_REWARD, *_CHOSEN)])


def index(lines: Sequence[Line]) -> str:
    """Staleness of the index and what it costs to keep it fresh."""
    return _grid([_draw(plot, _rl(lines)) for plot in _INDEX])


def time(lines: Sequence[Line], stage_seconds: Mapping[str, Any]) -> str:
    """Where the time goes: within a reinforcement step, and over the stages of the run."""
    rl = _rl(lines)
    values = {name: [v for line in rl if (v := number(line.get(key))) is not None] for key, name in _TIME.keys.items()}
    step = [(name, statistics.median(seconds)) for name, seconds in values.items() if seconds]
    stages = [(_STAGES.get(name, name), number(seconds) or 0.0) for name, seconds in stage_seconds.items()]
    return _grid(
        [
            _draw(_TIME, rl),
            charts.shares("A median reinforcement step", step),
            charts.shares("The stages of the run", stages),
        ]
    )


def _rl(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line["stage"] == "rl"]


def _draw(plot: _Plot, lines: Sequence[Line], boundary: float | None = None) -> str:
    band = [
        (line["step"], low * plot.scale, high * plot.scale)
        for line in lines
        if plot.band
        and (low := number(line.get(plot.band[0]))) is not None
        and (high := number(line.get(plot.band[1]))) is not None
    ]
    series = [
        charts.Series(
            name,
            [(line["step"], value * plot.scale) for line in lines if (value := number(line.get(key))) is not None],
            band if i == 0 else (),
        )
        for i, (key, name) in enumerate(plot.keys.items())
    ]
    return charts.chart(
        plot.title,
        series,
        unit=plot.unit,
        note=plot.note,
        boundary=boundary,
        stacked=plot.stacked,
        zero=plot.zero,
        top=plot.top,
        cut=plot.cut,
    )


def _grid(figures: Sequence[str]) -> str:
    drawn = "".join(figures)
    return f'<div class="grid">{drawn}</div>' if drawn else ""
