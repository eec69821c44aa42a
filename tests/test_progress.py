# SPDX-License-Identifier: Apache-2.0
"""Progress goes to stderr: lines in a log, bars on a terminal, nothing by default."""

import io

import pytest
from prefixquant import progress as progress_module
from prefixquant.progress import SILENT, PlainProgress, TerminalProgress, for_stream, format_seconds


def test_silent(capsys):
    with SILENT.stage("x", total=2) as advance:
        advance()
        advance(2)
    SILENT.note("text")
    assert capsys.readouterr() == ("", "")


def test_plain_lines(monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with PlainProgress(stream, interval=10).stage("calibrate", total=4) as advance:
        for _ in range(4):
            advance()
    assert stream.getvalue().splitlines() == [
        "calibrate ...",
        "calibrate: 2/4, 10 s left",
        "calibrate: done in 25 s",
    ]


def test_a_failed_stage_is_not_done():
    stream = io.StringIO()
    with pytest.raises(KeyError), PlainProgress(stream).stage("work"):
        raise KeyError
    assert "done" not in stream.getvalue()


def test_terminal_bars_nest_and_leave_stdout_alone(capsys):
    progress = TerminalProgress()
    with progress.stage("outer", total=1) as advance:
        with progress.stage("inner") as inner:
            inner()
        advance()
    progress.note("[not markup]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "outer: 0" in captured.err
    assert "inner: 0" in captured.err
    assert "[not markup]" in captured.err


def test_choice_by_stream():
    assert isinstance(for_stream(io.StringIO()), PlainProgress)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.6, "1 min 0 s"),
        (75.2, "1 min 15 s"),
        (3700, "1 h 1 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
