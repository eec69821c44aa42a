# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are written, and the documentation names commands that exist."""

import re
import runpy
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import typer
from prefixquant.cli import app
from test_cli import SMALL, run
from tiny_model import save_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with path/to/model and model-w4a4kv4, as the quickstart names them."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "path" / "to").mkdir(parents=True)
    model = save_tiny_llama(folder / "path" / "to" / "model")
    result = run("quantize", model, "-o", folder / "model-w4a4kv4", *SMALL)
    assert result.exit_code == 0, result.stderr
    return folder


def run_example(monkeypatch, folder, name, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_generate(monkeypatch, folder, capsys):
    run_example(monkeypatch, folder, "generate.py", "model-w4a4kv4", 3)
    lines = capsys.readouterr().out
    assert lines.count("greedy: ") == 2
    assert lines.count("3 beams: ") == 2
    assert "The sky is blue because" in lines


def test_plot_outliers(monkeypatch, folder, tmp_path):
    output = tmp_path / "outliers.svg"
    run_example(monkeypatch, folder, "plot_outliers.py", "model-w4a4kv4", output)
    points = ElementTree.parse(output).getroot().findall("{http://www.w3.org/2000/svg}circle")
    assert len(points) == 2 * 32  # without and with the prefix, a window of 32 tokens


def test_quantize_from_python(monkeypatch, folder, tmp_path, capsys):
    output = tmp_path / "out"
    run_example(monkeypatch, folder, "quantize_from_python.py", "path/to/model", output)
    assert "top-1 agreement" in capsys.readouterr().out
    assert (output / "recipe.yaml").read_text().count("w4a8kv4") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_every_example_is_tested():
    here = Path(__file__).read_text() + (ROOT / "tests" / "test_serve.py").read_text()
    by_make = {"demo.py"}  # `make demo`, minutes
    for example in (ROOT / "examples").glob("*.py"):
        assert example.name in by_make or f'"{example.name}"' in here


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_quickstart_code_runs(monkeypatch, folder):
    monkeypatch.chdir(folder)
    code = blocks(ROOT / "docs" / "quickstart.md", "python")
    assert len(code) == 2
    for block in code:
        exec(compile(block, "quickstart.md", "exec"), {})
    assert (folder / "copy" / "config.json").exists()


COMMANDS = [
    (page.name, line.split("#")[0].strip())
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("prefixquant ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_of_the_documentation_exist(page, line):
    """They parse: the command, every option and the number of arguments."""
    _, name, *arguments = shlex.split(line.rstrip("&"))
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments, resilient_parsing=False)
