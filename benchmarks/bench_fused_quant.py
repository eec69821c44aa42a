# SPDX-License-Identifier: Apache-2.0
"""RMSNorm + quantize and the outlier scan against a device copy and the unfused torch sequence.

    python benchmarks/bench_fused_quant.py [--columns 4096,..] [--rows 1,16,..] [--out FOLDER]

Writes fused_quant.json. Every cell is checked against the reference before it is timed. A cell has
the microseconds of each operation, the same with a dynamic scale a row, the torch operations that
it replaces, and the share of a device copy's bandwidth in bytes actually moved.
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
from row_bench import copy_bandwidth, measure, share_of_copy
from timing import environment, read_bandwidth, results_folder, write_json

EPS = 1e-5
COLUMNS = (576, 2048, 4096, 5120, 8192, 14336)
ROWS = (1, 16, 256, 4096, 16384)
SCANS = ((512, 14336), (65536, 576), (65536, 1536), (65536, 14336))


def torch_quantize(y: Tensor, scale: Tensor) -> Tensor:
    return (y * (1.0 / scale)).round().clamp(-8, 7).to(torch.int8)


def torch_rmsnorm(x: Tensor) -> Tensor:
    """Operation by operation as a decoder layer has it."""
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def torch_dynamic(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = y.abs().amax(-1, keepdim=True).float() / 7
    return torch_quantize(y, scale), scale


def operations(scale: Tensor, shift: Tensor) -> dict[str, tuple[Callable, Callable | None, float]]:
    """name -> (ours of (x, residual), torch's, bytes an element)."""
    return {
        "rmsnorm_quantize": (
            lambda x, _: ops.rmsnorm_quantize(x, None, EPS, scale, 4),
            lambda x, _: torch_quantize(torch_rmsnorm(x), scale),
            3,
        ),
        "rmsnorm_quantize_packed": (
            lambda x, _: ops.rmsnorm_quantize(x, None, EPS, scale, 4, True), None, 2.5,
        ),
        "rmsnorm_quantize_shift": (
            lambda x, _: ops.rmsnorm_quantize(x, None, EPS, scale, 4, shift=shift), None, 3,
        ),
        "rmsnorm_quantize_dynamic": (
            lambda x, _: ops.rmsnorm_quantize_dynamic(x, None, EPS, 4),
            lambda x, _: torch_dynamic(torch_rmsnorm(x)),
            3,
        ),
        "add_rmsnorm_quantize": (
            lambda x, r: ops.add_rmsnorm_quantize(r, x, None, EPS, scale, 4),
            lambda x, r: torch_quantize(torch_rmsnorm(r.add_(x)), scale),
            7,
        ),
        "quantize_static": (
            lambda x, _: ops.quantize_static(x, scale, 4),
            lambda x, _: torch_quantize(x, scale),
            3,
        ),
        "quantize_dynamic": (
            lambda x, _: ops.quantize_dynamic(x, 4), lambda x, _: torch_dynamic(x), 3,
        ),
    }  # fmt: skip


def check(rows: int, columns: int, scale: Tensor, shift: Tensor) -> None:
    x = torch.randn(min(rows, 64), columns, dtype=torch.bfloat16)
    for s in (None, shift):
        q = ops.rmsnorm_quantize(x.cuda(), None, EPS, scale, 4, shift=s).cpu()
        s = None if s is None else s.cpu()
        if not torch.equal(q, reference.rmsnorm_quantize(x, None, EPS, scale.cpu(), 4, shift=s)):
            raise AssertionError(f"rmsnorm_quantize is wrong on {rows} x {columns}")
    q, row_scale = ops.rmsnorm_quantize_dynamic(x.cuda(), None, EPS, 4)
    expected = reference.rmsnorm_quantize_dynamic(x, None, EPS, 4)
    if not (torch.equal(q.cpu(), expected[0]) and torch.equal(row_scale.cpu(), expected[1])):
        raise AssertionError(f"rmsnorm_quantize_dynamic is wrong on {rows} x {columns}")


def bench_rows(rows: int, columns: int, copy: float) -> list[dict]:
    scale = torch.tensor(0.4, device="cuda")
    shift = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    check(rows, columns, scale, shift)
    cells = []
    for name, (ours, torch_sequence, bytes_each) in operations(scale, shift).items():
        count = rows * columns
        us = {"ours": measure(ours, (rows, columns), 2, bytes_each * count)}
        if torch_sequence is not None:
            us["torch"] = measure(torch_sequence, (rows, columns), 2, bytes_each * count)
        share = share_of_copy(bytes_each * count, us["ours"], copy)
        cells.append(
            {"operation": name, "rows": rows, "columns": columns, "us": us, "% of copy": share}
        )
        print(f"{name} {rows} x {columns}: {us['ours'][0]:.2f} us, {share:.1f} % of copy")
    return cells


def bench_scan(rows: int, columns: int, read: float) -> dict:
    x = torch.randn(64, columns, dtype=torch.bfloat16)
    found = ops.outlier_scan(x.cuda())
    for actual, expected in zip(found, reference.outlier_scan(x, 64.0), strict=True):
        if not torch.equal(actual.cpu(), expected):
            raise AssertionError(f"outlier_scan is wrong on 64 x {columns}")
    us = measure(lambda x: ops.outlier_scan(x), (rows, columns), 1, 2 * rows * columns)
    share = 2 * rows * columns / us[0] * 1e6 / read * 100
    print(f"outlier_scan {rows} x {columns}: {us[0]:.2f} us, {share:.1f} % of pure read")
    return {"rows": rows, "columns": columns, "us": us, "% of read": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", default=",".join(map(str, COLUMNS)))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--out", type=Path, help="folder of the result file")
    args = parser.parse_args()
    copy, read = copy_bandwidth(), read_bandwidth()
    print(f"device copy {copy / 1e12:.3f} TB/s, pure read {read / 1e12:.3f} TB/s", flush=True)
    cells = []
    for columns in map(int, args.columns.split(",")):
        for rows in map(int, args.rows.split(",")):
            cells += bench_rows(rows, columns, copy)
    scans = [bench_scan(rows, columns, read) for rows, columns in SCANS]
    result = {
        "title": f"RMSNorm + quantize, outlier scan, {torch.cuda.get_device_name()}",
        "environment": environment(),
        "protocol": (
            "CUDA graph replay, median of 9, bfloat16 operands rotated out of L2 (4 x its size), "
            "back-to-back launches with programmatic dependent launch; us are [median, 10th, 90th "
            "percentile]; bytes: every input read once, every output written once"
        ),
        "copy_bytes_per_second": copy,
        "read_bytes_per_second": read,
        "cells": cells,
        "scans": scans,
    }
    write_json(results_folder(args.out) / "fused_quant.json", result)


if __name__ == "__main__":
    main()
