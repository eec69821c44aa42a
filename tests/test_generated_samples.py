# SPDX-License-Identifier: Apache-2.0
"""Training samples that the float model writes, and the training that takes them."""

import dataclasses

import pytest
import torch
from finetune_cases import CONFIG, Setting
from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.errors import UserError
from prefixquant.finetune import EndToEnd, Learned, generate_samples
from prefixquant.quantize import quantize
from tiny_families import FAMILIES, tiny_family
from tiny_model import byte_tokenizer

TEXT = torch.randint(2, 97, (6, 300), generator=torch.Generator().manual_seed(3))


def generate(model, prefix=(3,), count=3, seed=0, text=TEXT):
    return generate_samples(model, text, prefix, count, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_continue_places_of_the_text(family):
    samples = generate(tiny_family(family))
    assert samples.shape == (3, 300)
    assert samples.dtype == torch.int64
    windows = {tuple(w) for w in TEXT.unfold(1, 64, 1).flatten(0, 1).tolist()}
    pieces = samples.flatten()[: 7 * 128].view(7, 128)
    for piece in pieces.tolist():
        assert tuple(piece[:64]) in windows
        assert tuple(piece[64:]) not in windows
    # Tokens 0 and 1 begin and end texts.
    assert not (samples < 2).any()


def test_samples_are_drawn_from_the_model_behind_its_prefix():
    """What follows a beginning is as likely as the float model says: one draw from it."""
    model = tiny_family("llama")
    text = TEXT[:1, :3]  # pieces of three tokens: one begins, two are drawn
    samples = generate(model, (3, 5), 4000, text=text)
    assert samples.shape == (4000, 3)
    for first in text[0].unique():
        rows = samples[samples[:, 0] == first]
        prompt = torch.tensor([[3, 5, int(first)]])
        logits = model(prompt).logits[0, -1]
        logits[:2] = -torch.inf  # the ends are not drawn
        expected = logits.softmax(-1)
        found = torch.bincount(rows[:, 1], minlength=97) / len(rows)
        deviation = (expected * (1 - expected) / len(rows)).sqrt()
        assert ((found - expected).abs() <= 5 * deviation + 1e-3).all()


def test_the_seed_decides_and_the_callers_random_numbers_stay():
    model = tiny_family("llama")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = generate(model, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert torch.equal(generate(model, seed=4), first)
    assert not torch.equal(generate(model, seed=5), first)


def test_what_the_model_was_told_about_sampling_does_not_matter():
    """A generation config of its own (greedy, few tokens, penalties) is for chats."""
    plain, told = tiny_family("llama"), tiny_family("llama")
    told.generation_config.update(top_k=1, temperature=0.1, top_p=0.2, repetition_penalty=3.0)
    told.generation_config.eos_token_id = [1, 7]
    drawn = generate(told).flatten()[: 7 * 128].view(7, 128)[:, 64:]
    assert not (drawn == 7).any()
    told.generation_config.eos_token_id = 1
    assert torch.equal(generate(told), generate(plain))


def test_progress_counts_every_sample(monkeypatch):
    from prefixquant.finetune import generated

    monkeypatch.setattr(generated, "_CACHE_BYTES", 1)  # a piece at a time
    told = []
    generate_samples(tiny_family("llama"), TEXT, (), 3, 0, told.append)
    assert len(told) == 8
    assert sum(told) == 3


def training(config: FinetuneConfig, generated: torch.Tensor) -> tuple[Setting, EndToEnd]:
    setting = Setting()
    return setting, setting.end_to_end(config, Learned(True), generated)[0]


def test_every_epoch_trains_on_other_generated_samples():
    config = dataclasses.replace(CONFIG, e2e_epochs=3)
    # Tokens that the text does not have say which samples an epoch took: 8 of its 16, in turn.
    generated = torch.arange(85, 97)[:, None].expand(12, 24)
    setting, end_to_end = training(config, generated)
    setting.ids.clamp_(max=84)
    held_out = end_to_end.embedded.values[16:].clone()
    placed = []
    end_to_end._place = lambda samples: placed.append(samples.clone())
    end_to_end.run()
    *epochs, last = placed
    assert len(epochs) == 3
    assert torch.equal(last, setting.ids[:16])
    assert torch.equal(end_to_end.embedded.values[16:], held_out)
    for epoch, samples in enumerate(epochs):
        assert samples.shape == (16, 24)
        expected = sorted(85 + index % 12 for index in range(8 * epoch, 8 * epoch + 8))
        assert samples[samples > 84].sort().values.view(8, 24)[:, 0].tolist() == expected


def test_one_sample_to_train_on_stays_that_of_the_text():
    config = dataclasses.replace(CONFIG, e2e_epochs=1, validation_samples=19)
    setting, end_to_end = training(config, torch.full((3, 24), 5))
    placed = []
    end_to_end._place = lambda samples: placed.append(samples.clone())
    end_to_end.run()
    assert placed[0].sort().values.tolist() == setting.ids[:1].sort().values.tolist()


def test_a_wrong_number_is_named():
    with pytest.raises(UserError, match="e2e_generated: expected at least 0, got -1"):
        FinetuneConfig(e2e_generated=-1)


def test_quantize_writes_samples_and_trains_on_them():
    tuning = FinetuneConfig(e2e_epochs=1, samples=12, seqlen=32, validation_samples=4, e2e_mix=True)
    recipe = RecipeConfig(
        Scheme(4, 8, 8), prefix="text:ab", nsamples=2, seqlen=16, search_samples=4, search_seqlen=16
    )
    calibration = torch.randint(2, 97, (800,), generator=torch.Generator().manual_seed(1))

    def run(generated: int):
        finetune = dataclasses.replace(tuning, e2e_generated=generated)
        changed = dataclasses.replace(recipe, finetune=finetune)
        return quantize(tiny_family("llama"), byte_tokenizer(), changed, calibration)

    first, again, without = run(6), run(6), run(0)
    assert first.report["stage_seconds"]["generate_samples"] > 0
    assert all(torch.equal(t, again.tensors[n]) for n, t in first.tensors.items())
    losses = [r.report["end_to_end"]["training_loss"] for r in (first, again, without)]
    assert losses[0] == losses[1] != losses[2]
