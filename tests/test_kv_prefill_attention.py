# SPDX-License-Identifier: Apache-2.0
"""kv_prefill_attention of several sequences in a call; of one: test_kv_cache_attention.py."""

import pytest
import reference
import test_kv_cache_attention as one_sequence
import torch
from compare import assert_bits_equal
from prefixquant import ops

HEADS = (6, 2, 64)


def make_inputs(tokens: int, sequences: int, dtype=torch.float32, **options) -> dict:
    """The arguments of kv_prefill_attention; every sequence has 10 rows in front of the tokens."""
    lengths = [10 + tokens] * sequences
    inputs, _ = one_sequence.make_inputs(HEADS, 4, dtype, lengths=lengths, **options)
    inputs = {n: v for n, v in inputs.items() if n not in ("lengths", "max_length")}
    return inputs | {"q": torch.randn(sequences * tokens, *HEADS[::2]).to(dtype), "start": 10}


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_sequences_together_equal_one_by_one(tokens, page_size):
    inputs = make_inputs(tokens, 5, page_size=page_size)
    q = inputs.pop("q").split(tokens)
    alone = [ops.kv_prefill_attention(q[b], **inputs, sequence=b) for b in (1, 2, 3)]
    together = ops.kv_prefill_attention(torch.cat(q[1:4]), **inputs, sequence=1, sequences=3)
    assert_bits_equal(together, torch.cat(alone))


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("output_bits", [4, 8])
def test_quantized_output(tokens, output_bits):
    inputs, scale = make_inputs(tokens, 3, torch.bfloat16), torch.tensor(0.07)
    plain = ops.kv_prefill_attention(**inputs, sequences=3)
    out = ops.kv_prefill_attention(
        **inputs, sequences=3, output_scale=scale, output_bits=output_bits
    )
    assert_bits_equal(out, reference.quantize_static(plain, scale, output_bits))


@pytest.mark.parametrize("sequences", [0, -1, 2, 16])
def test_wrong_number_of_sequences(sequences):
    inputs = make_inputs(5, 3)
    with pytest.raises(ValueError, match="sequences: expected at least 1 and a divisor of the 15"):
        ops.kv_prefill_attention(**inputs, sequences=sequences)


def test_more_sequences_than_pages():
    inputs = make_inputs(5, 3)
    with pytest.raises(ValueError, match="kv_prefill_attention: "):
        ops.kv_prefill_attention(**inputs, sequence=1, sequences=3)


def test_opcheck():
    inputs = make_inputs(40, 3, page_size=16)
    table = inputs.pop("block_table")
    names = ("q", "k_cache", "v_cache", "k_scale", "v_scale", "prefix_k", "prefix_v", "kv_bits")
    arguments = [*(inputs[name] for name in names), 10, 0.1, 0, table, 3]
    operation = torch.ops.prefixquant.kv_prefill_attention.default
    for last in ((None, 8), (torch.tensor(0.1), 4)):
        torch.library.opcheck(operation, (*arguments, *last))
