# SPDX-License-Identifier: Apache-2.0
"""The quantized KV cache: a transformers cache layer that stores what the attention reads."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from prefixquant import ops
from prefixquant.modeling.linear import FixedDtypeModule, Rotation

_FIRST_CAPACITY = 64  # tokens; the buffers double from here


class KVQuantizer(FixedDtypeModule):
    """The static KV quantization of one attention: scales per KV head, R3, what is taken from the
    keys behind it, and the prefix K/V.

    Buffers: ``k_scale``, ``v_scale`` float32 [H_kv] (absent at 16 bits), ``k_shift`` float32
    [H_kv, D] or absent, ``prefix_key``, ``prefix_value`` 16-bit [H_kv, P, D], keys after RoPE, R3
    and the shift.
    """

    def __init__(
        self,
        bits: int,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        prefix_key: Tensor,
        prefix_value: Tensor,
        rotation: Rotation,
        k_shift: Tensor | None = None,
    ):
        super().__init__(torch.float32, prefix_key.device)
        self.bits = bits
        self.rotation = rotation
        self.register_buffer("k_scale", k_scale)
        self.register_buffer("v_scale", v_scale)
        self.register_buffer("k_shift", k_shift)
        self.register_buffer("prefix_key", prefix_key)
        self.register_buffer("prefix_value", prefix_value)

    @property
    def prefix_length(self) -> int:
        return self.prefix_key.shape[1]

    def append(self, key: Tensor, value: Tensor, cache: "PackedKV", position: int) -> None:
        """Quantizes key and value [B, H_kv, T, D] into rows position.. of the cache's buffers."""
        rotation = self.rotation
        ops.kv_append(
            key,
            self.k_scale,
            self.bits,
            rotation.signs,
            rotation.size,
            cache.key,
            position,
            self.k_shift,
        )
        ops.kv_append(value, self.v_scale, self.bits, None, 1, cache.value, position)

    def quantize(self, key: Tensor, value: Tensor) -> "PackedKV":
        rotation = self.rotation
        return PackedKV(
            ops.kv_quantize(
                key, self.k_scale, self.bits, rotation.signs, rotation.size, self.k_shift
            ),
            ops.kv_quantize(value, self.v_scale, self.bits),
        )

    def dequantize(self, packed: "PackedKV", dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, H_kv, S, D] keys (rotated by R3, less their shift) and values."""
        return (
            ops.kv_dequantize(packed.key, self.k_scale, self.bits, dtype),
            ops.kv_dequantize(packed.value, self.v_scale, self.bits, dtype),
        )


@dataclass
class PackedKV:
    """Keys or values: uint8 [B, H_kv, S, D/2] at 4 bits, int8 [B, H_kv, S, D] at 8, else floating.

    `QuantizedLayer.update` hands it to the attention function in place of the key states and of the
    value states; between the two, the models of `roles.ARCHITECTURES` do not touch them.
    """

    key: Tensor
    value: Tensor


class QuantizedLayer(DynamicLayer):
    """A cache layer of packed keys and values in buffers that grow by doubling.

    ``keys`` and ``values`` are views of the filled part, so what `DynamicLayer` does to them (beam
    reordering, repeats, cropping) works on packed rows too; the next append copies such a view into
    fresh buffers.
    """

    is_compileable = False

    def __init__(self, quantizer: KVQuantizer):
        super().__init__()
        self.quantizer = quantizer
        self._buffer: PackedKV | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self._reserve(key_states, end)
        self.quantizer.append(key_states, value_states, self._buffer, start)
        self.keys = self._buffer.key[:, :, :end]
        self.values = self._buffer.value[:, :, :end]
        packed = PackedKV(self.keys, self.values)
        return packed, packed

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def reset(self) -> None:
        self.keys = self.values = self._buffer = None
        self.is_initialized = False

    def _reserve(self, key_states: Tensor, length: int) -> None:
        """Makes buffers that hold ``length`` tokens and begin with the current rows."""
        buffer = self._buffer
        if (
            buffer is not None
            and self.keys is not None
            and self.keys.data_ptr() == buffer.key.data_ptr()
            and self.keys.shape[0] == buffer.key.shape[0]
            and buffer.key.shape[2] >= length
        ):
            return
        batch, heads, _, dim = key_states.shape
        capacity = max(_FIRST_CAPACITY, 1 << (length - 1).bit_length())
        width, dtype = (dim // 2, torch.uint8) if self.quantizer.bits == 4 else (dim, torch.int8)
        shape = (batch, heads, capacity, width)
        fresh = PackedKV(
            *(torch.empty(shape, dtype=dtype, device=key_states.device) for _ in range(2))
        )
        if self.keys is not None and self.keys.shape[2]:
            fresh.key[:, :, : self.keys.shape[2]] = self.keys
            fresh.value[:, :, : self.values.shape[2]] = self.values
        self._buffer = fresh
