"""Records on disk and the stream over them: order, sharding, resume, bucketing."""

import collections
import dataclasses
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest

from r3jax.data import beir, store, stream
from r3jax.errors import UserError

DATA = beir.Dataset(
    name="toy",
    doc_ids=["d0", "d1", "d2"],
    doc_texts=["a", "b", "c"],
    query_ids=["q0", "q1", "q2", "q3"],
    query_texts=["naïve", "one", "two", "three"],
    qrels={"train": {"q3": {"d1": 1, "d2": 3}, "q0": {"d0": 1}, "q1": {"d1": 0}}, "test": {"q2": {"d2": 1}}},
    thoughts={},
    skipped=[],
    fingerprint="f" * 64,
)


def take(source, **options):
    return stream.stream(source, transform=number, **{"batch_size": 4, "seed": 7, **options})


def number(record, rng):
    return {"id": np.int64(record), "draw": rng.random()}


def ids(iterator, batches):
    return [next(iterator)["id"].tolist() for _ in range(batches)]


# --- store


def test_records_of_a_split(tmp_path):
    source = store.training_source(DATA, "train", tmp_path, {"q3": "thïnk", "q2": "elsewhere"})
    assert [source[i] for i in range(len(source))] == [
        {"query_row": 0, "query": "naïve", "positives": [0], "thought": ""},
        {"query_row": 3, "query": "three", "positives": [2, 1], "thought": "thïnk"},
    ]
    assert pickle.loads(pickle.dumps(source))[1]["query"] == "three"


def test_content_is_written_once_and_only_once(tmp_path, monkeypatch):
    written = []
    write = store._write
    monkeypatch.setattr(store, "_write", lambda records, final: (written.append(final.name), write(records, final)))
    other = dataclasses.replace(DATA, fingerprint="e" * 64)
    for data, split, thoughts in (
        (DATA, "train", {}),
        (DATA, "train", {"q2": "of another split"}),  # same records
        (DATA, "train", {"q0": "x"}),
        (DATA, "test", {}),
        (other, "train", {}),
        (DATA, "train", {}),
    ):
        store.training_source(data, split, tmp_path, thoughts)
    assert len(written) == len(set(written)) == 4
    assert sorted(written) == sorted(folder.name for folder in tmp_path.iterdir())  # nothing else is left lying


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(self):
        yield 0, {"query_row": 0, "query": "q", "positives": [0], "thought": ""}
        raise KeyboardInterrupt

    monkeypatch.setattr(store.TrainingPairs, "_generate_examples", fail)
    with pytest.raises(KeyboardInterrupt):
        store.training_source(DATA, "train", tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def _build_and_hang(cache):
    """In a process of its own: stops in the middle of writing, so that it can be killed there."""

    def hang(self):
        yield 0, {"query_row": 0, "query": "half", "positives": [0], "thought": ""}
        (cache / "hanging").touch()
        time.sleep(60)

    store.TrainingPairs._generate_examples = hang
    store.training_source(DATA, "train", cache, {})


def test_a_killed_build_is_not_trusted(tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=_build_and_hang, args=(tmp_path,))
    child.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert list(tmp_path.glob("*.part-*"))  # it was in the middle of it
    assert [r["query"] for r in iter_records(store.training_source(DATA, "train", tmp_path, {}))] == [
        "naïve",
        "three",
    ]


def iter_records(source):
    return [source[i] for i in range(len(source))]


def test_a_cache_that_cannot_be_written_is_the_users_matter(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data cache .*file"):
        store.training_source(DATA, "train", tmp_path / "file", {})


# --- stream


def test_every_record_once_per_epoch_in_a_new_order():
    flat = [i for batch in ids(take(range(10)), 15) for i in batch]  # 10 is no multiple of 4: epochs run on
    epochs = [flat[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert ids(take(range(10)), 15) == ids(take(range(10)), 15) != ids(take(range(10), seed=8), 15)


@pytest.mark.parametrize("count", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(count):
    alone = take(range(10), batch_size=8)
    ranks = [take(range(10), batch_size=8, process_index=i, process_count=count) for i in range(count)]
    for _ in range(6):
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert all(len(part["id"]) == 8 // count for part in parts)
        together = sorted((i, d) for part in parts for i, d in zip(part["id"], part["draw"], strict=True))
        assert together == sorted(zip(whole["id"], whole["draw"], strict=True))  # records and random draws


def test_draws_differ_between_records_and_epochs():
    batches = [next(take_) for take_ in [take(range(8))] for _ in range(8)]
    draws = collections.defaultdict(set)
    for batch in batches:
        for record, draw in zip(batch["id"], batch["draw"], strict=True):
            draws[int(record)].add(float(draw))
    assert all(len(seen) == 4 for seen in draws.values())
    assert len(set().union(*draws.values())) == 32


@pytest.mark.parametrize("done", [0, 1, 3, 7])  # 7: in the third epoch
def test_resume_is_exact(done):
    whole, first = take(range(10)), take(range(10))
    expected = [next(whole) for _ in range(done + 6)][done:]
    for _ in range(done):
        next(first)
    state = pickle.loads(pickle.dumps(first.get_state()))
    next(first)  # what was read after the state was taken does not matter
    again = take(range(10))
    again.set_state(state)
    for batch in expected:
        resumed = next(again)
        assert all((resumed[key] == batch[key]).all() for key in batch)


def test_workers_give_the_same_batches_and_resume():
    plain = [next(it) for it in [take(range(10))] for _ in range(5)]
    worked = take(range(10), workers=2)
    for batch in plain[:2]:
        assert all((value == batch[key]).all() for key, value in next(worked).items())
    state = worked.get_state()
    worked.close()
    again = take(range(10), workers=2)
    again.set_state(state)
    for batch in plain[2:]:
        assert all((value == batch[key]).all() for key, value in next(again).items())
    again.close()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"batch_size": 3, "process_count": 2}, "batch_size 3"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
    ],
)
def test_wrong_arguments_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        take(range(4), **options)
    with pytest.raises(ValueError, match="no records"):
        take([])


# --- bucket
