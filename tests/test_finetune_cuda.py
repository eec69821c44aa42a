# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on a GPU: training steps as CUDA graphs, determinism, models kept on the host."""

import dataclasses

import pytest
import torch
from prefixquant.block import PrefixKV
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.config import FinetuneConfig, Scheme
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.finetune import (
    BlockTuner,
    EndToEnd,
    Learned,
    LearnedBlock,
    Teacher,
    generate_samples,
)
from prefixquant.quantizer import fake_quantize
from prefixquant.roles import model_geometry
from prefixquant.rotate import plan_rotations, rotate_last_dim
from tiny_families import tiny_family

pytestmark = pytest.mark.gpu

CONFIG = FinetuneConfig(epochs=3, e2e_epochs=2, samples=20, seqlen=24, validation_samples=4)


def calibrated(model_device: str = "cuda"):
    """(decoder, samples, prefix, float block, calibrated block) of a tiny model's first block."""
    model = tiny_family("llama").to(model_device)
    decoder = FloatDecoder(model, plan_rotations(model_geometry(model.config)), device="cuda")
    ids = torch.randint(0, 97, (20, 24), generator=torch.Generator().manual_seed(5))
    prefix: PrefixKV = decoder.prefix((3,))[0]
    start = decoder.embed(ids[:4])
    original = decoder.block(0)
    with torch.no_grad():
        block = calibrate_block(
            original,
            decoder.shape,
            Scheme(4, 4, 4),
            decoder.rope(24),
            prefix,
            Streams(start, start.clone()),
        )
    return decoder, ids, prefix, original, block


def tuned(setting, config: FinetuneConfig):
    decoder, ids, prefix, original, block = setting
    with torch.no_grad():
        counted = Counted(ids.shape, 1, 64.0, decoder.device)
        tuner = BlockTuner(decoder, ids, counted, config, seed=7)
        tuner.advance_float(original, prefix)
    first, _, report = tuner.tune(0, original, block, prefix)
    return tuner, first, report


def trained_end_to_end(setting, config: FinetuneConfig, learned: Learned, generated=None):
    """(the block, the training losses) of training end to end, that block alone."""
    decoder, ids, prefix, original, block = setting
    tuner, _, _ = tuned(setting, config)
    trained = LearnedBlock(block, original, prefix, learned)
    teacher = Teacher.of(tuner.floating, decoder, (3,))
    with torch.no_grad():
        report = EndToEnd(decoder, [trained], ids, teacher, config, 0, generated).run()
    return trained.freeze()[0], report["training_loss"]


def same(a, b) -> bool:
    return all(
        torch.equal(w.q, b.weights[r].q) and torch.equal(w.scale, b.weights[r].scale)
        for r, w in a.weights.items()
    )


def test_a_block_trains_to_the_same_bits_again():
    setting = calibrated()
    _, first, report = tuned(setting, CONFIG)
    tuner, second, _ = tuned(setting, CONFIG)
    assert same(first, second)
    assert same(first, tuner.tune(0, *setting[3:], setting[2])[0])  # the graph of before
    assert report["training_loss"][-1] < report["training_loss"][0]
    assert report["peak_bytes"] > 0


def test_graph_and_eager_steps_train_alike():
    setting = calibrated()
    reports = [
        tuned(setting, dataclasses.replace(CONFIG, graphs=graphs))[2] for graphs in (True, False)
    ]
    for with_graph, eager in zip(*(r["training_loss"] for r in reports), strict=True):
        assert with_graph == pytest.approx(eager, rel=0.02)


def test_streams_on_the_host_train_to_the_same_bits():
    setting = calibrated()
    on_device, on_host = (
        tuned(setting, dataclasses.replace(CONFIG, activations=place))[1]
        for place in ("device", "host")
    )
    assert same(on_device, on_host)


def test_a_model_on_the_host_gives_the_same_block():
    on_device, on_host = calibrated("cuda"), calibrated("cpu")
    for role, weight in on_device[3].weights.items():
        assert torch.allclose(weight, on_host[3].weights[role], atol=1e-5)
    assert on_host[3].weights["q"].device.type == "cuda"
    assert on_host[4].relative_error == pytest.approx(on_device[4].relative_error, rel=0.1)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("mix", [True, False])
def test_end_to_end_training_repeats(weights, checkpointing, mix):
    setting = calibrated()
    average = 0.9 if mix else 0.0
    config = dataclasses.replace(
        CONFIG, checkpointing=checkpointing, e2e_mix=mix, e2e_average=average
    )
    results = []
    for _ in range(2):
        results.append(trained_end_to_end(setting, config, Learned(weights)))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generated_samples_repeat_and_train(dtype):
    setting = calibrated()
    ids = setting[1]
    model = tiny_family("llama").to("cuda", dtype)
    before = torch.cuda.get_rng_state()
    samples = generate_samples(model, ids[:16], (3,), 24, 0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(samples, generate_samples(model, ids[:16], (3,), 24, 0))
    assert samples.device.type == "cpu"
    assert ((samples > 1) & (samples < 97)).sum() > 0.8 * samples.numel()  # 12 of 24 are ids
    assert model.dtype == dtype
    losses = [trained_end_to_end(setting, CONFIG, Learned(True), samples)[1] for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (50, 1), (3, 1, 1), (3, 50, 1)])
def test_training_rounds_as_calibration_does(shape, dtype):
    x = (torch.randn(3, 50, 640, device="cuda") * 3).to(dtype)
    scale = torch.rand(shape, device="cuda") + 0.1
    found = fake_quantize(x.clone().requires_grad_(), scale, 4)
    assert found.dtype == dtype
    assert torch.equal(found, fake_quantize(x, scale, 4))


@pytest.mark.parametrize("size", [64, 96, 576, 1536])
def test_rotations_of_16_bit_products(size):
    x = torch.randn(7, 2 * size, device="cuda", requires_grad=True)
    expected = rotate_last_dim(x, size)
    expected.square().sum().backward()
    gradient, x.grad = x.grad, None
    with torch.autocast("cuda", torch.bfloat16):
        found = rotate_last_dim(x, size)
    assert found.dtype is torch.bfloat16
    found.float().square().sum().backward()
    assert (found - expected).norm() < 0.005 * expected.norm()
    assert (x.grad - gradient).norm() < 0.01 * gradient.norm()


@pytest.mark.parametrize("size", [64, 96, 1536])
def test_rotations_in_16_bits_are_those_in_32(size):
    x = torch.randn(7, 2 * size, device="cuda")
    found = rotate_last_dim(x.bfloat16(), size).float()
    expected = rotate_last_dim(x.bfloat16().float(), size)
    assert (found - expected).norm() < 0.005 * expected.norm()
