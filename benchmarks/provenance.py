# SPDX-License-Identifier: Apache-2.0
"""Where a result comes from: the commit it was measured at. Standard library only."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str) -> str:
    """What a program prints, run at the root of the repository; "unknown" where it cannot."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def commit() -> str:
    """Ten digits of the commit, with a + where tracked files differ from it.

    PREFIXQUANT_COMMIT names it where the sources travel without their repository.
    """
    return os.environ.get("PREFIXQUANT_COMMIT") or command(
        "git", "describe", "--always", "--exclude=*", "--dirty=+", "--abbrev=10"
    )
