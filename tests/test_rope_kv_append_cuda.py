# SPDX-License-Identifier: Apache-2.0
"""What writes a KV cache on the GPU, and reads it back: bit for bit as the reference."""

import pytest
import reference
import test_kv_quant as cpu_quant
import test_rope_kv_append as cpu_rope
import torch
from cases import FLOAT_DTYPES, KV_SHAPES, poisoned
from compare import assert_bits_equal
from kv_cases import HEADS, new_cache
from prefixquant import _C, ops
from torch import Tensor

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)


def on_gpu(inputs: dict) -> dict:
    """Strides survive: a permuted view stays one."""
    return {n: v.cuda() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def check(inputs: dict) -> None:
    expected = {**inputs, **{n: inputs[n].clone() for n in ("k_cache", "v_cache")}}
    device = on_gpu(inputs)
    q = ops.rope_kv_append(**device)
    assert_bits_equal(q.cpu(), reference.rope_kv_append(**expected), "q")
    for name in ("k_cache", "v_cache"):
        assert_bits_equal(device[name].cpu(), expected[name], name)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_rope_kv_append(heads, bits):
    for dtype in FLOAT_DTYPES:
        for norms in (False, True):
            for rotate in (False, True):
                options = {"dtype": dtype, "norms": norms, "rotate": rotate}
                check(cpu_rope.make_inputs(heads, bits, **options, shift=norms != rotate))


@pytest.mark.parametrize("tokens", [0, 1, 21])
def test_token_counts(tokens):
    check(cpu_rope.make_inputs((3, 1, 64), 4, tokens))


def test_many_tokens():
    """Enough of them that a warp takes eight heads."""
    inputs = cpu_rope.make_inputs((32, 8, 128), 4, 2, dtype=torch.bfloat16, shift=True)
    inputs["qkv"] = torch.randn(600, 48 * 128).bfloat16()
    inputs["positions"] = torch.randint(cpu_rope.POSITIONS, (600,), dtype=torch.int32)
    for name in ("k_cache", "v_cache"):
        inputs[name] = new_cache(4, 8, 160, 128, 4, None)
    inputs["slots"] = torch.randperm(640)[:600]
    check(inputs)


def test_rows_that_are_not_written():
    inputs = cpu_rope.make_inputs((6, 2, 64), 4)
    inputs["slots"][1:4] = torch.tensor([-1, -7, -(2**62)])
    check(inputs)


@pytest.mark.parametrize("offset", [100, 101])
def test_strided_and_unaligned(offset):
    inputs = cpu_rope.make_inputs((6, 2, 64), 4)
    inputs["qkv"] = torch.randn(5, 2000)[:, offset : offset + 10 * 64]
    for name in ("k_cache", "v_cache"):
        inputs[name] = new_cache(7, 3, 2, 64, 4, None).permute(1, 2, 0, 3)
    check(inputs)
    inputs["k_shift"] = torch.randn(2 * 64 + offset)[offset:].view(2, 64)
    check(inputs)


def test_outliers_and_not_a_number():
    inputs = cpu_rope.make_inputs((3, 1, 64), 4, 7)
    inputs["qkv"][1] *= 1e6
    inputs["qkv"][2, ::3] = float("nan")
    inputs["qkv"][3, 0] = float("inf")
    check(inputs)
    inputs["k_shift"] = torch.randn(1, 64)
    inputs["k_shift"][0, 3:5] = torch.tensor([float("inf"), float("nan")])
    check(inputs)


def test_graph_and_side_stream():
    inputs = on_gpu(cpu_rope.make_inputs((6, 2, 64), 4, dtype=torch.bfloat16))
    expected = ops.rope_kv_append(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = ops.rope_kv_append(**inputs)
    q.zero_()
    graph.replay()
    assert_bits_equal(q.cpu(), expected.cpu())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", KV_SHAPES)
def test_quantize_and_back(shape, bits):
    scale = cpu_quant.scales(shape[1])
    for dtype in FLOAT_DTYPES:
        x = torch.randn(shape).mul(3).to(dtype)
        for signs, block in cpu_quant.plans(shape[-1]):
            on = None if signs is None else signs.cuda()
            for shift in (torch.randn(shape[1], shape[3]), None):
                expected = reference.kv_quantize(x, scale, bits, signs, block, shift)
                there = None if shift is None else shift.cuda()
                q = ops.kv_quantize(x.cuda(), scale.cuda(), bits, on, block, there)
                assert_bits_equal(q.cpu(), expected)
        y = ops.kv_dequantize(q, scale.cuda(), bits, dtype)
        assert_bits_equal(y.cpu(), reference.kv_dequantize(expected, scale, bits, dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_append(bits):
    x, scale = torch.randn(2, 3, 5, 64).transpose(1, 2)[:, :3], cpu_quant.scales(3)
    width, dtype = (32, torch.uint8) if bits == 4 else (64, torch.int8)
    cache = torch.full((2, 3, 20, width), 7, dtype=dtype)
    device = cache.cuda()
    shift = torch.randn(3, 64)
    ops.kv_append(x, scale, bits, None, 64, cache, 11, shift)
    ops.kv_append(x.cuda(), scale.cuda(), bits, None, 64, device, 11, shift.cuda())
    assert_bits_equal(device.cpu(), cache)


@pytest.mark.parametrize("bits", [4, 8])
def test_not_a_number_is_zero(bits):
    x, scale = poisoned(54, 64, torch.bfloat16).view(2, 3, 9, 64), cpu_quant.scales(3)
    q = ops.kv_quantize(x.cuda(), scale.cuda(), bits)
    assert_bits_equal(q.cpu(), reference.kv_quantize(x, scale, bits))


WRONG = [
    ("qkv", torch.zeros(5, 640, dtype=torch.int8)),
    ("qkv", torch.zeros(5, 630)),
    ("cos", torch.zeros(50, 32)),
    ("sin", torch.zeros(49, 64)),
    ("positions", torch.zeros(5, dtype=torch.int64)),
    ("q_norm", torch.ones(63)),
    ("k_norm", None),
    ("rotation_size", 32),
    ("k_scale", None),
    ("v_scale", torch.ones(3)),
    ("kv_bits", 5),
    ("k_cache", torch.zeros(3, 2, 7, 32, dtype=torch.int8)),
    ("v_cache", torch.zeros(3, 2, 6, 32, dtype=torch.uint8)),
    ("slots", torch.zeros(5, dtype=torch.int32)),
    ("heads", 5),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_argument_is_named(name, value):
    good = cpu_rope.make_inputs((6, 2, 64), 4, norms=True)
    good["q_norm"], good["k_norm"] = torch.ones(64), torch.ones(64)
    with pytest.raises(ValueError, match=rf"rope_kv_append: {name}: expected"):
        ops.rope_kv_append(**on_gpu({**good, name: value}))


def test_cpu_tensors_are_refused():
    """The kernels' own checks: whoever calls past the dispatcher gets an error, not a crash."""
    inputs = cpu_rope.make_inputs((6, 2, 64), 4)
    q = torch.empty(inputs["qkv"].shape[0], 6, 64)
    with pytest.raises(ValueError, match="qkv: expected a CUDA tensor, got cpu"):
        _C.rope_kv_append_cuda(**inputs, q=q, stream=0)
    x, cache = torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="x: expected a CUDA tensor, got cpu"):
        _C.kv_quantize_cuda("kv_quantize", x, torch.ones(2), 4, None, 1, None, cache, 0, 0)
    with pytest.raises(ValueError, match="q: expected a CUDA tensor, got cpu"):
        _C.kv_dequantize_cuda(cache, torch.ones(2), 4, None, x, 0)
