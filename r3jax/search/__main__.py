"""Answers queries from an index or an encoded corpus, with the model's thought beside the hits.

    r3jax search INDEX|ENCODED [QUERY] [flags]

Without QUERY each line of the standard input is one, typed or piped. An encoded corpus is searched exactly, without an
index. For example:

    r3jax search index "list files by size"
    r3jax search index "list files by size" --no-reasoning --k=3 --json
    r3jax search index --json < queries.txt > answers.jsonl
"""

import contextlib
import sys
from collections.abc import Iterator

from r3jax.corpus.answers import Searcher
from r3jax.corpus.encoding import open_encoding
from r3jax.corpus.identity import fingerprint
from r3jax.corpus.manifest import refuse_to_mix
from r3jax.corpus.saved_index import is_index, open_index
from r3jax.errors import UserError
from r3jax.model.hub import local_folder
from r3jax.run import command
from r3jax.run.config import run_main
from r3jax.search_r3 import SearchR3

FLAGS = {
    "k": "hits of a query; default: 10",
    "model": "where the model that encoded the documents lies now; default: where it was",
}
NOT_UTF8 = "{} is not UTF-8 text; write or convert it as UTF-8."
SWITCHES = {"reasoning": "whether the model thinks first; default: yes", "json": "one JSON object for each query"}


def main(argv: list[str]) -> None:
    words = ("INDEX|ENCODED", "QUERY")
    given = command.read(argv, "r3jax.search", __doc__, words, FLAGS, SWITCHES, optional=1)
    folder, *asked = given.words
    k, reasoning = given.whole("k") or 10, given.switches["reasoning"] is not False
    if asked:
        checked(asked[0], "QUERY")
        if not asked[0].strip():
            raise UserError("QUERY is empty; write what you search for.")
    command.prepare()
    found_in = open_index(folder) if is_index(folder) else open_encoding(folder, "INDEX")
    source = given.flags["model"] or found_in.manifest["source"]
    model = SearchR3.from_pretrained(local_folder(source, "--model"), batch_size=1)
    now = {"model": fingerprint(model.params, model.reader)}
    refuse_to_mix(f"INDEX: {folder}", found_in.manifest, now, f"{source} has changed; name its --model or encode anew")
    if reasoning and not model.thinks:
        raise UserError(f"{source} has no lm_head.weight, which thoughts need; add --no-reasoning.")
    searcher = Searcher(model.params, model.reader, found_in)
    searcher.warm(k, reasoning)
    for query in asked or lines():
        answer = searcher.answer(query, k, reasoning)
        print(answer.as_json() if given.switches["json"] else answer.as_text(), flush=True)


def lines() -> Iterator[str]:
    """Queries from the standard input, until it ends."""
    person = sys.stdin.isatty() and sys.stdout.isatty()
    with contextlib.suppress(EOFError):
        while True:
            try:
                line = input("query> " if person else "")
            except UnicodeDecodeError:
                raise UserError(NOT_UTF8.format("the standard input")) from None
            if line.strip():
                yield checked(line.strip(), "the standard input")


def checked(query: str, where: str) -> str:
    """The query, if it is text: Python reads bytes that are not UTF-8 as halves of surrogate pairs."""
    try:
        query.encode()
    except UnicodeEncodeError:
        raise UserError(NOT_UTF8.format(where)) from None
    return query


if __name__ == "__main__":
    run_main(main)
