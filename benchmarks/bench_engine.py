# SPDX-License-Identifier: Apache-2.0
"""Generation end to end on a GPU: the runtime beside transformers' compiled FP16, random weights.

Decode at batch 1 and 16 with 512 tokens of context, prefill of 1 and 8 x 2048, decode of 16 x 8192
with a 4-bit and with a 16-bit cache, in one process; Llama-3-70B alone. Writes engine.json under
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
    "prefill-1x2048": Case(1, 2048, 1),
    "prefill-8x2048": Case(8, 2048, 1),
}
_LONG_CONTEXT = 4096  # a round of more takes seconds and hardly varies
LONG = {"decode-16x8192": Case(16, 8192, 16)}
_COLUMNS = ["shape", "model", "case", "prefill, ms", "decode, ms/step", "decode, tokens/s", "GB"]
_NOTE = (
    "Medians of 3 (16 x 8192: one round); GB is the peak of torch's allocator, weights included. "
    "transformers: `generate` with a static cache, whose decode steps it compiles; its prefill is "
    "not compiled, and the quicker of a static and a growing cache counts."
)


class Results:
    """engine.json, written anew behind every case: what was measured stays if the run ends."""

    def __init__(self, folder: Path):
        self.path = folder / "engine.json"
        self.rows: list[dict] = []
        self.bandwidth = read_bandwidth()
        self.environment = environment()

    def add(self, row: dict) -> None:
        self.rows.append(row)
        print({k: v for k, v in row.items() if k != "step_bytes"}, flush=True)
        self.write()

    def write(self) -> None:
        keys = ("shape", "model", "case", "prefill_ms", "decode_ms", "decode_tokens_per_s")
        result = {
            "table": "engine",
            "title": f"Generation end to end, {torch.cuda.get_device_name()}, random weights",
            "columns": _COLUMNS,
            "rows": [[row[key] for key in (*keys, "memory_gb")] for row in self.rows],
            "note": _NOTE,
            "measured": self.rows,
            "read_bytes_per_second": self.bandwidth,
            "environment": self.environment,
        }
        write_json(self.path, result)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def load(shape: str, scheme: str, head_bits: int) -> tuple[Runtime, float]:
    """(runtime, GB that loading takes at its peak)"""
    free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = shape_config(shape)
    weights = random_weights(
        config, Scheme.parse(scheme), torch.device("cuda"), head_bits=head_bits
    )
    return Runtime(weights), (torch.cuda.max_memory_allocated() - before) / 1e9


def run_runtime(
    results: Results, shape: str, scheme: str, head_bits: int, cases: dict[str, Case]
) -> None:
    runtime, loading = load(shape, scheme, head_bits)
    for name, case in cases.items():
        speed = measure(
            runtime_generate(runtime),
            case,
            runtime.weights.geometry.vocab,
            torch.device("cuda"),
            rounds=1 if case.context > _LONG_CONTEXT else None,
        )
        row = {
            "shape": shape,
            "model": f"prefixquant {scheme.upper()}, {head_bits}-bit lm_head",
            "case": name,
            "loading_gb": loading,
            "step_bytes": step_bytes(runtime, case),
        }
        results.add(row | speed.as_dict())


def run_baseline(results: Results, shape: str, cases: dict[str, Case]) -> None:
    free()
    config = shape_config(shape)
    model = random_float_model(config, torch.device("cuda"), torch.float16)
    for name, case in cases.items():
        speed = measure(transformers_generate(model), case, config.vocab_size, torch.device("cuda"))
        row = {"shape": shape, "model": "transformers FP16, compiled", "case": name}
        results.add(row | speed.as_dict())


def add_profiles(results: Results, shape: str, head_bits: int) -> None:
    """The operations of a decode step, to the rows that were timed.

    Last of all: the profiler slows down every launch behind it.
    """
    runtime, _ = load(shape, "w4a8kv4", head_bits)
    for row in results.rows:
        if (row["shape"], row["model"]) == (
            shape,
            f"prefixquant W4A8KV4, {head_bits}-bit lm_head",
        ) and row["case"] in ("decode-1x512", "decode-16x512"):
            operations = profile_step(runtime, CASES[row["case"]])
            row["profile"] = [vars(operation) for operation in operations[:30]]
    results.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-3-8b", "llama-3-70b"])
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = Results(results_folder(arguments.out))
    for shape in arguments.shapes:
        large = "70b" in shape
        for head_bits in (16,) if large else (16, 8):
            run_runtime(results, shape, "w4a8kv4", head_bits, CASES)
        if large:
            continue
        if not arguments.no_baseline:
            run_baseline(results, shape, CASES)
        for scheme in ("w4a8kv4", "w4a8kv16"):
            run_runtime(results, shape, scheme, 16, LONG)
    for shape in [] if arguments.no_profile else arguments.shapes:
        add_profiles(results, shape, 16)


if __name__ == "__main__":
    main()
