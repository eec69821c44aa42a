# SPDX-License-Identifier: Apache-2.0
"""The commands around making a checkpoint: ``quantize``, ``scan``, ``inspect`` and ``export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixquant.cli_options import (
    AsJson,
    Device,
    Seed,
    Source,
    Text,
    parse_device,
    print_result,
)
from prefixquant.config import COMPENSATION, PREFIX_MODES, SOLVERS, FinetuneConfig
from prefixquant.errors import UserError
from prefixquant.progress import Progress, for_stream

if TYPE_CHECKING:
    import torch

# A panel of their own: the one long negative would narrow the texts of all options beside it.
_ROTATIONS = "Rotations"


def quantize(  # noqa: PLR0913 - the arguments are the options
    context: typer.Context,
    model: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint folder to make.")],
    scheme: Annotated[
        str, typer.Option(help="Bits of weights, activations, KV cache.")
    ] = "w4a4kv4",
    solver: Annotated[str, typer.Option(help=f"{', '.join(SOLVERS)}.")] = "gptq",
    compensation: Annotated[
        float, typer.Option(help="Ridge of weights that mend earlier errors; 0: off.")
    ] = COMPENSATION,
    group_size: Annotated[
        int, typer.Option(help="Columns that share a scale; 0: all of a row.")
    ] = 0,
    outlier_fraction: Annotated[
        float, typer.Option(help="16-bit part of quantease-outlier.")
    ] = 0.01,
    prefix: Annotated[str, typer.Option(help=f"{', '.join(PREFIX_MODES)}, text:....")] = "verified",
    calib: Text = "pydoc",
    nsamples: Annotated[int, typer.Option(help="Windows scanned for outlier tokens.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of such a window.")] = 512,
    search_samples: Annotated[int, typer.Option(help="Windows that scales and weights fit.")] = 32,
    search_seqlen: Annotated[int, typer.Option(help="Tokens of such a window.")] = 1024,
    eta: Annotated[float, typer.Option(help="Outlier: abs-max above eta medians.")] = 64.0,
    r4_block_size: Annotated[
        int,
        typer.Option(help="Block of down_proj's Hadamard; 0: one.", rich_help_panel=_ROTATIONS),
    ] = 0,
    r5_block_size: Annotated[
        int, typer.Option(help="Block of o_proj's; 1: none.", rich_help_panel=_ROTATIONS)
    ] = 0,
    r6: Annotated[
        bool,
        typer.Option(
            "--r6/--no-r6",
            help="Behind norms, in place of R1.",
            rich_help_panel=_ROTATIONS,
        ),
    ] = True,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning each block.")] = 0,
    e2e_epochs: Annotated[int, typer.Option(help="Epochs of all blocks together.")] = 0,
    train_samples: Annotated[
        int, typer.Option(help="Windows of 1024 tokens to train on.")
    ] = FinetuneConfig.samples,
    seed: Seed = 0,
    recipe_file: Annotated[
        Path | None,
        typer.Option("--recipe", help="A recipe.yaml; options given here win."),
    ] = None,
    device: Device = "cpu",
    eval_text: Annotated[
        str | None, typer.Option(help="Measure the perplexity on this text.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, time and memory, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint, discard a broken-off run.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model: find the prefix, calibrate, solve the weights, write a checkpoint."""
    from prefixquant import recipes
    from prefixquant import text as texts
    from prefixquant.checkpoint import check_output_folder, is_prefixquant_checkpoint

    choices = {
        "scheme": scheme,
        "solver": solver,
        "group_size": group_size,
        "outlier_fraction": outlier_fraction,
        "compensation": compensation,
        "prefix": prefix,
        "eta": eta,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "search_samples": search_samples,
        "search_seqlen": search_seqlen,
        "r4_block_size": r4_block_size,
        "r5_block_size": r5_block_size,
        "r6": r6,
        "seed": seed,
    }
    finetune = {"epochs": epochs, "e2e_epochs": e2e_epochs, "samples": train_samples}
    recipe, calib = recipes.from_options(context, recipe_file, choices, finetune, calib)
    # With --resume a checkpoint may stand there already: that of the very run, killed at its end.
    output = check_output_folder(
        output, overwrite or (resume and is_prefixquant_checkpoint(output))
    )
    calibration_text = texts.load_text(calib)
    evaluation_text = None if eval_text is None else texts.load_text(eval_text)
    where = parse_device(device)
    if dry_run:
        from prefixquant.loading import load_config
        from prefixquant.plan import plan_report
        from prefixquant.report import describe_plan

        print_result(plan_report(load_config(model), model, recipe, where), as_json, describe_plan)
        return

    from prefixquant import workflow
    from prefixquant.report import describe_quantize, replace_files

    progress = for_stream()
    float_model, tokenizer = _load_float_model(model, where, progress)
    tokens = workflow.calibration_tokens(calibration_text, tokenizer)
    report = None
    if resume:
        report = workflow.finished_report(float_model, recipe, tokens, output)
    if report is None:
        output = check_output_folder(output, overwrite)
        report = workflow.quantize_and_save(
            float_model,
            tokenizer,
            recipe,
            tokens,
            output,
            origin=workflow.Origin(model, calib),
            overwrite=overwrite,
            state=workflow.block_state(
                float_model, recipe, tokens, output, resume=resume, overwrite=overwrite
            ),
            progress=progress,
        )
    # Measured after it is saved: a failing evaluation must not cost the quantization.
    if evaluation_text is not None:
        del float_model
        report["evaluation"] = workflow.evaluate(
            output, evaluation_text, workflow.Protocol(eval_text), device=where, progress=progress
        )
        replace_files(output, workflow.report_files(report, *workflow.saved_configs(output)))
    print_result(report, as_json, lambda r: describe_quantize(r, output))


def scan(
    model: Source,
    calib: Text = "pydoc",
    nsamples: Annotated[int, typer.Option(help="Windows to scan.", min=1, metavar="<int>")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window.", min=2, metavar="<int>")] = 512,
    eta: Annotated[float, typer.Option(help="Outlier: abs-max above eta medians.")] = 64.0,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Look for outlier tokens in a float model, without quantizing it."""
    from prefixquant import text as texts
    from prefixquant.prefix import scan as run_scan
    from prefixquant.report import describe_scan
    from prefixquant.workflow import calibration_tokens

    if not eta > 1:
        raise UserError(f"eta: expected a number above 1, got {eta}")
    where = parse_device(device)
    content = texts.load_text(calib)
    progress = for_stream()
    float_model, tokenizer = _load_float_model(model, where, progress)
    samples = texts.sample_windows(calibration_tokens(content, tokenizer), nsamples, seqlen, seed)
    print_result(run_scan(float_model, tokenizer, samples, eta, progress), as_json, describe_scan)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A prefixquant checkpoint.")],
    check_values: Annotated[
        bool, typer.Option("--check-values", help="Also read the tensors and check their values.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print bits, sizes and prefix of a checkpoint, without loading its weights."""
    from prefixquant.checkpoint import read_checkpoint
    from prefixquant.report import describe_checkpoint, inspect_report

    print_result(
        inspect_report(read_checkpoint(checkpoint, check_values=check_values)),
        as_json,
        describe_checkpoint,
    )


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A prefixquant checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    form: Annotated[
        str, typer.Option("--format", help="The format; compressed-tensors is the only one.")
    ] = "compressed-tensors",
    down_proj: Annotated[
        str, typer.Option(help="int4: rounded again in groups of 128; 16bit: exact.")
    ] = "int4",
    as_json: AsJson = False,
) -> None:
    """Write a weight-only (W4A16) view for stock transformers and vLLM."""
    from prefixquant.export import describe_export, export_compressed_tensors

    if form != "compressed-tensors":
        raise UserError(f"--format: expected compressed-tensors, got {form!r}")
    report = export_compressed_tensors(
        checkpoint, output, down_proj=down_proj, progress=for_stream()
    )
    print_result(report, as_json, describe_export)


def _load_float_model(source: str, device: "torch.device", progress: Progress) -> tuple[Any, Any]:
    """(model, tokenizer), the model laid out for work on the device."""
    from prefixquant.decoder import place_model
    from prefixquant.loading import load_float_model

    with progress.stage("load the model"):
        model, tokenizer = load_float_model(source)
        place_model(model, device)
    return model, tokenizer
