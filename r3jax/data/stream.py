"""An endless, shuffled, sharded, resumable stream of training batches (grain), and width bucketing.

Axes: B global batch, N processes, L padded width.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

Batch = dict[str, np.ndarray]
Transform = Callable[[Any, np.random.Generator], Batch]
_ENDLESS = 1 << 53  # records; grain computes lengths as floats, and fails on batches of one where it is sys.maxsize
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # batches made ahead, beside the device's work


class Source(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def stream(
    source: Source,
    *,
    transform: Transform,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Iterates over batches without end; `get_state()` and `set_state(state)` resume it exactly.

    Every epoch is shuffled anew, and within it no record is lost or doubled. Epochs follow each other without
    a gap, so a batch may hold the end of one and the start of the next (and then, rarely, a record twice).
    Process i reads records i, i + N, … of the global order: global batch k is the same set of records, with
    the same random draws, for any N that divides B.

    Args:
      source: random access to records.
      transform: (record, generator) → arrays of fixed shapes; the generator is seeded by seed and position.
        With workers > 0 it must be picklable.
      batch_size: global batch B; each process gets B / N rows.
      seed: of the shuffle and of the generators, in [0, 2³²).
      process_index, process_count: this process's rank, and N.
      workers: extra processes that transform records (0: threads of this one), until the iterator is closed, which
        it must be. The state of an iterator fits only the number of workers that it was saved with.

    Raises:
      ValueError: empty source, B not divisible by N, or a rank outside [0, N).
    """
    if len(source) == 0:
        raise ValueError("source has no records.")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of process_count {process_count}.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is outside [0, {process_count}).")
    # Random draws come before the slice: their seeds then follow the global position, not the process's own.
    records = grain.MapDataset.source(source).seed(seed).shuffle().random_map(transform).repeat()
    batches = records[process_index:_ENDLESS:process_count].batch(batch_size // process_count)
    dataset = batches.to_iter_dataset(_READ)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's processes read absl's flags, of which we have none
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_obey)
    return iter(dataset)


def _obey(worker: int, count: int) -> None:
    """A worker ends with its process: not by a signal that goes to all of them, and not by outliving it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
