"""The plan's parts: costs read from compiled programs, roofline, names of topologies, and the smallest plan of all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from r3jax.errors import UserError
from r3jax.planning import hlo, roofline, topologies

DEPTH, ROWS, WIDTH = 12, 32, 64


def layers(unroll: int):
    """A stack of matrices, as the decoder scans its layers."""

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0]

    shapes = jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), jnp.float32), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    return jax.jit(run).lower(*shapes).compile()


def test_a_loop_counts_as_often_as_it_runs():
    """XLA counts its body once; unrolled it counts right, and so does the HLO's own sum, both ways."""
    want = 2 * DEPTH * ROWS * WIDTH * WIDTH
    loop, flat = layers(1), layers(DEPTH)
    assert loop.cost_analysis()["flops"] < want / 4 < want <= flat.cost_analysis()["flops"] < 1.1 * want
    counted = [hlo.analyse(program.as_text(), 1) for program in (loop, flat)]
    assert [c.flops for c in counted] == [want, want]
    # A layer reads its own weights, not the stack; XLA's count of the unrolled program is the reference.
    least = 4 * DEPTH * (WIDTH * WIDTH + 2 * ROWS * WIDTH)
    for costs in counted:
        assert least <= costs.bytes < 3 * least
    assert counted[1].bytes == pytest.approx(flat.cost_analysis()["bytes accessed"], rel=0.5)
