# SPDX-License-Identifier: Apache-2.0
"""The levels of companded activations: the operation, the quantizer, its gradients, the schemes."""

import itertools
import math

import pytest
import reference
import torch
from cases import COLUMN_COUNTS, ROW_COUNTS
from compare import assert_bits_equal
from prefixquant.calibrate import search_activation_scale
from prefixquant.config import Scheme
from prefixquant.errors import UserError
from prefixquant.modeling.linear import QuantLinear
from prefixquant.ops import compand_, pack_int4, quantize_dynamic, quantize_static
from prefixquant.quantizer import (
    COMPANDED_LEVELS,
    _companded_at_once,
    _rounded,
    fake_quantize,
    fake_quantize_dynamic,
    minmax_scale,
    quantize,
)

EVERY_INTEGER = torch.arange(-128, 128).to(torch.int8)


def test_levels():
    """Within one unit of the curve that the documentation names; no ties but that at 0."""
    for index, level in enumerate(COMPANDED_LEVELS):
        t = (2 * index + 1) / 15
        assert abs(level - 126 * math.sinh(2 * t) / math.sinh(2)) <= 1
    halves = [(a + b) % 2 for a, b in itertools.pairwise(COMPANDED_LEVELS)]
    assert halves == [1] * 7


def test_every_integer(isa):
    found = compand_(EVERY_INTEGER.clone())
    assert_bits_equal(found, reference.compand(EVERY_INTEGER))
    assert set(found.tolist()) == {s * level for level in COMPANDED_LEVELS for s in (1, -1)}
    assert_bits_equal(compand_(found.clone()), found)  # levels stay what they are


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("columns", COLUMN_COUNTS)
def test_shapes(isa, rows, columns):
    q = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    expected = reference.compand(q)
    assert compand_(q) is q
    assert_bits_equal(q, expected)


def test_threads_do_not_change_the_result():
    q = torch.randint(-128, 128, (1001, 1237), dtype=torch.int8)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_bits_equal(compand_(q.clone()), reference.compand(q))
    finally:
        torch.set_num_threads(threads)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="q: expected dtype int8, got float32"):
        compand_(torch.zeros(3))
    with pytest.raises(ValueError, match="q: expected a contiguous tensor"):
        compand_(torch.zeros(4, 4, dtype=torch.int8)[:, ::2])


def test_opcheck():
    torch.library.opcheck(torch.ops.prefixquant.compand_.default, (EVERY_INTEGER.clone(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantization_equals_the_operations(dtype):
    x = (torch.randn(37, 64) * 3).to(dtype)
    scale = torch.tensor(0.07)
    q = compand_(quantize_static(x, scale, 8))
    assert_bits_equal(quantize(x, scale, 4, companded=True).to(torch.int8), q)
    assert_bits_equal(fake_quantize(x, scale, 4, companded=True), (q * scale).to(dtype))
    q, row_scale = quantize_dynamic(x, 8, 0.9)
    found = fake_quantize_dynamic(x, torch.tensor(0.9), 4, companded=True)
    assert_bits_equal(found, (compand_(q) * row_scale[:, None]).to(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_a_gpu_gives_the_same_values(dtype, shape):
    """Ties between integers, what lies beside them, and the ends of the range."""
    halves = torch.arange(-260, 260) / 2
    beside = [halves.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat((halves, *beside, torch.randn(600) * 60)).repeat(9, 1)
    scale = 2.0 ** torch.arange(9)[:, None] if shape == (9, 1) else torch.full(shape, 0.5)
    x = (x * scale).to(dtype)
    for found, expected in zip(
        _companded_at_once(x, scale), _rounded(x, scale, 4, True), strict=True
    ):
        assert_bits_equal(found, expected)


def test_gradients():
    """Those of LSQ: the identity in range, and the error (or the end of the range) by the scale."""
    x = torch.tensor([0.3, -7.1, 100.0, 127.4, 300.0, -400.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale, 4, companded=True).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1, 0, 0]
    expected = (5 - 0.3) + (-5 + 7.1) + (95 - 100.0) + (126 - 127.4) + 126 - 126
    assert scale.grad.item() == pytest.approx(expected, abs=1e-4)


def test_companding_pays_where_values_are_gaussian():
    """By the searched scales: about 0.8 of the error of even levels, 0.7 with rows of other sizes
    (an even quantizer of 16 levels has 0.0115 on a Gaussian, the best one 0.0095)."""
    weight = [torch.eye(64)]
    for sizes, share in ((torch.ones(4000, 1), 0.86), (torch.rand(4000, 1) + 0.2, 0.8)):
        x = torch.randn(4000, 64) * sizes
        even, companded = (
            (fake_quantize(x, search_activation_scale(x, weight, 4, "static", c), 4, c) - x)
            for c in (False, True)
        )
        assert companded.square().sum() < share * even.square().sum()


def test_the_scale_that_covers_the_range():
    assert minmax_scale(torch.tensor(255.0), 4, companded=True) == 2


@pytest.mark.parametrize("text", ["w4a4ckv4", "w4a4cdkv4d", "w4a4ckv16"])
def test_schemes(text):
    scheme = Scheme.parse(text)
    assert scheme.companded
    assert scheme.container_bits == 8
    assert str(scheme) == text


@pytest.mark.parametrize("text", ["w4a8ckv4", "w4a16ckv4"])
def test_only_four_bits_are_companded(text):
    with pytest.raises(UserError, match="companded expected true"):
        Scheme.parse(text)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_packed_linear_equals_fake_quantization(mode):
    q = torch.randint(-8, 8, (24, 32), dtype=torch.int8)
    weight_scale, bias = torch.rand(24) + 0.1, torch.randn(24)
    scale = torch.tensor(0.9 if mode == "dynamic" else 0.05)
    linear = QuantLinear(
        pack_int4(q),
        weight_scale,
        scale,
        bias,
        activation_bits=4,
        compute_dtype=torch.float32,
        activation_mode=mode,
        companded=True,
    )
    x = torch.randn(2, 5, 32)
    quantizer = fake_quantize_dynamic if mode == "dynamic" else fake_quantize
    weight = q.double() * weight_scale[:, None].double()
    expected = quantizer(x, scale, 4, True).double() @ weight.T + bias
    assert torch.allclose(linear(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert repr(linear) == "QuantLinear(32, 24, w4a4c)"
