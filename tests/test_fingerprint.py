"""What a run's resumption refuses to differ in, and how its user may insist."""

import pathlib

import pytest
from ml_collections import ConfigDict

from r3jax.errors import UserError
from r3jax.run import fingerprint

HERE = pathlib.Path("runs/a")
BEGAN = ConfigDict({"seed": 0, "rl": {"steps": 10, "kl_weight": 0.1}, "log": {"every": 5}})


def now(**changes) -> ConfigDict:
    return ConfigDict(BEGAN.to_dict() | changes)


def test_a_changed_field_is_named_and_may_be_accepted():
    more = {"steps": 20, "kl_weight": 0.2}
    with pytest.raises(UserError) as e:
        fingerprint.refuse_config(HERE, BEGAN, now(rl=more, seed=1), ["seed"])
    assert "holds a run with config.rl.kl_weight=0.1, not 0.2, config.rl.steps=10, not 20; name another" in str(e.value)
    flag = str(e.value).rpartition("--accept=")[2].rstrip(".")
    fingerprint.refuse_config(HERE, BEGAN, now(rl=more, seed=1), fingerprint.accepted(flag, now(rl=more)))


def test_what_changes_no_figure_is_free():
    fingerprint.refuse_config(HERE, BEGAN, now(log={"every": 1}, processes={"hang": 5.0}), ())


def test_a_name_that_is_none_gets_a_hint():
    assert fingerprint.accepted(None, BEGAN) == frozenset()
    assert fingerprint.accepted("data, code,config.rl.steps", BEGAN) == {"data", "code", "rl.steps"}
    with pytest.raises(UserError, match="--accept: there is no 'rl.step' .did you mean rl.steps"):
        fingerprint.accepted("rl.step", BEGAN)


def test_other_data_and_other_code_are_refused_unless_accepted():
    for accept in ((), ("code",)):
        with pytest.raises(UserError, match="config.data.path: data/x has changed since .* --accept=data"):
            fingerprint.refuse_data("data/x", "a", "b", accept)
    fingerprint.refuse_data("data/x", "a", "b", ("data",))
    fingerprint.refuse_data("data/x", "a", "a", ())
    code = fingerprint.code()
    assert set(code) == {"r3jax", "r3jax's files", "jax", "jaxlib", "numpy", "optax", "grain", "scann"}
    fingerprint.refuse_code(None, code, ())
    fingerprint.refuse_code(code, code, ())
    for what in code:
        older = code | {what: "0.1"}
        with pytest.raises(UserError, match=f"was trained with {what} 0.1, now .* put the old code .* --accept=code"):
            fingerprint.refuse_code(older, code, ("data",))
        fingerprint.refuse_code(older, code, ("code",))
    # A run from before all of it was kept.
    fingerprint.refuse_code({"jax": code["jax"], "gone": "1"}, code, ())


def test_a_changed_reward_of_the_users_is_other_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "rewards_of_mine.py"
    file.write_text("def reward(*_, **__): return 1")
    name = "ndcg:0.5,rewards_of_mine.reward:0.5"
    began = fingerprint.code(name)
    assert began.items() > fingerprint.code().items()
    file.write_text("def reward(*_, **__): return 2")
    fingerprint.code.cache_clear()
    with pytest.raises(UserError, match="was trained with rewards_of_mine.reward's file [0-9a-f]{12}, now "):
        fingerprint.refuse_code(began, fingerprint.code(name), ())
    fingerprint.refuse_code(fingerprint.code("ndcg"), fingerprint.code(name), ())  # not known then
