# SPDX-License-Identifier: Apache-2.0
"""Prints each target of the project beside its measured figure. Standard library only.

    python benchmarks/targets.py SECTION [--results FOLDER]

Reads the committed JSON under benchmarks/results. Exits 1 where a figure falls short or is missing.
A section is a module of target_sections with a function that yields Targets; add it to SECTIONS.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from target_sections.accuracy import accuracy
from target_sections.engine import engine
from target_sections.fused import fused
from target_sections.gemm import gemm
from target_sections.target import Target

RESULTS = Path(__file__).resolve().parent / "results"

SECTIONS: dict[str, Callable[[Path], Iterator[Target]]] = {
    "gemm": gemm,
    "accuracy": accuracy,
    "fused": fused,
    "engine": engine,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=sorted(SECTIONS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    targets = list(SECTIONS[args.section](args.results))
    width = max(len(t.what) for t in targets)
    for t in targets:
        measured = "not measured" if t.measured is None else f"{t.measured:.2f}{t.unit}"
        verdict = "met" if t.met else "SHORT" if t.decides else "below (information)"
        wanted = f"{'<= ' if t.at_most else ''}{t.wanted:.2f}{t.unit}"
        print(f"{t.what:<{width}}  wanted {wanted}  measured {measured}  {verdict}")
    deciding = [t for t in targets if t.decides]
    short = sum(not t.met for t in deciding)
    print(f"{len(deciding) - short} of {len(deciding)} met")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
