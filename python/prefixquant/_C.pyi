# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N999
"""The compiled extension. Outputs are the last arguments, allocated by the caller."""

from torch import Tensor

__version__: str
with_cuda: bool

class DecoderStep:
    def __init__(
        self,
        sizes: list[int],
        companded: bool,
        eps: float,
        scaling: float,
        cos: Tensor,
        sin: Tensor,
        rotation_signs: Tensor | None,
        rotation_size: int,
        mlp_signs: Tensor | None,
        mlp_size: int,
        attention_signs: Tensor | None,
        attention_size: int,
        norm_signs: Tensor | None,
        norm_size: int,
    ) -> None: ...
    def add_block(
        self,
        input_norm: Tensor | None,
        input_shift: Tensor | None,
        qkv: tuple[Tensor, Tensor, Tensor, Tensor | None],
        attention: tuple[
            Tensor | None,
            Tensor | None,
            Tensor | None,
            Tensor | None,
            Tensor | None,
            Tensor,
            Tensor,
            Tensor,
            Tensor,
        ],
        o: tuple[Tensor, Tensor, Tensor, Tensor | None],
        post_norm: Tensor | None,
        post_shift: Tensor | None,
        gate_up: tuple[Tensor, Tensor, Tensor, Tensor | None],
        down: tuple[Tensor, Tensor, Tensor, Tensor | None],
    ) -> None: ...
    def run(self, hidden: Tensor, positions: Tensor, slots: Tensor, lengths: Tensor) -> None: ...

def add_rmsnorm_quantize(
    residual: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    bits: int,
    shift: Tensor | None,
    q: Tensor,
) -> None: ...
def available_isas() -> list[str]: ...
def compand(q: Tensor) -> None: ...
def current_isa() -> str: ...
def gemm_w4(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None: ...
def gemm_w8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None: ...
def hadamard(x: Tensor, signs: Tensor | None, block_size: int, y: Tensor) -> None: ...
def hadamard_quantize(
    x: Tensor,
    signs: Tensor | None,
    block_size: int,
    scale: Tensor,
    bits: int,
    q: Tensor,
) -> None: ...
def kv_append(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None,
    block_size: int,
    shift: Tensor | None,
    cache: Tensor,
    position: int,
) -> None: ...
def kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    scaling: float,
    out: Tensor,
) -> None: ...
def kv_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    kv_bits: int,
    max_length: int,
    scaling: float,
    output_scale: Tensor | None,
    output_bits: int,
    out: Tensor,
) -> None: ...
def kv_dequantize(q: Tensor, scale: Tensor, bits: int, y: Tensor) -> None: ...
def kv_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    kv_bits: int,
    start: int,
    scaling: float,
    sequence: int,
    block_table: Tensor | None,
    out: Tensor,
) -> None: ...
def kv_quantize(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None,
    block_size: int,
    shift: Tensor | None,
    q: Tensor,
) -> None: ...
def outlier_scan(
    x: Tensor,
    eta: float,
    row_max: Tensor,
    median: Tensor,
    is_outlier: Tensor,
) -> None: ...
def pack_int4(q: Tensor, packed: Tensor) -> None: ...
def prepack_w4(weight_packed: Tensor, prepacked: Tensor) -> None: ...
def prepack_w8(weight: Tensor, prepacked: Tensor) -> None: ...
def quantize_dynamic(x: Tensor, bits: int, clip: float, q: Tensor, scale: Tensor) -> None: ...
def quantize_static(x: Tensor, scale: Tensor, bits: int, q: Tensor) -> None: ...
def rmsnorm(x: Tensor, weight: Tensor | None, eps: float, y: Tensor) -> None: ...
def rmsnorm_hadamard_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    signs: Tensor | None,
    scale: Tensor,
    bits: int,
    shift: Tensor | None,
    q: Tensor,
) -> None: ...
def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    bits: int,
    shift: Tensor | None,
    q: Tensor,
) -> None: ...
def rmsnorm_quantize_dynamic(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    bits: int,
    q: Tensor,
    scale: Tensor,
) -> None: ...
def rope_kv_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    signs: Tensor | None,
    rotation_size: int,
    k_shift: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_bits: int,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
    q: Tensor,
) -> None: ...
def set_isa(name: str) -> None: ...
def swiglu_hadamard_quantize(
    gate: Tensor,
    up: Tensor,
    signs: Tensor | None,
    block_size: int,
    scale: Tensor,
    bits: int,
    q: Tensor,
) -> None: ...
def swiglu_hadamard_quantize_dynamic(
    gate: Tensor,
    up: Tensor,
    signs: Tensor | None,
    block_size: int,
    bits: int,
    q: Tensor,
    scale: Tensor,
) -> None: ...
def unpack_int4(packed: Tensor, q: Tensor) -> None: ...
def unprepack_w4(prepacked: Tensor, weight_packed: Tensor) -> None: ...
def unprepack_w8(prepacked: Tensor, weight: Tensor) -> None: ...
