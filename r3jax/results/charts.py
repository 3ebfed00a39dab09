"""Small inline SVG charts for the report: lines, bands, points and stacked areas over steps.

They carry no colour of their own: shapes have the classes ``s0`` to ``s5``, which the page's style sheet
colours for light and dark. Long series are drawn as the mean of at most 120 buckets with a band from each
bucket's minimum to its maximum, so a spike stays visible and the file small. Each figure has a legend with
the last values; the page's script shows the values under the pointer there (from the ``data-`` attributes).
"""

import html
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 340, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 8, 22
_BUCKETS = 120


@dataclass(frozen=True)
class Series:
    """One curve: ``points`` (step, value), ``band`` (step, low, high), in order of the steps, all finite."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    note: str = "",
    boundary: float | None = None,
    stacked: bool = False,
    zero: bool = False,
    top: float | None = None,
    cut: bool = False,
) -> str:
    """An HTML figure with a title, a legend and one SVG, or "" if no series has a point.

    Args:
      title: what is drawn, plain text.
      series: at most six; empty ones are left out.
      unit: after the values in the legend.
      note: one sentence under the title, plain text.
      boundary: a step where a dashed line parts stage 1 from stage 2.
      stacked: draw areas on top of each other (series must share their steps).
      zero: start the vertical axis at 0.
      top: the least value that the vertical axis must reach.
      cut: let the axis end at three times the median, so that a slow first step does not flatten the rest.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    drawn = _stack(series) if stacked else [_thin(s) for s in series]
    if not drawn[0].points:  # nothing to stack: no step that all series have
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points] + [y for s in drawn for _, *ends in s.band for y in ends]
    low, high = min(ys), max(ys)
    if zero or stacked:
        low = min(low, 0.0)
    if top is not None:
        high = max(high, top)
    if cut:
        high = min(high, 3 * statistics.median(y for _, y in drawn[-1].points) or high)
    frame = _Frame.around(min(xs), max(xs), low, high)

    shapes = [_axes(frame)]
    if boundary is not None and frame.x0 < boundary < frame.x1:
        x = frame.x(boundary)
        shapes.append(
            f'<path class="edge" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
            f'<text class="tick" x="{x - 5:.1f}" y="{_TOP + 9}" text-anchor="end">SFT</text>'
            f'<text class="tick" x="{x + 5:.1f}" y="{_TOP + 9}">RL</text>'
        )
    for i, s in enumerate(drawn):
        shapes += _shapes(s, i, frame, stacked)
    legend = "".join(
        f'<li><i class="key s{i}"></i>{html.escape(s.name)} <b data-key="{i}">{short(s.points[-1][1])}</b></li>'
        for i, s in enumerate(series)
    )
    heading = html.escape(title) + (f" <small>{html.escape(unit)}</small>" if unit else "")
    caption = f'<p class="note">{html.escape(note)}</p>' if note else ""
    values = "|".join(" ".join(f"{x:.0f}:{short(y)}" for x, y in _thin(s).points) for s in series)
    return (
        f'<figure class="chart" data-frame="{frame.x0:g} {frame.x1:g} {_LEFT} {_WIDTH - _RIGHT} {_WIDTH}" '
        f'data-values="{values}"><figcaption><h3>{heading}</h3>{caption}<ul class="legend">{legend}'
        f'</ul></figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(shapes)}</svg></figure>'
    )


def shares(title: str, parts: Sequence[tuple[str, float]]) -> str:
    """An HTML figure with a bar cut into the parts' shares of their sum, all in seconds; "" if that is 0."""
    parts = [(name, seconds) for name, seconds in parts if seconds > 0]
    if not parts:
        return ""
    total = sum(seconds for _, seconds in parts)
    bar = "".join(f'<i class="s{i % 6}" style="flex:{100 * s / total:.2f}"></i>' for i, (_, s) in enumerate(parts))
    rows = "".join(
        f'<li><i class="key s{i % 6}"></i><span>{html.escape(name)}</span> <b>{duration(seconds)}</b> '
        f"<span>{100 * seconds / total:.0f} %</span></li>"
        for i, (name, seconds) in enumerate(parts)
    )
    return (
        f'<figure class="shares"><figcaption><h3>{html.escape(title)} <small>{duration(total)}</small></h3>'
        f'</figcaption><div class="split-bar" aria-hidden="true">{bar}</div>'
        f'<ul class="parts">{rows}</ul></figure>'
    )


def duration(seconds: float) -> str:
    """ "0.36 s", "42 s", "17 min 23 s", "3 h 05 min"."""
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.2f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def short(value: float) -> str:
    """Three significant digits, thousands with commas, never an exponent where four zeros do."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


@dataclass(frozen=True)
class _Frame:
    """The data ranges, with the vertical one widened to round tick values."""

    x0: float
    x1: float
    y0: float
    y1: float
    step: float

    @classmethod
    def around(cls, x0: float, x1: float, low: float, high: float) -> "_Frame":
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
        step = _round_step((high - low) / 3.5)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(x0, x1 if x1 > x0 else x0 + 1, low, high, step)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        value = min(value, self.y1)
        return _HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _round_step(raw: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))


def _axes(frame: _Frame) -> str:
    parts = []
    for n in range(round((frame.y1 - frame.y0) / frame.step) + 1):
        value = frame.y0 + n * frame.step
        y = frame.y(value)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{_tick(value, frame.step)}</text>"
        )
    step = max(1.0, _round_step((frame.x1 - frame.x0) / 4))
    first = math.ceil(frame.x0 / step)
    for n in itertools.takewhile(lambda n: n * step <= frame.x1, itertools.count(first)):
        x = frame.x(n * step)
        anchor = "start" if x < _LEFT + 12 else "end" if x > _WIDTH - _RIGHT - 12 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{_tick(n * step, step)}</text>'
        )
    return "".join(parts)


def _tick(value: float, step: float) -> str:
    if abs(value) < step / 1e6:
        return "0"
    if step < 1e-4:
        return f"{value:.1e}"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.{len(f'{step:.8f}'.rstrip('0').split('.')[1])}f}"


def _shapes(s: Series, i: int, frame: _Frame, stacked: bool) -> list[str]:
    shapes = []
    if s.band:
        around = [(x, low) for x, low, _ in s.band] + [(x, high) for x, _, high in reversed(s.band)]
        shapes.append(f'<path class="{"area" if stacked else "band"} s{i}" d="{frame.path(around)}Z"/>')
    if len(s.points) > 1 and not stacked:
        shapes.append(f'<path class="line s{i}" d="{frame.path(s.points)}"/>')
    if len(s.points) <= 25 and not stacked:
        shapes += [f'<circle class="s{i}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6"/>' for x, y in s.points]
    return shapes


def _thin(s: Series) -> Series:
    """At most _BUCKETS points: means, and a band of the extremes unless the series has its own band."""
    if len(s.points) <= _BUCKETS:
        return s
    groups = [g for g in _split(s.points) if g]
    middles = [sum(x for x, _ in g) / len(g) for g in groups]
    points = [(m, sum(y for _, y in g) / len(g)) for m, g in zip(middles, groups, strict=True)]
    if s.band:
        band = [(b[len(b) // 2][0], min(p[1] for p in b), max(p[2] for p in b)) for b in _split(s.band)]
    else:
        band = [(m, min(y for _, y in g), max(y for _, y in g)) for m, g in zip(middles, groups, strict=True)]
    return Series(s.name, points, band)


def _split(points: Sequence) -> list[Sequence]:
    """Up to _BUCKETS runs of neighbours, as equal in length as can be."""
    count = min(_BUCKETS, len(points))
    ends = [len(points) * n // count for n in range(count + 1)]
    return [points[a:b] for a, b in itertools.pairwise(ends)]


def _stack(series: Sequence[Series]) -> list[Series]:
    """Each series as a band between the sums below and with it; steps that not all have are left out."""
    shared = set.intersection(*({x for x, _ in s.points} for s in series))
    thin = [_thin(Series(s.name, [p for p in s.points if p[0] in shared])) for s in series]
    base, stacked = [0.0] * len(thin[0].points), []
    for s in thin:
        upper = [b + y for b, (_, y) in zip(base, s.points, strict=True)]
        band = [(x, b, u) for (x, _), b, u in zip(s.points, base, upper, strict=True)]
        stacked.append(Series(s.name, [(x, u) for (x, _, u) in band], band))
        base = upper
    return stacked
