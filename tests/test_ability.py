"""The general-ability check: KL(base || model) on ordinary chats, and the bound that stops training."""

import json
import time

import jax
import numpy as np
import pytest
import scipy.special

from r3jax import assembly, evaluate, loop, train, weights
from r3jax.data.chats import CHATS
from r3jax.errors import UserError
from r3jax.model import params as model_params
from r3jax.model.qwen2 import hidden_states, logits
from r3jax.model.sharding import make_mesh
from r3jax.stages.ability import Ability
from r3jax.text.prompts import QWEN_SYSTEM
from tests import fixtures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ability")
    fixtures.write_dataset(folder / "data", thoughts=True)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Host weights of two models."""
    parts = fixtures.parts(folder)
    return [jax.device_get(model_params.init(parts.model, parts.mesh, seed)) for seed in (0, 1)]


def test_the_chats_are_some_dozens_short_and_all_different():
    assert 24 <= len(CHATS) <= 64 and len(set(CHATS)) == len({user for user, _ in CHATS}) == len(CHATS)
    assert all(user.strip() == user and answer.strip() == answer for user, answer in CHATS)
    assert max(len(answer) for _, answer in CHATS) < 100


def test_a_chat_is_rendered_as_qwens_template_does(folder):
    chat = fixtures.parts(folder).chat
    ids, start = chat.conversation("Who <|im_end|> are you?", "I am\nQwen.")
    head = f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\nWho <|im_end|> are you?<|im_end|>\n"
    assert chat.tokenizer.decode(ids[:start], keep_special=True) == head + "<|im_start|>assistant\n"
    assert chat.tokenizer.decode(ids[start:], keep_special=True) == "I am\nQwen.<|im_end|>"
    assert ids.count(chat.tokenizer.im_end_id) == 3  # what a user types is no control token


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2)])
def test_it_is_the_mean_kl_over_the_answers_tokens(folder, two, tmp_path, mesh):
    """Against a plain loop over chats and tokens, in float64; more chats than one batch holds."""
    parts = fixtures.parts(folder, mesh)
    chats = CHATS[:11]
    ability = Ability(chats, parts.chat, parts.model, parts.mesh, tmp_path / "sub" / "base.npy")
    base, other = (fixtures.placed(w, parts) for w in two)
    ability.remember(base)
    assert ability.kl(base) == 0
    found = ability.kl(other)
    total, count = 0.0, 0
    read = jax.jit(lambda p, t, n: logits(p, parts.model, hidden_states(p, parts.model, t, n)))
    for turns in chats:
        ids, start = parts.chat.conversation(*turns)
        row = np.zeros((1, 256), np.int32)
        row[0, : len(ids)] = ids
        theirs, ours = (
            scipy.special.log_softmax(np.asarray(read(w, row, np.array([len(ids)])), np.float64)[0], -1) for w in two
        )
        for p in range(start - 1, len(ids) - 1):
            total += (np.exp(theirs[p]) * (theirs[p] - ours[p])).sum()
            count += 1
    assert ability.tokens == count and np.load(ability.file).shape == (count, parts.model.vocab)
    assert found == pytest.approx(total / count, rel=1e-4) and found > 1e-3
    ability.file.unlink()
    with pytest.raises(UserError, match="base.npy cannot be read"):
        ability.kl(base)


@pytest.mark.parametrize(
    "changes, measured",
    [
        ({"sft__kl_weight": 0.0, "rl__kl_weight": 0.0}, False),
        ({"sft__kl_weight": 0.0}, True),
        ({"rl__kl_weight": 0.0}, True),
        ({"sft__kl_weight": 0.0, "rl__kl_weight": 0.0, "lora__rank": 2}, True),
        ({"sft__kl_weight": 0.0, "rl__kl_weight": 0.0, "evaluate__max_ability_kl": 1.0}, True),
    ],
)
def test_it_is_measured_where_the_config_cares(folder, changes, measured):
    assert (fixtures.parts(folder, **changes).ability is not None) == measured


def steps(run, stage="sft") -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints" / stage).iterdir() if p.name.isdigit())


def test_crossing_the_bound_stops_training(folder, tmp_path, capsys):
    """In one sentence, with its checkpoints; what there is can be evaluated, and a higher bound lets it go on."""
    run = tmp_path / "run"
    few = {"sft__steps": 6, "evaluate__every": 2, "checkpoint__every": 2}
    flags = [*fixtures.flags(folder, "sft", **few), f"--workdir={run}"]
    says = "config.evaluate.max_ability_kl=1e-06 was crossed at step 2 of sft: the KL to the base on ordinary chats is"
    for _ in range(2):  # given again, it does not go on
        with pytest.raises(UserError, match=says) as caught:
            train.main([*flags, "--config.evaluate.max_ability_kl=1e-6"])
        assert str(caught.value).count(". ") == 0
        assert steps(run) == [2] and not (run / "results.json").exists()
    evaluate.main([f"--workdir={run}", "--split=seen"])
    assert "sft_direct" in capsys.readouterr().out
    train.main([*flags, "--config.evaluate.max_ability_kl=100"])
    assert steps(run)[-1] == 6
    assert json.loads((run / "results.json").read_text())["ability_kl"]["sft"] > 1e-6


@pytest.fixture(scope="module")
def unmeasured(folder):
    """A run of stage 1 that nothing asked to measure, stopped after step 1 of 2; and its flags."""
    run = folder / "unmeasured"
    few = {"sft__steps": 2, "sft__kl_weight": 0.0, "evaluate__every": 2, "checkpoint__every": 1}
    flags = [*fixtures.flags(folder, "sft", **few), f"--workdir={run}"]

    def stop(*given):
        if 2 not in given:
            return
        while not steps(run):  # step 1 is still being written
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "report", stop)
        train.main(flags)
    assert steps(run) == [1] and not (run / "ability").exists()
    return run, flags


def test_a_bound_may_be_set_when_a_run_goes_on(folder, unmeasured, tmp_path):
    """It is held against the weights that the run began with, not those that it goes on with."""
    run, flags = unmeasured
    with pytest.raises(UserError, match="max_ability_kl=1e-06 was crossed at step 2 of sft: the KL to the base"):
        train.main([*flags, "--config.evaluate.max_ability_kl=1e-6"])
    assert steps(run) == [1, 2]
    config = fixtures.config(folder, "sft", evaluate__max_ability_kl=1.0)
    parts = assembly.parts(config, run, make_mesh(devices=jax.devices()[:1]))
    with jax.set_mesh(parts.mesh):
        assert parts.ability.kl(parts.initial_params()) < 1e-6
        assert parts.ability.kl(weights.load_params(run, parts.model, parts.mesh, "sft")) > 1e-6


def test_the_bound_stops_stage_2_too(folder, unmeasured, tmp_path):
    run = tmp_path / "run"
    few = {"rl__steps": 2, "rl__kl_weight": 0.0, "evaluate__every": 1, "checkpoint__every": 1}
    moved = {"rl__learning_rate": 0.1, "rl__weight_decay": 0.5}  # weights move even where all rewards are equal
    flags = fixtures.flags(folder, init_from=unmeasured[0], evaluate__max_ability_kl=1e-6, **few, **moved)
    says = "config.evaluate.max_ability_kl=1e-06 was crossed at step 1 of rl: the KL to the base on ordinary chats is"
    with pytest.raises(UserError, match=says):
        train.main([*flags, f"--workdir={run}"])
    assert steps(run, "rl") == [1] and not (run / "results.json").exists()
