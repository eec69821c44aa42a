# SPDX-License-Identifier: Apache-2.0
"""report.html: the report as one self-contained page, with inline SVG and nothing loaded."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefixquant.progress import format_seconds
from prefixquant.report import describe_prefix, format_bytes, plain, prefix_name

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 40
_COLORS = ("#c0392b", "#2471a3", "#1e8449", "#9a7d0a", "#6c3483", "#5d6d7e")

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 780px; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 2em; }
table { border-collapse: collapse; }
td, th { padding: .15em .9em .15em 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: currentColor; }
svg .grid { stroke: currentColor; stroke-opacity: .15; }
pre { overflow-x: auto; font-size: 12px; }
"""


def line_chart(
    series: Mapping[str, Sequence[float | None]],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    mark: tuple[str, float] | None = None,
) -> str:
    """One SVG with a line a series over 0, 1, 2, ...; ``mark`` is a labelled horizontal line.

    Missing and non-finite values (and on a log axis those not above zero) leave a gap.
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

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(y_label)}">']
    for tick in _ticks(low, high, log):
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for i in range(0, length, max(1, math.ceil(length / 12))):
        parts.append(
            f'<text x="{x_of(i):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{i}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{_text(x_label)}</text>"
        f'<text transform="translate(12 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{_text(y_label)}</text>"
    )
    if mark is not None:
        y = y_of(mark[1])
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="currentColor" stroke-dasharray="4 4"/>'
            f'<text x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{_text(mark[0])}</text>'
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
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{color}"/>')
        parts.append(f'<path d="{"".join(path)}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f"<!-- {_text(name).replace('--', '')} -->")
    parts.append("</svg>")
    legend = " ".join(
        f'<span style="color:{color}">&#9632;</span> {_text(name)}'
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


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _table(rows: Sequence[Sequence[Any]], header: Sequence[str] | None = None) -> str:
    lines = ["<table>"]
    if header:
        lines.append("<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in header) + "</tr>")
    for row in rows:
        cells = "".join(
            f'<td class="n">{cell:.6g}</td>'
            if isinstance(cell, int | float) and not isinstance(cell, bool)
            else f"<td>{_text('' if cell is None else cell)}</td>"
            for cell in row
        )
        lines.append(f"<tr>{cells}</tr>")
    lines.append("</table>")
    return "".join(lines)


def _section(title: str, *content: str) -> str:
    return f"<h2>{_text(title)}</h2>{''.join(content)}"


def _generic(value: Any) -> str:
    """Any plain data as nested tables, for the parts that have no picture."""
    if isinstance(value, Mapping):
        rows = "".join(
            f"<tr><th>{_text(str(k).replace('_', ' '))}</th><td>{_generic(v)}</td></tr>"
            for k, v in value.items()
        )
        return f"<table>{rows}</table>"
    if isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) for v in value):
        keys = list(dict.fromkeys(k for v in value for k in v))
        cells = [[_short(v.get(k)) for k in keys] for v in value]
        return _table(cells, [str(k).replace("_", " ") for k in keys])
    return _text(_short(value))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list | tuple):
        return ", ".join(str(_short(v)) for v in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    return value


# What the page shows as pictures or in its summary; every other part of the report is a table.
_SHOWN = frozenset(
    {
        "report_version",
        "command",
        "command_line",
        "time",
        "environment",
        "model",
        "scheme",
        "calibration_text",
        "seconds",
        "peak_memory_bytes",
        "evaluation",
        "prefix",
        "blocks",
        "recipe",
        "quantization",
    }
)


def _summary(report: Mapping[str, Any]) -> str:
    rows = [
        ["model", report["model"]],
        ["scheme", report["scheme"]],
        ["prefix", describe_prefix(report["quantization"])],
        ["calibration text", report["calibration_text"]],
        ["time", format_seconds(report["seconds"])],
        *(
            [f"peak memory, {where}", format_bytes(count)]
            for where, count in report["peak_memory_bytes"].items()
        ),
    ]
    if "evaluation" in report:
        rows.append(["perplexity", f"{report['evaluation']['ppl']:.4g}"])
    return _table(rows)


def _prefix_section(prefix: Mapping[str, Any], eta: float) -> str:
    """The search step by step, with each block's largest token maximum at every step."""
    steps = prefix["steps"]
    curves = {f"prefix {prefix_name(step['text'])}": step["max_ratio"] for step in steps}
    content = []
    if curves:
        content.append(
            "<p>Input of down_proj, block by block: the largest token-wise maximum over the median "
            "one, at each step of the search.</p>"
            + line_chart(
                curves,
                x_label="block",
                y_label="largest / median token maximum",
                log=True,
                mark=(f"eta = {eta:g}", eta),
            )
        )
    rest = [{k: v for k, v in step.items() if k != "max_ratio"} for step in steps]
    if rest:
        content.append(_generic(rest))
    content.append(_generic({k: v for k, v in prefix.items() if k != "steps"}))
    return _section("Prefix", *content)


def _blocks_section(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Every number that the blocks have in common, drawn over the blocks, errors first."""
    keys = [
        k
        for k in dict.fromkeys(k for block in blocks for k in block)
        if k not in ("block", "index") and any(isinstance(b.get(k), int | float) for b in blocks)
    ]
    keys.sort(key=lambda k: "error" not in k)
    charts = [
        f"<h3>{_text(key.replace('_', ' '))}</h3>"
        + line_chart(
            {key: [block.get(key) for block in blocks]},
            x_label="block",
            y_label=key.replace("_", " "),
            log="error" in key,
        )
        for key in keys
    ]
    return _section(
        "Blocks", *charts, "<details><summary>All values</summary>", _generic(blocks), "</details>"
    )


def render_html(report: Mapping[str, Any]) -> str:
    """The page of a `quantize` report."""
    report = plain(report)
    parts = [_summary(report)]
    if "prefix" in report:
        parts.append(_prefix_section(report["prefix"], report["recipe"]["eta"]))
    if report.get("blocks"):
        parts.append(_blocks_section(report["blocks"]))
    parts += [
        _section(key.replace("_", " ").capitalize(), _generic(value))
        for key, value in report.items()
        if key not in _SHOWN
    ]
    if "evaluation" in report:
        parts.append(_section("Evaluation", _generic(report["evaluation"])))
    parts.append(_section("Recipe", _generic(report["recipe"])))
    parts.append(
        _section(
            "How it was made",
            f"<pre>{_text(report['command_line'])}</pre>",
            _generic(report["environment"]),
        )
    )
    title = f"prefixquant: {_text(report['model'])}, {_text(report['scheme'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )
