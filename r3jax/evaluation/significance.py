"""Is one system better than another on the same queries? The paired randomisation test.

Under the null hypothesis the two scores of a query may be swapped freely, so the sign of each difference is
a fair coin (Fisher's randomisation test, recommended for retrieval by Smucker et al. 2007). The estimate
(count + 1) / (rounds + 1) is never zero and keeps the level (Phipson & Smyth 2010).
"""

from collections.abc import Sequence

import numpy as np

_BLOCK = 1 << 20  # signs drawn at a time: 8 MB, whatever the number of queries and rounds


def paired_randomisation(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    rounds: int = 10_000,
    seed: int = 0,
) -> float:
    """One-sided p-value of the mean of a - b: small where ``a`` is better.

    Args:
      a: scores of the first system, [Q], query by query.
      b: scores of the second system, [Q], in the same order.
      rounds: random sign patterns drawn; 1 / (rounds + 1) is the smallest p that can come out.
      seed: of the patterns; the same seed gives the same p.

    Raises:
      ValueError: if the arrays are empty, differ in shape or are not finite, or on rounds below 1.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"a and b must be paired and not empty, got shapes {a.shape} and {b.shape}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    difference = a - b
    if not np.isfinite(difference).all():
        raise ValueError("a and b must be finite")
    difference = difference[difference != 0]  # a flipped zero changes nothing
    if not difference.size:
        return 1.0

    observed = difference.sum()
    # Sums that are equal on paper differ by rounding; they count as reached.
    slack = 1e-12 * np.abs(difference).sum()
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // difference.size)
    reached = 0
    for start in range(0, rounds, block):
        flips = rng.random((min(block, rounds - start), difference.size)) < 0.5
        sums = observed - 2 * (flips @ difference)
        reached += int((sums >= observed - slack).sum())
    return (reached + 1) / (rounds + 1)
