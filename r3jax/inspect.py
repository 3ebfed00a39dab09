"""The reasoning inspector: one page with each query, what the model wrote, and the hits with and without it.

    r3jax inspect RUN [flags]

RUN is the folder of a training run, or one that r3jax evaluate wrote; nothing is computed anew. The page is one file,
loads nothing, and is sorted and filtered in the browser. For example:

    r3jax inspect runs/rl-tiny --out=page.html
    r3jax inspect runs/rl-tiny/evaluation/scifact-test --with=rl_reasoning --without=rl_empty
"""

import pathlib

from r3jax.data import beir
from r3jax.errors import UserError
from r3jax.results.inspector import open_evaluation, write_inspector
from r3jax.run import command
from r3jax.run.config import run_main

FLAGS = {
    "split": "or several with commas; default: all that were evaluated",
    "with": "condition whose thoughts are shown; default: the last one's, of the model's own length",
    "without": "condition beside it; default: the same model's direct",
    "hits": "shown of each; default: 5",
    "data": "where the data set lies now; default: where it was",
    "out": "the page; default: RUN/inspect.html",
}


def main(argv: list[str]) -> None:
    given = command.read(argv, "r3jax.inspect", __doc__, ("RUN",), FLAGS)
    folder = pathlib.Path(given.words[0])
    if not folder.is_dir():
        raise UserError(f"RUN: there is no folder {folder}; give a run or what r3jax evaluate wrote.")
    found = open_evaluation(folder)
    hits = given.whole("hits") or 5
    splits = list(dict.fromkeys((given.flags["split"] or ",".join(found.splits)).split(",")))
    for split in splits:
        if split not in found.splits:
            raise UserError(f"--split: {split!r} was not evaluated; choose some of {', '.join(found.splits)}.")
    own = [name for name in found.thoughtful if name.endswith("reasoning")] or found.thoughtful
    left = given.choice("with", found.thoughtful, own[-1])
    models = [name.removesuffix("direct") for name in found.conditions if name.endswith("direct")]
    model = next((name for name in models if name and left.startswith(name)), "")
    right = given.choice("without", found.conditions, f"{model}direct")
    source = given.flags["data"] or found.source
    if not pathlib.Path(source).is_dir():
        raise UserError(f"--data: {source}, where the data set was, is no folder; name the one where it lies now.")
    dataset = beir.load(source)
    out = pathlib.Path(given.flags["out"] or folder / "inspect.html")
    count = write_inspector(found, dataset, splits, left, right, hits, out)
    print(f"{out}: {count:,} queries, {left} beside {right}")


if __name__ == "__main__":
    run_main(main)
