"""The comparison table of a run: for the terminal, for a log, as markdown and as LaTeX.

The input is the content of ``results.json``. Whatever is missing in it shows as "–" or is left out.
"""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

METRICS = {"ndcg@10": "nDCG@10", "recall@10": "R@10", "recall@100": "R@100", "mrr@10": "MRR@10"}
MISSING = "–"
LEGEND = "tokens: mean thought length; ended: share ending with the embed token"


def show(results: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Prints one table per split and its p-values: coloured on a terminal, aligned plain text elsewhere."""
    file = file or sys.stdout
    if not file.isatty():
        file.write(plain(results))
        return
    console = Console(file=file)
    for split, conditions in splits(results):
        table = Table(
            title=Text(_title(split, conditions)),
            title_style="bold",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i, heading in enumerate(headings()):
            table.add_column(heading, justify="right" if i else "left", no_wrap=True)
        for row in rows(conditions):
            table.add_row(*(Text(text, style="bold green" if best else "") for text, best in row))
        console.print(table)
        for line in notes(results, split):
            console.print(Text("  " + line, style="dim"))
    for line in cost(results):
        console.print(Text(line, style="dim"))


def plain(results: Mapping[str, Any]) -> str:
    """The same tables as aligned text without colour; the best of a column carries a star."""
    lines = []
    for split, conditions in splits(results):
        grid = [[h + " " for h in headings()]]
        grid += [[text + ("*" if best else " ") for text, best in row] for row in rows(conditions)]
        widths = [max(len(row[c]) for row in grid) for c in range(len(grid[0]))]
        body = [
            "  ".join(
                cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in grid
        ]
        rule = "-" * len(body[0])
        lines += [_title(split, conditions), rule, body[0], rule, *body[1:]]
        lines += [*("  " + line for line in notes(results, split)), ""]
    lines += cost(results)
    return "\n".join(line.rstrip() for line in lines) + ("\n" if lines else "")


def markdown(results: Mapping[str, Any]) -> str:
    """The same tables as GitHub markdown; the best of a column is bold."""
    lines = []
    for split, conditions in splits(results):
        lines += [f"**{_cell(_title(split, conditions))}**", ""]
        lines += ["| " + " | ".join(headings()) + " |", "|---|" + "---:|" * (len(headings()) - 1)]
        for row in rows(conditions):
            cells = (f"**{_cell(text)}**" if best else _cell(text) for text, best in row)
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"- {_cell(line)}" for line in notes(results, split)), ""]
    return "\n".join(lines)


def latex(results: Mapping[str, Any]) -> str:
    """The same tables as LaTeX tabulars (with booktabs); the best of a column is bold, notes are comments."""
    lines = []
    for split, conditions in splits(results):
        lines += [f"% {line}" for line in (_title(split, conditions), *notes(results, split))]
        lines += [r"\begin{tabular}{l" + "r" * (len(headings()) - 1) + "}", r"\toprule"]
        lines += [" & ".join(map(_tex, headings())) + r" \\", r"\midrule"]
        for row in rows(conditions):
            lines.append(" & ".join(rf"\textbf{{{_tex(text)}}}" if best else _tex(text) for text, best in row) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def splits(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Mapping[str, Any]]]]:
    """(split, {condition: figures}) of every split that has conditions."""
    return [(name, conditions) for name, conditions in (results.get("splits") or {}).items() if conditions]


def headings() -> list[str]:
    """Column heads, in the order of the cells of ``rows``."""
    return ["condition", *METRICS.values(), "tokens", "ended", "ms/query"]


def rows(conditions: Mapping[str, Mapping[str, Any]]) -> list[list[tuple[str, bool]]]:
    """Per condition its cells (text, is the best of its column); only ranking metrics have a best."""
    best = {
        metric: max((v for c in conditions.values() if (v := number(c.get(metric))) is not None), default=None)
        for metric in METRICS
    }
    return [
        [
            (name, False),
            *((fixed(figures.get(m), 3), best[m] is not None and number(figures.get(m)) == best[m]) for m in METRICS),
            (fixed(figures.get("thought_tokens"), 1), False),
            (percent(figures.get("token_rate")), False),
            (fixed(figures.get("ms_per_query"), 1), False),
        ]
        for name, figures in conditions.items()
    ]


def notes(results: Mapping[str, Any], split: str) -> list[str]:
    """The lines under the table of a split: "a > b: p = 0.012" per pair, unanswered queries, the legend."""
    lines = [f"{pair}: {p_text(p)}" for pair, p in ((results.get("p_values") or {}).get(split) or {}).items()]
    silent = {
        name: count
        for name, figures in results["splits"][split].items()
        if (count := number(figures.get("unanswered")))
    }
    if silent:
        lines.append("queries without any document: " + ", ".join(f"{n} {c:,.0f}" for n, c in silent.items()))
    lines += [f"warning: {line}" for line in (results.get("warnings") or {}).get(split) or []]
    return [*lines, LEGEND]


def cost(results: Mapping[str, Any]) -> list[str]:
    """What the run took, and how its index followed; nothing for what is not known."""
    lines = []
    seconds, memory = number(results.get("seconds")), number(results.get("peak_rss_bytes"))
    if seconds is not None and memory is not None:
        lines.append(f"whole run: {seconds / 60:.1f} minutes, peak memory {memory / 2**30:.2f} GiB")
    drift = [
        f"{name} {value:.4f}"
        for name, kl in (results.get("ability_kl") or {}).items()
        if (value := number(kl)) is not None
    ]
    if drift:
        lines.append("KL to the base on ordinary chats, nats per token: " + ", ".join(drift))
    refresh = results.get("refresh") or {}
    error = number(refresh.get("mean_abs_reward_error"))
    if error is not None:
        lines.append(
            f"index: at most {percent(refresh.get('max_share_reencoded'))} of the documents re-encoded per step"
        )
        worst = number(refresh.get("max_abs_reward_error"))
        lines.append(
            f"reward error, mean over {fixed(refresh.get('probe_steps'), 0)} probe steps: {error:.1e}"
            + ("" if worst is None else f", at most {worst:.1e}")
        )
    return lines


def p_text(p: Any) -> str:
    """ "p = 0.012", and "p < 0.001" for what three digits cannot tell from zero."""
    value = number(p)
    if value is None:
        return f"p {MISSING}"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def number(value: Any) -> float | None:
    """The value as a finite float, or None where it is missing, no number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
        return None
    return float(value)


def fixed(value: Any, digits: int) -> str:
    """A number with fixed digits, or a dash."""
    value = number(value)
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as per cent, or a dash."""
    value = number(value)
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def _title(split: str, conditions: Mapping[str, Mapping[str, Any]]) -> str:
    counts = [n for c in conditions.values() if (n := number(c.get("queries"))) is not None]
    return split + (f", {max(counts):,.0f} queries" if counts else "")


def _tex(text: str) -> str:
    return "".join(f"\\{c}" if c in "_%&#$" else {MISSING: "--"}.get(c, c) for c in text)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
