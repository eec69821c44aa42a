# SPDX-License-Identifier: Apache-2.0
"""Text sources and token windows."""

import gzip
import json

import pytest
import torch
from prefixquant.errors import UserError
from prefixquant.text import (
    leading_windows,
    load_text,
    sample_windows,
    split_tokens,
    tokenize,
    tokenize_samples,
)


class LetterTokenizer:
    """One token a character; a BOS if special tokens are asked for."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


def test_pydoc_is_there_and_long():
    text = load_text("pydoc")
    assert len(text) > 300_000
    assert "statement" in text


def test_files(tmp_path):
    lines = "\n".join(json.dumps({"text": t, "id": 1}) for t in ("one", "two")) + "\n"
    for name, content, expected in (
        ("a.txt", "häuser".encode(), "häuser"),
        ("a.txt.gz", gzip.compress(b"zipped"), "zipped"),
        ("a.jsonl", lines.encode(), "one\n\ntwo"),
        ("a.jsonl.gz", gzip.compress(lines.encode()), "one\n\ntwo"),
    ):
        (tmp_path / name).write_bytes(content)
        assert load_text(tmp_path / name) == expected
        assert load_text(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b" \n ", "the file is empty"),
        ("a.txt", b"ok \xff", "not UTF-8 at byte 3"),
        ("a.pdf", b"%PDF", "expected .txt or .jsonl"),
        ("a.gz", b"", "expected .txt or .jsonl"),
        ("a.txt.gz", b"plain", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 999)[:-9], "cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 999)[:12] + b"\xff" * 30, "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}', "line 2 has no text"),
        ("a.jsonl", b'{"text": 1}', "line 1 has no text"),
        ("a.jsonl", b"[1]", "line 1 has no text"),
        ("a.jsonl", b"{", "line 1 is not valid JSON"),
        ("a.jsonl", b"", "the file is empty"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text(tmp_path / name)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match="found a folder"):
        load_text(tmp_path)


def test_tokenize_adds_no_special_token():
    assert tokenize("abc", LetterTokenizer()).tolist() == [97, 98, 99]


def test_windows_do_not_overlap_and_follow_the_seed():
    tokens = torch.arange(1003)
    windows = sample_windows(tokens, 50, 20, seed=3)
    assert windows.shape == (50, 20)
    assert windows.flatten().unique().numel() == 1000
    assert torch.equal(windows[:, 1:], windows[:, :1] + torch.arange(1, 20))
    assert torch.equal(windows, sample_windows(tokens, 50, 20, seed=3))
    assert not torch.equal(windows, sample_windows(tokens, 50, 20, seed=4))
    starts = {int(sample_windows(tokens, 1, 20, seed=s)[0, 0]) % 20 for s in range(40)}
    assert starts == {0, 1, 2, 3}  # the 3 spare tokens move the grid


def test_too_short_says_what_is_there_and_what_is_needed():
    with pytest.raises(UserError, match=r"99 tokens found, 100 needed for 5 windows of 20"):
        sample_windows(torch.arange(99), 5, 20)
    assert sample_windows(torch.arange(100), 5, 20).shape == (5, 20)
    with pytest.raises(UserError, match="3 tokens found, 8 needed"):
        tokenize_samples("abc", LetterTokenizer(), 2, 4)
    with pytest.raises(UserError, match="9 tokens found, 10 needed"):
        leading_windows(torch.arange(9), 10)


def test_split_and_leading_windows():
    first, last = split_tokens(torch.arange(100))
    assert (len(first), len(last)) == (82, 18)
    assert int(last[0]) == 82
    assert (
        leading_windows(torch.arange(105), 10, 4).tolist() == torch.arange(40).view(4, 10).tolist()
    )
    assert leading_windows(torch.arange(105), 10).shape == (10, 10)
    with pytest.raises(UserError, match="fraction"):
        split_tokens(torch.arange(10), 1.0)
