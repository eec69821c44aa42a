# SPDX-License-Identifier: Apache-2.0
"""`prefixquant quantize` as a process that fails or is killed, and goes on with --resume: the
checkpoint is that of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from prefixquant.checkpoint import is_prefixquant_checkpoint, read_checkpoint
from prefixquant.errors import UserError
from prefixquant.loading import load_float_model
from prefixquant.prefix import search_prefix
from prefixquant.resume import BlockState, _decode_search, _encode_search, state_folder
from test_cli import SMALL, assert_one_line_error, run
from tiny_model import save_tiny_llama

BLOCKS = 4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("resume") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    result = run("quantize", model_folder, "-o", out, *SMALL)
    assert result.exit_code == 0, result.stderr
    return out


def assert_same_checkpoint(folder, expected):
    names = {p.name for p in expected.iterdir()}
    assert {p.name for p in folder.iterdir()} == names
    for name in names - {"report.json", "report.html", "README.md"}:  # these tell the time
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    tell_time = ("time", "seconds", "stage_seconds", "peak_memory_bytes", "command_line")
    reports = [json.loads((f / "report.json").read_text()) for f in (folder, expected)]
    for report in reports:
        for key in tell_time:
            del report[key]
    assert reports[0] == reports[1]


class InterruptedRunError(Exception):
    pass


def run_interrupted(blocks, *arguments):
    """The run fails when it has kept ``blocks`` blocks."""
    save = BlockState.save

    def failing(self, index, *arguments):
        if index == blocks:
            raise InterruptedRunError
        save(self, index, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockState, "save", failing)
        with pytest.raises(InterruptedRunError):
            run(*arguments)


@pytest.mark.parametrize("blocks", [0, BLOCKS - 1])
def test_resume_after_a_failure(model_folder, undisturbed, tmp_path, monkeypatch, blocks):
    out = tmp_path / "out"
    arguments = ["quantize", model_folder, "-o", out, *SMALL]
    run_interrupted(blocks, *arguments)
    assert [p.name for p in tmp_path.iterdir()] == [".out.resume"]
    assert not is_prefixquant_checkpoint(state_folder(out))

    assert_one_line_error(run(*arguments), "unfinished run", "--resume", "--overwrite")
    for changes, words in (
        (["--scheme", "w4a8kv4"], ["another recipe"]),
        (["--calib", __file__[:-2] + "txt"], ["no such file"]),
        (["--seed", "1"], ["another recipe"]),
    ):
        assert_one_line_error(run(*arguments, "--resume", *changes), *words)

    scanned = []
    with monkeypatch.context() as patch:
        patch.setattr("prefixquant.quantize.find_prefix", lambda *a: scanned.append(a))
        result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    assert not scanned
    assert_same_checkpoint(out, undisturbed)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failing_to_write_costs_nothing(model_folder, undisturbed, tmp_path, monkeypatch):
    """A full disk at the very end: the next run only writes."""
    out = tmp_path / "out"
    arguments = ["quantize", model_folder, "-o", out, *SMALL]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(out))

    with monkeypatch.context() as patch:
        patch.setattr("prefixquant.workflow.write_checkpoint", full)
        assert_one_line_error(run(*arguments), "No space left on device")
    monkeypatch.setattr("prefixquant.block_pipeline.calibrate_block", None)  # not called again
    assert run(*arguments, "--resume").exit_code == 0
    assert_same_checkpoint(out, undisturbed)


def test_overwrite_starts_anew(model_folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    run_interrupted(2, "quantize", model_folder, "-o", out, *SMALL, "--seed", "3")
    assert run("quantize", model_folder, "-o", out, *SMALL, "--overwrite").exit_code == 0
    assert_same_checkpoint(out, undisturbed)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resume_of_a_finished_run(model_folder, undisturbed, tmp_path):
    """Killed between the rename and the end: the checkpoint stands, the state is still there."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    state_folder(out).mkdir()
    (state_folder(out) / "run.json").write_text("{}")  # of whatever run
    arguments = ["quantize", model_folder, "-o", out, *SMALL, "--resume"]
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((undisturbed / "report.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    # Another recipe's checkpoint is not taken for it, nor overwritten.
    assert_one_line_error(run(*arguments, "--seed", "9"), "not empty")


def test_two_runs_on_one_output(tmp_path):
    state = BlockState(tmp_path / "s", {"recipe": "a"}, resume=False)
    state._begin()
    with pytest.raises(UserError, match="another run is working"):
        BlockState(tmp_path / "s", {"recipe": "a"}, resume=True)
    state.release()
    BlockState(tmp_path / "s", {"recipe": "a"}, resume=True)


def test_the_search_survives_json(model_folder):
    model, tokenizer = load_float_model(str(model_folder), torch.float32)
    search = search_prefix(model, tokenizer, torch.randint(0, 258, (3, 24)), eta=1.5)
    assert search.steps[0].quantized.tokens  # something to lose
    again = _decode_search(json.loads(json.dumps(_encode_search(search))))
    assert again == search
    assert again.to_dict(tokenizer) == search.to_dict(tokenizer)


# ---------------------------------------------------------------------------- kill -9


def start(model_folder, out, *arguments):
    command = [sys.executable, "-m", "prefixquant.cli", "quantize", model_folder, "-o", out]
    return subprocess.Popen(
        [*map(str, command), *SMALL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_and_resume(model_folder, out, wait):
    """Starts a run, kills it after ``wait(process)`` and goes on; returns how far it had come."""
    process = start(model_folder, out)
    wait(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    names = [p.name for p in state_folder(out).iterdir()] if state_folder(out).exists() else []
    if out.exists():  # only ever whole
        read_checkpoint(out)
    for entry in out.parent.iterdir():
        assert entry == out or not is_prefixquant_checkpoint(entry) or entry.suffix == ".partial"
    process = start(model_folder, out, "--resume")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "\x1b" not in stdout + stderr  # plain lines: this is no terminal
    assert "\r" not in stdout + stderr
    return sum(name.startswith("block-") for name in names)


def wait_for_blocks(out, count):
    def wait(process):
        block = state_folder(out) / f"block-{count:05d}.safetensors"
        while not block.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)

    return wait


def wait_for_time(seconds, after=lambda process: None):
    def wait(process):
        after(process)
        time.sleep(seconds)

    return wait


def test_kill_9_while_blocks_are_made(model_folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert kill_and_resume(model_folder, out, wait_for_blocks(out, 2)) >= 2
    assert_same_checkpoint(out, undisturbed)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_kill_9_at_random_moments(model_folder, undisturbed, tmp_path):
    started = time.monotonic()
    process = start(model_folder, tmp_path / "whole")
    process.communicate()
    whole = time.monotonic() - started
    shutil.rmtree(tmp_path / "whole")
    moments = random.Random(0)
    come = []
    for attempt in range(20):
        out = tmp_path / f"out{attempt}"
        if attempt % 2:
            wait = wait_for_time(moments.random() * whole)
        else:  # while blocks are made and kept, which is a small part of a tiny model's time
            block = wait_for_blocks(out, moments.randrange(BLOCKS))
            wait = wait_for_time(0.05 * moments.random(), after=block)
        come.append(kill_and_resume(model_folder, out, wait))
        assert_same_checkpoint(out, undisturbed)
        assert [p.name for p in tmp_path.iterdir()] == [out.name]
        shutil.rmtree(out)
    assert max(come) > 0, come  # some were killed in the midst
    assert os.listdir(tmp_path) == []
