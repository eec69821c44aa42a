# SPDX-License-Identifier: Apache-2.0
"""Continuing a prompt with whatever a folder holds: the runtime where it can, transformers else."""

import os
from collections.abc import Callable
from typing import Any

import torch

from prefixquant.checkpoint import is_prefixquant_checkpoint
from prefixquant.errors import UnsupportedModelError
from prefixquant.loading import load_tokenizer
from prefixquant.runtime.sampling import Sampling

# (prompt ids, max_new_tokens, sampling, streamer or None) -> new tokens
Continue = Callable[[list[int], int, Sampling, Any], list[int]]


def load_continuation(
    target: str | os.PathLike, device: torch.device, head_bits: int = 16
) -> tuple[Continue, Any]:
    """(a function that continues prompts, the tokenizer) of a checkpoint or of a float model.

    A checkpoint runs in the `Runtime`; float models and checkpoints with 16-bit activations run as
    transformers models. A streamer (of transformers) gets the prompt first, then every new token.
    """
    if is_prefixquant_checkpoint(target):
        from prefixquant.runtime import Runtime

        try:
            runtime = Runtime.from_checkpoint(target, device=device, head_bits=head_bits)
        except UnsupportedModelError:
            pass
        else:
            return _with_runtime(runtime), load_tokenizer(target)
    from prefixquant.workflow import load_any

    model, tokenizer = load_any(target, device)
    return _with_transformers(model, tokenizer), tokenizer


def _with_runtime(runtime: Any) -> Continue:
    def continue_prompt(
        ids: list[int], max_new_tokens: int, sampling: Sampling, streamer: Any
    ) -> list[int]:
        if streamer is not None:
            streamer.put(torch.tensor(ids))
        new = []
        for (token,) in runtime.stream([ids], max_new_tokens, sampling):
            new.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return new

    return continue_prompt


def _with_transformers(model: Any, tokenizer: Any) -> Continue:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def continue_prompt(
        ids: list[int], max_new_tokens: int, sampling: Sampling, streamer: Any
    ) -> list[int]:
        torch.manual_seed(sampling.seed)
        options: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            options = {"do_sample": True, "temperature": sampling.temperature}
            options |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
        prompt = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                pad_token_id=pad,
                **options,
            )
        return output[0, len(ids) :].tolist()

    return continue_prompt
