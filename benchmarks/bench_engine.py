# SPDX-License-Identifier: Apache-2.0
"""Generation end to end on a GPU: the runtime beside transformers' compiled FP16, random weights.

Decode at batch 1 and 16 with 512 tokens of context, prefill of 8 x 2048, decode of 16 x 8192 with a
4-bit and with a 16-bit cache, in one process; Llama-3-70B alone. Writes engine.json under
benchmarks/results/<gpu>; `python benchmarks/targets.py engine` holds it against the targets.

    python benchmarks/bench_engine.py [--shapes llama-3-8b llama-3-70b] [--no-baseline]
"""

import argparse
import gc
from pathlib import Path

import torch
from prefixquant.bench import (
    Case,
    measure,
    profile_step,
    random_float_model,
    runtime_generate,
    step_bytes,
    transformers_generate,
)
from prefixquant.config import Scheme
from prefixquant.runtime import Runtime
from prefixquant.runtime.random_weights import random_weights, shape_config
from timing import environment, read_bandwidth, results_folder, write_json

CASES = {
    "decode-1x512": Case(1, 512, 64),
    "decode-16x512": Case(16, 512, 64),
    "prefill-8x2048": Case(8, 2048, 2),
}
LONG = Case(16, 8192, 16)
_COLUMNS = ["model", "case", "prefill, ms", "decode, ms/step", "decode, tokens/s", "GB"]


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def load(shape: str, scheme: str, head_bits: int) -> tuple[Runtime, float]:
    """(runtime, peak GB of loading)"""
    free()
    torch.cuda.reset_peak_memory_stats()
    config = shape_config(shape)
    weights = random_weights(
        config, Scheme.parse(scheme), torch.device("cuda"), head_bits=head_bits
    )
    return Runtime(weights), torch.cuda.max_memory_allocated() / 1e9


def run_runtime(shape: str, scheme: str, head_bits: int, cases: dict[str, Case]) -> list[dict]:
    runtime, loading = load(shape, scheme, head_bits)
    rows = []
    for name, case in cases.items():
        speed = measure(
            runtime_generate(runtime), case, runtime.weights.geometry.vocab, torch.device("cuda")
        )
        row = {
            "model": f"prefixquant {scheme.upper()}, {head_bits}-bit lm_head",
            "shape": shape,
            "case": name,
            "loading_gb": loading,
            "step_bytes": step_bytes(runtime, case),
            **speed.as_dict(),
        }
        if name.startswith("decode-"):
            row["profile"] = [vars(r) for r in profile_step(runtime, case)[:30]]
        rows.append(row)
        print(shape, row["model"], name, speed, flush=True)
    return rows


def run_baseline(shape: str, cases: dict[str, Case]) -> list[dict]:
    free()
    config = shape_config(shape)
    model = random_float_model(config, torch.device("cuda"), torch.float16)
    rows = []
    for name, case in cases.items():
        speed = measure(transformers_generate(model), case, config.vocab_size, torch.device("cuda"))
        rows.append(
            {"model": "transformers FP16, compiled", "shape": shape, "case": name} | speed.as_dict()
        )
        print(shape, rows[-1]["model"], name, speed, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-3-8b", "llama-3-70b"])
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes:
        large = "70b" in shape
        for head_bits in (16, 8):
            cases = dict(CASES) if head_bits == 16 or not large else {}
            if cases:
                rows += run_runtime(shape, "w4a8kv4", head_bits, cases)
        if large:
            continue
        for scheme in ("w4a8kv4", "w4a8kv16"):
            rows += run_runtime(shape, scheme, 16, {"decode-16x8192": LONG})
        if not arguments.no_baseline:
            rows += run_baseline(shape, CASES)
    free()
    result = {
        "table": "engine",
        "title": f"Generation end to end, {torch.cuda.get_device_name()}, random weights",
        "columns": ["shape", *_COLUMNS],
        "rows": [
            [
                row["shape"],
                row["model"],
                row["case"],
                *(row[k] for k in ("prefill_ms", "decode_ms", "decode_tokens_per_s", "memory_gb")),
            ]
            for row in rows
        ],
        "note": "Medians of 3; GB is the peak of torch's allocator, weights included.",
        "measured": rows,
        "read_bytes_per_second": read_bandwidth(),
        "environment": environment(),
    }
    write_json(results_folder(arguments.out) / "engine.json", result)


if __name__ == "__main__":
    main()
