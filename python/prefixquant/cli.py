# SPDX-License-Identifier: Apache-2.0
"""The command line: ``prefixquant quantize | eval | generate | serve | export | ...``.

Results go to stdout, progress and errors to stderr. What the user can mend is one line and exit
code 2; anything else keeps its traceback. torch and transformers are imported inside the commands,
not at the top of a ``cli*`` module, so that ``--help`` and mistyped flags answer at once.
"""

import errno
import os
from typing import Annotated

import typer
from typer.core import TyperGroup

from prefixquant.cli_checkpoint import export, inspect, quantize, scan
from prefixquant.cli_options import AsJson, print_result
from prefixquant.cli_run import bench, evaluate, generate, serve
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


# In the order of --help.
app.command()(quantize)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(serve)
app.command()(bench)
app.command()(scan)
app.command()(inspect)
app.command()(export)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Print versions, CPU and GPU kernels: paste it into an issue."""
    from prefixquant.doctor import describe, environment

    print_result(environment(), as_json, describe)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
