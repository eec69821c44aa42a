# SPDX-License-Identifier: Apache-2.0
"""The whole method on SmolLM2-135M-Instruct: few calibration samples, a little held-out text."""

import os

import pytest
import torch
from prefixquant import text as texts
from prefixquant.block import block_forward
from prefixquant.compare import Candidate, compare
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.loading import load_float_model
from prefixquant.modeling import load
from prefixquant.modeling.load import linear_weight_bytes
from prefixquant.runtime import Runtime
from prefixquant.simulate import SimulatedModel
from prefixquant.workflow import Origin, Protocol, calibration_tokens, quantize_and_save

pytestmark = pytest.mark.model

GGUF = os.environ.get("PREFIXQUANT_TEST_GGUF", "")


@pytest.fixture(scope="module")
def smol():
    if not os.path.isfile(GGUF):
        pytest.skip("PREFIXQUANT_TEST_GGUF names no file; `make test` fetches it")
    return load_float_model(GGUF, torch.float32)


@pytest.fixture(scope="module")
def quantized(smol, tmp_path_factory):
    """(checkpoint folder, report) of W4A4KV4 with the default prefix mode."""
    model, tokenizer = smol
    recipe = RecipeConfig(
        scheme=Scheme.parse("w4a4kv4"), nsamples=8, seqlen=256, search_samples=8, search_seqlen=512
    )
    folder = tmp_path_factory.mktemp("smol") / "w4a4kv4"
    calibration = calibration_tokens(texts.load_text("pydoc"), tokenizer)
    origin = Origin(GGUF, "pydoc")
    return folder, quantize_and_save(model, tokenizer, recipe, calibration, folder, origin=origin)


def test_prefix_is_bos_and_nothing_remains(quantized):
    prefix = quantized[1]["prefix"]
    assert prefix["prefix"] == [1]
    steps = {tuple(step["prefix"]): step for step in prefix["steps"]}
    # Without prefix the initial token stands out at block 11: 2100 medians, 220 after R4.
    assert max(steps[()]["before_r4"]["max_ratio"]) > 1000
    assert max(steps[()]["max_ratio"]) > 64
    assert steps[()]["outliers_at_position_0"] >= 8
    assert steps[(1,)]["outlier_tokens"] == 0


def test_perplexity(smol, quantized):
    model, tokenizer = smol
    folder, _ = quantized
    samples = Protocol("pydoc", windows=3, seqlen=768).samples(texts.load_text("pydoc"), tokenizer)
    results = compare(
        {"float": Candidate(model, (1,)), "packed": Candidate(load(folder))}, "float", samples
    )
    ppl = {name: result["ppl"] for name, result in results.items()}
    assert ppl["packed"] / ppl["float"] < 3.2  # measured 2.6; without prefix it is 6 and more
    assert results["packed"]["top1"] > 0.4  # measured 0.52


def test_kernels_against_fake_quantization(quantized, monkeypatch):
    """Block by block at real sizes, each on the stream that the kernels left, where the two are the
    same computation. Over 30 blocks they are not: one 4-bit level that float32 sums in another
    order tip over moves others behind it, and both end as equally good draws (benchmarks/accuracy
    compares their perplexities)."""
    monkeypatch.setattr("prefixquant.modeling.attention.matmul_dtype", lambda device: torch.float32)
    folder, _ = quantized
    packed, simulated = load(folder), SimulatedModel(folder)
    ids = torch.arange(2000, 2040)[None]
    streams = packed.model(ids, output_hidden_states=True).hidden_states
    cos, sin = simulated.rotary(streams[0], torch.arange(40)[None])
    alike = 0
    for before, after, quantized_block in zip(
        streams, streams[1:5], simulated.blocks, strict=False
    ):
        block, prefix, scales = quantized_block
        expected = block_forward(block, simulated.shape, before, (cos[0], sin[0]), prefix, scales)
        error = (after - expected).square().sum(-1) / expected.square().sum(-1)
        # A token with such a level is off by 1e-2, and if it is one of its keys or values those
        # behind it by 1e-3; the others agree to 1e-14.
        alike += (error < 1e-10).sum()
        assert (error < 0.1).all(), error
    assert alike >= 100  # of 160


def test_memory_and_generation(smol, quantized):
    _, tokenizer = smol
    model = load(quantized[0])
    assert linear_weight_bytes(model) < 60e6
    prompts = ["The capital of France is", "Water boils at a temperature of"]
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for row, prompt in zip(out, prompts, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        alone.pop("token_type_ids", None)
        single = model.generate(**alone, max_new_tokens=8, do_sample=False)
        new = single[0, alone["input_ids"].shape[1] :]
        assert torch.equal(row[inputs["input_ids"].shape[1] :][: len(new)], new)


def test_runtime_generates_the_same_tokens(smol, quantized):
    _, tokenizer = smol
    model, runtime = load(quantized[0]), Runtime.from_checkpoint(quantized[0])
    runtime.stop_ids = frozenset()
    texts = ["The capital of France is", "Water boils at a temperature of", "def fibonacci(n):"]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for prompt, new in zip(prompts, runtime.generate(prompts, 24), strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert new == expected[0, len(prompt) :].tolist()
