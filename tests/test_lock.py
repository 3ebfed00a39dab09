"""Of two jobs that write to one folder the second is refused, and changes nothing."""

import errno
import fcntl

import pytest

from r3jax import encode, train
from r3jax.errors import UserError
from r3jax.run import lock
from tests import fixtures


def held(folder):
    """As another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / lock.FILE).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_a_second_training_in_a_folder_is_refused_and_one_later_is_not(tmp_path):
    fixtures.write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    words = [*fixtures.flags(tmp_path), f"--workdir={run}"]
    with held(run):
        with pytest.raises(UserError, match=f"^--workdir: {run} is being changed by another process; wait for its end"):
            train.main(words)
        assert [path.name for path in run.iterdir()] == [lock.FILE]
    with lock.alone(run, "--workdir"), pytest.raises(UserError), lock.alone(run, "--workdir"):
        pass
    with lock.alone(run, "--workdir"):
        pass


def test_a_second_encoding_into_a_folder_is_refused(tmp_path):
    folder, _ = fixtures.finished_run()
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    corpus.write_text('"show a file"\n')
    words = [str(folder / "run"), str(corpus), str(out)]
    with held(out):
        with pytest.raises(UserError, match=f"^OUT: {out} is being changed by another process"):
            encode.main(words)
        assert [path.name for path in out.iterdir()] == [lock.FILE]
    encode.main(words)
    assert (out / "vectors.npy").is_file()


def test_without_locks_a_warning_and_without_room_one_sentence(tmp_path, monkeypatch, capsys):
    def broken(number):
        def flock(*_):
            raise OSError(number, "broken")

        return flock

    monkeypatch.setattr(fcntl, "flock", broken(errno.ENOLCK))
    with lock.alone(tmp_path / "a", "OUT"):
        assert "knows no locks; see that nothing else writes there" in capsys.readouterr().err
    monkeypatch.setattr(fcntl, "flock", broken(errno.ENOSPC))
    with (
        pytest.raises(UserError, match="^OUT: cannot write to .*: broken; make room"),
        lock.alone(tmp_path / "a", "OUT"),
    ):
        pass
