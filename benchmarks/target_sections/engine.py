# SPDX-License-Identifier: Apache-2.0
"""Targets of generation: the runtime on a GPU and on a CPU."""

from collections.abc import Iterator
from pathlib import Path

from target_sections.target import Target, load


class Engine:
    """Rows of engine.json."""

    def __init__(self, result: dict):
        self.rows = result["measured"]

    def best_row(self, shape: str, case: str, key: str, model: str) -> dict | None:
        """The row with the least ``key`` of those whose model's name begins so."""
        found = [
            row
            for row in self.rows
            if (row["shape"], row["case"]) == (shape, case)
            and row["model"].startswith(model)
            and row[key] is not None
        ]
        return min(found, key=lambda row: row[key], default=None)

    def best(self, shape: str, case: str, key: str, model: str) -> float | None:
        row = self.best_row(shape, case, key, model)
        return row and row[key]

    def speedup(self, case: str, key: str) -> float | None:
        """Of Llama-3-8B over transformers."""
        ours = self.best("llama-3-8b", case, key, "prefixquant")
        theirs = self.best("llama-3-8b", case, key, "transformers")
        return theirs / ours if ours and theirs else None


def engine_on_gpu(folder: Path) -> Iterator[Target]:
    results = load(folder, "engine")
    if not results:
        yield Target("engine.json", 1.0, None)
    for gpu, result in results:
        data, tag = Engine(result), f"{gpu}, Llama-3-8B"
        step = data.best("llama-3-8b", "decode-1x512", "decode_ms", "prefixquant")
        yield Target(f"{tag}: decode 1 x 512, ms", 2.6, step, " ms", at_most=True)
        for case, key, wanted in (
            ("decode-1x512", "decode_ms", 3.4),
            ("decode-16x512", "decode_ms", 3.4),
            ("prefill-8x2048", "prefill_ms", 1.9),
        ):
            yield Target(f"{tag}: {case} over FP16", wanted, data.speedup(case, key))
        four, sixteen = (
            data.best("llama-3-8b", "decode-16x8192", "decode_ms", f"prefixquant W4A8KV{bits},")
            for bits in (4, 16)
        )
        ratio = sixteen / four if four and sixteen else None
        what = f"{tag}: decode 16 x 8192, 16-bit over 4-bit cache (aim)"
        yield Target(what, 1.5, ratio, decides=False)
        loading = data.best("llama-3-8b", "decode-1x512", "memory_gb", "prefixquant")
        yield Target(f"{tag}: peak at 1 x 512", 7.0, loading, " GB", at_most=True)
        large = data.best("llama-3-70b", "decode-1x512", "memory_gb", "prefixquant")
        yield Target(f"{gpu}, Llama-3-70B: peak at 1 x 512", 45.0, large, " GB", at_most=True)


def engine_on_cpu(folder: Path) -> Iterator[Target]:
    """SmolLM2-135M of bench_cpu_generation.py: prefill of 512 and decode, tokens/s."""
    rows = [row for _, r in load(folder, "cpu-generation") for row in r["rows"]]
    ours = [row for row in rows if row[0].startswith("prefixquant") and "runtime" in row[0]]
    for column, what, wanted, aim in ((2, "decode", 80.0, 117.6), (1, "prefill", 1800.0, 414.0)):
        measured = max((row[column] for row in ours), default=None)
        yield Target(f"CPU, SmolLM2-135M: {what}", wanted, measured, " tokens/s")
        tag = f"CPU, SmolLM2-135M: {what}, llama.cpp's on another CPU (aim)"
        yield Target(tag, aim, measured, " tokens/s", decides=False)


def engine(folder: Path) -> Iterator[Target]:
    yield from engine_on_gpu(folder)
    yield from engine_on_cpu(folder)
