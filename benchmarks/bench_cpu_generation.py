# SPDX-License-Identifier: Apache-2.0
"""Tokens per second on the CPU: prefill of 512 tokens and greedy decode, ours beside its peers.

The runtime generates by itself. Transformers models run under one loop: a forward over the prompt,
then a forward a token on the growing cache; the checkpoint does so too, as `prefixquant.load` gives
it. llama.cpp (llama-cpp-python) is measured where it is installed and the model is a .gguf file.
Models are measured in turns, round after round, so that a disturbance of the machine meets all of
them; the best round of each is reported, with the spread.

    python benchmarks/bench_cpu_generation.py --model MODEL.gguf --checkpoint CKPT [...]
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import prefixquant
import torch
from prefixquant import _C
from prefixquant.bench import runtime_generate
from prefixquant.doctor import environment
from prefixquant.loading import load_float_model
from prefixquant.runtime import Runtime
from prefixquant.workflow import saved_configs
from provenance import ROOT, commit


def measure_runtime(runtime: Runtime):
    """A function (prompt, new_tokens) -> (prefill tokens/s, decode tokens/s)."""
    generate = runtime_generate(runtime)

    def measure(prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        prefill, decode = generate(prompt, new_tokens + 1)
        return prompt.shape[1] / prefill, new_tokens / decode

    return measure


def measure_llama_cpp(path: str, threads: int):
    """The same of llama.cpp, or None where it is not installed or cannot read the file."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    if not path.endswith(".gguf"):
        return None
    model = Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def measure(prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(prompt[0].tolist())
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(new_tokens):
            model.eval([model.sample(temp=0.0)])
        return prompt.shape[1] / prefill, new_tokens / (time.perf_counter() - start)

    return measure


def measure_transformers(model, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
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

    models, vocabulary = {}, 0
    for path in arguments.checkpoint:
        scheme = str(saved_configs(path)[1].scheme).upper()
        for head_bits in (8, 16):
            runtime = prefixquant.Runtime.from_checkpoint(path, head_bits=head_bits)
            name = f"prefixquant {scheme}, runtime, {head_bits}-bit lm_head"
            models[name] = measure_runtime(runtime)
            vocabulary = runtime.weights.geometry.vocab
        models[f"prefixquant {scheme}, transformers"] = functools.partial(
            measure_transformers, prefixquant.load(path)
        )
    for name in ("float32", "bfloat16"):
        model = load_float_model(arguments.model, getattr(torch, name))[0]
        models[f"transformers {name}"] = functools.partial(measure_transformers, model)
    llama_cpp = measure_llama_cpp(arguments.model, torch.get_num_threads())
    if llama_cpp is not None:
        models["llama.cpp"] = llama_cpp
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, arguments.prompt_tokens), generator=generator)

    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for index in range(arguments.rounds + 1):
        for name, measure in models.items():
            result = measure(prompt, arguments.new_tokens)
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
