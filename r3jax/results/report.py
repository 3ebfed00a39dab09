"""The report of a run, a static page.

Read from the work folder: ``results.json``, ``metrics.jsonl``, ``examples.json`` and ``config.json``. Each
may be missing, and so may each key in them: the part of the page that would show it is left out.
"""

import html
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from r3jax.errors import UserError
from r3jax.results import curves, queries, table
from r3jax.results.charts import duration
from r3jax.results.page import head, write_page
from r3jax.results.table import MISSING, fixed, number, p_text, percent

LABELS = {
    "bm25": "BM25",
    "untrained": "Untrained",
    "sft_direct": "SFT, direct",
    "sft_reasoning": "SFT, with reasoning",
    "rl_direct": "RL, direct",
    "rl_reasoning": "RL, with reasoning",
    "rl_averaged": "RL, mean of several thoughts",
    "rl_empty": "RL, empty thought",
    "rl_shuffled": "RL, another query’s thought",
    "rl_copied": "RL, the query as the thought",
}
_HEADLINES = (
    "rl_reasoning",
    "rl_direct",
    "sft_reasoning",
    "sft_direct",
)  # the first one there is shown on top


def label(condition: str) -> str:
    """For people; of a model without stages the words after the stage's."""
    if f"rl_{condition}" in LABELS:
        return LABELS[f"rl_{condition}"].removeprefix("RL, ").capitalize()
    return LABELS.get(condition, condition)


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes ``report.html`` into the folder of a run, whole or not at all.

    Args:
      workdir: the folder that the trainer wrote to.

    Returns:
      The path of the page.

    Raises:
      UserError: if there is no such folder, or one of the JSON files in it cannot be read.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"workdir: there is no folder {workdir}; give the folder of a run.")
    results = _load(workdir / "results.json", {})
    config = _load(workdir / "config.json", {})
    lines = curves.clean(_load_lines(workdir / "metrics.jsonl"))
    examples = _load(workdir / "examples.json", [])

    title = str(results.get("name") or config.get("name") or workdir.resolve().name)
    sections = [
        ("results", "Results", _results(results)),
        ("learning", "Learning", curves.learning(lines)),
        ("reinforcement", "Reinforcement", curves.reinforcement(lines)),
        ("index", "Index", curves.index(lines) + _refresh(results.get("refresh") or {})),
        ("time", "Time", curves.time(lines, results.get("stage_seconds") or {})),
        ("queries", "Queries", queries.cards(examples)),
    ]
    path = workdir / "report.html"
    write_page(path, title, _header(title, results, config), sections)
    return path


def _load(path: pathlib.Path, absent: Any) -> Any:
    """The content of a JSON file, or ``absent`` (an empty dict or list) where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return absent
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error}); mend or remove the file.") from error
    if not isinstance(content, type(absent)):
        raise UserError(f"{path}: should hold a JSON {type(absent).__name__}; mend or remove the file.")
    return content


def _load_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; half-written lines, which a killed run leaves, are passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if isinstance(content, dict):
                yield content


def _header(title: str, results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    facts = [str(results[key]) for key in ("device",) if results.get(key)]
    facts += [f"seed {results['seed']}"] if results.get("seed") is not None else []
    facts += [f"{duration(results['seconds'])} in all"] if number(results.get("seconds")) else []
    peak = number(results.get("peak_rss_bytes"))
    facts += [f"peak memory {peak / 2**30:.1f} GiB"] if peak else []
    return head("Search-R3 run", title, facts, list(_tiles(results)), _config(config))


def _tiles(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, value, the line below it) of the figures on top of the page."""
    for split, conditions in table.splits(results):
        name = next((name for name in _HEADLINES if name in conditions), None)
        if name is None:
            continue
        lexical = conditions.get("bm25", {}).get("ndcg@10")
        below = label(name) + (f"; BM25 {fixed(lexical, 3)}" if number(lexical) is not None else "")
        yield f"nDCG@10, {split} queries", fixed(conditions[name].get("ndcg@10"), 3), below
    refresh = results.get("refresh") or {}
    if number(refresh.get("mean_abs_reward_error")) is not None:
        below = f"mean of {fixed(refresh.get('probe_steps'), 0)} probe steps"
        if number(refresh.get("max_abs_reward_error")) is not None:
            below += f", at most {fixed(refresh['max_abs_reward_error'], 4)}"
        yield "Reward error", fixed(refresh["mean_abs_reward_error"], 4), below
    if number(refresh.get("max_share_reencoded")) is not None:
        below = f"at most, {percent(refresh.get('mean_share_reencoded'))} on average"
        yield "Re-encoded per step", percent(refresh["max_share_reencoded"]), below


def _config(config: Mapping[str, Any]) -> str:
    """The resolved configuration, dotted key by dotted key."""
    entries = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(_clip(value))}</dd></div>" for key, value in _flatten(config)
    )
    if not entries:
        return ""
    return f'<details class="config"><summary>Configuration</summary><dl>{entries}</dl></details>'


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _clip(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _results(results: Mapping[str, Any]) -> str:
    parts = [_split(results, split, conditions) for split, conditions in table.splits(results)]
    if not parts:
        return ""
    return (
        '<p class="note">The same queries under each condition; the best of a column is in bold. '
        "Direct: the model embeds the query as it is. With reasoning: it writes a thought first. Empty and "
        "another query’s thought are controls: a thought that helps must beat both.</p>" + "".join(parts)
    )


def _split(results: Mapping[str, Any], split: str, conditions: Mapping[str, Mapping[str, Any]]) -> str:
    counts = [n for c in conditions.values() if (n := number(c.get("queries"))) is not None]
    size = f" <small>{max(counts):,.0f} queries</small>" if counts else ""
    top = max((number(c.get("ndcg@10")) or 0.0 for c in conditions.values()), default=0.0) or 1.0
    heads = ["Condition", *table.METRICS.values(), "Thought tokens", "Ends with token", "ms per query"]
    body = []
    stage = None
    for (name, figures), cells in zip(conditions.items(), table.rows(conditions), strict=True):
        kind = name.split("_")[0] if name.startswith(("sft_", "rl_")) else "base"
        classes = ["ours"] * (name == "rl_reasoning") + ["first-of-stage"] * (kind != stage and stage is not None)
        stage = kind
        share = 100 * (number(figures.get("ndcg@10")) or 0.0) / top
        bar = f'<span class="bar" aria-hidden="true"><i style="width:{share:.1f}%"></i></span>'
        silent = number(figures.get("unanswered"))
        hint = f' <small class="soft">{silent:,.0f} unanswered</small>' if silent else ""
        row = f'<th scope="row">{html.escape(label(name))}{hint}</th>'
        for i, (text, best) in enumerate(cells[1:]):
            cell = f"{bar}<span>{html.escape(text)}</span>" if i == 0 else html.escape(text)
            row += f'<td class="{"best" if best else ""}">{cell}</td>'
        body.append(f'<tr class="{" ".join(classes)}">{row}</tr>')
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        f'<h3 class="split">{html.escape(split.capitalize())}{size}</h3>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>" + _p_values((results.get("p_values") or {}).get(split) or {})
    )


def _p_values(pairs: Mapping[str, Any]) -> str:
    if not pairs:
        return ""
    items = []
    for pair, p in pairs.items():
        names = " &gt; ".join(html.escape(label(name)) for name in pair.split(" > "))
        value = number(p)
        strength = "strong" if value is not None and value < 0.05 else "weak"
        items.append(f'<li class="{strength}"><span>{names}</span><b>{html.escape(p_text(p))}</b></li>')
    return (
        f'<ul class="tests">{"".join(items)}</ul>'
        '<p class="note">Paired randomisation test over the queries; p of 0.05 and more is set in grey.</p>'
    )


def _refresh(refresh: Mapping[str, Any]) -> str:
    policy = str(refresh["policy"]).replace("_", " ") if refresh.get("policy") else None
    return _figures(
        [
            ("Refresh policy", policy),
            ("Mean absolute reward error", _known(fixed(refresh.get("mean_abs_reward_error"), 4))),
            ("Re-encoded per step, mean", _known(percent(refresh.get("mean_share_reencoded")))),
            ("Re-encoded per step, most", _known(percent(refresh.get("max_share_reencoded")))),
            ("Probe steps", _known(fixed(refresh.get("probe_steps"), 0))),
        ]
    )


def _figures(entries: Sequence[tuple[str, str | None]]) -> str:
    shown = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in entries if value
    )
    return f'<dl class="figures">{shown}</dl>' if shown else ""


def _known(text: str) -> str | None:
    return None if text == MISSING else text
