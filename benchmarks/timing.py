# SPDX-License-Identifier: Apache-2.0
"""How every benchmark is timed: CUDA graph replay, weights out of L2, median and spread.

A launch is a function of an index; the graph calls it with 0, 1, 2, .. so that it can rotate
through copies of its weights whose sum is several times the L2 cache. What is reported is the
median over replays of the time of one replay divided by its launches. Launches follow each other
as they do in a decoder, so launch latency that a kernel cannot hide counts; the time that the host
needs to start a replay does not: until the replay is queued, the GPU waits in a kernel ahead of it.
"""

import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from provenance import ROOT, command, commit

L2_MULTIPLE = 4  # the rotating operands are at least this many times the L2 cache
_LEAD_CYCLES = 200_000  # about 0.1 ms of an SM's clock: longer than the host needs for a launch


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch: median, and the tenth and ninetieth percentile of the replays."""

    us: float
    low_us: float
    high_us: float


def copies_out_of_l2(bytes_each: int) -> int:
    """How many copies of an operand keep a rotation through them out of the L2 cache."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-L2_MULTIPLE * l2 // max(1, bytes_each)))


def time_graph(
    launch: Callable[[int], object],
    copies: int = 1,
    replay_ms: float = 2.0,
    replays: int = 9,
) -> Timing:
    """Times ``launch`` by replays of one graph of about ``replay_ms``, of whole rotations."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(2):
            launch(i % copies)  # module load, library handles, lazy workspaces
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_LEAD_CYCLES)
        start.record(stream)
        for i in range(3):
            launch(i % copies)
        end.record(stream)
        stream.synchronize()
        estimate_ms = start.elapsed_time(end) / 3
    launches = max(1, min(200, round(replay_ms / max(estimate_ms, 1e-3))))
    launches = max(copies if launches > 1 else 1, launches // copies * copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            launch(i % copies)
    samples = []
    with torch.cuda.stream(stream):
        graph.replay()
        for _ in range(replays):
            torch.cuda._sleep(_LEAD_CYCLES)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / launches)
    samples.sort()
    tenth = len(samples) // 10
    return Timing(statistics.median(samples), samples[tenth], samples[-1 - tenth])


_READ_KERNEL = r"""
extern "C" __global__ void read_all(const uint4* data, long long count, unsigned* sink) {
  unsigned sum = 0;
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i + 7 * step < count;
       i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = __ldcs(data + i + j * step);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x12345u) *sink = sum;
}
"""


def read_bandwidth() -> float:
    """Bytes per second of the best pure read of 1 GiB: the ceiling of a memory-bound kernel."""
    data = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = torch.cuda._compile_kernel(_READ_KERNEL, "read_all")
    best = 0.0
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    for ctas_per_sm in (1, 2, 4, 8):
        grid, threads = (sm_count * ctas_per_sm, 1, 1), (512, 1, 1)
        per_step = 16 * 8 * grid[0] * threads[0]
        count = data.numel() // per_step * (per_step // 16)
        timing = time_graph(
            lambda _, grid=grid, threads=threads, count=count: kernel(
                grid=grid, block=threads, args=[data, count, sink]
            )
        )
        best = max(best, count * 16 / timing.us * 1e6)
    return best


def environment() -> dict:
    """What a result depends on: GPU, driver, clocks, versions, commit."""
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    smi = command("nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader")
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "sm_count": properties.multi_processor_count,
        "driver, max SM clock, max memory clock, power limit": smi,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def results_folder(out: Path | None) -> Path:
    """``benchmarks/results/<gpu>``, the GPU's name in small letters and dashes."""
    if out is not None:
        return out
    name = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    return ROOT / "benchmarks" / "results" / name


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def as_row(timing: Timing | None) -> list[float] | None:
    return None if timing is None else [round(v, 3) for v in asdict(timing).values()]
