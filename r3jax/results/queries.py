"""Held-out queries, for report and inspector: what the model wrote, and the hits with and without it, side by side."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from r3jax.results.table import fixed, number

_LENGTH = 400  # characters of a document that are shown
_RIGHT = 10  # right answers that are shown
_SAME = 5e-4  # a smaller difference of nDCG prints as 0.000

_CONTROLS = """<form class="controls" hidden>
<input name="find" type="search" placeholder="Find in queries, thoughts and documents" aria-label="Find">
<select name="kind" aria-label="Effect"><option value="">All effects</option>
<option value="up">Better</option><option value="down">Worse</option>
<option value="same">No difference</option><option value="cut">Thought cut off</option></select>
<select name="split" aria-label="Split"><option value="">All splits</option>@@splits@@</select>
<select name="order" aria-label="Order"><option value="given">In given order</option>
<option value="gain">Largest gain first</option><option value="loss">Largest loss first</option>
<option value="hard">Hardest first</option><option value="long">Longest thought first</option></select>
<button name="unfold" type="button">Open or close all</button><output aria-live="polite"></output>
<p class="note keys"><kbd>/</kbd> find, <kbd>j</kbd> <kbd>k</kbd> next and previous, <kbd>Enter</kbd> open</p></form>"""


def cards(
    examples: Sequence[Mapping[str, Any]], sides: tuple[str, str] = ("With reasoning", "Without"), note: str = ""
) -> str:
    """One foldable card per query, with controls to sort and filter them; "" without examples.

    sides: what the hits on the left and on the right are of. note: HTML, put before the cards in place of the counts.
    """
    examples = [example for example in examples if isinstance(example, Mapping)]
    if not examples:
        return ""
    kinds = [_kind(_delta(example)) for example in examples]
    splits = sorted({str(e["split"]) for e in examples if e.get("split") is not None})
    options = "".join(f"<option>{html.escape(split)}</option>" for split in splits)
    counts = (
        f"{len(examples)} held-out queries: {kinds.count('up')} better with reasoning than without, "
        f"{kinds.count('down')} worse, {kinds.count('same')} the same. "
    )
    return (
        f'<p class="note">{note or counts}The figure before a query is the change of its nDCG@10. Right answers are '
        "marked ✓, documents judged to be wrong ✗; what stands beside a score is the document’s place on the other "
        "side.</p>"
        + _CONTROLS.replace("@@splits@@", options)
        + "<div>"
        + "".join(_card(example, sides, unfolded=i == 0) for i, example in enumerate(examples))
        + "</div>"
    )


def _card(example: Mapping[str, Any], sides: tuple[str, str], unfolded: bool) -> str:
    delta = _delta(example)
    kind = _kind(delta)
    split = html.escape(str(example.get("split", "")))
    hint = f' title="{html.escape(str(example["query_id"]))}"' if example.get("query_id") is not None else ""
    answers = example.get("relevant") or []
    relevant = "".join(f"<li>{_document(d)}{_places(d)}</li>" for d in answers[:_RIGHT])
    if len(answers) > _RIGHT:
        relevant += f'<li class="score">and {len(answers) - _RIGHT:,} more</li>'
    right = f'<h4>Right answers</h4><ul class="answers">{relevant}</ul>' if relevant else ""
    return (
        f'<details class="query" data-kind="{kind}" data-split="{split}" data-delta="{delta or 0:.4f}" '
        f'data-with="{number(example.get("ndcg_with")) or 0:.4f}"{" data-cut" * (example.get("emitted") is False)}'
        f"{' open' if unfolded else ''}>"
        f'<summary><span class="delta {kind}">{_signed(delta)}</span>'
        f'<span class="q" dir="auto"{hint}>{html.escape(str(example.get("query", "")))}</span>'
        f'<span class="tag">{split}</span></summary><div>'
        f"<h4>The model wrote</h4>{_thought(example)}{right}"
        f'<div class="sides">{_side(sides[0], example, "with")}{_side(sides[1], example, "without")}</div>'
        "</div></details>"
    )


def _thought(example: Mapping[str, Any]) -> str:
    thought = str(example.get("thought") or "")
    text = f'<p class="thought" dir="auto">{html.escape(thought)}</p>' if thought.strip() else ""
    if not text:
        text = '<p class="thought none">Nothing.</p>'
    if example.get("emitted") is False:
        text += '<p class="note">It did not end in time, so the direct answer was put after it.</p>'
    return text


def _side(title: str, example: Mapping[str, Any], key: str) -> str:
    hits = "".join(_hit(hit, place, key) for place, hit in enumerate(example.get(f"hits_{key}") or [], 1))
    body = f'<ol class="hits">{hits}</ol>' if hits else '<p class="note">No hits.</p>'
    return f"<div><h4><b>{html.escape(title)}</b>, nDCG@10 {fixed(example.get(f'ndcg_{key}'), 3)}</h4>{body}</div>"


def _hit(hit: Mapping[str, Any], place: int, key: str) -> str:
    grade, other = number(hit.get("grade")), ""
    kind, mark = ("", str(place)) if grade is None else ("right", "✓") if grade > 0 else ("wrong", "✗")
    if "other_place" in hit:
        elsewhere = number(hit["other_place"])
        if elsewhere is None:
            other = "new" if key == "with" else "lost"
        elif elsewhere != place:
            other = f"{'was' if key == 'with' else 'now'} {elsewhere:.0f}"
    return (
        f'<li class="{kind}"><span>{mark}</span>{_document(hit)}'
        f'<span class="score"><i>{other}</i> {fixed(hit.get("score"), 3)}</span></li>'
    )


def _places(document: Mapping[str, Any]) -> str:
    """Where a right answer stands on both sides, if that is known."""
    if "place_with" not in document:
        return ""
    found = (number(document[key]) for key in ("place_with", "place_without"))
    here, there = ("not found" if place is None else f"{place:.0f}" for place in found)
    return f' <span class="score">place: {here}, on the other side: {there}</span>'


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
