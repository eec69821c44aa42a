# SPDX-License-Identifier: Apache-2.0
"""Weight-only quantization by every solver: perplexity, layer errors, time and memory.

The text is split as in run_protocol.py: the first 82 percent calibrates, the first 40 windows of
2048 tokens of the rest measure. Weights are quantized per output channel (or in groups) with the
verified prefix in place, activations and KV cache stay in 16 bits, so that what differs between two
rows of the table is the solver. Everything runs on the fake-quantized blocks, on the CPU or a GPU.

    python benchmarks/accuracy/run_solvers.py --model M.gguf --text TEXT.txt.gz --name smollm2-135m
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from prefixquant import progress as progress_module
from prefixquant import text as texts
from prefixquant.block import BlockScales, PrefixKV, block_forward
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.config import COMPENSATION, RecipeConfig, Scheme
from prefixquant.decoder import FloatDecoder
from prefixquant.doctor import environment
from prefixquant.loading import load_float_model
from prefixquant.quantize import find_prefix
from prefixquant.report import replace_files, report_json
from prefixquant.roles import LINEARS, BlockWeights, model_geometry
from prefixquant.rotate import plan_rotations
from prefixquant.solvers import WeightSolver
from prefixquant.workflow import Protocol, calibration_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from provenance import ROOT, commit

SOLVERS = ("rtn", "gptq", "quantease", "quantease-outlier:0.005", "quantease-outlier:0.01")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model folder or .gguf file")
    parser.add_argument("--text", required=True, help="a .txt or .jsonl file, also as .gz")
    parser.add_argument("--name", required=True, help="name of the model in the result file")
    parser.add_argument("--bits", nargs="+", type=int, default=(4, 3, 2))
    parser.add_argument("--solvers", nargs="+", default=SOLVERS, help="name or name:fraction")
    parser.add_argument("--group-size", type=int, default=0)
    parser.add_argument("--compensation", type=float, default=COMPENSATION)
    parser.add_argument("--no-rotations", action="store_true")
    parser.add_argument("--search-samples", type=int, default=RecipeConfig().search_samples)
    parser.add_argument("--search-seqlen", type=int, default=RecipeConfig().search_seqlen)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--prefix", nargs="+", type=int, help="token ids; default: searched")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--suffix", default="solvers", help="the result is NAME-SUFFIX.json")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy"
    )
    return parser.parse_args()


def solver_of(text: str, arguments: argparse.Namespace) -> WeightSolver:
    """``"quantease-outlier:0.01"`` -> the solver with that fraction of outliers."""
    name, _, fraction = text.partition(":")
    return WeightSolver(name, arguments.group_size, float(fraction or 0))


class Model:
    """A float model cut into rotated blocks, with its prefix."""

    def __init__(self, float_model, prefix: tuple[int, ...], rotate: bool, device: torch.device):
        plan = plan_rotations(model_geometry(float_model.config), rotate=rotate)
        self.decoder = FloatDecoder(float_model, plan, device=device)
        self.prefix: list[PrefixKV] = self.decoder.prefix(prefix)
        self.head = self.decoder.head_weight()

    def perplexity(self, blocks: list[BlockWeights] | None, samples: torch.Tensor) -> float:
        """Of the samples [n, T], all of them block by block; None is the float model."""
        x = self.decoder.embed(samples)
        rope = self.decoder.rope(samples.shape[1])
        for index in range(len(self.decoder)):
            block = self.decoder.block(index) if blocks is None else blocks[index]
            for part in x.split(4):
                shape, prefix = self.decoder.shape, self.prefix[index]
                part.copy_(block_forward(block, shape, part, rope, prefix, BlockScales()))
        losses = [
            self.decoder.token_losses(part, ids, self.head).double()
            for part, ids in zip(x.split(1), samples.split(1), strict=True)
        ]
        return math.exp(torch.cat(losses).mean().item())

    def quantize(
        self, bits: int, solver: WeightSolver, compensation: float, samples: torch.Tensor
    ) -> tuple[list[BlockWeights], list[dict[str, float]]]:
        """The fake-quantized blocks, and per block the relative error of each linear."""
        x = self.decoder.embed(samples)
        streams, rope = Streams(x, x.clone()), self.decoder.rope(samples.shape[1])
        blocks, errors = [], []
        for index in range(len(self.decoder)):
            done = calibrate_block(
                self.decoder.block(index),
                self.decoder.shape,
                Scheme(bits, 16, 16),
                rope,
                self.prefix[index],
                streams,
                solver,
                compensation,
            )
            blocks.append(done.simulated)
            errors.append(done.weight_errors)
        return blocks, errors


def measure(
    model: Model, bits: int, solver: WeightSolver, compensation: float, windows, samples
) -> dict:
    """One row of the table."""
    cuda = model.decoder.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    blocks, errors = model.quantize(bits, solver, compensation, windows)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - start
    flat = [error for block in errors for error in block.values()]
    return {
        "bits": bits,
        "solver": solver.name,
        "outlier_fraction": solver.outlier_fraction,
        "ppl": model.perplexity(blocks, samples),
        "mean_layer_error": sum(flat) / len(flat),
        "layer_errors": {role: [block[role] for block in errors] for role in LINEARS},
        "seconds": seconds,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def recovered(rows: list[dict], floor: float) -> None:
    """Adds to rows with outliers which part of quantease's loss to the float model they regain."""
    for row in rows:
        plain = [r for r in rows if r["bits"] == row["bits"] and r["solver"] == "quantease"]
        if row["outlier_fraction"] and plain:
            lost = plain[0]["ppl"] - floor
            row["recovered"] = (plain[0]["ppl"] - row["ppl"]) / lost


def main() -> None:
    arguments = parse_arguments()
    torch.set_grad_enabled(False)
    progress = progress_module.for_stream()
    float_model, tokenizer = load_float_model(arguments.model, torch.float32)
    float_model.to(arguments.device)
    content = texts.load_text(arguments.text)
    protocol = Protocol(
        Path(arguments.text).name, windows=arguments.windows, seqlen=arguments.seqlen
    )
    samples = protocol.samples(content, tokenizer)
    calibration = calibration_tokens(content, tokenizer)
    recipe = RecipeConfig(
        search_samples=arguments.search_samples, search_seqlen=arguments.search_seqlen
    )
    windows = texts.sample_windows(
        calibration, recipe.search_samples, recipe.search_seqlen, recipe.seed
    )
    prefix = tuple(arguments.prefix or ())
    if arguments.prefix is None:
        prefix = find_prefix(float_model, tokenizer, recipe, calibration, progress).prefix
    model = Model(float_model, prefix, not arguments.no_rotations, torch.device(arguments.device))
    floor = model.perplexity(None, samples)
    sys.stdout.write(f"float, prefix {list(prefix)}: {floor:.3f}\n")
    rows = []
    for bits in arguments.bits:
        for text in arguments.solvers:
            solver = solver_of(text, arguments)
            row = measure(model, bits, solver, arguments.compensation, windows, samples)
            rows.append(row)
            sys.stdout.write(
                f"w{bits} {text}: PPL {row['ppl']:.3f}  layer error {row['mean_layer_error']:.5f}"
                f"  {row['seconds']:.1f} s\n"
            )
            sys.stdout.flush()
    recovered(rows, floor)
    result = {
        "table": "solvers",
        "title": f"{arguments.name}, weight-only, {len(samples)} windows of {samples.shape[1]}",
        "float_ppl": floor,
        "prefix": list(prefix),
        "rotations": not arguments.no_rotations,
        "group_size": arguments.group_size,
        "compensation": arguments.compensation,
        "search_tokens": [recipe.search_samples, recipe.search_seqlen],
        "rows": rows,
        "protocol": {**vars(protocol), "windows": len(samples)},
        "environment": environment(),
        "commit": commit(),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = f"{arguments.name}-{arguments.suffix}.json"
    replace_files(arguments.results, {name: report_json(result)})


if __name__ == "__main__":
    main()
