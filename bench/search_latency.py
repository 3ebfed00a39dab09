"""How long a query takes once all is loaded: python -m bench.search_latency RUN [DATA]

Queries of DATA (default: data/tldr-commands) are asked one at a time, as `r3jax search` does: read directly, and after
the model's thought; in the encoded corpus, searched exactly, and in an index of each kind. A query's time is from its
text to the texts of its ten hits. The corpus is encoded into .cache/search-latency, once.
"""

import pathlib
import sys

import numpy as np

from r3jax import encode, index
from r3jax.corpus.answers import Answer, Searcher
from r3jax.corpus.encoding import open_encoding
from r3jax.corpus.saved_index import open_index
from r3jax.data import beir
from r3jax.run import command
from r3jax.search.index import KINDS
from r3jax.search_r3 import SearchR3

CACHE = pathlib.Path(".cache/search-latency")
DIRECT, REASONED, HITS = 300, 100, 10


def main(run: str, data: str = "data/tldr-commands") -> None:
    command.prepare()
    folder = CACHE / pathlib.Path(run).resolve().name
    encode.main([run, data, str(folder / "vectors")])
    searched = {"encoded corpus, exact": open_encoding(folder / "vectors")}
    for kind in KINDS:
        if not (folder / kind).exists():
            index.main(["build", str(folder / "vectors"), str(folder / kind), f"--kind={kind}"])
        searched[f"index, {kind}"] = open_index(folder / kind)
    model = SearchR3.from_pretrained(run, batch_size=1)
    queries = beir.load(data).query_texts
    print("| searched | reasoning | ms, median | ms, 99th percentile | of it search | tokens | ms a token |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, found_in in searched.items():
        searcher = Searcher(model.params, model.reader, found_in)
        for reasoning, count in ((False, DIRECT), (True, REASONED)):
            searcher.warm(HITS, reasoning)
            chosen = np.random.default_rng(0).permutation(len(queries))[:count]
            print(row(name, [searcher.answer(queries[i], HITS, reasoning) for i in chosen]), flush=True)


def row(name: str, answers: list[Answer]) -> str:
    """One line of the table."""
    whole = np.array([a.read_ms + a.search_ms for a in answers])
    search = np.median([a.search_ms for a in answers])
    cells = [name, "no", f"{np.median(whole):.1f}", f"{np.percentile(whole, 99):.1f}", f"{search:.1f}", "", ""]
    if answers[0].thought is not None:
        each = np.median([a.ms_per_token for a in answers])
        cells[1], cells[5:] = "yes", [f"{np.mean([a.tokens for a in answers]):.1f}", f"{each:.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(*sys.argv[1:])
