# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and the quantizers on CUDA: the reference's bits, streams, graphs, wrong arguments."""

from itertools import product

import pytest
import reference
import torch
from cases import COLUMN_COUNTS, FLOAT_DTYPES, ROW_COUNTS, outlier_rows, poisoned, strided
from compare import assert_bits_equal
from prefixquant import _C, ops

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)

EPS = 1e-5
# A warp a row, one to four vectors a thread, the widest rows, beyond the registers, not vectors.
WIDE_COLUMNS = (1024, 1032, 4096, 5120, 8192, 14336, 16384, 16392, 32768, 32776, 40000, 4098)
# More rows than the limit below which a row gets as many threads as it has vectors.
MANY_ROWS = 300


def on_gpu(x):
    """The same values and strides on the GPU."""
    if x is None or x.is_contiguous():
        return x if x is None else x.cuda()
    base = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    base.set_(x.untyped_storage(), 0, base.shape, (1,))
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def check(x, weight, bits):
    scale = torch.tensor(3.0 / 2 ** (bits - 1))
    x_gpu, weight_gpu, scale_gpu = on_gpu(x), on_gpu(weight), scale.cuda()
    pairs = [
        (ops.rmsnorm(x_gpu, weight_gpu, EPS), reference.rmsnorm(x, weight, EPS)),
        (ops.quantize_static(x_gpu, scale_gpu, bits), reference.quantize_static(x, scale, bits)),
    ]
    dynamic = ops.rmsnorm_quantize_dynamic(x_gpu, weight_gpu, EPS, bits)
    pairs += zip(dynamic, reference.rmsnorm_quantize_dynamic(x, weight, EPS, bits), strict=True)
    for clip in (1.0, 0.7):
        dynamic = ops.quantize_dynamic(x_gpu, bits, clip)
        pairs += zip(dynamic, reference.quantize_dynamic(x, bits, clip), strict=True)
    residual = torch.randn(x.shape).to(x.dtype)
    total = reference.add(residual, x)
    for packed in (False, True) if bits <= 4 and x.shape[-1] % 2 == 0 else (False,):
        q = ops.rmsnorm_quantize(x_gpu, weight_gpu, EPS, scale_gpu, bits, packed)
        pairs.append((q, reference.rmsnorm_quantize(x, weight, EPS, scale, bits, packed)))
        sum_gpu = residual.cuda()
        q = ops.add_rmsnorm_quantize(sum_gpu, x_gpu, weight_gpu, EPS, scale_gpu, bits, packed)
        pairs.append((sum_gpu, total))
        pairs.append((q, reference.rmsnorm_quantize(total, weight, EPS, scale, bits, packed)))
    for i, (actual, expected) in enumerate(pairs):
        assert_bits_equal(actual.cpu(), expected, f"result {i}")


@pytest.mark.parametrize("rows", [*ROW_COUNTS, MANY_ROWS])
@pytest.mark.parametrize("columns", COLUMN_COUNTS)
def test_shapes(rows, columns):
    for dtype in FLOAT_DTYPES:
        check(outlier_rows(rows, columns, dtype), None, 4)
        check(outlier_rows(rows, columns, dtype), torch.randn(columns).to(dtype), 8)


@pytest.mark.parametrize("rows", [1, 3, MANY_ROWS])
@pytest.mark.parametrize("columns", WIDE_COLUMNS)
def test_wide_rows(rows, columns):
    for dtype in FLOAT_DTYPES:
        check(outlier_rows(rows, columns, dtype), torch.rand(columns), 4)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_strided_and_misaligned(dtype):
    x = outlier_rows(18, 576, dtype)
    for view in (strided(x), x[::3], x[5], x.T, x.view(18, 1, 576), x[:, 8:512], x[:, 1:513]):
        check(view, None, 8)
        check(view, torch.rand(view.shape[-1]).to(dtype), 3)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_not_a_number_and_extremes(dtype):
    for columns in (64, 111, 576, 4096):
        check(poisoned(17, columns, dtype), None, 4)
    for factor in (0.0, 1e-30, 1e18):
        check((torch.randn(3, 576) * factor).to(dtype), None, 8)


def check_shift(x, weight, shift, bits=4):
    """Both operations that take a shift, unpacked and packed."""
    scale = torch.tensor(0.17)
    x_gpu, weight_gpu, shift_gpu, scale_gpu = map(on_gpu, (x, weight, shift, scale))
    residual = torch.randn(x.shape).to(x.dtype)
    total = reference.add(residual, x)
    for packed in (False, True) if x.shape[-1] % 2 == 0 and bits <= 4 else (False,):
        q = ops.rmsnorm_quantize(x_gpu, weight_gpu, EPS, scale_gpu, bits, packed, shift_gpu)
        expected = reference.rmsnorm_quantize(x, weight, EPS, scale, bits, packed, shift)
        assert_bits_equal(q.cpu(), expected, "rmsnorm_quantize")
        sum_gpu = residual.cuda()
        q = ops.add_rmsnorm_quantize(
            sum_gpu, x_gpu, weight_gpu, EPS, scale_gpu, bits, packed, shift_gpu
        )
        assert_bits_equal(sum_gpu.cpu(), total, "residual")
        expected = reference.rmsnorm_quantize(total, weight, EPS, scale, bits, packed, shift)
        assert_bits_equal(q.cpu(), expected, "add_rmsnorm_quantize")


@pytest.mark.parametrize("columns", [1, 8, 64, 111, 576, 2050, 4096])
def test_shift_of_every_dtype(columns):
    for dtype, other, third in product(FLOAT_DTYPES, FLOAT_DTYPES, FLOAT_DTYPES):
        x, shift = outlier_rows(3, columns, dtype), torch.randn(columns).to(third)
        check_shift(x, torch.rand(columns).to(other), shift)
        if other == third:
            check_shift(x, None, shift, bits=8)


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
@pytest.mark.parametrize("columns", WIDE_COLUMNS)
def test_shift_of_wide_rows(rows, columns):
    shift = torch.randn(columns)
    for dtype in FLOAT_DTYPES:
        check_shift(outlier_rows(rows, columns, dtype), torch.rand(columns), shift)
        check_shift(outlier_rows(rows, columns, dtype), None, shift.to(dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_shift_strided_and_misaligned(dtype):
    x, shift = outlier_rows(18, 576, dtype), torch.randn(584).to(dtype)
    for view in (strided(x), x[::3], x[5], x.T, x.view(18, 1, 576), x[:, 8:512], x[:, 1:513]):
        check_shift(view, None, shift[: view.shape[-1]])
    base, scale = shift.cuda(), torch.tensor(0.1)
    for start in (1, 4, 8):  # a part of a vector beyond 16 bytes, and whole vectors
        part = slice(start, start + 576)
        q = ops.rmsnorm_quantize(x.cuda(), None, EPS, scale.cuda(), 8, shift=base[part])
        expected = reference.rmsnorm_quantize(x, None, EPS, scale, 8, shift=shift[part])
        assert_bits_equal(q.cpu(), expected, f"shift from element {start}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("columns", [64, 111, 576, 4096])
def test_shift_that_is_not_a_number_stays_in_its_channel(columns, dtype):
    shift = torch.randn(columns).to(dtype)
    special = {5: "nan", 40: "inf", columns - 1: "-inf"}
    for channel, value in special.items():
        shift[channel] = float(value)
    check_shift(poisoned(17, columns, dtype), None, shift)
    x, scale = torch.randn(3, columns, device="cuda"), torch.tensor(0.1, device="cuda")
    q = ops.rmsnorm_quantize(x, None, EPS, scale, 4, shift=shift.cuda()).cpu()
    assert (q[:, list(special)] == torch.tensor([0, -8, 7], dtype=torch.int8)).all()


@pytest.mark.parametrize("columns", [64, 576])
def test_scales_and_widths_of_levels(columns):
    """Scales up to infinity, negative, zero and none; levels of 2 to 8 bits."""
    values = (0.02, -0.02, 1e-30, 1e-44, 0.0, 1e25, 3e38, float("inf"), float("nan"))
    for dtype, value, bits in product(FLOAT_DTYPES, values, (2, 4, 8)):
        x, scale = poisoned(17, columns, dtype), torch.tensor(value)
        shift = torch.randn(columns).to(dtype)
        q = ops.rmsnorm_quantize(x.cuda(), None, EPS, scale.cuda(), bits, shift=shift.cuda())
        expected = reference.rmsnorm_quantize(x, None, EPS, scale, bits, shift=shift)
        assert_bits_equal(q.cpu(), expected, f"{dtype} {value} {bits}")
        q = ops.quantize_static(x.cuda(), scale.cuda(), bits)
        assert_bits_equal(q.cpu(), reference.quantize_static(x, scale, bits), f"{value} {bits}")


@pytest.mark.parametrize("columns", [111, 576, 4096])
def test_the_difference_is_rounded_by_itself(columns):
    """The shift is the normalized row: nothing is left. A fused product would leave its error."""
    x, weight = torch.randn(1, columns), torch.rand(columns)
    scale = torch.tensor(1e-10, device="cuda")
    for w in (weight, None):
        shift = reference.rmsnorm_float32(x, w, EPS)[0].cuda()
        q = ops.rmsnorm_quantize(x.cuda(), on_gpu(w), EPS, scale, 8, shift=shift)
        assert (q == 0).all()


def test_streams_and_graphs():
    x, scale = torch.randn(64, 4096, dtype=torch.float16), torch.tensor(0.1)
    expected = reference.rmsnorm_quantize(x, None, EPS, scale, 4)
    static, scale_gpu = x.cuda(), scale.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        q = ops.rmsnorm_quantize(static, None, EPS, scale_gpu, 4)
    stream.synchronize()
    assert_bits_equal(q.cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Two dependent launches: the second reads what the first wrote.
        y = ops.rmsnorm(static, None, EPS)
        q, row_scale = ops.quantize_dynamic(y, 8)
    for source in (x, 3 * x + 1):
        static.copy_(source)
        graph.replay()
        expected_q, expected_scale = reference.quantize_dynamic(
            reference.rmsnorm(source, None, EPS), 8
        )
        assert_bits_equal(row_scale.cpu(), expected_scale)
        assert_bits_equal(q.cpu(), expected_q)


def test_torch_compile_has_no_graph_break():
    residual, x = torch.randn(2, 17, 576, dtype=torch.bfloat16, device="cuda").unbind()
    scale = torch.tensor(0.1, device="cuda")

    def block(residual, x):
        q = ops.add_rmsnorm_quantize(residual, x * 2, None, EPS, scale, 4)
        return q + 1

    expected_residual = residual.clone()
    expected = block(expected_residual, x)
    assert_bits_equal(torch.compile(block, fullgraph=True)(residual, x), expected)
    assert_bits_equal(residual, expected_residual)


def test_opcheck():
    x, scale = torch.randn(3, 16, device="cuda"), torch.tensor(0.1, device="cuda")
    table = torch.ops.prefixquant
    torch.library.opcheck(table.rmsnorm.default, (x, None, EPS))
    torch.library.opcheck(table.quantize_static.default, (x, scale, 4))
    torch.library.opcheck(table.quantize_dynamic.default, (x, 4))
    torch.library.opcheck(table.rmsnorm_quantize_dynamic.default, (x, None, EPS, 4))
    for packed in (False, True):
        args = (x, None, EPS, scale, 4, packed)
        torch.library.opcheck(table.rmsnorm_quantize.default, args)
        torch.library.opcheck(table.add_rmsnorm_quantize.default, (x.clone(), *args))
        args = (*args, torch.randn(16, device="cuda"))
        torch.library.opcheck(table.rmsnorm_quantize.default, args)
        torch.library.opcheck(table.add_rmsnorm_quantize.default, (x.clone(), *args))


VALID = {
    "residual": lambda: torch.zeros(2, 24, device="cuda"),
    "x": lambda: torch.zeros(2, 24, device="cuda"),
    "weight": lambda: torch.zeros(24, device="cuda"),
    "eps": lambda: EPS,
    "scale": lambda: torch.tensor(0.1, device="cuda"),
    "bits": lambda: 4,
    "shift": lambda: torch.zeros(24, device="cuda"),
}
WRONG = {
    "residual": [lambda t: t.half(), lambda t: t[:, :8], lambda t: t.cpu(), lambda t: t[:1]],
    "x": [lambda t: t.int(), lambda t: t[0, 0], lambda t: t[:, :0]],
    "weight": [lambda t: t.int(), lambda t: t[:-1], lambda t: t[None], lambda t: t.cpu()],
    "eps": [lambda _: -1.0, lambda _: float("nan")],
    "scale": [lambda t: t.half(), lambda t: t[None], lambda t: t.cpu()],
    "bits": [lambda _: 1, lambda _: 9],
    "shift": [lambda t: t.int(), lambda t: t[:-1], lambda t: t[None], lambda t: t.cpu()],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, wrongs in WRONG.items() for i in range(len(wrongs))]
)
def test_wrong_argument_is_named(name, index):
    arguments = {n: make() for n, make in VALID.items()}
    ops.add_rmsnorm_quantize(**arguments)
    arguments[name] = WRONG[name][index](arguments[name])
    with pytest.raises(ValueError, match=rf"add_rmsnorm_quantize: ({name}|residual): "):
        ops.add_rmsnorm_quantize(**arguments)


def test_shift_on_the_gpu_of_rows_on_the_cpu():
    with pytest.raises(ValueError, match=r"^rmsnorm_quantize: shift: expected a CPU tensor"):
        ops.rmsnorm_quantize(
            torch.zeros(2, 24), None, EPS, torch.tensor(0.1), 4, shift=torch.zeros(24).cuda()
        )


def test_more_than_2_to_the_31_elements():
    x = torch.ones(150000, 14400, dtype=torch.float16, device="cuda")  # 2.2e9
    x[-1] = 3.0
    q, scale = ops.quantize_dynamic(x, 8)
    assert (q[[0, 1000, -1]] == 127).all()
    assert_bits_equal(scale[[0, -1]].cpu(), torch.tensor([1.0, 3.0]) / 127)
