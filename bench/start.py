"""How long the default run takes from the command to its first step, cold and warm: python -m bench.start

Starts the training of configs/rl.py twice, each in a new folder for the run and the second with the first's compilation
cache, and stops it after the first step of stage 2 (stage 1 has but two); counts what was compiled and what the cache
gave.
"""

import collections
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from bench import peaks
from bench.turns import ENVIRONMENT, table


class Enough(Exception):
    """All that is timed was seen."""


def one(begin: str, folder: str) -> None:
    """The worker: trains, and says when each stage's first step was done and what was compiled."""
    import jax

    from r3jax import assembly, train

    events: collections.Counter[str] = collections.Counter()
    first: dict[str, float] = {}

    def seen(event: str, **_) -> None:
        events[event.rsplit("/", 1)[-1]] += 1

    jax.monitoring.register_event_listener(seen)

    def watched(name, parts, start):
        stage = assembly.make_stage(name, parts, start)
        update = stage.update

        def timed(state, batch):
            done = update(state, batch)
            if name not in first:
                jax.block_until_ready(done)
                first[name] = time.time() - float(begin)
            if name == "rl":
                raise Enough
            return done

        stage.update = timed
        return stage

    flags = [f"--workdir={folder}/run-{begin}", f"--config.xla_cache={folder}/xla", "--config.sft.steps=2"]
    with contextlib.suppress(Enough):
        train.main(["--config=configs/rl.py", *flags], watched)
    asked, hits = events["compile_requests_use_cache"], events["cache_hits"]
    found = {"first": first, "compiled": asked - hits, "hits": hits}
    (pathlib.Path(folder) / "found.json").write_text(json.dumps(found))


def main() -> None:
    print(peaks.sentence(peaks.measure()), "\n")
    rows = []
    with tempfile.TemporaryDirectory(prefix="r3jax-bench-start-") as folder:
        for label in ("first start", "second start"):
            begin = str(time.time())
            subprocess.run(
                [sys.executable, "-m", "bench.start", begin, folder],
                env=ENVIRONMENT,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            x = json.loads((pathlib.Path(folder) / "found.json").read_text())
            seconds = [f"{x['first'][stage]:.1f}" for stage in ("sft", "rl")]
            rows.append([label, *seconds, str(x["compiled"]), str(x["hits"])])
    head = ["the default run", "first step after, s", "first of stage 2 after, s", "compiled", "from the cache"]
    print(table(head, rows))


if __name__ == "__main__":
    one(*sys.argv[1:]) if len(sys.argv) > 1 else main()
