# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: gradients of the quantizer, the learned block, Block-AP and end-to-end training."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from prefixquant import ops
from prefixquant.block import PrefixKV, block_forward
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.counted import Counted
from prefixquant.decoder import compute_device, place_model
from prefixquant.decoder_setup import make_decoder
from prefixquant.errors import UserError
from prefixquant.finetune import BlockTuner, EndToEnd, Learned, LearnedBlock, Teacher
from prefixquant.finetune.activations import ActivationStore
from prefixquant.finetune.end_to_end import DistillationLoss
from prefixquant.finetune.training import (
    RunningMean,
    Schedule,
    Stepper,
    Task,
    rate_factor,
    train,
)
from prefixquant.quantizer import (
    _rounded,
    _rounded_at_once,
    fake_quantize,
    fake_quantize_dynamic,
    qrange,
)
from prefixquant.roles import model_geometry
from prefixquant.rotate import plan_rotations
from tiny_families import tiny_family

CONFIG = FinetuneConfig(
    epochs=4,
    e2e_epochs=3,
    samples=20,
    seqlen=24,
    validation_samples=4,
    e2e_weight_rate=1e-4,
    e2e_scale_rate=5e-4,
)


class Setting:
    """A tiny model with its first block calibrated."""

    def __init__(self, family: str = "llama", scheme: str = "w4a4kv4", samples: int = 20):
        model = tiny_family(family)
        self.ids = torch.randint(0, 97, (samples, 24), generator=torch.Generator().manual_seed(5))
        self.scheme = Scheme.parse(scheme)
        recipe = RecipeConfig(scheme=self.scheme)
        plan = plan_rotations(model_geometry(model.config), **recipe.rotation_options)
        self.decoder = make_decoder(model, plan, self.ids, (3,), recipe)
        self.prefix = self.decoder.prefix((3,))
        start = self.decoder.embed(self.ids[:4])
        self.streams = Streams(start, start.clone())

    def counted(self, prefix_length: int) -> Counted:
        return Counted(self.ids.shape, prefix_length, 64.0, self.decoder.device)

    def calibrated(self, index: int):
        """(float block, calibrated block); the streams move past it."""
        original = self.decoder.block(index)
        with torch.no_grad():
            block = calibrate_block(
                original,
                self.decoder.shape,
                self.scheme,
                self.decoder.rope(24),
                self.prefix[index],
                self.streams,
            )
        return original, block

    def tuner(self, config: FinetuneConfig = CONFIG) -> BlockTuner:
        with torch.no_grad():
            return BlockTuner(self.decoder, self.ids, self.counted(1), config, seed=7)

    def end_to_end(
        self, config: FinetuneConfig, learned: Learned, generated: torch.Tensor | None = None
    ) -> tuple[EndToEnd, LearnedBlock]:
        """Training end to end of the first block alone, with what it trains."""
        tuner = self.tuner(config)
        original, block = self.calibrated(0)
        with torch.no_grad():
            tuner.advance_float(original, self.prefix[0])
        trained = LearnedBlock(block, original, self.prefix[0], learned)
        teacher = Teacher.of(tuner.floating, self.decoder, (3,))
        with torch.no_grad():
            training = EndToEnd(self.decoder, [trained], self.ids, teacher, config, 0, generated)
        return training, trained


def same_block(a, b) -> bool:
    scales = [(a.scales.k, b.scales.k), (a.scales.v, b.scales.v)]
    scales += [(s, b.scales.activations[p]) for p, s in a.scales.activations.items()]
    weights = [(w.q, b.weights[r].q) for r, w in a.weights.items()]
    weights += [(w.scale, b.weights[r].scale) for r, w in a.weights.items()]
    return all(torch.equal(x, y) for x, y in scales + weights if x is not None)


# ---------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(), (5, 1), (3, 1, 1)])
def test_quantizer_gradients_follow_the_lsq_formula(bits, shape):
    x = (torch.randn(3, 5, 64) * 3).requires_grad_()
    scale = (torch.rand(shape) * 4 / 2**bits + 0.05).requires_grad_()
    out = fake_quantize(x, scale, bits)
    outer = torch.randn_like(out)
    out.backward(outer)

    qmin, qmax = qrange(bits)
    v = (x / scale).detach().double()
    rounded = v.round()
    inside = (rounded >= qmin) & (rounded <= qmax)
    assert inside.any()
    assert not inside.all()
    assert torch.equal(x.grad, outer * inside)
    local = torch.where(inside, rounded - v, rounded.clamp(qmin, qmax))
    expected = (outer.double() * local).sum_to_size(scale.shape)
    assert torch.allclose(scale.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_quantizer_gradients_are_finite_differences_where_rounding_is_the_identity():
    """Without its rounding the quantizer is ``clamp(v, qmin, qmax) * s`` plus the rounding error,
    which straight-through holds constant in steps: differences of that are the gradients."""
    x = torch.randn(200, dtype=torch.float64) * 3
    scale, step = torch.tensor(0.31, dtype=torch.float64), 1e-6
    qmin, qmax = qrange(4)
    start = x / scale
    rounded = start.round()
    offset = rounded - start  # of each value, in steps

    def surrogate(values, s):
        q = values / s + offset
        return torch.where((rounded >= qmin) & (rounded <= qmax), q, q.clamp(qmin, qmax)) * s

    by_scale = (surrogate(x, scale + step) - surrogate(x, scale - step)) / (2 * step)
    by_value = (surrogate(x + step, scale) - surrogate(x - step, scale)) / (2 * step)
    leaf, s = x.float().requires_grad_(), scale.float().requires_grad_()
    out = fake_quantize(leaf, s, 4)
    for index in range(0, 200, 9):
        grad_x, grad_s = torch.autograd.grad(out[index], (leaf, s), retain_graph=True)
        assert grad_x[index].item() == pytest.approx(by_value[index].item(), abs=1e-4)
        assert grad_s.item() == pytest.approx(by_scale[index].item(), abs=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (3, 1, 1), (3, 5, 1)])
def test_quantizer_gives_the_same_values_with_and_without_gradients(shape, dtype, bits):
    x, scale = torch.randn(3, 5, 64) * 3, torch.rand(shape) * 4 / 2**bits + 0.05
    # Ties between levels, and the ends of the range.
    ties = torch.arange(-(2**bits), 2**bits, 0.5)[:64]
    x[:, :, : len(ties)] = ties * scale.expand(3, 5, 1) if shape else ties * scale
    x = x.to(dtype)
    plain = fake_quantize(x, scale, bits)
    found = fake_quantize(x.clone().requires_grad_(), scale, bits)
    assert found.dtype == dtype
    assert torch.equal(found, plain)
    at_once = _rounded_at_once(x, scale, bits)  # training's way on a GPU
    assert (at_once is None) == (len(shape) == 3 and shape[1] > 1)
    if at_once is not None:
        assert all(map(torch.equal, at_once, _rounded(x, scale, bits)))


def test_quantizer_gradients_of_16_bit_activations_are_those_of_32():
    x, outer = (torch.randn(40, 500).bfloat16() for _ in range(2))
    for scale in (torch.tensor(0.4), torch.rand(40, 1) + 0.2):
        gradients = []
        for dtype in (torch.float32, torch.bfloat16):
            leaf = x.detach().to(dtype, copy=True).requires_grad_()
            s = scale.clone().requires_grad_()
            fake_quantize(leaf, s, 4).backward(outer.to(dtype))
            gradients.append((leaf.grad.float(), s.grad))
        (by_x, by_scale), (low_by_x, low_by_scale) = gradients
        assert torch.equal(by_x, low_by_x)
        assert (low_by_scale - by_scale).norm() < 1e-5 * by_scale.norm()


def test_distillation_loss_is_the_kl_divergence_with_its_gradient():
    hidden = torch.randn(37, 12, requires_grad=True)
    teacher, head = torch.randn(37, 12), torch.randn(50, 12)
    loss = DistillationLoss.apply(hidden, teacher, head)
    (3 * loss).backward()
    copy = hidden.detach().double().requires_grad_()
    q = (copy @ head.double().T).log_softmax(-1)
    p = (teacher.double() @ head.double().T).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(hidden.grad.double(), copy.grad, atol=1e-6)
    same = DistillationLoss.apply(teacher, teacher, head)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_dynamic_quantization_is_the_operation_with_a_learnable_clip():
    x = torch.randn(6, 40)
    x[2] = 0
    x[4] *= 1000
    clip = torch.tensor(0.8, requires_grad=True)
    out = fake_quantize_dynamic(x, clip, 4)
    q, scale = ops.quantize_dynamic(x, 4, clip.item())
    assert torch.equal(out, q * scale[:, None])
    out.square().sum().backward()
    assert clip.grad.abs() > 0


# ---------------------------------------------------------------------------- learned block


@pytest.mark.parametrize(
    "scheme", ["w4a4kv4", "w4a8kv8", "w8a8kv16", "w4a16kv4", "w4a4dkv4d", "w4a4ckv4"]
)
@pytest.mark.parametrize("weights", [True, False])
def test_a_learned_block_starts_as_it_was_calibrated(scheme, weights):
    setting = Setting("qwen3", scheme)
    original, block = setting.calibrated(0)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned(weights, True, True))
    frozen, prefix = learned.freeze()
    assert same_block(frozen, block)
    assert torch.equal(prefix.key, setting.prefix[0].key)
    weights_now, scales, _ = learned.materialize()
    x = setting.decoder.embed(setting.ids[:2])
    arguments = (setting.decoder.shape, x, setting.decoder.rope(24), setting.prefix[0])
    expected = block_forward(block.simulated, *arguments, block.scales)
    found = block_forward(weights_now, *arguments, scales)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_companded_biases_are_trained_in_units_of_the_same_size():
    """The scale itself is that of 8 bits."""
    units = {}
    for scheme in ("w4a4kv4", "w4a4ckv4"):
        setting = Setting("llama", scheme)
        original, block = setting.calibrated(0)
        learned = LearnedBlock(block, original, setting.prefix[0], Learned())
        units[scheme] = torch.cat([learned.get_buffer(f"bias_unit_{r}") for r in learned.biases])
    ratio = units["w4a4ckv4"] / units["w4a4kv4"]
    assert ratio.min() > 0.7
    assert ratio.max() < 2


def test_integers_of_a_solver_survive_the_latent_weights():
    """A solver may round a weight to another neighbour than the nearest."""
    setting = Setting()
    original, block = setting.calibrated(0)
    for solved in block.weights.values():
        moved = torch.randint(-1, 2, solved.q.shape, dtype=torch.int8)
        solved.q = (solved.q + moved).clamp_(-8, 7)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned())
    assert same_block(learned.freeze()[0], block)


def test_every_learned_tensor_gets_a_gradient():
    setting = Setting("qwen3")
    original, block = setting.calibrated(0)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned(True, True, True))
    weights, scales, prefix = learned.materialize()
    x = setting.decoder.embed(setting.ids[:2])
    out = block_forward(weights, setting.decoder.shape, x, setting.decoder.rope(24), prefix, scales)
    out.square().sum().backward()
    for name, parameter in learned.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_frozen_block_stays_when_the_next_takes_its_place(family):
    setting = Setting(family)
    original, block = setting.calibrated(0)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned())
    frozen, prefix = learned.freeze()
    kept = copy.deepcopy((frozen, prefix))
    with torch.no_grad():
        for tensor in (*learned.parameters(), *learned.buffers()):
            tensor.add_(1)
    assert same_block(frozen, kept[0])
    assert torch.equal(prefix.key, kept[1].key)
    for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
        mine, theirs = (getattr(b.simulated, name) for b in (frozen, kept[0]))
        assert mine is theirs is None or torch.equal(mine, theirs)
    for name in ("biases", "shifts"):
        mine, theirs = (getattr(b.simulated, name) for b in (frozen, kept[0]))
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] is value is None or torch.equal(mine[key], value)


def test_heads_keep_one_scale_at_8_bits():
    setting = Setting("llama", "w4a8kv8")
    original, block = setting.calibrated(0)
    block.scales.k = block.scales.k.expand(3).contiguous()  # as if there were three heads
    block.scales.v = block.scales.v.expand(3).contiguous()
    learned = LearnedBlock(block, original, setting.prefix[0], Learned())
    with torch.no_grad():
        learned.scale_theta += torch.randn_like(learned.scale_theta)
    scales = learned.freeze()[0].scales
    assert scales.k.shape == scales.v.shape == (3,)
    assert (scales.k == scales.k[0]).all()
    assert not torch.equal(scales.k, block.scales.k)


def test_grouped_scales_are_refused():
    setting = Setting()
    original, block = setting.calibrated(0)
    block.weights["q"].scale = block.weights["q"].scale[:, None].repeat(1, 2)
    with pytest.raises(UserError, match="one scale a channel"):
        LearnedBlock(block, original, setting.prefix[0], Learned())


# ---------------------------------------------------------------------------- training


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
