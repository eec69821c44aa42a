# SPDX-License-Identifier: Apache-2.0
"""rope_kv_append against the reference, bit for bit."""

import pytest
import reference
import torch
from cases import FLOAT_DTYPES
from compare import assert_bits_equal
from kv_cases import HEADS, cache_scales, new_cache, rope_tables
from prefixquant.hadamard import hadamard_signs, split_size
from prefixquant.ops import rope_kv_append

POSITIONS = 50


def make_inputs(heads, bits, tokens=5, dtype=torch.float32, norms=False, rotate=True, shift=False):
    query_heads, kv_heads, dim = heads
    k = 0
    if rotate and dim != 10:  # no Hadamard of size 10
        k = split_size(dim)[1]
    cos, sin = rope_tables(POSITIONS, dim)
    norm = torch.randn(dim).add(1).to(torch.bfloat16) if norms else None
    cache_dtype = torch.float32 if dtype == torch.float32 else dtype
    qkv = torch.randn(tokens, (query_heads + 2 * kv_heads) * dim)
    qkv[::4] *= 30  # beyond the levels of the cache
    return {
        "qkv": qkv.to(dtype),
        "cos": cos,
        "sin": sin,
        "positions": torch.randint(POSITIONS, (tokens,), dtype=torch.int32),
        "q_norm": norm,
        "k_norm": None if norm is None else norm.flip(0),
        "eps": 1e-5,
        "signs": hadamard_signs(k) if k > 1 else None,
        "rotation_size": dim if k else 1,
        "k_shift": torch.randn(kv_heads, dim) if shift else None,
        "k_scale": cache_scales(kv_heads, bits),
        "v_scale": cache_scales(kv_heads, bits),
        "kv_bits": bits,
        "k_cache": new_cache(3, kv_heads, 7, dim, bits, cache_dtype),
        "v_cache": new_cache(3, kv_heads, 7, dim, bits, cache_dtype),
        "slots": torch.randperm(21)[:tokens],
        "heads": query_heads,
    }


def check(inputs):
    expected = {**inputs, **{n: inputs[n].clone() for n in ("k_cache", "v_cache")}}
    q = rope_kv_append(**inputs)
    assert_bits_equal(q, reference.rope_kv_append(**expected), "q")
    assert_bits_equal(inputs["k_cache"], expected["k_cache"], "k_cache")
    assert_bits_equal(inputs["v_cache"], expected["v_cache"], "v_cache")


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_against_reference(isa, heads, bits):
    for dtype in FLOAT_DTYPES:
        for norms in (False, True):
            for rotate in (False, True):
                options = {"dtype": dtype, "norms": norms, "rotate": rotate}
                check(make_inputs(heads, bits, **options, shift=norms != rotate))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_shift_is_taken_from_the_keys_alone(isa, bits):
    inputs = make_inputs((6, 2, 64), bits, shift=True)
    plain = {**inputs, **{n: inputs[n].clone() for n in ("k_cache", "v_cache")}, "k_shift": None}
    assert_bits_equal(rope_kv_append(**inputs), rope_kv_append(**plain), "q")
    assert_bits_equal(inputs["v_cache"], plain["v_cache"], "v_cache")
    assert not torch.equal(inputs["k_cache"], plain["k_cache"])


@pytest.mark.parametrize("tokens", [0, 1, 21])
def test_token_counts(isa, tokens):
    check(make_inputs((3, 1, 64), 4, tokens))


def test_many_tokens_on_all_threads():
    inputs = make_inputs((9, 3, 64), 4, 2)
    inputs["qkv"] = torch.randn(600, 15 * 64)
    inputs["positions"] = torch.randint(POSITIONS, (600,), dtype=torch.int32)
    for name in ("k_cache", "v_cache"):
        inputs[name] = new_cache(4, 3, 160, 64, 4, None)
    inputs["slots"] = torch.randperm(640)[:600]
    check(inputs)


def test_rows_that_are_not_written(isa):
    inputs = make_inputs((6, 2, 64), 4)
    inputs["slots"][1:4] = torch.tensor([-1, -7, -(2**62)])
    check(inputs)


def test_strided_inputs(isa):
    inputs = make_inputs((6, 2, 64), 4)
    inputs["qkv"] = torch.randn(5, 2000)[:, 100 : 100 + 10 * 64]
    for name in ("k_cache", "v_cache"):  # pages and heads in another order
        inputs[name] = new_cache(7, 3, 2, 64, 4, None).permute(1, 2, 0, 3)
    check(inputs)


def test_outliers_and_not_a_number(isa):
    inputs = make_inputs((3, 1, 64), 4, 7)
    inputs["qkv"][1] *= 1e6
    inputs["qkv"][2, ::3] = float("nan")
    inputs["qkv"][3, 0] = float("inf")
    check(inputs)
    inputs["k_shift"] = torch.randn(1, 64)
    inputs["k_shift"][0, 3:5] = torch.tensor([float("inf"), float("nan")])
    check(inputs)


def test_cache_of_another_floating_dtype(isa):
    inputs = make_inputs((3, 1, 64), 16)
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].to(torch.bfloat16)
    check(inputs)


WRONG = [
    ("qkv", torch.zeros(5, 640, dtype=torch.int8)),
    ("qkv", torch.zeros(5, 630)),
    ("qkv", torch.zeros(5, 1, 640)),
    ("qkv", torch.zeros(640, 5).T),
    ("cos", torch.zeros(50, 64, dtype=torch.float16)),
    ("cos", torch.zeros(50, 32)),
    ("cos", torch.zeros(64, 50).T),
    ("sin", torch.zeros(49, 64)),
    ("sin", torch.zeros(64, 50).T),
    ("positions", torch.zeros(5, dtype=torch.int64)),
    ("positions", torch.zeros(4, dtype=torch.int32)),
    ("positions", torch.full((5,), 50, dtype=torch.int32)),
    ("positions", torch.full((5,), -1, dtype=torch.int32)),
    ("q_norm", torch.ones(63)),
    ("q_norm", torch.ones(64, dtype=torch.int8)),
    ("q_norm", torch.ones(128)[::2]),
    ("k_norm", torch.ones(1, 64)),
    ("k_norm", torch.ones(64, dtype=torch.float16)),
    ("k_norm", None),
    ("eps", -1.0),
    ("signs", torch.ones(4, 5, dtype=torch.int8)),
    ("rotation_size", 32),
    ("rotation_size", 0),
    ("k_shift", torch.zeros(2, 32)),
    ("k_shift", torch.zeros(128)),
    ("k_shift", torch.zeros(2, 64, dtype=torch.float16)),
    ("k_shift", torch.zeros(64, 2).T),
    ("k_scale", None),
    ("k_scale", torch.ones(3)),
    ("v_scale", torch.ones(2, dtype=torch.float16)),
    ("v_scale", torch.ones(4)[::2]),
    ("kv_bits", 5),
    ("k_cache", torch.zeros(3, 2, 7, 32, dtype=torch.int8)),
    ("k_cache", torch.zeros(2, 7, 32, dtype=torch.uint8)),
    ("k_cache", torch.zeros(3, 2, 7, 64, dtype=torch.uint8)[..., ::2]),
    ("v_cache", torch.zeros(3, 2, 7, 32, dtype=torch.int8)),
    ("v_cache", torch.zeros(3, 2, 6, 32, dtype=torch.uint8)),
    ("slots", torch.zeros(5, dtype=torch.int32)),
    ("slots", torch.zeros(4, dtype=torch.int64)),
    ("slots", torch.full((5,), 21)),
    ("heads", 5),
    ("heads", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_argument_is_named(name, value):
    good = make_inputs((6, 2, 64), 4, norms=True)
    good["q_norm"], good["k_norm"] = torch.ones(64), torch.ones(64)
    rope_kv_append(**good)
    with pytest.raises(ValueError, match=rf"rope_kv_append: {name}: expected"):
        rope_kv_append(**{**good, name: value})


def test_opcheck():
    for bits in (4, 8, 16):
        inputs = make_inputs((6, 2, 64), bits, norms=True)
        for name in ("k_cache", "v_cache"):  # NaN is equal to nothing
            inputs[name] = inputs[name].nan_to_num(nan=0.0)
        torch.library.opcheck(torch.ops.prefixquant.rope_kv_append.default, tuple(inputs.values()))
