# SPDX-License-Identifier: Apache-2.0
"""compand_ on CUDA against the reference, bit for bit."""

import pytest
import reference
import torch
from compare import assert_bits_equal
from prefixquant import _C
from prefixquant.ops import compand_
from prefixquant.quantizer import fake_quantize

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)


def integers(count: int) -> torch.Tensor:
    every = torch.arange(-128, 128).to(torch.int8)
    return every.repeat(count // 256 + 1)[:count]


@pytest.mark.parametrize("count", [0, 1, 3, 15, 16, 17, 255, 256, 4095, 4096, 4099, 3_000_001])
def test_counts(count):
    q = integers(count)
    found = q.cuda()
    assert compand_(found) is found
    assert_bits_equal(found.cpu(), reference.compand(q))


@pytest.mark.parametrize("begin", [1, 7, 15])
@pytest.mark.parametrize("count", [1, 14, 16, 40, 5000])
def test_misaligned_and_nothing_else_is_written(begin, count):
    whole = integers(begin + count + 40)
    found = whole.cuda()
    compand_(found[begin : begin + count])
    expected = whole.clone()
    expected[begin : begin + count] = reference.compand(whole[begin : begin + count])
    assert_bits_equal(found.cpu(), expected)


def test_graph():
    q = integers(10_000)
    static = q.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compand_(static)
    static.copy_(q)
    graph.replay()
    assert_bits_equal(static.cpu(), reference.compand(q))


def test_training_rounds_as_the_cpu_does():
    x, scale = torch.randn(300, 64), torch.tensor(0.03)
    found = []
    for device in ("cpu", "cuda"):
        value = x.to(device).requires_grad_()
        size = scale.to(device).requires_grad_()
        out = fake_quantize(value, size, 4, companded=True)
        out.square().sum().backward()
        found.append((out.detach().cpu(), value.grad.cpu(), size.grad.cpu()))
    assert_bits_equal(found[0][0], found[1][0])
    assert_bits_equal(found[0][1], found[1][1])
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-4)
