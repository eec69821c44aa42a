# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere.

Everything goes to stderr, so that stdout holds results alone. The library takes any of these
objects as its ``progress`` argument and prints nothing by itself:

    with progress.stage("calibrate", total=30) as advance:
        for block in blocks:
            work(block)
            advance()
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[..., None]  # advance(steps=1)


class Progress:
    """Says nothing: the default of every library function."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        yield lambda steps=1: None

    def note(self, text: str) -> None:
        """One line that stays on the screen."""


SILENT = Progress()


class PlainProgress(Progress):
    """Lines for logs: at the start and end of a stage and at most every ``interval`` seconds."""

    def __init__(self, stream: TextIO | None = None, interval: float = 10.0):
        self._stream = stream or sys.stderr
        self._interval = interval

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        start = last = time.monotonic()
        done = 0

        def advance(steps: int = 1) -> None:
            nonlocal done, last
            done += steps
            now = time.monotonic()
            if total and done < total and now - last >= self._interval:
                last = now
                left = (now - start) / done * (total - done) if done else 0
                self.note(f"{name}: {done}/{total}, {format_seconds(left)} left")

        self.note(f"{name} ...")
        yield advance
        self.note(f"{name}: done in {format_seconds(time.monotonic() - start)}")


class TerminalProgress(Progress):
    """Bars drawn by rich, with the time left; stages inside stages are lines below one another."""

    def __init__(self):
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._live = None
        self._depth = 0

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        if self._live is None:
            self._live = self._bars()
            self._live.start()
        live = self._live
        task = live.add_task(name, total=total)
        self._depth += 1
        start = time.monotonic()
        finished = False
        try:
            yield lambda steps=1: live.update(task, advance=steps)
            finished = True
        finally:
            live.remove_task(task)
            self._depth -= 1
            if self._depth == 0:
                live.stop()
                self._live = None
            if finished:
                self.note(f"{name}: {format_seconds(time.monotonic() - start)}")

    def _bars(self):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )


def for_stream(stream: TextIO | None = None) -> Progress:
    """The progress that suits stderr: bars on a terminal, lines elsewhere."""
    stream = stream or sys.stderr
    return TerminalProgress() if stream.isatty() else PlainProgress(stream)


def format_seconds(seconds: float) -> str:
    """``75.2 -> "1 min 15 s"``, ``3.21 -> "3.2 s"``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
