# SPDX-License-Identifier: Apache-2.0
"""rmsnorm_hadamard_quantize on CUDA against the CPU operation, bit for bit.

The sums of squares differ in their order, in float64. That moves rstd by at most a float32 ulp, in
about one row of 10^8, and a level only at a tie: with the fixed seeds here it does not occur.
"""

from itertools import product

import pytest
import torch
from cases import FLOAT_DTYPES, SIGN_SIZES, edge_blocks, outlier_rows, poisoned, strided
from compare import assert_bits_equal
from prefixquant import _C, ops
from prefixquant.hadamard import hadamard_signs, split_size

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)

EPS = 1e-5
SCALE = torch.tensor(0.23)
# Hidden sizes of real models, with every k that has sums of its own and none; the largest.
HIDDEN_SIZES = (
    *(576, 896, 960, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 5376, 6656, 8192, 16384),
)
# Small blocks, 2^m below a warp's vectors, sums of integers: a generic kernel takes them.
OTHER_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 12, 20, 24, 56, 96, 192, 152, 84 * 4, 76 * 64)
# More rows than an H100 has SMs; more than are in flight.
ROWS = (1, 3, 132, 300)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def signs_of(size):
    k = split_size(size)[1]
    return hadamard_signs(k) if k > 1 else None


def on_gpu(x):
    """The same values, strides and offset on the GPU."""
    if x is None or x.is_contiguous():
        return x if x is None else x.cuda()
    base = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    base.set_(x.untyped_storage(), 0, base.shape, (1,))
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def check(x, weight=None, shift=None, bits=4, scale=None, signs=None, eps=EPS):
    """What the CPU gives. The usual scale spreads a row over all levels: of 8 bits, one that was
    rounded once less or in another order shows in a few of a million."""
    scale = torch.tensor(3.0 / 2 ** (bits - 1)) if scale is None else scale
    signs = signs_of(x.shape[-1]) if signs is None else signs
    expected = ops.rmsnorm_hadamard_quantize(x, weight, eps, signs, scale, bits, shift)
    q = ops.rmsnorm_hadamard_quantize(
        on_gpu(x), on_gpu(weight), eps, on_gpu(signs), scale.cuda(), bits, on_gpu(shift)
    )
    assert q.is_cuda
    assert_bits_equal(q.cpu(), expected)
    return expected


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", HIDDEN_SIZES)
def test_hidden_sizes(size, rows):
    for dtype in SIXTEEN_BITS:
        x = outlier_rows(rows, size, dtype, factor=20.0)
        weight, shift = torch.randn(size).exp().to(dtype), torch.randn(size).to(dtype)
        levels = check(x, weight, shift)
        assert levels.unique().numel() > 8  # a test of zeros would find nothing
        check(x, bits=8)
        check(x, weight, bits=8)
        check(x, shift=shift)


@pytest.mark.parametrize("rows", [1, 3, 132])
@pytest.mark.parametrize("size", [*HIDDEN_SIZES, *OTHER_SIZES])
def test_float32(size, rows):
    x = outlier_rows(rows, size, torch.float32, factor=20.0)
    check(x, torch.randn(size).exp(), torch.randn(size))
    check(x, bits=8)


@pytest.mark.parametrize("rows", [0, *ROWS])
@pytest.mark.parametrize("size", OTHER_SIZES)
def test_other_sizes(size, rows):
    for dtype in SIXTEEN_BITS:
        x = outlier_rows(rows, size, dtype, factor=20.0)
        check(x, torch.rand(size).to(dtype), torch.randn(size).to(dtype))
        check(x, bits=8)


@pytest.mark.parametrize("k", SIGN_SIZES)
@pytest.mark.parametrize("pow2", [1, 8, 64, 128])
def test_sign_matrices(k, pow2):
    """With and without sums of their own."""
    signs = hadamard_signs(k)
    for matrix in (signs, signs.flip(0), -signs):
        x = torch.randn(5, k * pow2).bfloat16()
        check(x, torch.rand(k * pow2).bfloat16(), signs=matrix.contiguous())


@pytest.mark.parametrize("size", [12, 64, 576, 2048, 5120, 5376])
def test_every_dtype(size):
    """A kernel of 16-bit vectors takes some of these, the generic one the others."""
    for dtype, second, third in product(FLOAT_DTYPES, FLOAT_DTYPES, FLOAT_DTYPES):
        x = outlier_rows(3, size, dtype, factor=20.0)
        weight, shift = torch.rand(size).to(second), torch.randn(size).to(third)
        check(x, weight, shift)
        if dtype == second:
            check(x, shift=shift)
            check(x, weight)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [576, 1024, 4096, 5120])
def test_strided_and_misaligned(dtype, size):
    wide = outlier_rows(12, 2 * size, dtype, factor=20.0)
    weight, shift = torch.rand(size).to(dtype), torch.randn(size).to(dtype)
    views = (
        wide[:, :size],  # rows two row lengths apart
        wide[:, 8 : 8 + size],
        wide[:, 1 : 1 + size],  # not at 16 bytes
        strided(wide[:, :size].contiguous()),
        wide[::3, size:],
        wide[5, :size],
        wide[:, :size].reshape(3, 4, size),
        wide[:, :size].reshape(3, 4, size).transpose(0, 1),
        torch.cat((wide, wide[:, :1]), 1)[:, :size],  # an odd distance
        torch.randn(size, 5).to(dtype).T,
    )
    for view in views:
        check(view, weight, shift)
        check(view, bits=8)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("size", [576, 4096])
def test_misaligned_channels(dtype, size):
    x, channels = outlier_rows(5, size, dtype), torch.rand(size + 8).to(dtype)
    for start in (0, 1, 4, 8):
        part = channels[start : start + size]
        base = channels.cuda()[start : start + size]
        expected = ops.rmsnorm_hadamard_quantize(x, part, EPS, signs_of(size), SCALE, 4, part)
        signs = on_gpu(signs_of(size))
        for weight, shift in ((base, base), (base, part.cuda()), (part.cuda(), base)):
            q = ops.rmsnorm_hadamard_quantize(x.cuda(), weight, EPS, signs, SCALE.cuda(), 4, shift)
            assert_bits_equal(q.cpu(), expected, f"from element {start}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [64, 96, 576, 1024, 3584, 4096, 5120, 5376])
def test_not_a_number_stays_in_its_row(dtype, size):
    weight, shift = torch.rand(size).to(dtype), torch.randn(size).to(dtype)
    for rows in (17, 150):
        x = poisoned(rows, size, dtype)
        x[9, -1], x[-1, 0] = float("inf"), float("nan")
        q = check(x, bits=8)
        assert not q[-1].any()
        check(x, weight, shift)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize("size", [76, 152, 1024, 4096, 5120, 5376])
def test_edges(dtype, copies, size):
    """Rows that are not finite, or all zeros, between others."""
    x = edge_blocks(size, dtype).repeat(copies, 1)
    check(x, bits=8)
    check(x, torch.rand(size).to(dtype), torch.randn(size).to(dtype))


@pytest.mark.parametrize("size", [96, 576, 2048, 4096, 5120])
def test_shift_and_weight_that_are_not_numbers(size):
    for dtype in FLOAT_DTYPES:
        x, shift = torch.randn(3, size).to(dtype), torch.randn(size).to(dtype)
        special = {5: "nan", 40: "inf", size - 1: "-inf"}
        for channel, value in special.items():
            shift[channel] = float(value)
        q = check(x, None, shift)
        assert (q[:, list(special)] == torch.tensor([0, -8, 7], dtype=torch.int8)).all()
        check(x, shift)  # as a weight it fills its rows


@pytest.mark.parametrize("size", [576, 2048, 4096])
def test_scales_widths_and_magnitudes(size):
    values = (0.02, -0.02, 1e-30, 1e-44, 0.0, 1e25, 3e38, float("inf"), float("nan"))
    for dtype, value, bits in product(FLOAT_DTYPES, values, (2, 4, 8)):
        check(poisoned(5, size, dtype), bits=bits, scale=torch.tensor(value))
    for dtype, factor, eps in product(FLOAT_DTYPES, (0.0, 1e-30, 1e-6, 1e18), (0.0, EPS)):
        check((torch.randn(3, size) * factor).to(dtype), bits=8, eps=eps)


@pytest.mark.parametrize("size", [512, 576, 4096, 5120])
def test_every_product_and_the_difference_are_rounded(size):
    """The shift is the transformed row: nothing is left. A fused product would leave its error."""
    x, weight = torch.randn(1, size).half(), torch.rand(size).half()
    rotated = ops.hadamard(x.float() * weight.float(), signs_of(size), size)
    mean = x.double().square().sum() / size
    shift = (rotated * (1.0 / (mean + EPS).sqrt()).float())[0]
    q = ops.rmsnorm_hadamard_quantize(
        x.cuda(),
        weight.cuda(),
        EPS,
        on_gpu(signs_of(size)),
        torch.tensor(1e-10, device="cuda"),
        8,
        shift.cuda(),
    )
    assert not q.any()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("size", [512, 576, 896, 1024, 2048, 4096, 5120, 8192])
def test_products_are_rounded_before_the_difference(size, dtype):
    """As above with vectors of 16 bits: one number a row, transformed to +-1 and a rounding."""
    x = torch.zeros(300, size)
    x[:, 0] = torch.rand(300) + 0.5
    shift = ops.hadamard(x[0], signs_of(size), size).sign().to(dtype)
    levels = check(x.to(dtype), None, shift, bits=8, scale=torch.tensor(1e-10), eps=0.0)
    assert (levels == 0).all(-1).any()  # the product is rounded to 1


@pytest.mark.parametrize("rows", [257, 999, 5000])
@pytest.mark.parametrize("size", [512, 576, 896, 1024, 2048, 4096, 5120])
def test_many_rows(size, rows):
    """CTAs that take several rows at a time, the last one fewer, and several times."""
    x = outlier_rows(rows, size, torch.bfloat16, factor=10.0)
    x[3, 5], x[rows - 1, 0] = torch.nan, torch.inf
    check(x, torch.randn(size).exp().bfloat16(), torch.randn(size).bfloat16(), bits=8)


def test_streams_and_graphs():
    x = torch.randn(4, 4096).bfloat16()
    weight, scale = torch.rand(4096).bfloat16().cuda(), SCALE.cuda()
    for size in (4096, 2560):
        static, signs = x[:, :size].contiguous().cuda(), on_gpu(signs_of(size))

        def run(static=static, signs=signs, size=size):
            # Two dependent launches: the second reads what the first wrote.
            y = ops.rmsnorm(static, None, EPS)
            return ops.rmsnorm_hadamard_quantize(y, weight[:size], EPS, signs, scale, 4)

        expected = run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_stream = run()
        stream.synchronize()
        assert_bits_equal(on_stream, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            q = run()
        static.copy_(static * 0.5 + 1)
        graph.replay()
        assert_bits_equal(q, run())
        assert (q != expected).any()


def test_torch_compile_has_no_graph_break():
    x, scale = torch.randn(17, 576, dtype=torch.bfloat16, device="cuda"), SCALE.cuda()
    signs = signs_of(576).cuda()

    def block(x):
        return ops.rmsnorm_hadamard_quantize(x * 2, None, EPS, signs, scale, 4) + 1

    assert_bits_equal(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.parametrize("size", [8, 24, 576])
def test_opcheck(size):
    x, signs, scale = torch.randn(3, size).cuda(), on_gpu(signs_of(size)), SCALE.cuda()
    op = torch.ops.prefixquant.rmsnorm_hadamard_quantize.default
    torch.library.opcheck(op, (x, None, EPS, signs, scale, 4))
    torch.library.opcheck(op, (x.half(), x[0].half(), EPS, signs, scale, 4, x[1]))


VALID = {
    "x": lambda: torch.zeros(2, 24, device="cuda"),
    "weight": lambda: torch.zeros(24, device="cuda"),
    "eps": lambda: EPS,
    "signs": lambda: hadamard_signs(12).cuda(),
    "scale": lambda: torch.tensor(0.1, device="cuda"),
    "bits": lambda: 4,
    "shift": lambda: torch.zeros(24, device="cuda"),
}
WRONG = {
    "x": [lambda t: t.int(), lambda t: t.double(), lambda t: t[0, 0], lambda t: t[:, :0]],
    "weight": [lambda t: t.int(), lambda t: t[:-1], lambda t: t[None], lambda t: t.cpu()],
    "eps": [lambda _: -1.0, lambda _: float("nan")],
    "signs": [
        lambda t: t.float(),
        lambda t: t[:8],
        lambda t: t.flatten(),
        lambda t: t.flip(0).T,
        lambda t: t.cpu(),
    ],
    "scale": [lambda t: t.half(), lambda t: t[None], lambda t: t.cpu()],
    "bits": [lambda _: 1, lambda _: 9],
    "shift": [
        lambda t: t.int(),
        lambda t: t[:-1],
        lambda t: t.repeat(2)[::2],
        lambda t: t.cpu(),
    ],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, wrongs in WRONG.items() for i in range(len(wrongs))]
)
def test_wrong_argument_is_named(name, index):
    arguments = {n: make() for n, make in VALID.items()}
    ops.rmsnorm_hadamard_quantize(**arguments)
    arguments[name] = WRONG[name][index](arguments[name])
    with pytest.raises(ValueError, match=rf"^rmsnorm_hadamard_quantize: {name}: "):
        ops.rmsnorm_hadamard_quantize(**arguments)


@pytest.mark.parametrize(
    ("columns", "k"), [(36, 12), (8, 12), (25, None), (60, None), (96, 20), (12, None)]
)
def test_size_that_is_not_that_of_the_signs(columns, k):
    signs = None if k is None else hadamard_signs(k).cuda()
    x = torch.zeros(2, columns, device="cuda")
    with pytest.raises(ValueError, match=r"^rmsnorm_hadamard_quantize: x: expected"):
        ops.rmsnorm_hadamard_quantize(x, None, EPS, signs, SCALE.cuda(), 4)


@pytest.mark.parametrize("name", ["weight", "signs", "scale", "shift"])
def test_gpu_tensors_beside_rows_on_the_cpu(name):
    arguments = {n: make() for n, make in VALID.items()}
    cpu = {n: a.cpu() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    ops.rmsnorm_hadamard_quantize(**cpu)
    with pytest.raises(ValueError, match=rf"{name}: expected a CPU tensor"):
        ops.rmsnorm_hadamard_quantize(**{**cpu, name: arguments[name]})


def test_a_row_beyond_shared_memory_is_refused():
    x = torch.zeros(1, 2**20, device="cuda")
    with pytest.raises(ValueError, match="expected rows of at most"):
        ops.rmsnorm_hadamard_quantize(x, None, EPS, None, SCALE.cuda(), 4)
