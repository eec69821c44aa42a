# SPDX-License-Identifier: Apache-2.0
"""Calibration and evaluation text: where it comes from, and how it becomes token windows.

The default needs no network: the language reference that every Python installation carries
(`pydoc_data.topics`, about 465,000 characters of English).
"""

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from prefixquant.errors import UserError

PYDOC = "pydoc"
_SUFFIXES = (".txt", ".jsonl")


def load_text(name_or_path: str | os.PathLike) -> str:
    """Reads text by name or from a file.

    Args:
        name_or_path: ``"pydoc"``, or a .txt or .jsonl file (one object with a ``text`` a line),
            either of them also as .gz.

    Raises:
        UserError: no such file, not text, or nothing in it.
    """
    if str(name_or_path) == PYDOC:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(name_or_path)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not path.exists():
        raise UserError(f"text {path}: no such file (and {PYDOC!r} is the only named text)")
    if not path.is_file():
        raise UserError(f"text {path}: expected a file, found a folder")
    if kind not in _SUFFIXES:
        raise UserError(f"text {path}: expected .txt or .jsonl, or either with .gz")
    text = _read(path)
    if kind == ".jsonl":
        text = "\n\n".join(_jsonl_texts(text, path))
    if not text.strip():
        raise UserError(f"text {path}: the file is empty")
    return text


def _read(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"text {path}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"text {path}: not UTF-8 at byte {error.start}") from error


def _jsonl_texts(content: str, path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"text {path}: line {number} is not valid JSON") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise UserError(f"text {path}: line {number} has no text under the key 'text'")
        texts.append(entry["text"])
    return texts


def tokenize(text: str, tokenizer: Any) -> torch.Tensor:
    """The whole text in one call, without special tokens: int64 [n].

    The prefix brings its own BOS; one more inside the text would be measured as if it were text.
    """
    # Some tokenizers warn about texts longer than the model's context: it is cut in windows later.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def split_tokens(tokens: torch.Tensor, fraction: float = 0.82) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``fraction`` for calibration, the rest for evaluation: no token serves both."""
    if not 0 < fraction < 1:
        raise UserError(f"split: expected a fraction between 0 and 1, got {fraction}")
    cut = int(len(tokens) * fraction)
    return tokens[:cut], tokens[cut:]


def sample_windows(
    tokens: torch.Tensor, nsamples: int, seqlen: int, seed: int = 0, what: str = "calibration text"
) -> torch.Tensor:
    """``nsamples`` random windows of ``seqlen`` tokens, none overlapping: int64 [nsamples, seqlen].

    The text is cut in windows from a random start, and windows are drawn without repeating.

    Raises:
        UserError: fewer than nsamples * seqlen tokens.
    """
    _need(len(tokens), nsamples * seqlen, f"{nsamples} windows of {seqlen}", what)
    generator = torch.Generator().manual_seed(seed)
    count = len(tokens) // seqlen
    spare = len(tokens) - count * seqlen
    start = int(torch.randint(spare + 1, (), generator=generator))
    windows = tokens[start : start + count * seqlen].view(count, seqlen)
    return windows[torch.randperm(count, generator=generator)[:nsamples]].clone()


def tokenize_samples(
    text: str, tokenizer: Any, nsamples: int, seqlen: int, seed: int = 0
) -> torch.Tensor:
    """`tokenize`, then `sample_windows`."""
    return sample_windows(tokenize(text, tokenizer), nsamples, seqlen, seed)


def leading_windows(
    tokens: torch.Tensor, seqlen: int, limit: int | None = None, what: str = "evaluation text"
) -> torch.Tensor:
    """The first ``limit`` windows in order, the tail dropped: int64 [n, seqlen], for perplexity."""
    _need(len(tokens), seqlen, f"a window of {seqlen}", what)
    count = len(tokens) // seqlen
    if limit is not None:
        count = min(count, limit)
    return tokens[: count * seqlen].view(count, seqlen)


def _need(found: int, needed: int, purpose: str, what: str) -> None:
    if found < needed:
        raise UserError(
            f"{what}: {found} tokens found, {needed} needed for {purpose}; "
            f"give a longer text or ask for less"
        )
