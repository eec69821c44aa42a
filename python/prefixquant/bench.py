# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of generation: the runtime, beside a float transformers model in the same run.

What is timed is the public way to generate, greedy and without stop tokens: the time to the first
token is the prefill, the mean time between the following ones is the decode step. Everything runs
before it is timed, so that kernels are chosen, graphs captured and models compiled.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from prefixquant.checkpoint import is_prefixquant_checkpoint
from prefixquant.config import Scheme
from prefixquant.doctor import environment
from prefixquant.errors import UserError
from prefixquant.progress import SILENT, Progress
from prefixquant.runtime import Runtime
from prefixquant.runtime.random_weights import SHAPES, random_weights, shape_config

WARM_UPS = 2  # short prompts are captured at the second
ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """``batch`` prompts of ``context`` tokens, continued by ``new_tokens``."""

    batch: int
    context: int
    new_tokens: int = 64

    def prompts(self, vocab: int) -> torch.Tensor:
        """int64 [batch, context], the same for every candidate."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab, (self.batch, self.context), generator=generator)


@dataclass(frozen=True)
class Speed:
    """Medians of the rounds; milliseconds of one prefill and of one decode step."""

    prefill_ms: float
    decode_ms: float | None  # None of one new token, which is that of the prefill
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    memory_gb: float | None  # 1e9 bytes at the peak, weights included; None on a CPU

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


# (prompts, new_tokens) -> (seconds to the first token, seconds of the others)
Generate = Callable[[torch.Tensor, int], tuple[float, float]]


def measure(
    generate: Generate, case: Case, vocab: int, device: torch.device, rounds: int | None = None
) -> Speed:
    """Times a candidate on a case: `WARM_UPS` and then ``rounds``; None: `ROUNDS`."""
    prompts = case.prompts(vocab)
    for _ in range(WARM_UPS if rounds is None else 1):
        generate(prompts, case.new_tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [generate(prompts, case.new_tokens) for _ in range(rounds or ROUNDS)]
    prefill = statistics.median(first for first, _ in times)
    decode = None
    if case.new_tokens > 1:
        decode = statistics.median(rest for _, rest in times) / (case.new_tokens - 1)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return Speed(
        prefill * 1e3,
        decode and decode * 1e3,
        case.batch * case.context / prefill,
        decode and case.batch / decode,
        memory,
    )


def runtime_generate(runtime: Runtime) -> Generate:
    """The runtime without stop tokens."""

    def generate(prompts: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        kept, runtime.stop_ids = runtime.stop_ids, frozenset()
        try:
            _synchronize(runtime.weights.device)
            start = time.perf_counter()
            steps = runtime.stream(prompts.tolist(), new_tokens)
            next(steps)
            first = time.perf_counter()
            for _ in steps:
                pass
            return first - start, time.perf_counter() - first
        finally:
            runtime.stop_ids = kept

    return generate


def transformers_generate(model: Any) -> Generate:
    """``generate`` of a transformers model, as fast as it offers.

    On CUDA the decode steps are those of a static cache, which it compiles (``reduce-overhead``)
    for the shapes at hand; the prefill, which it does not compile, takes the quicker of a static
    and a growing cache. The time to the first token is that of generating one token.
    """
    caches: list[dict] = [{}]
    if model.device.type == "cuda":
        from transformers import CompileConfig

        static = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}
        caches = [static, {}]

    def seconds(prompts: torch.Tensor, new_tokens: int, cache: dict) -> float:
        _synchronize(model.device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **cache,
            )
        out[0, -1].item()  # waits for the device
        return time.perf_counter() - start

    def generate(prompts: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        prompts = prompts.to(model.device)
        first = [seconds(prompts, 1, cache) for cache in caches]
        if new_tokens == 1:
            return min(first), 0.0
        return min(first), max(seconds(prompts, new_tokens, caches[0]) - first[0], 1e-9)

    return generate


def random_float_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A transformers model of the configuration with random weights on the device."""
    from transformers import AutoModelForCausalLM

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    finally:
        torch.set_default_dtype(default)


# ---- what a step must read ----


def step_bytes(runtime: Runtime, case: Case) -> dict[str, int]:
    """Bytes that one decode step cannot avoid reading: weights, head, and the cache's rows."""
    weights = runtime.weights
    geometry = weights.geometry
    blocks = weights.blocks
    linears = [
        linear.weight.numel() * linear.weight.element_size()
        for block in blocks
        for linear in (block.qkv, block.o, block.gate_up, block.down)
    ]
    head = weights.head.weight
    bits = weights.kv_bits if weights.kv_bits < 16 else torch.finfo(weights.dtype).bits
    rows = case.batch * case.context * geometry.kv_heads * geometry.head_dim
    return {
        "linears": sum(linears),
        "lm_head": head.numel() * head.element_size(),
        "kv_cache": 2 * geometry.layers * rows * bits // 8,
    }


@dataclass(frozen=True)
class OperationTime:
    """One operation of a decode step with inputs of one shape."""

    name: str
    shapes: str
    calls: int
    us: float  # of all calls of a step, on the device
    weight_bytes: int  # the bytes of its weight or cache rows, all calls; 0: activations only


def profile_step(runtime: Runtime, case: Case, steps: int = 5) -> list[OperationTime]:
    """Where the time of a decode step goes, longest first.

    The operations run one by one, not as a graph: what is added up are the times of their kernels,
    and on a CPU of the calls.
    """
    from torch.profiler import ProfilerActivity, profile

    from prefixquant.runtime.decoder import Step

    weights, decoder = runtime.weights, runtime.decoder
    cuda = weights.device.type == "cuda"
    runtime.reserve(case.batch, case.context + 1)
    cache = runtime.cache
    step = Step.after([case.context] * case.batch, case.batch, cache)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.inference_mode():
        decoder.decode(step, cache, case.context + 1)
        _synchronize(weights.device)
        with profile(activities=activities, record_shapes=True) as recorded:
            for _ in range(steps):
                decoder.decode(step, cache, case.context + 1)
            _synchronize(weights.device)
    rows = []
    for event in recorded.key_averages(group_by_input_shape=True):
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us <= 0:
            continue
        shapes = [list(s) for s in event.input_shapes if s]
        rows.append(
            OperationTime(
                event.key,
                " ".join("x".join(map(str, s)) for s in shapes),
                event.count // steps,
                us / steps,
                _operation_bytes(event.key, shapes, case, runtime) * (event.count // steps),
            )
        )
    return sorted(rows, key=lambda row: -row.us)


def _operation_bytes(name: str, shapes: list[list[int]], case: Case, runtime: Runtime) -> int:
    """Of one call: the prepacked weight (bytes in any layout), or the rows of the cache."""
    composed = name.endswith("gemm_fused") and runtime.weights.device.type == "cpu"
    if "gemm" in name and len(shapes) > 1 and not composed:
        return torch.Size(shapes[1]).numel()
    if "kv_decode_attention" in name:
        return step_bytes(runtime, case)["kv_cache"] // runtime.weights.geometry.layers
    return 0


# ---- the command ----


def bench_report(  # noqa: PLR0913
    target: str,
    case: Case,
    device: torch.device,
    *,
    scheme: Scheme,
    head_bits: int = 16,
    kv_bits: int | None = None,
    baseline: bool = False,
    profile: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """What ``prefixquant bench`` prints as JSON.

    Args:
        target: a checkpoint folder, or a name of `random_weights.SHAPES`.
        scheme: of a shape.
        baseline: also a 16-bit transformers model of that configuration with random weights.
        profile: also `profile_step`.

    Raises:
        UserError: an unknown target, a case that does not fit, or wrong bits.
    """
    with progress.stage("load the model"):
        runtime = _load(target, device, scheme, head_bits, kv_bits)
    config, vocab = runtime.weights.config, runtime.weights.geometry.vocab
    with progress.stage("measure the runtime"):
        speed = measure(runtime_generate(runtime), case, vocab, device)
    report = {
        "target": target,
        "case": asdict(case),
        "device": str(device),
        "weights_gb": runtime.weights.bytes() / 1e9,
        "cache_gb": runtime.cache.bytes() / 1e9,
        "step_bytes": step_bytes(runtime, case),
        "runtime": speed.as_dict(),
        "environment": environment(),
    }
    if profile:
        with progress.stage("profile a step"):
            report["profile"] = [asdict(row) for row in profile_step(runtime, case)]
    if baseline:
        del runtime
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        with progress.stage("measure the transformers model"):
            model = random_float_model(config, device, dtype)
            report["transformers"] = measure(
                transformers_generate(model), case, vocab, device
            ).as_dict()
    return report


def _load(
    target: str, device: torch.device, scheme: Scheme, head_bits: int, kv_bits: int | None
) -> Runtime:
    if target not in SHAPES:
        if not is_prefixquant_checkpoint(target):
            raise UserError(
                f"{target}: expected a prefixquant checkpoint or one of {', '.join(SHAPES)}"
            )
        return Runtime.from_checkpoint(target, device=device, head_bits=head_bits, kv_bits=kv_bits)
    if "dynamic" in (scheme.activation_mode, scheme.kv_mode) or scheme.activation_bits == 16:
        raise UserError(f"scheme: expected static activations of 4 or 8 bits, got {scheme}")
    scheme = replace(scheme, kv_bits=kv_bits or scheme.kv_bits)
    return Runtime(random_weights(shape_config(target), scheme, device, head_bits=head_bits))


def describe_bench(report: dict[str, Any]) -> str:
    case, lines = report["case"], []
    lines.append(
        f"{report['target']} on {report['device']}: {case['batch']} x {case['context']} tokens, "
        f"{case['new_tokens']} new"
    )
    lines.append(
        f"weights {report['weights_gb']:.2f} GB, cache {report['cache_gb']:.3f} GB, a decode step "
        f"reads {sum(report['step_bytes'].values()) / 1e9:.3f} GB"
    )
    for name in ("runtime", "transformers"):
        if name not in report:
            continue
        speed = report[name]
        memory = "" if speed["memory_gb"] is None else f", {speed['memory_gb']:.2f} GB"
        decode = ""
        if speed["decode_ms"] is not None:
            rate = f"{speed['decode_tokens_per_s']:.1f} tokens/s"
            decode = f", decode {speed['decode_ms']:.2f} ms/step ({rate})"
        lines.append(
            f"{name:<12} prefill {speed['prefill_ms']:.1f} ms "
            f"({speed['prefill_tokens_per_s']:.0f} tokens/s){decode}{memory}"
        )
    for row in report.get("profile", [])[:20]:
        rate = f"{row['weight_bytes'] / row['us'] / 1e3:8.1f} GB/s" if row["weight_bytes"] else ""
        lines.append(f"  {row['us']:9.1f} us  {row['calls']:4d} x {row['name']:<40} {rate}")
    return "\n".join(lines)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
