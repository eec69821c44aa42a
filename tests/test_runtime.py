# SPDX-License-Identifier: Apache-2.0
"""The runtime against transformers' generate on the same checkpoints, and its own promises."""

import dataclasses
import sys

import pytest
import torch
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.errors import OutOfMemoryError, UnsupportedModelError, UserError
from prefixquant.modeling import load
from prefixquant.ops import quantize_dynamic
from prefixquant.quantize import quantize
from prefixquant.runtime import Runtime, Sampling, decoder
from prefixquant.runtime.cache import StaticCache
from prefixquant.runtime.chunks import split_prompts
from prefixquant.runtime.graphs import length_bound, places_for
from prefixquant.runtime.head import make_head
from prefixquant.runtime.sampling import argmax, argmax_of_parts, choose, filtered_logits
from test_modeling import CALIBRATION, recipe, save, write
from tiny_families import FAMILIES, tiny_family
from tiny_model import byte_tokenizer

NEW = 12
LENGTHS = (1, 13, 40, 5)


@pytest.fixture(autouse=True)
def float32_attention(monkeypatch):
    """As in test_modeling: what is compared here are code paths."""
    for name in ("modeling.attention", "ops.kv_prefill_attention"):
        module = sys.modules[f"prefixquant.{name}"]
        monkeypatch.setattr(module, "matmul_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "llama"
    save(path, tiny_family("llama"))
    return path


@pytest.fixture
def runtime(folder):
    return Runtime.from_checkpoint(folder)


def prompts(lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 97, (n,), generator=generator).tolist() for n in lengths]


def transformers_tokens(folder, batch, new=NEW, **arguments):
    """Greedy tokens of model.generate on the left-padded batch."""
    longest = max(len(p) for p in batch)
    ids = torch.tensor([[1] * (longest - len(p)) + p for p in batch])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
    out = load(folder).generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
        **arguments,
    )
    return out[:, longest:].tolist()


def endless(folder, **arguments):
    """A runtime that no token stops."""
    loaded = Runtime.from_checkpoint(folder, **arguments)
    loaded.stop_ids = frozenset()
    return loaded


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w4a4ckv4", "w4a8kv8", "w8a8kv16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_transformers(family, scheme, tmp_path):
    save(tmp_path / "q", tiny_family(family), scheme)
    batch = prompts()
    expected = transformers_tokens(tmp_path / "q", batch)
    assert endless(tmp_path / "q").generate(batch, NEW) == expected


@pytest.mark.parametrize("options", [{"prefix": "none"}, {"r6": False}, {"balance": False}])
def test_same_tokens_without_a_part(options, tmp_path):
    save(tmp_path / "q", tiny_family("llama"), **options)
    runtime, batch = endless(tmp_path / "q"), prompts()
    norms = [n for b in runtime.weights.blocks for n in (b.input_norm, b.post_norm)]
    assert {norm.rotation.size for norm in norms} == {1 if "r6" in options else 48}
    assert runtime.generate(batch, NEW) == transformers_tokens(tmp_path / "q", batch)


def test_same_tokens_with_blocks_of_r4_and_an_o_bias(tmp_path):
    model = tiny_family("llama", attention_bias=True)
    recipe = RecipeConfig(
        scheme=Scheme.parse("w4a4kv4"),
        prefix="text:a",
        nsamples=2,
        seqlen=32,
        search_samples=2,
        search_seqlen=32,
        r4_block_size=16,
    )
    write(tmp_path / "q", model, quantize(model, byte_tokenizer(), recipe, CALIBRATION))
    batch = prompts()
    expected = transformers_tokens(tmp_path / "q", batch)
    assert endless(tmp_path / "q").generate(batch, NEW) == expected


def test_a_batch_equals_its_sequences_alone(folder):
    runtime, batch = endless(folder), prompts()
    together = runtime.generate(batch, NEW)
    assert together == [runtime.generate([prompt], NEW)[0] for prompt in batch]


def test_more_sequences_than_the_step_in_one_call_takes(folder):
    runtime, batch = endless(folder), prompts([3 + i % 5 for i in range(40)])
    together = runtime.generate(batch, 4)
    assert together == [runtime.generate([prompt], 4)[0] for prompt in batch]


@pytest.mark.parametrize("chunk", [1, 7, 16, 59])
def test_chunks_of_a_prefill_change_nothing(folder, monkeypatch, chunk):
    expected = endless(folder).generate(prompts(), NEW)
    monkeypatch.setattr(decoder, "_CHUNK_TOKENS", chunk)
    assert endless(folder).generate(prompts(), NEW) == expected


def test_split_prompts():
    batch = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    chunks = list(split_prompts(batch, 4))
    parts = [[(s.sequence, s.start, s.tokens, s.is_last) for s in c] for c in chunks]
    assert parts == [
        [(0, 0, [1, 2, 3], True), (1, 0, [4], True)],
        [(2, 0, [5, 6, 7, 8], False)],
        [(2, 4, [9], True), (3, 0, [10, 11], True)],
        [(4, 0, [12, 13, 14], True)],  # fits into a chunk, so it is not split
    ]


def test_equal_prompts_together_and_one_by_one(folder):
    runtime, batch = endless(folder), prompts([20, 20, 20, 7, 7, 20])
    assert runtime.generate(batch, NEW) == [runtime.generate([p], NEW)[0] for p in batch]


def test_stop_tokens(folder):
    whole = endless(folder).generate(prompts(), NEW)
    runtime = Runtime.from_checkpoint(folder)
    assert runtime.stop_ids == {1}  # eos_token_id of the configuration
    stop = whole[1][4]
    runtime.stop_ids = frozenset({stop})
    stopped = runtime.generate(prompts(), NEW)
    for tokens, all_tokens in zip(stopped, whole, strict=True):
        end = all_tokens.index(stop) + 1 if stop in all_tokens else NEW
        assert tokens == all_tokens[:end]
    steps = list(runtime.stream(prompts(), NEW))
    assert [t for t in (step[1] for step in steps) if t is not None] == stopped[1]


def test_cache_is_kept_and_grows(folder):
    runtime, batch = endless(folder), prompts()
    first = runtime.generate(batch, NEW)
    kept = runtime.cache
    assert (kept.batch, kept.capacity) == (4, 256)
    runtime.generate(batch[:2], NEW)
    assert runtime.cache is kept
    runtime.generate(prompts([300]), 5)
    assert runtime.cache.capacity == 512
    assert runtime.generate(batch, NEW) == first
    assert runtime.cache.batch == 4


def test_generation_up_to_the_last_position(folder):
    runtime = endless(folder)
    (tokens,) = runtime.generate(prompts([500]), 12)
    assert len(tokens) == 12
    assert runtime.generate(prompts([511]), 1)[0]


# ---- 16 bits where the checkpoint has fewer, 8 bits of the head ----


def test_sixteen_bit_cache(folder):
    runtime = endless(folder, kv_bits=16)
    runtime.generate(prompts(), NEW)
    assert runtime.cache.keys[0].dtype == torch.float32
    quantized = endless(folder)
    quantized.reserve(1, 20)
    runtime.reserve(1, 20)
    batch = prompts([13])
    exact = runtime.decoder.prefill(batch, runtime.cache)
    rough = quantized.decoder.prefill(batch, quantized.cache)
    assert 0 < (exact - rough).square().sum() / exact.square().sum() < 0.5


def test_eight_bit_head(folder):
    weight = torch.randn(97, 48).half()
    weight[5] = 0
    rounded = make_head(weight, 8, torch.device("cpu"))
    x = torch.randn(6, 48) * torch.tensor([[1.0], [1e4], [0.0], [1e-6], [1.0], [30.0]])
    levels, scale = quantize_dynamic(weight, 8)
    expected = x @ (levels * scale[:, None]).T
    # The activations to max|x| / 64516, times 48 weights of about 1.
    allowed = x.abs().amax(dim=1, keepdim=True) / 64516 * weight.float().abs().sum(1) + 1e-9
    assert ((rounded(x) - expected).abs() <= allowed).all()
    assert (rounded(x) - x @ weight.float().T).abs().max() > 1e-3
    assert [len(t) for t in endless(folder, head_bits=8).generate(prompts(), NEW)] == [NEW] * 4


# ---- sampling ----


def test_argmax_of_parts():
    logits = torch.randint(0, 9, (50, 96)).float()  # the largest comes often: the first counts
    logits[0] = -torch.inf
    logits[1, 70] = torch.nan
    expected = logits.argmax(dim=-1)
    assert expected[1] == 70
    for parts in (1, 2, 8, 96):
        out = torch.empty(50, dtype=torch.int64)
        found = argmax_of_parts(logits.view(50, parts, -1), out)
        assert torch.equal(found, expected)
        assert torch.equal(out, expected)
    assert torch.equal(argmax(logits), expected)


def test_filters_equal_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 50) * 3
    for top_k in (1, 5, 50, 60):
        expected = TopKLogitsWarper(top_k)(None, logits)
        torch.testing.assert_close(filtered_logits(logits, top_k, 1.0), expected)
    for top_p in (0.1, 0.5, 0.9, 0.999):
        expected = TopPLogitsWarper(top_p)(None, logits)
        torch.testing.assert_close(filtered_logits(logits, 0, top_p), expected)
    expected = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(9)(None, logits))
    torch.testing.assert_close(filtered_logits(logits, 9, 0.7), expected)


def test_filters_keep_the_first_of_equal_logits():
    logits = torch.tensor([[0.0, 2.0, 3.0, 2.0, 3.0, 2.0]])
    kept = {k: filtered_logits(logits, k, 1.0)[0].isfinite().tolist() for k in (1, 2, 4)}
    assert kept[1] == [False, False, True, False, False, False]
    assert kept[2] == [False, False, True, False, True, False]
    assert kept[4] == [False, True, True, True, True, False]
    assert filtered_logits(logits, 0, 1e-9)[0].isfinite().tolist() == kept[1]


def test_draws_follow_the_distribution():
    logits = torch.randn(1, 8).mul(1.5)
    sampling = Sampling(temperature=0.7, top_k=6)
    expected = filtered_logits(logits / 0.7, 6, 1.0).softmax(-1)[0]
    draws = 40000
    tokens = choose(logits.expand(draws, -1), sampling, sampling.generator(torch.device("cpu")))
    shares = torch.bincount(tokens, minlength=8) / draws
    # Four standard deviations of the share of a token of probability 1/2.
    assert (shares - expected).abs().max() < 4 * (0.25 / draws) ** 0.5
    assert (shares[expected == 0] == 0).all()


def test_sampling_in_the_runtime(folder):
    runtime, batch = endless(folder), prompts()
    greedy = runtime.generate(batch, NEW)
    assert runtime.generate(batch, NEW, Sampling(temperature=5.0, top_k=1)) == greedy
    assert runtime.generate(batch, NEW, Sampling(temperature=1.0, top_p=1e-9)) == greedy
    one = runtime.generate(batch, NEW, Sampling(temperature=1.5, seed=1))
    assert one != greedy
    assert runtime.generate(batch, NEW, Sampling(temperature=1.5, seed=1)) == one
    assert runtime.generate(batch, NEW, Sampling(temperature=1.5, seed=2)) != one


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_wrong_sampling(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: expected"):
        Sampling(**wrong)


# ---- errors ----


def test_wrong_prompts_leave_the_runtime_usable(folder):
    runtime = endless(folder)
    expected = runtime.generate(prompts(), NEW)
    for batch, new, words in (
        ([[3], []], 4, "prompt 1 has none"),
        ([[3, 97]], 4, "token ids from 0 to 96"),
        ([[-1]], 4, "token ids"),
        (prompts([500]), 13, "at most 512 tokens with the new ones, prompt 0 has 500"),
        (prompts([3]), 0, "max_new_tokens: expected at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            runtime.stream(batch, new)
        assert runtime.generate(prompts(), NEW) == expected
    assert runtime.generate([], 3) == []


def test_max_length(folder):
    runtime = endless(folder, max_length=20)
    assert len(runtime.generate(prompts([10]), 10)[0]) == 10
    with pytest.raises(UserError, match="at most 20 tokens"):
        runtime.generate(prompts([10]), 11)
    for wrong in (0, 513):
        with pytest.raises(UserError, match="max_length: expected 1 to 512"):
            Runtime.from_checkpoint(folder, max_length=wrong)


def test_outliers_are_refused(tmp_path):
    # Their products are the transformers model's; without them the tokens would be wrong.
    changes = {"solver": "quantease-outlier", "outlier_fraction": 0.01}
    options = dataclasses.replace(recipe("w4a8kv4", "text:ab"), **changes)
    model = tiny_family("llama")
    write(tmp_path / "q", model, quantize(model, byte_tokenizer(), options, CALIBRATION))
    with pytest.raises(UnsupportedModelError, match="weights without outliers"):
        Runtime.from_checkpoint(tmp_path / "q")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_leaves_the_runtime_usable(folder, monkeypatch, error):
    runtime = endless(folder)
    expected = runtime.generate(prompts([5]), NEW)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(StaticCache, "allocate", fail)
        with pytest.raises(OutOfMemoryError, match="4 sequences of up to 52 tokens"):
            runtime.generate(prompts(), NEW)
    assert runtime.generate(prompts([5]), NEW) == expected


def test_out_of_memory_in_the_context_of_another_error(folder, monkeypatch):
    runtime = endless(folder)

    def fail(*arguments):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("capture_end: operation failed due to a previous error")

    monkeypatch.setattr(StaticCache, "allocate", fail)
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        runtime.generate(prompts(), NEW)


def test_buckets_of_the_graphs():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [places_for(n, cuda) for n in (1, 3, 16, 17, 300)] == [1, 4, 16, 32, 300]
    assert places_for(3, cpu) == 3
    bounds = [length_bound(n, 5000) for n in (1, 512, 513, 4096, 4097)]
    assert bounds == [512, 512, 1024, 4096, 5000]
    assert length_bound(3, 256) == 256


def test_other_errors_are_not_hidden(folder, monkeypatch):
    runtime = endless(folder)

    def fail(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(StaticCache, "allocate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        runtime.generate(prompts(), NEW)


def test_a_stream_that_is_left_early(folder):
    runtime = endless(folder)
    expected = runtime.generate(prompts(), NEW)
    stream = runtime.stream(prompts(), NEW)
    next(stream)
    stream.close()
    assert runtime.generate(prompts(), NEW) == expected


@pytest.mark.parametrize("scheme", ["w4a16kv4", "w4a8dkv4", "w4a8kv8d"])
def test_what_has_no_static_scales_is_refused(tmp_path, scheme):
    save(tmp_path / "q", tiny_family("llama"), scheme)
    with pytest.raises(UnsupportedModelError, match="prefixquant\\.load"):
        Runtime.from_checkpoint(tmp_path / "q")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kv_bits": 8}, "kv_bits: expected 4"),
        ({"head_bits": 4}, "head_bits: expected 8 or 16"),
        ({"dtype": torch.float64}, "dtype: expected one of"),
    ],
)
def test_wrong_load_arguments(folder, wrong, words):
    with pytest.raises(UserError, match=words):
        Runtime.from_checkpoint(folder, **wrong)
