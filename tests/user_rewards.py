"""Rewards such as a user might write, good and bad."""

import numpy as np


def closeness(rows, scores, relevant, positive_scores, *, k, size, ranks, emitted, gains):
    """Cosine of the best relevant document, and a little for its exact rank."""
    return np.where(relevant >= 0, positive_scores, -1).max(1) + 0.01 / ranks


def flat_for_odd_rows(rows, scores, relevant, positive_scores, **_):
    """Nothing for queries whose first relevant document has an odd row."""
    return np.where(relevant[:, 0] % 2, 0.0, 1 + positive_scores[:, 0])


def nan_for_row_0(rows, scores, relevant, positive_scores, **_):
    return np.where(relevant[:, 0] == 0, np.nan, 1.0)


def nan_for_odd_rows(rows, scores, relevant, positive_scores, **_):
    return np.where(relevant[:, 0] % 2, np.nan, positive_scores[:, 0])


def broken(*_, **__):
    return 1 / 0


def one_number(*_, **__):
    return 1.0


def nothing(rows, *_, **__):
    return np.zeros(len(rows))
