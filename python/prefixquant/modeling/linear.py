# SPDX-License-Identifier: Apache-2.0
"""Modules that hold packed weights and static scales: what a checkpoint stores."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixquant import ops
from prefixquant.config import container_bits
from prefixquant.dtypes import head_weight, usual_dtype
from prefixquant.hadamard import hadamard_signs, split_size
from prefixquant.ops.gemm import PREPACKED_SHAPES
from prefixquant.packing import unpack_bits
from prefixquant.solvers.weight import column_scales


class FixedDtypeModule(nn.Module):
    """A module whose buffers keep their dtype: `.to(bfloat16)` moves them and leaves float32 scales
    as they are. ``compute_dtype`` follows the dtype asked for instead. Given ``stored_dtype``, a
    module in the `usual_dtype` of its device takes that of the device it is moved to, unless the
    move names a dtype.

    Args:
        device: where the buffers are.
    """

    def __init__(
        self,
        compute_dtype: torch.dtype,
        device: torch.device,
        stored_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.stored_dtype = stored_dtype
        # Empty: it exists to receive what `.to` does to a floating tensor.
        marker = torch.empty(0, dtype=compute_dtype, device=device)
        self.register_buffer("_dtype", marker, persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._dtype.dtype

    def _apply(self, fn, recurse=True):
        kept = {name: b for name, b in self._buffers.items() if b is not None and name != "_dtype"}
        before = self._dtype
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            after = self._buffers[name]
            if after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        device = self._dtype.device
        if device.type != before.device.type:
            self._moved(kept, device)
            if self._is_usual(before) and not _names_a_dtype(fn, before.device):
                self._compute_in(usual_dtype(device, self.stored_dtype))
        return self

    def _is_usual(self, marker: Tensor) -> bool:
        stored = self.stored_dtype
        return stored is not None and marker.dtype == usual_dtype(marker.device, stored)

    def _compute_in(self, dtype: torch.dtype) -> None:
        self._dtype = self._dtype.to(dtype)

    def _moved(self, before: dict[str, Tensor], device: torch.device) -> None:
        """The buffers have come to another type of device; ``before`` are those left behind."""


def _names_a_dtype(fn: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Whether the function that a module's `_apply` got converts to a dtype; only then it changes
    float64, which nothing here has."""
    return fn(torch.empty(0, dtype=torch.float64, device=device)).dtype != torch.float64


def _signs(size: int) -> Tensor | None:
    _, k = split_size(size)
    return hadamard_signs(k) if k > 1 else None


class Rotation(FixedDtypeModule):
    """What an online Hadamard of ``size`` needs at run time; size 1 is none."""

    def __init__(self, size: int):
        super().__init__(torch.float32, torch.device("cpu"))
        self.size = size
        self.register_buffer("signs", _signs(size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else ops.hadamard(x, self.signs, self.size)


class SparseOutliers(FixedDtypeModule):
    """A sparse matrix S [N, K], the weights that stay in 16 bits beside a quantized linear.

    Args:
        index: int64 [s], ascending, n * K + k.
        value: 16-bit [s].
        shape: (N, K).
    """

    def __init__(self, index: Tensor, value: Tensor, shape: tuple[int, int]):
        super().__init__(value.dtype, value.device)
        self.shape = shape
        self.register_buffer("index", index)
        self.register_buffer("value", value)

    def add_to(self, weight: Tensor) -> Tensor:
        """``weight + S`` in place, float32 [N, K]."""
        weight.view(-1)[self.index] += self.value.float()
        return weight

    def product(self, x: Tensor) -> Tensor:
        """``x @ S.T`` in float32: x of any dtype [..., K] -> [..., N]."""
        rows = x.reshape(-1, self.shape[1]).float()
        places = torch.stack((self.index // self.shape[1], self.index % self.shape[1]))
        # The indices were checked when the checkpoint was read.
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            sparse = torch.sparse_coo_tensor(
                places, self.value.float(), self.shape, is_coalesced=True
            )
            return torch.sparse.mm(sparse, rows.T).T.reshape(*x.shape[:-1], self.shape[0])


class QuantLinear(FixedDtypeModule):
    """``y = (q(x) @ W_q.T) * (input_scale * weight_scale) + bias`` on packed weights.

    With a ``rotation`` H, ``q(H x)``.

    x is an int8 container [..., K] that was quantized where it was made, or floating [..., K] and
    is quantized here. With 16-bit activations the weight is dequantized for the product. With
    dynamic activations x is floating and each row has a scale of its own, applied to the sums.

    Args:
        weight: uint8 [N, K * bits / 8] packed (2, 3, 4 bits) or int8 [N, K], the checkpoint's
            layout.
        weight_scale: float32 [N], or [N, G] for groups of K / G columns (16-bit activations only).
        input_scale: float32 [], the static scale or the clip of dynamic ones; None for 16-bit
            activations.
        weight_bits: None takes 4 for uint8 and 8 for int8.
        outliers: what is added to the weight, or None.
        stored_dtype: the checkpoint's 16-bit dtype, for `usual_dtype`.
        rotation: of x, which is floating then; None for none.
        companded: whether 4-bit activations take the levels of `ops.compand_`; an int8 x holds
            them then.
    """

    def __init__(  # noqa: PLR0913 - what a checkpoint holds
        self,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        *,
        activation_bits: int,
        compute_dtype: torch.dtype,
        activation_mode: str = "static",
        weight_bits: int | None = None,
        outliers: SparseOutliers | None = None,
        stored_dtype: torch.dtype | None = None,
        rotation: Rotation | None = None,
        companded: bool = False,
    ):
        super().__init__(compute_dtype, weight.device, stored_dtype)
        self.rotation = rotation
        self.companded = companded
        self.dynamic = activation_mode == "dynamic"
        self._clip = input_scale.item() if self.dynamic else None
        self.weight_bits = weight_bits or (4 if weight.dtype == torch.uint8 else 8)
        self.activation_bits = activation_bits
        self.container_bits = container_bits(activation_bits, companded)  # of the integers x
        self.out_features = weight.shape[0]
        self.in_features = weight.shape[1] * 8 // self.weight_bits
        self.outliers = outliers
        if activation_bits < 16:
            weight = self.prepack(weight)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", bias)
        self._gemm = {(4, 4): ops.gemm_w4a4, (4, 8): ops.gemm_w4a8, (8, 8): ops.gemm_w8a8}.get(
            (self.weight_bits, self.container_bits)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self._gemm is None or self.dynamic:
            x = x if self.rotation is None else self.rotation(x)
            return self._by_row(x) if self.dynamic else self._weight_only(x)
        if x.is_floating_point():
            x = self._quantized(x)
        y = self._gemm(
            x, self.weight, self.weight_scale, self.input_scale, self.bias, self.compute_dtype
        )
        if self.outliers is not None:
            y += (self.outliers.product(x) * self.input_scale).to(y.dtype)
        return y

    def _quantized(self, x: Tensor) -> Tensor:
        scale, bits = self.input_scale, self.container_bits
        if self.rotation is None:
            return self.levels(ops.quantize_static(x, scale, bits))
        rotation = self.rotation
        return self.levels(ops.hadamard_quantize(x, rotation.signs, rotation.size, scale, bits))

    def levels(self, q: Tensor) -> Tensor:
        """int8 as a quantization left it -> the levels that x holds."""
        return ops.compand_(q) if self.companded else q

    def _by_row(self, x: Tensor) -> Tensor:
        """The comparison mode: one more pass over y for the rows' scales."""
        q, row_scale = ops.quantize_dynamic(x, self.container_bits, self._clip)
        q = self.levels(q)
        one = torch.ones_like(self.input_scale)
        y = self._gemm(q, self.weight, self.weight_scale, one, None, torch.float32)
        if self.outliers is not None:
            y += self.outliers.product(q)
        y = y * row_scale.view(*y.shape[:-1], 1)
        return (y if self.bias is None else y + self.bias).to(self.compute_dtype)

    def _weight_only(self, x: Tensor) -> Tensor:
        # No kernel of its own: correct, and as slow as unpacking the weight for every product.
        if self.weight_bits == 8:
            q = self.weight
        elif self.weight_bits == 4 and self.weight.device.type == "cpu":
            q = ops.unpack_int4(self.weight)
        else:
            q = unpack_bits(self.weight, self.weight_bits)
        weight = q.float() * column_scales(self.weight_scale, self.in_features)
        if self.outliers is not None:
            weight = self.outliers.add_to(weight)
        weight = weight.to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def canonical_weight(self) -> Tensor:
        """The weight in the checkpoint's layout, bit for bit what was loaded."""
        return self.weight if self._gemm is None else self._unprepack(self.weight)

    def prepack(self, weight: Tensor) -> Tensor:
        """A canonical weight of this linear's bits, in the layout of the kernels of its device."""
        return ops.prepack_w4(weight) if self.weight_bits == 4 else ops.prepack_w8(weight)

    def _unprepack(self, weight: Tensor) -> Tensor:
        unprepack = ops.unprepack_w4 if self.weight_bits == 4 else ops.unprepack_w8
        return unprepack(weight, self.out_features, self.in_features)

    def _moved(self, before: dict[str, Tensor], device: torch.device) -> None:
        # The kernels there read another layout; the canonical one travels.
        if self._gemm is not None and device.type in PREPACKED_SHAPES:
            self.weight = self.prepack(self._unprepack(before["weight"]).to(device))

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, w{self.weight_bits}a{self.activation_bits}"
            f"{'c' if self.companded else ''}"
        )


class QuantRMSNorm(FixedDtypeModule):
    """RMSNorm that hands on int8 containers: ``q(R6(x / rms(x) * weight) - shift)``; ``rotation``
    is R6, None for none; companded, ``bits`` are those of the containers."""

    def __init__(
        self,
        weight: Tensor,
        eps: float,
        scale: Tensor,
        bits: int,
        shift: Tensor | None = None,
        rotation: Rotation | None = None,
        companded: bool = False,
    ):
        super().__init__(weight.dtype, weight.device)
        self.eps = eps
        self.bits = bits
        self.companded = companded
        self.rotation = rotation
        # Folded norms are all ones: then there is nothing to multiply by.
        self.register_buffer("weight", None if bool((weight == 1).all()) else weight)
        self.register_buffer("input_scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        q = self._quantized(x)
        return ops.compand_(q) if self.companded else q

    def _quantized(self, x: Tensor) -> Tensor:
        if self.rotation is not None:
            return ops.rmsnorm_hadamard_quantize(
                x,
                self.weight,
                self.eps,
                self.rotation.signs,
                self.input_scale,
                self.bits,
                self.shift,
            )
        return ops.rmsnorm_quantize(
            x, self.weight, self.eps, self.input_scale, self.bits, shift=self.shift
        )


class RMSNorm(FixedDtypeModule):
    """``R6(x / rms(x) * weight) - shift`` in the dtype of x; weight and shift [C] as the checkpoint
    has them; ``rotation`` is R6, None for none."""

    def __init__(
        self,
        weight: Tensor,
        eps: float,
        compute_dtype: torch.dtype,
        stored_dtype: torch.dtype,
        shift: Tensor | None = None,
        rotation: Rotation | None = None,
    ):
        super().__init__(compute_dtype, weight.device, stored_dtype)
        self.eps = eps
        self.rotation = rotation
        # A parameter: transformers takes the model's dtype and device from those.
        self.weight = nn.Parameter(weight.to(compute_dtype), requires_grad=False)
        self.register_buffer("shift", shift)

    def _compute_in(self, dtype: torch.dtype) -> None:
        super()._compute_in(dtype)
        self.weight.data = self.weight.data.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.rmsnorm(x, self.weight, self.eps)
        y = y if self.rotation is None else self.rotation(y)
        return y if self.shift is None else (y - self.shift).to(y.dtype)


class QuantMLP(nn.Module):
    """``down_proj(q(R4(silu(gate) * up)))`` with gate and up as one product.

    Args:
        gate_up: QuantLinear of the stacked rows [gate; up].
        down: QuantLinear.
        rotation: R4.
    """

    def __init__(self, gate_up: QuantLinear, down: QuantLinear, rotation: Rotation):
        super().__init__()
        self.gate_up_proj = gate_up
        self.down_proj = down
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        down = self.down_proj
        if down.activation_bits == 16 or down.dynamic:
            return down(self.rotation(F.silu(gate) * up))
        inner = ops.swiglu_hadamard_quantize(
            gate,
            up,
            self.rotation.signs,
            self.rotation.size,
            down.input_scale,
            down.container_bits,
        )
        return down(down.levels(inner))


class SixteenBitHead(FixedDtypeModule):
    """``logits = x @ W.T`` with W [V, C] kept in 16 bits whatever the dtype of x.

    Args:
        stored: W as the checkpoint has it, on the CPU; it stays mapped from the file.
        device: where it is used.
    """

    def __init__(self, stored: Tensor, device: torch.device):
        weight = head_weight(stored, device)
        super().__init__(weight.dtype, device)
        self._stored = stored
        self.register_buffer("weight", weight)

    def _moved(self, before: dict[str, Tensor], device: torch.device) -> None:
        self.weight = head_weight(self._stored, device)

    def forward(self, x: Tensor) -> Tensor:
        # As a matrix: a batched product of a strided slice would copy the weight first. One row as
        # a vector: torch's matrix-vector product reads the weight 2.6 times as fast on a CPU.
        rows = x.reshape(-1, x.shape[-1]).to(self.weight.dtype)
        if len(rows) == 1 and rows.device.type == "cpu":
            logits = self.weight @ rows[0]
        else:
            logits = F.linear(rows, self.weight)
        return logits.to(x.dtype).view(*x.shape[:-1], -1)


class SixteenBitEmbedding(FixedDtypeModule):
    """Embedding rows kept in 16 bits, handed out in the compute dtype."""

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, stored_dtype: torch.dtype):
        super().__init__(compute_dtype, weight.device, stored_dtype)
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.compute_dtype)
