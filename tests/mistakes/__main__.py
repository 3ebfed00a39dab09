"""What can be done wrong with r3jax, and the sentence that each gets: docs/mistakes.md.

    python -m tests.mistakes > docs/mistakes.md

tests/test_mistakes.py makes every one of them, and fails where the page says something else.
"""

import pathlib
import tempfile
from collections.abc import Callable

import tests.conftest  # noqa: F401  the devices, before jax is imported
from tests.mistakes import configs, files, models, requests, verbs
from tests.mistakes.world import Mistake, World

PARTS: dict[str, tuple[str, list[Mistake]]] = {
    "Configs": (
        "After the flags of a good `r3jax train`, `evaluate` or `study`, on eight devices; said before anything is "
        "compiled.",
        configs.MISTAKES,
    ),
    "Data sets": ("The first lines, or all, of a file of what `r3jax train` is given.", files.DATA),
    "Other files": ("Documents to encode, training data of other tools, TREC runs, judgements.", files.OTHERS),
    "Models": (
        "Runs, checkpoints, tokenizers, exports, encoded corpora, indices: `bad` is a copy that was damaged.",
        models.MISTAKES,
    ),
    "Verbs": ("Their words and flags.", verbs.MISTAKES),
    "Requests": (
        "To `r3jax serve` with limits of 20,000 bytes, 40 texts, 1,000 tokens and 7 hits; the sentence is "
        "`error.message`.",
        requests.MISTAKES,
    ),
}
MISTAKES = [mistake for _, mistakes in PARTS.values() for mistake in mistakes]
HEAD = ["| what was done | the sentence | code |", "|---|---|---|"]


def row(mistake: Mistake, status: int, sentence: str) -> str:
    """A line of the table."""
    shown = sentence.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
    return f"| {mistake.done} | {shown} | {status} |"


def around(rows: Callable[[list[Mistake]], list[str]] = lambda _: []) -> list[str]:
    """The page's lines, with what `rows` makes of each part's mistakes."""
    lines = [
        "# Mistakes, and what is said",
        "",
        f"{len(MISTAKES)} of them, each made by `tests/test_mistakes.py`: one sentence on the standard error and",
        "exit code 2, or the status of an answer; never a trace, and nothing is left behind. This page is written by",
        "`python -m tests.mistakes > docs/mistakes.md`.",
    ]
    for title, (about, mistakes) in PARTS.items():
        lines += ["", f"## {title}", "", about, "", *rows(mistakes)]
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        world = World(pathlib.Path(folder))
        print(*around(lambda rows: [*HEAD, *(row(mistake, *world.answer(mistake)) for mistake in rows)]), sep="\n")
