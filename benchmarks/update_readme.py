# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md from the JSON files under benchmarks/results.

Usage: python benchmarks/update_readme.py [--check]

A result file holds ``"table"`` (a name), ``"columns"``, ``"rows"``, and may hold ``"title"`` and
``"note"``, beside whatever else was recorded (environment, protocol, samples). README.md names a
table between ``<!-- table:name -->`` and ``<!-- /table -->``; every file of that name goes there,
in the order of the file names. ``--check`` writes nothing and fails where README.md would change.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def format_cell(value) -> str:
    """Four significant digits for a measured number, text as it is, an empty cell for null."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def markdown_table(result: dict) -> str:
    columns, rows = result["columns"], result["rows"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {row}: expected {len(columns)} cells, got {len(row)}")
    align = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [columns, align, *rows]
    text = "\n".join("| " + " | ".join(format_cell(c) for c in line) + " |" for line in lines)
    title = f"**{result['title']}**\n\n" if result.get("title") else ""
    note = f"\n\n{result['note']}" if result.get("note") else ""
    return f"{title}{text}{note}\n"


def update(readme: str, results: list[dict]) -> str:
    """README text with every marked table replaced; a table with no result file says so."""

    def replace(match: re.Match) -> str:
        tables = [markdown_table(r) for r in results if r["table"] == match.group(2)]
        body = "\n".join(tables) or "*Not measured yet.*\n"
        return f"{match.group(1)}{body}{match.group(3)}"

    return _MARKED.sub(replace, readme)


def load_results(folder: Path) -> list[dict]:
    results = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.rglob("*.json"))]
    return [r for r in results if isinstance(r, dict) and "table" in r]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = update(before, load_results(ROOT / "benchmarks" / "results"))
    if arguments.check:
        if before != after:
            print("README.md differs from benchmarks/results: run benchmarks/update_readme.py")
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
