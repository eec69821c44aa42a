# SPDX-License-Identifier: Apache-2.0
"""rmsnorm_hadamard_quantize against the reference, bit for bit.

As for rmsnorm, the sums of squares of kernel and reference differ in their order, in float64: with
the fixed seeds here no level moves by that.
"""

from itertools import product

import pytest
import reference
import torch
from cases import (
    FLOAT_DTYPES,
    INTEGER_SIZES,
    ROW_COUNTS,
    SIGN_SIZES,
    edge_blocks,
    outlier_rows,
    poisoned,
    strided,
)
from compare import assert_bits_equal
from prefixquant.hadamard import hadamard_matrix, hadamard_signs, split_size
from prefixquant.ops import rmsnorm_hadamard_quantize, rmsnorm_quantize

EPS = 1e-5
SCALE = torch.tensor(0.17)
# Below, at and above the register widths, without and with a k part; hidden sizes of real models.
SIZES = (*(2**m for m in range(9)), 12, 20, 24, 48, 56, 96, 152, 192)
HIDDEN_SIZES = (576, 896, 960, 1536, 2048, 2560, 3584, 4096, 5120, 84 * 64, 8192)


def signs_of(size):
    k = split_size(size)[1]
    return hadamard_signs(k) if k > 1 else None


def check(x, weight=None, shift=None, bits=4, scale=SCALE, eps=EPS, signs=None):
    arguments = (x, weight, eps, signs_of(x.shape[-1]) if signs is None else signs, scale, bits)
    q = rmsnorm_hadamard_quantize(*arguments, shift)
    assert_bits_equal(q, reference.rmsnorm_hadamard_quantize(*arguments, shift))
    return q


@pytest.mark.parametrize("size", SIZES)
def test_sizes(isa, size):
    for dtype in FLOAT_DTYPES:
        x, weight, shift = outlier_rows(5, size, dtype), torch.rand(size), torch.randn(size)
        check(x)
        check(x, weight.to(dtype))
        check(x, weight, shift, bits=8)


@pytest.mark.parametrize("size", HIDDEN_SIZES)
def test_hidden_sizes(isa, size):
    weight = torch.randn(size).exp()
    for dtype in FLOAT_DTYPES:
        x = outlier_rows(3, size, dtype)
        check(x, weight.to(dtype), torch.randn(size).to(dtype))
        check(x, bits=8)


@pytest.mark.parametrize("k", SIGN_SIZES)
@pytest.mark.parametrize("pow2", [1, 2, 4, 8, 16, 64])
def test_sign_matrices(isa, k, pow2):
    check(torch.randn(2, k * pow2), torch.rand(k * pow2), signs=hadamard_signs(k))


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("size", [64, 96, 576])
def test_rows(isa, rows, size):
    for dtype in FLOAT_DTYPES:
        check(outlier_rows(rows, size, dtype), torch.rand(size), torch.randn(size))
        check(outlier_rows(rows, size, dtype)[None])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits_and_strides(isa, dtype, bits):
    scale = torch.tensor(3.0 / 2 ** (bits - 1))
    x = outlier_rows(24, 576, dtype)
    views = (x, strided(x), x.T, x[::3], x[5], x.view(24, 1, 576), x[:, 1:513])
    for view in (*views, x.view(2, 12, 576).transpose(0, 1)):
        check(view, torch.rand(view.shape[-1]), bits=bits, scale=scale)


@pytest.mark.parametrize("size", [1, 24, 64, 76, 576])
def test_every_dtype(isa, size):
    for dtype, second, third in product(FLOAT_DTYPES, FLOAT_DTYPES, FLOAT_DTYPES):
        weight, shift = torch.rand(size).to(second), torch.randn(size).to(third)
        check(outlier_rows(3, size, dtype), weight, shift)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_many_rows_on_every_thread(dtype):
    x = outlier_rows(137, 2048, dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            check(x, torch.rand(2048).to(dtype), torch.randn(2048))
            check(strided(x))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [1, 8, 64, 84, 96, 576])
def test_not_a_number_stays_in_its_row(isa, dtype, size):
    x = poisoned(17, size, dtype)
    q = check(x, bits=8)
    check(x, torch.rand(size).to(dtype), torch.randn(size))
    finite = x.isfinite().all(-1)
    assert not finite.all()
    if size > 1:
        assert finite.any()
    assert_bits_equal(q[finite], check(x[finite], bits=8))
    assert (q[x.isnan().any(-1)] == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", INTEGER_SIZES)
def test_sums_of_integers_at_the_edges(isa, dtype, size):
    x = edge_blocks(size, dtype)
    q = check(x, bits=8)
    assert not q[:3].any()
    check(x, torch.rand(size).to(dtype), torch.randn(size), bits=8)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-20, 1e18])
def test_extreme_magnitudes(isa, factor):
    """Squares that leave the range of float32 are summed in float64."""
    for size, eps in product((576, 1024), (0.0, EPS)):
        check(torch.randn(3, size) * factor, eps=eps, bits=8, scale=torch.tensor(0.02))


def test_shift_and_weight_that_are_not_numbers(isa):
    x, shift = torch.randn(3, 96), torch.randn(96)
    special = {5: "nan", 40: "inf", 95: "-inf"}
    for channel, value in special.items():
        shift[channel] = float(value)
    q = check(x, torch.rand(96), shift)
    assert (q[:, list(special)] == torch.tensor([0, -8, 7], dtype=torch.int8)).all()
    check(x, shift)  # as a weight it fills its rows
    assert not check(x, shift, torch.randn(96)).any()


def test_scales_of_every_kind(isa):
    for value in (0.02, -0.02, 1e-30, 1e-44, 0.0, 1e25, float("inf"), float("nan")):
        check(poisoned(17, 48, torch.float16), torch.rand(48), scale=torch.tensor(value))


def test_every_product_and_the_difference_are_rounded(isa):
    """The shift is the transformed row: nothing is left. A fused product would leave its error."""
    for size in (512, 576):
        x, weight = torch.randn(1, size), torch.rand(size)
        rotated = reference.hadamard_float32(x * weight, signs_of(size), size)
        shift = (rotated * reference.rms_reciprocal(x, EPS))[0]
        assert not check(x, weight, shift, bits=8, scale=torch.tensor(1e-10)).any()


@pytest.mark.parametrize("size", [64, 576, 5120, 84 * 64])
def test_agrees_with_the_matrix(size):
    """Against torch's norm and the matrix of the transform in float64."""
    x, weight, shift = torch.randn(4, size), torch.rand(size), torch.randn(size)
    exact = torch.nn.functional.rms_norm(x.double(), (size,), weight.double(), EPS)
    exact = exact @ hadamard_matrix(size).T - shift
    q = rmsnorm_hadamard_quantize(x, weight, EPS, signs_of(size), torch.tensor(0.06), 8, shift)
    assert (q * 0.06 - exact.clamp(-128 * 0.06, 127 * 0.06)).abs().max() < 0.03 * 1.001


def test_size_one_is_the_norm():
    x = torch.randn(9, 1)
    q = rmsnorm_hadamard_quantize(x, None, EPS, None, SCALE, 8)
    assert_bits_equal(q, rmsnorm_quantize(x, None, EPS, SCALE, 8))


@pytest.mark.parametrize(
    ("columns", "k"), [(36, 12), (8, 12), (0, 12), (25, None), (60, None), (96, 20), (12, None)]
)
def test_size_that_is_not_that_of_the_signs(columns, k):
    signs = None if k is None else hadamard_signs(k)
    with pytest.raises(ValueError, match=r"^rmsnorm_hadamard_quantize: x: expected"):
        rmsnorm_hadamard_quantize(torch.zeros(2, columns), None, EPS, signs, SCALE, 4)


@pytest.mark.parametrize("size", [8, 24])
def test_opcheck(size):
    x, signs = torch.randn(3, size), signs_of(size)
    op = torch.ops.prefixquant.rmsnorm_hadamard_quantize.default
    torch.library.opcheck(op, (x, None, EPS, signs, SCALE, 4))
    torch.library.opcheck(op, (strided(x), torch.ones(size), EPS, signs, SCALE, 4, x[0].half()))


def test_torch_compile_has_no_graph_break():
    x, signs = torch.randn(5, 576), signs_of(576)

    def block(x):
        return rmsnorm_hadamard_quantize(x * 2, None, EPS, signs, SCALE, 4) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_bits_equal(compiled(x), block(x))
