"""r3jax: train, use and examine models that think before they search.

r3jax VERB [words and flags]       the same as python -m r3jax.VERB
r3jax VERB --help                  what it does, with an example
"""

import difflib
import importlib
from typing import NoReturn

from r3jax.errors import UserError
from r3jax.run.config import run_main

VERBS = {
    "train": "trains a model: supervision, then reinforcement learning",
    "plan": "memory, time and communication of a run on chips that are not here",
    "convert": "published checkpoints in and out",
    "encode": "a corpus to vectors on disk; goes on where it was stopped",
    "index": "builds an index over encoded documents, adds to it, deletes from it",
    "search": "answers queries from an index, with the model's thought beside the hits",
    "serve": "the model over HTTP: OpenAI's embeddings, search, and a page to try it",
    "evaluate": "scores a model on data sets, with controls and BM25 beside it",
    "inspect": "one page: what the model wrote for each query, and the hits with and without it",
    "compare": "two runs query by query: wins, losses, paired significance",
    "study": "re-runs a study of refresh policies, rewards, advantages or the contrastive weight",
    "mine": "hard negatives for training queries",
    "doctor": "checks a model's folder for the silent mistakes of embedders",
}
PACKAGES = ("search",)  # verbs whose name is a folder of the library


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("--help", "-h"):
        width = max(map(len, VERBS))
        print(__doc__.strip(), "", *(f"  {name:<{width}}  {text}" for name, text in VERBS.items()), sep="\n")
        return
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"there is no verb {verb!r}{hint}; choose one of {', '.join(VERBS)}.")
    module = f"r3jax.{verb}.__main__" if verb in PACKAGES else f"r3jax.{verb}"
    importlib.import_module(module).main(rest)


def entry() -> NoReturn:
    """The console script `r3jax`."""
    run_main(main)


if __name__ == "__main__":
    entry()
