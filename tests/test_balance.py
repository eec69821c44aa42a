# SPDX-License-Identifier: Apache-2.0
"""Scales that move between linears: the function stays, and what is moved is the best."""

import pytest
import torch
from prefixquant.balance import balance_block, balanced
from prefixquant.balance_measure import measure_balance
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.roles import block_weights, model_blocks, model_geometry, model_roles
from prefixquant.rotate import plan_rotations
from test_rotate import run
from tiny_families import FAMILIES, tiny_family


def measured(model, samples=None, mask=None):
    plain = FloatDecoder(model, plan_rotations(model_geometry(model.config), rotate=False))
    if samples is None:
        samples = torch.randint(0, 97, (5, 19), generator=torch.Generator().manual_seed(1))
    counted = Counted(samples.shape, 2, 64.0, plain.device)
    if mask is not None:
        counted.mask &= mask
    return measure_balance(plain, samples, (5, 0), counted)


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


@pytest.mark.parametrize("prefix", [(), (5, 9, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_change(family, prefix):
    model = tiny_family(family)
    balance = measured(model)
    for each in balance:
        for scale in (each.inner, each.value, each.key):
            assert scale.std() > 0.01
    ids = torch.randint(0, 97, (3, 21))
    plan = plan_rotations(model_geometry(model.config), seed=3)
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
    some, fewer = measured(model, samples, mask), measured(model, samples[[0, 2, 3]])
    for a, b in zip(some, fewer, strict=True):
        torch.testing.assert_close(a.inner, b.inner)
        torch.testing.assert_close(a.value, b.value)
        torch.testing.assert_close(a.key, b.key)
    assert not torch.allclose(measured(model, samples)[0].inner, some[0].inner)
