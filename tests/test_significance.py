"""The randomisation test against scipy's permutation test."""

import numpy as np
import pytest
import scipy.stats

from r3jax.evaluation import significance
from r3jax.evaluation.significance import paired_randomisation


def _scipy(a, b):
    """Exact: all 2^n sign patterns."""
    return scipy.stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        alternative="greater",
    ).pvalue


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.15, 0.4])
def test_agrees_with_scipy(shift):
    rng = np.random.default_rng(int(100 * (shift + 1)))
    a = np.round(rng.random(11) + shift, 1)  # rounded: many patterns tie with the observed one
    b = np.round(rng.random(11), 1)
    exact = _scipy(a, b)
    mine = paired_randomisation(a, b, rounds=40_000)
    assert abs(mine - exact) < 4 * np.sqrt(exact * (1 - exact) / 40_000) + 1e-4


def test_never_zero_and_one_without_difference():
    assert paired_randomisation(np.ones(60), np.zeros(60), rounds=999) == 1 / 1000
    assert paired_randomisation(np.zeros(60), np.ones(60), rounds=999) == 1.0
    assert paired_randomisation(np.ones(5), np.ones(5)) == 1.0


def test_seeded():
    rng = np.random.default_rng(1)
    a, b = rng.random(200), rng.random(200)
    assert paired_randomisation(a, b, 500, seed=3) == paired_randomisation(a, b, 500, seed=3)
    assert len({paired_randomisation(a, b, 500, seed=s) for s in range(5)}) > 1


def test_level_is_kept():
    """With no true difference p < 0.1 comes in about a tenth of the cases, across block borders too."""
    rng = np.random.default_rng(2)
    low = np.mean([paired_randomisation(rng.random(30), rng.random(30), 199, seed=s) <= 0.1 for s in range(600)])
    assert 0.06 < low < 0.14


def test_blocks_do_not_change_the_estimate(monkeypatch):
    rng = np.random.default_rng(4)
    a, b = rng.random(40) + 0.05, rng.random(40)
    whole = paired_randomisation(a, b, 5000)
    monkeypatch.setattr(significance, "_BLOCK", 300)
    assert paired_randomisation(a, b, 5000) == whole


@pytest.mark.parametrize(
    "a, b, options, match",
    [
        ([1.0], [1.0, 2.0], {}, "paired"),
        ([], [], {}, "empty"),
        ([np.nan], [1.0], {}, "finite"),
        ([1.0], [0.0], {"rounds": 0}, "rounds"),
    ],
)
def test_misuse(a, b, options, match):
    with pytest.raises(ValueError, match=match):
        paired_randomisation(a, b, **options)
