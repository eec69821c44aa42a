# SPDX-License-Identifier: Apache-2.0
"""report.html: the report as one self-contained page, with inline SVG and nothing loaded."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from prefixquant.progress import format_seconds
from prefixquant.report import describe_prefix, format_bytes, plain, prefix_name
from prefixquant.report_charts import escape, line_chart

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 780px; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 2em; }
table { border-collapse: collapse; }
h1 { font-size: 1.6em; overflow-wrap: anywhere; }
td, th { padding: .15em .9em .15em 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: currentColor; }
svg .grid { stroke: currentColor; stroke-opacity: .15; }
pre { overflow-x: auto; font-size: 12px; }
"""


def _table(rows: Sequence[Sequence[Any]], header: Sequence[str] | None = None) -> str:
    lines = ["<table>"]
    if header:
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>")
    for row in rows:
        cells = "".join(
            f'<td class="n">{cell:.6g}</td>'
            if isinstance(cell, int | float) and not isinstance(cell, bool)
            else f"<td>{escape('' if cell is None else cell)}</td>"
            for cell in row
        )
        lines.append(f"<tr>{cells}</tr>")
    lines.append("</table>")
    return "".join(lines)


def _section(title: str, *content: str) -> str:
    return f"<h2>{escape(title)}</h2>{''.join(content)}"


def _generic(value: Any) -> str:
    """Any plain data as nested tables, for the parts that have no picture."""
    if isinstance(value, Mapping):
        rows = "".join(
            f"<tr><th>{escape(str(k).replace('_', ' '))}</th><td>{_generic(v)}</td></tr>"
            for k, v in value.items()
        )
        return f"<table>{rows}</table>"
    if isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) for v in value):
        keys = list(dict.fromkeys(k for v in value for k in v))
        cells = [[_short(v.get(k)) for k in keys] for v in value]
        return _table(cells, [str(k).replace("_", " ") for k in keys])
    return escape(_short(value))


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
        "fingerprint",
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


# Of a step of the search: what the charts and the table of the prefix show.
_DRAWN = (
    "max_ratio", "inner_ratio", "largest", "median", "smallest", "outliers", "before_r4", "prefix",
    "text", "outlier_tokens", "float_perplexity",
)  # fmt: skip


def _prefix_section(prefix: Mapping[str, Any], eta: float) -> str:
    """Token-wise maxima without and with the prefix, before and after R4, and the control table."""
    steps = prefix["steps"]
    names = [f"prefix {prefix_name(step['text'])}" for step in steps]
    chosen = _chosen_step(prefix)
    shown = list(dict.fromkeys((0, chosen)))  # the charts; the table has every step
    content = [_headline(steps, chosen), _profile_chart(prefix, names, shown)]
    ratios = {}
    for step in shown:
        part = _before_r4(steps[step])
        ratios[f"{names[step]}, before R4"] = part["max_ratio"]
        ratios[f"{names[step]}, before R4, position 0 apart"] = part.get("inner_ratio", [])
        ratios[f"{names[step]}, after R4"] = steps[step]["max_ratio"]
    content.append(
        "<h3>Largest token over the median token, block by block, all windows</h3>"
        "<p>The token at position 0 of a window is torn out of its text; without prefix it is the "
        "outlier of every window, with one it is an outlier now and then.</p>"
        + line_chart(
            {name: curve for name, curve in ratios.items() if curve},
            x_label="block",
            y_label="largest / median token maximum",
            log=True,
            mark=(f"eta = {eta:g}", eta),
        )
    )
    content += [_extremes_chart(names, steps, shown), _outliers_chart(names, steps, shown)]
    content.append("<h3>What each prefix leaves, and what it does to the float model</h3>")
    content.append(_control_table(steps))
    rest = [{k: v for k, v in step.items() if k not in _DRAWN} for step in steps]
    if any(rest):
        content.append(_details("Most frequent outlier tokens", _generic(rest)))
    about = {k: v for k, v in prefix.items() if k not in ("steps", "profiles")}
    return _section("Prefix", *content, _generic(about))


def _before_r4(step: Mapping[str, Any]) -> Mapping[str, Any]:
    """The maxima where the papers take them; those after R4 where the report has no others."""
    return step.get("before_r4") or step


def _chosen_step(prefix: Mapping[str, Any]) -> int:
    """The step whose prefix was taken: the last one, where the report does not say."""
    taken = prefix.get("prefix")
    found = [i for i, step in enumerate(prefix["steps"]) if step.get("prefix") == taken]
    return found[0] if taken is not None and found else len(prefix["steps"]) - 1


def _headline(steps: Sequence[Mapping[str, Any]], chosen: int) -> str:
    """One sentence: where the worst block is, and what becomes of it."""
    before, after = _before_r4(steps[0]), _before_r4(steps[chosen])
    known = [i for i, ratio in enumerate(before["max_ratio"]) if ratio is not None]
    inner = after.get("inner_ratio") or after["max_ratio"]
    if not known or chosen == 0:
        return ""
    block = max(known, key=before["max_ratio"].__getitem__)
    if inner[block] is None:
        return ""
    return (
        f"<p>Input of down_proj. In block {block} the largest token stands at "
        f"<b>{before['max_ratio'][block]:.0f}</b> medians with prefix "
        f"{escape(prefix_name(steps[0]['text']))}. With prefix "
        f"{escape(prefix_name(steps[chosen]['text']))} no token after position 0 stands above "
        f"<b>{inner[block]:.1f}</b>.</p>"
    )


def _profile_chart(prefix: Mapping[str, Any], names: Sequence[str], shown: Sequence[int]) -> str:
    profiles = prefix.get("profiles")
    if not profiles:
        return ""
    curves = {
        f"{names[step]}, {where}": profiles["steps"][step][key]
        for step in shown
        for key, where in (("before_r4", "before R4"), ("quantized", "after R4"))
    }
    return (
        f"<h3>Token-wise maxima in block {profiles['block']}, one window of text</h3>"
        + line_chart(
            curves, x_label="token", y_label="largest |x| of the token", log=True, dots_only=True
        )
    )


def _extremes_chart(
    names: Sequence[str], steps: Sequence[Mapping[str, Any]], shown: Sequence[int]
) -> str:
    curves = {
        f"{names[step]}, {key}": steps[step][key]
        for step in shown
        for key in ("largest", "median", "smallest")
        if key in steps[step]
    }
    if not curves:
        return ""
    return (
        "<h3>Largest, median and smallest token maximum, after R4</h3>"
        "<p>One static scale serves a tensor as far as these three lie close together.</p>"
        + line_chart(curves, x_label="block", y_label="largest |x| of a token", log=True)
    )


def _outliers_chart(
    names: Sequence[str], steps: Sequence[Mapping[str, Any]], shown: Sequence[int]
) -> str:
    curves = {
        f"{names[step]}, {where}": part["outliers"]
        for step in shown
        for where, part in (
            ("before R4", steps[step].get("before_r4", {})),
            ("after R4", steps[step]),
        )
        if "outliers" in part
    }
    if not curves:
        return ""
    return "<h3>Outlier tokens, all windows</h3>" + line_chart(
        curves, x_label="block", y_label="tokens above eta medians"
    )


def _control_table(steps: Sequence[Mapping[str, Any]]) -> str:
    def largest(part: Mapping[str, Any], key: str = "max_ratio") -> float | None:
        return max((r for r in part.get(key, []) if r is not None), default=None)

    rows = [
        [
            prefix_name(step["text"]),
            step["outlier_tokens"],
            largest(step.get("before_r4", {})),
            largest(step.get("before_r4", {}), "inner_ratio"),
            largest(step),
            step["float_perplexity"],
        ]
        for step in steps
    ]
    header = [
        "prefix",
        "outlier tokens",
        "largest ratio before R4",
        "position 0 apart",
        "after R4",
        "float perplexity",
    ]
    return _table(rows, header)


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _blocks_section(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Errors and scales over the blocks."""

    def curve(read: Callable[[Mapping[str, Any]], Any]) -> list[Any]:
        return [read(block) for block in blocks]

    def numbers(part: str) -> list[str]:
        keys = dict.fromkeys(k for block in blocks for k in block)
        return [
            k
            for k in keys
            if part in k and any(isinstance(block.get(k), int | float) for block in blocks)
        ]

    charts = [
        "<h3>Error of each block's output, relative, summed up on the way</h3>",
        line_chart(
            {k.replace("_", " "): curve(lambda b, k=k: b.get(k)) for k in numbers("error")},
            x_label="block",
            y_label="relative squared error",
            log=True,
        ),
    ]
    roles = dict.fromkeys(role for block in blocks for role in block.get("weight_errors") or {})
    if roles:
        charts.append("<h3>Error of each linear's output by its weights</h3>")
        errors = {
            role: curve(lambda b, r=role: (b.get("weight_errors") or {}).get(r)) for role in roles
        }
        charts.append(line_chart(errors, x_label="block", y_label="relative error", log=True))
    if numbers("_scale"):
        scales = {k.replace("_", " "): curve(lambda b, k=k: b.get(k)) for k in numbers("_scale")}
        charts.append("<h3>Activation scales</h3>")
        charts.append(line_chart(scales, x_label="block", y_label="scale", log=True))
    heads = {
        f"{name} {word}": curve(lambda b, n=name, pick=pick: pick(b[f"{n}_scale"]))
        for name in ("k", "v")
        for word, pick in (("largest head", max), ("smallest head", min))
        if all(isinstance(block.get(f"{name}_scale"), list) for block in blocks)
    }
    if heads:
        charts.append("<h3>K and V scales</h3>")
        charts.append(line_chart(heads, x_label="block", y_label="scale", log=True))
    return _section("Blocks", *charts, _details("All values", _generic(blocks)))


def _evaluation_section(evaluation: Mapping[str, Any]) -> str:
    """Accuracy and speed, each with the protocol beside it."""
    protocol = evaluation.get("protocol", {})
    named = {
        "ppl": "perplexity",
        "reference_ppl": "perplexity of the float model",
        "kl": "KL divergence from it",
        "top1": "share of equal likeliest tokens",
    }
    rows = [[text, evaluation[key]] for key, text in named.items() if key in evaluation]
    speed = evaluation.get("speed") or {}
    rows += [[k.replace("_", " "), v] for k, v in speed.items()]
    content = [_table(rows)]
    if protocol:
        content.append(
            f"<p>{protocol['windows']} windows of {protocol['seqlen']} tokens of "
            f"{escape(protocol['text'])}, the last {100 * protocol['tail']:.0f}% of the text.</p>"
        )
    return _section("Accuracy and speed", *content)


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
        parts.append(_evaluation_section(report["evaluation"]))
    parts.append(_section("Recipe", _generic(report["recipe"])))
    parts.append(
        _section(
            "How it was made",
            f"<pre>{escape(report['command_line'])}</pre>",
            _generic(report["environment"]),
        )
    )
    name = report["model"]
    if name.startswith((".", "/", "~")) or "\\" in name:  # a path: its last part says enough
        name = PurePath(name).name
    title = f"prefixquant: {escape(name)}, {escape(report['scheme'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )
