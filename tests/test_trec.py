"""TREC run files: the round trip, and pytrec_eval's parser as the second reader."""

import numpy as np
import pytest
import pytrec_eval

from r3jax.errors import UserError
from r3jax.evaluation.trec import read_run, write_run


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    run = {f"q{q}": {f"d-é{d}": float(rng.normal()) for d in range(20)} for q in range(5)}
    run["q0"]["tiny"] = 1e-300
    path = write_run(tmp_path / "out.trec", run, "r3jax")
    assert read_run(path) == run
    with open(path, encoding="utf-8") as lines:
        assert pytrec_eval.parse_run(lines) == run
    assert [p.name for p in tmp_path.iterdir()] == ["out.trec"]


def test_lines_are_ranked(tmp_path):
    path = write_run(tmp_path / "out.trec", {"q": {"a": 0.5, "b": 2.0, "c": 0.5}}, "tag")
    assert path.read_text() == "q Q0 b 1 2.0 tag\nq Q0 c 2 0.5 tag\nq Q0 a 3 0.5 tag\n"


def test_float32_scores(tmp_path):
    score = np.float32(0.1)
    path = write_run(tmp_path / "out.trec", {"q": {"a": score}}, "tag")
    assert np.float32(read_run(path)["q"]["a"]) == score


def test_failure_leaves_the_old_file(tmp_path):
    path = write_run(tmp_path / "out.trec", {"q": {"a": 1.0}}, "tag")
    with pytest.raises(UserError, match="document id 'b c'"):
        write_run(path, {"q": {"a": 2.0, "b c": 1.0}}, "tag")
    assert read_run(path) == {"q": {"a": 1.0}}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "line, match",
    [
        ("q Q0 a 1 0.5", r"run:2: .*6 columns, here are 5"),
        ("q Q0 b 1 high tag", r"run:2: .*'high' is not a number"),
        ("q Q0 b 1 nan tag", r"run:2: .*'nan' is not a number"),
        ("q Q0 a 2 0.1 tag", r"run:2: .*'a' occurs twice"),
    ],
)
def test_bad_lines(tmp_path, line, match):
    path = tmp_path / "run"
    path.write_text(f"q Q0 a 1 0.9 tag\n{line}\n")
    with pytest.raises(UserError, match=match):
        read_run(path)
