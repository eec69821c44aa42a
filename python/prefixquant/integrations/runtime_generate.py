# SPDX-License-Identifier: Apache-2.0
"""``model.generate`` on the runtime, for requests that it answers as transformers would.

transformers resolves a request to a mode, logits processors and stopping criteria, and hands them
to ``custom_generate``. Greedy search, and sampling by temperature, top-k and top-p, go to
`Runtime`; any other request is answered by the model's own `generate`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefixquant.errors import UnsupportedModelError
from prefixquant.modeling.runtime_weights import runtime_weights
from prefixquant.runtime import Runtime, Sampling

_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
}


class _NotPlainError(Exception):
    """A request for the model's own `generate`."""


def generate_on_runtime(model: nn.Module) -> Runtime | None:
    """Makes ``model.generate`` answer by a `Runtime` on the model's own tensors where it can.

    Returns:
        The runtime; None where it cannot run this model, whose `generate` then stays as it is.
    """
    try:
        runtime = Runtime(runtime_weights(model))
    except UnsupportedModelError:
        return None
    model.generate = _Generate(model, runtime)
    return runtime


class _Generate:
    """What replaces ``model.generate``."""

    def __init__(self, model: nn.Module, runtime: Runtime):
        self.model = model
        self.runtime = runtime

    def __call__(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        generate: Callable = type(self.model).generate
        if kwargs.get("custom_generate") is None:
            with contextlib.suppress(_NotPlainError):
                # The streamer stays here: it must not see a prompt twice.
                decode = _Decoding(self.runtime, streamer)
                return generate(self.model, *args, **{**kwargs, "custom_generate": decode})
        return generate(self.model, *args, streamer=streamer, **kwargs)


class _Decoding:
    """One request, as transformers' decoding loop would be called for it."""

    def __init__(self, runtime: Runtime, streamer: Any):
        self.runtime = runtime
        self.streamer = streamer

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        # transformers would pass twice what a signature names beside its own loop's arguments.
        past_key_values = inputs.get("past_key_values")
        if past_key_values is not None and past_key_values.get_seq_length():
            raise _NotPlainError  # continues what is in that cache
        sampling = _sampling(generation_config, logits_processor)
        stop_ids, max_length = _stops(stopping_criteria)
        new_tokens = max_length - input_ids.shape[1]
        prompts = _prompts(input_ids, inputs.get("attention_mask"))
        longest = max(len(prompt) for prompt in prompts)
        if new_tokens < 1 or longest + new_tokens > self.runtime.max_length:
            raise _NotPlainError
        self.runtime.stop_ids = stop_ids
        pad = generation_config.pad_token_id
        return self._run(input_ids, prompts, new_tokens, sampling, 0 if pad is None else pad)

    def _run(
        self,
        input_ids: Tensor,
        prompts: list[list[int]],
        new_tokens: int,
        sampling: Sampling,
        pad: int,
    ) -> Tensor:
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        rows = []
        with contextlib.closing(self.runtime.stream(prompts, new_tokens, sampling)) as steps:
            for tokens in steps:
                rows.append(torch.tensor([pad if t is None else t for t in tokens]))
                if self.streamer is not None:
                    self.streamer.put(rows[-1])
        if self.streamer is not None:
            self.streamer.end()
        return torch.cat((input_ids, torch.stack(rows, 1).to(input_ids.device)), dim=1)


def _sampling(config: Any, processors: LogitsProcessorList) -> Sampling:
    mode = config.get_generation_mode()
    plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    if not plain or config.return_dict_in_generate or config.cache_implementation is not None:
        raise _NotPlainError
    chosen = {}
    for processor in processors:
        name = _WARPERS.get(type(processor))
        if name is None or name in chosen:
            raise _NotPlainError
        chosen[name] = getattr(processor, name)
    # Temperature, top-k, top-p: the runtime takes them in this order.
    if list(chosen) != [name for name in _WARPERS.values() if name in chosen]:
        raise _NotPlainError
    if mode == GenerationMode.GREEDY_SEARCH:
        if chosen:
            raise _NotPlainError
        return Sampling()
    seed = int(torch.randint(1 << 31, ()))  # of torch's own generator: who seeded that is heard
    return Sampling(**{"temperature": 1.0, **chosen, "seed": seed})


def _stops(criteria: StoppingCriteriaList) -> tuple[frozenset[int], int]:
    """(EOS tokens, most tokens of a sequence with its prompt)"""
    ids: frozenset[int] = frozenset()
    max_length = None
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ids = frozenset(criterion.eos_token_id.flatten().tolist())
        elif type(criterion) is MaxLengthCriteria:
            max_length = criterion.max_length
        else:
            raise _NotPlainError
    if max_length is None:
        raise _NotPlainError
    return ids, max_length


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The rows of a batch without their left padding."""
    if mask is None:
        return input_ids.tolist()
    padding = mask.shape[1] - mask.sum(-1)
    ordered = mask.dim() == 2 and torch.equal(
        mask.bool(), torch.arange(mask.shape[1], device=mask.device) >= padding[:, None]
    )
    if not ordered or mask.shape != input_ids.shape or bool((padding == mask.shape[1]).any()):
        raise _NotPlainError
    return [row[skip:] for row, skip in zip(input_ids.tolist(), padding.tolist(), strict=True)]
