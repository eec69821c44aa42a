# SPDX-License-Identifier: Apache-2.0
"""The charts of report.html: inline SVG, made of numbers alone."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 40
# Told apart by every kind of colour vision (Okabe and Ito), and on white as on black.
_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")

_ROUND_STEPS = tuple(digit * 10**e for e in range(9) for digit in (1, 2, 5))  # between ticks


def line_chart(
    series: Mapping[str, Sequence[float | None]],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    mark: tuple[str, float] | None = None,
    dots_only: bool = False,
) -> str:
    """One SVG with a line a series over 0, 1, 2, ...; ``mark`` is a labelled horizontal line.

    A point tells its value when the pointer rests on it. Missing and non-finite values (and on a
    log axis those not above zero) leave a gap.
    """

    def usable(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and (value > 0 or not log)

    values = [v for points in series.values() for v in points if usable(v)]
    if mark is not None:
        values.append(mark[1])
    if not values:
        return "<p>No values.</p>"
    length = max(len(points) for points in series.values())
    low, high = min(values), max(values)
    if log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        if low == high:
            high *= 10
    else:
        low = min(low, 0.0)
        high = high if high > low else low + 1.0

    def x_of(i: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (i / max(length - 1, 1))

    def y_of(v: float) -> float:
        part = math.log(v / low) / math.log(high / low) if log else (v - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * part

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)}">'
    ]
    for tick in _ticks(low, high, log):
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    step = next(s for s in _ROUND_STEPS if length / s <= 13)
    for i in range(0, length, step):
        parts.append(
            f'<text x="{x_of(i):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{i}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(12 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    if mark is not None:
        y = y_of(mark[1])
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="currentColor" stroke-dasharray="4 4"/>'
            f'<text x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">'
            f"{escape(mark[0])}</text>"
        )
    for (name, points), color in zip(series.items(), _cycle(_COLORS), strict=False):
        path, pen_down = [], False
        for i, value in enumerate(points):
            if not usable(value):
                pen_down = False
                continue
            x, y = x_of(i), y_of(value)
            path.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
            pen_down = True
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{color}">'
                f"<title>{escape(name)}, {escape(x_label)} {i}: {value:.4g}</title></circle>"
            )
        if not dots_only:
            parts.append(
                f'<path d="{"".join(path)}" fill="none" stroke="{color}" stroke-width="1.5"/>'
            )
    parts.append("</svg>")
    legend = " ".join(
        f'<span style="color:{color}">&#9632;</span> {escape(name)}'
        for name, color in zip(series, _cycle(_COLORS), strict=False)
    )
    return f"<p>{legend}</p>{''.join(parts)}"


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        first, last = round(math.log10(low)), round(math.log10(high))
        return [10.0**e for e in range(first, last + 1, max(1, (last - first) // 6))]
    step = 10 ** math.floor(math.log10((high - low) / 2))
    while (high - low) / step > 6:
        step *= 2 if (high - low) / (step * 2) <= 6 else 5
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _cycle(colors: Sequence[str]):
    while True:
        yield from colors


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)
