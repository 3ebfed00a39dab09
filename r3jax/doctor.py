"""Checks a model for the silent mistakes of embedders' set-ups.

    r3jax doctor MODEL [--json]

MODEL is the folder of a run or an exported model, or a hub id. Each line passes or fails, with the figure and the fix;
the exit code is 1 if one fails. For example:

    r3jax doctor published/rl-tiny
"""

import dataclasses
import json
import sys

from r3jax import weights
from r3jax.health.folder import folder_lines
from r3jax.health.reading import read_lines
from r3jax.model.hub import local_folder
from r3jax.run import command
from r3jax.run.config import run_main
from r3jax.search_r3 import SearchR3

SWITCHES = {"json": "one JSON object for each line"}


def main(argv: list[str]) -> None:
    given = command.read(argv, "r3jax.doctor", __doc__, ("MODEL",), switches=SWITCHES)
    command.prepare()
    folder = local_folder(given.words[0], "MODEL")
    model = SearchR3.from_pretrained(folder)
    failed = False
    checks = [read_lines(model.params, model.reader, model.max_document, model.thinks)]
    if not weights.is_run(str(folder)):
        checks.insert(0, folder_lines(folder, model.reader, model.max_document))
    for lines in checks:
        for line in lines:
            failed |= line.passed is False
            print(json.dumps(dataclasses.asdict(line)) if given.switches["json"] else line, flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
