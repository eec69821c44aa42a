# SPDX-License-Identifier: Apache-2.0
"""What the commands report: plain data for report.json, and that data as text for people.

report.html is made of the same data by `prefixquant.report_html`.
"""

import dataclasses
import datetime
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixquant import checkpoint_layout
from prefixquant.atomic import usual_mode
from prefixquant.config import QuantizationConfig, RecipeConfig

REPORT_VERSION = 1


# ---------------------------------------------------------------------------- data


def quantize_report(
    details: Mapping[str, Any],
    recipe: RecipeConfig,
    quantization: QuantizationConfig,
    *,
    source: str,
    calibration: str,
    command: Sequence[str],
    seconds: float,
    fingerprint: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The report of `quantize`: ``details`` is what the pipeline says, the rest is its setting."""
    return {
        **report_head("quantize", command),
        "model": source,
        "scheme": str(quantization.scheme),
        "recipe": {**dataclasses.asdict(recipe), "scheme": str(recipe.scheme)},
        "calibration_text": calibration,
        "quantization": quantization.to_dict(),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        **({"fingerprint": dict(fingerprint)} if fingerprint else {}),
        **details,
    }


def eval_report(
    evaluation: Mapping[str, Any], target: str, *, command: Sequence[str]
) -> dict[str, Any]:
    return {
        **report_head("eval", command),
        "model": target,
        "evaluation": dict(evaluation),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def inspect_report(checkpoint: Any) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "scheme": str(checkpoint.quantization.scheme),
        "quantization": checkpoint.quantization.to_dict(),
        "architecture": dataclasses.asdict(checkpoint.sizes),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint_layout.storage(checkpoint.sizes, checkpoint.quantization),
    }


def report_head(command_name: str, command: Sequence[str]) -> dict[str, Any]:
    from prefixquant.doctor import environment

    return {
        "report_version": REPORT_VERSION,
        "command": command_name,
        "command_line": _command_line(command),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
    }


def _command_line(command: Sequence[str]) -> str:
    """The command as a person would type it: the program by its name, wherever it lies."""
    program = Path(command[0]).name
    if program in ("prefixquant", "cli.py", "__main__.py"):
        return shlex.join(["prefixquant", *command[1:]])
    return shlex.join(["python", program, *command[1:]])


def peak_memory_bytes() -> dict[str, int]:
    """The most that this process has had so far: resident host memory, and CUDA memory if used."""
    peak: dict[str, int] = {}
    try:
        import resource
    except ImportError:  # Windows has none
        pass
    else:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak["host"] = rss if sys.platform == "darwin" else rss * 1024
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def report_json(data: Mapping[str, Any]) -> str:
    """Strict JSON: a NaN becomes null, tensors and tuples become lists."""
    return json.dumps(plain(data), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The value in the types of JSON."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # torch and numpy, scalars too
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def replace_files(folder: Path, files: Mapping[str, str]) -> None:
    """Writes each file beside its place and renames it there: never half a report."""
    for name, content in files.items():
        handle, partial = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(content)
            os.chmod(partial, usual_mode(0o666))
            os.replace(partial, folder / name)
        except BaseException:
            os.unlink(partial)
            raise


# ---------------------------------------------------------------------------- text


def format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _describe_bytes(sizes: Mapping[str, int]) -> list[list[str]]:
    rows = [
        [kind.replace("_", " "), format_bytes(count)]
        for kind, count in sizes.items()
        if count and kind not in ("total", "float16")
    ]
    rows.append(["total", format_bytes(sizes["total"])])
    rows.append(["the model in 16 bits", format_bytes(sizes["float16"])])
    return rows


def describe_prefix(quantization: Mapping[str, Any]) -> str:
    pairs = zip(quantization["prefix_token_ids"], quantization["prefix_text"], strict=True)
    tokens = ", ".join(f"{text!r} ({token})" for token, text in pairs)
    return f"{tokens or 'none'}; mode {quantization['prefix_mode']}"


def describe_plan(plan: Mapping[str, Any]) -> str:
    from prefixquant.progress import format_seconds

    needed = plan["calibration_tokens_needed"]
    rows = [["scheme", plan["scheme"]], *_describe_bytes(plan["bytes"])]
    rows.append(["calibration tokens", str(max(needed.values()))])
    estimate = plan["estimate"]
    rows.append([f"time on {estimate['device']}, about", format_seconds(estimate["seconds"])])
    rows += [
        [f"peak {where} memory, at least", format_bytes(count)]
        for where, count in estimate["peak_memory_bytes"].items()
    ]
    return table(rows) + "\ndry run: nothing was written"


def describe_checkpoint(report: Mapping[str, Any]) -> str:
    quantization, sizes = report["quantization"], report["architecture"]
    rotations = quantization["rotations"]
    names = [name.upper() for name in ("r1", "r2", "r3", "r4", "r5", "r6") if rotations[name]]
    online = [name for name in ("r4", "r5") if rotations[name]]
    blocks = [f"{name.upper()} {rotations[f'{name}_block_size']}" for name in online]
    lines = [
        f"{report['path']}: prefixquant checkpoint, format {quantization['format_version']}",
        f"model      {sizes['model_type']}, {sizes['num_layers']} layers, hidden "
        f"{sizes['hidden_size']}, intermediate {sizes['intermediate_size']}, heads "
        f"{sizes['num_heads']}/{sizes['num_kv_heads']} x {sizes['head_dim']}, vocabulary "
        f"{sizes['vocab_size']}",
        f"scheme     {report['scheme']}, solver {quantization['solver']}, by "
        f"{quantization['producer']}",
        f"prefix     {describe_prefix(quantization)}",
        f"rotations  {', '.join(names) or 'none'}"
        + (f" (blocks of {', '.join(blocks)})" if blocks else "")
        + ("; centred" if quantization.get("centred") else "")
        + (", keys too" if quantization.get("centred_keys") else ""),
        f"tensors    {report['tensors']}",
        "",
        table(_describe_bytes(report["bytes"])),
    ]
    return "\n".join(lines)


def describe_quantize(report: Mapping[str, Any], output: Path) -> str:
    from prefixquant.progress import format_seconds

    tuning = describe_tuning(report)
    lines = [
        describe_search(report["prefix"]),
        f"prefix: {describe_prefix(report['quantization'])}",
        *([f"fine-tuning: {tuning}"] if tuning else []),
        f"time: {format_seconds(report['seconds'])}, peak memory: "
        + ", ".join(f"{format_bytes(v)} {k}" for k, v in report["peak_memory_bytes"].items()),
    ]
    if "evaluation" in report:
        lines.append(describe_evaluation(report))
    lines.append(f"checkpoint: {output}")
    return "\n".join(lines)


def describe_tuning(report: Mapping[str, Any]) -> str | None:
    """What fine-tuning did, in one line; None where there was none."""
    settings = report.get("recipe", {}).get("finetune") or {}
    tuned = [b["fine_tuning"] for b in report.get("blocks", ()) if "fine_tuning" in b]
    end_to_end = report.get("end_to_end")
    parts = []
    if tuned:
        left = [min(t["validation_loss"]) / max(t["validation_loss"][0], 1e-30) for t in tuned]
        parts.append(
            f"{settings['epochs']} epochs a block, validation error to "
            f"{100 * sum(left) / len(left):.0f}% of the calibrated block's (mean)"
        )
    if end_to_end:
        losses = end_to_end["validation_loss"]
        parts.append(
            f"{settings['e2e_epochs']} epochs end to end, validation KL {losses[0]:.4f} -> "
            f"{min(losses):.4f}"
        )
    if not parts:
        return None
    return "; ".join(parts) + f"; {settings['samples']} x {settings['seqlen']} tokens"


def describe_evaluation(report: Mapping[str, Any]) -> str:
    result = report["evaluation"]
    lines = [_describe_perplexity(result)] if "ppl" in result else []
    if "tasks" in result:
        from prefixquant.integrations.lm_eval import describe_tasks

        lines.append(describe_tasks(result["tasks"]))
    return "\n\n".join(lines)


def _describe_perplexity(result: Mapping[str, Any]) -> str:
    protocol = result["protocol"]
    line = f"perplexity {result['ppl']:.3f}"
    if "kl" in result:
        line += f", KL {result['kl']:.4f}, top-1 agreement {100 * result['top1']:.1f}%"
    if "speed" in result:
        speed = result["speed"]
        line += (
            f", {speed['decode_tokens_per_second']:.1f} tokens/s written, "
            f"{speed['prefill_tokens_per_second']:.0f} read"
        )
    return (
        f"{line} ({protocol['windows']} windows of {protocol['seqlen']} tokens of "
        f"{protocol['text']}, last {100 * protocol['tail']:.0f}% of the text)"
    )


def describe_search(search: Mapping[str, Any]) -> str:
    """The steps of the prefix search: what each prefix leaves, and what it does to the model."""
    rows = [["prefix", "outlier tokens", "largest ratio", "float perplexity"]]
    for step in search["steps"]:
        ratios = [r for r in step["max_ratio"] if r is not None]
        rows.append(
            [
                prefix_name(step["text"]),
                str(step["outlier_tokens"]),
                f"{max(ratios):.1f}" if ratios else "",
                f"{step['float_perplexity']:.3f}",
            ]
        )
    return table(rows)


def prefix_name(texts: Sequence[str]) -> str:
    return " ".join(repr(text) for text in texts) or "none"


def describe_scan(report: Mapping[str, Any]) -> str:
    count, length = report["samples"]
    return (
        f"{describe_search(report)}\n"
        f"verified prefix: {prefix_name(report['text'])} (BOS from {report['bos_source']})\n"
        f"{count} windows of {length} tokens; an outlier token exceeds {report['eta']:g} medians"
    )


def model_card(
    config: Mapping[str, Any],
    quantization: QuantizationConfig,
    report: Mapping[str, Any] | None = None,
) -> str:
    """The README.md of a checkpoint."""
    report = report or {}
    source = str(report.get("model", ""))
    # Only a hub name may stand as base_model; a local path says nothing to anyone else.
    is_hub_name = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if is_hub_name and Path(source).exists():
        is_hub_name = False
    scheme = quantization.scheme
    front = ["---", "library_name: prefixquant", "tags:", "- prefixquant", f"- {scheme}"]
    if is_hub_name:
        front += [f"base_model: {source}", "base_model_relation: quantized"]
    group = quantization.group_size
    scales = f"in groups of {group}" if group else "per output channel"
    outliers = quantization.outlier_fraction
    kept = f", {100 * outliers:g} percent of them in 16 bits beside" if outliers else ""
    by_token = "dynamic per token"
    activations = by_token if scheme.activation_mode == "dynamic" else "static per tensor"
    activations += ", companded" if scheme.companded else ""
    kv = by_token if scheme.kv_mode == "dynamic" else "static"
    tuning = describe_tuning(report)
    lines = [
        *front,
        "---",
        "",
        f"# {config.get('model_type', 'model')} quantized to {scheme} with prefixquant",
        "",
        f"Weights {scheme.weight_bits} bits {scales}{kept}, activations "
        f"{scheme.activation_bits} bits {activations}, KV cache {scheme.kv_bits} bits {kv}.",
        f"Prefix: {describe_prefix(quantization.to_dict())}. Solver: {quantization.solver}.",
        *([f"Fine-tuned: {tuning}."] if tuning else []),
        "",
        "```python",
        "import prefixquant",
        "",
        'model = prefixquant.load("path/to/this/folder")',
        'tokenizer = prefixquant.load_tokenizer("path/to/this/folder")',
        "```",
        "",
        "The model brings its own prefix, BOS included: give it text without special tokens.",
    ]
    if "evaluation" in report:
        lines += ["", "## Evaluation", "", describe_evaluation(report) + "."]
    if "command_line" in report:
        lines += ["", "## Made by", "", "```", report["command_line"], "```"]
    versions = report.get("environment", {}).get("versions", {})
    if versions:
        lines += ["", ", ".join(f"{k} {v}" for k, v in versions.items()) + "."]
    return "\n".join(lines) + "\n"
