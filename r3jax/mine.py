"""Mines hard negatives for the training queries of a data set, with a model and BM25.

    r3jax mine MODEL DATA OUT [flags]

DATA is a folder in BEIR form. OUT is a .jsonl file in FlagEmbedding's form, {"query", "pos", "neg", "pos_scores",
"neg_scores"} and the ids, one query a line; `r3jax convert data OUT DST` makes a BEIR folder of it. A candidate that
the model scores above margin times the best positive, or above an absolute cosine, is taken for relevant and dropped.
For example:

    r3jax mine runs/rl-tiny data/tldr-commands negatives.jsonl --negatives=8 --margin=0.95
"""

import json
import pathlib
import sys

from r3jax.corpus.encoding import refuse_lost
from r3jax.corpus.mining import mine, sentence, summary, to_line
from r3jax.data import beir
from r3jax.errors import UserError, writing
from r3jax.evaluation.bm25 import BM25
from r3jax.model.hub import local_folder
from r3jax.run import command
from r3jax.run.config import run_main
from r3jax.run.progress import progress
from r3jax.search.index import VersionedIndex
from r3jax.search_r3 import SearchR3

SOURCES = ("model", "bm25")
FLAGS = {
    "split": "whose queries; default: train",
    "negatives": "of a query, at most; default: 8",
    "depth": "candidates of each source; default: 100",
    "margin": "share of the best positive's cosine that a negative may reach; default: 0.95",
    "above": "cosine that no negative may exceed; default: no such bound",
    "on-error": "strict or skip: leave bad lines of DATA out and say how many; default: strict",
    "sources": "model, bm25 or both with a comma; default: model,bm25",
}
SWITCHES = {
    "reasoning": "whether the model thinks about a query before it searches; default: no",
    "json": "the counts as one JSON object",
}


def main(argv: list[str]) -> None:
    given = command.read(argv, "r3jax.mine", __doc__, ("MODEL", "DATA", "OUT"), FLAGS, SWITCHES)
    source, data, out = given.words
    split, count, depth = given.flags["split"] or "train", given.whole("negatives") or 8, given.whole("depth") or 100
    margin, above = given.number("margin"), given.number("above")
    margin = 0.95 if margin is None else margin
    if not 0 < margin <= 1:
        raise UserError(f"--margin must be above 0 and at most 1, not {margin:g}.")
    sources = (given.flags["sources"] or ",".join(SOURCES)).split(",")
    if not set(sources) <= set(SOURCES) or len(set(sources)) < len(sources):
        raise UserError(f"--sources must name model, bm25 or both, not {','.join(sources)!r}.")
    on_error = given.choice("on-error", ("strict", "skip"), "strict")
    command.prepare()
    if pathlib.Path(out).exists():
        raise UserError(f"OUT names {out}, where something is already; name another file or remove that one.")
    part = pathlib.Path(f"{out}.part")
    with writing("OUT", out, "file"):
        part.touch()
    try:
        dataset = beir.load(data, on_error=on_error)
        if dataset.skipped:
            said = f"lines left out: {len(dataset.skipped):,}; the first: {dataset.skipped[0]}"
            print(f"warning: {said}", file=sys.stderr)
        asked = [dataset.query_texts[dataset.query_row[query]] for query in dataset.positives(split)]
        model = SearchR3.from_pretrained(local_folder(source, "MODEL"))
        queries, documents = _vectors(model, dataset, asked, bool(given.switches["reasoning"]))
        refuse_lost(documents)
        depth = min(depth, len(documents))
        candidates = {}
        for name in sources:
            if name == "bm25":
                candidates[name] = BM25(dataset.doc_ids, dataset.doc_texts).search(asked, depth)[0]
            else:
                candidates[name] = VersionedIndex.build(documents, 0, "exact").search(queries, depth)[0]
        mined = mine(dataset, split, queries, documents, candidates, count=count, margin=margin, above=above)
        with writing("OUT", out, "file"):
            part.write_text("".join(to_line(dataset, m) for m in mined if m.negatives), encoding="utf-8")
            part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    counts = summary(mined)
    print(json.dumps({"out": out} | counts) if given.switches["json"] else f"{out}: {sentence(counts)}")


def _vectors(model: SearchR3, dataset: beir.Dataset, asked: list[str], reasoning: bool):
    """Unit vectors of the queries and of all documents."""
    reader, params = model.reader, model.params
    if reasoning and not model.thinks:
        raise UserError("MODEL has no lm_head.weight, which thoughts need; leave out --reasoning.")
    with progress("encoding documents", len(dataset.doc_texts)) as advance:
        documents = reader.encode(params, reader.chat.documents(dataset.doc_texts, model.max_document), advance)
    with progress("thinking" if reasoning else "encoding queries", len(asked)) as advance:
        if reasoning:
            prompts = reader.chat.reasoning_prompts(asked, reader.max_query)
            return reader.think(params, prompts, on_rows=advance).vectors, documents
        return reader.encode(params, reader.chat.direct_queries(asked, reader.max_query), advance), documents


if __name__ == "__main__":
    run_main(main)
