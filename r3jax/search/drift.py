"""What the movements of documents have in common: fitted to the few that are re-encoded, it carries all others along.

Training moves every document's vector, and most of the way is common to all of them: the whole cloud shifts, spreads
and turns. What re-encoded documents have moved since they were stored tells that common part, an affine map, at no
encoding cost. The rest is each document's own, and re-encoding alone can tell it. The paper (Search-R3, arXiv
2510.07048) has nothing of the kind; maps between the spaces of two models are old (Mikolov et al., arXiv 1309.4168).

Axes: n documents, D width.
"""

import numpy as np

# As strong as this many documents that stayed where they were: with fewer seen, others are hardly moved.
STIFFNESS = 3.0


def common_drift(old, new, stiffness: float = STIFFNESS) -> tuple[np.ndarray, np.ndarray]:
    """matrix [D, D] and offset [D], float64, so that `old @ matrix + offset` is near `new`, both [n, D].

    Ridge regression of the movement: a shift, and a linear map of what is left around the mean of `old`. ValueError for
    arrays that do not pair up, are empty or not finite.
    """
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    if old.ndim != 2 or old.shape != new.shape or not len(old):
        raise ValueError(f"old and new must both be [n, D], not {old.shape} and {new.shape}")
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise ValueError("old and new must be finite")
    if not (np.isfinite(stiffness) and stiffness > 0):
        raise ValueError(f"stiffness must be finite and above 0, it is {stiffness}")
    same = np.eye(old.shape[1])
    moved = new - old
    shift = moved.sum(0) / (len(old) + stiffness)
    centre = old.mean(0)
    around = old - centre
    slope = np.linalg.solve(around.T @ around + stiffness * same, around.T @ (moved - shift))
    return same + slope, shift - centre @ slope
