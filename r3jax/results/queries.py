"""Held-out queries for the report: what the model wrote, and the hits with and without it, side by side."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from r3jax.results.table import fixed, number

_LENGTH = 400  # characters of a document that are shown
_SAME = 5e-4  # a smaller difference of nDCG prints as 0.000

_CONTROLS = """<form class="controls" hidden>
<input name="find" type="search" placeholder="Find in queries, thoughts and documents" aria-label="Find">
<select name="kind" aria-label="Effect of the reasoning"><option value="">All effects</option>
<option value="up">Better with reasoning</option><option value="down">Worse with reasoning</option>
<option value="same">No difference</option></select>
<select name="split" aria-label="Split"><option value="">All splits</option>@@splits@@</select>
<select name="order" aria-label="Order"><option value="given">In given order</option>
<option value="gain">Largest gain first</option><option value="loss">Largest loss first</option>
<option value="hard">Hardest first</option></select>
<button name="unfold" type="button">Open or close all</button><output></output></form>"""


def cards(examples: Sequence[Mapping[str, Any]]) -> str:
    """One foldable card per query, with controls to sort and filter them; "" without examples."""
    examples = [example for example in examples if isinstance(example, Mapping)]
    if not examples:
        return ""
    kinds = [_kind(_delta(example)) for example in examples]
    splits = sorted({str(e["split"]) for e in examples if e.get("split") is not None})
    options = "".join(f"<option>{html.escape(split)}</option>" for split in splits)
    return (
        f'<p class="note">{len(examples)} held-out queries: {kinds.count("up")} better with reasoning than '
        f"without, {kinds.count('down')} worse, {kinds.count('same')} the same. The figure before a query is "
        "the change of its nDCG@10. Right answers are marked ✓.</p>"
        + _CONTROLS.replace("@@splits@@", options)
        + "<div>"
        + "".join(_card(example, unfolded=i == 0) for i, example in enumerate(examples))
        + "</div>"
    )


def _card(example: Mapping[str, Any], unfolded: bool) -> str:
    delta = _delta(example)
    kind = _kind(delta)
    split = html.escape(str(example.get("split", "")))
    hint = f' title="{html.escape(str(example["query_id"]))}"' if example.get("query_id") is not None else ""
    relevant = "".join(f"<li>{_document(d)}</li>" for d in example.get("relevant") or [])
    right = f'<h4>Right answers</h4><ul class="answers">{relevant}</ul>' if relevant else ""
    return (
        f'<details class="query" data-kind="{kind}" data-split="{split}" data-delta="{delta or 0:.4f}" '
        f'data-with="{number(example.get("ndcg_with")) or 0:.4f}"{" open" if unfolded else ""}>'
        f'<summary><span class="delta {kind}">{_signed(delta)}</span>'
        f'<span class="q" dir="auto"{hint}>{html.escape(str(example.get("query", "")))}</span>'
        f'<span class="tag">{split}</span></summary><div>'
        f"<h4>The model wrote</h4>{_thought(example)}{right}"
        f'<div class="sides">{_side("With reasoning", example, "with")}'
        f"{_side('Without', example, 'without')}</div></div></details>"
    )


def _thought(example: Mapping[str, Any]) -> str:
    thought = str(example.get("thought") or "")
    text = f'<p class="thought" dir="auto">{html.escape(thought)}</p>' if thought.strip() else ""
    if not text:
        text = '<p class="thought none">Nothing.</p>'
    if example.get("emitted") is False:
        text += '<p class="note">It did not end with the embed token, so there is no vector to search with.</p>'
    return text


def _side(title: str, example: Mapping[str, Any], key: str) -> str:
    hits = "".join(_hit(hit, place) for place, hit in enumerate(example.get(f"hits_{key}") or [], 1))
    body = f'<ol class="hits">{hits}</ol>' if hits else '<p class="note">No hits.</p>'
    return f"<div><h4><b>{title}</b>, nDCG@10 {fixed(example.get(f'ndcg_{key}'), 3)}</h4>{body}</div>"


def _hit(hit: Mapping[str, Any], place: int) -> str:
    right = bool(hit.get("relevant"))
    return (
        f'<li class="{"right" if right else ""}"><span>{"✓" if right else place}</span>{_document(hit)}'
        f'<span class="score">{fixed(hit.get("score"), 3)}</span></li>'
    )


def _document(document: Mapping[str, Any]) -> str:
    text = str(document.get("text") or "")
    text = text if len(text) <= _LENGTH else text[: _LENGTH - 1] + "…"
    title = html.escape(str(document.get("doc_id", "")))
    return f'<span class="doc" dir="auto" title="{title}">{html.escape(text)}</span>'


def _delta(example: Mapping[str, Any]) -> float | None:
    """nDCG with reasoning minus without, None if either is missing."""
    after, before = number(example.get("ndcg_with")), number(example.get("ndcg_without"))
    return None if after is None or before is None else after - before


def _kind(delta: float | None) -> str:
    if delta is None or abs(delta) < _SAME:
        return "same"
    return "up" if delta > 0 else "down"


def _signed(delta: float | None) -> str:
    if delta is None:
        return "–"
    if abs(delta) < _SAME:
        return "±0"
    return f"{delta:+.3f}".replace("-", "−")
