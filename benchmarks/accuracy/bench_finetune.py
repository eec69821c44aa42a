# SPDX-License-Identifier: Apache-2.0
"""Time and memory of every step of quantization for one block of a large model.

Random weights and tokens: nothing here depends on their values. A block's times the number of
blocks is the estimate for the model, without its embedding and head; with fine-tuning as in the
paper, 512 samples of 1024 tokens, 20 epochs. One block is on the device at a time.

    python benchmarks/accuracy/bench_finetune.py --shapes llama-3-8b llama-3-70b --device cuda
"""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prefixquant.block_pipeline import BlockPipeline, Samples
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.decoder import FloatDecoder
from prefixquant.doctor import environment
from prefixquant.finetune import EndToEnd, Learned, LearnedBlock, Teacher
from prefixquant.report import replace_files, report_json
from prefixquant.roles import model_geometry
from prefixquant.rotate import plan_rotations

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from provenance import ROOT, commit

SHAPES = {  # hidden, intermediate, heads, KV heads, blocks
    "tiny": (64, 96, 4, 2, 2),
    "llama-3-8b": (4096, 14336, 32, 8, 32),
    "llama-3-70b": (8192, 28672, 64, 8, 80),
}
PAPER_SAMPLES, PAPER_EPOCHS = 512, 20


def random_model(shape: tuple[int, ...], device: torch.device):
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, heads, kv_heads, _ = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        vocab_size=1024,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.eval().requires_grad_(False)


class Clock:
    """Seconds and peak memory of steps, by name."""

    def __init__(self, shape: str, device: torch.device):
        self.shape, self.device = shape, device
        self.steps: dict[str, dict[str, float]] = {}

    def measure(self, name: str, step: Callable, divisor: float = 1.0):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps[name] = {"seconds": (time.perf_counter() - start) / divisor}
        if self.device.type == "cuda":
            self.steps[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
        memory = self.steps[name].get("peak_bytes", 0) / 2**30
        seconds = self.steps[name]["seconds"]
        print(f"{self.shape}  {name}: {seconds:.3f} s, {memory:.1f} GiB", flush=True)
        return result


@torch.no_grad()
def measure(name: str, arguments: argparse.Namespace) -> dict:
    """The steps of one block of the shape."""
    device = torch.device(arguments.device)
    clock = Clock(name, device)
    model = random_model(SHAPES[name], device)
    tuning = FinetuneConfig(
        epochs=arguments.epochs,
        e2e_epochs=arguments.epochs,
        samples=arguments.samples,
        seqlen=arguments.seqlen,
        validation_samples=max(1, arguments.samples // 8),
        patience=arguments.epochs,
        e2e_weights=False,
        checkpointing=True,
    )
    recipe = RecipeConfig(
        scheme=Scheme.parse("w4a4kv4"),
        search_samples=arguments.search_samples,
        search_seqlen=arguments.seqlen,
        finetune=tuning,
    )
    plan = plan_rotations(model_geometry(model.config), **recipe.rotation_options)
    decoder = FloatDecoder(model, plan, device=device)
    prefix = decoder.prefix((1,))
    clock.measure("rotate, first", lambda: decoder.block(0))  # makes the matrices
    block = clock.measure("rotate", lambda: decoder.block(0))
    text = torch.randint(0, 1024, (4 * arguments.samples * arguments.seqlen,))
    samples = Samples.draw(recipe, text)
    start = decoder.embed(samples.search)
    streams, rope = Streams(start, start.clone()), decoder.rope(arguments.seqlen)
    arrangement = decoder.shape, recipe.scheme, rope, prefix[0], streams
    calibrated = clock.measure("calibrate", lambda: calibrate_block(block, *arrangement))
    pipeline = BlockPipeline(decoder, recipe, (1,), samples)
    tuner = pipeline.tuner
    clock.measure(
        "float forward, a sample",
        lambda: tuner.advance_float(block, prefix[0]),
        arguments.samples,
    )
    clock.measure("Block-AP, first", lambda: tuner.tune(0, block, calibrated, prefix[0]))
    steps = arguments.epochs * max(1, tuner.trained // tuning.batch)
    tuned = clock.measure(
        f"Block-AP, a step of {tuning.batch} samples",
        lambda: tuner.tune(1, block, calibrated, prefix[0])[0],
        steps,
    )
    clock.measure(
        "quantized forward, a sample",
        lambda: tuner.advance_quantized(tuned, prefix[0]),
        arguments.samples,
    )
    tuner.release()
    learned = LearnedBlock(tuned, None, prefix[0], Learned(weights=False))
    teacher = Teacher.of(tuner.floating, decoder, (1,))
    training = EndToEnd(decoder, [learned], samples.training, teacher, tuning, 0)
    training.run()
    clock.measure(f"E2E-QP, a step of {tuning.batch} samples", training.run, steps)
    # End to end, the other blocks' integers are on the device too.
    blocks, block_bytes = SHAPES[name][-1], sum(w.numel() for w in block.weights.values())
    peak = clock.steps[f"E2E-QP, a step of {tuning.batch} samples"].get("peak_bytes", 0)
    fits = peak + (blocks - 1) * block_bytes <= device_bytes(device)
    model = estimate(name, clock.steps, end_to_end=fits)
    return {"shape": name, "steps": clock.steps, "model": model, "end_to_end_fits": fits}


def device_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory


def estimate(
    name: str, steps: dict[str, dict[str, float]], *, end_to_end: bool
) -> dict[str, float]:
    """Hours for all blocks of the model, from those of one."""
    blocks = SHAPES[name][-1]
    seconds = {key: value["seconds"] for key, value in steps.items()}
    by_sample = seconds["float forward, a sample"] + seconds["quantized forward, a sample"]
    batches = PAPER_SAMPLES // FinetuneConfig().batch
    training = next(s for key, s in seconds.items() if key.startswith("Block-AP, a step"))
    last = next(s for key, s in seconds.items() if key.startswith("E2E-QP, a step"))
    hours = blocks / 3600
    model = {
        "rotate and calibrate": (seconds["rotate"] + seconds["calibrate"]) * hours,
        f"Block-AP, {PAPER_EPOCHS} epochs of {PAPER_SAMPLES} samples": hours
        * (training * batches * PAPER_EPOCHS + by_sample * PAPER_SAMPLES),
    }
    if end_to_end:
        model[f"E2E-QP, an epoch of {PAPER_SAMPLES} samples"] = last * batches * hours
    return model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3-8b"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--search-samples", type=int, default=RecipeConfig().search_samples)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    shapes = []
    for name in arguments.shapes:
        shapes.append(measure(name, arguments))
        gc.collect()  # cycles keep graphs, and these the memory of the shape before
        torch.cuda.empty_cache()
        for step, hours in shapes[-1]["model"].items():
            print(f"{name}  all blocks, {step}: {hours:.2f} h", flush=True)
        rows = [
            [s["shape"], step, cost["seconds"], cost.get("peak_bytes", 0) / 2**30]
            for s in shapes
            for step, cost in s["steps"].items()
        ]
        rows += [
            [s["shape"], f"all blocks, {step}", hours * 3600, None]
            for s in shapes
            for step, hours in s["model"].items()
        ]
        result = {
            "table": "finetune-block",
            "title": f"One block, {arguments.seqlen} tokens a sample",
            "columns": ["shape", "step", "seconds", "peak GiB"],
            "rows": rows,
            "shapes": shapes,
            "settings": {k: v for k, v in vars(arguments).items() if k != "results"},
            "finetune": dataclasses.asdict(FinetuneConfig()),
            "environment": environment(),
            "commit": commit(),
        }
        arguments.results.mkdir(parents=True, exist_ok=True)
        replace_files(arguments.results, {"finetune-block.json": report_json(result)})


if __name__ == "__main__":
    main()
