# SPDX-License-Identifier: Apache-2.0
"""How fast a loaded model reads and writes, as a user would see it: plain `generate`, batch 1.

Benchmarks with baselines live in benchmarks/; this is the figure of one model on one machine, for
its report.
"""

import time
from typing import Any

import torch
from torch import Tensor

_PROMPT, _NEW, _REPEATS = 512, 32, 3


@torch.inference_mode()
def measure_speed(model: Any, tokens: Tensor) -> dict[str, float]:
    """Median of three, after one run to warm up.

    Args:
        model: a transformers causal LM.
        tokens: int64 [T], the first 512 of which are the prompt.

    Returns:
        ``prefill_tokens_per_second``, ``decode_tokens_per_second``, ``prompt_tokens`` and
        ``new_tokens``.
    """
    prompt = tokens[:_PROMPT][None].to(model.device)
    reading, writing = [], []
    for _ in range(1 + _REPEATS):
        reading.append(_seconds(model, prompt, 1))
        writing.append(_seconds(model, prompt, 1 + _NEW) - reading[-1])
    prefill, decode = (sorted(times[1:])[_REPEATS // 2] for times in (reading, writing))
    return {
        "prefill_tokens_per_second": prompt.shape[1] / prefill,
        "decode_tokens_per_second": _NEW / max(decode, 1e-9),
        "prompt_tokens": prompt.shape[1],
        "new_tokens": _NEW,
    }


def _seconds(model: Any, prompt: Tensor, new_tokens: int) -> float:
    _wait(model)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    _wait(model)
    return time.perf_counter() - start


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
