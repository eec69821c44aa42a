# SPDX-License-Identifier: Apache-2.0
"""The references of tests/reference.py against independent formulas."""

import pytest
import reference
import torch
from cases import FLOAT_DTYPES, KV_SHAPES, SIGN_SIZES, outlier_rows
from prefixquant.hadamard import hadamard_matrix, hadamard_signs, split_size


def test_pack_int4_is_two_nibbles():
    q = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    assert reference.pack_int4(q).tolist() == [[0x78, 0xF0]]
    assert reference.unpack_int4(reference.pack_int4(q)).tolist() == q.tolist()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizer_is_the_nearest_level(bits):
    scale = torch.tensor(0.1)
    x = outlier_rows(17, 64, torch.float32, factor=10.0)
    q = reference.quantize_static(x, scale, bits)
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * scale.double()
    nearest = (x.double()[..., None] - levels).abs().amin(-1)
    assert ((q.double() * scale.double() - x.double()).abs() - nearest).abs().max() < 1e-6
    assert reference.quantize_static(torch.tensor(float("nan")), scale, bits) == 0


@pytest.mark.parametrize("size", [2, 64, 1024, 96, 1536, *(4 * k for k in SIGN_SIZES)])
def test_hadamard_is_the_matrix(size):
    k = split_size(size)[1]
    signs = hadamard_signs(k) if k > 1 else None
    x = torch.randn(3, 2, size)
    exact = x.double() @ hadamard_matrix(size).T
    assert (reference.hadamard(x, signs, size) - exact).abs().max() < 1e-5


def test_exp_error():
    """Over all of [-87, 88] in steps of 2^-13: at most 1 ulp (measured 0.97)."""
    x = torch.arange(-87 * 2**13, 88 * 2**13).float() / 2**13
    exact = x.double().exp()
    ulp = torch.exp2(exact.log2().floor() - 23)
    assert ((reference.exp_float32(x) - exact).abs() / ulp).max() < 1.0


def test_exp_at_the_ends():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -104.0, -103.0, 0.0, 88.72, 88.73, inf, nan])
    expected = torch.exp(x)
    actual = reference.exp_float32(x)
    assert actual[[0, 1, 3, 5, 6]].tolist() == [0.0, 0.0, 1.0, inf, inf]
    assert actual[7].isnan()
    torch.testing.assert_close(actual[[2, 4]], expected[[2, 4]], rtol=2e-7, atol=2e-45)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_silu_error(dtype):
    """Within 2e-7 relative of the exact silu (measured 1.54e-7)."""
    g = torch.linspace(-80, 80, 100001).to(dtype)
    exact = torch.nn.functional.silu(g.double())
    error = (reference.silu_float32(g.float()) - exact).abs()
    assert (error <= 2e-7 * exact.abs()).all()


def test_outlier_scan_by_hand():
    x = torch.tensor([[1.0, -2.0], [-200.0, 3.0], [1.0, 1.0], [0.5, -4.0]])
    row_max, median, is_outlier = reference.outlier_scan(x, 64.0)
    assert row_max.tolist() == [2.0, 200.0, 1.0, 4.0]
    assert median == 2.0
    assert is_outlier.tolist() == [False, True, False, False]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", KV_SHAPES)
def test_kv_round_trip(shape, bits):
    scale = torch.rand(shape[1]) + 0.05
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    levels = torch.randint(qmin, qmax + 1, shape)
    x = levels * scale[:, None, None]
    q = reference.kv_quantize(x, scale, bits)
    assert torch.equal(reference.kv_dequantize(q, scale, bits, torch.float32), x)
