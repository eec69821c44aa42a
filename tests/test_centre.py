# SPDX-License-Identifier: Apache-2.0
"""Means that move into biases: the function stays, and what is left has no mean."""

import pytest
import torch
from prefixquant.balance_measure import measure_balance
from prefixquant.block import block_forward
from prefixquant.centre import centre_block
from prefixquant.centre_measure import key_positions, measure_centre
from prefixquant.config import QuantizationConfig, RecipeConfig, Rotations, Scheme
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.decoder_setup import make_decoder
from prefixquant.errors import UserError
from prefixquant.quantize import quantize
from prefixquant.roles import LINEARS, model_geometry
from prefixquant.rotate import plan_rotations
from test_rotate import run
from tiny_families import FAMILIES, tiny_family
from tiny_model import byte_tokenizer

PREFIX = (5, 0)
SAMPLES = torch.randint(0, 97, (5, 19), generator=torch.Generator().manual_seed(1))


def plan_of(model, **options):
    return plan_rotations(model_geometry(model.config), seed=3, **options)


def measured(model, samples=SAMPLES, mask=None, **options):
    decoder = FloatDecoder(model, plan_of(model, **options))
    counted = Counted(samples.shape, len(PREFIX), 64.0, decoder.device)
    if mask is not None:
        counted.mask &= mask
    return measure_centre(decoder, samples, PREFIX, counted, keys=True)


@pytest.mark.parametrize("options", [{"rotate": False}, {}, {"r6": True}])
@pytest.mark.parametrize("prefix", [(), (5, 9, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_change(family, prefix, options):
    """Whatever is taken out, also behind another prefix than that it was measured with."""
    model = tiny_family(family)
    ids = torch.randint(0, 97, (3, 21))
    in_front = torch.tensor(prefix, dtype=torch.long).expand(3, -1)
    expected = model(torch.cat([in_front, ids], dim=1)).logits[:, len(prefix) :]
    decoder = FloatDecoder(model, plan_of(model, **options), centre=measured(model))
    torch.testing.assert_close(run(decoder, ids, prefix), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("r6", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_of_the_means(family, r6):
    """The invariance above would also hold if nothing were taken out."""
    model = tiny_family(family)
    counted = torch.ones(SAMPLES.shape, dtype=torch.bool)
    counted[:, 0] = False
    before, after = {}, {}
    for seen, centre in ((before, None), (after, measured(model, r6=r6))):
        decoder = FloatDecoder(model, plan_of(model, r6=r6), centre=centre)
        x, rope = decoder.embed(SAMPLES), decoder.rope(SAMPLES.shape[1])
        prefix = decoder.prefix(PREFIX)
        for index in range(len(decoder)):
            tap = {}
            x = block_forward(
                decoder.block(index), decoder.shape, x, rope, prefix[index], tap=tap.__setitem__
            )
            for name in ("qkv", "attended", "gate_up"):
                seen[index, name] = tap[name][counted].mean(0)
    for (index, name), mean in before.items():
        rest = after[index, name]
        if name == "attended":  # one mean for the query heads that share a KV head
            rest, mean = (t.view(1, 3, 16).mean(1) for t in (rest, mean))
        assert rest.norm() < 0.01 * mean.norm() + 1e-5, (index, name)


def test_every_linear_has_a_bias_then():
    model = tiny_family("llama")
    decoder = FloatDecoder(model, plan_of(model))
    plain = decoder.block(1)
    centred = centre_block(plain, measured(model)[1], decoder.geometry)
    assert all(plain.biases[role] is None for role in LINEARS)
    assert all(centred.biases[role] is not None for role in LINEARS)
    assert centred.shifts.keys() == {"qkv", "gate_up", "k"}
    assert all(torch.equal(centred.weights[r], plain.weights[r]) for r in LINEARS)


def test_both_16_bit_dtypes_hold_the_means():
    for centre in measured(tiny_family("llama")):
        for mean in (centre.qkv, centre.gate_up, centre.value):
            assert mean.norm() > 0.1
            assert torch.equal(mean, mean.bfloat16().float())
            torch.testing.assert_close(mean.half().float(), mean, rtol=0, atol=2**-24)


def test_tokens_that_do_not_count_have_no_say():
    model, mask = tiny_family("llama"), torch.ones(4, 12, dtype=torch.bool)
    mask[1] = False
    samples = SAMPLES[:4, :12]
    some, fewer = measured(model, samples, mask), measured(model, samples[[0, 2, 3]])
    for a, b in zip(some, fewer, strict=True):
        for mean, other in zip(vars(a).values(), vars(b).values(), strict=True):
            torch.testing.assert_close(mean, other, rtol=2**-7, atol=1e-4)
    assert not torch.allclose(measured(model, samples)[0].qkv, some[0].qkv, rtol=2**-7)


def test_the_decoder_is_what_was_asked_for():
    model = tiny_family("llama")

    def made(scheme, **options):
        recipe = RecipeConfig(scheme=Scheme.parse(scheme), **options)
        return make_decoder(model, plan_of(model), SAMPLES, PREFIX, recipe)

    plain = made("w4a4kv4", balance=False, centre=False)
    centred = made("w4a4kv4", balance=False)
    assert plain.centre is plain.balance is None
    for a, b in zip(centred.centre, measured(model), strict=True):
        assert torch.equal(a.qkv, b.qkv)
        assert torch.equal(a.key, b.key)
    both = made("w4a4kv16")
    assert both.balance is not None
    assert both.centre[0].key is None
    assert not torch.equal(both.centre[0].value, centred.centre[0].value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_of_keys_is_that_of_many_positions(family):
    """One token over and over: keys of the first block are one vector that RoPE turns. Centred on a
    few positions of it, the keys of all positions have no mean."""
    model = tiny_family(family)
    samples = SAMPLES[:1, :1].expand(2, 30)
    counted = Counted(samples.shape, len(PREFIX), 64.0, torch.device("cpu"))
    plain = FloatDecoder(model, plan_of(model))
    centre = measure_centre(plain, samples, PREFIX, counted, keys=True)
    keys = []
    for decoder in (plain, FloatDecoder(model, plan_of(model), centre=centre)):
        length, tap = key_positions(decoder), {}
        x, rope = samples[:1, :1].expand(1, length), decoder.rope(length)
        block_forward(decoder.block(0), decoder.shape, decoder.embed(x), rope, tap=tap.__setitem__)
        keys.append(tap["k"][0])
    torch.testing.assert_close(keys[1], keys[0] - keys[0].mean(1, keepdim=True), rtol=0, atol=1e-4)
    assert keys[0].mean(1).norm() > 0.05 * keys[0].square().mean(1).sum().sqrt()


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("prefix", [(), (5, 9, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_4_bit_activations_ask_for_leaves_the_logits(family, prefix, balance):
    """R6, balanced on what is left of the means, and centred behind it."""
    model, recipe = tiny_family(family), RecipeConfig(balance=balance)
    plan = plan_rotations(model_geometry(model.config), **recipe.rotation_options)
    assert plan.rotations.r6
    decoder = make_decoder(model, plan, SAMPLES, PREFIX, recipe)
    assert (decoder.balance is not None) is balance
    if balance:
        plain = FloatDecoder(model, plan_of(model, rotate=False))
        counted = Counted(SAMPLES.shape, len(PREFIX), 64.0, plain.device)
        expected = measure_balance(plain, SAMPLES, PREFIX, counted, norms=True, centred=True)
        for found, each in zip(decoder.balance, expected, strict=True):
            assert torch.equal(found.qkv, each.qkv)
            assert torch.equal(found.gate_up, each.gate_up)
    ids = torch.randint(0, 97, (3, 21))
    in_front = torch.tensor(prefix, dtype=torch.long).expand(3, -1)
    expected = model(torch.cat([in_front, ids], dim=1)).logits[:, len(prefix) :]
    torch.testing.assert_close(run(decoder, ids, prefix), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [("w4a8kv4", (14, 6)), ("w4a8kv16", (14, 4)), ("w4a16kv4", (0, 0))],
)
def test_only_what_is_quantized_is_centred(scheme, expected):
    recipe = RecipeConfig(
        scheme=Scheme.parse(scheme),
        prefix="text:ab",
        solver="rtn",
        nsamples=2,
        seqlen=16,
        search_samples=2,
        search_seqlen=16,
    )
    linears, shifts = expected
    assert recipe.centred is (linears > 0)
    assert recipe.centred_keys is (shifts > 4)
    made = quantize(tiny_family("llama"), byte_tokenizer(), recipe, torch.arange(300) % 97)
    assert made.quantization.centred is recipe.centred
    assert made.quantization.centred_keys is recipe.centred_keys
    assert sum(name.endswith("_shift") for name in made.tensors) == shifts
    assert sum(name.endswith(".bias") for name in made.tensors) == linears


def test_weights_alone_cannot_be_centred():
    with pytest.raises(UserError, match=r"centred expected true .with quantized activations"):
        QuantizationConfig(4, 16, 16, Rotations(), (), (), "none", "rtn", "test", centred=True)


def test_a_cache_of_16_bits_has_no_centred_keys():
    with pytest.raises(UserError, match=r"centred_keys expected true .with a quantized cache"):
        QuantizationConfig(4, 8, 16, Rotations(), (), (), "none", "rtn", "test", centred_keys=True)
