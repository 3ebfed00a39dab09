"""What a thought is worth to a trained run: python -m bench.thoughts RUN [SPLIT]

nDCG@10 of the run's last stage when the vector is read after other thoughts than its own: none, its greedy one, the
query's concepts alone, and the thought that the supervised builder would write with the right document in hand (an
upper bound that nobody can reach: it has seen the answer).
"""

import pathlib
import sys

import jax
import numpy as np

from r3jax import assembly, weights
from r3jax.data.thoughts import Thinker
from r3jax.evaluation import metrics
from r3jax.evaluation.significance import paired_randomisation
from r3jax.model.sharding import make_mesh
from r3jax.results.conditions import queries_of
from r3jax.run import config as run_config
from r3jax.search.index import VersionedIndex


def main(folder: str, split: str = "seen") -> None:
    run = pathlib.Path(folder)
    config = run_config.load_saved(run / "config.json")
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        parts = assembly.parts(config, run, mesh)
        params = weights.load_params(run, parts.model, mesh, weights.trained_stage(run))
        index = VersionedIndex.build(parts.encode_corpus(params), 0, "exact")
        data, reader, encode = parts.dataset, parts.reader, parts.chat.tokenizer.encode
        ids, texts = queries_of(data, split)
        relevant = [data.positives(split)[i][0] for i in ids]
        d = config.data
        right = parts.thinker
        if right is None:
            sys.exit("error: this run's thoughts came with its data set; there is no builder to ask.")
        concepts = Thinker(data, query_terms=d.thought_query_terms, document_terms=0)
        written = {
            "none": [""] * len(ids),
            "concepts of the query": [concepts(text, "") for text in texts],
            "with the right document's terms": [
                right(t, data.doc_texts[r]) for t, r in zip(texts, relevant, strict=True)
            ],
        }
        limit = d.max_thought_tokens
        vectors = {
            name: reader.with_thoughts(params, texts, [encode(t)[:limit] for t in thoughts])
            for name, thoughts in written.items()
        }
        vectors["its own"] = reader.reason(params, texts).vectors
        judged = {i: data.qrels[split][i] for i in ids}
        found: dict[str, np.ndarray] = {}
        for name, queries in vectors.items():
            scores = metrics.per_query(metrics.as_run(ids, data.doc_ids, *index.search(queries, 10)), judged)["ndcg@10"]
            found[name] = np.array([scores[i] for i in ids])
    print(f"| thought | nDCG@10, {split} | p(> none) |\n|---|---|---|")
    for name, values in found.items():
        p = f"{paired_randomisation(values, found['none']):.4f}" if name != "none" else ""
        print(f"| {name} | {values.mean():.3f} | {p} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
