"""Programs measured in turns: each waits in its own process, ready and warm, and runs one round when it is its turn.

So all of them see the same machine, and none the others' memory or threads. A worker is `python -m MODULE worker NAME
JSON`; it calls `serve` with a function that makes its `measure`. One that cannot be measured (a library is missing)
becomes a line that says why, and the others go on.
"""

import contextlib
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench import models

READY = "ready"
# Huge pages as the Makefile asks for them, for everyone.
ENVIRONMENT = (
    {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    | os.environ
    | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
)


class Worker:
    """One program in its own process."""

    def __init__(self, module: str, name: str, options: Mapping, platforms: str = "cpu"):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "worker", name, json.dumps(options)],
            env=ENVIRONMENT | {"JAX_PLATFORMS": platforms},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.failure = self._answer().get("failure")

    def round(self) -> dict:
        """One measurement; {"failure": words} where it went wrong."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its answer is that
            print("go", file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failure": f"its process ended with {self.process.wait()}"}

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def serve(make: Callable[[], Callable[[], dict]]) -> None:
    """The worker's side: `make` prepares, loads and warms up, and returns what measures one round."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere

    def answer(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        measure = make()
        answer({READY: True})
        for _ in sys.stdin:
            answer(measure() | {"peak": memory("VmHWM")})
    except Exception as e:
        traceback.print_exc()
        answer({"failure": f"{type(e).__name__}: {e}".splitlines()[0][:200]})


def command(
    makers: Mapping[str, Callable],
    main: Callable[[list[str], int], None],
    sizes: list[str],
    known: Iterable[str] = models.SIZES,
) -> None:
    """The command line of a benchmark: [SIZE ...] [--rounds=N] for `main`, or a worker's.

    sizes: where none is named; known: those that may be.
    """
    words = sys.argv[1:]
    if words[:1] == ["worker"]:
        serve(functools.partial(makers[words[1]], **json.loads(words[2])))
        return
    rounds, named = 3, []
    for word in words:
        if word in known:
            named.append(word)
        elif found := re.fullmatch(r"--rounds=([1-9]\d*)", word):
            rounds = int(found[1])
        else:
            print(
                f"error: {word!r} is neither a size ({', '.join(known)}) nor --rounds=N, N at least 1.", file=sys.stderr
            )
            sys.exit(2)
    main(named or sizes, rounds)


def in_turns(
    module: str, names: Sequence[str], options: Mapping, rounds: int, together: bool = True, platforms: str = "cpu"
) -> dict[str, dict]:
    """The median of each figure of each program over the rounds, or {"failure": words}.

    together: all processes wait side by side; False starts and ends each at every turn, for models of which the machine
    holds only one. platforms: where JAX computes.
    """
    found: dict[str, list[dict]] = {name: [] for name in names}
    workers: dict[str, Worker] = {}
    for _ in range(rounds):
        for name in names:
            if any("failure" in x for x in found[name]):
                continue
            worker = workers.get(name) or Worker(module, name, options, platforms)
            found[name].append({"failure": worker.failure} if worker.failure else worker.round())
            if together:
                workers[name] = worker
            else:
                worker.close()
    for worker in workers.values():
        worker.close()
    return {name: summary(rows) for name, rows in found.items()}


def summary(rows: list[dict]) -> dict:
    """Medians of the rows' figures, and `spread`, the range of their `seconds` over its median.

    Of what is counted (`tokens` or `documents`) `rate` is so many a second, of each round by itself.
    """
    for row in rows:
        if "failure" in row:
            return row
    what = next((key for key in ("tokens", "documents") if key in rows[0]), None)
    if what:
        rows = [row | {"rate": row[what] / row["seconds"]} for row in rows]
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    seconds = [row["seconds"] for row in rows]
    return middle | {"spread": (max(seconds) - min(seconds)) / middle["seconds"]}


def times(found: Mapping[str, dict], name: str) -> str:
    """How many times as quick as `name` ours is, by rate, or by rounds; "" where there is no answer."""
    us, them = found["ours"], found[name]
    if name == "ours" or "failure" in us or "failure" in them:
        return ""
    if "rate" in us:
        return f"{us['rate'] / them['rate']:.2f}"
    return f"{them['seconds'] / us['seconds']:.2f}"


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, whose first column is words and the others figures."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
