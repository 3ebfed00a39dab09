"""One process of several that share an index and a checkpoint: python -m tests.two_hosts FOLDER

FOLDER/one was saved by one process; FOLDER/two is saved here. tests/test_processes.py holds both against each other.
"""

import pathlib
import random
import sys

import jax
import numpy as np

from r3jax import processes
from r3jax.model.sharding import batch_share, everywhere, make_mesh, own_rows, put_batch, to_host
from r3jax.run.checkpoint import Checkpointer
from r3jax.search import sharded
from r3jax.search.index import VersionedIndex
from tests.damage import damage, files

SIZE, WIDTH = 301, 8  # no multiple of any number of processes


def vectors() -> np.ndarray:
    found = np.random.default_rng(0).normal(size=(SIZE, WIDTH)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def changed(index):
    """The index with some documents encoded anew at step 5, on both sides of every border."""
    rows = np.arange(0, SIZE, 3)
    index.upsert(rows, vectors()[::-1][rows], 5)
    return index


def fall_back(folder: pathlib.Path, index) -> None:
    """Whatever befalls a file of the newer of two checkpoints, both processes take the same one, and it is whole."""
    job, state = processes.here(), {"index": index.state(), "step": np.zeros(1, int)}
    store = Checkpointer(folder, 2)
    for step in (1, 2):
        state["index"]["versions"][:] = state["step"][:] = step
        store.save(step, state, meta={"data": step})
    store.close()
    fallen = 0
    for file in (folder / "2" / file for file in files(folder / "2")):
        for how in ("truncate", "flip"):
            kept = file.read_bytes()
            job.wait("read")
            if processes.leads():
                damage(file, how, random.Random(0))
            job.wait("damaged")
            found, meta = Checkpointer(folder, 2, read_only=True).restore(None, state)
            step = meta["data"]
            assert (processes.gather(found["step"]) == step).all(), f"{how} {file}"
            again = sharded.restore(found["index"])
            assert (again.search(vectors()[:9], 3)[0] == index.search(vectors()[:9], 3)[0]).all(), f"{how} {file}"
            assert (again.versions == step).all(), f"{how} {file}"
            fallen += step == 1
            job.wait("restored")
            if processes.leads():
                file.write_bytes(kept)
    assert fallen > 5, fallen


def main(folder: pathlib.Path) -> None:
    processes.connect()
    job, mesh = processes.here(), make_mesh()

    # What goes between hosts
    x = np.array([2**40 + job.index, -1])
    assert (processes.gather(x) == [[2**40 + i, -1] for i in range(job.count)]).all()
    order = processes.in_turn(lambda first: first)
    assert order == (job.index == 0)

    # What goes to the devices and back
    with jax.set_mesh(mesh):
        batch = np.arange(8 * mesh.size).reshape(-1, 4)
        assert batch_share(mesh) == (job.index, job.count)
        mine = own_rows(mesh, batch)
        assert len(mine) == len(batch) // job.count
        assert (to_host(put_batch(mesh, mine)) == batch).all()
        assert (np.asarray(everywhere(mesh, batch)) == batch).all()
    with jax.set_mesh(wide := make_mesh(data=1, fsdp=1, tensor=-1)):  # the processes hold the same rows
        assert batch_share(wide) == (0, 1)
        assert (to_host(put_batch(wide, own_rows(wide, batch))) == batch).all()

    # An index, and checkpoints of it
    whole = changed(VersionedIndex.build(vectors(), 0))
    index = changed(sharded.build(vectors()[job.share(SIZE)], SIZE, 0))
    assert isinstance(index, sharded.ShardedIndex)

    def same(index):
        for found, want in zip(index.search(vectors()[:20], 9), whole.search(vectors()[:20], 9), strict=True):
            np.testing.assert_allclose(found, want, rtol=0, atol=2e-7)
        assert (index.versions == whole.versions).all()

    same(index)
    one = Checkpointer(folder / "one", 1)
    state, _ = one.restore(None, {"index": index.state()})
    same(sharded.restore(state["index"]))
    one.close()
    two = Checkpointer(folder / "two", 1)
    two.save(1, {"index": index.state()}, meta={"data": {"next": 3}})
    two.wait()
    state, meta = two.restore(None, {"index": index.state()})
    same(sharded.restore(state["index"]))
    assert meta["data"] == {"next": 3}
    two.close()
    fall_back(folder / "damaged", index)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
