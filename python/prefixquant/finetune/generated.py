# SPDX-License-Identifier: Apache-2.0
"""Training samples that the float model writes itself, from beginnings taken out of the text.

A model trained on few samples learns what the float model says of these tokens, and less of what it
says elsewhere. The float model can write as many more as are wanted: text that it finds likely, as
data-free quantization-aware training uses it (LLM-QAT, arXiv 2305.17888, section 3.1).
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prefixquant.finetune.training import deterministic
from prefixquant.quantizer import matmul_dtype
from prefixquant.roles import Geometry, model_geometry

# Pieces: long ones drift away from the text that they began with. Their beginning is from the text.
_PIECE, _BEGINNING = 128, 64
# K/V of the pieces that are written side by side. A constant, and no share of what is free: the
# random numbers, and with them the samples, must be the same in every run.
_CACHE_BYTES = 4 << 30


def generate_samples(
    model: nn.Module,
    text: Tensor,
    prefix: tuple[int, ...],
    count: int,
    seed: int,
    advance: Callable[[int], None] = lambda samples: None,
) -> Tensor:
    """Samples of the float model's own text, int64 [count, T] on the host.

    Each piece of 128 tokens begins with 64 tokens from a random place of the text, and the model,
    behind the prefix, draws the others from its own distribution (temperature 1, nothing cut off).
    Tokens that begin, end or pad a text are not drawn: in a sample they would be outliers. Pieces
    are strung together and cut into samples.

    Args:
        model: a transformers causal LM, in any float dtype.
        text: int64 [n, T], what the pieces begin with.
        prefix: token ids in front of every piece; not part of the result.
        count: number of samples.
        seed: the same seed gives the same samples on the same device.
        advance: called with the number of samples that were finished, as they are.
    """
    length = text.shape[1]
    piece = min(_PIECE, length)
    pieces = -(-count * length // piece)
    generator = torch.Generator().manual_seed(seed)
    beginnings = _beginnings(text, pieces, max(1, piece * _BEGINNING // _PIECE), generator)
    writer = _writer(model)
    batch = _batch(model_geometry(model.config), writer.dtype, len(prefix) + piece)
    written, told = [], 0
    devices = [writer.device] if writer.device.type == "cuda" else []
    with torch.random.fork_rng(devices), deterministic(), torch.no_grad():
        torch.manual_seed(seed)
        for part in beginnings.split(batch):
            written.append(_continue(writer, part.to(writer.device), prefix, piece))
            done = min(count, sum(map(len, written)) * piece // length)
            advance(done - told)
            told = done
    if devices:
        torch.cuda.empty_cache()  # pieces of every length left their caches behind
    return torch.cat(written).flatten()[: count * length].view(count, length)


def _beginnings(text: Tensor, pieces: int, length: int, generator: torch.Generator) -> Tensor:
    """int64 [pieces, length] from random places of the samples ``text``."""
    samples = torch.randint(len(text), (pieces, 1), generator=generator)
    starts = torch.randint(text.shape[1] - length + 1, (pieces, 1), generator=generator)
    return text[samples, starts + torch.arange(length)]


def _writer(model: nn.Module) -> nn.Module:
    """The model in the dtype of quick products; a float32 model is copied for it."""
    if model.dtype.itemsize == 2 or matmul_dtype(model.device) == model.dtype:
        return model
    return copy.deepcopy(model).to(matmul_dtype(model.device))


def _batch(geometry: Geometry, dtype: torch.dtype, length: int) -> int:
    """How many pieces of so many tokens are written side by side."""
    token = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * dtype.itemsize
    return min(1024, max(1, _CACHE_BYTES // (token * length)))


def _continue(model: nn.Module, beginnings: Tensor, prefix: tuple[int, ...], length: int) -> Tensor:
    """The beginnings [n, B] with what the model says behind them, to ``length`` tokens."""
    front = beginnings.new_tensor(prefix).expand(len(beginnings), -1)
    prompt = torch.cat((front, beginnings), dim=1)
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length - beginnings.shape[1],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        suppress_tokens=_ends(model) or None,
        pad_token_id=0,  # nothing ends early, nothing is padded
    )
    return tokens[:, len(prefix) :].cpu()


def _ends(model: nn.Module) -> list[int]:
    """The tokens that begin, end or pad a text, as far as the model's configuration names them."""
    ends: set[int] = set()
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(ends)
