# SPDX-License-Identifier: Apache-2.0
"""The Hadamard operations on CUDA against the CPU reference.

Transforms and levels without SwiGLU are compared bit for bit. silu is within 4 ulp of float32 on
CUDA, so that a level after SwiGLU may differ by one at a tie: `assert_quantized_close`.
"""

import pytest
import reference
import torch
from cases import (
    FLOAT_DTYPES,
    HADAMARD_SIZES,
    INTEGER_SIZES,
    ROW_COUNTS,
    SIGN_SIZES,
    edge_blocks,
    outlier_rows,
    poisoned,
    strided,
)
from compare import assert_bits_equal, assert_quantized_close
from prefixquant import _C, ops
from prefixquant.hadamard import hadamard_signs, split_size

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)

SCALE = torch.tensor(0.23)
# Intermediate sizes of real models; blocks of more than one segment of 1024; the largest.
MODEL_SIZES = (
    *(1536, 4864, 8192, 8960, 9728, 11008, 12288, 13824, 14336, 16384, 17408, 18944, 25600),
    *(27648, 28672),
)
COMPILED = [k for k in SIGN_SIZES if k <= 60]


def signs_of(size):
    k = split_size(size)[1]
    return hadamard_signs(k) if k > 1 else None


def on_gpu(t):
    return None if t is None else t.cuda()


def check_swiglu(gate, up, signs, size, bits=8):
    x = reference.swiglu_float32(gate, up)
    y = reference.hadamard_float32(x, signs, size)
    arguments = (gate.cuda(), up.cuda(), on_gpu(signs), size)
    finite = y.isfinite()
    # Errors of silu are relative to the size of a row, hence a scale that follows it.
    rms = y[finite].double().square().mean().sqrt().float()
    scale = rms / 4 if rms > 0 else torch.tensor(1.0)
    q = ops.swiglu_hadamard_quantize(*arguments, scale.cuda(), bits).cpu()
    expected = reference.quantize_static(y, scale, bits)
    quotient = torch.where(finite, y.double() / scale.double(), 0.0)
    # Sums of integers are off by 1e-5 of an 8-bit level on average and by 7e-5 at most (18944
    # elements), silu within 4 ulp by half of that.
    near = 1e-5 * 2 ** (bits - 4)
    assert_quantized_close(q, expected, quotient, near)
    if not finite.all():
        return
    q, scale = ops.swiglu_hadamard_quantize_dynamic(*arguments, bits)
    expected_q, expected_scale = reference.quantize_dynamic(y, bits)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=2e-6, atol=1e-38)
    quotient = y.double().reshape(-1, y.shape[-1]) / expected_scale.double()[:, None]
    assert_quantized_close(q.cpu(), expected_q, quotient.reshape(y.shape), near)


def check(x, signs, size, bits=4):
    x_gpu, signs_gpu = x.cuda(), on_gpu(signs)
    y = ops.hadamard(x_gpu, signs_gpu, size)
    assert_bits_equal(y.cpu(), reference.hadamard(x, signs, size))
    q = ops.hadamard_quantize(x_gpu, signs_gpu, size, SCALE.cuda(), bits)
    assert_bits_equal(q.cpu(), reference.hadamard_quantize(x, signs, size, SCALE, bits))


@pytest.mark.parametrize("k", COMPILED)
def test_compiled_signs_are_those_of_python(k):
    signs = torch.zeros(k, k, dtype=torch.int8)
    _C.hadamard_compiled_signs(k=k, signs=signs)
    assert torch.equal(signs, hadamard_signs(k))


def least_ms(launch):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def test_the_compiled_sums_are_the_ones_that_run():
    """Another matrix, whose sums are not written out, takes several times as long."""
    x = torch.randn(4096, 14336, device="cuda").bfloat16()
    signs = signs_of(14336).cuda()
    others = -signs
    compiled = least_ms(lambda: ops.hadamard(x, signs, 14336))
    assert least_ms(lambda: ops.hadamard(x, others, 14336)) > 2 * compiled


@pytest.mark.parametrize("size", HADAMARD_SIZES)
def test_sizes(size):
    signs = signs_of(size)
    for dtype in FLOAT_DTYPES:
        for blocks in (1, 3):
            x = outlier_rows(3, blocks * size, dtype, factor=20.0)
            check(x, signs, size)
            check_swiglu(x, x.flip(0), signs, size)


@pytest.mark.parametrize("size", MODEL_SIZES)
@pytest.mark.parametrize("rows", [1, 2, 40, 150, 300])
def test_model_sizes(size, rows):
    if rows * size > 4.5e6:
        pytest.skip("larger than this test needs")
    signs = signs_of(size)
    for dtype in (torch.bfloat16, torch.float16):
        gate, up = outlier_rows(rows, 2 * size, dtype, factor=10.0).chunk(2, -1)
        check(gate, signs, size)
        check_swiglu(gate, up, signs, size, 4)


@pytest.mark.parametrize(
    ("size", "rows", "blocks"),
    [(28672, 530, 1), (28672, 140, 2), (36864, 270, 1), (53248, 40, 1), (61440, 30, 1)],
)
def test_long_blocks_of_many_rows(size, rows, blocks):
    """Two CTAs share a block, and take several one after the other."""
    x = outlier_rows(rows, blocks * size, torch.bfloat16, factor=10.0)
    x[3, 5] = torch.nan
    signs = signs_of(size)
    check(x, signs, size)
    check(x, -signs, size)  # sums that are not compiled
    check_swiglu(x, x.flip(0), signs, size, 4)


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        *((1536, 5000), (3072, 2300), (5120, 1700), (4864, 1700), (8960, 900), (9728, 900)),
        *((11008, 600), (13824, 560), (18944, 560), (27648, 300)),
    ],
)
def test_a_cta_that_takes_several_blocks(size, rows):
    x = outlier_rows(rows, size, torch.bfloat16, factor=10.0)
    x[3, 5] = torch.nan
    signs = signs_of(size)
    check(x, signs, size)
    check_swiglu(x, x.flip(0), signs, size, 4)


def test_rows_beyond_whole_rounds():
    """Where an SM holds one CTA, the last rows are another launch."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    gate, up = outlier_rows(2 * sms + 7, 2 * 27648, torch.bfloat16, factor=10.0).chunk(2, -1)
    gate[-1, 5] = torch.nan
    check(gate, signs_of(27648), 27648)
    check_swiglu(gate, up, signs_of(27648), 27648, 4)


PAIRED = [(108, 128), (148, 128), (68, 256)]  # k and 2^m


@pytest.mark.parametrize(("k", "pow2"), PAIRED)
@pytest.mark.parametrize(("rows", "blocks"), [(140, 2), (264, 1), (265, 1), (397, 1), (530, 1)])
def test_blocks_of_integers_shared_by_ctas(k, pow2, rows, blocks):
    """Clusters take a block, several one after the other, or one more than others. (Without SwiGLU,
    where CTAs share no block, `bench_hadamard check` has this kernel bit for bit.)"""
    size = k * pow2
    x = outlier_rows(rows, blocks * size, torch.bfloat16, factor=10.0)
    up = x.flip(0)
    check_swiglu(x, up, hadamard_signs(k), size)
    x[3, 5] = torch.nan
    x[rows - 1, size - 1] = torch.inf
    check_swiglu(x, up, hadamard_signs(k), size, 4)
    if rows == 265:
        signs = hadamard_signs(k).flip(0).contiguous()
        check_swiglu(x.half(), up.half(), signs, size, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "pow2"), PAIRED)
def test_edges_of_blocks_shared_by_ctas(dtype, k, pow2):
    """A block that is not finite, or all zeros, between others of the same cluster."""
    size, signs = k * pow2, hadamard_signs(k)
    x = edge_blocks(size, dtype).repeat(60, 1)
    check_swiglu(x, x.flip(0), signs, size)
    check_swiglu(x, x, signs, size, 4)


@pytest.mark.parametrize("k", SIGN_SIZES)
@pytest.mark.parametrize("pow2", [1, 2, 4, 8, 16, 64, 128])
def test_sign_matrices(k, pow2):
    signs = hadamard_signs(k)
    for matrix in (signs, signs.flip(0), -signs):  # with and without a kernel of their own
        check(torch.randn(5, 2 * k * pow2).bfloat16(), matrix.contiguous(), k * pow2)


@pytest.mark.parametrize("rows", [*ROW_COUNTS, 5000])
@pytest.mark.parametrize("size", [1, 64, 96, 1536])
def test_rows(rows, size):
    signs = signs_of(size)
    x = outlier_rows(rows, 1536, torch.float16, factor=20.0)
    check(x, signs, size)
    check_swiglu(x, x.flip(0), signs, size)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [64, 96])
def test_strided_and_misaligned(dtype, size):
    x = outlier_rows(2 * size, 2 * size, dtype, factor=20.0)
    signs = signs_of(size)
    wide = torch.cat((x[:, :1], x), -1)
    for view in (strided(x), x.T, x[::3], x[0], wide[:, 1:]):
        check(view, signs, size, 8)
        check_swiglu(view, view.flip(0), signs, size)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [1, 64, 96, 192])
def test_not_a_number_stays_in_its_block(dtype, size):
    x = poisoned(17, 192, dtype)
    signs = signs_of(size)
    check(x, signs, size)
    check(x, signs, size, 8)
    check_swiglu(x, x.flip(0), signs, size)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [*INTEGER_SIZES, 76 * 64, 76 * 128, 148 * 128, 68 * 256])
@pytest.mark.parametrize("copies", [1, 40])
def test_sums_of_integers_at_the_edges(dtype, size, copies):
    """NaN and infinity fill their block and no other, whatever kernel takes it."""
    if dtype == torch.float32 and copies > 1:
        pytest.skip("one kernel")
    x = edge_blocks(size, dtype).repeat(copies, 1)
    check(x, signs_of(size), size)
    check(x, signs_of(size), size, 8)
    check(torch.cat((x, x.flip(0)), 1), signs_of(size), size)
    check_swiglu(x, x.flip(0), signs_of(size), size)
    finite = x[2:9]
    check_swiglu(
        finite[torch.arange(2 * copies) % 7],
        torch.ones(2 * copies, size).to(dtype),
        signs_of(size),
        size,
    )


@pytest.mark.parametrize("k", [64, 80, 84, 112, 128, 132, 160, 176, 192, 200])
@pytest.mark.parametrize("pow2", [8, 32, 64, 128, 256, 512])
def test_any_signs_of_integer_sums(k, pow2):
    """Sizes of no Hadamard matrix: the kernels take any signs."""
    if k * pow2 > 48000:
        pytest.skip("larger than a CTA's shared memory")
    signs = (torch.randint(0, 2, (k, k)) * 2 - 1).to(torch.int8)
    for rows in (3, 150):
        check(torch.randn(rows, k * pow2).half(), signs, k * pow2)


def test_rate_of_differing_levels_after_swiglu():
    """At most 1e-5 of the levels of a real size, each by one and at a tie."""
    gate, up = torch.randn(64, 28672).bfloat16().chunk(2, -1)
    signs = signs_of(14336)
    q = ops.swiglu_hadamard_quantize(gate.cuda(), up.cuda(), signs.cuda(), 14336, SCALE.cuda(), 4)
    expected = reference.swiglu_hadamard_quantize(gate, up, signs, 14336, SCALE, 4)
    assert (q.cpu() != expected).double().mean() <= 1e-5


def test_a_block_beyond_shared_memory_is_refused():
    # The CTAs of a cluster share a block of 16 bits; one of 32 bits is one CTA's.
    for dtype, size in ((torch.float16, 2**20), (torch.float32, 2**17)):
        x = torch.zeros(1, size, dtype=dtype, device="cuda")
        with pytest.raises(ValueError, match="block_size: expected at most"):
            ops.hadamard(x, None, size)


def test_streams_and_graphs():
    gate_up = torch.randn(4, 28672).bfloat16()
    signs = signs_of(14336)
    static, signs_gpu, scale = gate_up.cuda(), signs.cuda(), SCALE.cuda()

    def run():
        return ops.swiglu_hadamard_quantize(*static.chunk(2, -1), signs_gpu, 14336, scale, 4)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = run()
    stream.synchronize()
    assert_bits_equal(on_stream, run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = run()
    static.copy_(gate_up * 0.5)
    graph.replay()
    assert_bits_equal(q, run())


def test_torch_compile_has_no_graph_break():
    x, scale = torch.randn(17, 1536, dtype=torch.bfloat16, device="cuda"), SCALE.cuda()
    signs = signs_of(1536).cuda()

    def block(x):
        return ops.hadamard_quantize(x + 1, signs, 1536, scale, 4) + 1

    assert_bits_equal(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.parametrize("size", [1, 8, 12, 96])
def test_opcheck(size):
    x, signs, scale = torch.randn(3, 96).cuda(), on_gpu(signs_of(size)), SCALE.cuda()
    table = torch.ops.prefixquant
    torch.library.opcheck(table.hadamard.default, (x, signs, size))
    torch.library.opcheck(table.hadamard_quantize.default, (x, signs, size, scale, 4))
    args = (x, x + 1, signs, size)
    torch.library.opcheck(table.swiglu_hadamard_quantize.default, (*args, scale, 4))
    torch.library.opcheck(table.swiglu_hadamard_quantize_dynamic.default, (*args, 4))


WRONG = {
    "gate": [lambda t: t.int(), lambda t: t[:, :0], lambda t: t[:, :12]],
    "up": [lambda t: t.half(), lambda t: t[:1], lambda t: t.cpu()],
    "signs": [
        lambda t: t.float(),
        lambda t: t[:8],
        lambda t: t.flatten(),
        lambda t: t.flip(0).T,
        lambda t: t.cpu(),
    ],
    "block_size": [lambda _: 0, lambda _: 36, lambda _: 8, lambda _: 48],
    "scale": [lambda t: t.half(), lambda t: t[None], lambda t: t.cpu()],
    "bits": [lambda _: 1, lambda _: 9],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, wrongs in WRONG.items() for i in range(len(wrongs))]
)
def test_wrong_argument_is_named(name, index):
    arguments = {
        "gate": torch.zeros(2, 24, device="cuda"),
        "up": torch.zeros(2, 24, device="cuda"),
        "signs": hadamard_signs(12).cuda(),
        "block_size": 24,
        "scale": SCALE.cuda(),
        "bits": 4,
    }
    ops.swiglu_hadamard_quantize(**arguments)
    arguments[name] = WRONG[name][index](arguments[name])
    with pytest.raises(ValueError, match=rf"swiglu_hadamard_quantize: ({name}|gate|up): "):
        ops.swiglu_hadamard_quantize(**arguments)
