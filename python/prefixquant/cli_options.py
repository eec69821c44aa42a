# SPDX-License-Identifier: Apache-2.0
"""What the commands share: arguments and options, the device they name, the result they print."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixquant.errors import UserError

if TYPE_CHECKING:
    import torch

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


def parse_device(name: str) -> "torch.device":
    """The device of ``--device``; UserError if torch sees none of that name."""
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


def print_result(
    data: dict[str, Any], as_json: bool, describe: Callable[[dict[str, Any]], str]
) -> None:
    """The result on stdout: as JSON, or as the text that ``describe`` makes of it."""
    if as_json:
        print_json(data)
    else:
        typer.echo(describe(data))


def print_json(data: dict[str, Any]) -> None:
    from prefixquant.report import report_json

    typer.echo(report_json(data), nl=False)
