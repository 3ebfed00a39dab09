"""The reasoning inspector: every query of an evaluation on one static page, what the model wrote, and the hits of two
conditions side by side.

Read from what an evaluation leaves: ``trec/``, ``thoughts/``, and evaluation.json or, of a training run, results.json.
"""

import dataclasses
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from r3jax.data.beir import Dataset
from r3jax.errors import UserError, writing
from r3jax.evaluation.head_to_head import HeadToHead, head_to_head
from r3jax.evaluation.trec import read_qrels, read_run
from r3jax.results import queries
from r3jax.results.examples import Thoughts, examples, read_thoughts
from r3jax.results.page import head, write_page
from r3jax.results.report import label
from r3jax.results.table import fixed, p_text

METRIC = "ndcg@10"
_WIDTH, _HEIGHT = 640, 96  # of the profile, in its own units


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What lies in a folder that an evaluation has written."""

    folder: pathlib.Path
    name: str
    source: str  # folder of the data set
    splits: list[str]
    thoughtful: list[str]  # conditions that have thoughts in every split
    conditions: list[str]  # all that have runs


def open_evaluation(folder: pathlib.Path) -> Evaluation:
    """UserError where there is none, or one without thoughts."""
    results = _read(folder / "evaluation.json") or _read(folder / "results.json")
    splits = list(results.get("splits") or {})
    conditions = list(results["splits"][splits[0]]) if splits else []
    known = [c for c in conditions if all((folder / "thoughts" / f"{s}.{c}.jsonl").is_file() for s in splits)]
    if not known:
        others = sorted(str(path.parent) for path in folder.glob("evaluation/*/thoughts"))
        raise UserError(
            f"RUN: {folder} holds no thoughts of an evaluation; "
            + (f"give {' or '.join(others)}." if others else f"write them with r3jax evaluate {folder}.")
        )
    source = results.get("source") or (_read(folder / "config.json").get("data") or {}).get("path") or ""
    return Evaluation(folder, str(results.get("name") or folder.name), str(source), splits, known, conditions)


def write_inspector(
    found: Evaluation, dataset: Dataset, splits: Sequence[str], left: str, right: str, hits: int, out: pathlib.Path
) -> int:
    """Writes the page about two conditions, `left` with thoughts, and returns how many queries it shows.

    UserError if the data set is not the one that was evaluated, a file is damaged, or the page cannot be written.
    """
    cards: list[dict[str, Any]] = []
    tiles, profiles, counts = [], [], [0, 0, 0]
    for split in splits:
        try:
            judged = read_qrels(found.folder / "trec" / f"{split}.qrels")
            ours, theirs = (read_run(found.folder / "trec" / f"{split}.{name}.run") for name in (left, right))
            thoughts = _thoughts(found.folder / "thoughts" / f"{split}.{left}.jsonl")
        except OSError as e:
            raise UserError(f"{e.filename} cannot be read ({e.strerror}); evaluate again.") from None
        lost = {doc for run in (ours, theirs, judged) for found_docs in run.values() for doc in found_docs}
        lost -= dataset.doc_row.keys()
        known = dataset.qrels.get(split, {})
        if lost or {query: known.get(query) for query in judged} != judged or thoughts.keys() - judged.keys():
            what = f"has no {min(lost)!r}" if lost else f"has other judgements in {split}"
            raise UserError(f"--data: {dataset.name} {what}; name the folder that was evaluated.")
        match = head_to_head(ours, theirs, judged, METRIC)
        figures = match.as_dict()
        cards += examples(dataset, split, thoughts, ours, theirs, hits=hits)
        below = f"{figures['a'] - figures['b']:+.3f} against {fixed(figures['b'], 3)}; {p_text(figures['p'])}"
        tiles.append((f"nDCG@10, {split} queries", fixed(figures["a"], 3), below))
        profiles.append(_profile(split, match))
        counts = [n + figures[kind] for n, kind in zip(counts, ("wins", "losses", "ties"), strict=True)]
    cards.sort(key=lambda card: -abs(card["ndcg_with"] - card["ndcg_without"]))  # stable: then as they were given
    cut = sum(not card["emitted"] for card in cards)
    words = [len(card["thought"].split()) for card in cards]
    tiles.append(("Better, worse", f"{counts[0]:,} / {counts[1]:,}", f"{counts[2]:,} without a difference"))
    tiles.append(("Words of a thought", fixed(sum(words) / len(words), 1), f"{cut:,} were cut off"))
    note = f"<b>{html.escape(label(left))}</b> beside <b>{html.escape(label(right))}</b>. "
    facts = [dataset.name, f"{len(cards):,} queries", f"{label(left)} beside {label(right)}"]
    header = head("Reasoning inspector", found.name, facts, tiles)
    sides = ("With reasoning", "Without") if right.endswith("direct") else (label(left), label(right))
    sections = [
        ("change", "Change by query", f'<div class="grid profiles">{"".join(profiles)}</div>'),
        ("queries", "Queries", queries.cards(cards, sides, note)),
    ]
    with writing("--out", out, "file"):
        write_page(out, f"{found.name}: reasoning", header, sections)
    return len(cards)


def _profile(split: str, match: HeadToHead) -> str:
    """The queries' differences as an area, largest gain first."""
    values = sorted(match.differences.values(), reverse=True)
    largest = max(map(abs, values)) or 1.0
    middle, step = _HEIGHT / 2, _WIDTH / len(values)
    areas = ""
    for kind, sign in (("up", 1), ("down", -1)):
        rows = [(i, value) for i, value in enumerate(values) if value * sign > 0]
        if rows:
            tops = "".join(
                f"L{i * step:.1f} {middle - middle * value / largest:.1f}H{(i + 1) * step:.1f}" for i, value in rows
            )
            areas += f'<path class="{kind}" d="M{rows[0][0] * step:.1f} {middle}{tops}V{middle}Z"/>'
    gains, losses = (sum(value * sign > 0 for value in values) for sign in (1, -1))
    text = f"{split}: {gains:,} of {len(values):,} queries gain, {losses:,} lose; the tallest is {largest:.3f}"
    return (
        f'<figure class="profile"><figcaption>{html.escape(text)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{html.escape(text)}">'
        f'<path class="edge" d="M0 {middle}H{_WIDTH}"/>{areas}</svg></figure>'
    )


def _thoughts(path: pathlib.Path) -> Thoughts:
    try:
        return read_thoughts(path)
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path} is malformed ({e}); evaluate again.") from None


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError(f"{path} is no valid JSON ({e}); evaluate again.") from None
    return content if isinstance(content, dict) else {}
