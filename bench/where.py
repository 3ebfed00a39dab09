"""Where a step of stage 1 spends its time: python -m bench.where [SIZE ...]

The step of `bench.sft`, traced by JAX's profiler, on CPU. Each compiled operation's time is booked under the part of
the source that it was compiled from, and under the pass: forward, recomputed (what is not kept for the backward pass),
backward. A fused operation is booked under the part of its last one.
"""

import collections
import pathlib
import re
import tempfile

import jax

from bench import models, peaks, sft
from bench.turns import command, table

LINE = re.compile(r'^ *(?:ROOT )?%?([\w.-]+) = .*?[\])}] ([\w-]+)\(.*?metadata=\{[^}]*op_name="([^"]*)"')
AROUND = {"while", "call", "conditional"}  # their time is that of what lies within
PARTS = (
    ("MLP", "/mlp/"),
    ("projections of attention", r"/attn/[qkvo]/"),
    ("scores, soft-max, values", "/attn"),
    ("norms", "_norm"),
    ("embedding, layer loop", "Decoder"),
    ("optimiser", r"update\)/(cond|square|sqrt)"),
    ("logits and losses", ""),
)
PASSES = (("recomputed", "rematted_computation"), ("backward", r"transpose\("), ("forward", ""))


def operations(text: str) -> dict[str, str]:
    """Name of each compiled operation -> where it comes from, of those that work themselves."""
    found = (LINE.match(line) for line in text.splitlines())
    return {m[1]: m[3] for m in found if m and m[2] not in AROUND}


def first(table: tuple, path: str) -> str:
    return next(name for name, pattern in table if re.search(pattern, path))


def seconds_by_part(folder: pathlib.Path, sources: dict[str, str]) -> tuple[collections.Counter, float]:
    """((part, pass) -> seconds, seconds of operations that were not found) of a trace."""
    [file] = folder.rglob("*.xplane.pb")
    booked: collections.Counter = collections.Counter()
    lost = 0.0
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in sources:
                    path = sources[event.name]
                    booked[first(PARTS, path), first(PASSES, path)] += event.duration_ns / 1e9
                elif event.name.startswith(("copy", "dot", "fusion", "ynn")):
                    lost += event.duration_ns / 1e9
    return booked, lost


def main(sizes: list[str], rounds: int) -> None:
    print(peaks.sentence(peaks.measure()), "\n")
    for size in sizes:
        with models.folder(size) as folder, tempfile.TemporaryDirectory() as traces:
            step = sft.Step(folder, sft.PAIRS[size])
            batch = step.batches[0]
            step(batch)
            [program] = step.programs.values()
            with jax.profiler.trace(traces):
                for _ in range(rounds):
                    step(batch)
            booked, lost = seconds_by_part(pathlib.Path(traces), operations(program.as_text()))
        total = sum(booked.values()) + lost
        passes = [name for name, _ in PASSES[::-1]]
        rows = []
        for part, _ in PARTS:
            each = [booked[part, name] / total for name in passes]
            rows.append([part, f"{sum(each):.1%}", *(f"{share:.1%}" if share else "" for share in each)])
        rows.append(["not attributed", f"{lost / total:.1%}", "", "", ""])
        print(f"{size}: {total / rounds:.3f} s of operations a step\n")
        print(table(["", "share", *passes], rows), "\n", flush=True)


if __name__ == "__main__":
    command({}, main, ["tiny", "25m"])
