# SPDX-License-Identifier: Apache-2.0
"""Runs that are interrupted and continued, and the state they leave."""

import dataclasses
import json

import pytest
import torch
from prefixquant import block_pipeline
from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.errors import UserError
from prefixquant.finetune import EndToEnd
from prefixquant.quantize import quantize
from prefixquant.resume import BlockState, run_fingerprint, state_folder
from prefixquant.workflow import block_state
from tiny_families import tiny_family
from tiny_model import byte_tokenizer

RECIPE = RecipeConfig(
    scheme=Scheme(4, 4, 4),
    prefix="bos",
    nsamples=2,
    seqlen=16,
    search_samples=4,
    search_seqlen=16,
    finetune=FinetuneConfig(epochs=2, samples=12, seqlen=16, validation_samples=4),
)
PLAIN = dataclasses.replace(RECIPE, finetune=FinetuneConfig())
END_TO_END = dataclasses.replace(
    RECIPE, finetune=dataclasses.replace(RECIPE.finetune, e2e_epochs=2, e2e_prefix=True)
)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def model():
    return tiny_family("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 97, (600,), generator=torch.Generator().manual_seed(3))


def run(model, text, recipe, state=None):
    return quantize(model, byte_tokenizer(), recipe, text, state=state)


def same_tensors(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("recipe", [PLAIN, RECIPE, END_TO_END], ids=["plain", "blocks", "e2e"])
@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_run_killed_at_any_block_ends_at_the_same_bits(
    model, text, recipe, killed_at, tmp_path, monkeypatch
):
    undisturbed = run(model, text, recipe).tensors
    fingerprint = run_fingerprint(model, recipe, text)
    make = block_pipeline.BlockPipeline._make

    def killed(self, index, *rest):
        if index == killed_at:
            raise Killed
        return make(self, index, *rest)

    monkeypatch.setattr(block_pipeline.BlockPipeline, "_make", killed)
    with pytest.raises(Killed):
        run(model, text, recipe, BlockState(tmp_path / "s", fingerprint, resume=False))
    made = []

    def recorded(self, index, *rest):
        made.append(index)
        return make(self, index, *rest)

    monkeypatch.setattr(block_pipeline.BlockPipeline, "_make", recorded)
    resumed = run(model, text, recipe, BlockState(tmp_path / "s", fingerprint, resume=True))
    assert made == list(range(killed_at, 3))
    assert same_tensors(resumed.tensors, undisturbed)
    assert [b["block"] for b in resumed.report["blocks"]] == [0, 1, 2]


def test_a_run_killed_while_it_trains_end_to_end_ends_at_the_same_bits(
    model, text, tmp_path, monkeypatch
):
    undisturbed = run(model, text, END_TO_END).tensors
    fingerprint = run_fingerprint(model, END_TO_END, text)
    validate, calls = EndToEnd._validate, []

    def killed(self):
        calls.append(1)
        if len(calls) == 3:  # after the first epoch
            raise Killed
        return validate(self)

    monkeypatch.setattr(EndToEnd, "_validate", killed)
    with pytest.raises(Killed):
        run(model, text, END_TO_END, BlockState(tmp_path / "s", fingerprint, resume=False))
    resumed = run(model, text, END_TO_END, BlockState(tmp_path / "s", fingerprint, resume=True))
    assert same_tensors(resumed.tensors, undisturbed)


def test_no_epochs_are_no_fine_tuning_bit_for_bit(model, text):
    nothing = dataclasses.replace(RECIPE, finetune=FinetuneConfig(samples=12, seqlen=16))
    assert same_tensors(run(model, text, nothing).tensors, run(model, text, PLAIN).tensors)
    assert not same_tensors(run(model, text, RECIPE).tensors, run(model, text, PLAIN).tensors)


@pytest.mark.parametrize("changed", ["model", "calibration text", "recipe"])
def test_a_state_of_another_run_is_refused(model, text, changed, tmp_path):
    first = run_fingerprint(model, RECIPE, text)
    run(model, text, PLAIN, BlockState(tmp_path / "s", first, resume=False))
    if changed == "model":
        other = tiny_family("llama", num_hidden_layers=3)
        next(other.parameters()).data[0, 0] += 1e-3
        second = run_fingerprint(other, RECIPE, text)
    elif changed == "recipe":
        second = run_fingerprint(model, dataclasses.replace(RECIPE, seed=1), text)
    else:
        second = run_fingerprint(model, RECIPE, text.roll(1))
    with pytest.raises(UserError, match=f"another {changed}"):
        BlockState(tmp_path / "s", second, resume=True)
    BlockState(tmp_path / "s", first, resume=True)


def test_an_unfinished_run_is_not_overwritten_by_accident(model, text, tmp_path):
    output = tmp_path / "out"
    arguments = (model, RECIPE, text, output)
    run(model, text, RECIPE, block_state(*arguments, resume=False, overwrite=False))
    with pytest.raises(UserError, match="--resume"):
        block_state(*arguments, resume=False, overwrite=False)
    assert (state_folder(output) / "block-00000.safetensors").exists()
    block_state(*arguments, resume=False, overwrite=True)
    assert not state_folder(output).exists()


@pytest.mark.parametrize("damage", ["truncated", "not safetensors", "no metadata"])
def test_a_damaged_block_is_named(model, text, damage, tmp_path):
    from safetensors.torch import save_file

    state = BlockState(tmp_path / "s", run_fingerprint(model, PLAIN, text), resume=False)
    run(model, text, PLAIN, state)
    path = tmp_path / "s" / "block-00001.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "not safetensors":
        path.write_bytes(b"\0" * 99)
    else:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"block-00001\.safetensors: damaged"):
        run(model, text, PLAIN, state)


def test_a_damaged_description_is_named(model, text, tmp_path):
    fingerprint = run_fingerprint(model, PLAIN, text)
    run(model, text, PLAIN, BlockState(tmp_path / "s", fingerprint, resume=False))
    (tmp_path / "s" / "run.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"run\.json: damaged"):
        BlockState(tmp_path / "s", fingerprint, resume=True)


def test_nothing_of_a_state_is_a_checkpoint(model, text, tmp_path):
    from prefixquant.checkpoint import is_prefixquant_checkpoint

    state = BlockState(tmp_path / "s", run_fingerprint(model, PLAIN, text), resume=False)
    run(model, text, PLAIN, state)
    names = sorted(p.name for p in (tmp_path / "s").iterdir())
    assert names == [f"block-0000{i}.safetensors" for i in range(3)] + ["run.json", "search.json"]
    assert not is_prefixquant_checkpoint(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "run.json").read_text())["recipe"]


def test_a_resumed_run_also_takes_an_empty_folder(model, text, tmp_path):
    state = BlockState(tmp_path / "s", run_fingerprint(model, PLAIN, text), resume=True)
    assert same_tensors(run(model, text, PLAIN, state).tensors, run(model, text, PLAIN).tensors)
