"""The comparison that a run ends with: every model under every condition, on every held-out split."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from r3jax.data.beir import Dataset
from r3jax.evaluation.bm25 import BM25
from r3jax.evaluation.significance import paired_randomisation
from r3jax.evaluation.trec import write_qrels, write_run
from r3jax.processes import leads
from r3jax.reader import OnRows, Reader
from r3jax.results import cautions
from r3jax.results.conditions import MODEL_CONDITIONS, Measured, bm25, evaluate
from r3jax.results.examples import examples, thoughts_of, write_thoughts
from r3jax.run.progress import progress
from r3jax.search.sharded import build as build_index

METRIC = "ndcg@10"  # of the p-values
EXAMPLES = 50
# left > right, paired by query; "best trained" is whichever trained condition has the highest nDCG@10.
_OF_STAGES = (
    ("rl_reasoning", "sft_reasoning"),
    ("rl_reasoning", "rl_empty"),
    ("rl_reasoning", "rl_shuffled"),
    ("rl_reasoning", "rl_copied"),
    ("rl_reasoning", "rl_direct"),
    ("rl_reasoning", "sft_direct"),
    ("rl_averaged", "rl_reasoning"),
    ("rl_averaged", "rl_empty"),
    ("rl_averaged", "rl_direct"),
    ("rl_averaged", "sft_direct"),
    ("sft_reasoning", "sft_direct"),
    ("best trained", "bm25"),
)
# The same of a model without stages.
QUESTIONS = _OF_STAGES + tuple(
    (left.removeprefix("rl_"), right.removeprefix("rl_"))
    for left, right in _OF_STAGES
    if left.startswith("rl_") and right.startswith("rl_")
)
_VECTORS = ("direct", "reasoning", "averaged")  # of a model as it is meant: no controls, no budgets


def compare(
    dataset: Dataset,
    splits: Sequence[str],
    models: Iterable[tuple[str, Any]],
    reader: Reader,
    encode_corpus: Callable[[Any, OnRows], np.ndarray],
    workdir: pathlib.Path,
    conditions: Sequence[str] = MODEL_CONDITIONS,
) -> dict[str, Any]:
    """The `splits`, `p_values` and `warnings` of results.json; writes TREC files, thoughts and examples.

    Of several processes all must ask, and process 0 writes.
    models: (name, params) in order; one named "untrained" is measured in direct mode only, one named "" gives
    conditions without a prefix. The last one's first queries become the page's examples.
    """
    searcher = BM25(dataset.doc_ids, dataset.doc_texts)
    found: dict[str, dict[str, Measured]] = {s: {"bm25": bm25(dataset, s, searcher)} for s in splits}
    cards: list[dict] = []
    for name, params in models:
        with progress("encoding documents", len(dataset.doc_texts)) as on_rows:
            index = build_index(encode_corpus(params, on_rows), len(dataset.doc_ids), 0, "exact")
        cards = []
        for split in splits:
            wanted = [c for c in conditions if c == "direct" or name != "untrained"]
            if reader.thoughts < 2:
                wanted = [c for c in wanted if c != "averaged"]
            measured = evaluate(reader, params, dataset, split, index, wanted)
            for condition, m in measured.items():
                label = name if name == "untrained" else f"{name}_{condition}" if name else condition
                found[split][label] = m
            if {"reasoning", "direct"} <= set(measured):
                reasoned, direct = measured["reasoning"], measured["direct"]
                count = EXAMPLES // len(splits)
                cards += examples(dataset, split, thoughts_of(reasoned), reasoned.run, direct.run, count)
    if leads():
        _write(workdir, dataset, found, cards)
    return {
        "splits": {s: {label: m.summary for label, m in c.items()} for s, c in found.items()},
        "p_values": {s: p_values(c) for s, c in found.items()},
        "best_trained": {s: best_trained(c) for s, c in found.items()},
        "warnings": {
            s: cautions.of_data(dataset, s) + cautions.of_runs({label: m.run for label, m in c.items()})
            for s, c in found.items()
        },
    }


def _write(workdir: pathlib.Path, dataset: Dataset, found: dict[str, dict[str, Measured]], cards: list[dict]) -> None:
    """TREC runs and judgements, thoughts, and the page's examples."""
    for split, by_label in found.items():
        judged = {query: dataset.qrels[split][query] for query in dataset.positives(split)}
        write_qrels(workdir / "trec" / f"{split}.qrels", judged)
        for label, m in by_label.items():
            write_run(workdir / "trec" / f"{split}.{label}.run", m.run, tag=f"r3jax-{label}")
            if m.thoughts is not None:
                write_thoughts(workdir / "thoughts" / f"{split}.{label}.jsonl", thoughts_of(m))
    (workdir / "examples.json").write_text(json.dumps(cards, indent=1, ensure_ascii=False))


def best_trained(found: Mapping[str, Measured]) -> str:
    """The trained condition, no control, with the highest nDCG@10 on this split; "" if there is none."""
    trained = [x for x in found if x.removeprefix("sft_").removeprefix("rl_") in _VECTORS]
    return max(trained, key=lambda label: found[label].summary[METRIC], default="")


def p_values(found: Mapping[str, Measured]) -> dict[str, float]:
    """One-sided paired randomisation tests of the QUESTIONS that these conditions can answer."""
    best = best_trained(found)
    answers = {}
    for left, right in QUESTIONS:
        a, b = (best if side == "best trained" else side for side in (left, right))
        if a in found and b in found and a != b:
            ours, theirs = found[a].per_query[METRIC], found[b].per_query[METRIC]
            pairs = np.array([(ours[query], theirs[query]) for query in ours])
            answers[f"{left} > {right}"] = paired_randomisation(*pairs.T)
    return answers


def refresh_figures(metrics: pathlib.Path, policy: str) -> dict[str, Any]:
    """How well the index followed, from metrics.jsonl: reward error on probe steps, share re-encoded."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    errors = [x["probe/reward_error"] for x in lines if x.get("probe/reward_error") is not None]
    shares = [x["index/share"] for x in lines if x.get("index/share") is not None]
    return {
        "policy": policy,
        "probe_steps": len(errors),
        "mean_abs_reward_error": float(np.mean(errors)) if errors else None,
        "max_abs_reward_error": float(np.max(errors)) if errors else None,
        "mean_share_reencoded": float(np.mean(shares)) if shares else None,
        "max_share_reencoded": float(np.max(shares)) if shares else None,
    }
