# SPDX-License-Identifier: Apache-2.0
"""The CUDA GEMM: every compiled kernel bit for bit, streams, graphs, compile, wrong arguments."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import reference
import torch
from compare import assert_bits_equal
from prefixquant import _C, ops

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)

from prefixquant.ops.gemm_cuda import launch_gemm  # noqa: E402

HEADERS = Path(__file__).resolve().parent.parent / "cuda" / "include" / "prefixquant"
MMA, WGMMA, MMA_INT4, STREAM = 2, 3, 4, 5  # enum GemmW4Kernel
ROWS = (0, 1, 3, 17, 137)
# N below, at and beside the tiles; K beside the 64 and 128 of the layout, then real sizes.
SHAPES = ((1, 64), (40, 576), (64, 128), (100, 1536), (257, 200), (1000, 2048))
LONG_SHAPES = ((136, 11008), (72, 18944))


@dataclass(frozen=True)
class Problem:
    """Operands on the GPU, with the weight both plain and prepacked."""

    x: torch.Tensor
    weight: torch.Tensor
    prepacked: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    bias: torch.Tensor

    def operands(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.prepacked, self.weight_scale, self.input_scale


def make_problem(m: int, n: int, k: int, weight_bits: int = 4, x_bits: int = 8) -> Problem:
    """Full-range integers, so that sums are as large as they can be."""

    def integers(rows: int, bits: int) -> torch.Tensor:
        limit = 2 ** (bits - 1)
        return torch.randint(-limit, limit, (rows, k), dtype=torch.int8, device="cuda")

    weight = integers(n, weight_bits)
    weight[:1] = -(2 ** (weight_bits - 1))  # one channel at the lower end
    x = integers(m, x_bits)
    x[:1] = -(2 ** (x_bits - 1))
    if weight_bits == 4:
        packed = (weight[:, ::2] & 15) | (weight[:, 1::2] & 15) << 4
        prepacked = ops.prepack_w4(packed.view(torch.uint8))
    else:
        prepacked = ops.prepack_w8(weight)
    return Problem(
        x,
        weight,
        prepacked,
        torch.rand(n, device="cuda") * 0.01 + 1e-4,
        torch.tensor(0.013, device="cuda"),
        torch.randn(n, device="cuda"),
    )


def listed(header: str) -> list[tuple]:
    """The argument lists of the X(..) entries of a header's kernel tables."""
    text = (HEADERS / header).read_text(encoding="utf-8")
    entries = re.findall(r"^ *X\(([\w, ]+)\) *\\?$", text, re.MULTILINE)
    flags = {"false": 0, "true": 1}
    return [tuple(flags.get(v) if v in flags else int(v) for v in e.split(", ")) for e in entries]


def mma_configs() -> list[tuple[int, list[int]]]:
    """(weight bits, config) of every mma.sync geometry with every number of splits."""
    configs = []
    for bits, token_tiles, row_tiles, row_warps, _, stages, nibble in listed(
        "gemm_w4_mma_launch.cuh"
    ):
        for splits in (1, 2, 4, 8):
            kernel = MMA_INT4 if nibble else MMA
            rows, tokens = 16 * row_tiles * row_warps, 8 * token_tiles
            configs.append((bits, [kernel, rows, tokens, stages, splits, 0, splits, 0, 0]))
    return configs


def sm90_configs(m: int, n: int, k: int) -> list[tuple[int, list[int]]]:
    """(weight bits, config) of every wgmma tile: whole tiles, stream-K, and a split along K."""
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    configs = []
    for bits, m64, tokens, cluster, split in listed("gemm_w4_sm90_launch.cuh"):
        rows = 128 * m64
        tiles = -(-n // (rows * cluster)) * -(-m // tokens)
        clusters = sm_count // cluster

        def add(grid: int, stream_k_tiles: int, of=(bits, rows, tokens, cluster, split)) -> None:
            bits, rows, tokens, cluster, split = of
            config = [WGMMA, rows, tokens, 0, cluster, grid, split, stream_k_tiles, 0]
            configs.append((bits, config))

        if split > 1:
            if -(-k // 128) >= split:
                add(tiles * split, 0)
            continue
        add(min(tiles, clusters) * cluster, 0)
        if 2 * tiles <= clusters:
            add(2 * tiles * cluster, tiles)
    return configs


def stream_configs(k: int) -> list[tuple[int, list[int]]]:
    """(weight bits, config) of the streaming GEMV: every split, rings of two stages to many."""
    blocks = math.ceil(k / 128)
    return [
        (bits, [STREAM, 64, 8, stages, splits, 0, splits, 0, release])
        for bits in (4, 8)
        for release in (0, 2)
        for stages in (2, 3, 6, 7)
        for splits in (1, 2, 4, 8)
        if stages % 2 == 0 or stages >= math.ceil(blocks / splits)
    ]


def check_config(problem: Problem, bits: int, config: list[int]) -> None:
    x_bits = 4 if config[0] == MMA_INT4 else 8
    sums = launch_gemm(
        *problem.operands(), bits=(bits, x_bits), out_dtype=torch.int32, config=config
    )
    expected = reference.gemm_sums(problem.x, problem.weight)
    assert_bits_equal(sums, expected, _C.gemm_config_text(config))


is_hopper = torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not is_hopper, reason="wgmma needs sm_90")
has_clusters = torch.cuda.get_device_capability() >= (9, 0)
sm_90_or_later = pytest.mark.skipif(not has_clusters, reason="bulk copies need sm_90")


@pytest.mark.parametrize(("n", "k"), [*SHAPES, *LONG_SHAPES])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_prepack_is_inverted_exactly(weight_bits: int, n: int, k: int):
    weight = make_problem(1, n, k, weight_bits).weight
    if weight_bits == 4:
        packed = ((weight[:, ::2] & 15) | (weight[:, 1::2] & 15) << 4).view(torch.uint8)
        assert_bits_equal(ops.unprepack_w4(ops.prepack_w4(packed), n, k), packed)
    else:
        assert_bits_equal(ops.unprepack_w8(ops.prepack_w8(weight), n, k), weight)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_mma_kernels_are_exact(m: int, n: int, k: int):
    problems = {
        (4, MMA): make_problem(m, n, k),
        (4, MMA_INT4): make_problem(m, n, k, x_bits=4),
        (8, MMA): make_problem(m, n, k, weight_bits=8),
    }
    for bits, config in mma_configs():
        check_config(problems[bits, config[0]], bits, config)


@hopper
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_wgmma_kernels_are_exact(m: int, n: int, k: int):
    problems = {4: make_problem(m, n, k), 8: make_problem(m, n, k, weight_bits=8)}
    for bits, config in sm90_configs(max(m, 1), n, k):
        check_config(problems[bits], bits, config)


@sm_90_or_later
@pytest.mark.parametrize("m", [0, 1, 2, 3, 7, 8])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, *LONG_SHAPES])
def test_streaming_gemv_is_exact(m: int, n: int, k: int):
    problems = {4: make_problem(m, n, k), 8: make_problem(m, n, k, weight_bits=8)}
    for bits, config in stream_configs(k):
        check_config(problems[bits], bits, config)


@sm_90_or_later
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("release", [0, 1, 4])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 14336), (258, 200)])
def test_streaming_gemv_launches_that_follow_each_other(bits: int, release: int, n: int, k: int):
    # A launch prefetches weights while the one before it still runs and writes its activations.
    problem = make_problem(8, n, k, bits)
    other = make_problem(8, k, n, bits)
    stream = {"bits": (bits, 8), "config": [STREAM, 64, 8, 4, 2, 0, 2, 0, release]}
    mma = {"bits": (bits, 8), "config": [MMA, 64, 8, 8 if bits == 4 else 4, 1, 0, 1, 0, 0]}
    scale = launch_gemm(*problem.operands(), **mma).float().abs().median() / 40
    expected = launch_gemm(*problem.operands(), output_scale=scale, **mma)
    assert len(expected.unique()) > 50  # every level moves the second product
    for _ in range(20):
        q = launch_gemm(*problem.operands(), output_scale=scale, **stream)
        y = launch_gemm(q, *other.operands()[1:], out_dtype=torch.int32, **stream)
    assert_bits_equal(q, expected, "first launch")
    assert_bits_equal(y, reference.gemm_sums(q, other.weight), "second launch")


@pytest.mark.parametrize("m", [*ROWS, 2, 4, 8, 64, 300, 2048])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, *LONG_SHAPES, (4096, 4096)])
@pytest.mark.parametrize("operation", ["gemm_w4a4", "gemm_w4a8", "gemm_w8a8"])
def test_chosen_kernel_is_exact(operation: str, m: int, n: int, k: int):
    weight_bits, x_bits = int(operation[6]), int(operation[8])
    problem = make_problem(m, n, k, weight_bits, x_bits)
    sums = getattr(ops, operation)(*problem.operands(), out_dtype=torch.int32)
    assert_bits_equal(sums, reference.gemm_sums(problem.x, problem.weight))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 17, 300])
def test_scale_and_bias_round_as_the_reference(m: int, bias_dtype, out_dtype: torch.dtype):
    problem = make_problem(m, 257, 1536)
    bias = None if bias_dtype is None else problem.bias.to(bias_dtype)
    y = ops.gemm_w4a8(*problem.operands(), bias, out_dtype)
    expected = reference.gemm(
        problem.x, problem.weight, problem.weight_scale, problem.input_scale, bias, out_dtype
    )
    assert_bits_equal(y, expected)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(1, 4096), (5, 130), (33, 258), (64, 1024), (300, 514)])
def test_residual_and_quantization_equal_their_composition(m: int, n: int, out_dtype: torch.dtype):
    problem = make_problem(m, n, 576)
    residual = torch.randn(m, n, device="cuda").to(out_dtype) * 30
    scale = torch.tensor(3.7, device="cuda")
    plain = ops.gemm_w4a8(*problem.operands(), problem.bias, out_dtype)
    added = (plain.float() + residual.float()).to(out_dtype)
    got = ops.gemm_fused(
        *problem.operands(), bias=problem.bias, residual=residual, out_dtype=out_dtype
    )
    assert_bits_equal(got, added, "residual")
    for bits in (4, 8):
        q = ops.gemm_fused(
            *problem.operands(),
            bias=problem.bias,
            residual=residual,
            output_scale=scale,
            bits=(4, 8, bits),
            out_dtype=out_dtype,
        )
        assert_bits_equal(q, reference.quantize_static(added.float(), scale, bits), f"{bits} bits")


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(1, 4096), (5, 130), (33, 258), (64, 1024), (300, 512)])
def test_swiglu_is_within_a_rounding(m: int, n: int, out_dtype: torch.dtype):
    # The device exponential differs from the correctly rounded one in its last float32 bits, which
    # may move a 16-bit rounding by one step and nothing more.
    problem = make_problem(m, n, 576)
    plain = ops.gemm_w4a8(*problem.operands(), None, out_dtype)
    expected = reference.swiglu_interleaved(plain)
    got = ops.gemm_fused(*problem.operands(), swiglu=True, out_dtype=out_dtype)
    step = torch.finfo(out_dtype).eps * expected.float().abs()
    error = (got.float() - expected.float()).abs()
    assert (error <= step + 1e-7).all()
    assert float((error > 0).float().mean()) <= 0.01


def test_strided_rows_and_leading_dimensions():
    problem = make_problem(6, 128, 576)
    wide = torch.full((6, 640), 77, dtype=torch.int8, device="cuda")
    wide[:, :576] = problem.x
    odd = torch.full((6, 577), 77, dtype=torch.int8, device="cuda")
    odd[:, :576] = problem.x
    expected = reference.gemm_sums(problem.x, problem.weight)
    for x in (wide[:, :576], odd[:, :576], problem.x.T.contiguous().T):
        got = ops.gemm_w4a8(x, *problem.operands()[1:], out_dtype=torch.int32)
        assert_bits_equal(got, expected)
    got = ops.gemm_w4a8(problem.x.view(2, 3, 576), *problem.operands()[1:], out_dtype=torch.int32)
    assert_bits_equal(got, expected.view(2, 3, 128))


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_side_stream_and_graph_replay(m: int):
    problem = make_problem(m, 4096, 4096)
    other = make_problem(m, 4096, 4096)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = ops.gemm_w4a8(*problem.operands(), out_dtype=torch.int32)
    stream.synchronize()
    assert_bits_equal(y, reference.gemm_sums(problem.x, problem.weight), "side stream")

    x = problem.x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Two dependent launches: the second reads what the first wrote.
        scale = torch.full((), 50.0, device="cuda")
        q = ops.gemm_fused(x, *problem.operands()[1:], output_scale=scale, out_dtype=torch.float16)
        y = ops.gemm_w4a8(q, *problem.operands()[1:], out_dtype=torch.int32)
    for source in (problem, other):
        x.copy_(source.x)
        graph.replay()
        first = ops.gemm_fused(
            source.x, *problem.operands()[1:], output_scale=scale, out_dtype=torch.float16
        )
        assert_bits_equal(q, first, "first launch of the graph")
        assert_bits_equal(y, reference.gemm_sums(first, problem.weight), "second launch")


def test_repeated_launches_agree_and_leave_the_workspace_clean():
    # Split tiles meet through counters that every launch must return to zero.
    for m in (48, 64, 100, 300):
        problem = make_problem(m, 4096, 4096)
        expected = reference.gemm_sums(problem.x, problem.weight)
        for _ in range(20):
            got = ops.gemm_w4a8(*problem.operands(), out_dtype=torch.int32)
        assert_bits_equal(got, expected, f"m {m}")


def test_more_than_2_to_the_31_outputs():
    m, n = 70000, 32768  # 2.3e9 elements
    problem = make_problem(m, n, 128)
    y = ops.gemm_w4a8(*problem.operands(), out_dtype=torch.float16)
    for rows in (slice(0, 16), slice(m - 16, m)):
        expected = reference.gemm(
            problem.x[rows],
            problem.weight,
            problem.weight_scale,
            problem.input_scale,
            None,
            torch.float16,
        )
        assert_bits_equal(y[rows], expected)


def test_torch_compile_has_no_graph_break():
    problem = make_problem(17, 256, 512)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = ops.gemm_w4a8(x, *problem.operands()[1:], out_dtype=torch.bfloat16)
        return y * 2 + 1

    compiled = torch.compile(block, fullgraph=True)
    assert_bits_equal(compiled(problem.x), block(problem.x))


@pytest.mark.parametrize("operation", ["gemm_w4a4", "gemm_w4a8", "gemm_w8a8", "gemm_fused"])
def test_opcheck(operation: str):
    problem = make_problem(5, 96, 192, 8 if operation == "gemm_w8a8" else 4, 4)
    op = getattr(torch.ops.prefixquant, operation).default
    tail = (None, torch.bfloat16)
    if operation == "gemm_fused":
        scale = torch.tensor(0.5, device="cuda")
        tail = (problem.bias, None, scale, [4, 8, 4], True, torch.bfloat16)
    torch.library.opcheck(op, (*problem.operands(), *tail))


WRONG = {
    "x": [
        lambda t: t.float(),
        lambda t: t[0],
        lambda t: t.cpu(),
        lambda t: torch.cat((t, t), 1)[:, 1 : t.shape[1] + 1],  # misaligned
    ],
    "weight": [
        lambda t: t.view(torch.int8),
        lambda t: t[:-1],
        lambda t: t.cpu(),
        lambda t: t.flatten(),
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: torch.cat((t.flatten(), t.flatten()))[8 : t.numel() + 8].view(t.shape),
    ],
    "weight_scale": [
        lambda t: t.double(),
        lambda t: t[None],
        lambda t: t.cpu(),
        lambda t: torch.stack((t, t), 1)[:, 0],
    ],
    "input_scale": [lambda t: t.half(), lambda t: t.repeat(2), lambda t: t.cpu()],
    "bias": [lambda t: t.int(), lambda t: t[:-1], lambda t: t.cpu(), lambda t: t[None]],
    "residual": [lambda t: t.float(), lambda t: t[:-1], lambda t: t[:, :-2], lambda t: t.cpu()],
    "output_scale": [lambda t: t.half(), lambda t: t.repeat(3), lambda t: t.cpu()],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, wrongs in WRONG.items() for i in range(len(wrongs))]
)
def test_wrong_argument_is_named(name: str, index: int):
    problem = make_problem(5, 256, 512)
    arguments = {
        "x": problem.x,
        "weight": problem.prepacked,
        "weight_scale": problem.weight_scale,
        "input_scale": problem.input_scale,
        "bias": problem.bias,
        "residual": torch.zeros(5, 256, dtype=torch.float16, device="cuda"),
        "output_scale": torch.tensor(1.0, device="cuda"),
    }
    launch_gemm(**arguments)
    arguments[name] = WRONG[name][index](arguments[name])
    with pytest.raises(ValueError, match=rf"gemm_w4: {name}: "):
        launch_gemm(**arguments)


def test_config_of_no_kernel_is_refused():
    problem = make_problem(5, 256, 512)
    with pytest.raises(ValueError, match="config"):
        launch_gemm(*problem.operands(), config=[MMA, 48, 8, 4, 1, 0, 1, 0, 0])
    with pytest.raises(ValueError, match="config"):
        launch_gemm(*problem.operands(), config=[9, 64, 8, 4, 1, 0, 1, 0, 0])
    for config in (
        [STREAM, 128, 8, 4, 1, 0, 1, 0, 0],
        [STREAM, 64, 8, 1, 1, 0, 1, 0, 0],
        [STREAM, 64, 8, 64, 1, 0, 1, 0, 0],  # the ring exceeds shared memory
        [STREAM, 64, 8, 4, 3, 0, 3, 0, 0],
        [STREAM, 64, 8, 3, 1, 0, 1, 0, 0],  # a slot that both groups of warps would share
    ):
        with pytest.raises(ValueError, match="config"):
            launch_gemm(*problem.operands(), config=config)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        launch_gemm(*make_problem(9, 256, 512).operands(), config=[STREAM, 64, 8, 4, 1, 0, 1, 0, 0])
    with pytest.raises(ValueError, match="out_dtype"):
        launch_gemm(*problem.operands(), out_dtype=torch.float64)
    with pytest.raises(ValueError, match="swiglu"):
        launch_gemm(*make_problem(2, 255, 512).operands(), swiglu=True)
