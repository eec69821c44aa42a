# SPDX-License-Identifier: Apache-2.0
"""A quantized block whose weights and scales are parameters.

Everything learned is a change relative to where calibration left it, so that one learning rate
suits all tensors of all models:

- a weight scale is ``s = s0 * exp(theta)``, theta [N]; so are the activation and K/V scales;
- a weight is kept in parts of its channel's range, ``w = W / (s0 * 2^(b-1))``, so that two levels
  of 4 bits are 1/8 apart whatever the weight's size;
- a norm weight is ``g0 * exp(gamma)``; the prefix K/V are ``kv0 + delta * rms(kv0)``;
- a bias is ``b0 + delta * |W[n]| * sx`` with sx the scale of the linear's input (companded: the
  mean distance of its levels): about the size of the error that quantizing the input makes in that
  output.

At the start, integers and scales are those of the calibrated block, bit for bit.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prefixquant.block import BlockScales, PrefixKV
from prefixquant.calibrate import CalibratedBlock
from prefixquant.config import container_bits
from prefixquant.errors import UserError
from prefixquant.quantizer import fake_quantize, qrange, quantize
from prefixquant.roles import POINT_OF, BlockWeights
from prefixquant.solvers import QuantizedWeight

_NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")


@dataclass(frozen=True)
class Learned:
    """What is trained beside the scales and the biases that there are, which always are."""

    weights: bool = True  # the floating weights behind the integers; else the integers are frozen
    norms: bool = False
    prefix: bool = False


class LearnedBlock(nn.Module):
    """The parameters of one block, and the fake-quantized block that they make.

    The linears that read inputs of one width are stacked, ``[sum of N, K]``: quantizing them
    together takes one pass in place of seven.

    Args:
        block: the start.
        original: the float weights that were quantized; not needed where integers are frozen.
        prefix: K/V of the prefix in this block.
        learned: what is trained.

    Raises:
        UserError: weights that are not 4- or 8-bit integers with one scale a channel.
    """

    def __init__(
        self,
        block: CalibratedBlock,
        original: BlockWeights | None,
        prefix: PrefixKV,
        learned: Learned,
    ):
        super().__init__()
        self.learned = learned
        self._errors = block.relative_error, block.weight_errors
        self._rest = replace(block.simulated, weights={})
        self._add_weights(block.weights, original)
        self._add_scales(block.scales)
        self._add_biases(block)
        self._add_norms(block.simulated)
        self._add_prefix(prefix)

    # ------------------------------------------------------------------ the start

    def _add_weights(
        self, solved: dict[str, QuantizedWeight], original: BlockWeights | None
    ) -> None:
        self.bits = _weight_bits(solved)
        widths = sorted({w.q.shape[1] for w in solved.values()})
        self.stacks = [
            {role: len(w.q) for role, w in solved.items() if w.q.shape[1] == width}
            for width in widths
        ]
        self.weight_theta, self.latents = nn.ParameterList(), nn.ParameterList()
        for index, roles in enumerate(self.stacks):
            scale = torch.cat([solved[role].scale.float() for role in roles])
            q = torch.cat([solved[role].q for role in roles])
            self.register_buffer(f"weight_scale_{index}", scale)
            self.weight_theta.append(torch.zeros_like(scale))
            if self.learned.weights:
                weight = torch.cat([original.weights[role].float() for role in roles])
                self.latents.append(_latent(weight, q, scale, self.bits))
            else:
                self.register_buffer(f"integers_{index}", q)

    def _add_scales(self, scales: BlockScales) -> None:
        """One vector holds the activation scales, then those of K, then those of V."""
        self._form = replace(scales, activations={}, k=None, v=None)
        self.points = tuple(scales.activations)
        parts = [scale.reshape(1) for scale in scales.activations.values()]
        self.kv_heads = 0 if scales.k is None else len(scales.k)
        # At 8 bits all heads share a scale: one number is learned.
        self.kv_learned = min(1, self.kv_heads) if scales.kv_bits == 8 else self.kv_heads
        if scales.k is not None:
            parts += [scales.k[: self.kv_learned], scales.v[: self.kv_learned]]
        empty = torch.zeros(0, device=self.weight_scale_0.device)
        self.register_buffer("scale_start", torch.cat([empty, *parts]).float())
        self.scale_theta = nn.Parameter(torch.zeros_like(self.scale_start))

    def _add_biases(self, block: CalibratedBlock) -> None:
        simulated, activations = block.simulated, block.scales.activations
        bits, dynamic = block.scales.activation_bits, block.scales.activation_mode == "dynamic"
        units = 2 ** container_bits(bits, block.scales.companded and not dynamic) - 1
        self.biases = tuple(role for role, b in simulated.biases.items() if b is not None)
        self.bias_delta = nn.ParameterDict()
        for role in self.biases:
            start = simulated.biases[role].float().clone()
            size = block.weights[role].dequantize().norm(dim=1)
            step = activations.get(POINT_OF[role], torch.ones_like(size[0]))
            unit = size * step * (units / (2**bits - 1))
            self.register_buffer(f"bias_start_{role}", start)
            self.register_buffer(f"bias_unit_{role}", unit)
            self.bias_delta[role] = torch.zeros_like(start)
        # In buffers of this block, as a captured step reads them where they are.
        for point, shift in simulated.shifts.items():
            self.register_buffer(f"shift_{point}", shift.float().clone())

    def _add_norms(self, simulated: BlockWeights) -> None:
        self.norms = tuple(n for n in _NORMS if getattr(simulated, n) is not None)
        self.norm_gamma = nn.ParameterDict()
        for name in self.norms:
            self.register_buffer(f"{name}_start", getattr(simulated, name).float().clone())
            if self.learned.norms:
                self.norm_gamma[name] = torch.zeros_like(getattr(simulated, name).float())

    def _add_prefix(self, prefix: PrefixKV) -> None:
        self.prefix_delta = nn.ParameterDict()
        for name in ("key", "value"):
            start = getattr(prefix, name).float().clone()
            self.register_buffer(f"{name}_start", start)
            if self.learned.prefix and prefix.length:
                self.prefix_delta[name] = torch.zeros_like(start)

    # ------------------------------------------------------------------ training

    def parameter_groups(
        self, weight_rate: float, scale_rate: float, prefix_rate: float = 0.0
    ) -> list[dict]:
        """For an optimizer: the weights, the prefix, and everything else."""
        apart = {"latents": weight_rate, "prefix_delta": prefix_rate}
        groups = {name: {"params": [], "lr": rate} for name, rate in apart.items()}
        groups["scales"] = {"params": [], "lr": scale_rate}
        for name, parameter in self.named_parameters():
            group = groups.get(name.split(".")[0], groups["scales"])
            if parameter.numel():
                group["params"].append(parameter)
        return [group for group in groups.values() if group["params"]]

    @torch.no_grad()
    def copy_from(self, other: "LearnedBlock") -> None:
        """Takes over all values of a block of the same shape; the storage stays where it is."""
        theirs = [*other.parameters(), *other.buffers()]
        for mine, value in zip([*self.parameters(), *self.buffers()], theirs, strict=True):
            mine.copy_(value)
        self._rest, self._errors = other._rest, other._errors

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        for parameter, kept in zip(self.parameters(), snapshot, strict=True):
            parameter.copy_(kept)

    def materialize(self) -> tuple[BlockWeights, BlockScales, PrefixKV]:
        """The fake-quantized block as `block_forward` takes it, differentiable."""
        weights, half = {}, 2 ** (self.bits - 1)
        for index, roles in enumerate(self.stacks):
            factor, start = self.weight_theta[index].exp(), self._buffer("weight_scale", index)
            if self.learned.weights:
                parts = fake_quantize(self.latents[index], (factor / half)[:, None], self.bits)
                stacked = parts * (start * half)[:, None]
            else:
                stacked = self._buffer("integers", index).float() * (start * factor)[:, None]
            weights |= zip(roles, stacked.split(list(roles.values())), strict=True)
        rest = replace(
            self._rest,
            weights=weights,
            biases=self._rest.biases | {role: self._bias(role) for role in self.biases},
            shifts={point: self.get_buffer(f"shift_{point}") for point in self._rest.shifts},
            **{name: self._norm(name) for name in self.norms},
        )
        return rest, self._scales(), self._prefix()

    def _buffer(self, name: str, index: int) -> Tensor:
        return self.get_buffer(f"{name}_{index}")

    def _scales(self) -> BlockScales:
        values = self.scale_start * self.scale_theta.exp()
        points = len(self.points)
        activations = dict(zip(self.points, values[:points].unbind(), strict=True))
        scales = replace(self._form, activations=activations)
        if self.kv_heads:
            k, v = values[points:].split(self.kv_learned)
            scales.k, scales.v = k.expand(self.kv_heads), v.expand(self.kv_heads)
        return scales

    def _bias(self, role: str) -> Tensor:
        unit = self.get_buffer(f"bias_unit_{role}")
        return self.get_buffer(f"bias_start_{role}") + self.bias_delta[role] * unit

    def _norm(self, name: str) -> Tensor:
        start = self.get_buffer(f"{name}_start")
        return start * self.norm_gamma[name].exp() if name in self.norm_gamma else start

    def _prefix(self) -> PrefixKV:
        def part(name: str) -> Tensor:
            start = self.get_buffer(f"{name}_start")
            if name not in self.prefix_delta:
                return start
            return start + self.prefix_delta[name] * start.square().mean().sqrt()

        return PrefixKV(part("key"), part("value"))

    # ------------------------------------------------------------------ the result

    @torch.no_grad()
    def freeze(self) -> tuple[CalibratedBlock, PrefixKV]:
        """The integers and scales that the parameters stand for, and the prefix."""
        half = 2 ** (self.bits - 1)
        solved = {}
        for index, roles in enumerate(self.stacks):
            factor = self.weight_theta[index].exp()
            scale = self._buffer("weight_scale", index) * factor
            if self.learned.weights:
                q = quantize(self.latents[index], (factor / half)[:, None], self.bits)
            else:
                q = self._buffer("integers", index)
            counts = list(roles.values())
            for role, part, scales in zip(
                roles, q.to(torch.int8).split(counts), scale.split(counts), strict=True
            ):
                solved[role] = QuantizedWeight(part.clone(), scales.clone(), self.bits)
        block, scales, prefix = self.materialize()
        block.weights = {role: w.dequantize() for role, w in solved.items()}
        # Copies: the buffers that some of these are take the next block's values.
        block, scales, prefix = copy.deepcopy((block, scales, prefix))
        return CalibratedBlock(solved, scales, block, self._errors[0], self._errors[1]), prefix

    @torch.no_grad()
    def floating_weights(self) -> dict[str, Tensor]:
        """The trained weights before rounding: role -> float32 [N, K]."""
        half, found = 2 ** (self.bits - 1), {}
        for index, roles in enumerate(self.stacks):
            weight = self.latents[index] * (self._buffer("weight_scale", index) * half)[:, None]
            found |= zip(roles, weight.split(list(roles.values())), strict=True)
        return found


def _weight_bits(solved: dict[str, QuantizedWeight]) -> int:
    found = {w.bits for w in solved.values()}
    sparse = any(getattr(w, "outliers", None) is not None for w in solved.values())
    if len(found) != 1 or sparse or any(w.scale.dim() != 1 for w in solved.values()):
        raise UserError(
            "fine-tuning: expected integer weights with one scale a channel and no outliers, "
            f"got {sorted(found) or 'weights that are not quantized'}"
        )
    return found.pop()


def _latent(weight: Tensor, q: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The weight in parts of its range, moved no more than needed to round to q.

    A solver that looks beyond the single weight rounds some of them to another neighbour: those
    start just inside the interval of their integer.
    """
    qmin, qmax = qrange(bits)
    steps = weight * (1.0 / scale)[:, None]
    rounded = steps.round().clamp_(qmin, qmax)
    integers = q.float()
    inside = torch.minimum(torch.maximum(steps, integers - 0.49), integers + 0.49)
    return torch.where(rounded == integers, steps, inside) / 2 ** (bits - 1)
