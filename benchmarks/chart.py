# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG text, standard library only."""

import math
from html import escape

_COLORS = ("#c0392b", "#e67e22", "#8e44ad", "#2980b9", "#16a085", "#7f8c8d", "#2c3e50", "#95a5a6")
_WIDTH, _HEIGHT = 860, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 190, 50, 50


def speedup_chart(lines: dict[str, dict[int, float | None]], title: str) -> str:
    """One line a kernel, M on a logarithmic axis.

    ``lines``: name -> {M: speedup or None}. A gap in a line is a shape its kernel cannot run.
    """
    tokens = sorted({m for line in lines.values() for m in line})
    values = [v for line in lines.values() for v in line.values() if v]
    top = math.ceil(max(values, default=1.0) + 0.2)
    low, high = math.log2(tokens[0]), math.log2(tokens[-1])

    def x_of(m: int) -> float:
        share = (math.log2(m) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y_of(v: float) -> float:
        return _HEIGHT - _BOTTOM - v / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{escape(title)}</text>',
    ]
    for v in range(top + 1):
        stroke = "#444" if v == 1 else "#ddd"
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(v):.1f}" y2="{y_of(v):.1f}" '
            f'stroke="{stroke}"/><text x="{_LEFT - 8}" y="{y_of(v) + 4:.1f}" '
            f'text-anchor="end">{v}x</text>'
        )
    for m in tokens:
        parts.append(
            f'<text x="{x_of(m):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{m}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">tokens M</text>')
    for i, (name, line) in enumerate(lines.items()):
        color = _COLORS[i % len(_COLORS)]
        points = [(x_of(m), y_of(v)) for m, v in sorted(line.items()) if v]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        y = _TOP + 18 * i
        parts.append(
            f'<rect x="{_WIDTH - _RIGHT + 16}" y="{y - 9}" width="12" height="12" fill="{color}"/>'
            f'<text x="{_WIDTH - _RIGHT + 34}" y="{y + 1}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


_BAR, _BAR_LEFT = 26, 210


def speedup_bars(bars: dict[str, float], title: str) -> str:
    """``bars``: name -> speedup. The line at 1 is the peer."""
    height = _TOP + (_BAR + 8) * len(bars) + 20
    per_unit = (_WIDTH - _BAR_LEFT - 70) / max(*bars.values(), 1.0)
    peer = _BAR_LEFT + per_unit
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="20" y="24" font-size="15">{escape(title)}</text>',
    ]
    for i, (name, value) in enumerate(bars.items()):
        y = _TOP + (_BAR + 8) * i
        width = value * per_unit
        parts.append(
            f'<text x="{_BAR_LEFT - 10}" y="{y + 17}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{_BAR_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" '
            f'fill="{_COLORS[0]}"/>'
            f'<text x="{_BAR_LEFT + width + 8:.1f}" y="{y + 17}">{value:.2f}x</text>'
        )
    parts.append(
        f'<line x1="{peer:.1f}" x2="{peer:.1f}" y1="{_TOP - 8}" y2="{height - 16}" stroke="#444"/>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"
