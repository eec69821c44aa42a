# SPDX-License-Identifier: Apache-2.0
"""Times gemm_w4a8 and gemm_w8a8 on the CPU beside torch's float32 and bfloat16 products.

    python benchmarks/bench_gemm_w4_cpu.py --shapes 1x4096x4096 512x1536x576 --isas avx512 amx

Every row is checked against an exact product before it is timed. Peers and kernels take turns
within a round, so that a disturbance of the machine meets them alike; the minimum and the median
of the rounds are reported. Weights of one layer stay in the cache between calls unless --cold is
given, which rotates through enough copies to exceed it.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prefixquant import _C, ops
from provenance import commit
from torch.nn.functional import linear

# M x N x K: SmolLM2-135M's and Llama-3-8B's linears, prefill and decode.
DEFAULT_SHAPES = (
    *("512x1536x576", "512x576x1536", "512x576x576", "512x4096x4096"),
    *("1x576x576", "1x1536x576", "1x576x1536", "1x4096x4096", "1x14336x4096"),
    *("8x4096x4096", "32x4096x4096"),
)


def copies(tensor: torch.Tensor, cold_bytes: int) -> list[torch.Tensor]:
    count = 1 + cold_bytes // max(1, tensor.numel() * tensor.element_size())
    return [tensor] + [tensor.clone() for _ in range(count - 1)]


def rotating(call: Callable, weights: list[torch.Tensor]) -> Callable:
    state = {"next": 0}

    def run() -> None:
        state["next"] = (state["next"] + 1) % len(weights)
        call(weights[state["next"]])

    return run


def candidates(m: int, n: int, k: int, isas: list[str], cold_bytes: int) -> dict[str, Callable]:
    """What to time, by name; the results of ours are checked on the way."""
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w4 = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    w8 = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    weight_scale, input_scale = torch.rand(n), torch.tensor(0.01)
    runs: dict[str, Callable] = {}
    for dtype in (torch.float32, torch.bfloat16):
        xf, weights = x.to(dtype), copies(w4.to(dtype), cold_bytes)
        runs[f"torch {str(dtype)[6:]}"] = rotating(lambda w, xf=xf: linear(xf, w), weights)
    packed = {
        "gemm_w4a8": (w4, ops.prepack_w4(ops.pack_int4(w4))),
        "gemm_w8a8": (w8, ops.prepack_w8(w8)),
    }
    for name, (weight, prepacked) in packed.items():
        gemm, weights = getattr(ops, name), copies(prepacked, cold_bytes)
        exact = (x.double() @ weight.double().T).to(torch.int32)
        for isa in isas:
            _C.set_isa(isa)
            if not torch.equal(
                gemm(x, prepacked, weight_scale, input_scale, None, torch.int32), exact
            ):
                raise RuntimeError(f"{name} on {isa} is wrong at M={m} N={n} K={k}")

            def call(w: torch.Tensor, gemm: Callable = gemm) -> None:
                gemm(x, w, weight_scale, input_scale, None, torch.bfloat16)

            runs[f"{name} {isa}"] = rotating(call, weights)
    return runs


def select_isa(name: str) -> None:
    """Sets the ISA at the end of a candidate's name; outside the clock, since set_isa asks the CPU
    what it has, which a virtual machine answers in tens of microseconds."""
    isa = name.split()[-1]
    if isa in _C.available_isas():
        _C.set_isa(isa)


def time_round_robin(
    runs: dict[str, Callable], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds a call, one entry a round: in a round each candidate runs for about `seconds`."""
    calls = {}
    for name, run in runs.items():
        select_isa(name)
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            select_isa(name)
            run()  # brings the candidate's own data into the cache
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, metavar="MxNxK")
    parser.add_argument("--isas", nargs="+", default=_C.available_isas()[-2:])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one candidate in one round")
    parser.add_argument("--cold", action="store_true", help="weights come from memory")
    parser.add_argument("--cold-mib", type=int, default=512, help="size of the rotated weights")
    parser.add_argument("--output", type=Path, help="JSON file; default: print only")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shapes:
        m, n, k = (int(size) for size in shape.split("x"))
        runs = candidates(m, n, k, args.isas, args.cold_mib << 20 if args.cold else 0)
        times = time_round_robin(runs, args.rounds, args.seconds)
        base = {stat: stat(times["torch bfloat16"]) for stat in (min, statistics.median)}
        print(f"M={m} N={n} K={k}")
        for name, values in times.items():
            low, median = min(values), statistics.median(values)
            row = {
                "m": m, "n": n, "k": k, "name": name,
                "min_us": low * 1e6, "median_us": median * 1e6,
                "tops": 2e-12 * m * n * k / low,
                "speedup_over_bf16_min": base[min] / low,
                "speedup_over_bf16_median": base[statistics.median] / median,
            }  # fmt: skip
            rows.append(row)
            print(
                f"  {name:18} min {row['min_us']:9.1f} us  median {row['median_us']:9.1f} us"
                f"  {row['tops']:6.3f} TOPS  x bf16 {row['speedup_over_bf16_min']:5.2f} (min)"
                f" {row['speedup_over_bf16_median']:5.2f} (median)"
            )
    if args.output:
        result = {
            "cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__,
            "commit": commit(), "cold": args.cold, "rounds": args.rounds, "rows": rows,
        }  # fmt: skip
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
