# SPDX-License-Identifier: Apache-2.0
"""Targets of the low-bit linears, at every batch size."""

from collections.abc import Iterator
from pathlib import Path

from target_sections.target import Target, geometric_mean, load

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
