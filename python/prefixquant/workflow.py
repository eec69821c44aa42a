# SPDX-License-Identifier: Apache-2.0
"""Whole jobs as single calls: what the command line, the demo and the accuracy protocol share."""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefixquant import text as texts
from prefixquant.atomic import remove_stale_partials
from prefixquant.checkpoint import is_prefixquant_checkpoint, read_checkpoint, write_checkpoint
from prefixquant.compare import Candidate, compare
from prefixquant.config import RecipeConfig
from prefixquant.loading import (
    chat_template_adds_bos,
    load_float_model,
    load_tokenizer,
    tokenizer_without_bos,
)
from prefixquant.progress import SILENT, Progress
from prefixquant.recipes import write_recipe
from prefixquant.report import model_card, quantize_report, report_json
from prefixquant.report_html import render_html
from prefixquant.speed import measure_speed

# Of any text, quantize sees the first part and eval measures on the last: no token serves both.
CALIBRATION_FRACTION = 0.82


@dataclass(frozen=True)
class Origin:
    """What a report says of where things came from."""

    model: str
    calibration_text: str
    command: Sequence[str] = field(default_factory=lambda: tuple(sys.argv))


@dataclass(frozen=True)
class Protocol:
    """How perplexity is measured; it stands beside every number measured so."""

    text: str
    tail: float = round(1 - CALIBRATION_FRACTION, 2)
    windows: int = 40
    seqlen: int = 2048

    def samples(self, content: str, tokenizer: Any) -> torch.Tensor:
        """The evaluation windows, int64 [n, seqlen], without special tokens."""
        tokens = texts.tokenize(content, tokenizer)
        if self.tail < 1:
            _, tokens = texts.split_tokens(tokens, 1 - self.tail)
        return texts.leading_windows(tokens, self.seqlen, self.windows)


def calibration_tokens(content: str, tokenizer: Any) -> torch.Tensor:
    """The part of a text that quantization may see: int64 [n]."""
    return texts.split_tokens(texts.tokenize(content, tokenizer), CALIBRATION_FRACTION)[0]


def load_any(
    target: str | os.PathLike, device: torch.device | str = "cpu", dtype: Any = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint of ours or of a float model."""
    if is_prefixquant_checkpoint(target):
        import prefixquant

        return prefixquant.load(target, device=device), load_tokenizer(target)
    model, tokenizer = load_float_model(target, dtype)
    return model.to(device), tokenizer


def _load_to_measure(target: str | os.PathLike, device: torch.device | str) -> tuple[Any, Any]:
    """As `load_any`; a checkpoint that has no kernels, by fake quantization."""
    if is_prefixquant_checkpoint(target) and saved_configs(target)[1].kv_mode == "dynamic":
        from prefixquant.simulate import SimulatedModel

        return SimulatedModel(target, device=device), load_tokenizer(target)
    return load_any(target, device)


def quantize_and_save(  # noqa: PLR0913
    float_model: Any,
    tokenizer: Any,
    recipe: RecipeConfig,
    calibration: torch.Tensor,
    output: Path,
    *,
    origin: Origin,
    search: Any = None,
    overwrite: bool = False,
    state: Any = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Quantizes the model and writes the checkpoint with its reports and its model card.

    Args:
        calibration: int64 [n], the token stream to calibrate on.
        search: the `PrefixSearch` of an earlier run on the same model, to not repeat it.
        state: the `BlockState` that keeps finished blocks until the checkpoint is written.

    Returns:
        The report, as in report.json.
    """
    from prefixquant.quantize import quantize

    start = time.monotonic()
    result = quantize(float_model, tokenizer, recipe, calibration, progress, search, state)
    report = quantize_report(
        result.report,
        recipe,
        result.quantization,
        source=origin.model,
        calibration=origin.calibration_text,
        command=origin.command,
        seconds=time.monotonic() - start,
        fingerprint=None if state is None else state.fingerprint,
    )
    if tokenizer.bos_token_id in result.quantization.prefix_token_ids:
        if chat_template_adds_bos(tokenizer):
            progress.note("note: the chat template writes BOS, and the prefix holds it already")
        tokenizer = tokenizer_without_bos(tokenizer)
    config = hf_config_dict(float_model, result.tensors)
    with progress.stage("write the checkpoint"):
        write_checkpoint(
            output,
            result.tensors,
            config,
            result.quantization,
            tokenizer=tokenizer,
            extra_files=report_files(report, config, result.quantization),
            overwrite=overwrite,
        )
    if state is not None:
        state.discard()
    remove_stale_partials(output)
    return report


def finished_report(
    float_model: Any, recipe: RecipeConfig, calibration: torch.Tensor, output: Path
) -> dict[str, Any] | None:
    """The report of the checkpoint that a killed run had already finished, or None; clears the
    state that it left."""
    from prefixquant.resume import run_fingerprint, state_folder

    if not is_prefixquant_checkpoint(output):
        return None
    try:
        report = json.loads((output / "report.json").read_bytes())
    except (OSError, ValueError):
        return None
    run = run_fingerprint(float_model, recipe, calibration)
    if not isinstance(report, dict) or report.get("fingerprint") != run:
        return None
    shutil.rmtree(state_folder(output), ignore_errors=True)
    return report


def block_state(
    float_model: Any,
    recipe: RecipeConfig,
    calibration: torch.Tensor,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
) -> Any:
    """The `BlockState` of a run that makes ``output``.

    Raises:
        UserError: an unfinished run is kept there and neither ``resume`` nor ``overwrite`` is
            given, or it was another run.
    """
    from prefixquant.resume import BlockState, run_fingerprint, state_folder

    folder = state_folder(output)
    if overwrite and not resume:
        shutil.rmtree(folder, ignore_errors=True)
    return BlockState(folder, run_fingerprint(float_model, recipe, calibration), resume=resume)


def report_files(
    report: dict[str, Any], config: dict[str, Any], quantization: Any
) -> dict[str, str]:
    """The files of a checkpoint that are made of its report."""
    return {
        "report.json": report_json(report),
        "report.html": render_html(report),
        "recipe.yaml": write_recipe(report),
        "README.md": model_card(config, quantization, report),
    }


def saved_configs(folder: Path) -> tuple[dict[str, Any], Any]:
    """(model config, quantization) of a checkpoint, without its tensors."""
    checkpoint = read_checkpoint(Path(folder), check_values=False)
    return checkpoint.config, checkpoint.quantization


def hf_config_dict(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The config.json content of a quantized model: that of the float model, cleaned."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(tensors["lm_head.weight"].dtype).removeprefix("torch.")
    return config


def evaluate(
    target: str | os.PathLike,
    content: str,
    protocol: Protocol,
    *,
    reference: str | None = None,
    tasks: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Perplexity of a checkpoint or float model; with ``reference`` also KL and top-1 against it.

    The reference gets the checkpoint's prefix in front, so that the difference is that of the
    quantization alone. ``tasks`` holds the arguments of `evaluate_tasks`, which then runs on both
    models; there the float model has no prefix. With ``protocol.windows`` 0 the tasks are all.
    """
    with progress.stage("load the model"):
        model, tokenizer = _load_to_measure(target, device)
    reference_model = None
    if reference is not None:
        with progress.stage("load the reference"):
            reference_model, reference_tokenizer = load_any(reference, device)
    measured: dict[str, Any] = {}
    if protocol.windows:
        prefix: tuple[int, ...] = ()
        if is_prefixquant_checkpoint(target):
            prefix = saved_configs(Path(target))[1].prefix_token_ids
        samples = protocol.samples(content, tokenizer)
        against = None if reference_model is None else Candidate(reference_model, prefix)
        measured = _perplexities(model, against, samples, progress)
        measured["protocol"] = {**asdict(protocol), "windows": len(samples)}
        if hasattr(model, "generate"):  # fake quantization has none
            with progress.stage("measure speed"):
                measured["speed"] = measure_speed(model, samples[0])
    if reference is not None:
        measured["reference"] = reference
    if tasks is not None:
        from prefixquant.integrations.lm_eval import evaluate_tasks

        models = {"model": (model, tokenizer)}
        if reference_model is not None:
            models["reference"] = (reference_model, reference_tokenizer)
        measured["tasks"] = evaluate_tasks(models, progress=progress, **tasks)
    return measured


def _perplexities(
    model: Any, reference: Candidate | None, samples: torch.Tensor, progress: Progress
) -> dict[str, Any]:
    candidates = {"model": Candidate(model)}
    if reference is None:
        measured = compare(candidates, "model", samples, progress)["model"]
        del measured["kl"], measured["top1"]  # against itself
        return measured
    results = compare({**candidates, "reference": reference}, "reference", samples, progress)
    return results["model"] | {"reference_ppl": results["reference"]["ppl"]}
