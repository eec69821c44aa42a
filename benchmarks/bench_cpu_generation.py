# SPDX-License-Identifier: Apache-2.0
"""Tokens per second on the CPU: prefill of 512 tokens and greedy decode, ours beside transformers.

Every model is a transformers model under the same loop: one forward over the prompt, then one
forward a token on the growing cache. Models are measured in turns, round after round, so that a
disturbance of the machine meets all of them; the best round of each is reported, with the spread.

    python benchmarks/bench_cpu_generation.py --model MODEL.gguf --checkpoint CKPT [...]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import prefixquant
import torch
from prefixquant import _C
from prefixquant.doctor import environment
from prefixquant.loading import load_float_model
from prefixquant.workflow import saved_configs
from provenance import ROOT, commit


def measure(model, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """(prefill tokens/s, decode tokens/s)"""
    start = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    decode = time.perf_counter() - start
    return prompt.shape[1] / prefill, new_tokens / decode


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the float model: a folder or .gguf file")
    parser.add_argument("--checkpoint", type=Path, action="append", required=True)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="cpu-generation")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/cpu")
    arguments = parser.parse_args()

    models = {}
    for path in arguments.checkpoint:
        scheme = str(saved_configs(path)[1].scheme).upper()
        models[f"prefixquant {scheme}"] = prefixquant.load(path)
    for name in ("float32", "bfloat16"):
        models[f"transformers {name}"] = load_float_model(arguments.model, getattr(torch, name))[0]
    vocabulary = next(iter(models.values())).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, arguments.prompt_tokens), generator=generator)

    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for index in range(arguments.rounds + 1):
        for name, model in models.items():
            result = measure(model, prompt, arguments.new_tokens)
            if index:  # the first round warms up
                rounds[name].append(result)

    columns = ["model", f"prefill of {arguments.prompt_tokens}, tokens/s", "decode, tokens/s"]
    rows, measured = [], {}
    for name, results in rounds.items():
        prefill, decode = zip(*results, strict=True)
        rows.append([name, round(max(prefill)), round(max(decode), 1)])
        measured[name] = {
            "prefill": {"best": max(prefill), "median": statistics.median(prefill)},
            "decode": {"best": max(decode), "median": statistics.median(decode)},
            "rounds": results,
        }
    result = {
        "table": "cpu-speed",
        "title": f"{Path(arguments.model).stem}, batch 1, {torch.get_num_threads()} threads, "
        f"{_C.current_isa()} kernels",
        "columns": columns,
        "rows": rows,
        "note": f"Best of {arguments.rounds} rounds, models in turns.",
        "measured": measured,
        "environment": environment(),
        "commit": commit(),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{arguments.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for row in [columns, *rows]:
        print("  ".join(str(cell) for cell in row))


if __name__ == "__main__":
    main()
