"""An endless, shuffled, sharded, resumable stream of training batches (grain), and width bucketing.

Axes: B global batch, N processes, L padded width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

Batch = dict[str, np.ndarray]
Transform = Callable[[Any, np.random.Generator], Batch]
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
      workers: extra processes that transform records (0: threads of this one). The state of an iterator fits
        only the number of workers that it was saved with.

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
    batches = records[process_index::process_count].batch(batch_size // process_count)
    dataset = batches.to_iter_dataset(_READ)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's processes read absl's flags, of which we have none
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def bucket(
    batch: Mapping[str, np.ndarray],
    key_lengths: Mapping[str, str],
    buckets: Sequence[int],
    agree: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Batch:
    """Trims right-padded arrays to the smallest bucket that holds their longest row: jit sees few shapes.

    Args:
      batch: arrays by name.
      key_lengths: name of an array [B, L, …] → name of its lengths [B]; arrays that must keep the same width
        share a lengths array. Arrays not named stay as they are.
      buckets: ascending widths; a longer row than the last is an error.
      agree: with several processes, a function from the longest lengths of this process (one per entry of
        key_lengths, in its order) to the longest over all of them, or their shapes would differ.

    Returns:
      A new dict; the trimmed arrays are views.
    """
    if not buckets or list(buckets) != sorted(set(buckets)):
        raise ValueError(f"buckets must be ascending widths, not {list(buckets)}.")
    longest = np.array([batch[lengths].max(initial=0) for lengths in key_lengths.values()], np.int64)
    if agree is not None:
        longest = np.asarray(agree(longest))
    trimmed = dict(batch)
    for (key, lengths), length in zip(key_lengths.items(), longest, strict=True):
        if length > min(buckets[-1], batch[key].shape[1]):
            raise ValueError(f"{lengths} reaches {length}, beyond the width of {key} or the last of buckets.")
        width = buckets[int(np.searchsorted(buckets, length))]
        trimmed[key] = batch[key][:, :width]
    return trimmed
