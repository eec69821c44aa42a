# SPDX-License-Identifier: Apache-2.0
"""gemm_w4a4, gemm_w4a8, gemm_w8a8 and the prepacked layouts against the reference, bit for bit."""

import pytest
import reference
import torch
from cases import FLOAT_DTYPES, GEMM_INPUTS, GEMM_OUTPUTS, ROW_COUNTS
from compare import assert_bits_equal
from prefixquant import _C, ops
from torch import Tensor

OUT_DTYPES = (torch.int32, *FLOAT_DTYPES)
# op, bits of the weight, least and greatest activation
OPS = {
    "gemm_w4a4": (ops.gemm_w4a4, 4, -8, 7),
    "gemm_w4a8": (ops.gemm_w4a8, 4, -128, 127),
    "gemm_w8a8": (ops.gemm_w8a8, 8, -128, 127),
}


def random_int8(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def prepack(weight: Tensor, bits: int) -> Tensor:
    return ops.prepack_w4(ops.pack_int4(weight)) if bits == 4 else ops.prepack_w8(weight)


def make_weight(bits: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    weight = random_int8(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, n, k)
    return weight, prepack(weight, bits)


def scales(n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n) * 0.1 + 1e-4, torch.tensor(0.037)


# ---- layouts ----


@pytest.mark.parametrize("n", GEMM_OUTPUTS)
@pytest.mark.parametrize("k", GEMM_INPUTS)
def test_prepack_is_inverted(n, k):
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    assert_bits_equal(ops.unprepack_w4(ops.prepack_w4(packed), n, k), packed)
    weight = random_int8(-128, 127, n, k)
    assert_bits_equal(ops.unprepack_w8(ops.prepack_w8(weight), n, k), weight)


def test_prepack_of_empty_weights():
    for n, k in ((0, 64), (16, 0), (0, 0)):
        packed = torch.empty(n, k // 2, dtype=torch.uint8)
        assert ops.unprepack_w4(ops.prepack_w4(packed), n, k).shape == packed.shape
        weight = torch.empty(n, k, dtype=torch.int8)
        assert ops.unprepack_w8(ops.prepack_w8(weight), n, k).shape == weight.shape


def test_layout_bytes():
    """cpp/gemm_params.h, spelled out for one weight."""
    weight = random_int8(-8, 7, 17, 72)
    got = ops.prepack_w4(ops.pack_int4(weight))
    assert got.shape == (2, 16, 64)
    padded = torch.zeros(32, 128, dtype=torch.int32)
    padded[:17, :72] = weight
    groups = (padded + 8).view(2, 16, 16, 2, 4).permute(3, 0, 2, 1, 4)  # half, block, group, r, j
    assert_bits_equal(got, (groups[0] | groups[1] << 4).to(torch.uint8).reshape(2, 16, 64))

    weight = random_int8(-128, 127, 17, 72)
    padded[:17, :72] = weight
    groups = (padded + 128).view(2, 16, 16, 2, 4).permute(0, 2, 3, 1, 4)
    assert_bits_equal(ops.prepack_w8(weight), groups.to(torch.uint8).reshape(2, 16, 128))


# ---- products ----


@pytest.mark.parametrize("n", GEMM_OUTPUTS)
@pytest.mark.parametrize("k", GEMM_INPUTS)
@pytest.mark.parametrize("op", ["gemm_w4a8", "gemm_w8a8"])
def test_sums_are_exact(op, n, k):
    gemm, bits, low, high = OPS[op]
    weight, prepacked = make_weight(bits, n, k)
    x = random_int8(low, high, max(ROW_COUNTS), k)
    weight_scale, input_scale = scales(n)
    expected = reference.gemm_int8(x, weight, weight_scale, input_scale, None, torch.int32)
    before = _C.current_isa()
    try:
        for isa in _C.available_isas():
            _C.set_isa(isa)
            for m in ROW_COUNTS:
                y = gemm(x[:m], prepacked, weight_scale, input_scale, None, torch.int32)
                assert_bits_equal(y, expected[:m], f"{isa} M={m}")
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("m", range(1, 37))
@pytest.mark.parametrize("bits", [4, 8])
def test_every_row_remainder(isa, m, bits):
    """Each height of the micro-kernels and each shape of the tile tails."""
    n, k = 80, 72
    weight, prepacked = make_weight(bits, n, k)
    x = random_int8(-128, 127, m, k)
    gemm = ops.gemm_w4a8 if bits == 4 else ops.gemm_w8a8
    for count in (n, 48, 33):  # one to five blocks
        weight_scale, input_scale = scales(count)
        expected = reference.gemm_int8(
            x, weight[:count], weight_scale, input_scale, None, torch.int32
        )
        part = prepacked[: -(-count // 16)]
        y = gemm(x, part, weight_scale, input_scale, None, torch.int32)
        assert_bits_equal(y, expected)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *FLOAT_DTYPES])
@pytest.mark.parametrize("op", OPS)
def test_outputs(isa, op, bias_dtype, out_dtype):
    gemm, bits, low, high = OPS[op]
    for m, n, k in ((1, 100, 576), (5, 48, 74), (70, 96, 128)):
        weight, prepacked = make_weight(bits, n, k)
        x = random_int8(low, high, m, k)
        weight_scale, input_scale = scales(n)
        # Scales that give subnormal, huge and infinite results in float16.
        weight_scale[:3] = torch.tensor([1e-9, 30.0, 1e6])
        bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
        expected = reference.gemm_int8(x, weight, weight_scale, input_scale, bias, out_dtype)
        y = gemm(x, prepacked, weight_scale, input_scale, bias, out_dtype)
        assert_bits_equal(y, expected)


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_nan_and_infinite_scales(isa, out_dtype):
    weight, prepacked = make_weight(4, 64, 64)
    x = random_int8(-8, 7, 40, 64)
    weight_scale, input_scale = scales(64)
    weight_scale[3], weight_scale[40], weight_scale[63] = float("nan"), float("inf"), 1e38
    expected = reference.gemm_int8(x, weight, weight_scale, input_scale, None, out_dtype)
    y = ops.gemm_w4a8(x, prepacked, weight_scale, input_scale, None, out_dtype)
    assert_bits_equal(y, expected)


@pytest.mark.parametrize("value", [-128, 127, -1])
@pytest.mark.parametrize("m", [1, 5, 48])
def test_extreme_values(isa, value, m):
    """All products at their largest: nothing may saturate or lose its sign."""
    n, k = 48, 11008
    x = torch.full((m, k), value, dtype=torch.int8)
    weight_scale, input_scale = scales(n)
    for bits, levels in ((4, (-8, 7)), (8, (-128, 127))):
        gemm = ops.gemm_w4a8 if bits == 4 else ops.gemm_w8a8
        for level in levels:
            prepacked = prepack(torch.full((n, k), level, dtype=torch.int8), bits)
            y = gemm(x, prepacked, weight_scale, input_scale, None, torch.int32)
            assert (y == k * value * level).all()


def test_leading_dimensions_and_strides(isa):
    weight, prepacked = make_weight(4, 33, 64)
    weight_scale, input_scale = scales(33)
    x = random_int8(-8, 7, 4, 6, 128)
    for view in (x[..., :64], x[:, ::2, 64:], x[0, 0, :64], x[..., ::2], x[:0, :, :64]):
        expected = reference.gemm_int8(view, weight, weight_scale, input_scale, None, torch.int32)
        y = ops.gemm_w4a8(view, prepacked, weight_scale, input_scale, None, torch.int32)
        assert_bits_equal(y, expected)


def test_nothing_beyond_x_is_read(isa):
    """What follows the last row of x in memory must not enter the sums of its odd tail."""
    weight, prepacked = make_weight(4, 16, 10)
    weight_scale, input_scale = scales(16)
    buffer = torch.full((13 * 10 + 64,), 127, dtype=torch.int8)
    buffer[:130] = random_int8(-8, 7, 130)
    x = buffer[:130].view(13, 10)
    expected = reference.gemm_int8(x, weight, weight_scale, input_scale, None, torch.int32)
    y = ops.gemm_w4a8(x, prepacked, weight_scale, input_scale, None, torch.int32)
    assert_bits_equal(y, expected)


def test_odd_inputs_of_w8(isa):
    weight, prepacked = make_weight(8, 20, 13)
    weight_scale, input_scale = scales(20)
    x = random_int8(-128, 127, 37, 13)
    expected = reference.gemm_int8(x, weight, weight_scale, input_scale, None, torch.int32)
    y = ops.gemm_w8a8(x, prepacked, weight_scale, input_scale, None, torch.int32)
    assert_bits_equal(y, expected)


def test_thread_count_does_not_change_the_result():
    weight, prepacked = make_weight(4, 576, 576)
    weight_scale, input_scale = scales(576)
    x = random_int8(-8, 7, 137, 576)
    expected = reference.gemm_int8(x, weight, weight_scale, input_scale, None, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for m in (1, 137):
                y = ops.gemm_w4a8(x[:m], prepacked, weight_scale, input_scale)
                assert_bits_equal(y, expected[:m])
    finally:
        torch.set_num_threads(before)


# ---- wrong arguments ----

GOOD = {
    "x": torch.zeros(3, 64, dtype=torch.int8),
    "weight": torch.zeros(2, 8, 64, dtype=torch.uint8),
    "weight_scale": torch.ones(20),
    "input_scale": torch.tensor(1.0),
    "bias": torch.ones(20),
    "out_dtype": torch.float32,
}
WRONG = [
    ("x", torch.zeros(3, 64)),
    ("x", torch.zeros(3, 64, dtype=torch.uint8)),
    ("x", torch.tensor(1, dtype=torch.int8)),
    ("x", torch.zeros(3, 63, dtype=torch.int8)),
    ("weight", torch.zeros(3, 130, dtype=torch.int8)),
    ("weight", torch.zeros(2, 8, 64, dtype=torch.int8)),
    ("weight", torch.zeros(2, 8, 128, dtype=torch.uint8)),
    ("weight", torch.zeros(3, 8, 64, dtype=torch.uint8)),
    ("weight", torch.zeros(2, 16, 64, dtype=torch.uint8)),
    ("weight", torch.zeros(1024, dtype=torch.uint8)),
    ("weight", torch.zeros(2, 8, 128, dtype=torch.uint8)[..., ::2]),
    ("weight_scale", torch.ones(20, dtype=torch.float64)),
    ("weight_scale", torch.ones(20, 1)),
    ("weight_scale", torch.tensor(1.0)),
    ("weight_scale", torch.ones(40)[::2]),
    ("input_scale", torch.tensor(1.0, dtype=torch.bfloat16)),
    ("input_scale", torch.ones(2)),
    ("bias", torch.ones(19)),
    ("bias", torch.ones(20, dtype=torch.int32)),
    ("bias", torch.ones(20, 1)),
    ("bias", torch.ones(40)[::2]),
    ("out_dtype", torch.int8),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_argument_is_named(name, value):
    ops.gemm_w4a8(**GOOD)
    with pytest.raises(ValueError, match=rf"gemm_w4: {name}: expected"):
        ops.gemm_w4a8(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("op", "arguments", "name"),
    [
        (ops.prepack_w4, (torch.zeros(4, 4, dtype=torch.int8),), "weight_packed"),
        (ops.prepack_w4, (torch.zeros(4, dtype=torch.uint8),), "weight_packed"),
        (ops.prepack_w8, (torch.zeros(4, 4, dtype=torch.uint8),), "weight"),
        (ops.prepack_w8, (torch.zeros(2, 4, 4, dtype=torch.int8),), "weight"),
        (ops.unprepack_w4, (torch.zeros(1, 8, 64, dtype=torch.uint8), 17, 64), "prepacked"),
        (ops.unprepack_w4, (torch.zeros(1, 8, 64, dtype=torch.uint8), 16, 66), "prepacked"),
        (ops.unprepack_w4, (torch.zeros(1, 8, 64, dtype=torch.uint8), 16, 63), "k"),
        (ops.unprepack_w4, (torch.zeros(1, 8, 64, dtype=torch.uint8), -1, 64), "n"),
        (ops.unprepack_w4, (torch.zeros(1, 8, 64, dtype=torch.int8), 16, 64), "prepacked"),
        (ops.unprepack_w8, (torch.zeros(1, 8, 64, dtype=torch.uint8), 16, 64), "prepacked"),
        (ops.unprepack_w8, (torch.zeros(1, 8, 128, dtype=torch.uint8), 16, -64), "k"),
    ],
)
def test_wrong_layout_argument_is_named(op, arguments, name):
    with pytest.raises(ValueError, match=rf"{op.__name__}: {name}: expected"):
        op(*arguments)


# ---- torch ----


def test_opcheck():
    _, w4 = make_weight(4, 20, 64)
    weight, w8 = make_weight(8, 20, 64)
    weight_scale, input_scale = scales(20)
    x = random_int8(-8, 7, 2, 3, 64)
    torch_ops = torch.ops.prefixquant
    for op, prepacked in (
        (torch_ops.gemm_w4a4, w4),
        (torch_ops.gemm_w4a8, w4),
        (torch_ops.gemm_w8a8, w8),
    ):
        for bias in (None, torch.ones(20)):
            torch.library.opcheck(
                op.default, (x, prepacked, weight_scale, input_scale, bias, torch.bfloat16)
            )
    torch.library.opcheck(torch_ops.prepack_w4.default, (ops.unprepack_w4(w4, 20, 64),))
    torch.library.opcheck(torch_ops.unprepack_w4.default, (w4, 20, 64))
    torch.library.opcheck(torch_ops.prepack_w8.default, (weight,))
    torch.library.opcheck(torch_ops.unprepack_w8.default, (w8, 20, 64))


def test_compile():
    weight, prepacked = make_weight(4, 20, 64)
    weight_scale, input_scale = scales(20)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def double(x):
        return 2 * ops.gemm_w4a8(x, prepacked, weight_scale, input_scale)

    x = random_int8(-8, 7, 5, 64)
    expected = reference.gemm_int8(x, weight, weight_scale, input_scale, None, torch.float32)
    assert_bits_equal(double(x), 2 * expected)
