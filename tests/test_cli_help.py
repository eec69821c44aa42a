# SPDX-License-Identifier: Apache-2.0
"""Every command's help fits a screen, and every option of every command is used by some test."""

import re
from pathlib import Path

import pytest
import typer
from prefixquant.cli import app
from typer.testing import CliRunner

COMMANDS = typer.main.get_command(app).commands
SCREEN = (100, 48)  # columns, lines


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(command):
    columns, lines = SCREEN
    arguments = [command, "--help"] if command else ["--help"]
    result = CliRunner(env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}).invoke(
        app, arguments
    )
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output).splitlines()
    assert len(text) <= lines
    assert max(map(len, text)) <= columns


def text_of_tests(command):
    """The text of every test that names the command."""
    pages = [p.read_text() for p in Path(__file__).parent.glob("test_*.py")]
    return "\n".join(page for page in pages if f'"{command}"' in page)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (name, max(parameter.opts, key=len))
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.param_type_name == "option" and "--help" not in parameter.opts
    ],
)
def test_option_is_tested(command, option):
    names = (option, "-o") if option == "--output" else (option,)
    assert any(f'"{name}"' in text_of_tests(command) for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_an_option_does(command):
    for parameter in COMMANDS[command].params:
        if "--help" not in parameter.opts:
            assert parameter.help, parameter.name
