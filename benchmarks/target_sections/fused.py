# SPDX-License-Identifier: Apache-2.0
"""Targets of the row-wise kernels, the Hadamard transforms and KV4 attention."""

from collections.abc import Iterator
from pathlib import Path

from target_sections.target import Target, load


def kv4_attention(folder: Path) -> Iterator[Target]:
    results = load(folder, "attention_kv4")
    if not results:
        yield Target("attention_kv4.json", 1.0, None)
    for gpu, result in results:
        cells = {(c["batch"], c["length"]): c for c in result["decode"]}
        for batch, length in ((16, 8192), (1, 32768)):
            tag = f"{gpu}, KV4 decode, {batch} x {length}"
            cell = cells.get((batch, length))
            share = ratio = None
            if cell:
                ours = cell["us"]["kv4"][0]
                read = result["read_bytes_per_second"]
                share = cell["read_bytes"]["kv4"] / ours * 1e6 / read * 100
                best = min((t[0] for t in cell["sdpa"].values() if t), default=None)
                ratio = best / ours if best else None
            yield Target(f"{tag}: share of pure read", 70.0, share, "%")
            yield Target(f"{tag}: over torch SDPA, 16-bit cache", 3.0, ratio)


def _many(cells: list[dict]) -> list[int]:
    """4096 tokens, and all measured numbers of more."""
    return sorted({4096, *(c["rows"] for c in cells if c["rows"] > 4096)})


def row_quantization(folder: Path) -> Iterator[Target]:
    """RMSNorm + quantize and the outlier scan: bench_fused_quant.py."""
    results = load(folder, "fused_quant")
    if not results:
        yield Target("fused_quant.json", 1.0, None)
    for gpu, result in results:
        cells = {(c["operation"], c["rows"], c["columns"]): c for c in result["cells"]}
        widths = {columns for operation, _, columns in cells if operation == "rmsnorm_quantize"}
        for columns in sorted(widths):
            for operation in ("rmsnorm_quantize", "rmsnorm_quantize_shift"):
                tag = f"{gpu}, {operation} x {columns}"
                one = cells.get((operation, 1, columns))
                us = one["us"]["ours"][0] if one else None
                yield Target(f"{tag}: 1 token", 4.0, us, " us", at_most=True)
                for m in _many(result["cells"]):
                    cell = cells.get((operation, m, columns))
                    share = cell["% of copy"] if cell else None
                    yield Target(f"{tag}: {m} tokens, share of copy", 80.0, share, "%")
            tag = f"{gpu}, rmsnorm_quantize x {columns}"
            many = cells.get(("rmsnorm_quantize", 4096, columns))
            ratio = many["us"]["torch"][0] / many["us"]["ours"][0] if many else None
            yield Target(f"{tag}: 4096 tokens, over torch", 4.0, ratio)
            dynamic = cells.get(("rmsnorm_quantize_dynamic", 4096, columns))
            ratio = dynamic["us"]["ours"][0] / many["us"]["ours"][0] if dynamic and many else None
            yield Target(f"{tag}: static over dynamic", 1.0, ratio, decides=False)
        scans = {(c["rows"], c["columns"]): c["% of read"] for c in result["scans"]}
        share = scans.get((65536, 14336))
        yield Target(f"{gpu}, outlier_scan 65536 x 14336: share of read", 80.0, share, "%")


def swiglu_hadamard(folder: Path) -> Iterator[Target]:
    """SwiGLU + Hadamard + quantize: bench_hadamard.py."""
    results = load(folder, "hadamard")
    if not results:
        yield Target("hadamard.json", 1.0, None)
    for gpu, result in results:
        cells = {(c["rows"], c["columns"], c["block"]): c for c in result["cells"]}
        for columns in sorted({c["columns"] for c in result["cells"]}):
            name, tag = "swiglu_hadamard_quantize", f"{gpu}, swiglu_hadamard_quantize x {columns}"
            one, many = (cells.get((m, columns, columns)) for m in (1, 4096))
            us = one["us"][name][0] if one else None
            yield Target(f"{tag}: 1 token", 4.0, us, " us", at_most=True)
            for m in _many(result["cells"]):
                cell = cells.get((m, columns, columns))
                share = cell["% of copy"][name] if cell else None
                yield Target(f"{tag}: {m} tokens, share of copy", 80.0, share, "%")
            ratio = many["us"]["torch"][0] / many["us"][name][0] if many else None
            yield Target(f"{tag}: 4096 tokens, over torch", 4.0, ratio, "x")
            ratio = many["us"][f"{name}_dynamic"][0] / many["us"][name][0] if many else None
            yield Target(f"{tag}: static over dynamic", 1.0, ratio, decides=False)


def rmsnorm_hadamard(folder: Path) -> Iterator[Target]:
    """RMSNorm + R6 + quantize, for information: bench_rmsnorm_hadamard.py."""
    for gpu, result in load(folder, "rmsnorm_hadamard"):
        for cell in result["cells"]:
            rows, columns = cell["rows"], cell["columns"]
            tag = f"{gpu}, rmsnorm_hadamard_quantize x {columns}"
            if rows == 1:
                us = cell["us"]["ours"][0]
                yield Target(f"{tag}: 1 token", 4.0, us, " us", decides=False, at_most=True)
            if rows in _many(result["cells"]):
                what = f"{tag}: {rows} tokens, share of copy"
                yield Target(what, 80.0, cell["% of copy"], "%", decides=False)


def fused(folder: Path) -> Iterator[Target]:
    yield from row_quantization(folder)
    yield from swiglu_hadamard(folder)
    yield from rmsnorm_hadamard(folder)
    yield from kv4_attention(folder)
