# SPDX-License-Identifier: Apache-2.0
"""One target, and what every section reads the result files with."""

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """One promise: ``measured`` must be at least ``wanted`` (or ``at_most`` that); None was not
    measured.

    A target that does not decide is printed for information: a part of a mean, say.
    """

    what: str
    wanted: float
    measured: float | None
    unit: str = "x"
    decides: bool = True
    at_most: bool = False

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


def load(folder: Path, name: str) -> list[tuple[str, dict]]:
    """(GPU folder, content) of every result file of that name."""
    found = sorted(folder.rglob(f"{name}.json"))
    return [(p.parent.name, json.loads(p.read_text(encoding="utf-8"))) for p in found]


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
