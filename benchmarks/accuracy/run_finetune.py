# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning, phase by phase: perplexity after calibration, Block-AP and training end to end.

The text is split as in run_protocol.py: the first 82 percent calibrates and trains (128 x 1024
tokens, 8 of the windows held out for validation), the first 40 windows of 2048 tokens of the rest
measure. Everything is fake quantization on one device; scales, norms and prefix are measured as a
checkpoint stores them.

    python benchmarks/accuracy/run_finetune.py --model M.gguf --text TEXT.txt.gz \
        --name smollm2-135m-instruct --device cuda
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from prefixquant import progress as progress_module
from prefixquant.block import PrefixKV
from prefixquant.block_pipeline import BlockPipeline, FinishedBlock, Samples
from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.decoder import FloatDecoder
from prefixquant.decoder_setup import make_decoder
from prefixquant.doctor import environment
from prefixquant.prefix import paper_prefix
from prefixquant.report import peak_memory_bytes, replace_files, report_json
from prefixquant.roles import BlockWeights, model_geometry
from prefixquant.rotate import plan_rotations

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.workbench import Simulated, Workbench, add_arguments
from provenance import ROOT, commit

PHASES = ("calibrated", "block-ap", "e2e-scales", "e2e")
# scheme:prefix:epochs of Block-AP:epochs end to end
SETTINGS = ("w4a4kv4:paper:10:10", "w4a8kv4:paper:5:10")


@dataclasses.dataclass(frozen=True)
class Run:
    """One scheme with one prefix, and how long it is trained."""

    scheme: str
    prefix: str
    epochs: int
    e2e_epochs: int

    @classmethod
    def parse(cls, text: str) -> "Run":
        scheme, prefix, epochs, e2e_epochs = text.split(":")
        return cls(scheme, prefix, int(epochs), int(e2e_epochs))

    def recipe(self, arguments: argparse.Namespace) -> RecipeConfig:
        tuning = FinetuneConfig(
            epochs=self.epochs,
            e2e_epochs=self.e2e_epochs,
            samples=arguments.train_samples,
            seqlen=arguments.train_seqlen,
            batch=arguments.batch,
            validation_samples=max(1, arguments.train_samples // 16),
            weight_rate=arguments.weight_rate,
            scale_rate=arguments.scale_rate,
            e2e_weight_rate=arguments.e2e_weight_rate,
            e2e_scale_rate=arguments.e2e_scale_rate,
            e2e_norms=arguments.e2e_norms,
            e2e_prefix=arguments.e2e_prefix,
            e2e_prefix_rate=arguments.e2e_prefix_rate,
            e2e_mix=arguments.e2e_mix,
            e2e_generated=arguments.e2e_generated,
            e2e_average=arguments.e2e_average,
            patience=arguments.patience,
        )
        return RecipeConfig(
            scheme=Scheme.parse(self.scheme),
            prefix=self.prefix,
            solver=arguments.solver,
            search_samples=arguments.search_samples,
            search_seqlen=RecipeConfig().search_seqlen,
            balance=arguments.balance,
            centre=arguments.centre,
            r5_block_size=0 if arguments.r5 else 1,
            r6=arguments.r6,
            seed=arguments.seed,
            finetune=tuning,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    defaults = FinetuneConfig()
    parser.add_argument(
        "--settings",
        nargs="+",
        type=Run.parse,
        default=[Run.parse(s) for s in SETTINGS],
        help="scheme:prefix:epochs:e2e-epochs",
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--train-samples", type=int, default=defaults.samples)
    parser.add_argument("--train-seqlen", type=int, default=defaults.seqlen)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--search-samples", type=int, default=RecipeConfig().search_samples)
    parser.add_argument("--solver", default=RecipeConfig().solver)
    for name in ("balance", "centre", "r6"):
        default = getattr(RecipeConfig(), name)
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default)
    parser.add_argument("--r5", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=int, default=defaults.patience)
    rates = ("weight_rate", "scale_rate", "e2e_weight_rate", "e2e_scale_rate", "e2e_prefix_rate")
    for name in rates:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=float, default=getattr(defaults, name))
    parser.add_argument("--e2e-norms", action="store_true", default=defaults.e2e_norms)
    parser.add_argument("--e2e-prefix", action="store_true", default=defaults.e2e_prefix)
    parser.add_argument("--e2e-mix", action="store_true", default=defaults.e2e_mix)
    parser.add_argument("--e2e-generated", type=int, default=defaults.e2e_generated)
    parser.add_argument("--e2e-average", type=float, default=defaults.e2e_average)
    parser.add_argument("--suffix", default="finetune", help="the result is NAME-SUFFIX.json")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy"
    )
    return parser.parse_args()


def as_stored(decoder: FloatDecoder, finished: list[FinishedBlock]) -> Simulated:
    """The blocks with what a checkpoint keeps in 16 bits rounded to it."""

    def stored(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.half().float()

    def block(weights: BlockWeights) -> BlockWeights:
        norms = ("input_norm", "post_norm", "q_norm", "k_norm")
        rounded = {name: stored(getattr(weights, name)) for name in norms}
        return dataclasses.replace(weights, **rounded)

    return Simulated(
        decoder,
        [block(f.block.simulated) for f in finished],
        [f.block.scales for f in finished],
        [PrefixKV(stored(f.prefix.key), stored(f.prefix.value)) for f in finished],
    )


def measured(bench: Workbench, model: Simulated) -> dict:
    """The model's figures, and its loss on every window: for comparisons window by window."""
    windows = bench.by_window(model)
    nll = [round(value, 6) for value in windows[:, 0].tolist()]
    return {**bench.over_windows(windows), "window_nll": nll}


class Measurement:
    """Runs the phases of one setting and measures after each."""

    def __init__(self, bench: Workbench, run: Run, arguments: argparse.Namespace):
        self.bench, self.run, self.phases = bench, run, arguments.phases
        self.recipe = run.recipe(arguments)
        self.ids = self._prefix_ids()
        self.decoder = self._decoder()

    def _prefix_ids(self) -> tuple[int, ...]:
        search = self.bench.search
        if self.run.prefix == "paper":
            return paper_prefix(search.steps[0], search.bos)
        return {"verified": search.prefix, "bos": (search.bos,), "none": ()}[self.run.prefix]

    def _decoder(self) -> FloatDecoder:
        model, recipe = self.bench.model, self.recipe
        plan = plan_rotations(model_geometry(model.config), **recipe.rotation_options)
        samples = Samples.draw(recipe, self.bench.calibration()).search
        return make_decoder(model, plan, samples, self.ids, recipe, self.bench.device)

    def _pipeline(self, recipe: RecipeConfig) -> BlockPipeline:
        samples = Samples.draw(recipe, self.bench.calibration())
        return BlockPipeline(self.decoder, recipe, self.ids, samples)

    def _row(self, phase: str, seconds: float, finished: list[FinishedBlock]) -> dict:
        return {
            "setting": self.run.scheme,
            "prefix": self.bench.text_of(self.ids),
            "phase": phase,
            **measured(self.bench, as_stored(self.decoder, finished)),
            "seconds": round(seconds, 1),
            "peak_bytes": peak_memory_bytes(),
        }

    @torch.no_grad()
    def rows(self, advance: Callable[[int], None]) -> Iterator[dict]:
        tuning = self.recipe.finetune
        blocks = range(len(self.decoder))
        if "calibrated" in self.phases:
            start = time.monotonic()
            plain = dataclasses.replace(self.recipe, finetune=FinetuneConfig())
            pipeline = self._pipeline(plain)
            finished = [pipeline.run(index, lambda steps: None) for index in blocks]
            yield self._row("calibrated", time.monotonic() - start, finished)
            del pipeline
        start = time.monotonic()
        pipeline = self._pipeline(self.recipe)
        finished = [pipeline.run(index, advance) for index in blocks]
        if tuning.e2e_generated:
            pipeline.generate_samples(lambda samples: None)
        seconds = time.monotonic() - start
        if tuning.epochs and "block-ap" in self.phases:
            row = self._row("Block-AP", seconds, finished)
            yield row | {"blocks": [f.report for f in finished]}
        for phase, label, weights in (
            ("e2e-scales", "then scales end to end", False),
            ("e2e", "then weights and scales end to end", True),
        ):
            if not tuning.e2e_epochs or phase not in self.phases:
                continue
            config = dataclasses.replace(tuning, e2e_weights=weights)
            trained, report = pipeline.end_to_end(advance, config)
            row = self._row(label, seconds + report["seconds"], trained)
            yield row | {"end_to_end": report}

    @property
    def steps(self) -> int:
        tuning = self.recipe.finetune
        ends = sum(phase in self.phases for phase in ("e2e-scales", "e2e"))
        return len(self.decoder) * (1 + tuning.epochs) + ends * tuning.e2e_epochs


class Results:
    """The result file, written anew with every row: an interrupted run keeps what it measured."""

    def __init__(self, arguments: argparse.Namespace, bench: Workbench):
        self.arguments, self.bench = arguments, bench
        self.rows: list[list] = []
        self.runs: list[dict] = []

    def add(self, row: dict) -> None:
        measured = (row["ppl"], 2), (row["kl"], 4), (100 * row["top1"], 1), (row["seconds"], 1)
        named = [row["setting"].upper(), row["prefix"], row["phase"]]
        self.rows.append(named + [round(value, digits) for value, digits in measured])
        self.runs.append(row)
        sys.stdout.write("  ".join(str(cell) for cell in self.rows[-1]) + "\n")
        sys.stdout.flush()
        self._write()

    def _write(self) -> None:
        arguments, bench = self.arguments, self.bench
        result = {
            "table": "finetune",
            "title": f"{arguments.name}, text {bench.protocol.text}, {len(bench.windows)} windows "
            f"of {bench.windows.shape[1]} tokens, trained on {arguments.train_samples} x "
            f"{arguments.train_seqlen}",
            "columns": ["setting", "prefix", "phase", "PPL", "KL", "top-1 %", "seconds"],
            "rows": self.rows,
            "note": "KL divergence and top-1 agreement are against the float model behind the "
            "verified prefix; seconds are those of calibration and training, from the start.",
            "protocol": {**vars(bench.protocol), "windows": len(bench.windows)},
            "runs": self.runs,
            "environment": environment(),
            "commit": commit(),
        }
        arguments.results.mkdir(parents=True, exist_ok=True)
        name = f"{arguments.name}-{arguments.suffix}.json"
        replace_files(arguments.results, {name: report_json(result)})


def main() -> None:
    arguments = parse_arguments()
    bench = Workbench(arguments)
    progress = progress_module.for_stream()
    results = Results(arguments, bench)
    measurements = [Measurement(bench, run, arguments) for run in arguments.settings]
    for prefix in dict.fromkeys([bench.search.prefix, *(m.ids for m in measurements)]):
        row = {"setting": "float", "prefix": bench.text_of(prefix), "phase": "", "seconds": 0.0}
        results.add(row | measured(bench, bench.float_model(prefix)))
    for measurement in measurements:
        title = f"{measurement.run.scheme}, {measurement.run.prefix} prefix"
        with progress.stage(title, total=measurement.steps) as advance:
            for row in measurement.rows(advance):
                recipe = measurement.recipe
                told = dataclasses.asdict(recipe) | {"centred_keys": recipe.centred_keys}
                results.add(row | {"recipe": told})


if __name__ == "__main__":
    main()
