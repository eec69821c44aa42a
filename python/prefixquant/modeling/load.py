# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint on the disk to a transformers model that runs on packed weights."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from prefixquant import _C
from prefixquant.checkpoint import CONFIG_NAME, Checkpoint, read_checkpoint
from prefixquant.checkpoint_layout import KEY_SHIFT, scale_tensor, shift_tensor, short
from prefixquant.config import Scheme
from prefixquant.dtypes import usual_dtype
from prefixquant.errors import CheckpointError, UserError
from prefixquant.modeling import attention
from prefixquant.modeling.cache import KVQuantizer, QuantizedLayer
from prefixquant.modeling.linear import (
    QuantLinear,
    QuantMLP,
    QuantRMSNorm,
    RMSNorm,
    Rotation,
    SixteenBitEmbedding,
    SixteenBitHead,
    SparseOutliers,
)
from prefixquant.modeling.parallel import Shard, ShardedTensors, add_up
from prefixquant.packing import OUTLIER_INDEX, OUTLIER_VALUE
from prefixquant.roles import POINT_OF, Roles, model_blocks, model_roles


def load(
    path: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Loads a checkpoint as a transformers causal LM in eval mode.

    Its linears run the packed kernels, its norms hand on int8, its attention prepends the hidden
    prefix and reads a quantized cache; `generate`, left-padded batches and beams work as usual. The
    linear weights never exist in 16 bits.

    Args:
        path: the checkpoint folder.
        device: "cpu", "cuda" or "cuda:N"; ``model.to`` moves the model later.
        dtype: what flows between the quantized operations; None takes float32 on the CPU and the
            checkpoint's 16-bit dtype elsewhere.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or of another version.
        UserError: another device or dtype, or a device that is not there.
    """
    device = check_device(device)
    checkpoint = read_checkpoint(path)
    if dtype is None:
        dtype = default_dtype(device, checkpoint)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    model = fill_model(_empty_model(checkpoint, dtype), checkpoint, device, dtype)
    _generation_defaults(model, Path(path))
    return model.eval()


def check_device(device: str | torch.device) -> torch.device:
    """The device as torch knows it, with its number; UserError where a checkpoint cannot run."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {device}")
    if not _C.with_cuda:
        raise UserError(f"device: expected cpu, got {device}: this build has no CUDA kernels")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def default_dtype(device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """float32 on a CPU, the checkpoint's own 16-bit dtype elsewhere."""
    return usual_dtype(device, checkpoint.tensors["lm_head.weight"].dtype)


def fill_model(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard | None = None,
) -> nn.Module:
    """Replaces the modules of a transformers skeleton (its tensors are not read: they may be meta)
    by those of the checkpoint, and installs the hooks that generation needs. With ``shard`` the
    model is that of one rank of several."""
    from prefixquant.integrations.transformers import attach_quantizer

    if checkpoint.quantization.kv_mode == "dynamic":
        raise UserError(
            f"{checkpoint.path}: scales of K and V made for every token have no kernels; measure "
            "such a checkpoint with prefixquant eval, or use prefixquant.simulate.SimulatedModel"
        )
    roles = model_roles(model.config)
    builder = _Builder(checkpoint, roles, model.config, device, dtype)
    if shard is not None:
        shard.check(checkpoint)
        builder.tensors = ShardedTensors(checkpoint.tensors, roles, shard)
        builder.kv_heads //= shard.size
    for index, block in enumerate(model_blocks(model, roles)):
        builder.fill_block(block, index)
        if shard is not None:
            add_up(block, roles, shard)
    builder.fill_ends(model)
    _install_cache(model, roles)
    _refuse_other_attention(model, roles)
    attach_quantizer(model, checkpoint)
    return model


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The transformers model with all its parameters on the meta device."""
    from transformers import AutoModelForCausalLM

    attention.register()
    config = checkpoint.hf_config()
    config.tie_word_embeddings = False
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME
            )
    except Exception as error:  # values of config.json that transformers uses and does not check
        raise CheckpointError(
            f"{checkpoint.path / CONFIG_NAME}: transformers cannot build the model of it "
            f"({type(error).__name__}: {short(error, 300)})"
        ) from error


class _Builder:
    """Replaces a model's meta modules by ours, one block after the other."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        roles: Roles,
        config,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.tensors: Mapping[str, Tensor] = checkpoint.tensors
        self.kv_heads = checkpoint.sizes.num_kv_heads
        self.quantization = checkpoint.quantization
        self.scheme: Scheme = checkpoint.quantization.scheme
        self.roles = roles
        self.config = config
        self.device = device
        self.dtype = dtype
        self.stored_dtype = self.tensors[f"{roles.head}.weight"].dtype
        # One of each for all blocks: they hold nothing that depends on the block.
        rotations = self.quantization.rotations
        head_dim = checkpoint.specs["model.layers.0.self_attn.q_proj.weight_scale"].shape[0]
        head_dim //= config.num_attention_heads
        self.r3 = Rotation(head_dim if rotations.r3 else 1).to(device)
        self.r4 = Rotation(rotations.r4_size).to(device)
        self.r5 = Rotation(rotations.r5_size).to(device) if rotations.r5_size > 1 else None
        self.r6 = Rotation(config.hidden_size).to(device) if rotations.r6 else None

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].to(self.device)

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.tensors else None

    def linear(self, block: str, *linear_roles: str) -> QuantLinear:
        """One QuantLinear of the rows of one or more linears that share their input."""
        paths = [f"{block}.{self.roles.linears[role]}" for role in linear_roles]
        names = [f"{path}.bias" for path in paths]
        scale = None
        if self.scheme.activation_bits < 16:
            point = self.roles.point_scales[POINT_OF[linear_roles[0]]]
            scale = self.tensor(f"{block}.{scale_tensor(point, self.scheme.activation_mode)}")
        return QuantLinear(
            torch.cat([self.tensor(f"{path}.weight_packed") for path in paths]),
            torch.cat([self.tensor(f"{path}.weight_scale") for path in paths]),
            scale,
            torch.cat([self.tensor(n) for n in names]) if names[0] in self.tensors else None,
            weight_bits=self.scheme.weight_bits,
            outliers=self._outliers(paths),
            activation_bits=self.scheme.activation_bits,
            compute_dtype=self.dtype,
            activation_mode=self.scheme.activation_mode,
            stored_dtype=self.stored_dtype,
            rotation=self.r5 if linear_roles == ("o",) else None,
            companded=self.scheme.companded,
        )

    def _outliers(self, paths: list[str]) -> SparseOutliers | None:
        """Those of the stacked rows of the linears at ``paths``."""
        if f"{paths[0]}.{OUTLIER_INDEX}" not in self.tensors:
            return None
        index, value, columns, first = [], [], 0, 0
        for path in paths:
            rows, row_bytes = self.tensors[f"{path}.weight_packed"].shape
            columns = row_bytes * 8 // self.scheme.weight_bits
            index.append(self.tensor(f"{path}.{OUTLIER_INDEX}").long() + first * columns)
            value.append(self.tensor(f"{path}.{OUTLIER_VALUE}"))
            first += rows
        return SparseOutliers(torch.cat(index), torch.cat(value), (first, columns))

    def norm(self, name: str, scale: str | None) -> nn.Module:
        """Without ``scale`` one that no point is behind: of heads, or in front of the head."""
        weight = self.tensor(f"{name}.weight")
        eps = self.config.rms_norm_eps
        static = self.scheme.activation_bits < 16 and self.scheme.activation_mode == "static"
        shift = None if scale is None else self.optional(shift_tensor(scale))
        r6 = None if scale is None else self.r6
        if scale is None or not static:
            return RMSNorm(weight, eps, self.dtype, self.stored_dtype, shift, r6)
        bits, companded = self.scheme.container_bits, self.scheme.companded
        return QuantRMSNorm(weight, eps, self.tensor(scale), bits, shift, r6, companded)

    def fill_block(self, block: nn.Module, index: int) -> None:
        roles, name = self.roles, f"{self.roles.blocks}.{index}"
        for role in ("q", "k", "v", "o"):
            block.set_submodule(roles.linears[role], self.linear(name, role))
        block.set_submodule(
            roles.mlp, QuantMLP(self.linear(name, "gate", "up"), self.linear(name, "down"), self.r4)
        )
        for norm, point in ((roles.input_norm, "qkv"), (roles.post_norm, "gate_up")):
            scale = f"{name}.{roles.point_scales[point]}"
            block.set_submodule(norm, self.norm(f"{name}.{norm}", scale))
        self._fill_attention(block.get_submodule(roles.attention), f"{name}.{roles.attention}")

    def _fill_attention(self, module: nn.Module, name: str) -> None:
        if self.roles.qk_norm:
            for norm in ("q_norm", "k_norm"):
                module.set_submodule(norm, self.norm(f"{name}.{norm}", None))
        bits = self.scheme.kv_bits
        if self.quantization.prefix_token_ids:
            prefix = [self.tensor(f"{name}.prefix_{part}") for part in ("key", "value")]
        else:
            empty = torch.zeros(self.kv_heads, 0, module.head_dim, device=self.device)
            prefix = [empty, empty]
        module.kv_quantizer = KVQuantizer(
            bits,
            self.tensor(f"{name}.k_scale") if bits < 16 else None,
            self.tensor(f"{name}.v_scale") if bits < 16 else None,
            *prefix,
            self.r3,
            self.optional(f"{name}.{KEY_SHIFT}"),
        )

    def fill_ends(self, model: nn.Module) -> None:
        """Embedding, final norm, head and RoPE."""
        roles = self.roles
        embedding = self.tensor(f"{roles.embedding}.weight")
        embedding = SixteenBitEmbedding(embedding, self.dtype, self.stored_dtype)
        model.set_submodule(roles.embedding, embedding)
        model.set_submodule(roles.final_norm, self.norm(roles.final_norm, None))
        head = SixteenBitHead(self.tensors[f"{roles.head}.weight"], self.device)
        model.set_submodule(roles.head, head)
        decoder = model.get_submodule(roles.decoder)
        decoder.rotary_emb = type(decoder.rotary_emb)(self.config).to(self.device)


def _install_cache(model: nn.Module, roles: Roles) -> None:
    """Every fresh DynamicCache that enters the decoder gets our layers, whoever made it."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    inside = roles.blocks.removeprefix(f"{roles.decoder}.")
    if model_blocks(model, roles)[0].get_submodule(roles.attention).kv_quantizer.bits == 16:
        return

    def replace_layers(decoder, args, kwargs):
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = decoder.config.use_cache
        if cache is None and use_cache:
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        if isinstance(cache, DynamicCache):
            fresh = all(
                type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers
            )
            if fresh:
                # Those of this decoder: it may be a copy of the one that the hook was made for.
                cache.layers = [
                    QuantizedLayer(block.get_submodule(roles.attention).kv_quantizer)
                    for block in decoder.get_submodule(inside)
                ]
        return args, kwargs

    decoder = model.get_submodule(roles.decoder)
    decoder.register_forward_pre_hook(replace_layers, with_kwargs=True)


def _refuse_other_attention(model: nn.Module, roles: Roles) -> None:
    """Refuses to run with what would silently drop the prefix: another attention implementation, or
    a request for attention weights, which the quantized attention does not have."""

    def check(decoder, args, kwargs):
        if decoder.config._attn_implementation != attention.NAME:
            raise ValueError(
                f"attn_implementation: expected {attention.NAME!r} (it holds the prefix), "
                f"got {decoder.config._attn_implementation!r}"
            )
        wanted = kwargs.get("output_attentions")
        if decoder.config.output_attentions if wanted is None else wanted:
            raise ValueError(
                "output_attentions: expected False, the quantized attention does not return "
                "its weights"
            )

    model.get_submodule(roles.decoder).register_forward_pre_hook(check, with_kwargs=True)


def _generation_defaults(model: nn.Module, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)


def linear_weight_bytes(model: nn.Module) -> int:
    """Bytes that the linears of a loaded model hold in memory: weights, scales, outliers
    and biases."""
    linears = (m for m in model.modules() if isinstance(m, QuantLinear))
    return sum(b.numel() * b.element_size() for linear in linears for b in linear.buffers())
