# SPDX-License-Identifier: Apache-2.0
"""RMSNorm + R6 + quantize against a device copy, the same without R6, and two operations.

    python benchmarks/bench_rmsnorm_hadamard.py [--columns 4096,..] [--rows 1,16,..] [--out FOLDER]

Writes rmsnorm_hadamard.json. Every cell is checked against the CPU operation before it is timed. A
cell has the microseconds of `rmsnorm_hadamard_quantize`, of `rmsnorm_quantize` (what R6 adds to),
and of `rmsnorm` then `hadamard_quantize` (what one launch replaces; it has no shift), and the share
of a device copy's bandwidth in bytes actually moved.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from prefixquant import ops
from prefixquant.hadamard import hadamard_signs, split_size
from row_bench import copy_bandwidth, measure, share_of_copy
from timing import environment, results_folder, write_json

EPS = 1e-5
# SmolLM2-135M, Qwen2.5-0.5B, Qwen3-0.6B, 1.5B, Llama-3-1B, Qwen3-4B, Qwen2.5-7B, Llama-3-8B,
# Llama-2-13B, Llama-3-70B, 405B
COLUMNS = (576, 896, 1024, 1536, 2048, 2560, 3584, 4096, 5120, 8192, 16384)
ROWS = (1, 16, 256, 4096, 16384)


def bench(rows: int, columns: int, copy: float) -> dict:
    _, k = split_size(columns)
    signs = hadamard_signs(k).cuda() if k > 1 else None
    scale = torch.tensor(0.4, device="cuda")
    weight, shift = (torch.rand(columns, device="cuda").bfloat16() + i for i in (0.5, -0.5))
    given = (weight, EPS, signs, scale, 4, shift)

    def ours(x):
        return ops.rmsnorm_hadamard_quantize(x, *given)

    def without(x):
        return ops.rmsnorm_quantize(x, weight, EPS, scale, 4, shift=shift)

    def two(x):
        return ops.hadamard_quantize(ops.rmsnorm(x, weight, EPS), signs, columns, scale, 4)

    x = torch.randn(min(rows, 64), columns, dtype=torch.bfloat16)
    on_cpu = (t.cpu() if isinstance(t, torch.Tensor) else t for t in given)
    expected = ops.rmsnorm_hadamard_quantize(x, *on_cpu)
    if not torch.equal(ours(x.cuda()).cpu(), expected):
        raise AssertionError(f"rmsnorm_hadamard_quantize is wrong on {rows} x {columns}")
    moved = 3 * rows * columns
    named = {"ours": ours, "rmsnorm_quantize": without, "rmsnorm, hadamard_quantize": two}
    us = {name: measure(run, (rows, columns), 1, moved) for name, run in named.items()}
    share = share_of_copy(moved, us["ours"], copy)
    times = ", ".join(f"{name} {t[0]:.2f}" for name, t in us.items())
    print(f"{rows} x {columns}: us {times}; {share:.1f} % of copy", flush=True)
    return {"rows": rows, "columns": columns, "us": us, "% of copy": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", default=",".join(map(str, COLUMNS)))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--out", type=Path, help="folder of the result file")
    args = parser.parse_args()
    copy = copy_bandwidth()
    print(f"device copy {copy / 1e12:.3f} TB/s", flush=True)
    sizes = [(r, c) for c in args.columns.split(",") for r in args.rows.split(",")]
    result = {
        "title": f"RMSNorm + Hadamard + quantize, {torch.cuda.get_device_name()}",
        "environment": environment(),
        "protocol": (
            "CUDA graph replay, median of 9, bfloat16 operands rotated out of L2 (4 x its size), "
            "back-to-back launches with programmatic dependent launch; us are [median, 10th, 90th "
            "percentile]; bytes: x read once, levels written once; weight and shift bfloat16"
        ),
        "copy_bytes_per_second": copy,
        "cells": [bench(int(rows), int(columns), copy) for rows, columns in sizes],
    }
    write_json(results_folder(args.out) / "rmsnorm_hadamard.json", result)


if __name__ == "__main__":
    main()
