# SPDX-License-Identifier: Apache-2.0
"""From a float model to the tensors of a checkpoint: the whole method in the order it runs."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixquant import __version__
from prefixquant.block import PrefixKV
from prefixquant.block_pipeline import BlockPipeline, FinishedBlock, Samples
from prefixquant.calibrate import CalibratedBlock
from prefixquant.checkpoint_layout import KEY_SHIFT, scale_tensor, shift_tensor
from prefixquant.config import QuantizationConfig, RecipeConfig
from prefixquant.decoder import FloatDecoder, compute_device
from prefixquant.decoder_setup import make_decoder
from prefixquant.errors import UnsupportedModelError, UserError
from prefixquant.packing import pack_weight, values_per_unit
from prefixquant.prefix import PrefixSearch, prefix_texts, search_prefix
from prefixquant.progress import SILENT, Progress
from prefixquant.resume import BlockState
from prefixquant.roles import Geometry, model_geometry, model_roles
from prefixquant.rotate import RotationPlan, plan_rotations
from prefixquant.text import sample_windows


@dataclass
class QuantizedModel:
    """The tensors of a checkpoint, its description, and how they came about."""

    tensors: dict[str, Tensor]
    quantization: QuantizationConfig
    report: dict[str, Any]


@torch.no_grad()
def quantize(
    model: nn.Module,
    tokenizer,
    recipe: RecipeConfig,
    calibration: Tensor,
    progress: Progress = SILENT,
    search: PrefixSearch | None = None,
    state: BlockState | None = None,
) -> QuantizedModel:
    """Quantizes a causal LM to static ``recipe.scheme``; ``model`` is not changed.

    Scan and prefix on ``nsamples`` windows of ``seqlen`` tokens, then balance and means, and block
    by block rotation, scale search and integer weights on ``search_samples`` windows of
    ``search_seqlen``; then fine-tuning, if ``recipe.finetune`` asks for it. Beside the model there
    is one block and its activations in memory, and the quantized tensors; all blocks where they are
    trained end to end.

    Args:
        model: a transformers model of a supported family, on the device to work on, or on the
            host (`prefixquant.decoder.place_model`).
        calibration: int64 [n] token stream.
        search: the result of an earlier `search_prefix` on the same model, to not repeat it.
        state: keeps finished blocks, and gives those of an earlier run that was interrupted.

    Raises:
        UnsupportedModelError: architecture or sizes that cannot be quantized.
        UserError: too little calibration text, or a wrong recipe.
    """
    plan = _plan(model, recipe)
    samples = Samples.draw(recipe, calibration)
    device = compute_device(model)
    seconds: dict[str, float] = {}

    start = time.monotonic()
    if search is None and state is not None:
        search = state.load_search()
    if search is None:
        search = find_prefix(model, tokenizer, recipe, calibration, progress)
        if state is not None:
            state.save_search(search)
    seconds["prefix_search"] = time.monotonic() - start

    start = time.monotonic()
    decoder = make_decoder(model, plan, samples.search, search.prefix, recipe, device)
    seconds["balance_and_centre"] = time.monotonic() - start

    start = time.monotonic()
    packer = _Packer(decoder, _storage_dtype(model), recipe)
    pipeline = BlockPipeline(decoder, recipe, search.prefix, samples, state)
    end_to_end = recipe.finetune.e2e_epochs
    blocks = []
    total = len(decoder) * pipeline.steps_per_block
    with progress.stage("quantize blocks", total=total) as advance:
        for index in range(len(decoder)):
            finished = pipeline.run(index, advance)
            blocks.append(finished.report)
            if not end_to_end:
                packer.add_block(index, finished.block, finished.prefix)
    report = {"prefix": search.to_dict(tokenizer), "blocks": blocks, "stage_seconds": seconds}
    seconds["quantize_blocks"] = time.monotonic() - start
    if end_to_end:
        trained, report["end_to_end"] = _train_end_to_end(pipeline, progress, seconds)
        for index, finished in enumerate(trained):
            packer.add_block(index, finished.block, finished.prefix)
            blocks[index] |= finished.report | {"relative_error": blocks[index]["relative_error"]}
    packer.add_ends()

    quantization = QuantizationConfig(
        weight_bits=recipe.scheme.weight_bits,
        activation_bits=recipe.scheme.activation_bits,
        kv_bits=recipe.scheme.kv_bits,
        rotations=plan.rotations,
        prefix_token_ids=search.prefix,
        prefix_text=tuple(prefix_texts(tokenizer, search.prefix)),
        prefix_mode=recipe.prefix,
        solver=recipe.solver,
        producer=f"prefixquant {__version__}",
        group_size=recipe.group_size,
        outlier_fraction=recipe.stored_outlier_fraction,
        activation_mode=recipe.scheme.activation_mode,
        kv_mode=recipe.scheme.kv_mode,
        centred=recipe.centred,
        centred_keys=recipe.centred_keys,
        companded=recipe.scheme.companded,
    )
    return QuantizedModel(packer.tensors, quantization, report)


def _train_end_to_end(
    pipeline: BlockPipeline, progress: Progress, seconds: dict[str, float]
) -> tuple[list[FinishedBlock], dict[str, Any]]:
    """The trained blocks and the report of it, the float model's own samples made before."""
    tuning = pipeline.recipe.finetune
    if tuning.e2e_generated:
        start = time.monotonic()
        with progress.stage("generate samples", total=tuning.e2e_generated) as advance:
            pipeline.generate_samples(advance)
        seconds["generate_samples"] = time.monotonic() - start
    with progress.stage("train end to end", total=tuning.e2e_epochs) as advance:
        trained, report = pipeline.end_to_end(advance)
    seconds["train_end_to_end"] = report["seconds"]
    return trained, report


def find_prefix(
    model: nn.Module,
    tokenizer,
    recipe: RecipeConfig,
    calibration: Tensor,
    progress: Progress = SILENT,
) -> PrefixSearch:
    """The prefix search of `quantize` by itself, to share it between recipes that differ only in
    their scheme."""
    return search_prefix(
        model,
        tokenizer,
        sample_windows(calibration, recipe.nsamples, recipe.seqlen, recipe.seed),
        mode=recipe.prefix,
        eta=recipe.eta,
        r4_size=_plan(model, recipe).r4_size,
        progress=progress,
    )


def _plan(model: nn.Module, recipe: RecipeConfig) -> RotationPlan:
    model_roles(model.config)
    geometry = model_geometry(model.config)
    _check_sizes(geometry, recipe)
    return plan_rotations(geometry, **recipe.rotation_options)


def _check_sizes(geometry: Geometry, recipe: RecipeConfig) -> None:
    """4-bit packing takes pairs: every input size must be even. Fewer bits take more values to fill
    a byte, and groups must fill a row."""
    for name in ("hidden", "intermediate", "head_dim"):
        if getattr(geometry, name) % 2:
            raise UnsupportedModelError(
                f"{name} size: expected an even number, got {getattr(geometry, name)}"
            )
    unit = values_per_unit(recipe.scheme.weight_bits)
    for columns in (geometry.hidden, geometry.heads * geometry.head_dim, geometry.intermediate):
        if columns % unit:
            raise UnsupportedModelError(
                f"{recipe.scheme.weight_bits}-bit weights: expected a multiple of {unit} input "
                f"features, got {columns}"
            )
        if recipe.group_size and columns % recipe.group_size:
            raise UserError(
                f"group_size: expected a divisor of {columns} input features, "
                f"got {recipe.group_size}"
            )


def _storage_dtype(model: nn.Module) -> torch.dtype:
    """The 16-bit dtype of what is not quantized: the model's own, float16 otherwise."""
    dtype = next(model.parameters()).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


class _Packer:
    """Collects checkpoint tensors under their names (docs/checkpoint-format.md), on the CPU."""

    def __init__(self, decoder: FloatDecoder, dtype: torch.dtype, recipe: RecipeConfig):
        self.decoder = decoder
        self.roles = decoder.roles
        self.dtype = dtype
        self.recipe = recipe
        self.tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        self.tensors[name] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()

    def add_block(self, index: int, block: CalibratedBlock, prefix: PrefixKV) -> None:
        name, roles = f"{self.roles.blocks}.{index}", self.roles
        for role, path in roles.linears.items():
            for part, tensor in pack_weight(block.weights[role], self.dtype).items():
                self.put(f"{name}.{path}.{part}", tensor)
            bias = block.simulated.biases[role]
            if bias is not None:
                self.put(f"{name}.{path}.bias", bias, torch.float32)
        for point, scale in block.scales.activations.items():
            tensor = scale_tensor(roles.point_scales[point], block.scales.activation_mode)
            self.put(f"{name}.{tensor}", scale, torch.float32)
        attention = f"{name}.{roles.attention}"
        for point, shift in block.simulated.shifts.items():
            if point == "k":
                self.put(f"{attention}.{KEY_SHIFT}", shift, torch.float32)
            else:
                self.put(f"{name}.{shift_tensor(roles.point_scales[point])}", shift, self.dtype)
        for part in ("k", "v"):
            scale = getattr(block.scales, part)
            if scale is not None:
                tensor = scale_tensor(f"{part}_scale", block.scales.kv_mode)
                self.put(f"{attention}.{tensor}", scale, torch.float32)
        if prefix.length:
            self.put(f"{attention}.prefix_key", prefix.key, self.dtype)
            self.put(f"{attention}.prefix_value", prefix.value, self.dtype)
        self.put(f"{name}.{roles.input_norm}.weight", block.simulated.input_norm, self.dtype)
        self.put(f"{name}.{roles.post_norm}.weight", block.simulated.post_norm, self.dtype)
        if roles.qk_norm:
            self.put(f"{attention}.q_norm.weight", block.simulated.q_norm, self.dtype)
            self.put(f"{attention}.k_norm.weight", block.simulated.k_norm, self.dtype)

    def add_ends(self) -> None:
        roles, decoder = self.roles, self.decoder
        self.put(f"{roles.embedding}.weight", decoder.embedding_weight(), self.dtype)
        self.put(f"{roles.head}.weight", decoder.head_weight(), self.dtype)
        ones = torch.ones(decoder.geometry.hidden)  # folded into the head
        self.put(f"{roles.final_norm}.weight", ones, self.dtype)
