# SPDX-License-Identifier: Apache-2.0
"""kv_prefill_attention of several sequences in a call; of one: test_kv_cache_attention.py."""

import pytest
import reference
import test_kv_cache_attention as one_sequence
import torch
from compare import assert_bits_equal
from prefixquant import ops
from prefixquant.ops import kv_prefill_attention_cuda as cuda

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
    together = ops.kv_prefill_attention(
        torch.cat(q[1:4]), **inputs, sequence=1, counts=[tokens] * 3
    )
    assert_bits_equal(together, torch.cat(alone))


@pytest.mark.parametrize("page_size", [None, 16])
def test_sequences_of_different_lengths(page_size):
    inputs = make_inputs(40, 4, page_size=page_size)
    inputs["q"], starts, counts = inputs["q"][:71], [10, 3, 0, 9], [30, 1, 0, 40]
    together = ops.kv_prefill_attention(**{**inputs, "start": starts}, counts=counts)
    q = inputs.pop("q").split(counts)
    for b, part in enumerate(together.split(counts)):
        alone = {**inputs, "start": starts[b], "sequence": b}
        assert_bits_equal(ops.kv_prefill_attention(q[b], **alone), part)


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("output_bits", [4, 8])
def test_quantized_output(tokens, output_bits):
    inputs, scale = make_inputs(tokens, 3, torch.bfloat16), torch.tensor(0.07)
    inputs["counts"] = [tokens] * 3
    plain = ops.kv_prefill_attention(**inputs)
    out = ops.kv_prefill_attention(**inputs, output_scale=scale, output_bits=output_bits)
    assert_bits_equal(out, reference.quantize_static(plain, scale, output_bits))


@pytest.mark.parametrize("counts", [[], [5, 5], [5, 5, 6], [-5, 10, 10]])
def test_wrong_counts(counts):
    with pytest.raises(
        ValueError, match="counts: expected numbers of 0 or more that sum to the 15"
    ):
        ops.kv_prefill_attention(**make_inputs(5, 3), counts=counts)


def test_wrong_number_of_starts():
    inputs = make_inputs(5, 3) | {"start": [0, 0]}
    with pytest.raises(ValueError, match="start: expected one, or one for each of the 3"):
        ops.kv_prefill_attention(**inputs, counts=[5, 5, 5])


def test_more_sequences_than_pages():
    inputs = make_inputs(5, 3)
    with pytest.raises(ValueError, match="kv_prefill_attention: "):
        ops.kv_prefill_attention(**inputs, sequence=1, counts=[5, 5, 5])


def test_opcheck():
    inputs = make_inputs(40, 3, page_size=16)
    table = inputs.pop("block_table")
    names = ("q", "k_cache", "v_cache", "k_scale", "v_scale", "prefix_k", "prefix_v", "kv_bits")
    arguments = [*(inputs[name] for name in names), [10, 10, 10], [40, 40, 40], 0.1, 0, table]
    operation = torch.ops.prefixquant.kv_prefill_attention.default
    for last in ((None, 8), (torch.tensor(0.1), 4)):
        torch.library.opcheck(operation, (*arguments, *last))


# ---- how the CUDA implementation cuts a call into runs ----


def runs(starts, counts, ragged=True, least_work=1 << 22):
    found = cuda.runs_of(tuple(starts), tuple(counts), ragged, least_work)
    return [(run.first, run.row, *zip(run.starts, run.counts, strict=True)) for run in found]


def test_equal_neighbours_are_a_run():
    starts, counts = [0, 0, 0, 7, 7, 0], [5, 5, 6, 6, 6, 5]
    assert runs(starts, counts, ragged=False) == [
        (0, 0, (0, 5), (0, 5)),
        (2, 10, (0, 6)),
        (3, 16, (7, 6), (7, 6)),
        (5, 28, (0, 5)),
    ]
    assert runs(starts, counts) == [(0, 0, *zip(starts, counts, strict=True))]


def test_sequences_without_tokens_are_in_no_run():
    assert runs([0] * 5, [0, 5, 0, 5, 0]) == [(1, 0, (0, 5)), (3, 5, (0, 5))]
    assert runs([3], [0]) == []


def test_much_work_stays_alone():
    assert runs([0] * 4, [9, 2048, 7, 8]) == [
        (0, 0, (0, 9)),
        (1, 9, (0, 2048)),
        (2, 2057, (0, 7), (0, 8)),
    ]
    assert len(runs([0] * 4, [9, 2048, 7, 8], least_work=1 << 62)) > 1  # too much padding
    assert len(runs([0] * 4, [900, 2047, 700, 800])) == 1


def test_lengths_that_share_a_plan():
    for length in range(1, 9000, 7):
        rows = cuda._cudnn_rows(length)
        assert length <= rows <= max(length + 63, length * 1.07)
    assert len({cuda._cudnn_rows(n) for n in range(1, 8193)}) <= 64
