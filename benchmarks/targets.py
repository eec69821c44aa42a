# SPDX-License-Identifier: Apache-2.0
"""Prints each target of the project beside its measured figure. Standard library only.

    python benchmarks/targets.py SECTION [--results FOLDER]

Reads the committed JSON under benchmarks/results. Exits 1 where a figure falls short or is missing.
A section is a function that yields Targets; add it to SECTIONS.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Target:
    """One promise: ``measured`` must be at least ``wanted`` (or ``at_most`` that); None was not
    measured.

    A target that does not decide is printed for information: a part of a mean, say.
    """

    what: str
    wanted: float
    measured: float | None
    unit: str = "x"
    decides: bool = True
    at_most: bool = False

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


def load(folder: Path, name: str) -> list[tuple[str, dict]]:
    """(GPU folder, content) of every result file of that name."""
    found = sorted(folder.rglob(f"{name}.json"))
    return [(p.parent.name, json.loads(p.read_text(encoding="utf-8"))) for p in found]


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


# ---- gemm: issue "the fastest low-bit linear at every batch size" ----

_GATE_UP_AND_DOWN = ((28672, 4096), (4096, 14336), (57344, 8192), (8192, 28672))
_LARGE = (1024, 2048, 4096, 8192)


class _Gemm:
    """Medians of gemm_w4.json by (n, k, m)."""

    def __init__(self, result: dict):
        self.read = result["read_bytes_per_second"]
        self.cells = result["cells"]

    def us(self, cell: dict, name: str) -> float | None:
        timing = cell["us"].get(name)
        return timing[0] if timing else None

    def ratios(self, ours: str, peers: tuple[str, ...], m: int, main: bool = True) -> list[float]:
        """Fastest peer's time / ours, over the 8B and 70B layers (or over all)."""
        found = []
        for cell in self.cells:
            if cell["m"] != m or (main and not {"llama-3-8b", "llama-3-70b"} & set(cell["models"])):
                continue
            mine = self.us(cell, ours)
            theirs = [t for t in (self.us(cell, peer) for peer in peers) if t]
            if mine and theirs:
                found.append(min(theirs) / mine)
        return found

    def mean(self, ours: str, peers: tuple[str, ...], m: int) -> float | None:
        return geometric_mean(self.ratios(ours, peers, m))

    def at(self, ours: str, n: int, k: int, m: int) -> tuple[float | None, float | None]:
        """(FP16 time / ours, share of the pure-read bandwidth in percent)."""
        for cell in self.cells:
            if (cell["n"], cell["k"], cell["m"]) == (n, k, m):
                mine, fp16 = self.us(cell, ours), self.us(cell, "fp16")
                if mine:
                    share = n * k / 2 / mine * 1e6 / self.read * 100
                    return (fp16 / mine if fp16 else None), share
        return None, None


def gemm(folder: Path) -> Iterator[Target]:
    results = load(folder, "gemm_w4")
    if not results:
        yield Target("gemm_w4.json", 1.0, None)
    for gpu, result in results:
        data = _Gemm(result)
        for ours in ("w4a4", "w4a8"):
            tag = f"{gpu}, {ours}"
            yield Target(f"{tag}: M 1 over FP16", 3.5, data.mean(ours, ("fp16",), 1))
            yield Target(f"{tag}: M 1, 4096x4096 over FP16", 2.6, data.at(ours, 4096, 4096, 1)[0])
            # The target is the geometric mean over 8B and 70B; each shape is for information.
            shares = {(n, k): data.at(ours, n, k, 1)[1] for n, k in _GATE_UP_AND_DOWN}
            complete = None not in shares.values()
            mean = geometric_mean(list(shares.values())) if complete else None
            yield Target(f"{tag}: M 1, gate-up and down, share of pure read", 85.0, mean, "%")
            for (n, k), share in shares.items():
                what = f"{tag}: M 1, of which {n}x{k}"
                yield Target(what, 85.0, share, "%", decides=False)
            for m, wanted in ((16, 3.1), (64, 2.6), (256, 2.0)):
                yield Target(f"{tag}: M {m} over FP16", wanted, data.mean(ours, ("fp16",), m))
            yield Target(f"{tag}: M 64 over FP8", 1.0, data.mean(ours, ("fp8",), 64))
            cutlass = f"cutlass_int8_a{ours[-1]}"
            for m in _LARGE:
                yield Target(f"{tag}: M {m} over FP16", 2.0, data.mean(ours, ("fp16",), m))
                yield Target(f"{tag}: M {m} over FP8", 1.0, data.mean(ours, ("fp8",), m))
                ratio = data.mean(ours, (cutlass,), m)
                yield Target(f"{tag}: M {m} over CUTLASS int8", 0.97, ratio)
            worst = [
                r
                for m in sorted({c["m"] for c in data.cells})
                for r in data.ratios(ours, ("fp16",), m, main=False)
            ]
            yield Target(f"{tag}: slowest cell over FP16", 1.0, min(worst, default=None))


# ---- accuracy: issue "the most accurate static W4A4" ----


def solvers(folder: Path) -> Iterator[Target]:
    """Order of the weight solvers at 3 bits a channel, and what outliers give back.

    The weights as they are decide: the solvers' papers rotate nothing. Behind rotations, whose
    weights are near Gaussian, the same figures are information.
    """
    results = [(f, True) for _, f in load(folder, "*-solvers-w3-unrotated")]
    if not results:
        yield Target("*-solvers-w3-unrotated.json", 1.0, None)
    results += [(f, False) for _, f in load(folder, "*-solvers-w3")]
    for result, decides in results:
        rows = {row["setting"]: row for row in result["rows"]}
        ppl = {name: row["ppl"] for name, row in rows.items()}
        tag = f"{result['model']}, W3 weight-only{'' if decides else ', rotated'}"
        for better, worse in (("gptq", "rtn"), ("quantease", "gptq")):
            ratio = ppl[worse] / ppl[better] if {better, worse} <= set(ppl) else None
            yield Target(f"{tag}: perplexity of {worse} over {better}", 1.0, ratio, decides=decides)
        compared = rows.get("quantease", {}).get("error_over_gptq")
        margin = 1 / compared["worst"] if compared else None
        # The objective itself: it must hold on every layer, rotated or not.
        yield Target(f"{tag}: layer error of gptq over quantease, worst layer", 1.0, margin)
        regained = rows.get("quantease-outlier:0.01", {}).get("recovered")
        regained = None if regained is None else 100 * regained
        what = f"{tag}: of quantease's loss, regained by 1 % outliers"
        yield Target(what, 50.0, regained, "%", decides=decides)


_FINE_TUNED = {"W4A4KV4": (19.5, 18.0, 22.17), "W4A8KV4": (15.4, 15.0, 16.52)}


def fine_tuning(folder: Path) -> Iterator[Target]:
    """Perplexity at the end of all phases of run_finetune.py, on SmolLM2-135M-Instruct."""
    last: dict[str, float] = {}
    for _, result in load(folder, "smollm2-135m-instruct-finetune-*"):
        for setting, _, _, ppl, *_ in result["rows"]:
            last[setting] = ppl
    for setting, (bar, aim, official) in _FINE_TUNED.items():
        tag = f"{setting} static, prefix, fine-tuned: perplexity"
        measured = last.get(setting)
        yield Target(f"{tag} (official code: {official})", bar, measured, "", at_most=True)
        yield Target(f"{tag}, aim", aim, measured, "", decides=False, at_most=True)


_CALIBRATED = {"W4A4KV4": (30.0, 36.1), "W4A8KV4": (19.0, 20.58)}


def calibrated(folder: Path) -> Iterator[Target]:
    """Perplexity without fine-tuning, the best of the prefixes, of run_protocol.py."""
    rows = [row for _, r in load(folder, "smollm2-135m-instruct") for row in r["rows"]]
    for setting, (bar, official) in _CALIBRATED.items():
        found = [
            row[2]
            for row in rows
            if row[0].startswith(f"{setting} static") and "no prefix" not in row[0]
        ]
        tag = f"{setting} static, prefix, not fine-tuned: perplexity (official code: {official})"
        yield Target(tag, bar, min(found, default=None), "", at_most=True)


def static_over_dynamic(folder: Path) -> Iterator[Target]:
    """The best perplexity of dynamic scales over that of static ones behind the prefix."""
    ppl: dict[str, list[float]] = {}
    for _, result in load(folder, "smollm2-135m-instruct-dynamic"):
        for row in (dict(zip(result["columns"], r, strict=True)) for r in result["rows"]):
            ppl.setdefault(row["setting"], []).append(row["ppl"])
    best = {setting: min(found) for setting, found in ppl.items()}
    static = best.get("W4A4KV4 static, verified prefix")
    for name, decides in (("no prefix", True), ("verified prefix", False)):
        dynamic = best.get(f"W4A4KV4 dynamic, {name}")
        ratio = dynamic / static if dynamic and static else None
        what = f"W4A4KV4: perplexity of dynamic, {name}, over static, verified prefix"
        yield Target(what, 1.0, ratio, decides=decides)


def accuracy(folder: Path) -> Iterator[Target]:
    yield from calibrated(folder)
    yield from fine_tuning(folder)
    yield from static_over_dynamic(folder)
    yield from solvers(folder)


# ---- fused: issue "fused static quantization, Hadamard, outlier scan, KV4 attention on CUDA" ----


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


_FUSED_WIDTHS = (4096, 8192)  # hidden sizes of the 8B and 70B models


def row_quantization(folder: Path) -> Iterator[Target]:
    """RMSNorm + quantize and the outlier scan: bench_fused_quant.py."""
    results = load(folder, "fused_quant")
    if not results:
        yield Target("fused_quant.json", 1.0, None)
    for gpu, result in results:
        cells = {(c["operation"], c["rows"], c["columns"]): c for c in result["cells"]}
        for columns in _FUSED_WIDTHS:
            tag = f"{gpu}, rmsnorm_quantize x {columns}"
            one, many = (cells.get(("rmsnorm_quantize", m, columns)) for m in (1, 4096))
            us = one["us"]["ours"][0] if one else None
            yield Target(f"{tag}: 1 token", 4.0, us, " us", at_most=True)
            share = many["% of copy"] if many else None
            yield Target(f"{tag}: 4096 tokens, share of copy", 80.0, share, "%")
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
            decides = columns in (8192, 14336, 28672)
            name, tag = "swiglu_hadamard_quantize", f"{gpu}, swiglu_hadamard_quantize x {columns}"
            one, many = (cells.get((m, columns, columns)) for m in (1, 4096))
            us = one["us"][name][0] if one else None
            yield Target(f"{tag}: 1 token", 4.0, us, " us", decides, at_most=True)
            share = many["% of copy"][name] if many else None
            yield Target(f"{tag}: 4096 tokens, share of copy", 80.0, share, "%", decides)
            ratio = many["us"]["torch"][0] / many["us"][name][0] if many else None
            yield Target(f"{tag}: 4096 tokens, over torch", 4.0, ratio, "x", decides)
            ratio = many["us"][f"{name}_dynamic"][0] / many["us"][name][0] if many else None
            yield Target(f"{tag}: static over dynamic", 1.0, ratio, decides=False)


def fused(folder: Path) -> Iterator[Target]:
    yield from row_quantization(folder)
    yield from swiglu_hadamard(folder)
    yield from kv4_attention(folder)


# ---- engine: issue "a generation path that keeps the kernels' gain" ----


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


SECTIONS: dict[str, Callable[[Path], Iterator[Target]]] = {
    "gemm": gemm,
    "accuracy": accuracy,
    "fused": fused,
    "engine": engine,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=sorted(SECTIONS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    targets = list(SECTIONS[args.section](args.results))
    width = max(len(t.what) for t in targets)
    for t in targets:
        measured = "not measured" if t.measured is None else f"{t.measured:.2f}{t.unit}"
        verdict = "met" if t.met else "SHORT" if t.decides else "below (information)"
        wanted = f"{'<= ' if t.at_most else ''}{t.wanted:.2f}{t.unit}"
        print(f"{t.what:<{width}}  wanted {wanted}  measured {measured}  {verdict}")
    deciding = [t for t in targets if t.decides]
    short = sum(not t.met for t in deciding)
    print(f"{len(deciding) - short} of {len(deciding)} met")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
