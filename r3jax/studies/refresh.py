"""The study of refresh policies: reward error, advantage correlation and cost, for each policy and budget.

One run per seed re-encodes everything and is followed by shadows (`r3jax.studies.shadows`); a chosen few cells are
trained in earnest, for only those feel their own errors.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from r3jax.rl import algorithms
from r3jax.studies import shadows
from r3jax.studies.cells import DEFAULT, Lab, Outcome, mean, p_better, table
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
    reals = {DEFAULT: [], "none": ["--config.index.policy=none"], "round_robin": ["--config.index.policy=round_robin"]}
    outcomes: dict[str, list[Outcome]] = {FULL: []}
    seen = []
    for seed in lab.seeds:
        # Probes would re-encode what is fresh.
        changes = ["--config.index.policy=full", "--config.rl.probe_every=0"]
        folder = lab.run(seed, FULL, changes, lambda argv: watched(argv, cells, SHADOWS))
        outcomes[FULL].append(lab.outcome(folder))
        seen.append(read(folder / SHADOWS, group, advantage))
        for name, changes in reals.items():
            if name not in (own.policy, FULL) or name == DEFAULT:
                outcomes.setdefault(name, []).append(lab.outcome(lab.run(seed, name, changes)))
    figures = np.array(seen)
    return page(cells, figures, outcomes, own, len(lab.dataset.doc_ids)), plot(cells, figures)


def read(file: pathlib.Path, group: int, advantage: str) -> np.ndarray:
    """[S, 3] for each shadow: mean absolute reward error, correlation of advantages, documents per step.

    The correlation is Pearson's over all rollouts of all steps, each with the advantage within its group.
    """
    with np.load(file, allow_pickle=False) as saved:
        rewards, reencoded = saved["rewards"].astype(np.float64), saved["reencoded"]
    steps, count, rollouts = rewards.shape
    errors = np.abs(rewards[:, 1:] - rewards[:, :1]).mean(axis=(0, 2))
    grouped = rewards.transpose(1, 0, 2).reshape(-1, group).astype(np.float32)
    gains = np.asarray(algorithms.advantages(grouped, advantage)).reshape(count, steps * rollouts).astype(np.float64)
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
                f"**{cell.name} (the default)**" if cell == own else cell.name,
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
    labels = {FULL: FULL, DEFAULT: f"{own.name}, {budget} (the default)", "round_robin": f"round_robin, {budget}"}
    rows = []
    for name, found in outcomes.items():
        row = [labels.get(name, name)]
        for split in splits:
            scores = [o.held_out[split]["reasoning"] for o in found]
            row.append(f"{mean(scores):.4f} ({', '.join(f'{x:.4f}' for x in scores)})")
            row.append("" if name == FULL else f"{p_better(outcomes[FULL], found, split):.3f}")
        rows.append(row)
    text = (
        "Runs trained on their own rewards: held-out nDCG@10 with reasoning, mean over the seeds and each seed's. p: "
        "one-sided paired randomisation test that `full` is better, by query, a query's score its mean over the seeds."
    )
    return text + "\n\n" + table(["run", *(x for split in splits for x in (split, "p"))], rows)


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
