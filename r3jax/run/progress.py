"""Progress on stderr, of what takes longer than two seconds: a bar on a terminal, elsewhere a line a minute."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SILENT_SECONDS = 2.0
PLAIN_SECONDS = 60.0


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what takes long where nothing can be counted: a spinner on a terminal, elsewhere a line."""
    console = Console(stderr=True)
    spinner = console.status(what)

    def tell() -> None:
        if console.is_terminal:
            spinner.start()
        else:
            print(f"{what} …", file=sys.stderr, flush=True)

    timer = threading.Timer(SILENT_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        spinner.stop()


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with each number of things just done, of `total`, of which `done` were before."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task(what, total=total, completed=done)
    begin = last = time.monotonic()
    count = done

    def advance(number: int) -> None:
        nonlocal last, count
        count += number
        now = time.monotonic()
        if console.is_terminal:
            bar.advance(task, number)
            if not bar.live.is_started and now - begin > SILENT_SECONDS:
                bar.start()
        elif now - last >= PLAIN_SECONDS:
            last = now
            print(f"{what}: {count:,} of {total:,}, {now - begin:.0f} s", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
