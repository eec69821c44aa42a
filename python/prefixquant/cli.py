# SPDX-License-Identifier: Apache-2.0
"""The command line: ``prefixquant quantize | eval | generate | scan | inspect | doctor``.

Results go to stdout, progress and errors to stderr. What the user can mend is one line and exit
code 2; anything else keeps its traceback. torch and transformers are imported by the commands, not
by this module, so that ``--help`` and mistyped flags answer at once.
"""

import errno
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prefixquant.config import PREFIX_MODES, SOLVERS, RecipeConfig, Scheme
from prefixquant.errors import UserError

# Of any text, quantize sees the first part and eval measures on the last: no token serves both.
CALIBRATION_FRACTION = 0.82

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
Text = Annotated[
    str, typer.Option(help="'pydoc' (offline default), or a .txt/.jsonl file, also as .gz.")
]
Seed = Annotated[int, typer.Option(help="Seed of the choice of windows.", min=0)]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from prefixquant import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def quantize(  # noqa: PLR0913 - the arguments are the options
    model: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint folder to make.")],
    scheme: Annotated[
        str, typer.Option(help="Bits of weights, activations and KV cache: w4a4kv4, w4a8kv8, ...")
    ] = "w4a4kv4",
    solver: Annotated[str, typer.Option(help=f"Weight solver: {', '.join(SOLVERS)}.")] = "rtn",
    prefix: Annotated[
        str, typer.Option(help=f"{', '.join(PREFIX_MODES)}, or text:... for tokens of your own.")
    ] = "verified",
    calib: Text = "pydoc",
    nsamples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 512,
    eta: Annotated[float, typer.Option(help="Outlier token: abs-max above eta medians.")] = 64.0,
    r4_block_size: Annotated[
        int, typer.Option(help="Block of the Hadamard before down_proj; 0: one for the whole.")
    ] = 0,
    seed: Seed = 0,
    device: Device = "cpu",
    eval_text: Annotated[
        str | None, typer.Option(help="Measure the perplexity of the result on this text.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the sizes, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing prefixquant checkpoint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model: find the prefix, calibrate, solve the weights, write a checkpoint."""
    from prefixquant import text as texts
    from prefixquant.checkpoint import check_output_folder

    recipe = RecipeConfig(
        scheme=Scheme.parse(scheme),
        solver=solver,
        prefix=prefix,
        eta=eta,
        nsamples=nsamples,
        seqlen=seqlen,
        r4_block_size=r4_block_size,
        seed=seed,
    )
    output = check_output_folder(output, overwrite)
    calibration_text = texts.load_text(calib)
    evaluation_text = None if eval_text is None else texts.load_text(eval_text)
    where = _device(device)
    if dry_run:
        from prefixquant.report import describe_plan, plan_report

        _result(plan_report(_float_config(model), model, recipe), as_json, describe_plan)
        return

    from prefixquant.checkpoint import write_checkpoint
    from prefixquant.loading import load_float_model
    from prefixquant.quantize import quantize as run_quantize
    from prefixquant.report import (
        describe_quantize,
        model_card,
        quantize_report,
        replace_files,
        report_json,
    )
    from prefixquant.report_html import render_html

    start = time.monotonic()
    progress = _progress()
    with progress.stage("load the model"):
        float_model, tokenizer = load_float_model(model)
        float_model.to(where)
    tokens = texts.tokenize(calibration_text, tokenizer)
    calibration, _ = texts.split_tokens(tokens, CALIBRATION_FRACTION)
    result = run_quantize(float_model, tokenizer, recipe, calibration, progress)
    model_config = hf_config_dict(float_model, result.tensors)
    quantization = result.quantization
    report = quantize_report(
        result.report,
        recipe,
        quantization,
        source=model,
        calibration=calib,
        command=sys.argv,
        seconds=time.monotonic() - start,
    )

    def files() -> dict[str, str]:
        return {
            "report.json": report_json(report),
            "report.html": render_html(report),
            "README.md": model_card(model_config, quantization, report),
        }

    # Saved before it is measured: a failing evaluation must not cost the quantization.
    with progress.stage("write the checkpoint"):
        write_checkpoint(
            output,
            result.tensors,
            model_config,
            quantization,
            tokenizer=tokenizer,
            extra_files=files(),
            overwrite=overwrite,
        )
    del float_model, result
    if evaluation_text is not None:
        report["evaluation"] = _evaluate(
            str(output), evaluation_text, _Protocol(eval_text), device=where, progress=progress
        )
        replace_files(output, files())
    _result(report, as_json, lambda r: describe_quantize(r, output))


@app.command("eval")
def evaluate(  # noqa: PLR0913 - the arguments are the options
    target: CheckpointOrModel,
    text: Text = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows at most.", min=1)] = 40,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 2048,
    tail: Annotated[
        float,
        typer.Option(help="Measure on this last part of the text, which quantize never sees."),
    ] = round(1 - CALIBRATION_FRACTION, 2),
    reference: Annotated[
        str | None,
        typer.Option(help="A float model: also give KL divergence and top-1 agreement with it."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the report to this JSON file.")
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity: mean NLL over non-overlapping windows, exponentiated."""
    from prefixquant import text as texts
    from prefixquant.report import describe_evaluation, eval_report, replace_files, report_json

    if not 0 < tail <= 1:
        raise UserError(f"--tail: expected a number above 0 and at most 1, got {tail}")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output {output}: expected a file name in an existing folder")
    content = texts.load_text(text)
    evaluation = _evaluate(
        target,
        content,
        _Protocol(text, tail, windows, seqlen),
        device=_device(device),
        progress=_progress(),
        reference=reference,
    )
    report = eval_report(evaluation, target, command=sys.argv)
    if output is not None:
        replace_files(output.parent, {output.name: report_json(report)})
    _result(report, as_json, describe_evaluation)


@app.command()
def generate(
    target: CheckpointOrModel,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or - to read stdin.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.", min=1)] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the tokenizer's chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time.", min=0)
    ] = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    import torch

    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise UserError("prompt: expected some text")
    where = _device(device)
    model, tokenizer = _load_any(target, where, _progress())
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{target}: the tokenizer has no chat template; leave out --chat")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(where)
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("prompt: the tokenizer makes no token of it")
    streamer = None
    if not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    start = time.monotonic()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=_first_id(tokenizer.pad_token_id, tokenizer.eos_token_id),
            **sampling,
        )
    seconds = time.monotonic() - start
    new = output[0, inputs["input_ids"].shape[1] :]
    if as_json:
        _print_json(
            {
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "new_tokens": len(new),
                "prompt_tokens": inputs["input_ids"].shape[1],
                "seconds": seconds,
            }
        )
    else:
        typer.echo(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", err=True)


@app.command()
def scan(
    model: Source,
    calib: Text = "pydoc",
    nsamples: Annotated[int, typer.Option(help="Windows to scan.", min=1)] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    eta: Annotated[float, typer.Option(help="Outlier token: abs-max above eta medians.")] = 64.0,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Look for outlier tokens in a float model, without quantizing it."""
    from prefixquant import text as texts
    from prefixquant.loading import load_float_model
    from prefixquant.prefix import scan as run_scan
    from prefixquant.report import describe_scan

    if not eta > 1:
        raise UserError(f"eta: expected a number above 1, got {eta}")
    where = _device(device)
    content = texts.load_text(calib)
    progress = _progress()
    with progress.stage("load the model"):
        float_model, tokenizer = load_float_model(model)
        float_model.to(where)
    tokens, _ = texts.split_tokens(texts.tokenize(content, tokenizer), CALIBRATION_FRACTION)
    samples = texts.sample_windows(tokens, nsamples, seqlen, seed)
    with progress.stage("scan"):
        report = run_scan(float_model, tokenizer, samples, eta)
    _result(report, as_json, describe_scan)


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


def _load_any(target: str, device: Any, progress: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint of ours or of a float model."""
    from prefixquant.checkpoint import is_prefixquant_checkpoint
    from prefixquant.loading import load_float_model, load_tokenizer

    with progress.stage("load the model"):
        if is_prefixquant_checkpoint(target):
            import prefixquant

            model, tokenizer = prefixquant.load(target), load_tokenizer(target)
        else:
            model, tokenizer = load_float_model(target)
        return model.to(device), tokenizer


@dataclass(frozen=True)
class _Protocol:
    """How perplexity is measured; stands beside every number that was measured so."""

    text: str
    tail: float = round(1 - CALIBRATION_FRACTION, 2)
    windows: int = 40
    seqlen: int = 2048

    def samples(self, content: str, tokenizer: Any) -> Any:
        """The evaluation windows, int64 [n, seqlen], without special tokens."""
        from prefixquant import text as texts

        tokens = texts.tokenize(content, tokenizer)
        if self.tail < 1:
            _, tokens = texts.split_tokens(tokens, 1 - self.tail)
        return texts.leading_windows(tokens, self.seqlen, self.windows)


def _evaluate(
    target: str,
    content: str,
    protocol: _Protocol,
    *,
    device: Any,
    progress: Any,
    reference: str | None = None,
) -> dict[str, Any]:
    from prefixquant import evaluate as measure

    model, tokenizer = _load_any(target, device, progress)
    samples = protocol.samples(content, tokenizer)
    result = dict(measure.perplexity(model, samples, progress))
    if reference is not None:
        float_model, _ = _load_any(reference, device, progress)
        result["reference"] = reference
        result |= measure.compare(model, float_model, samples, progress)
    result["protocol"] = {**asdict(protocol), "windows": len(samples)}
    return result


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


def hf_config_dict(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The config.json content of a quantized model: that of the float model, cleaned."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(tensors["lm_head.weight"].dtype).removeprefix("torch.")
    return config


def _first_id(*candidates: Any) -> int | None:
    return next((c for c in candidates if c is not None), None)


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
