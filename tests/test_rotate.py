# SPDX-License-Identifier: Apache-2.0
"""Norm folding, rotations and the hidden prefix leave the float model's function as it is."""

import pytest
import torch
from prefixquant.block import block_forward
from prefixquant.config import RecipeConfig, Rotations, Scheme
from prefixquant.decoder import FloatDecoder
from prefixquant.errors import UnsupportedModelError, UserError
from prefixquant.hadamard import hadamard_matrix
from prefixquant.roles import block_weights, model_blocks, model_geometry, model_roles
from prefixquant.rotate import plan_rotations, rotate_block, rotate_last_dim
from tiny_families import FAMILIES, tiny_family


def run(decoder: FloatDecoder, ids: torch.Tensor, prefix: tuple[int, ...] = ()) -> torch.Tensor:
    for _, x in decoder.run(ids, decoder.prefix(prefix)):
        stream = x
    return decoder.logits(stream, decoder.head_weight())


@pytest.mark.parametrize("options", [{"rotate": False}, {}, {"r6": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_change(family, options):
    model = tiny_family(family)
    ids = torch.randint(0, 97, (3, 21))
    plan = plan_rotations(model_geometry(model.config), seed=3, **options)
    expected = model(ids).logits
    # measured: 1.4e-6 of logits up to 3
    torch.testing.assert_close(run(FloatDecoder(model, plan), ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("r6", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_prefix_equals_prefix_tokens(family, r6):
    model = tiny_family(family)
    ids, prefix = torch.randint(0, 97, (2, 17)), (5, 9, 0)
    plan = plan_rotations(model_geometry(model.config), r6=r6)
    in_front = torch.tensor(prefix).expand(2, -1)
    expected = model(torch.cat([in_front, ids], dim=1)).logits[:, len(prefix) :]
    actual = run(FloatDecoder(model, plan), ids, prefix)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Rotations(r4_block_size=80, r5=True, r5_block_size=48)),
        ({"r4_block_size": 20}, Rotations(r4_block_size=20, r5=True, r5_block_size=48)),
        ({"r5_block_size": 16}, Rotations(r4_block_size=80, r5=True, r5_block_size=16)),
        ({"r5_block_size": 24}, Rotations(r4_block_size=80, r5=True, r5_block_size=24)),
        ({"r5_block_size": 1}, Rotations(r4_block_size=80)),
        (
            {"r6": True},
            Rotations(r1=False, r4_block_size=80, r5=True, r5_block_size=48, r6=True),
        ),
        (
            {"r6": True, "rotate": False},
            Rotations(r1=False, r2=False, r3=False, r4=False),
        ),
    ],
)
def test_blocks_of_online_rotations(options, expected):
    model = tiny_family("llama")
    plan = plan_rotations(model_geometry(model.config), **options)
    assert plan.rotations == expected
    ids = torch.randint(0, 97, (1, 9))
    torch.testing.assert_close(
        run(FloatDecoder(model, plan), ids), model(ids).logits, rtol=0, atol=2e-5
    )


def test_rotation_changes_every_weight():
    """The invariance above would also hold if nothing were rotated."""
    model = tiny_family("qwen2")
    roles = model_roles(model.config)
    before = block_weights(model_blocks(model, roles)[0], roles)
    after = rotate_block(before, plan_rotations(model_geometry(model.config)))
    for role in roles.linears:
        assert (after.weights[role] - before.weights[role]).abs().max() > 0.01, role
    assert torch.equal(after.input_norm, torch.ones(48))


def test_r6_rotates_what_the_norms_give_and_leaves_the_stream():
    """Norms keep their weights, embedding and head their channels, and what q, k, v, gate and up
    read is the Hadamard transform of what they read without."""
    model = tiny_family("qwen2")
    seen, decoders = [], []
    for options in ({"rotate": False}, {"r6": True}):
        decoder = FloatDecoder(model, plan_rotations(model_geometry(model.config), **options))
        tap, x = {}, decoder.embed(torch.arange(8)[None])
        block_forward(decoder.block(0), decoder.shape, x, decoder.rope(8), tap=tap.__setitem__)
        seen.append(tap)
        decoders.append(decoder)
    plain, with_r6 = decoders
    assert with_r6.shape.r6_size == 48
    assert torch.equal(plain.embedding_weight(), with_r6.embedding_weight())
    assert torch.equal(plain.head_weight(), with_r6.head_weight())
    roles = model_roles(model.config)
    before = block_weights(model_blocks(model, roles)[0], roles)
    after = with_r6.block(0)
    matrix = hadamard_matrix(48)
    for point, norm in (("qkv", "input_norm"), ("gate_up", "post_norm")):
        weight = getattr(before, norm)
        assert weight.std() > 0.1
        assert torch.equal(getattr(after, norm), weight)
        expected = (seen[0][point] * weight).double() @ matrix.T
        torch.testing.assert_close(seen[1][point], expected.float(), rtol=0, atol=1e-5)
    for role in ("q", "k", "v", "gate", "up"):
        columns = before.weights[role].double() @ matrix.T
        rows = hadamard_matrix(16) if role == "v" else None  # R2
        if rows is not None:
            columns = rows @ columns
        torch.testing.assert_close(after.weights[role], columns.float(), rtol=0, atol=1e-6)


def test_bits_of_activations_choose_between_r1_and_r6():
    geometry = model_geometry(tiny_family("llama").config)
    for scheme, r6 in (("w4a4kv4", True), ("w4a4dkv4d", True), ("w4a8kv4", False)):
        recipe = RecipeConfig(scheme=Scheme.parse(scheme))
        plan = plan_rotations(geometry, **recipe.rotation_options)
        assert plan.rotations.r6 is r6
        assert plan.rotations.r1 is not r6
        assert (plan.r1_size, plan.r6_size) == ((1, 48) if r6 else (48, 1))
    plan = plan_rotations(geometry, **RecipeConfig(r6=False).rotation_options)
    assert plan.rotations.r1
    assert not plan.rotations.r6


def test_r1_and_r6_exclude_each_other():
    with pytest.raises(UserError, match="r6 takes the place of r1, expected one of them at most"):
        Rotations(r6=True)
    with pytest.raises(UserError, match="r6 expected true or false"):
        Rotations(r1=False, r6=1)


@pytest.mark.parametrize("size", [1, 2, 12, 16, 40, 48])
def test_rotate_last_dim_is_the_hadamard_matrix(size):
    x = torch.randn(5, 2, 240, dtype=torch.float64)
    matrix = torch.block_diag(*[hadamard_matrix(size)] * (240 // size)) if size > 1 else None
    expected = x if matrix is None else x @ matrix.T
    if 240 % size == 0:
        rotated = rotate_last_dim(x, size)
        torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-12)
        back = rotate_last_dim(rotated, size, inverse=True)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


def test_r5_mixes_the_heads_of_what_o_proj_reads():
    model = tiny_family("llama")
    seen = []
    for size in (1, 0):
        plan = plan_rotations(model_geometry(model.config), r5_block_size=size)
        decoder, tap = FloatDecoder(model, plan), {}
        x = decoder.embed(torch.arange(8)[None])
        block_forward(decoder.block(0), decoder.shape, x, decoder.rope(8), tap=tap.__setitem__)
        seen.append(tap)
    without, with_r5 = seen
    assert torch.equal(without["o"], without["attended"])
    torch.testing.assert_close(with_r5["attended"], without["attended"])
    expected = without["o"] @ hadamard_matrix(48).float().T
    torch.testing.assert_close(with_r5["o"], expected, rtol=0, atol=1e-5)


def test_sizes_without_construction_are_refused():
    model = tiny_family("llama", hidden_size=116, num_attention_heads=2)  # 4 * 29
    for r6 in (False, True):
        with pytest.raises(UnsupportedModelError, match="116"):
            plan_rotations(model_geometry(model.config), r6=r6)
    with pytest.raises(UnsupportedModelError, match="r4_block_size"):
        plan_rotations(model_geometry(tiny_family("llama").config), r4_block_size=32)
    with pytest.raises(UnsupportedModelError, match="r5_block_size"):
        plan_rotations(model_geometry(tiny_family("llama").config), r5_block_size=32)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, "model_type"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("mistral", {"sliding_window": 8}, "sliding_window"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type",
        ),
    ],
)
def test_unsupported_architectures(family, changes, message):
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        model_roles(config)
