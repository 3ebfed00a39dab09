"""A hundred ways to damage one file of a checkpoint of stage 2: harmless, or found and the one before taken."""

import random

import jax
import pytest

from r3jax import assembly
from tests import fixtures
from tests.damage import survive

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's reads of what is damaged
def test_a_hundred_damages_restore_no_wrong_value(tmp_path):
    parts = fixtures.parts(tmp_path)
    with jax.set_mesh(parts.mesh):
        params = parts.initial_params()
        stage, state = assembly.make_stage("rl", parts, params), assembly.first_state("rl", parts, params)
        states = []
        for step in (1, 2):
            batch, _ = stage.next_batch(state, step)
            state, _ = stage.update(state, batch)
            states.append(jax.tree.map(lambda x: x.copy(), {"train": state, "host": stage.host_state()}))
        target = {"train": assembly.abstract_stage_state("rl", parts), "host": stage.host_state()}
        assert survive(tmp_path / "checkpoints", states, target, 100, random.Random(0)) > 30
