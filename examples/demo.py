# SPDX-License-Identifier: Apache-2.0
"""The whole of prefixquant on a small real model: quantize, measure, generate.

`make demo` runs it. It quantizes MODEL to W4A4KV4 and W4A8KV4, prints what that costs in accuracy
on text that the quantization never saw, and lets the 4-bit model write a paragraph.
"""

import argparse
import sys
import time
from pathlib import Path

import prefixquant
import torch
from prefixquant import progress as progress_module
from prefixquant import text as texts
from prefixquant.compare import Candidate, compare
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.loading import load_float_model
from prefixquant.quantize import find_prefix
from prefixquant.report import describe_search, plain, replace_files, report_json, table
from prefixquant.workflow import (
    Origin,
    Protocol,
    calibration_tokens,
    quantize_and_save,
)

SCHEMES = ("w4a4kv4", "w4a8kv4")
PROMPT = "The sky is blue because"


def accuracy_table(results: dict[str, dict[str, float]]) -> str:
    rows = [["", "perplexity", "KL", "top-1"]]
    for name, result in results.items():
        rows.append(
            [name, f"{result['ppl']:.2f}", f"{result['kl']:.4f}", f"{100 * result['top1']:.1f}%"]
        )
    return table(rows)


def generate(model, tokenizer, prompt: str, new_tokens: int) -> tuple[str, float]:
    """(continuation, tokens per second). Sampled: greedy decoding of so small a model loops."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    torch.manual_seed(0)
    start = time.monotonic()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.6,
            top_p=0.9,
            repetition_penalty=1.2,
            pad_token_id=tokenizer.eos_token_id,
        )
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new) / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model folder or .gguf file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--text", default="pydoc", help="calibration and evaluation text")
    # A quarter of the usual tokens everywhere, so that the whole takes minutes on two cores.
    parser.add_argument("--nsamples", type=int, default=16, help="windows scanned, of 512 tokens")
    parser.add_argument("--search-samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--search-seqlen", type=int, default=512, help="tokens of such a window")
    parser.add_argument("--windows", type=int, default=8, help="windows measured, of 1024 tokens")
    arguments = parser.parse_args()
    progress = progress_module.for_stream()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with progress.stage("load the model"):
        float_model, tokenizer = load_float_model(arguments.model, torch.float32)
    content = texts.load_text(arguments.text)
    calibration = calibration_tokens(content, tokenizer)
    protocol = Protocol(arguments.text, windows=arguments.windows, seqlen=1024)
    samples = protocol.samples(content, tokenizer)

    recipes = [
        RecipeConfig(
            scheme=Scheme.parse(scheme),
            nsamples=arguments.nsamples,
            search_samples=arguments.search_samples,
            search_seqlen=arguments.search_seqlen,
        )
        for scheme in SCHEMES
    ]
    search = find_prefix(float_model, tokenizer, recipes[0], calibration, progress)
    candidates = {
        "float": Candidate(float_model),
        "float with the prefix": Candidate(float_model, search.prefix),
    }
    reports = {}
    for scheme, recipe in zip(SCHEMES, recipes, strict=True):
        progress.note(f"--- {scheme} ---")
        reports[scheme] = quantize_and_save(
            float_model,
            tokenizer,
            recipe,
            calibration,
            arguments.output / scheme,
            origin=Origin(arguments.model, arguments.text),
            search=search,
            overwrite=True,
            progress=progress,
        )
        candidates[scheme] = Candidate(prefixquant.load(arguments.output / scheme))

    results = compare(candidates, "float with the prefix", samples, progress)
    paragraph, speed = generate(candidates[SCHEMES[0]].model, tokenizer, PROMPT, 96)
    report = {
        "protocol": plain({**vars(protocol), "windows": len(samples)}),
        "prefix_search": search.to_dict(tokenizer),
        "results": results,
        "generation": {"prompt": PROMPT, "text": paragraph, "tokens_per_second": speed},
        "quantization": reports,
    }
    replace_files(arguments.output, {"report.json": report_json(report)})

    out = sys.stdout.write
    out("\n" + describe_search(report["prefix_search"]) + "\n")
    out(f"\nHeld-out text: {len(samples)} windows of {samples.shape[1]} tokens of ")
    out(f"{arguments.text!r}; KL and top-1 are against the float model with the prefix.\n\n")
    out(accuracy_table(results) + "\n\n")
    out(f"{SCHEMES[0]} continues:\n\n{PROMPT}{paragraph}\n\n({speed:.1f} tokens/s)\n\n")
    out(f"checkpoints and report.json: {arguments.output}\n")


if __name__ == "__main__":
    main()
