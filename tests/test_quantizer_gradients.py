# SPDX-License-Identifier: Apache-2.0
"""The quantizers of training: gradients, and the same values as without them."""

import pytest
import torch
from prefixquant import ops
from prefixquant.finetune.end_to_end import DistillationLoss
from prefixquant.quantizer import (
    _rounded,
    _rounded_at_once,
    fake_quantize,
    fake_quantize_dynamic,
    qrange,
)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(), (5, 1), (3, 1, 1)])
def test_quantizer_gradients_follow_the_lsq_formula(bits, shape):
    x = (torch.randn(3, 5, 64) * 3).requires_grad_()
    scale = (torch.rand(shape) * 4 / 2**bits + 0.05).requires_grad_()
    out = fake_quantize(x, scale, bits)
    outer = torch.randn_like(out)
    out.backward(outer)

    qmin, qmax = qrange(bits)
    v = (x / scale).detach().double()
    rounded = v.round()
    inside = (rounded >= qmin) & (rounded <= qmax)
    assert inside.any()
    assert not inside.all()
    assert torch.equal(x.grad, outer * inside)
    local = torch.where(inside, rounded - v, rounded.clamp(qmin, qmax))
    expected = (outer.double() * local).sum_to_size(scale.shape)
    assert torch.allclose(scale.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_quantizer_gradients_are_finite_differences_where_rounding_is_the_identity():
    """Without its rounding the quantizer is ``clamp(v, qmin, qmax) * s`` plus the rounding error,
    which straight-through holds constant in steps: differences of that are the gradients."""
    x = torch.randn(200, dtype=torch.float64) * 3
    scale, step = torch.tensor(0.31, dtype=torch.float64), 1e-6
    qmin, qmax = qrange(4)
    start = x / scale
    rounded = start.round()
    offset = rounded - start  # of each value, in steps

    def surrogate(values, s):
        q = values / s + offset
        return torch.where((rounded >= qmin) & (rounded <= qmax), q, q.clamp(qmin, qmax)) * s

    by_scale = (surrogate(x, scale + step) - surrogate(x, scale - step)) / (2 * step)
    by_value = (surrogate(x + step, scale) - surrogate(x - step, scale)) / (2 * step)
    leaf, s = x.float().requires_grad_(), scale.float().requires_grad_()
    out = fake_quantize(leaf, s, 4)
    for index in range(0, 200, 9):
        grad_x, grad_s = torch.autograd.grad(out[index], (leaf, s), retain_graph=True)
        assert grad_x[index].item() == pytest.approx(by_value[index].item(), abs=1e-4)
        assert grad_s.item() == pytest.approx(by_scale[index].item(), abs=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (3, 1, 1), (3, 5, 1)])
def test_quantizer_gives_the_same_values_with_and_without_gradients(shape, dtype, bits):
    x, scale = torch.randn(3, 5, 64) * 3, torch.rand(shape) * 4 / 2**bits + 0.05
    # Ties between levels, and the ends of the range.
    ties = torch.arange(-(2**bits), 2**bits, 0.5)[:64]
    x[:, :, : len(ties)] = ties * scale.expand(3, 5, 1) if shape else ties * scale
    x = x.to(dtype)
    plain = fake_quantize(x, scale, bits)
    found = fake_quantize(x.clone().requires_grad_(), scale, bits)
    assert found.dtype == dtype
    assert torch.equal(found, plain)
    at_once = _rounded_at_once(x, scale, bits)  # training's way on a GPU
    assert (at_once is None) == (len(shape) == 3 and shape[1] > 1)
    if at_once is not None:
        assert all(map(torch.equal, at_once, _rounded(x, scale, bits)))


def test_quantizer_gradients_of_16_bit_activations_are_those_of_32():
    x, outer = (torch.randn(40, 500).bfloat16() for _ in range(2))
    for scale in (torch.tensor(0.4), torch.rand(40, 1) + 0.2):
        gradients = []
        for dtype in (torch.float32, torch.bfloat16):
            leaf = x.detach().to(dtype, copy=True).requires_grad_()
            s = scale.clone().requires_grad_()
            fake_quantize(leaf, s, 4).backward(outer.to(dtype))
            gradients.append((leaf.grad.float(), s.grad))
        (by_x, by_scale), (low_by_x, low_by_scale) = gradients
        assert torch.equal(by_x, low_by_x)
        assert (low_by_scale - by_scale).norm() < 1e-5 * by_scale.norm()


def test_distillation_loss_is_the_kl_divergence_with_its_gradient():
    hidden = torch.randn(37, 12, requires_grad=True)
    teacher, head = torch.randn(37, 12), torch.randn(50, 12)
    loss = DistillationLoss.apply(hidden, teacher, head)
    (3 * loss).backward()
    copy = hidden.detach().double().requires_grad_()
    q = (copy @ head.double().T).log_softmax(-1)
    p = (teacher.double() @ head.double().T).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(hidden.grad.double(), copy.grad, atol=1e-6)
    same = DistillationLoss.apply(teacher, teacher, head)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_dynamic_quantization_is_the_operation_with_a_learnable_clip():
    x = torch.randn(6, 40)
    x[2] = 0
    x[4] *= 1000
    clip = torch.tensor(0.8, requires_grad=True)
    out = fake_quantize_dynamic(x, clip, 4)
    q, scale = ops.quantize_dynamic(x, 4, clip.item())
    assert torch.equal(out, q * scale[:, None])
    out.square().sum().backward()
    assert clip.grad.abs() > 0
