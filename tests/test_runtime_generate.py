# SPDX-License-Identifier: Apache-2.0
"""`model.generate` on the runtime: the tokens of transformers' own loop, and who answers what."""

import pytest
import torch
from prefixquant.integrations.runtime_generate import generate_on_runtime
from prefixquant.modeling import load
from prefixquant.modeling.linear import QuantLinear
from prefixquant.modeling.load import linear_weight_bytes
from prefixquant.modeling.runtime_weights import runtime_weights
from prefixquant.runtime import Runtime, Sampling
from test_modeling import generate, ids, save
from test_runtime import float32_attention  # noqa: F401  (a fixture)
from tiny_families import FAMILIES, tiny_family

WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2}  # rows of q, k, v end at blocks of 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "llama"
    save(path, tiny_family("llama", **WIDE))
    return path


@pytest.fixture
def served(folder, monkeypatch):
    """(the model on the runtime, the same without it, the requests that the runtime answered)"""
    model = load(folder)
    runtime = generate_on_runtime(model)
    answered, stream = [], runtime.stream

    def recording(*arguments):
        answered.append(arguments)
        return stream(*arguments)

    monkeypatch.setattr(runtime, "stream", recording)
    return model, load(folder), answered


def padded(lengths=(3, 11, 7)):
    prompts = [ids(1, n, seed=n)[0] for n in lengths]
    longest = max(lengths)
    batch = torch.stack(
        [torch.nn.functional.pad(p, (longest - len(p), 0), value=1) for p in prompts]
    )
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return batch, mask


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w8a8kv16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_runtime_of_a_model_is_that_of_its_checkpoint(family, scheme, tmp_path):
    save(tmp_path / "q", tiny_family(family), scheme)
    model = load(tmp_path / "q")
    expected = Runtime.from_checkpoint(tmp_path / "q", max_length=64)
    actual = Runtime(runtime_weights(model), max_length=64)
    for runtime in (actual, expected):
        runtime.stop_ids = frozenset()
    prompts = [row.tolist() for row in ids(3, 20)]
    assert actual.generate(prompts, 9) == expected.generate(prompts, 9)
    assert generate(model, ids(3, 20))[:, 20:].tolist() == actual.generate(prompts, 9)


@pytest.mark.parametrize(("changes", "shared"), [(WIDE, True), ({"head_dim": 8}, False)])
def test_one_copy_of_the_weights_serves_both(changes, shared, tmp_path):
    save(tmp_path / "q", tiny_family("llama", **changes))
    model = load(tmp_path / "q")
    before, expected = linear_weight_bytes(model), model(ids()).logits
    block = runtime_weights(model).blocks[1]
    attention = model.model.layers[1].self_attn
    inside = block.qkv.weight.untyped_storage().data_ptr()
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert (linear.weight.untyped_storage().data_ptr() == inside) == shared
    assert block.gate_up.weight is model.model.layers[1].mlp.gate_up_proj.weight
    assert linear_weight_bytes(model) == before
    assert torch.equal(model(ids()).logits, expected)


def test_plain_requests_go_to_the_runtime(served):
    model, plain, answered = served
    batch, mask = padded()
    for arguments in ({}, {"max_new_tokens": 1}, {"attention_mask": mask}):
        inputs = batch if "attention_mask" in arguments else ids(2, 9)
        assert torch.equal(
            generate(model, inputs, **arguments), generate(plain, inputs, **arguments)
        )
    assert len(answered) == 3
    stop = generate(plain, ids(1, 9))[0, 12].item()
    expected = generate(plain, ids(2, 9), eos_token_id=stop)
    assert (expected[0, 13:] == 1).all()  # padding behind the end
    assert torch.equal(generate(model, ids(2, 9), eos_token_id=stop), expected)


def test_a_streamer_gets_the_prompt_once_and_every_token(served):
    class Streamer:
        def __init__(self):
            self.parts, self.ended = [], 0

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.ended += 1

    model, plain, answered = served
    # One request for the runtime, and one that it leaves to transformers.
    for arguments in ({}, {"repetition_penalty": 1.3}):
        streamers = Streamer(), Streamer()
        for one, streamer in zip((model, plain), streamers, strict=True):
            generate(one, ids(1, 9), streamer=streamer, **arguments)
        assert streamers[0].parts == streamers[1].parts
        assert streamers[0].ended == streamers[1].ended == 1
    assert len(answered) == 1


def test_a_streamer_that_raises_leaves_the_runtime_usable(served):
    class CancelledError(Exception):
        pass

    class Streamer:
        count = 0

        def put(self, value):
            self.count += 1
            if self.count == 4:
                raise CancelledError

        def end(self):
            raise AssertionError("not reached")

    model, plain, _ = served
    with pytest.raises(CancelledError):
        generate(model, ids(1, 9), streamer=Streamer())
    assert torch.equal(generate(model, ids(1, 9)), generate(plain, ids(1, 9)))


def test_sampling_is_that_of_the_runtime(served):
    model, _, answered = served
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(5)
    first = generate(model, ids(1, 9), **options)
    sampling = answered[0][2]
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 20, 0.9)
    torch.manual_seed(5)
    assert torch.equal(generate(model, ids(1, 9), **options), first)
    assert not torch.equal(generate(model, ids(1, 9), **options), first)
    generate(model, ids(1, 9), do_sample=True)
    assert answered[-1][2] == Sampling(1.0, top_k=50, seed=answered[-1][2].seed)  # its defaults


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "min_p": 0.1},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"suppress_tokens": [5]},
        {"sequence_bias": {(7,): 2.0}},
        {"max_time": 100.0},
        {"max_new_tokens": 510},
    ],
)
def test_other_requests_go_to_transformers(served, arguments):
    model, plain, answered = served
    if arguments.get("max_new_tokens"):
        plain.config.eos_token_id = None
        arguments = {**arguments, "eos_token_id": generate(plain, ids(1, 9))[0, 12].item()}
    results = []
    for one in (model, plain):
        torch.manual_seed(3)
        results.append(generate(one, ids(1, 9), **arguments))
    assert torch.equal(*results)
    assert not answered


def test_requests_in_another_form_go_to_transformers(served):
    model, plain, answered = served
    output = generate(model, ids(1, 9), return_dict_in_generate=True, output_scores=True)
    assert len(output.scores) == 9
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])  # right padding
    assert torch.equal(
        generate(model, ids(2, 9), attention_mask=mask),
        generate(plain, ids(2, 9), attention_mask=mask),
    )
    cache = model(ids(1, 4), use_cache=True).past_key_values
    generate(model, ids(1, 9), past_key_values=cache)
    assert not answered


@pytest.mark.parametrize("scheme", ["w4a16kv4", "w4a8dkv8"])
def test_a_model_without_runtime_stays_as_it_is(scheme, tmp_path):
    save(tmp_path / "q", tiny_family("llama"), scheme)
    model = load(tmp_path / "q")
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    assert generate_on_runtime(model) is None
    assert "generate" not in vars(model)
