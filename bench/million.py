"""A million documents, end to end by the program itself: python -m bench.million [--documents=N] [--processes=P]

The bundled commands, each with a number of its own so often that there are N, in a model of random weights and the
default run's size: `launch/local.sh P encode`, `r3jax index build`, then 256 queries in the index and, exactly, in the
mapped vectors. Printed: time, rate, what lies on disk, and each command's largest process.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from bench import models
from r3jax.corpus.encoding import open_encoding
from r3jax.corpus.saved_index import open_index
from r3jax.data import beir
from r3jax.run import command
from r3jax.search_r3 import SearchR3

ROOT = pathlib.Path(__file__).parent.parent
QUERIES, K, TOKENS = 256, 10, 24  # tokens of a document that are read, the default run's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="r3jax-bench-million-") as name:
        print("| step | s | a second | on disk, MB | largest process, GB |\n|---|---:|---:|---:|---:|", flush=True)
        work(pathlib.Path(name), asked.documents, asked.processes)


def work(folder: pathlib.Path, count: int, processes: int) -> None:
    data, model, vectors, index = (folder / name for name in ("corpus.jsonl", "model", "vectors", "index"))
    dataset = beir.load(models.DATA)
    corpus(data, dataset.doc_texts, count)
    model.mkdir()
    models.write(model, "tiny")
    words = [model, data, vectors, "--dtype=float16", f"--max-length={TOKENS}", "--batch-size=256"]
    encode = [str(ROOT / "launch/local.sh"), str(processes), "encode", *map(str, words)]
    report(f"encode, {processes} processes", count, *timed(encode), vectors)
    build = [sys.executable, "-m", "r3jax", "index", "build", str(vectors), str(index)]
    report("index build", count, *timed(build), index)

    command.prepare()
    reader = SearchR3.from_pretrained(str(model))
    queries = np.asarray(reader.encode_query(dataset.query_texts[:QUERIES], reasoning=False))
    exact, began = open_encoding(vectors), time.perf_counter()
    want = exact.search(queries, K)[0]
    report("256 queries, exactly, vectors mapped", QUERIES, time.perf_counter() - began, own_peak())
    began = time.perf_counter()
    tree = open_index(index)
    report("index opened", 1, time.perf_counter() - began, own_peak())
    tree.search(queries, K)
    began = time.perf_counter()
    found = tree.search(queries, K)[0]
    report("256 queries, tree", QUERIES, time.perf_counter() - began, own_peak())
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), want.tolist(), strict=True)])
    print(f"\nrecall@{K} of the tree: {recall:.3f}")


def corpus(file: pathlib.Path, texts: list[str], count: int) -> None:
    with file.open("w") as out:
        for i in range(count):
            again, row = divmod(i, len(texts))
            out.write(json.dumps({"_id": f"d{i}", "title": "", "text": f"{again} {texts[row]}"}) + "\n")


def timed(words: list[str]) -> tuple[float, float]:
    """Seconds of a command, and GB of the largest of its processes; it must succeed."""
    began, peak, done = time.perf_counter(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            peak = max([peak, *map(resident, family(process.pid))])

    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        sys.exit(code)
    return time.perf_counter() - began, peak


def family(pid: int) -> list[int]:
    """A process and its children."""
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *map(int, children)]


def resident(pid: int) -> float:
    """The most that a process has had in memory, GB."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e9 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def own_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(step: str, count: int, seconds: float, peak: float, folder: pathlib.Path | None = None) -> None:
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6 if folder else 0
    print(f"| {step} | {seconds:.2f} | {count / seconds:,.0f} | {held:,.0f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
