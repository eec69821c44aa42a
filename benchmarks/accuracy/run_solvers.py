# SPDX-License-Identifier: Apache-2.0
"""Weight-only quantization by every solver: perplexity, layer errors, time and memory.

Weights are quantized per output channel (or in groups) with the verified prefix in place;
activations and KV cache stay in 16 bits and compensation is off, so that what differs between two
rows is the solver. Text, windows and fake quantization are those of run_experiments.py.

    python benchmarks/accuracy/run_solvers.py --model M.gguf --text TEXT.txt.gz \\
        --name smollm2-135m --bits 3 --device cuda

writes NAME-solvers-w3.json, and with --no-rotations or a group size a file of its own.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.doctor import environment
from prefixquant.report import replace_files, report_json
from prefixquant.roles import LINEARS
from prefixquant.solvers import QuantizedWeight, WeightSolver, layer_error
from prefixquant.solvers.weight import DAMPING, damped
from prefixquant.text import sample_windows
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.workbench import Setting, Simulated, Workbench, add_arguments
from provenance import commit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "accuracy"
SOLVERS = ("rtn", "gptq", "quantease", "quantease-outlier:0.005", "quantease-outlier:0.01")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--solvers", nargs="+", default=SOLVERS, help="name or name:fraction")
    parser.add_argument("--group-size", type=int, default=0)
    parser.add_argument("--compensation", type=float, default=0.0)
    parser.add_argument("--samples", type=int, default=RecipeConfig().search_samples)
    parser.add_argument("--blocks", type=int, help="quantize the first so many only")
    parser.add_argument("--no-rotations", action="store_true")
    parser.add_argument(
        "--prefix", nargs="+", type=int, help="token ids; default: the verified prefix, searched"
    )
    parser.add_argument(
        "--every", type=int, default=1, help="measure on every so many of the windows only"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def file_name(arguments: argparse.Namespace) -> str:
    parts = [arguments.name, "solvers", f"w{arguments.bits}"]
    parts += [f"g{arguments.group_size}"] if arguments.group_size else []
    parts += ["compensated"] if arguments.compensation else []
    parts += ["unrotated"] if arguments.no_rotations else []
    parts += [f"blocks{arguments.blocks}"] if arguments.blocks else []
    return "-".join(parts) + ".json"


class Compared:
    """A solver whose layers are also solved by GPTQ, on the same inputs: what it is worth there.

    ``ratios``: its error over GPTQ's, by the damped Hessian that both minimise on.
    """

    def __init__(self, solver: WeightSolver):
        self.solver = solver
        self.ratios: list[float] = []
        self.seconds = 0.0  # of GPTQ and the comparison

    def __call__(self, weights: list[Tensor], bits: int, hessian: Tensor) -> list[QuantizedWeight]:
        solved = self.solver(weights, bits, hessian)
        if hessian.is_cuda:
            torch.cuda.synchronize()
        start = time.monotonic()
        peer = WeightSolver("gptq", self.solver.group_size)(weights, bits, hessian)
        metric = damped(hessian, DAMPING)
        for weight, ours, theirs in zip(weights, solved, peer, strict=True):
            ratio = layer_error(weight, ours, metric) / layer_error(weight, theirs, metric)
            self.ratios.append(ratio.item())  # waits for the GPU
        self.seconds += time.monotonic() - start
        return solved


@torch.no_grad()
def quantize(
    bench: Workbench, setting: Setting, solver: WeightSolver | Compared, count: int | None
) -> tuple[Simulated, list[dict[str, float]]]:
    """The fake-quantized model, and per block the relative error of each linear."""
    decoder = bench.decoder(setting)
    made = Simulated(decoder, [], [], decoder.prefix(bench.search.prefix))
    length = RecipeConfig().search_seqlen
    embedded = decoder.embed(sample_windows(bench.calibration(), setting.samples, length, 0))
    streams, rope = Streams(embedded, embedded.clone()), decoder.rope(length)
    errors = []
    for index in range(len(decoder)):
        if count is not None and index >= count:
            made.blocks.append(decoder.block(index))
            made.scales.append(None)
            continue
        done = calibrate_block(
            decoder.block(index),
            decoder.shape,
            Scheme.parse(setting.scheme),
            rope,
            made.prefix[index],
            streams,
            solver,
            setting.compensation,
        )
        made.blocks.append(done.simulated)
        made.scales.append(done.scales)
        errors.append(done.weight_errors)
    return made, errors


def float_perplexity(bench: Workbench) -> float:
    """Of the float model behind the verified prefix: the reference of the workbench."""
    decoder, head, streams = bench.reference
    losses = [
        decoder.token_losses(x[None], ids[None], head).double()
        for x, ids in zip(streams, bench.windows, strict=True)
    ]
    return math.exp(torch.cat(losses).mean().item())


def measure(
    bench: Workbench, setting: Setting, solver: WeightSolver, count: int | None = None
) -> dict:
    """One row of the table."""
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    compared = Compared(solver) if solver.name.startswith("quantease") else None
    start = time.monotonic()
    model, errors = quantize(bench, setting, compared or solver, count)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - start - (compared.seconds if compared else 0)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    flat = [error for block in errors for error in block.values()]
    return {
        "setting": setting.label,
        "outlier_fraction": solver.outlier_fraction,
        **bench.measure(model),
        "mean_layer_error": sum(flat) / len(flat),
        "error_over_gptq": compared
        and {
            "mean": sum(compared.ratios) / len(compared.ratios),
            "worst": max(compared.ratios),
        },
        "seconds": seconds,
        "peak_gpu_bytes": peak,
        "layer_errors": {role: [block[role] for block in errors] for role in LINEARS},
    }


def main() -> None:
    arguments = parse_arguments()
    bench = Workbench(arguments)
    bench.windows = bench.windows[:: arguments.every]
    if arguments.prefix:
        bench.search = SimpleNamespace(prefix=tuple(arguments.prefix))
    floor = float_perplexity(bench)
    sys.stdout.write(f"float, verified prefix: {floor:.3f}\n")
    arguments.results.mkdir(parents=True, exist_ok=True)
    rows = []
    for text in arguments.solvers:
        name, _, fraction = text.partition(":")
        solver = WeightSolver(name, arguments.group_size, float(fraction or 0))
        setting = Setting(
            text,
            f"w{arguments.bits}a16kv16",
            rotate=not arguments.no_rotations,
            compensation=arguments.compensation,
            samples=arguments.samples,
        )
        row = measure(bench, setting, solver, arguments.blocks)
        rows.append(row)
        sys.stdout.write(
            f"w{arguments.bits} {text}: PPL {row['ppl']:.3f}  KL {row['kl']:.4f}  layer error "
            f"{row['mean_layer_error']:.5f}  {row['seconds']:.1f} s\n"
        )
        sys.stdout.flush()
        save(arguments, bench, floor, rows)


def save(arguments: argparse.Namespace, bench: Workbench, floor: float, rows: list[dict]) -> None:
    result = {
        "experiment": "weight-only solvers",
        "title": f"Weights of {arguments.bits} bits by solver, activations and KV in 16 bits.",
        "model": arguments.name,
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "compensation": arguments.compensation,
        "blocks": arguments.blocks,
        "rotations": not arguments.no_rotations,
        "samples": [arguments.samples, RecipeConfig().search_seqlen],
        "float_ppl": floor,
        "prefix": list(bench.search.prefix),
        "rows": rows,
        "protocol": {
            **vars(bench.protocol),
            "windows": len(bench.windows),
            "every": arguments.every,
        },
        "environment": environment(),
        "commit": commit(),
    }
    path = arguments.results / file_name(arguments)
    if path.exists():
        result["rows"] = merged(json.loads(path.read_text(encoding="utf-8")), result)
    add_recovered(result["rows"], floor)
    replace_files(arguments.results, {path.name: report_json(result)})


def merged(earlier: dict, result: dict) -> list[dict]:
    """The rows of ``result``, after those of an earlier run of the same protocol that it lacks."""
    varying = ("rows", "float_ppl", "environment", "commit")
    if any(earlier.get(key) != result[key] for key in result if key not in varying):
        return result["rows"]
    names = {row["setting"] for row in result["rows"]}
    return [row for row in earlier["rows"] if row["setting"] not in names] + result["rows"]


def add_recovered(rows: list[dict], floor: float) -> None:
    """Which part of quantease's loss to the float model its outliers give back."""
    plain = next((row["ppl"] for row in rows if row["setting"] == "quantease"), None)
    for row in rows:
        if row["outlier_fraction"] and plain is not None:
            row["recovered"] = (plain - row["ppl"]) / (plain - floor)


if __name__ == "__main__":
    main()
