# SPDX-License-Identifier: Apache-2.0
"""A loaded checkpoint against the fake-quantized blocks it was made of, and under transformers'
generation machinery."""

import copy

import pytest
import torch
from prefixquant import ops
from prefixquant.checkpoint import write_checkpoint
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.errors import UserError
from prefixquant.modeling import load
from prefixquant.modeling.attention import attention_by_sequence, causal_rows
from prefixquant.modeling.cache import QuantizedLayer
from prefixquant.modeling.linear import QuantLinear, RMSNorm, Rotation
from prefixquant.modeling.load import linear_weight_bytes
from prefixquant.quantize import quantize
from prefixquant.simulate import SimulatedModel
from prefixquant.workflow import hf_config_dict
from tiny_families import FAMILIES, tiny_family
from tiny_model import byte_tokenizer

SCHEMES = ("w4a4kv4", "w4a4ckv4", "w4a8kv8", "w8a8kv16", "w4a16kv4")


def recipe(scheme: str, prefix: str = "text:ab", **options) -> RecipeConfig:
    return RecipeConfig(
        scheme=Scheme.parse(scheme),
        prefix=prefix,
        nsamples=2,
        seqlen=32,
        search_samples=12,  # with fewer, tokens that none of them holds are cut off
        search_seqlen=32,
        **options,
    )


CALIBRATION = torch.randint(0, 97, (400,), generator=torch.Generator().manual_seed(1))


def write(folder, model, result):
    config = hf_config_dict(model, result.tensors)
    write_checkpoint(folder, result.tensors, config, result.quantization)


def save(folder, model, scheme="w4a4kv4", prefix="text:ab", **options):
    result = quantize(model, byte_tokenizer(), recipe(scheme, prefix, **options), CALIBRATION)
    write(folder, model, result)
    return result


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    save(folder, tiny_family("llama"))
    return load(folder)


@pytest.fixture(autouse=True)
def float32_attention(monkeypatch):
    """Long queries attend in bfloat16 where the CPU has it: a random model's 4-bit levels flip by
    that, and what is compared here are code paths."""
    monkeypatch.setattr("prefixquant.modeling.attention.matmul_dtype", lambda device: torch.float32)


def ids(batch=2, length=13, seed=5):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, **arguments):
    defaults = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mask = arguments.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, attention_mask=mask, **{**defaults, **arguments})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_model_equals_fake_quantization(family, scheme, tmp_path):
    """The same integers and scales through transformers and the kernels, and through block.py."""
    save(tmp_path / "q", tiny_family(family), scheme)
    prompt = ids()
    actual = load(tmp_path / "q").model(prompt).last_hidden_state
    expected = SimulatedModel(tmp_path / "q").hidden(prompt)
    error = ((actual - expected).square().sum() / expected.square().sum()).item()
    # Measured: 2e-14 to 1.3e-13 (float32 sums in another order), and 1e-6 where one activation at a
    # rounding tie took the neighbouring level; two unrelated models differ by 2.
    assert error < 1e-4


def norms_of(model):
    """The norms of the blocks; that in front of the head is `model.model.norm`."""
    return [
        norm
        for block in model.model.layers
        for norm in (block.input_layernorm, block.post_attention_layernorm)
    ]


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w4a4dkv4"])
@pytest.mark.parametrize("options", [{}, {"r6": False}, {"balance": False}, {"centre": False}])
def test_r6_of_a_checkpoint(scheme, options, tmp_path):
    """The norms of the blocks have it, static and dynamic; without R6 the stream has R1."""
    save(tmp_path / "q", tiny_family("llama"), scheme, **options)
    model, prompt = load(tmp_path / "q"), ids()
    r6 = options.get("r6", True)
    norms = norms_of(model)
    assert all((norm.rotation is not None) == r6 for norm in norms)
    assert all(not r6 or norm.rotation.size == 48 for norm in norms)
    assert model.model.norm.rotation is None
    actual = model.model(prompt).last_hidden_state
    expected = SimulatedModel(tmp_path / "q").hidden(prompt)
    assert (actual - expected).square().sum() / expected.square().sum() < 1e-4
    for norm in norms:  # it is what makes them equal
        norm.rotation = None if r6 else Rotation(48)
    other = model.model(prompt).last_hidden_state
    assert (other - expected).square().sum() / expected.square().sum() > 0.1


def test_the_norms_of_r6_move_with_the_model(tmp_path):
    """Signs and shift keep their dtypes where the model's changes."""
    save(tmp_path / "q", tiny_family("llama"))
    model = load(tmp_path / "q").to(torch.bfloat16)
    norm = norms_of(model)[0]
    assert norm.rotation.signs.dtype == torch.int8
    assert norm.input_scale.dtype == torch.float32
    assert norm.weight.dtype == torch.float16  # as stored
    x = torch.randn(3, 48).bfloat16()
    expected = ops.rmsnorm(x.float(), norm.weight, norm.eps)
    expected = ops.hadamard(expected, norm.rotation.signs, 48) - norm.shift
    off = norm(x) - ops.quantize_static(expected, norm.input_scale, 4)
    assert off.abs().max() <= 1  # ties
    assert (off != 0).sum() <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_model_is_near_the_float_model(family, tmp_path):
    model = tiny_family(family)
    save(tmp_path / "q", model, "w8a8kv8")
    prefix = torch.tensor(byte_tokenizer()("ab")["input_ids"]).expand(2, -1)
    expected = model(torch.cat([prefix, ids()], 1)).logits[:, prefix.shape[1] :]
    error = (load(tmp_path / "q")(ids()).logits - expected).square().sum()
    assert error / expected.square().sum() < 5e-3


def test_cache_equals_no_cache(llama):
    prompt = ids(2, 40)
    whole = llama(prompt, use_cache=False).logits
    first = llama(prompt[:, :7], use_cache=True)
    assert all(type(layer) is QuantizedLayer for layer in first.past_key_values.layers)
    assert first.past_key_values.layers[0].keys.dtype == torch.uint8
    steps = [first.logits]
    for part in (prompt[:, 7:8], prompt[:, 8:11], prompt[:, 11:40]):  # decode, few, chunk
        steps.append(llama(part, past_key_values=first.past_key_values, use_cache=True).logits)
    # The packed and the dequantized attention sum in another order; measured 2e-3 of logits to 3,
    # the bfloat16 head's last bit.
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=2e-2)


def test_left_padding_changes_nothing(llama):
    short, long = ids(1, 6, seed=1), ids(1, 11, seed=2)
    padded = torch.cat([torch.ones(1, 5, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :5] = 0
    together = generate(llama, torch.cat([padded, long]), attention_mask=mask)
    assert torch.equal(together[0, 11:], generate(llama, short)[0, 6:])
    assert torch.equal(together[1, 11:], generate(llama, long)[0, 11:])


def test_generation_modes(llama):
    prompt = ids(1, 9)
    greedy = generate(llama, prompt)
    assert torch.equal(generate(llama, prompt, use_cache=False), greedy)
    assert torch.equal(generate(llama, prompt, cache_implementation="static"), greedy)
    assert torch.equal(generate(llama, prompt, num_beams=1, prompt_lookup_num_tokens=2), greedy)
    beams = generate(llama, prompt, num_beams=3, num_return_sequences=2)
    assert beams.shape == (2, 18)
    assert torch.equal(
        beams, generate(llama, prompt, num_beams=3, num_return_sequences=2, use_cache=False)
    )


def test_bfloat16_attention_of_long_queries(llama, monkeypatch):
    prompt = ids(2, 60)
    expected = llama.model(prompt).last_hidden_state
    monkeypatch.setattr(
        "prefixquant.modeling.attention.matmul_dtype", lambda device: torch.bfloat16
    )
    actual = llama.model(prompt).last_hidden_state
    error = ((actual - expected).square().sum() / expected.square().sum()).item()
    assert 0 < error < 0.1  # measured 0.026, levels that flip; two unrelated models differ by 2


def test_prefix_is_used(tmp_path):
    """Same weights, prefix tensors changed on the disk: other logits."""
    model = tiny_family("llama")
    result = save(tmp_path / "q", model)
    for name in result.tensors:
        if "prefix_value" in name:
            result.tensors[name] *= 4
    write(tmp_path / "other", model, result)
    prompt = ids()
    difference = load(tmp_path / "q")(prompt).logits - load(tmp_path / "other")(prompt).logits
    assert difference.abs().max() > 0.05


def test_no_prefix(tmp_path):
    save(tmp_path / "q", tiny_family("llama"), prefix="none")
    model = load(tmp_path / "q")
    assert model.model.layers[0].self_attn.kv_quantizer.prefix_length == 0
    assert torch.equal(generate(model, ids(1, 5)), generate(model, ids(1, 5), use_cache=False))


def test_another_attention_is_refused(tmp_path):
    save(tmp_path / "q", tiny_family("llama"))
    model = load(tmp_path / "q")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation"):
        model(ids())


def test_dtype_conversion_keeps_scales_and_weights(tmp_path):
    save(tmp_path / "q", tiny_family("qwen3"))
    model = load(tmp_path / "q")
    before = model(ids()).logits
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    scales = [m.weight_scale.clone() for m in linears]
    model.to(torch.bfloat16)
    assert all(torch.equal(m.weight_scale, s) for m, s in zip(linears, scales, strict=True))
    after = model(ids()).logits
    assert after.dtype == torch.bfloat16
    assert (after.float() - before).abs().max() < 0.5  # measured 0.1: 4-bit levels flip


def test_a_copy_is_a_model_of_its_own(llama):
    twin = copy.deepcopy(llama)
    expected = llama(ids(), use_cache=True)
    actual = twin(ids(), use_cache=True)
    assert torch.equal(actual.logits, expected.logits)
    quantizers = [block.self_attn.kv_quantizer for block in twin.model.layers]
    assert [layer.quantizer for layer in actual.past_key_values.layers] == quantizers


def test_weights_stay_packed(llama):
    linears = [m for m in llama.modules() if isinstance(m, QuantLinear)]
    values = sum(m.in_features * m.out_features for m in linears)
    padding = 3  # 80 and 48 inputs are padded to 128 and 64 in the kernel layout
    assert linear_weight_bytes(llama) < padding * values / 2
    assert all(p.numel() == 0 or p.dim() == 1 for p in llama.parameters())


def test_canonical_weight_comes_back(tmp_path):
    result = save(tmp_path / "q", tiny_family("llama"))
    model = load(tmp_path / "q")
    o_proj = model.model.layers[1].self_attn.o_proj
    stored = result.tensors["model.layers.1.self_attn.o_proj.weight_packed"]
    assert torch.equal(o_proj.canonical_weight(), stored)
    assert ops.unpack_int4(stored).shape == (48, 48)


def left_padded_mask(padding, tokens, end, cached):
    """bool [B, 1, T, S] as transformers spells it: the queries are the rows before ``end``."""
    own = end - tokens + torch.arange(tokens)[:, None]
    column = torch.arange(cached)
    rows = [(column <= own) & (column >= skip) for skip in padding]
    return torch.stack(rows)[:, None]


@pytest.mark.parametrize(
    ("padding", "tokens", "end", "cached"),
    [([0, 0], 20, 20, 20), ([3, 0, 19], 20, 20, 20), ([3, 25], 20, 60, 60), ([5, 0], 20, 30, 64)],
)
def test_causal_rows(padding, tokens, end, cached):
    mask = left_padded_mask(padding, tokens, end, cached)
    expected = [(skip, end) for skip in padding]
    assert causal_rows(mask, len(padding), tokens, cached) == expected
    assert causal_rows(mask[:1].clone(), 3, tokens, cached) == expected[:1] * 3
    assert causal_rows(None, 2, tokens, cached) == [(0, cached)] * 2
    for row, column in ((0, 0), (tokens - 1, end - 2), (4, end - 1)):
        other = mask.clone()
        other[0, 0, row, column] ^= True
        assert causal_rows(other, len(padding), tokens, cached) is None
    nothing = torch.zeros_like(mask)
    assert causal_rows(nothing, len(padding), tokens, cached) is None


def test_attention_by_sequence_is_that_of_the_mask(llama):
    """What more than 16 tokens on a GPU take, against the operation with a mask."""
    quantizer = llama.model.layers[0].self_attn.kv_quantizer
    query, key, value = (torch.randn(3, heads, n, 16) for heads, n in ((3, 20), (1, 64), (1, 64)))
    cache = quantizer.quantize(key, value)
    mask = left_padded_mask([3, 0, 25], 20, 40, 64)
    out = attention_by_sequence(quantizer, query, cache, causal_rows(mask, 3, 20, 64), 0.25)
    kv = quantizer
    scales = kv.k_scale, kv.v_scale, kv.prefix_key, kv.prefix_value
    expected = ops.kv_attention(query, cache.key, cache.value, *scales, mask, 0.25)
    seen = mask.any(-1)[:, 0]
    assert seen.sum() == 20 + 20 + 15
    torch.testing.assert_close(out[seen], expected[seen], rtol=0, atol=2e-2)  # bfloat16 products
    assert (out[~seen] == 0).all()


def test_devices_that_are_not_there(tmp_path):
    for device in ("cuda:99", "meta", "tape"):
        with pytest.raises(UserError, match=f"device.*{device}"):
            load(tmp_path, device=device)


def test_usual_dtype_of_another_type_of_device():
    """float32 on a CPU; elsewhere the stored dtype, unless another is asked for."""
    weight = torch.ones(8, dtype=torch.float16)

    def norm():
        return RMSNorm(weight, 1e-5, torch.float32, torch.float16)

    assert norm().compute_dtype == norm().to("cpu").weight.dtype == torch.float32
    moved = norm().to("meta")
    assert moved.compute_dtype == moved.weight.dtype == torch.float16
    asked = norm().to("meta", torch.float32)
    assert asked.compute_dtype == asked.weight.dtype == torch.float32
    assert norm().to(torch.bfloat16).to("meta").compute_dtype == torch.bfloat16


def test_output_attentions_is_refused(llama):
    with pytest.raises(ValueError, match="output_attentions"):
        llama(ids(), output_attentions=True)
