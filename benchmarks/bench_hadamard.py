# SPDX-License-Identifier: Apache-2.0
"""SwiGLU + Hadamard + quantize against the copy bandwidth and the unfused torch sequence.

    python benchmarks/bench_hadamard.py [--sizes 14336,..] [--rows 1,16,..] [--out FOLDER]

Writes hadamard.json. Every cell is checked against the reference before it is timed. The torch
sequence is silu, a product, the Hadamard as a matrix product in the dtype of the activations (the
only one that torch has), and the quantizer's four operations. It comes after everything else: its
products draw so much power that the clocks are lower for a while, and what is timed right behind
them takes 10 % longer (28672 at 4096 rows: 261 and 287 us, and 261 again a second later).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import reference
from prefixquant import ops
from prefixquant.hadamard import hadamard_signs, split_size
from row_bench import copy_bandwidth, measure, share_of_copy
from timing import environment, results_folder, write_json

# Intermediate sizes of real models, and blocks of 14336.
SIZES = (1536, 4864, 8192, 8960, 9728, 11008, 12288, 13824, 14336, 17408, 18944, 27648, 28672)
BLOCKS = ((14336, 128), (14336, 256), (14336, 512), (14336, 1024))
ROWS = (1, 16, 64, 256, 4096, 16384)


def signs_of(block: int) -> Tensor | None:
    k = split_size(block)[1]
    return hadamard_signs(k).cuda() if k > 1 else None


def transposed_matrix(block: int) -> Tensor:
    """The transpose of the orthonormal H_k (x) H_pow2 in bfloat16; [block, block], on the GPU."""
    pow2, k = split_size(block)
    matrix = (hadamard_signs(k).T if k > 1 else torch.ones(1, 1)).to("cuda", torch.bfloat16)
    two = torch.tensor([[1, 1], [1, -1]], device="cuda", dtype=torch.bfloat16)
    for _ in range(pow2.bit_length() - 1):
        matrix = torch.kron(matrix.contiguous(), two)
    return (matrix * block**-0.5).contiguous()


def check(columns: int, block: int, signs: Tensor | None, scale: Tensor) -> None:
    gate, up = torch.randn(8, 2 * columns).bfloat16().chunk(2, -1)
    cpu_signs = None if signs is None else signs.cpu()
    q = ops.hadamard_quantize(gate.cuda(), signs, block, scale, 4).cpu()
    if not torch.equal(q, reference.hadamard_quantize(gate, cpu_signs, block, scale.cpu(), 4)):
        raise AssertionError(f"hadamard_quantize is wrong on {columns}, block {block}")
    q = ops.swiglu_hadamard_quantize(gate.cuda(), up.cuda(), signs, block, scale, 4).cpu()
    expected = reference.swiglu_hadamard_quantize(gate, up, cpu_signs, block, scale.cpu(), 4)
    step = (q.int() - expected.int()).abs()
    if step.max() > 1 or (step != 0).double().mean() > 1e-4:
        raise AssertionError(f"swiglu_hadamard_quantize is wrong on {columns}, block {block}")


def launches(columns: int, block: int) -> dict[str, tuple[Callable, float]]:
    """name -> (function of gate_up [rows, 2 columns], bytes an element)."""
    signs, scale = signs_of(block), torch.tensor(0.1, device="cuda")
    check(columns, block, signs, scale)

    def static(gate_up: Tensor) -> Tensor:
        return ops.swiglu_hadamard_quantize(*gate_up.chunk(2, -1), signs, block, scale, 4)

    def dynamic(gate_up: Tensor) -> tuple[Tensor, Tensor]:
        return ops.swiglu_hadamard_quantize_dynamic(*gate_up.chunk(2, -1), signs, block, 4)

    return {
        "swiglu_hadamard_quantize": (static, 5),
        "swiglu_hadamard_quantize_dynamic": (dynamic, 5),
        "hadamard": (lambda x: ops.hadamard(x[:, :columns], signs, block), 4),
    }


def torch_launches(columns: int, block: int) -> dict[str, tuple[Callable, float]]:
    """The unfused sequence, as ``launches``."""
    matrix, scale = transposed_matrix(block), torch.tensor(0.1, device="cuda")

    def torch_sequence(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        x = torch.nn.functional.silu(gate) * up
        y = (x.view(-1, block) @ matrix).view_as(x)
        return (y * (1.0 / scale)).round().clamp(-8, 7).to(torch.int8)

    return {"torch": (torch_sequence, 5)}


def bench(cells: list[dict], functions_of: Callable, copy: float) -> None:
    """Adds to every cell the functions that ``functions_of(columns, block)`` gives."""
    functions, shape = {}, None
    for cell in cells:
        m, columns = cell["rows"], cell["columns"]
        if shape != (columns, cell["block"]):
            shape = (columns, cell["block"])
            functions = functions_of(*shape)
        for name, (launch, bytes_each) in functions.items():
            moved = bytes_each * m * columns
            cell["us"][name] = measure(launch, (m, 2 * columns), 1, moved)
            cell["% of copy"][name] = share_of_copy(moved, cell["us"][name], copy)
        text = "  ".join(f"{n} {cell['us'][n][0]:.1f}" for n in functions)
        print(f"{m} x {columns}, block {cell['block']}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--out", type=Path, help="folder of the result file")
    args = parser.parse_args()
    rows = [int(m) for m in args.rows.split(",")]
    copy = copy_bandwidth()
    print(f"device copy {copy / 1e12:.3f} TB/s", flush=True)
    shapes = [(int(n), int(n)) for n in args.sizes.split(",")] + list(BLOCKS)
    cells = [
        {"rows": m, "columns": columns, "block": block, "us": {}, "% of copy": {}}
        for columns, block in shapes
        for m in rows
    ]
    bench(cells, launches, copy)
    bench(cells, torch_launches, copy)
    result = {
        "title": f"SwiGLU + Hadamard + quantize, {torch.cuda.get_device_name()}",
        "environment": environment(),
        "protocol": (
            "CUDA graph replay, median of 9, bfloat16 gate_up rotated out of L2 (4 x its size), "
            "back-to-back launches with programmatic dependent launch; us are [median, 10th, 90th "
            "percentile]; bytes: every input read once, every output written once; torch last"
        ),
        "copy_bytes_per_second": copy,
        "cells": cells,
    }
    write_json(results_folder(args.out) / "hadamard.json", result)


if __name__ == "__main__":
    main()
