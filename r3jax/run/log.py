"""What a run leaves to read: metrics.jsonl, samples.jsonl, ledger.jsonl, TensorBoard scalars, and the terminal.

The .jsonl files are part of the state: a checkpoint keeps their lengths (`RunLog.offset`), and a resumed
run cuts them back, so that an interrupted run ends with the same lines, apart from times, as one that was
not. On a terminal the progress is a live bar; elsewhere (CI, nohup) it is a plain line now and then.
"""

import collections
import json
import logging
import math
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from r3jax import processes

METRICS, SAMPLES, LEDGER, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "ledger.jsonl", "tensorboard"
PLAIN_WIDTH = 120  # columns where the output is not a terminal
PLAIN_SHARE, PLAIN_SECONDS = 0.1, 60.0  # a plain line for each tenth of the steps, and each minute
ETA_WINDOW = 20  # the last steps' mean time gives the ETA, so that the first compilation does not spoil it


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A full disk ends TensorBoard's thread with a trace; the run, which meets it too, says so in its own words."""
    if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__module__.startswith("tensorboardX")):
        threading.__excepthook__(failure)


def quiet_libraries() -> None:
    """Leaves the terminal to this module: of other libraries' messages only errors are shown.

    For entry points, once all is imported.
    """
    logging.getLogger("bm25s").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax, grain, tfds: what they log as an error they raise
    logging.getLogger("asyncio").addFilter(_not_of_orbax)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Of writes that fail together orbax raises the first; the others are nobody's."""
    said = record.getMessage()
    return not (said.startswith("Task exception was never retrieved") and "/orbax/" in said)


class RunLog:
    """The log of one run. Only process 0 writes and prints; on others every method does nothing.

    Args:
      workdir: the folder of the run; made if missing.
      resume_offset: `offset` as the restored checkpoint kept it; None starts the files anew.
      quiet: if True, nothing is printed; the files are written all the same.
    """

    def __init__(
        self, workdir: pathlib.Path | str, resume_offset: Mapping[str, int] | None = None, quiet: bool = False
    ):
        self.workdir = pathlib.Path(workdir)
        self._writes = processes.leads()
        self.console = Console(quiet=quiet or not self._writes, highlight=False)
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH
        self._files: dict[str, Any] = {}
        self._boards: dict[str, Any] = {}
        if self._writes:
            self.workdir.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, SAMPLES, LEDGER):
                self._files[name] = self._open(name, (resume_offset or {}).get(name, 0))

    @property
    def offset(self) -> dict[str, int]:
        """Bytes written so far, by file name; flushed, to be kept in a checkpoint's meta."""
        for file in self._files.values():
            file.flush()
        return {name: file.tell() for name, file in self._files.items()}

    def write(self, stage: str, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl and one point to each TensorBoard curve "<name>" of the stage.

        Args:
          stage: "sft", "rl", …: TensorBoard shows each as a run of its own, for their steps overlap.
          step: optimiser steps done in this stage.
          scalars: numbers or arrays of one element, by name; what is not finite becomes null in the line
            and a gap in the curve.
        """
        if not self._writes:
            return
        values = {name: _number(value) for name, value in jax.device_get(dict(scalars)).items()}
        line = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        self._append(METRICS, {k: None if _odd(v) else v for k, v in line.items()})
        if stage not in self._boards:
            from tensorboardX import SummaryWriter  # imports torch where there is one, which takes seconds

            threading.excepthook = _thread_failed
            # purge_step hides the points of an earlier attempt, from here on; the suffix keeps its file,
            # which would have the same name if it was opened in the same second
            self._boards[stage] = SummaryWriter(
                str(self.workdir / TENSORBOARD / stage),
                purge_step=step,
                filename_suffix=f".{time.time_ns()}",
            )
        # Its thread ends on a full disk, and its queue would then wait for ever.
        alive = self._boards[stage].file_writer.event_writer._worker.is_alive()
        for name, value in values.items():
            if alive and not _odd(value):
                self._boards[stage].add_scalar(name, value, step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prints sampled completions as a table and appends them to samples.jsonl.

        Args:
          step: the step they were sampled at.
          rows: one mapping for each completion, all with the same keys, which head the columns: numbers are
            set right with three digits, texts are folded.
        """
        if not self._writes or not rows:
            return
        table = Table(title=f"samples at step {step}", title_justify="left")
        for key in rows[0]:
            is_text = isinstance(rows[0][key], str)
            table.add_column(key, justify="left" if is_text else "right", overflow="fold")
        for row in rows:
            plain = {k: v if isinstance(v, str | bool | None) else _number(v) for k, v in row.items()}
            self._append(SAMPLES, {"step": step} | {k: None if _odd(v) else v for k, v in plain.items()})
            table.add_row(*(Text(_short(v) if isinstance(v, float) else str(v)) for v in plain.values()))
        self.console.print(table)

    def consumed(self, stage: str, step: int, rows: Sequence[int], skipped: bool) -> None:
        """Appends to ledger.jsonl which training records (their query's rows, in order) went into a step.

        So it can be proved that none was lost or doubled, by resumption for one. skipped: the step's update was none.
        """
        if self._writes:
            line = {"stage": stage, "step": step, "rows": list(rows)}
            self._append(LEDGER, line | ({"skipped": True} if skipped else {}))

    def say(self, text: str) -> None:
        """Prints one announcement."""
        self.console.print(Text(text), soft_wrap=True)

    def progress(self, stage: str, total: int, start: int = 0) -> "StageProgress":
        """The progress of a stage of `total` steps, of which `start` were done before this process."""
        return StageProgress(self.console, stage, total, start)

    def close(self) -> None:
        """Writes out and closes all files."""
        for file in (*self._files.values(), *self._boards.values()):
            file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, name: str, offset: int) -> Any:
        path = self.workdir / name
        path.touch()
        size = path.stat().st_size
        if size < offset:
            self.say(f"warning: {path} has {size} bytes where the checkpoint knew {offset}; lines are missing")
        file = path.open("r+", encoding="utf-8", newline="\n")
        file.truncate(min(size, offset))
        file.seek(0, 2)
        return file

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._files[name].flush()


class StageProgress:
    """One stage's bar or plain lines; a context manager."""

    def __init__(self, console: Console, stage: str, total: int, start: int):
        self._console, self._stage, self._total = console, stage, total
        self._step, self._last_line, self._last_time = start, start, time.monotonic()
        self._times = collections.deque([(start, self._last_time)], maxlen=ETA_WINDOW + 1)
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(30),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self._task = self._bar.add_task(stage, total=total, completed=start, text="")
            self._bar.start()

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, and the few numbers that matter, on the host, by name."""
        now = time.monotonic()
        self._step = step
        self._times.append((step, now))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text(numbers))
            return
        due = step - self._last_line >= max(1, PLAIN_SHARE * self._total) or now - self._last_time >= PLAIN_SECONDS
        if due or step >= self._total:
            self._last_line, self._last_time = step, now
            self._console.print(Text(f"{self._stage} {self._text(numbers)}"), soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text(self, numbers: Mapping[str, float]) -> str:
        """ "120/300, 0.84 s a step, 2:31 left, loss 1.23"."""
        (first, then), (last, now) = self._times[0], self._times[-1]
        seconds = (now - then) / max(1, last - first)
        left = round(seconds * max(0, self._total - self._step))
        clock = (
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"
        )
        words = [f"{self._step}/{self._total}", f"{seconds:.2f} s a step", f"{clock} left"]
        return ", ".join(words + [f"{name} {_short(float(value))}" for name, value in numbers.items()])


def _number(value: Any) -> int | float:
    """A Python number of a number or an array of one element."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _short(value: float) -> str:
    """Three digits after the point, or a short exponent where that would show nothing."""
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
