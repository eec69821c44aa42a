# SPDX-License-Identifier: Apache-2.0
"""A weight-only view of a checkpoint in the compressed-tensors format, for stock engines.

The integers are those of the checkpoint, packed as ``pack-quantized`` wants them: int32 words of
32 / b values, value i at bits b i, unsigned with an offset of 2^(b-1). Activations and K/V are then
16-bit, so the prefix has nothing to do and is left out, and so are R3, which cancels in q k^T, and
the shift of the keys, which changes no softmax. R1 and R2 are in the weights. R4, and R5 and R6 of
a checkpoint with 4-bit activations, are operations at run time that stock engines do not have: they
are taken out of the weights of down_proj, of o_proj, and of q, k, v, gate and up, which leave the
4-bit grid by that and are either rounded again, in groups of 128 columns, or kept in 16 bits. What
a centred checkpoint subtracts behind its norms moves into the biases, ``W (x - m) + b = W x +
(b - W m)``, which takes an architecture with a bias for every linear: llama. With R6 m is what is
subtracted behind it, and W the weight before R6 is taken out: ``W (H y - m)``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixquant import ops
from prefixquant.atomic import atomic_folder
from prefixquant.checkpoint import (
    CARD_NAME,
    CONFIG_NAME,
    Checkpoint,
    check_output_folder,
    read_checkpoint,
)
from prefixquant.checkpoint_files import MAX_SHARD_BYTES, write_json, write_shards, write_text
from prefixquant.checkpoint_layout import shift_tensor
from prefixquant.errors import UserError
from prefixquant.hadamard import hadamard_signs, split_size
from prefixquant.loading import load_tokenizer
from prefixquant.packing import unpack_weight
from prefixquant.progress import SILENT, Progress
from prefixquant.quantizer import qrange
from prefixquant.report import format_bytes
from prefixquant.roles import LINEARS, POINT_OF, POINTS, Roles, model_roles
from prefixquant.solvers import solve_rtn
from prefixquant.solvers.weight import QuantizedWeight

DOWN_PROJ = ("int4", "16bit")
_GROUP = 128  # what engines have kernels for
_BEHIND_NORMS = (*POINTS["qkv"], *POINTS["gate_up"])


def export_compressed_tensors(
    path: str | Path,
    output: str | Path,
    *,
    down_proj: str = "int4",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Writes the view to ``output``, a new folder, whole or not at all.

    Args:
        path: a prefixquant checkpoint with weights of 4 or 8 bits.
        down_proj: where R4 has to be taken out of it (and of o_proj where R5 has, of the others
            where R6 has), ``"int4"`` rounds it again and ``"16bit"`` keeps the exact product.

    Returns:
        ``q_proj_relative_error`` and so on for all linears: of rounding them again,
        |W' - W|^2 / |W|^2, block by block (empty where they were not); ``bytes``: of the tensors.

    Raises:
        CheckpointError: the checkpoint is damaged.
        UserError: it has no such view, or the output may not be used.
    """
    if down_proj not in DOWN_PROJ:
        raise UserError(f"down_proj: expected {' or '.join(DOWN_PROJ)}, got {down_proj!r}")
    checkpoint = read_checkpoint(path)
    quantization = checkpoint.quantization
    if quantization.weight_bits not in (4, 8):
        raise UserError(f"export: expected weights of 4 or 8 bits, got {quantization.weight_bits}")
    if quantization.centred and checkpoint.sizes.model_type != "llama":
        raise UserError(
            "export: a centred checkpoint has a bias for every linear, which the format of a "
            f"{checkpoint.sizes.model_type} has no place for; quantize with centre: false, or with "
            "16-bit activations"
        )
    if quantization.outlier_fraction:
        raise UserError("export: the format has no place for the outliers of quantease-outlier")
    output = check_output_folder(output)
    if quantization.activation_bits < 16:
        progress.note(
            f"note: these weights are fitted to {quantization.activation_bits}-bit activations; a "
            f"w{quantization.weight_bits}a16kv16 checkpoint makes a better view"
        )
    view = _View(checkpoint, down_proj)
    roles = model_roles(checkpoint.hf_config())
    with progress.stage("export", total=checkpoint.sizes.num_layers) as advance:
        for index in range(checkpoint.sizes.num_layers):
            view.add_block(index, roles)
            advance()
        for name in checkpoint.tensors:
            if not name.startswith(f"{roles.blocks}."):
                view.tensors[name] = checkpoint.tensors[name]
        _write(checkpoint, view, output)
    return {
        "output": str(output),
        "down_proj": down_proj if view.online else "as it was",
        **{f"{role}_proj_relative_error": view.errors[role] for role in LINEARS},
        "bytes": sum(t.numel() * t.element_size() for t in view.tensors.values()),
    }


def describe_export(report: dict[str, Any]) -> str:
    """The report of `export_compressed_tensors` as a line for people."""
    size, how = format_bytes(report["bytes"]), report["down_proj"]
    line = f"{report['output']}: {size}, down_proj {how}"
    for roles in (("down",), ("o",), _BEHIND_NORMS):
        errors = [e for role in roles for e in report[f"{role}_proj_relative_error"]]
        if errors:
            line += "" if roles == ("down",) else f", {_and(f'{role}_proj' for role in roles)} too"
            line += f", relative error {sum(errors) / len(errors):.2g}"
    return line


class _View:
    """Collects the tensors of the view and what its configuration says of them."""

    def __init__(self, checkpoint: Checkpoint, down_proj: str):
        self.checkpoint = checkpoint
        self.source = checkpoint.tensors
        self.quantization = checkpoint.quantization
        self.dtype = self.source["lm_head.weight"].dtype
        rotations, sizes = self.quantization.rotations, checkpoint.sizes
        online = {"o": rotations.r5_size, "down": rotations.r4_size}
        online |= dict.fromkeys(_BEHIND_NORMS, rotations.r6_size(sizes.hidden_size))
        # role -> the size of the blocks to be taken out of its weight
        self.online = {role: online[role] for role in LINEARS if online[role] > 1}
        self.keeps = down_proj == "16bit"
        widths = {"o": sizes.attended_size, "down": sizes.intermediate_size}
        widths |= dict.fromkeys(_BEHIND_NORMS, sizes.hidden_size)
        self.groups = {role: 0 if widths[role] % _GROUP else _GROUP for role in self.online}
        self.tensors: dict[str, Tensor] = {}
        self.errors: dict[str, list[float]] = {role: [] for role in LINEARS}

    def add_block(self, index: int, roles: Roles) -> None:
        block = f"{roles.blocks}.{index}"
        for role, path in roles.linears.items():
            name = f"{block}.{path}"
            weight = unpack_weight(self.source, name, self.quantization.weight_bits)
            if role in self.online:
                self._add_unrotated(role, name, weight)
            else:
                self._add(name, weight)
            if f"{name}.bias" in self.source:
                bias = self.source[f"{name}.bias"].float()
                shift = f"{block}.{shift_tensor(roles.point_scales[POINT_OF[role]])}"
                if shift in self.source:
                    bias = bias - weight.dequantize() @ self.source[shift].float()
                self.tensors[f"{name}.bias"] = bias.to(self.dtype)
        norms = [roles.input_norm, roles.post_norm]
        if roles.qk_norm:
            norms += [f"{roles.attention}.q_norm", f"{roles.attention}.k_norm"]
        for norm in norms:
            name = f"{block}.{norm}.weight"
            self.tensors[name] = self.source[name]

    def _add(self, name: str, weight: QuantizedWeight) -> None:
        scale = weight.scale if weight.scale.dim() == 2 else weight.scale[:, None]
        self.tensors[f"{name}.weight_packed"] = pack_int32(weight.q, weight.bits)
        self.tensors[f"{name}.weight_scale"] = scale.to(self.dtype)
        self.tensors[f"{name}.weight_shape"] = torch.tensor(weight.q.shape)

    def _add_unrotated(self, role: str, name: str, weight: QuantizedWeight) -> None:
        plain = without_hadamard(weight.dequantize(), self.online[role])
        if self.keeps:
            self.tensors[f"{name}.weight"] = plain.to(self.dtype)
            return
        again = solve_rtn(plain, weight.bits, group_size=self.groups[role])
        difference = (again.dequantize() - plain).square().sum() / plain.square().sum()
        self.errors[role].append(difference.item())
        self._add(name, again)

    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` of compressed-tensors."""
        bits = self.quantization.weight_bits
        group = self.quantization.group_size

        def scheme(targets: list[str], group_size: int) -> dict[str, Any]:
            weights = {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "dynamic": False,
                "strategy": "group" if group_size else "channel",
            }
            if group_size:
                weights["group_size"] = group_size
            return {"targets": targets, "weights": weights}

        ignore = ["lm_head"]
        if self.keeps:
            ignore += [_linears([role]) for role in self.online]
        sizes = dict.fromkeys(LINEARS, group)
        if not self.keeps:
            sizes |= self.groups
        if len(set(sizes.values())) == 1:
            groups = {"group_0": scheme(["Linear"], group)}
        else:
            by_size: dict[int, list[str]] = {}
            for role, size in sizes.items():
                by_size.setdefault(size, []).append(role)
            groups = {
                f"group_{i}": scheme([_linears(roles)], size)
                for i, (size, roles) in enumerate(by_size.items())
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
        }


def _linears(roles: list[str]) -> str:
    """What the format calls the linears of these roles."""
    names = "|".join(f"{role}_proj" for role in roles)
    return rf"re:.*\.({names})$" if len(roles) > 1 else rf"re:.*\.{names}$"


def _and(names: Iterable[str]) -> str:
    """``a, b and c``."""
    return " and ".join(", ".join(names).rsplit(", ", 1))


def pack_int32(q: Tensor, bits: int) -> Tensor:
    """int8 [N, K] -> int32 [N, ceil(K / (32 / bits))]: value i at bits ``bits * i`` of its word,
    unsigned with an offset of 2^(bits-1); the last word is filled up with 0."""
    per_word = 32 // bits
    fields = (q.to(torch.int64) - qrange(bits)[0]).float()  # 0 .. 2^bits - 1
    missing = -q.shape[1] % per_word
    fields = torch.nn.functional.pad(fields, (0, missing)).long().unflatten(1, (-1, per_word))
    words = (fields << (bits * torch.arange(per_word))).sum(dim=2)
    return (words - ((words >> 31) << 32)).to(torch.int32)  # the same 32 bits as a signed number


def without_hadamard(weight: Tensor, size: int) -> Tensor:
    """``W @ H`` on each block of ``size`` columns: undoes `apply_hadamard` (W @ H^T), float32.

    H is H_k (x) H_{2^m}; the second factor is symmetric, the first need not be.
    """
    pow2, k = split_size(size)
    blocks = weight.float().unflatten(1, (-1, k, pow2))
    if pow2 > 1:
        blocks = ops.hadamard(blocks.contiguous(), None, pow2)
    if k > 1:
        signs = hadamard_signs(k).to(weight.device, torch.float32) / k**0.5
        blocks = torch.einsum("ngap,ac->ngcp", blocks, signs)
    return blocks.flatten(1)


def _write(checkpoint: Checkpoint, view: _View, output: Path) -> None:
    config = {k: v for k, v in checkpoint.config.items() if k != "auto_map"}
    if checkpoint.quantization.centred:
        config["attention_bias"] = config["mlp_bias"] = True
    config["quantization_config"] = view.config()
    with atomic_folder(output) as partial:
        write_shards(partial, view.tensors, MAX_SHARD_BYTES)
        write_json(partial / CONFIG_NAME, config)
        if (checkpoint.path / "tokenizer_config.json").exists():
            load_tokenizer(str(checkpoint.path)).save_pretrained(partial)
        write_text(partial / CARD_NAME, _card(checkpoint, view))


def _card(checkpoint: Checkpoint, view: _View) -> str:
    bits = checkpoint.quantization.weight_bits
    none_left = view.keeps and len(view.online) == len(LINEARS)
    kind = "16-bit" if none_left else f"W{bits}A16"
    weights = f"{bits} bits in the compressed-tensors format (pack-quantized)"
    return (
        "---\nlibrary_name: transformers\ntags:\n- compressed-tensors\n---\n\n"
        f"# A {kind} view of a prefixquant checkpoint\n\n"
        f"Weights of {'16 bits' if none_left else weights}, made from a "
        f"{checkpoint.quantization.scheme} checkpoint.{_online_sentence(view)} Activations and K/V "
        "are 16-bit: the prefix, the static scales and the 4-bit cache of the original need "
        "prefixquant. The tokenizer adds no BOS; where the model wants one, put it in front.\n"
    )


def _online_sentence(view: _View) -> str:
    """What became of the linears whose rotations at run time were taken out."""
    names, many = _and(f"{role}_proj" for role in view.online), len(view.online) > 1
    if not view.online:
        return ""
    if view.keeps:
        return f" {names} {'are' if many else 'is'} 16-bit."
    how = " and ".join(
        f"in groups of {size} columns" if size else "by channels"
        for size in dict.fromkeys(view.groups.values())
    )
    return f" {names} {'were' if many else 'was'} rounded again {how}."
