"""Builds an index over encoded documents, adds to it, deletes from it.

    r3jax index build ENCODED OUT [--kind=scann|exact]
    r3jax index add INDEX ENCODED
    r3jax index delete INDEX ID...

ENCODED is a folder that r3jax encode made. ScaNN searches up to 40,000 documents by brute force (exact), above by a
tree, which is faster and misses a few per cent of the neighbours. `add` takes documents encoded by the same model in
the same way; one whose id is there already replaces the old one. For example:

    r3jax encode runs/rl-tiny data/tldr-commands vectors
    r3jax index build vectors index
    r3jax search index "list files by size"
    r3jax index delete index t0 t1
"""

import pathlib

from r3jax.corpus import saved_index
from r3jax.corpus.encoding import open_encoding
from r3jax.errors import UserError
from r3jax.run import command
from r3jax.run.config import run_main
from r3jax.search.index import KINDS

FLAGS = {"kind": "scann or exact; default: scann"}
COMMANDS = {"build": ("ENCODED", "OUT"), "add": ("INDEX", "ENCODED"), "delete": ("INDEX", "ID...")}


def main(argv: list[str]) -> None:
    chosen = argv[0] if argv else ""
    if chosen not in (*COMMANDS, "--help", "-h"):
        raise UserError(f"{chosen!r} is none of {', '.join(COMMANDS)}; see python -m r3jax.index --help.")
    rest = argv[1:] if chosen in COMMANDS else argv
    flags = FLAGS if chosen != "add" and chosen != "delete" else {}
    given = command.read(rest, "r3jax.index", __doc__, COMMANDS.get(chosen, ()), flags)
    command.prepare()
    first, *others = given.words
    if chosen == "build":
        kind = given.choice("kind", KINDS, "scann")
        saved_index.build_index(open_encoding(first), pathlib.Path(others[0]), kind)
        print(f"{others[0]}: {kind} index of {first}")
    elif chosen == "add":
        came, replaced = saved_index.add(pathlib.Path(first), open_encoding(others[0]))
        print(f"{first}: {came:,} documents added, {replaced:,} replaced")
    else:
        left = saved_index.delete(pathlib.Path(first), others)
        print(f"{first}: {len(set(others)):,} documents deleted, {left:,} left")


if __name__ == "__main__":
    run_main(main)
