# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: Block-AP and training end to end."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from finetune_cases import CONFIG, Setting, same_block
from prefixquant.block import PrefixKV, block_forward
from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.decoder import compute_device, place_model
from prefixquant.errors import UserError
from prefixquant.finetune import BlockTuner, EndToEnd, Learned, LearnedBlock, Teacher
from prefixquant.finetune.activations import ActivationStore
from prefixquant.finetune.training import (
    RunningMean,
    Schedule,
    Stepper,
    Task,
    rate_factor,
    train,
)
from tiny_families import tiny_family


def test_training_keeps_the_best_of_validation():
    losses = iter([5.0, 4.0, 6.0, 3.0, 7.0, 8.0])
    value = torch.zeros(())

    class Steps:
        total = torch.zeros(())

        def step(self, factor):
            value.add_(1)

    log = train(
        Steps(),
        Schedule(5, 8, 4, 2, torch.device("cpu")),
        torch.Generator(),
        Task(lambda rows: None, lambda: next(losses), value.clone, value.copy_),
    )
    assert value == 3 * 2  # two batches in each of three epochs
    assert log.best_epoch == 3
    assert log.validation == [5.0, 4.0, 6.0, 3.0, 7.0, 8.0]


def test_the_rate_rises_then_falls_to_a_tenth():
    factors = [rate_factor(step, 200) for step in range(200)]
    assert factors[0] == pytest.approx(0.1, rel=0.01)
    assert max(factors) == factors[9] > 0.98
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, rel=0.01)


def test_training_stops_when_patience_ends_and_may_keep_the_start():
    losses = iter([1.0, 2.0, 3.0, 0.1])
    value = torch.zeros(())

    class Steps:
        total = torch.zeros(())

        def step(self, factor):
            value.add_(1)

    log = train(
        Steps(),
        Schedule(9, 4, 4, 2, torch.device("cpu")),
        torch.Generator(),
        Task(lambda rows: None, lambda: next(losses), value.clone, value.copy_),
    )
    assert value == 0
    assert log.best_epoch == 0
    assert len(log.training) == 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_block_training_lowers_the_loss(family):
    setting = Setting(family)
    tuner = setting.tuner()
    original, block = setting.calibrated(0)
    tuner.advance_float(original, setting.prefix[0])
    tuned, latents, report = tuner.tune(0, original, block, setting.prefix[0])
    training, validation = report["training_loss"], report["validation_loss"]
    assert training[-1] < 0.98 * training[0]
    best = report["best_epoch"]
    assert validation[best] == min(validation)
    assert same_block(tuned, block) == (best == 0)
    for role, weight in latents.items():
        ratio = (weight / tuned.weights[role].scale[:, None]).round().clamp(-8, 7)
        assert (ratio == tuned.weights[role].q).float().mean() > 0.999, role


def test_position_0_has_no_say_behind_a_prefix():
    setting = Setting()
    original, block = setting.calibrated(0)
    results = []
    for change in (0.0, 1e4):
        tuner = setting.tuner()
        tuner.advance_float(original, setting.prefix[0])
        tuner.floating.values[:, 0] += change
        results.append(tuner.tune(0, original, block, setting.prefix[0])[0])
    assert same_block(*results)


def test_block_training_repeats_bit_for_bit_whatever_came_before():
    setting = Setting()
    original, block = setting.calibrated(0)
    tuner = setting.tuner()
    tuner.advance_float(original, setting.prefix[0])
    first = tuner.tune(1, original, block, setting.prefix[0])[0]
    other = tuner.tune(0, original, block, setting.prefix[0])[0]  # another order of samples
    again = tuner.tune(1, original, block, setting.prefix[0])[0]
    assert same_block(first, again)
    assert not same_block(first, other)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_activations_are_the_same_from_host_and_disk(place, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, activations=place, folder=str(tmp_path))
    setting = Setting()
    original, block = setting.calibrated(0)
    tuned = []
    for tuner in (setting.tuner(dataclasses.replace(CONFIG, epochs=1)), setting.tuner(config)):
        tuner.advance_float(original, setting.prefix[0])
        tuned.append(tuner.tune(0, original, block, setting.prefix[0])[0])
        with torch.no_grad():
            tuner.advance_quantized(tuned[-1], setting.prefix[0])
    assert same_block(*tuned)
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_disk_store_reads_what_was_written(tmp_path):
    store = ActivationStore((5, 3, 2), torch.device("cpu"), "disk", torch.bfloat16, tmp_path)
    values = torch.arange(30).view(5, 3, 2).float()
    store.write(slice(0, 5), values)
    store.advance(lambda rows, x: x + 1)
    assert torch.equal(store.read(torch.tensor([4, 0])), values[[4, 0]] + 1)


@pytest.mark.parametrize("learned", [Learned(False), Learned(False, True, True), Learned(True)])
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_end_to_end_training_lowers_the_divergence(learned, average):
    # Scales alone change little, and 4-bit activations of a random model are noise beside that.
    setting = Setting(scheme="w4a8kv8", samples=64)
    config = dataclasses.replace(
        CONFIG, samples=64, validation_samples=16, e2e_epochs=4, e2e_average=average
    )
    tuner = setting.tuner(config)
    blocks, calibrated = [], []
    for index in range(2):
        original, block = setting.calibrated(index)
        with torch.no_grad():
            tuner.advance_float(original, setting.prefix[index])
        calibrated.append(block)
        start = dataclasses.replace(original, weights=block.targets)
        blocks.append(LearnedBlock(block, start, setting.prefix[index], learned))
    teacher = Teacher.of(tuner.floating, setting.decoder, (3,))
    with torch.no_grad():
        training = EndToEnd(setting.decoder, blocks, setting.ids, teacher, config, 0)
    report = training.run()
    assert min(report["validation_loss"]) < report["validation_loss"][0]
    frozen = [b.freeze()[0] for b in blocks]
    for before, after in zip(calibrated, frozen, strict=True):
        same_integers = all(torch.equal(w.q, before.weights[r].q) for r, w in after.weights.items())
        assert same_integers != learned.weights


def test_a_running_mean_is_validated_and_kept_while_training_goes_on():
    value = torch.nn.Parameter(torch.zeros(3))
    target = torch.tensor([1.0, -2.0, 3.0])
    seen = []

    def validate():
        seen.append(value.detach().clone())
        return float(len(seen) == 1) + 1 / len(seen)  # ever better

    loss = lambda: (value - target).square().sum()  # noqa: E731
    stepper = Stepper([{"params": [value], "lr": 0.1}], loss, torch.device("cpu"), graph=False)
    task = Task(lambda rows: None, validate, value.detach().clone, value.data.copy_)
    schedule = Schedule(3, 4, 2, 3, torch.device("cpu"))
    mean = RunningMean(stepper, 0.75)
    means, expected, plain = [], torch.zeros(3), []
    step = stepper.step

    def counted(factor):
        nonlocal expected
        step(factor)
        plain.append(value.detach().clone())
        expected = 0.75 * expected + 0.25 * plain[-1]
        means.append(expected)

    stepper.step = counted
    train(stepper, schedule, torch.Generator(), task, mean=mean)
    torch.testing.assert_close(torch.stack(seen[1:]), torch.stack(means[1::2]))
    torch.testing.assert_close(value.detach(), means[-1])
    # Training itself goes on from the parameters: the same steps as without a mean.
    other = torch.nn.Parameter(torch.zeros(3))
    loss = lambda: (other - target).square().sum()  # noqa: E731
    alone = Stepper([{"params": [other], "lr": 0.1}], loss, torch.device("cpu"), graph=False)
    for index in range(6):
        alone.step(rate_factor(index, 6))
        assert torch.equal(other, plain[index])


def test_mixed_samples_are_the_same_tokens_in_other_contexts():
    setting = Setting()
    config = dataclasses.replace(CONFIG, e2e_mix=True, e2e_epochs=2)
    training, _ = setting.end_to_end(config, Learned(True))
    teacher = training.teacher
    with torch.no_grad():
        embedded, said = training.embedded.values.clone(), teacher.hidden.values.clone()
        training._mix(torch.Generator().manual_seed(1), 0)
    held_out = slice(16, None)
    assert torch.equal(teacher.hidden.values[held_out], said[held_out])
    assert not torch.equal(teacher.hidden.values, said)
    # Strung together and cut at another place: every token follows its predecessor, or a seam.
    rows = {tuple(row) for row in embedded[:16].flatten(0, 1).tolist()}
    mixed = training.embedded.values[:16].flatten(0, 1)
    assert {tuple(row) for row in mixed.tolist()} == rows
    pairs = {(*a, *b) for sample in embedded[:16].tolist() for a, b in pairwise(sample)}
    kept = [(*a, *b) in pairs for a, b in pairwise(mixed.tolist())]
    assert sum(kept) >= len(kept) - 16
    x = training.embedded.read(slice(0, 4))
    found = teacher.hidden.read(slice(0, 4))
    for decoder, prefix, atol in (
        (teacher.decoder, teacher.prefix[0], 0),
        (setting.decoder, setting.prefix[0], 2e-5),  # the same function, rotated inside
    ):
        expected = block_forward(decoder.block(0), decoder.shape, x, training.rope, prefix)
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    training.run()
    assert torch.equal(training.embedded.values, embedded)
    torch.testing.assert_close(teacher.hidden.values, said)


def test_checkpointing_changes_no_bit():
    results = []
    for checkpointing in (False, True):
        setting = Setting()
        config = dataclasses.replace(CONFIG, checkpointing=checkpointing)
        training, learned = setting.end_to_end(config, Learned(True, True, True))
        training.run()
        results.append(learned.freeze()[0])
    assert same_block(*results)


# ---------------------------------------------------------------------------- large models


def test_a_model_larger_than_the_device_stays_on_the_host(monkeypatch):
    model = tiny_family("llama")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size - 1, 4 * size))
    assert place_model(model, gpu) is model
    assert next(model.parameters()).device.type == "cpu"
    assert compute_device(model) == gpu
    assert compute_device(tiny_family("llama")) == torch.device("cpu")


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epochs": -1}, "epochs"),
        ({"batch": 0}, "batch"),
        ({"samples": 8}, "train_samples"),
        ({"weight_rate": 1.5}, "weight_rate"),
        ({"e2e_average": 1.0}, "e2e_average"),
        ({"activations": "tape"}, "activations"),
    ],
)
def test_wrong_settings_are_named(change, match):
    with pytest.raises(UserError, match=match):
        FinetuneConfig(**change)


@pytest.mark.parametrize(
    "change", [{"solver": "quantease-outlier"}, {"scheme": Scheme(4, 16, 16), "group_size": 32}]
)
def test_what_cannot_be_trained_is_said_before_any_work(change):
    RecipeConfig(**change)
    with pytest.raises(UserError, match="epochs: fine-tuning"):
        RecipeConfig(**change, finetune=CONFIG)


def test_prefix_of_no_tokens():
    """Without prefix every position counts, and there is no prefix to learn."""
    setting = Setting()
    empty = torch.zeros(1, 0, 16)
    setting.prefix = [PrefixKV(empty, empty)] * 2
    original, block = setting.calibrated(0)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned(True, True, True))
    assert not learned.prefix_delta
    with torch.no_grad():
        tuner = BlockTuner(setting.decoder, setting.ids, setting.counted(0), CONFIG, seed=0)
        assert tuner.counted.mask.all()
        tuner.advance_float(original, setting.prefix[0])
    report = tuner.tune(0, original, block, setting.prefix[0])[2]
    assert min(report["validation_loss"]) < report["validation_loss"][0]
