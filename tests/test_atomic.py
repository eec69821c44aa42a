# SPDX-License-Identifier: Apache-2.0
"""Folders and files that appear whole or not at all; kills are tests/test_resume_process.py's."""

import errno
import os
import stat

import pytest
from prefixquant import atomic


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "made"
    for text in ("first", "second"):
        with atomic.atomic_folder(target) as folder:
            (folder / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() != text
        assert (target / "file").read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_a_failure_leaves_what_stood_there(tmp_path):
    target = tmp_path / "made"
    target.mkdir()
    (target / "file").write_text("old")

    def fail():
        with atomic.atomic_folder(target) as folder:
            (folder / "file").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def fail_to_flush(monkeypatch, kind):
    """A disk on which fsync fails for files or for folders."""
    flush = os.fsync

    def failing(handle):
        if kind(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "cannot flush this")
        flush(handle)

    monkeypatch.setattr(os, "fsync", failing)


def test_a_file_system_that_cannot_flush_folders_is_good_enough(tmp_path, monkeypatch):
    fail_to_flush(monkeypatch, stat.S_ISDIR)
    with atomic.atomic_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "made" / "file").read_text() == "whole"
    (tmp_path / "partial").write_text("whole")
    atomic.place_file(tmp_path / "partial", tmp_path / "named")
    assert (tmp_path / "named").read_text() == "whole"


def test_a_file_that_cannot_be_flushed_does_not_get_its_name(tmp_path, monkeypatch):
    fail_to_flush(monkeypatch, stat.S_ISREG)
    with pytest.raises(OSError, match="cannot flush"), atomic.atomic_folder(tmp_path / "made") as f:
        (f / "file").write_text("lost")
    assert not any(tmp_path.iterdir())
    (tmp_path / "partial").write_text("lost")
    with pytest.raises(OSError, match="cannot flush"):
        atomic.place_file(tmp_path / "partial", tmp_path / "named")
    assert not (tmp_path / "named").exists()
