# SPDX-License-Identifier: Apache-2.0
"""What `quantize` would take: sizes from the config alone, time and memory from one random block.

A block of the model's sizes, filled with random numbers, is calibrated on two small inputs. Its
time is a + b * (calibration tokens), and the two measurements give a and b. Loading, writing and
what attention takes for longer windows are left out: the result says "about", and is meant to tell
minutes from days.
"""

import dataclasses
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from prefixquant import checkpoint_layout
from prefixquant.block import BlockShape, PrefixKV, block_forward
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.config import QuantizationConfig, RecipeConfig
from prefixquant.report import peak_memory_bytes, report_head
from prefixquant.roles import LINEARS, BlockWeights, Geometry, model_geometry, model_roles
from prefixquant.rotate import plan_rotations
from prefixquant.solvers import WeightSolver

_WINDOW = 128  # tokens of the small windows
_SCANS = {"verified": 3, "paper": 3}  # no prefix, BOS, the paper's; other modes scan once
_PERPLEXITY_WINDOWS = 16  # of every scan: prefix.py


def plan_report(
    config: Any, model: str, recipe: RecipeConfig, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What `quantize` would make and need, from the model's transformers config.

    Raises:
        UnsupportedModelError: as `quantize` would.
    """
    model_roles(config)
    geometry = model_geometry(config)
    rotations = plan_rotations(geometry, **recipe.rotation_options)
    sizes = checkpoint_layout.ModelSizes.from_config(config.to_dict(), model)
    # The prefix is found during the run; one token is the usual length and its size hardly counts.
    length = 0 if recipe.prefix == "none" else 1
    quantization = QuantizationConfig(
        weight_bits=recipe.scheme.weight_bits,
        activation_bits=recipe.scheme.activation_bits,
        kv_bits=recipe.scheme.kv_bits,
        rotations=rotations.rotations,
        prefix_token_ids=(0,) * length,
        prefix_text=("",) * length,
        prefix_mode=recipe.prefix,
        solver=recipe.solver,
        producer="dry run",
        group_size=recipe.group_size,
        outlier_fraction=recipe.stored_outlier_fraction,
        activation_mode=recipe.scheme.activation_mode,
        kv_mode=recipe.scheme.kv_mode,
        centred=recipe.centred,
        centred_keys=recipe.centred_keys,
        companded=recipe.scheme.companded,
    )
    storage = checkpoint_layout.storage(sizes, quantization)
    shape = BlockShape.of(geometry, rotations.rotations)
    return {
        **report_head("dry-run", sys.argv),
        "model": model,
        "scheme": str(recipe.scheme),
        "architecture": dataclasses.asdict(sizes),
        "bytes": storage,
        "calibration_tokens_needed": {
            "maxima": recipe.nsamples * recipe.seqlen,
            "search": recipe.search_samples * recipe.search_seqlen,
        },
        "estimate": estimate(shape, recipe, storage, torch.device(device)),
        "note": "the prefix is counted as one token a layer"
        + ("; the time of fine-tuning is not estimated" if recipe.finetune.active else ""),
    }


@torch.no_grad()
def estimate(
    shape: BlockShape, recipe: RecipeConfig, storage: dict[str, int], device: torch.device
) -> dict[str, Any]:
    """Seconds and bytes that `quantize` will take on ``device``, about."""
    geometry = shape.geometry
    block = _random_block(geometry, device)

    def seconds(windows: int, length: int) -> float:
        x = torch.randn(windows, length, geometry.hidden, device=device)
        rope = torch.rand(2, length, geometry.head_dim, device=device)
        none = torch.zeros(geometry.kv_heads, 1, geometry.head_dim, device=device)
        return _timed(
            device,
            calibrate_block,
            block,
            shape,
            recipe.scheme,
            (rope[0], rope[1]),
            PrefixKV(none, none),
            Streams(x, x.clone()),
            WeightSolver(recipe.solver, recipe.group_size, recipe.outlier_fraction),
            recipe.compensation,
        )

    seconds(1, _WINDOW)  # the first call warms up
    once, thrice = seconds(1, _WINDOW), seconds(3, _WINDOW)
    per_token = max(thrice - once, 0.0) / (2 * _WINDOW)
    fixed = max(once - per_token * _WINDOW, 0.0)
    searched = recipe.search_samples * recipe.search_seqlen
    block_seconds = fixed + per_token * searched
    scan_seconds = _scan_seconds(block, shape, recipe, device)
    # All samples go through a point at once: the widest moment holds gate, up, their product, its
    # rotation and its quantized form beside the streams. The scan holds the head in float32 and the
    # logits of a window three times.
    activations = 4 * searched * (6 * geometry.hidden + 5 * geometry.intermediate)
    logits = 4 * geometry.vocab * (3 * recipe.seqlen + geometry.hidden)
    peak = peak_memory_bytes()
    held = storage["float16"] + activations + logits
    memory = {"host": peak.get("host", 0) + storage["total"]}
    if device.type == "cuda":
        memory["cuda"] = peak.get("cuda", 0) + held
    else:
        memory["host"] += held
    return {
        "seconds": geometry.layers * block_seconds + scan_seconds,
        "seconds_per_block": block_seconds,
        "seconds_of_the_scan": scan_seconds,
        "peak_memory_bytes": memory,
        "device": str(device),
    }


def _scan_seconds(
    block: BlockWeights, shape: BlockShape, recipe: RecipeConfig, device: torch.device
) -> float:
    geometry = shape.geometry
    x = torch.randn(1, 2 * _WINDOW, geometry.hidden, device=device)
    rope = torch.rand(2, x.shape[1], geometry.head_dim, device=device)

    def forward() -> None:
        block_forward(block, shape, x, (rope[0], rope[1]))

    _timed(device, forward)
    per_token = _timed(device, forward) / x.shape[1]
    scans = _SCANS.get(recipe.prefix, 1)
    # The head is a matrix product like those of the blocks.
    head = geometry.vocab * geometry.hidden / sum(w.numel() for w in block.weights.values())
    windows = min(_PERPLEXITY_WINDOWS, recipe.nsamples)
    tokens = recipe.nsamples * geometry.layers + windows * head
    return scans * per_token * recipe.seqlen * tokens


def _timed(device: torch.device, function: Any, *arguments: Any) -> float:
    start = time.monotonic()
    function(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - start


def _random_block(geometry: Geometry, device: torch.device) -> BlockWeights:
    q, kv = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    hidden, inner = geometry.hidden, geometry.intermediate
    shapes = {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }

    def random(n: int, k: int) -> Tensor:
        return torch.randn(n, k, device=device) / math.sqrt(k)

    weights = {role: random(*shapes[role]) for role in LINEARS}
    ones = torch.ones(hidden, device=device)
    return BlockWeights(weights, dict.fromkeys(LINEARS), ones, ones)
