"""The study of refresh policies: reward error, advantage correlation and cost, for each policy and budget.

One run per seed re-encodes everything and is followed by shadows (`r3jax.studies.shadows`); a chosen few cells are
trained in earnest, for only those feel their own errors.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from r3jax.rl import algorithms
from r3jax.studies import shadows
from r3jax.studies.cells import DEFAULT, Lab, Outcome, each, gap, mean, p_better, table
from r3jax.studies.plot import Panel, figure
from r3jax.studies.shadows import Cell

FULL = "full"
SHADOWS = "shadows.npz"
POLICIES = """\
- `none`: nothing is re-encoded. `full`: everything is, at every step: the reference.
- All others re-encode the batch's relevant documents first, then spend what is left of the budget:
  `round_robin` on the oldest vectors; `neighbourhood` on what the rollouts' searches returned, by age times hits (a hit
  counts less the lower its place); `boundary` on the same documents, those first whose fresh score may lie on the other
  side of the score that decides a reward, by a drift learnt from what was re-encoded; `hybrid` as `boundary`, with a
  share of the budget for the oldest, so that no vector stays old unseen.
- What is not re-encoded is carried along by what re-encoded documents have moved in common (`r3jax/search/drift.py`),
  but for the lines that say "not carried"."""


def reals(own: Cell) -> dict[str, dict[str, Any]]:
    """The runs that are trained in earnest, and the fields they change: run -> field -> value."""
    found: dict[str, dict[str, Any]] = {
        FULL: {"index.policy": "full", "rl.probe_every": 0},  # probes would re-encode what is fresh
        DEFAULT: {},
        "none": {"index.policy": "none", "index.max_age": 0},  # nothing would be left to rank
        "round_robin": {"index.policy": "round_robin"},
    }
    return {name: changes for name, changes in found.items() if name != own.policy}


def run(
    lab: Lab,
    *,
    own: Cell,
    group: int,
    advantage: str,
    watched: Callable[[list[str], list[Cell], str], None],
) -> tuple[str, str]:
    """Trains what is missing; the page (markdown, from its first table on) and its plot (SVG).

    own: the config's. watched: trains on a command line with shadows, which write the named file.
    """
    cells = shadows.grid(own)
    runs = reals(own)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in runs}
    seen = []
    for seed in lab.seeds:
        for name, changes in runs.items():
            train = (lambda argv: watched(argv, cells, SHADOWS)) if name == FULL else None
            folder = lab.run(seed, name, changes, train)
            outcomes[name].append(lab.outcome(folder))
            if name == FULL:
                seen.append(read(folder / SHADOWS, group, advantage))
    figures = np.array(seen)
    return page(cells, figures, outcomes, own, len(lab.dataset.doc_ids)), plot(cells, figures)


def read(file: pathlib.Path, group: int, advantage: str) -> np.ndarray:
    """[S, 3] for each shadow: mean absolute reward error, correlation of advantages, documents per step.

    The correlation is Pearson's over all rollouts of all steps, each with the advantage within its group. Groups with a
    reward that is not finite are left out.
    """
    with np.load(file, allow_pickle=False) as saved:
        rewards, reencoded = saved["rewards"].astype(np.float64), saved["reencoded"]
    count = rewards.shape[1]
    grouped = rewards.transpose(1, 0, 2).reshape(count, -1, group)
    grouped = grouped[:, np.isfinite(grouped).all(axis=(0, 2))]
    errors = np.abs(grouped[1:] - grouped[:1]).mean(axis=(1, 2))
    flat = grouped.reshape(-1, group).astype(np.float32)
    gains = np.asarray(algorithms.advantages(flat, advantage)).reshape(count, -1).astype(np.float64)
    return np.stack([errors, [_correlation(row, gains[0]) for row in gains[1:]], reencoded.mean(axis=0)], axis=1)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where either does not vary."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def page(cells: Sequence[Cell], seen: np.ndarray, outcomes: dict[str, list[Outcome]], own: Cell, documents: int) -> str:
    """`seen` [seeds, S, 3] as of `read`; `outcomes` of the runs by name, one per seed."""
    rows = []
    for i, cell in enumerate(cells):
        error, gains, count = (seen[:, i, n] for n in range(3))
        rows.append(
            [
                f"**{cell.name} (the config's)**" if cell == own else cell.name,
                f"{100 * cell.budget:g} %",
                f"{error.mean():.4f} ({error.max():.4f})",
                f"{gains.mean():.4f} ({gains.min():.4f})",
                f"{count.mean():,.0f}",
                f"{documents / count.mean():.0f}" if count.mean() else "–",
            ]
        )
    rows.append([FULL, "–", "0", "1", f"{documents:,}", "1"])
    head = ["policy", "budget", "reward error", "correlation", "documents per step", "times fewer than full"]
    parts = [
        "Mean over the seeds, the worst seed in brackets: the mean absolute difference to the reward from a corpus "
        "re-encoded in full at each step; the correlation of the advantages within the groups with those of full "
        "re-encoding; what is re-encoded.",
        table(head, rows),
        _runs(outcomes, own),
    ]
    return "\n\n".join(parts) + "\n"


def _runs(outcomes: dict[str, list[Outcome]], own: Cell) -> str:
    splits = list(outcomes[FULL][0].held_out)
    budget = f"{100 * own.budget:g} %"
    labels = {DEFAULT: f"**{own.name}, {budget} (the config's)**", "round_robin": f"round_robin, {budget}"}
    rows = []
    for name, found in outcomes.items():
        row = [labels.get(name, name)]
        for split in splits:
            row.append(each([o.held_out[split]["reasoning"] for o in found]))
            if name == FULL:
                row += ["", ""]
            else:
                row.append("{:+.4f} ({:+.4f} to {:+.4f})".format(*gap(found, outcomes[FULL], split)))
                row.append(f"{p_better(outcomes[FULL], found, split):.4f}")
        rows.append([*row, f"{mean(o.encoded for o in found):,.0f}", f"{mean(o.step_seconds for o in found):.2f}"])
    head = [x for split in splits for x in (split, "above full", "p")]
    text = (
        "Runs trained on their own rewards: held-out nDCG@10 with reasoning, mean over the seeds and each seed's. "
        "Above full: the difference and its 95 % interval by a bootstrap over the queries, a query's score its mean "
        "over the seeds; p: one-sided paired randomisation test that `full` is better. Neither knows what another seed "
        "would change. Documents: encoded per step all in all, with each step's drift probes and the corpus that is "
        "encoded now and then to tell the reward error. Seconds: a step's median, without the shadows."
    )
    return text + "\n\n" + table(["run", *head, "documents per step", "s a step"], rows)


def plot(cells: Sequence[Cell], seen: np.ndarray) -> str:
    """Error and correlation over the budget, one line per policy."""
    budgets = sorted({cell.budget for cell in cells})
    place = {(cell.name, cell.budget): i for i, cell in enumerate(cells)}
    means = seen.mean(axis=0)

    def lines(figure_of: int) -> dict[str, list[float | None]]:
        found: dict[str, list[float | None]] = {}
        for name in dict.fromkeys(cell.name for cell in cells if cell.policy != "none"):
            at = [place.get((name if b else "none", b)) for b in budgets]
            found[name] = [None if i is None else float(means[i, figure_of]) for i in at]
        return found

    columns = [f"{100 * b:g}" for b in budgets]
    label = "budget, % of the corpus per step"
    return figure(
        [
            Panel("Mean absolute reward error", columns, lines(0), label, log=True),
            Panel("Correlation of advantages with full re-encoding", columns, lines(1), label),
        ]
    )
