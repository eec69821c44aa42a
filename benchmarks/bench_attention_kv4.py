# SPDX-License-Identifier: Apache-2.0
"""Attention over a 4-bit, 8-bit and 16-bit KV cache against torch's, and rope_kv_append.

    python benchmarks/bench_attention_kv4.py [--only decode,prefill,append] [--out FOLDER]

Writes attention_kv4.json. Llama-3-8B heads: 32 queries, 8 of K and V, dimension 128. Every cell is
checked against float64 attention on the dequantized cache before it is timed. The peer is
``scaled_dot_product_attention`` in bfloat16 with ``enable_gqa`` on keys and values that lie ready
in 16 bits, with each backend that takes the shape, the fastest one counting.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import reference
from kv_cases import rope_tables
from prefixquant import ops
from timing import (
    Timing,
    as_row,
    copies_out_of_l2,
    environment,
    read_bandwidth,
    results_folder,
    time_graph,
    write_json,
)

QUERY_HEADS, KV_HEADS, DIM, PREFIX = 32, 8, 128, 1
SCALING = DIM**-0.5
DECODE = (
    *((1, length) for length in (512, 2048, 8192, 32768)),
    *((16, length) for length in (512, 1024, 8192)),
    (64, 2048),
)
PREFILL = ((512, 0), (2048, 0), (8192, 0), (512, 7680), (16, 8176))  # tokens, first row
APPEND = (1, 16, 256, 4096)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def random_cache(pages: int, page_size: int, bits: int) -> Tensor:
    shape = (pages, KV_HEADS, page_size)
    if bits == 16:
        return torch.randn(*shape, DIM, dtype=torch.bfloat16, device="cuda")
    levels = torch.randn(*shape, DIM, device="cuda") * (2 ** (bits - 1) / 2.7)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    levels = levels.round_().clamp_(low, high).to(torch.int8)
    return levels if bits == 8 else ops.pack_int4(levels.cpu()).cuda()


class Cache:
    """Rotating caches of one shape, and the rest of the operands."""

    def __init__(self, batch: int, length: int, bits: int, page_size: int | None):
        self.bits, self.length = bits, length
        rows = page_size or length
        pages = batch * -(-length // rows)
        row_bytes = DIM * bits // 8
        self.read_bytes = 2 * batch * KV_HEADS * length * row_bytes
        copies = copies_out_of_l2(self.read_bytes)
        first = tuple(random_cache(pages, rows, bits) for _ in range(2))
        self.caches = [first] + [tuple(t.clone() for t in first) for _ in range(copies - 1)]
        self.scale = None if bits == 16 else torch.full((KV_HEADS,), 2.7 / 2**bits, device="cuda")
        shape = (KV_HEADS, PREFIX, DIM)
        self.prefix = [torch.randn(shape, device="cuda").bfloat16() for _ in range(2)]
        self.table = None
        if page_size:
            order = torch.randperm(pages, device="cuda", dtype=torch.int32)
            self.table = order.view(batch, -1)

    def rows(self, which: int, b: int) -> Tensor:
        """[Hkv, P + length, D] of sequence b, float64."""
        cache = self.caches[0][which]
        pages = [b] if self.table is None else self.table[b].tolist()
        cached = torch.cat([cache[p] for p in pages], dim=1)[:, : self.length]
        if self.bits == 4:
            cached = reference.unpack_int4(cached)
        cached = cached.double() if self.scale is None else cached.double() * self.scale[0]
        return torch.cat((self.prefix[which].double(), cached), dim=1)


def check(out: Tensor, q: Tensor, cache: Cache, b: int) -> None:
    """q [T, Hq, D] are the last tokens of sequence b; out [T, Hq * D]."""
    keys, values = cache.rows(0, b), cache.rows(1, b)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        k, v = (
            t.to(dtype).repeat_interleave(QUERY_HEADS // KV_HEADS, dim=0) for t in (keys, values)
        )
        logits = q.to(dtype).transpose(0, 1) @ k.transpose(-1, -2) * SCALING
        tokens, total = logits.shape[-2:]
        seen = torch.ones(tokens, total, dtype=torch.bool, device=q.device).tril(total - tokens)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        results.append((weights @ v).transpose(0, 1).flatten(1).double())
    exact, own = results
    error, allowed = ((t.double() - exact).abs().max().item() for t in (out, own))
    if not error <= 2 * allowed + 1e-6:
        raise AssertionError(f"error {error:.2e}, of torch in bfloat16 {allowed:.2e}")


def attempt(launch: Callable[[int], object], copies: int) -> Timing | None:
    try:
        return time_graph(launch, copies)
    except (RuntimeError, ValueError):
        torch.cuda.synchronize()
        return None


def peers(q: Tensor, rows: int, causal: bool) -> dict[str, list[float] | None]:
    """q [B, Hq, T, D] over ``rows`` keys in bfloat16, by backend."""
    shape = (q.shape[0], KV_HEADS, rows, DIM)
    copies = copies_out_of_l2(4 * q.shape[0] * KV_HEADS * rows * DIM)
    pairs = [
        tuple(torch.randn(shape, device="cuda").bfloat16() for _ in range(2)) for _ in range(copies)
    ]
    cells = {}
    for name, backend in BACKENDS.items():
        if name == "math" and q.shape[2] > 1:
            continue  # a matrix of logits: never the fastest, and too large

        def launch(i: int, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, *pairs[i], is_causal=causal, scale=SCALING, enable_gqa=True
                )

        cells[name] = as_row(attempt(launch, copies))
    return cells


def decode_launch(cache: Cache, q: Tensor) -> Callable[[int], Tensor]:
    """q [B, Hq, D], one token of every sequence of the cache."""
    lengths = torch.full((q.shape[0],), cache.length, dtype=torch.int32, device="cuda")

    def launch(i: int) -> Tensor:
        return ops.kv_decode_attention(
            q,
            *cache.caches[i],
            cache.scale,
            cache.scale,
            *cache.prefix,
            lengths,
            cache.table,
            cache.bits,
            cache.length,
            SCALING,
        )

    return launch


def bench_decode() -> list[dict]:
    cells = []
    for batch, length in DECODE:
        q = torch.randn(batch, QUERY_HEADS, DIM, device="cuda").bfloat16()
        cell = {"batch": batch, "length": length, "us": {}, "read_bytes": {}}
        variants = {"kv4": (4, None), "kv4_page64": (4, 64), "kv4_page16": (4, 16)}
        variants |= {"kv8": (8, None), "kv16": (16, None)}
        for name, (bits, page_size) in variants.items():
            cache = Cache(batch, length, bits, page_size)
            launch = decode_launch(cache, q)
            out = launch(0)
            for b in {0, batch - 1}:
                check(out[b : b + 1], q[b : b + 1], cache, b)
            cell["us"][name] = as_row(time_graph(launch, len(cache.caches)))
            cell["read_bytes"][name] = cache.read_bytes
            del cache, launch
            torch.cuda.empty_cache()
        cell["sdpa"] = peers(q[:, :, None], length, causal=False)
        cells.append(cell)
        print(batch, length, cell["us"], cell["sdpa"], flush=True)
    return cells


def bench_prefill() -> list[dict]:
    cells = []
    for tokens, start in PREFILL:
        end = start + tokens
        cache = Cache(1, end, 4, None)
        q = torch.randn(tokens, QUERY_HEADS, DIM, device="cuda").bfloat16()

        def launch(i: int, cache: Cache = cache, q: Tensor = q, start: int = start) -> Tensor:
            return ops.kv_prefill_attention(
                q, *cache.caches[i], cache.scale, cache.scale, *cache.prefix, 4, start, SCALING, 0
            )

        if tokens <= 512:
            check(launch(0), q, cache, 0)
        cell = {"tokens": tokens, "start": start, "us": as_row(time_graph(launch, 1))}
        if start == 0:
            cell["sdpa"] = peers(q[None].transpose(1, 2), end, causal=True)
        cells.append(cell)
        print(cell, flush=True)
    return cells


def unfused_append(qkv: Tensor, cos: Tensor, sin: Tensor, hadamard: Tensor, scale: Tensor):
    """What rope_kv_append does, in torch: q, and packed rows of k and v."""
    heads = qkv.view(qkv.shape[0], -1, DIM)
    x, v = heads[:, : QUERY_HEADS + KV_HEADS].float(), heads[:, QUERY_HEADS + KV_HEADS :].float()
    first, second = x.chunk(2, dim=-1)
    x = x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    x = x @ hadamard
    q, k = x[:, :QUERY_HEADS].to(qkv.dtype), x[:, QUERY_HEADS:]
    packed = []
    for rows in (k, v):
        levels = (rows * (1.0 / scale)[:, None]).round().clamp(-8, 7).to(torch.int8)
        packed.append((levels[..., ::2] & 15 | levels[..., 1::2] << 4).view(torch.uint8))
    return q, *packed


def bench_append() -> list[dict]:
    cells = []
    for tokens in APPEND:
        width = (QUERY_HEADS + 2 * KV_HEADS) * DIM
        cos, sin = (t.cuda() for t in rope_tables(tokens, DIM))
        scale = torch.full((KV_HEADS,), 0.4, device="cuda")
        inputs = {
            "qkv": torch.randn(tokens, width, device="cuda").bfloat16(),
            "cos": cos,
            "sin": sin,
            "positions": torch.arange(tokens, dtype=torch.int32, device="cuda"),
            "q_norm": None,
            "k_norm": None,
            "eps": 0.0,
            "signs": None,
            "rotation_size": DIM,
            "k_shift": torch.randn(KV_HEADS, DIM, device="cuda") / 8,
            "k_scale": scale,
            "v_scale": scale,
            "kv_bits": 4,
            "k_cache": torch.zeros(1, KV_HEADS, tokens, DIM // 2, dtype=torch.uint8, device="cuda"),
            "v_cache": torch.zeros(1, KV_HEADS, tokens, DIM // 2, dtype=torch.uint8, device="cuda"),
            "slots": torch.arange(tokens, device="cuda"),
            "heads": QUERY_HEADS,
        }
        on_cpu = {n: t.cpu() if isinstance(t, Tensor) else t for n, t in inputs.items()}
        expected = reference.rope_kv_append(**on_cpu)
        if not torch.equal(ops.rope_kv_append(**inputs).cpu(), expected):
            raise AssertionError("rope_kv_append: q differs from the reference")
        for name in ("k_cache", "v_cache"):
            if not torch.equal(inputs[name].cpu(), on_cpu[name]):
                raise AssertionError(f"rope_kv_append: {name} differs from the reference")
        hadamard = reference.hadamard_float32(torch.eye(DIM), None, DIM).cuda()
        copies = copies_out_of_l2(inputs["qkv"].numel() * 2)
        rotating = [inputs["qkv"].clone() for _ in range(min(copies, 64))]
        fused = time_graph(
            lambda i, inputs=inputs, rotating=rotating: ops.rope_kv_append(
                **{**inputs, "qkv": rotating[i]}
            ),
            len(rotating),
        )
        torch_us = time_graph(
            lambda i, rotating=rotating, cos=cos, sin=sin, h=hadamard, s=scale: unfused_append(
                rotating[i], cos, sin, h, s
            ),
            len(rotating),
        )
        moved = tokens * DIM * (2 * (QUERY_HEADS + 2 * KV_HEADS) + 2 * QUERY_HEADS + KV_HEADS)
        cells.append(
            {
                "tokens": tokens,
                "us": as_row(fused),
                "torch_us": as_row(torch_us),
                "bytes_moved": moved,
            }
        )
        print(cells[-1], flush=True)
    return cells


def best_peer(cell: dict) -> float | None:
    return min((t[0] for t in cell.get("sdpa", {}).values() if t), default=None)


def table_rows(cells: list[dict], read: float) -> tuple[list[str], list[list]]:
    columns = ["batch", "tokens", "KV4 us", "KV8 us", "KV16 us", "SDPA us", "KV4 x SDPA"]
    columns.append("KV4 % of read")
    rows = []
    for c in cells:
        us, peer = {n: t[0] for n, t in c["us"].items()}, best_peer(c)
        share = c["read_bytes"]["kv4"] / us["kv4"] * 1e6 / read * 100
        rows.append([c["batch"], c["length"], us["kv4"], us["kv8"], us["kv16"], peer])
        rows[-1] += [peer / us["kv4"] if peer else None, share]
    return columns, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="decode,prefill,append")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    args = parser.parse_args()
    only = args.only.split(",")
    torch.manual_seed(0)
    read = read_bandwidth()
    print(f"pure read: {read / 1e12:.3f} TB/s", flush=True)
    decode = bench_decode() if "decode" in only else []
    prefill = bench_prefill() if "prefill" in only else []
    append = bench_append() if "append" in only else []
    columns, rows = table_rows(decode, read)
    result = {
        "table": "attention_kv4",
        "title": f"Decode attention, microseconds, {torch.cuda.get_device_name()}",
        "columns": columns,
        "rows": rows,
        "environment": environment(),
        "protocol": (
            f"{QUERY_HEADS} query heads, {KV_HEADS} KV heads, dimension {DIM}, bfloat16 queries, "
            f"{PREFIX} prefix token (ours only); CUDA graph replay, median of 9, caches rotated "
            "out of L2 (4 x its size), back-to-back launches (ours with programmatic dependent "
            "launch); us cells are [median, 10th, 90th percentile]; checked before timing"
        ),
        "read_bytes_per_second": read,
        "decode": decode,
        "prefill": prefill,
        "append": append,
    }
    write_json(results_folder(args.out) / "attention_kv4.json", result)


if __name__ == "__main__":
    main()
