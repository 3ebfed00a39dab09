"""A figure for a page of docs/: panels of lines over named columns, as one SVG file without any dependency.

Text and grid take the reader's light or dark scheme; the lines have colours that both show.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#2f6fb5", "#d1711f", "#2d8a4e", "#a4489c", "#8a6d3b", "#6b7280")
WIDTH, HEIGHT, LEGEND = 420, 300, 180
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 40, 44
STYLE = (
    "text{font:12px sans-serif;fill:#222}path{fill:none}.grid{stroke:#ccc}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#555}}"
)


@dataclass(frozen=True)
class Panel:
    """One plot: `series` give a value per column, None where there is none; `log` wants values above 0."""

    title: str
    columns: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    xlabel: str = ""
    log: bool = False


def figure(panels: Sequence[Panel]) -> str:
    """The panels beside each other, with one legend under them; they share the order of their series."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    across = (WIDTH * len(panels) - LEFT) // LEGEND
    rows = math.ceil(len(names) / across)
    height = HEIGHT + 20 * rows
    parts = [f'<g transform="translate({i * WIDTH},0)">{_panel(p, names)}</g>' for i, p in enumerate(panels)]
    for i, name in enumerate(names):
        x, y = LEFT + (i % across) * LEGEND, HEIGHT + 14 + 20 * (i // across)
        parts.append(
            f'<path d="M{x} {y - 4}h18" {_stroke(i)} stroke-width="2.5"/>'
            f'<text x="{x + 24}" y="{y}">{html.escape(name)}</text>'
        )
    width = WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _stroke(i: int) -> str:
    """Dashed where the colours come round again."""
    return f'stroke="{_colour(i)}"' + (' stroke-dasharray="5 3"' if i // len(COLOURS) % 2 else "")


def _panel(panel: Panel, names: Sequence[str]) -> str:
    def scale(value: float) -> float:
        return math.log10(value) if panel.log else value

    drawn = {
        name: [None if v is None or not math.isfinite(v) or (panel.log and v <= 0) else scale(v) for v in values]
        for name, values in panel.series.items()
    }
    found = [v for values in drawn.values() for v in values if v is not None]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if panel.log:
        low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
        ticks = [(float(n), f"{10.0**n:g}") for n in range(int(low), int(high) + 1)]
    else:
        margin = 0.08 * (high - low) or max(abs(high), 1.0) * 0.05
        low, high = low - margin, high + margin
        digits = max(0, 2 - math.floor(math.log10(high - low)))
        ticks = [(v, f"{v:.{digits}f}") for v in (low + (high - low) * n / 4 for n in range(5))]

    def x(column: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (column + 0.5) / len(panel.columns)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="22" font-weight="bold">{html.escape(panel.title)}</text>']
    for value, text in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    for i, column in enumerate(panel.columns):
        parts.append(f'<text x="{x(i):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{html.escape(column)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(panel.xlabel)}</text>')
    for name, values in drawn.items():
        colour, stroke = _colour(names.index(name)), _stroke(names.index(name))
        points = [(x(i), y(v)) for i, v in enumerate(values) if v is not None]
        if len(points) > 1:
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
            parts.append(f'<path d="{path}" {stroke} stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
    return "".join(parts)
