# SPDX-License-Identifier: Apache-2.0
"""The commands that run a model: ``eval``, ``generate``, ``serve`` and ``bench``."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from prefixquant.cli_options import (
    AsJson,
    CheckpointOrModel,
    Device,
    HeadBits,
    Seed,
    Text,
    parse_device,
    print_json,
    print_result,
)
from prefixquant.errors import UserError
from prefixquant.progress import for_stream


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
        device=parse_device(device),
        progress=for_stream(),
    )
    report = eval_report(evaluation, target, command=sys.argv)
    if output is not None:
        replace_files(output.parent, {output.name: report_json(report)})
    print_result(report, as_json, describe_evaluation)


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
    where = parse_device(device)
    with for_stream().stage("load the model"):
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
        print_json(
            {
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "new_tokens": len(new),
                "prompt_tokens": len(ids),
                "seconds": seconds,
            }
        )
    else:
        typer.echo(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", err=True)


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
    parse_device(device)
    if is_prefixquant_checkpoint(checkpoint):
        if not has_chat_template(checkpoint):
            typer.echo(
                "no chat template: /v1/completions works, /v1/chat/completions not", err=True
            )
        typer.echo(f"http://{host}:{port}/v1, model {model_name(checkpoint)!r}", err=True)
    start_server(checkpoint, host=host, port=port, device=device, seed=seed, log_level=log_level)


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
        parse_device(device),
        scheme=Scheme.parse(scheme),
        head_bits=head_bits,
        kv_bits=kv_bits,
        baseline=baseline,
        profile=profile,
        progress=for_stream(),
    )
    print_result(report, as_json, describe_bench)
