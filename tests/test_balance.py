# SPDX-License-Identifier: Apache-2.0
"""Scales that move between linears: the function stays, and what is moved is the best."""

import pytest
import torch
from prefixquant.balance import balance_block, balanced
from prefixquant.balance_measure import measure_balance
from prefixquant.block import apply_rope, block_forward, head_projection
from prefixquant.centre_measure import key_positions
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.roles import block_weights, model_blocks, model_geometry, model_roles
from prefixquant.rotate import plan_rotations, rotate_last_dim
from test_rotate import run
from tiny_families import FAMILIES, tiny_family


def measured(model, samples=None, mask=None, **options):
    plain = FloatDecoder(model, plan_rotations(model_geometry(model.config), rotate=False))
    if samples is None:
        samples = torch.randint(0, 97, (5, 19), generator=torch.Generator().manual_seed(1))
    counted = Counted(samples.shape, 2, 64.0, plain.device)
    if mask is not None:
        counted.mask &= mask
    return measure_balance(plain, samples, (5, 0), counted, **options)


@torch.no_grad()
def unbalance(model, factors):
    """Moves scales the other way, in the model itself."""
    roles = model_roles(model.config)
    for block in model_blocks(model, roles):
        up, down = (block.get_submodule(roles.linears[role]) for role in ("up", "down"))
        up.weight.mul_(factors[:, None])
        if up.bias is not None:
            up.bias.mul_(factors)
        down.weight.div_(factors)


@pytest.mark.parametrize("r6", [False, True])
@pytest.mark.parametrize("prefix", [(), (5, 9, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_change(family, prefix, r6):
    model = tiny_family(family)
    balance = measured(model, norms=r6)
    for each in balance:
        for scale in vars(each).values():
            assert scale is None or scale.std() > 0.01
        assert (each.qkv is not None) == (each.gate_up is not None) == r6
    ids = torch.randint(0, 97, (3, 21))
    plan = plan_rotations(model_geometry(model.config), seed=3, r6=r6)
    in_front = torch.tensor(prefix, dtype=torch.long).expand(3, -1)
    expected = model(torch.cat([in_front, ids], dim=1)).logits[:, len(prefix) :]
    actual = run(FloatDecoder(model, plan, balance=balance), ids, prefix)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_that_a_scale_passes_changes(family):
    """The invariance above would also hold if nothing were scaled."""
    model = tiny_family(family)
    roles, geometry = model_roles(model.config), model_geometry(model.config)
    before = block_weights(model_blocks(model, roles)[0], roles)
    after = balance_block(before, measured(model)[0], geometry)
    changed = {
        role for role, w in before.weights.items() if not torch.equal(w, after.weights[role])
    }
    assert changed == {"up", "down", "v", "o"} | (set() if roles.qk_norm else {"q", "k"})
    if roles.qk_norm:
        assert not torch.equal(before.q_norm, after.q_norm)
    assert torch.equal(before.input_norm, after.input_norm)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_take_the_inverse_of_what_their_readers_take(family, centred):
    model = tiny_family(family)
    roles, geometry = model_roles(model.config), model_geometry(model.config)
    before = block_weights(model_blocks(model, roles)[1], roles)
    balance = measured(model, norms=True, centred=centred)[1]
    after = balance_block(before, balance, geometry)
    for norm, d, readers in (
        ("input_norm", balance.qkv, "v"),  # q and k have scales of their own
        ("post_norm", balance.gate_up, ("gate",)),
    ):
        old, new = getattr(before, norm), getattr(after, norm)
        torch.testing.assert_close(new, 1 / d, rtol=2**-8, atol=0)
        assert not torch.equal(new, 1 / d)
        for dtype in (torch.bfloat16, torch.float16):  # what is stored is what was simulated
            assert torch.equal(new.to(dtype).float(), new)
        for role in readers:
            weight = before.weights[role]
            if role == "v":
                weight = weight / balance.value.flatten()[:, None]
            expected = weight.double() * (old.double() / new.double())
            torch.testing.assert_close(after.weights[role].double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("centred", [False, True])
def test_balanced_norms_give_what_their_readers_weigh_alike(centred):
    """Behind its norm a channel's size (its deviation where means are taken out) is that of its
    columns in what reads it, up to the rounding of the norm's weight."""
    model, samples = tiny_family("llama"), torch.randint(0, 97, (5, 19))
    balance = measured(model, samples, norms=True, centred=centred)
    plan = plan_rotations(model_geometry(model.config), r6=True)
    decoder, roles = FloatDecoder(model, plan, balance=balance), model_roles(model.config)
    prefix, x, rope = decoder.prefix((5, 0)), decoder.embed(samples), decoder.rope(19)
    for index, plain in enumerate(model_blocks(model, roles)):
        plain, block, tap = block_weights(plain, roles), decoder.block(index), {}
        x = block_forward(block, decoder.shape, x, rope, prefix[index], tap=tap.__setitem__)
        for point, norm, readers in (
            ("qkv", "input_norm", "qkv"),
            ("gate_up", "post_norm", ("gate", "up")),
        ):
            rows = rotate_last_dim(tap[point][:, 1:].flatten(0, 1), 48, inverse=True)
            made = rows.std(0, correction=0) if centred else rows.square().mean(0).sqrt()
            # Not the block's weights: rows of q, k, v and up have other scales by now.
            factors = getattr(plain, norm) / getattr(block, norm)
            read = sum((plain.weights[role] * factors).square().sum(0) for role in readers).sqrt()
            ratio = made / read
            # bfloat16 rounds to 2^-8 at most, once in each of the two; measured: 0.8 %
            torch.testing.assert_close(ratio / ratio.mean(), torch.ones(48), rtol=0.01, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_keys_and_values_are_balanced_by_what_their_means_leave(family):
    """Of the keys: over all positions that their mean is an average over, by brute force."""
    model, samples = tiny_family(family), torch.randint(0, 97, (5, 19))
    balance = measured(model, samples, centred=True, keys=True)
    plan = plan_rotations(model_geometry(model.config), rotate=False)
    decoder = FloatDecoder(model, plan, balance=balance)
    prefix, x, rope = decoder.prefix((5, 0)), decoder.embed(samples), decoder.rope(19)
    everywhere = decoder.rope(key_positions(decoder))
    for index in range(len(decoder)):
        block, tap = decoder.block(index), {}
        x = block_forward(block, decoder.shape, x, rope, prefix[index], tap=tap.__setitem__)
        keys = head_projection(block, decoder.shape, "k", tap["qkv"][:, 1:].flatten(0, 1))
        keys = apply_rope(keys[:, :, None], *everywhere)  # [N, H_kv, positions, D]
        left = (keys - keys.mean((0, 2), keepdim=True)).square().mean((0, 2))
        read = tap["q"][:, :, 1:].square().mean((0, 2)).sum(0, keepdim=True)
        pairs = (left[:, :8] + left[:, 8:]) / (read[:, :8] + read[:, 8:])
        torch.testing.assert_close(pairs / pairs.mean(), torch.ones(1, 8), rtol=1e-3, atol=0)
        attended = tap["attended"][:, 1:].unflatten(-1, (3, 16))
        left = (attended - attended.mean((0, 1, 2))).square().mean((0, 1, 2))
        read = block.weights["o"].unflatten(-1, (3, 16)).square().sum((0, 1))
        ratio = left / read
        torch.testing.assert_close(ratio / ratio.mean(), torch.ones(16), rtol=1e-3, atol=0)


def test_a_balanced_model_does_not_depend_on_where_its_scales_were():
    model, factors = tiny_family("llama"), torch.linspace(0.1, 3, 80)
    geometry = model_geometry(model.config)
    factors = factors[: geometry.intermediate]
    plan = plan_rotations(geometry)
    expected = FloatDecoder(model, plan, balance=measured(model)).block(1).weights
    unbalance(model, factors)
    actual = FloatDecoder(model, plan, balance=measured(model)).block(1).weights
    for role in ("up", "down"):
        ratio = (actual[role].norm() / expected[role].norm()).item()
        torch.testing.assert_close(actual[role] / ratio, expected[role], rtol=1e-4, atol=1e-5)


def test_no_other_scales_have_a_smaller_product():
    made, read = torch.rand(2, 40, dtype=torch.float64).add(0.01)

    def product(d):
        return (made / d**2).sum() * (read * d**2).sum()

    best = balanced(made, read)
    torch.testing.assert_close(product(best), (made * read).sqrt().sum() ** 2)
    for _ in range(20):
        assert product(best) < product(best * torch.rand(40).double().add(0.5))


def test_channels_that_are_never_made_or_read_stay_finite():
    made = torch.tensor([1.0, 0.0, 0.0, 2.0, 1e-30]).double()
    read = torch.tensor([1.0, 0.0, 3.0, 0.0, 1.0]).double()
    d = balanced(made, read)
    assert d.isfinite().all()
    assert (d > 0).all()
    assert d.max() / d.min() <= 32.0**2 * 1.001


def test_tokens_that_do_not_count_have_no_say():
    model, samples = tiny_family("llama"), torch.randint(0, 97, (4, 12))
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[1] = False
    options = {"norms": True, "centred": True}
    some = measured(model, samples, mask, **options)
    fewer = measured(model, samples[[0, 2, 3]], **options)
    for a, b in zip(some, fewer, strict=True):
        torch.testing.assert_close(a.inner, b.inner)
        torch.testing.assert_close(a.value, b.value)
        torch.testing.assert_close(a.key, b.key)
        torch.testing.assert_close(a.qkv, b.qkv)
        torch.testing.assert_close(a.gate_up, b.gate_up)
    assert not torch.allclose(measured(model, samples)[0].inner, some[0].inner)
