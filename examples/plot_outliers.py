# SPDX-License-Identifier: Apache-2.0
"""Draws what the prefix does, from the report of a checkpoint, as one SVG file.

    python examples/plot_outliers.py model-w4a4kv4 outliers.svg

The same numbers are in the checkpoint's report.html; this shows how to read report.json.
"""

import json
import re
import sys
from pathlib import Path

from prefixquant.report_charts import line_chart

# A picture of its own brings its colours: it is looked at on white pages and on black ones.
STYLE = (
    "<style>svg{font:11px sans-serif;background:#fff}text{fill:#222}"
    ".grid{stroke:#222;stroke-opacity:.15}</style>"
)


def main(checkpoint: str, output: str) -> None:
    report = json.loads((Path(checkpoint) / "report.json").read_text())
    search = report["prefix"]
    prefixes = [step["prefix"] for step in search["steps"]]
    chosen = prefixes.index(search["prefix"])
    block = search["profiles"]["block"]
    first, last = (search["profiles"]["steps"][i]["before_r4"] for i in (0, chosen))
    chart = line_chart(
        {"no prefix": first, "prefix in front": last},
        x_label=f"token of one window; block {block}, input of down_proj",
        y_label="largest |x| of the token",
        log=True,
        dots_only=True,
    )
    svg = re.search(r"<svg.*</svg>", chart, re.DOTALL)[0]
    head, rest = svg.split(">", 1)
    Path(output).write_text(f"{head}>{STYLE}{rest}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
