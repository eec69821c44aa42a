# SPDX-License-Identifier: Apache-2.0
"""The command line: ``prefixquant quantize | eval | generate | serve | export | ...``.

Results go to stdout, progress and errors to stderr. What the user can mend is one line and exit
code 2; anything else keeps its traceback. torch and transformers are imported by the commands, not
by this module, so that ``--help`` and mistyped flags answer at once.
"""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prefixquant.config import (
    COMPENSATION,
    PREFIX_MODES,
    SOLVERS,
    FinetuneConfig,
)
from prefixquant.errors import UserError

_USER_ERRNOS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)


class _OneLineErrors(TyperGroup):
    """Turns what the user can mend into one line on stderr and exit code 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.errno not in _USER_ERRNOS:
                raise
            message = f"{error.filename or 'output'}: {error.strerror}"
        typer.echo(f"prefixquant: error: {' '.join(message.split())}", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_OneLineErrors,
    help="Static 4-bit quantization of LLM weights, activations and KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face model folder, a .gguf file or a hub name."
    ),
]
CheckpointOrModel = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT_OR_MODEL", help="A prefixquant checkpoint or a float model."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]
Text = Annotated[str, typer.Option(help="'pydoc', or a .txt/.jsonl file, also as .gz.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of windows.", min=0, metavar="<int>")]
HeadBits = Annotated[
    int, typer.Option(help="Bits of the lm_head: 16, or 8 for half its memory and traffic.")
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    # The libraries' own bars would run into ours; tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if version:
        from prefixquant import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
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
        float, typer.Option(help="16-bit weights of quantease-outlier.")
    ] = 0.01,
    prefix: Annotated[str, typer.Option(help=f"{', '.join(PREFIX_MODES)}, text:....")] = "verified",
    calib: Text = "pydoc",
    nsamples: Annotated[int, typer.Option(help="Windows scanned for outlier tokens.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of such a window.")] = 512,
    search_samples: Annotated[int, typer.Option(help="Windows that scales and weights fit.")] = 32,
    search_seqlen: Annotated[int, typer.Option(help="Tokens of such a window.")] = 1024,
    eta: Annotated[float, typer.Option(help="Outlier: abs-max above eta medians.")] = 64.0,
    r4_block_size: Annotated[int, typer.Option(help="Block of down_proj's Hadamard; 0: one.")] = 0,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning each block.")] = 0,
    e2e_epochs: Annotated[int, typer.Option(help="Epochs of training all blocks together.")] = 0,
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
    where = _device(device)
    if dry_run:
        from prefixquant.plan import plan_report
        from prefixquant.report import describe_plan

        _result(plan_report(_float_config(model), model, recipe, where), as_json, describe_plan)
        return

    from prefixquant import workflow
    from prefixquant.decoder import place_model
    from prefixquant.loading import load_float_model
    from prefixquant.report import describe_quantize, replace_files

    progress = _progress()
    with progress.stage("load the model"):
        float_model, tokenizer = load_float_model(model)
        place_model(float_model, where)
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
    _result(report, as_json, lambda r: describe_quantize(r, output))


@app.command("eval")
def evaluate(  # noqa: PLR0913 - the arguments are the options
    target: CheckpointOrModel,
    text: Text = "pydoc",
    windows: Annotated[
        int, typer.Option(help="Windows at most; 0: the tasks alone.", min=0, metavar="<int>")
    ] = 40,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window.", min=2, metavar="<int>")] = 2048,
    tail: Annotated[
        float,
        typer.Option(help="Measure on this last part of the text."),
    ] = 0.18,
    reference: Annotated[
        str | None,
        typer.Option(help="A float model to compare with (KL, top-1)."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm_eval, by commas, or zero-shot."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="A folder with YAML tasks of your own.")
    ] = None,
    shots: Annotated[
        int, typer.Option(help="Examples in front of each question.", min=0, metavar="<int>")
    ] = 0,
    limit: Annotated[
        int | None,
        typer.Option(help="The first documents of each task only.", min=1, metavar="<int>"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at once.", min=1, metavar="<int>")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the report to this JSON file.")
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity (exponentiated mean NLL, non-overlapping windows) and lm_eval tasks."""
    from prefixquant import text as texts
    from prefixquant import workflow
    from prefixquant.report import describe_evaluation, eval_report, replace_files, report_json

    if not 0 < tail <= 1:
        raise UserError(f"--tail: expected a number above 0 and at most 1, got {tail}")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output {output}: expected a file name in an existing folder")
    task_arguments = None
    if tasks is not None:
        from prefixquant.integrations.lm_eval import task_names

        task_arguments = {
            "tasks": task_names(tasks),
            "folder": task_folder,
            "shots": shots,
            "limit": limit,
            "batch_size": batch_size,
        }
    elif windows == 0:
        raise UserError("--windows 0: expected --tasks, there is nothing else to measure")
    evaluation = workflow.evaluate(
        target,
        texts.load_text(text),
        workflow.Protocol(text, tail, windows, seqlen),
        reference=reference,
        tasks=task_arguments,
        device=_device(device),
        progress=_progress(),
    )
    report = eval_report(evaluation, target, command=sys.argv)
    if output is not None:
        replace_files(output.parent, {output.name: report_json(report)})
    _result(report, as_json, describe_evaluation)


@app.command()
def generate(  # noqa: PLR0913 - the arguments are the options
    target: CheckpointOrModel,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or - to read stdin.")],
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to add at most.", min=1, metavar="<int>")
    ] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the tokenizer's chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time.", min=0, metavar="<float>")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Of the k likeliest tokens; 0: of all.", min=0)] = 0,
    top_p: Annotated[
        float, typer.Option(help="Of the fewest likeliest tokens with this probability.")
    ] = 1.0,
    head_bits: HeadBits = 16,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    from prefixquant.continuation import load_continuation
    from prefixquant.runtime.sampling import Sampling

    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise UserError("prompt: expected some text")
    sampling = Sampling(temperature, top_k, top_p, seed)
    where = _device(device)
    with _progress().stage("load the model"):
        continue_prompt, tokenizer = load_continuation(target, where, head_bits)
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{target}: the tokenizer has no chat template; leave out --chat")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("prompt: the tokenizer makes no token of it")
    streamer = None
    if not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.monotonic()
    new = continue_prompt(ids, max_new_tokens, sampling, streamer)
    seconds = time.monotonic() - start
    if as_json:
        _print_json(
            {
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "new_tokens": len(new),
                "prompt_tokens": len(ids),
                "seconds": seconds,
            }
        )
    else:
        typer.echo(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", err=True)


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(help="A prefixquant checkpoint.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The port; 0: a free one.", min=0, max=65535, metavar="<int>")
    ] = 8000,
    device: Device = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sampling.", min=0, metavar="<int>")
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error.", metavar="LEVEL")
    ] = "warning",
) -> None:
    """Serve a checkpoint to OpenAI clients, streaming included (on `transformers serve`)."""
    from prefixquant.checkpoint import is_prefixquant_checkpoint
    from prefixquant.integrations.serve import has_chat_template, model_name, start_server

    if log_level not in ("debug", "info", "warning", "error"):
        raise UserError(f"--log-level: expected debug, info, warning or error, got {log_level!r}")
    _device(device)
    if is_prefixquant_checkpoint(checkpoint) and not has_chat_template(checkpoint):
        typer.echo("no chat template: /v1/completions works, /v1/chat/completions not", err=True)
    if is_prefixquant_checkpoint(checkpoint):
        typer.echo(f"http://{host}:{port}/v1, model {model_name(checkpoint)!r}", err=True)
    start_server(checkpoint, host=host, port=port, device=device, seed=seed, log_level=log_level)


@app.command()
def bench(  # noqa: PLR0913 - the arguments are the options
    target: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT_OR_SHAPE",
            help="A prefixquant checkpoint, or the name of a shape for random weights of its size.",
        ),
    ],
    batch: Annotated[int, typer.Option(help="Prompts at a time.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each.", min=2)] = 64,
    scheme: Annotated[
        str, typer.Option(help="Bits of a shape: w4a4kv4, w4a8kv4, w8a8kv8, ...")
    ] = "w4a4kv4",
    head_bits: HeadBits = 16,
    kv_bits: Annotated[
        int | None, typer.Option(help="16: an unquantized cache; default: as the checkpoint says.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also time a 16-bit transformers model of that size.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also say where the time of a decode step goes.")
    ] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure prefill, decode and memory of the runtime on a checkpoint or on random weights."""
    from prefixquant.bench import Case, bench_report, describe_bench
    from prefixquant.config import Scheme

    report = bench_report(
        target,
        Case(batch, context, new_tokens),
        _device(device),
        scheme=Scheme.parse(scheme),
        head_bits=head_bits,
        kv_bits=kv_bits,
        baseline=baseline,
        profile=profile,
        progress=_progress(),
    )
    _result(report, as_json, describe_bench)


@app.command()
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
    from prefixquant.decoder import place_model
    from prefixquant.loading import load_float_model
    from prefixquant.prefix import scan as run_scan
    from prefixquant.report import describe_scan
    from prefixquant.workflow import calibration_tokens

    if not eta > 1:
        raise UserError(f"eta: expected a number above 1, got {eta}")
    where = _device(device)
    content = texts.load_text(calib)
    progress = _progress()
    with progress.stage("load the model"):
        float_model, tokenizer = load_float_model(model)
        place_model(float_model, where)
    samples = texts.sample_windows(calibration_tokens(content, tokenizer), nsamples, seqlen, seed)
    _result(run_scan(float_model, tokenizer, samples, eta, progress), as_json, describe_scan)


@app.command()
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

    _result(
        inspect_report(read_checkpoint(checkpoint, check_values=check_values)),
        as_json,
        describe_checkpoint,
    )


@app.command()
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
    from prefixquant.export import export_compressed_tensors
    from prefixquant.report import format_bytes

    if form != "compressed-tensors":
        raise UserError(f"--format: expected compressed-tensors, got {form!r}")
    report = export_compressed_tensors(
        checkpoint, output, down_proj=down_proj, progress=_progress()
    )

    def describe(result: dict[str, Any]) -> str:
        errors = result["down_proj_relative_error"]
        mean = f", relative error {sum(errors) / len(errors):.2g}" if errors else ""
        size = format_bytes(result["bytes"])
        return f"{result['output']}: {size}, down_proj {result['down_proj']}{mean}"

    _result(report, as_json, describe)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Print versions, CPU and GPU kernels: paste it into an issue."""
    from prefixquant.doctor import describe, environment

    _result(environment(), as_json, describe)


# ---------------------------------------------------------------------------- shared steps


def _progress():
    from prefixquant import progress

    return progress.for_stream()


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _float_config(source: str) -> Any:
    """The transformers config of a float model, without its weights."""
    from transformers import AutoConfig

    from prefixquant import loading

    try:
        return AutoConfig.from_pretrained(**loading._source_arguments(source)[1])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: cannot read the config: {error}") from error


def _result(data: dict[str, Any], as_json: bool, describe: Any) -> None:
    if as_json:
        _print_json(data)
    else:
        typer.echo(describe(data))


def _print_json(data: dict[str, Any]) -> None:
    from prefixquant.report import report_json

    typer.echo(report_json(data), nl=False)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
