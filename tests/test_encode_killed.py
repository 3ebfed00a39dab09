"""`r3jax encode` on a corpus of 60,000 documents: killed and resumed, and what memory it takes."""

import random
import time

import pytest

from tests import fixtures
from tests.serving_process import tiny_run, wait_for
from tests.test_encoding import contents

pytestmark = pytest.mark.slow
SMALL, LARGE, KILLS = 6_000, 60_000, 5
MEASURED = """
import pathlib, re, sys
from r3jax import encode
encode.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def test_killed_five_times_it_ends_with_the_same_bytes_and_memory_does_not_grow(tmp_path):
    run = tiny_run(tmp_path)
    words = fixtures.VERBS + fixtures.NOUNS + fixtures.PLACES
    rng = random.Random(0)
    peaks = {}
    for count in (SMALL, LARGE):
        corpus = tmp_path / f"{count}.txt"
        corpus.write_text("".join(" ".join(rng.choices(words, k=rng.randint(1, 200))) + "\n" for _ in range(count)))
        process = fixtures.run_python("-c", MEASURED, str(run), str(corpus), str(tmp_path / f"whole{count}"))
        said, complaint = process.communicate()
        assert process.returncode == 0, complaint
        peaks[count] = int(said.split()[-1]) / 1024
    size = corpus.stat().st_size / 2**20
    print(f"peaks: {peaks[SMALL]:.0f} MiB of {SMALL:,} documents, {peaks[LARGE]:.0f} of {LARGE:,} ({size:.0f} MiB)")

    out = tmp_path / "killed"
    for kill in range(KILLS):
        process = fixtures.run_python("-m", "r3jax.encode", str(run), str(corpus), str(out))
        before = len(list(out.glob("progress/0*")))
        shards = before + rng.randint(0, 1) + (kill > 0)  # the first may be killed before any is there
        wait_for(lambda shards=shards: len(list(out.glob("progress/*"))) > shards, seconds=600)
        time.sleep(rng.uniform(0, 0.2))
        assert process.poll() is None
        process.kill()
        process.communicate()
    process = fixtures.run_python("-m", "r3jax.encode", str(run), str(corpus), str(out))
    _, complaint = process.communicate()
    assert process.returncode == 0, complaint
    assert contents(out) == contents(tmp_path / f"whole{LARGE}")
    assert peaks[LARGE] - peaks[SMALL] < 16  # MiB; the texts have 30 more
