# SPDX-License-Identifier: Apache-2.0
"""DecoderStep (all blocks in one call) against the operations one by one, bit for bit."""

from dataclasses import replace

import pytest
import torch
from compare import assert_bits_equal
from prefixquant import _C
from prefixquant.config import Scheme
from prefixquant.runtime.cache import StaticCache
from prefixquant.runtime.cpu_step import MAX_SEQUENCES, CpuStep
from prefixquant.runtime.decoder import Decoder, Step
from prefixquant.runtime.random_weights import random_weights
from prefixquant.runtime.weights import rotation
from transformers import AutoConfig

CPU = torch.device("cpu")
LENGTHS = [5, 0, 33, 90, 1, 64, 17, 2, 3, 40, 41, 8, 12, 13, 14, 15]


def make_decoder(scheme="w4a4kv4", prefix=2, **changes):
    """A random decoder of two blocks: hidden 48 = 12 * 4, intermediate 80 = 20 * 4, GQA of 3."""
    config = AutoConfig.for_model(
        **{
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            **changes,
        }
    )
    decoder = Decoder(random_weights(config, Scheme.parse(scheme), CPU, prefix=prefix))
    decoder.reserve_positions(128)
    return decoder


def make_cache(decoder, batch):
    """Random rows everywhere."""
    weights = decoder.weights
    cache = StaticCache.allocate(weights.geometry, weights.kv_bits, batch, 100, torch.float32, CPU)
    for tensor in (*cache.keys, *cache.values):
        if tensor.is_floating_point():
            tensor.normal_()
        else:
            tensor.random_(0, 128)
    return cache


def check(decoder, lengths, places=None):
    """Both ways on copies of one cache: the same logits, the same rows appended."""
    places = len(lengths) if places is None else places
    caches = [make_cache(decoder, places)]
    caches.append(
        StaticCache(
            [t.clone() for t in caches[0].keys],
            [t.clone() for t in caches[0].values],
            places,
            caches[0].capacity,
        )
    )
    step = Step.after(lengths, places, caches[0])
    step.tokens[: len(lengths)] = torch.randint(97, (len(lengths),))
    expected = decoder.decode(step, caches[0], 100)
    runner = CpuStep(decoder, caches[1])
    actual = runner.decode(step, 100)
    assert_bits_equal(actual[: len(lengths)], expected[: len(lengths)])
    for one, other in zip(
        (*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True
    ):
        assert_bits_equal(other, one)


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w4a4ckv4", "w4a8kv8", "w8a8kv16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_the_operations(isa, family, scheme):
    decoder = make_decoder(scheme, model_type=family)
    for batch in (1, 2, 3, 16):
        check(decoder, LENGTHS[:batch])


@pytest.mark.parametrize("prefix", [0, 1, 40])
def test_prefix(isa, prefix):
    check(make_decoder(prefix=prefix), LENGTHS[:2])


def test_shifts(isa):
    decoder = make_decoder()
    before = decoder.weights.blocks[0]
    for index, dtypes in enumerate([(torch.float32, torch.bfloat16), (torch.float16, None)]):
        block = decoder.weights.blocks[index]
        input_shift, post_shift = (d and torch.randn(48).to(d) for d in dtypes)
        decoder.weights.blocks[index] = replace(
            block,
            input_norm=replace(block.input_norm, shift=input_shift),
            post_norm=replace(block.post_norm, shift=post_shift),
            k_shift=torch.randn_like(block.k_shift) if index else None,
        )
    for batch in (1, 3, 16):
        check(decoder, LENGTHS[:batch])
    x = torch.randn(3, 48)
    assert (decoder.weights.blocks[0].input_norm(x) != before.input_norm(x)).any()


def test_places_that_are_not_used(isa):
    check(make_decoder(), LENGTHS[:3], places=8)


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w4a4ckv4"])
@pytest.mark.parametrize("size", [1, 16, 24])
def test_blocks_of_r5(isa, size, scheme):
    decoder = make_decoder(scheme, num_attention_heads=6, head_dim=16)
    whole = decoder.weights.attention_rotation
    assert whole.size == 96
    decoder.weights = replace(decoder.weights, attention_rotation=rotation(size, CPU))
    for batch in (1, 3, 16):
        check(decoder, LENGTHS[:batch])


def with_norms(decoder, **changes):
    """The decoder with other fields of all its norms."""
    blocks = [
        replace(
            block,
            input_norm=replace(block.input_norm, **changes),
            post_norm=replace(block.post_norm, **changes),
        )
        for block in decoder.weights.blocks
    ]
    decoder.weights = replace(decoder.weights, blocks=blocks)
    return decoder


@pytest.mark.parametrize("hidden", [48, 52, 64, 76, 152])
def test_r6(isa, hidden):
    """Sums of floats, none, of integers; with and without weights and shifts."""
    decoder = make_decoder(hidden_size=hidden, num_attention_heads=4)
    norms = [n for b in decoder.weights.blocks for n in (b.input_norm, b.post_norm)]
    assert all(norm.rotation.size == hidden for norm in norms)
    assert all(norm.weight is not None and norm.shift is not None for norm in norms)
    assert not torch.equal(norms[0].weight, norms[1].weight)
    for changes in ({}, {"weight": torch.rand(hidden).half()}, {"shift": None}, {"weight": None}):
        for batch in (1, 2, 3, 16):
            check(with_norms(decoder, **changes), LENGTHS[:batch])


def test_without_r6(isa):
    decoder = with_norms(make_decoder(), rotation=rotation(1, CPU))
    for batch in (1, 3, 16):
        check(decoder, LENGTHS[:batch])
    cache = make_cache(decoder, 1)
    step = Step.after([4], 1, cache)
    plain = CpuStep(decoder, cache).decode(step, 100)
    rotated = with_norms(decoder, rotation=rotation(48, CPU))
    assert (CpuStep(rotated, cache).decode(step, 100) != plain).any()


@pytest.mark.parametrize(("scheme", "hidden"), [("w4a4kv4", 60), ("w4a8kv4", 50)])
def test_sizes_beside_the_blocks_of_the_kernels(isa, scheme, hidden):
    decoder = make_decoder(
        scheme,
        hidden_size=hidden,
        intermediate_size=112,
        num_attention_heads=5,
        num_key_value_heads=5,
    )
    check(decoder, LENGTHS[:5])


def test_large_sizes():
    decoder = make_decoder(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    )
    check(decoder, LENGTHS[:1])
    check(decoder, LENGTHS[:9])


def test_threads_do_not_change_the_result():
    decoder, before = make_decoder(), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for batch in (1, 5):
                check(decoder, LENGTHS[:batch])
    finally:
        torch.set_num_threads(before)


def test_other_dtypes_and_batches_take_the_operations():
    decoder = make_decoder()
    batch = MAX_SEQUENCES + 1
    check(decoder, [3] * batch)
    config = decoder.weights.config
    weights = random_weights(config, Scheme.parse("w4a4kv4"), CPU, torch.bfloat16)
    other = Decoder(weights)
    other.reserve_positions(128)
    cache = make_cache(other, 1)
    step = Step.after([4], 1, cache)
    assert_bits_equal(CpuStep(other, cache).decode(step, 100), other.decode(step, cache, 100))


def arguments(decoder):
    """(of run, a runner)"""
    cache = make_cache(decoder, 2)
    step = Step.after([4, 5], 2, cache)
    return {
        "hidden": torch.zeros(2, 48),
        "positions": step.positions,
        "slots": step.slots,
        "lengths": step.lengths,
    }, CpuStep(decoder, cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", torch.zeros(2, 48, dtype=torch.float16)),
        ("hidden", torch.zeros(2, 47)),
        ("hidden", torch.zeros(17, 48)),
        ("hidden", torch.zeros(48, 2).T),
        ("positions", torch.zeros(2, dtype=torch.int64)),
        ("positions", torch.zeros(3, dtype=torch.int32)),
        ("positions", torch.full((2,), 128, dtype=torch.int32)),
        ("positions", torch.full((2,), -1, dtype=torch.int32)),
        ("slots", torch.zeros(2, dtype=torch.int32)),
        ("slots", torch.full((2,), 200)),
        ("lengths", torch.zeros(2, dtype=torch.int64)),
        ("lengths", torch.full((2,), 101, dtype=torch.int32)),
        ("lengths", torch.full((2,), -1, dtype=torch.int32)),
    ],
)
def test_wrong_argument_is_named(name, value):
    good, runner = arguments(make_decoder())
    runner._step.run(**good)
    with pytest.raises(ValueError, match=f"DecoderStep: {name}: expected"):
        runner._step.run(**{**good, name: value})


def block_arguments():
    decoder = make_decoder()
    cache, block = make_cache(decoder, 2), decoder.weights.blocks[0]
    linear = CpuStep(decoder, cache)._linear
    return {
        "input_norm": None,
        "input_shift": None,
        "qkv": linear(block.qkv),
        "attention": (
            None,
            None,
            block.k_shift,
            block.k_scale,
            block.v_scale,
            block.prefix_key,
            block.prefix_value,
            cache.keys[0],
            cache.values[0],
        ),
        "o": linear(block.o),
        "post_norm": None,
        "post_shift": None,
        "gate_up": linear(block.gate_up),
        "down": linear(block.down),
    }


def new_step(**changes):
    cos = torch.zeros(9, 16)
    sizes = [48, 80, 6, 2, 16, 4, 4, 4]
    defaults = {
        "sizes": sizes,
        "companded": False,
        "eps": 1e-5,
        "scaling": 0.25,
        "cos": cos,
        "sin": cos,
    }
    rotations = {"rotation_signs": None, "rotation_size": 16, "mlp_signs": None, "mlp_size": 16}
    rotations |= {"attention_signs": None, "attention_size": 16, "norm_signs": None, "norm_size": 1}
    return _C.DecoderStep(**{**defaults, **rotations, **changes})


@pytest.mark.parametrize(
    ("part", "index", "value", "named"),
    [
        ("input_norm", None, torch.ones(47), "input_norm"),
        ("post_norm", None, torch.ones(48, dtype=torch.int8), "post_norm"),
        ("input_shift", None, torch.ones(48, dtype=torch.int8), "input_shift"),
        ("post_shift", None, torch.ones(47), "post_shift"),
        ("qkv", 0, torch.zeros(10, 8, 63, dtype=torch.uint8), "qkv"),
        ("qkv", 1, torch.ones(159), "qkv"),
        ("o", 3, torch.ones(47), "o"),
        ("gate_up", 2, torch.ones(1), "scale"),
        ("down", 0, torch.zeros(3, 16, 64), "down"),
        ("attention", 2, torch.zeros(16), "k_shift"),
        ("attention", 3, None, "k_scale"),
        ("attention", 0, torch.ones(16), "k_norm"),
        ("attention", 5, torch.zeros(2, 2, 8), "prefix"),
        ("attention", 7, torch.zeros(2, 3, 100, 8, dtype=torch.uint8), "v_cache"),
    ],
)
def test_wrong_tensor_of_a_block_is_named(part, index, value, named):
    good = block_arguments()
    new_step().add_block(**good)
    wrong = value
    if index is not None:
        wrong = (*good[part][:index], value, *good[part][index + 1 :])
    with pytest.raises(ValueError, match=f"DecoderStep: {named}: expected"):
        new_step().add_block(**{**good, part: wrong})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cos", torch.zeros(9, 15)),
        ("sin", torch.zeros(8, 16)),
        ("rotation_size", 8),
        ("mlp_size", 32),
        ("attention_size", 64),
        ("norm_size", 16),
        ("norm_size", 48),
        ("attention_size", 48),
        ("norm_size", 0),
        ("sizes", [48, 80, 5, 2, 16, 4, 4, 4]),
        ("sizes", [48, 80, 6, 2, 16, 5, 4, 4]),
        ("companded", True),
    ],
)
def test_wrong_size_is_named(name, value):
    named = {"sizes": "(heads|bits)"}.get(name, name)
    with pytest.raises(ValueError, match=f"DecoderStep: {named}: expected"):
        new_step(**{name: value})


def test_a_step_without_blocks():
    empty = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="at least one block"):
        new_step().run(
            hidden=torch.zeros(1, 48), positions=empty, slots=empty.long(), lengths=empty
        )
