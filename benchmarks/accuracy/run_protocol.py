# SPDX-License-Identifier: Apache-2.0
"""The accuracy protocol: one text, one model, several settings, one JSON file for the README.

The text is tokenized whole and split 82/18. The first part calibrates (64 x 512 tokens for the
prefix and the maxima, 8 x 1024 for the grid searches), the last part measures: mean NLL over the
first 40 windows of 2048 tokens, exponentiated; the prefix is extra and not counted. All settings
are measured in this process, by the same code, on the same windows. KL divergence and top-1
agreement are against the float model with the verified prefix.

    python benchmarks/accuracy/run_protocol.py --model M.gguf --text TEXT.txt.gz --name smollm2-135m
"""

import argparse
import dataclasses
import gc
import sys
from pathlib import Path

import prefixquant
import torch
from prefixquant import progress as progress_module
from prefixquant import text as texts
from prefixquant.compare import Candidate, compare
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.doctor import environment
from prefixquant.loading import load_float_model
from prefixquant.prefix import paper_prefix
from prefixquant.quantize import find_prefix
from prefixquant.report import replace_files, report_json
from prefixquant.simulate import SimulatedModel
from prefixquant.workflow import (
    Origin,
    Protocol,
    calibration_tokens,
    quantize_and_save,
    saved_configs,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from provenance import ROOT, commit

SETTINGS = (
    "w4a4kv4:verified",
    "w4a8kv4:verified",
    "w4a4kv4:paper",
    "w4a4kv4:none",
    "w4a4kv4:verified:plain",
    "w4a8kv4:verified:plain",
    "w4a4kv4:none:plain",
)
# Static quantization as in PrefixQuant without fine-tuning: rounded weights, nothing compensated,
# balanced or centred, no R5, R1 in place of R6.
PLAIN = {
    "solver": "rtn",
    "compensation": 0.0,
    "r5_block_size": 1,
    "r6": False,
    "balance": False,
    "centre": False,
}
REFERENCE = "float, verified prefix"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model folder or .gguf file")
    parser.add_argument("--text", required=True, help="a .txt or .jsonl file, also as .gz")
    parser.add_argument("--name", required=True, help="name of the model in the result file")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=SETTINGS,
        help="scheme:prefix, the prefix as in quantize; scheme:prefix:plain for round-to-nearest "
        "weights that make up for nothing",
    )
    parser.add_argument(
        "--float-prefix",
        nargs="+",
        type=int,
        default=(),
        help="token ids of one more prefix under which the float model is measured",
    )
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cpu", help="of the float models and quantization")
    parser.add_argument("--kernels", default="cpu", help="the device of the packed kernels")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "protocol")
    parser.add_argument(
        "--reuse", action="store_true", help="measure checkpoints that are in --work already"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy"
    )
    return parser.parse_args()


def describe(ids: tuple[int, ...], tokenizer) -> str:
    return " ".join(repr(tokenizer.decode([i])) for i in ids) or "none"


def read_setting(setting: str) -> RecipeConfig:
    scheme, mode, *plain = setting.split(":")
    if plain not in ([], ["plain"]):
        raise SystemExit(
            f"--settings: expected scheme:prefix or scheme:prefix:plain, got {setting}"
        )
    return RecipeConfig(scheme=Scheme.parse(scheme), prefix=mode, **(PLAIN if plain else {}))


def setting_label(recipe: RecipeConfig) -> str:
    prefix = "no" if recipe.prefix == "none" else recipe.prefix
    label = f"{str(recipe.scheme).upper()} static, {prefix} prefix"
    return label if recipe.compensation else f"{label}, plain RTN"


def main() -> None:
    arguments = parse_arguments()
    progress = progress_module.for_stream()
    float_model, tokenizer = load_float_model(arguments.model, torch.float32)
    float_model.to(arguments.device)
    content = texts.load_text(arguments.text)
    protocol = Protocol(
        Path(arguments.text).name, windows=arguments.windows, seqlen=arguments.seqlen
    )
    samples = protocol.samples(content, tokenizer)
    calibration = calibration_tokens(content, tokenizer)

    search = find_prefix(
        float_model, tokenizer, RecipeConfig(prefix="verified"), calibration, progress
    )
    by_paper = dataclasses.replace(
        search, mode="paper", prefix=paper_prefix(search.steps[0], search.bos)
    )
    searches = {"verified": search, "paper": by_paper}
    # The float model under every prefix of interest; the same prefix is measured once.
    prefixes: dict[str, tuple[int, ...]] = {"float": ()}
    for name, ids in (
        (REFERENCE, search.prefix),
        ("float, BOS", (search.bos,)),
        ("float, paper's prefix", by_paper.prefix),
        ("float, given prefix", tuple(arguments.float_prefix)),
    ):
        if ids not in prefixes.values():
            prefixes[name] = ids
    candidates = {name: Candidate(float_model, ids) for name, ids in prefixes.items()}

    reports = {}
    for setting in arguments.settings:
        recipe = read_setting(setting)
        folder = arguments.work / arguments.name / setting.replace(":", "-")
        if not (arguments.reuse and folder.exists()):
            progress.note(f"--- {setting} ---")
            reports[setting] = quantize_and_save(
                float_model,
                tokenizer,
                recipe,
                calibration,
                folder,
                origin=Origin(arguments.name, protocol.text, command=("run_protocol.py",)),
                search=searches.get(recipe.prefix),
                overwrite=True,
                progress=progress,
            )
        label = setting_label(recipe)
        prefixes[label] = saved_configs(folder)[1].prefix_token_ids
        candidates[label] = Candidate(prefixquant.load(folder, device=arguments.kernels))
        # What the kernels compute, by float products on the same integers.
        if setting.endswith(":verified"):
            prefixes[f"{label}, simulated"] = prefixes[label]
            simulated = SimulatedModel(folder, device=arguments.device)
            candidates[f"{label}, simulated"] = Candidate(simulated)
        gc.collect()

    measured = compare(candidates, REFERENCE, samples, progress)
    rows = [
        [
            name,
            describe(prefixes[name], tokenizer),
            round(measured[name]["ppl"], 2),
            round(measured[name]["kl"], 4),
            round(100 * measured[name]["top1"], 1),
        ]
        for name in measured
    ]
    result = {
        "table": "accuracy",
        "title": f"{arguments.name}, text {protocol.text}, {len(samples)} windows of "
        f"{samples.shape[1]} tokens",
        "columns": ["setting", "prefix", "PPL", "KL", "top-1 %"],
        "rows": rows,
        "note": f"KL divergence and top-1 agreement are against: {REFERENCE}.",
        "protocol": {**vars(protocol), "windows": len(samples)},
        "measured": measured,
        "prefix_search": search.to_dict(tokenizer),
        "recipes": reports,
        "environment": environment(),
        "commit": commit(),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    replace_files(arguments.results, {f"{arguments.name}.json": report_json(result)})
    for row in rows:
        sys.stdout.write("  ".join(str(cell) for cell in row) + "\n")


if __name__ == "__main__":
    main()
