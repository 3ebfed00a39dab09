"""The training state: what the optimiser keeps in fp32 for weights held in bf16, and its shapes known beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r3jax.model import params as model_params
from r3jax.model.sharding import make_mesh
from r3jax.stages.state import abstract_state, apply, new_state, optimiser
from tests.tiny_model import sizes

TX = optimiser(learning_rate=1e-4, warmup=0, steps=10**6, weight_decay=0.01, clip_norm=1.0)


def descend(dtype: str, steps: int):
    """The state after so many steps on the same gradients, from the same weights."""
    rng = np.random.default_rng(0)
    start = {"w": jnp.asarray(rng.uniform(0.5, 1, 64), "bfloat16").astype(dtype)}
    state = new_state(start, TX, make_mesh(devices=jax.devices()[:1]), keep_reference=False)
    step = jax.jit(lambda s, g: apply(TX, s, g)[0])
    for _ in range(steps):
        state = step(state, {"w": jnp.asarray(0.2 + rng.normal(size=64), "bfloat16").astype(dtype)})
    return start["w"], state


def test_weights_in_bfloat16_take_the_steps_of_those_in_float32():
    """Steps of 1e-4, where these weights' neighbours in bf16 are 4e-3 away: without a whole copy none is taken."""
    _, fine = descend("float32", 100)
    start, low = descend("bfloat16", 100)
    assert low.params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(low.opt_state.whole["w"], fine.params["w"], rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(low.params["w"], low.opt_state.whole["w"].astype(jnp.bfloat16))
    assert np.all((start - 1e-4).astype(jnp.bfloat16) == start) and np.mean(low.params["w"] != start) > 0.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimisers_state_is_in_float32_and_its_shapes_are_known(dtype):
    config, mesh = sizes(param_dtype=dtype), make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        state = new_state(model_params.init(config, mesh, 0), TX, mesh, keep_reference=True)
    floats = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    copies = 2 if dtype == "float32" else 3  # both moments, and the whole weights where they are held in less
    assert len(floats) == copies * len(jax.tree.leaves(state.params))
    promised = abstract_state(model_params.abstract(config, mesh), TX, mesh, keep_reference=True)
    assert jax.tree.structure(promised) == jax.tree.structure(state)
    for want, got in zip(jax.tree.leaves(promised), jax.tree.leaves(state), strict=True):
        assert (want.shape, want.dtype) == (got.shape, got.dtype)
        assert want.sharding.is_equivalent_to(got.sharding, got.ndim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient, loss", [(jnp.nan, 0.0), (jnp.inf, 0.0), (1e-3, jnp.nan)])
def test_a_step_without_a_finite_loss_or_gradient_changes_nothing_but_the_count(dtype, gradient, loss):
    _, state = descend(dtype, 2)
    step = jax.jit(lambda s, g, x: apply(TX, s, {"w": g}, x))
    same = jnp.full(64, 1e-3, dtype)
    after, metrics = step(state, same.at[3].set(gradient), loss)
    assert metrics["skipped"] == 1 and int(after.step) == int(state.step) + 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    # What comes after it is as if it had not been.
    (after, metrics), (expected, _) = step(after, same, 0.0), step(state, same, 0.0)
    assert metrics["skipped"] == 0 and int(after.step) == int(state.step) + 2
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (expected.params, expected.opt_state))


def test_the_norm_of_a_bfloat16_gradient_is_summed_in_float32():
    params = {"w": jnp.zeros(4096, jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)}
    state = new_state(params, TX, make_mesh(devices=jax.devices()[:1]), keep_reference=False)
    gradient = jax.tree.map(jnp.ones_like, params)
    metrics = apply(TX, state, gradient)[1]
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm({"x": np.ones(4099)})), rel=1e-6)
