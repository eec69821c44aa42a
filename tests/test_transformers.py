# SPDX-License-Identifier: Apache-2.0
"""Unchanged transformers code on our checkpoints: from_pretrained, save_pretrained, generate and
pipeline, and what must be refused because it would silently drop the prefix."""

import json
import logging
import shutil
import subprocess
import sys

import prefixquant
import pytest
import torch
from prefixquant.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_checkpoint, write_checkpoint
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.errors import CheckpointError, UnsupportedModelError
from prefixquant.integrations.transformers import PrefixQuantConfig, _single_device
from prefixquant.modeling.cache import QuantizedLayer
from prefixquant.quantize import quantize
from prefixquant.simulate import SimulatedModel
from prefixquant.workflow import hf_config_dict
from tiny_families import FAMILIES, tiny_family
from tiny_model import byte_tokenizer
from transformers import AutoModelForCausalLM, pipeline
from transformers.quantizers import HfQuantizer

CALIBRATION = torch.randint(0, 97, (400,), generator=torch.Generator().manual_seed(1))


def save(folder, family="llama", scheme="w4a4kv4", **changes):
    model = tiny_family(family, **changes)
    recipe = RecipeConfig(
        scheme=Scheme.parse(scheme),
        prefix="text:ab",
        nsamples=2,
        seqlen=32,
        search_samples=2,
        search_seqlen=32,
    )
    result = quantize(model, byte_tokenizer(), recipe, CALIBRATION)
    config = hf_config_dict(model, result.tensors)
    write_checkpoint(
        folder, result.tensors, config, result.quantization, tokenizer=byte_tokenizer()
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # Every id of the byte tokenizer has an embedding: pipelines work on real text.
    return save(tmp_path_factory.mktemp("transformers") / "llama", vocab_size=258)


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def float32_attention(monkeypatch):
    """As in test_modeling: long queries attend in bfloat16, which flips levels of random models."""
    monkeypatch.setattr("prefixquant.modeling.attention.matmul_dtype", lambda device: torch.float32)


def ids(batch=2, length=13, seed=5):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, **arguments):
    defaults = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mask = arguments.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, attention_mask=mask, **{**defaults, **arguments})


def test_from_pretrained_is_load(checkpoint, model, caplog):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert torch.equal(model(ids()).logits, prefixquant.load(checkpoint)(ids()).logits)
    assert model.is_quantized
    assert isinstance(model.config.quantization_config, PrefixQuantConfig)
    # The report of transformers' loader: nothing missing, nothing unexpected.
    loaded, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["50GB", "20kB"])
def test_save_pretrained_round_trip(family, max_shard_size, tmp_path):
    folder = save(tmp_path / "q", family)
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        again, max_shard_size=max_shard_size
    )
    assert (again / WEIGHTS_NAME).exists() == (max_shard_size == "50GB")
    before, after = read_checkpoint(folder), read_checkpoint(again)
    assert after.quantization == before.quantization
    assert after.sizes == before.sizes
    assert set(after.tensors) == set(before.tensors)
    for name in before.tensors:
        assert after.tensors[name].dtype == before.tensors[name].dtype
        assert torch.equal(after.tensors[name], before.tensors[name])
    if max_shard_size == "50GB":
        assert (again / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()
    reloaded = AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(reloaded(ids()).logits, prefixquant.load(folder)(ids()).logits)


def test_a_model_of_load_is_saved_too_after_its_folder_is_gone(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "q")
    weights = (folder / WEIGHTS_NAME).read_bytes()
    model = prefixquant.load(folder)
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == weights
    assert "auto_map" not in json.loads((tmp_path / "again" / CONFIG_NAME).read_text())


# ---------------------------------------------------------------------------- generate


def greedy_reference(folder, prompt, new_tokens):
    """One token after the other through the fake-quantized blocks, where the 16-bit K/V of the
    prefix are concatenated in front of the sequence's; no cache, no padding, no batch."""
    simulated = SimulatedModel(folder)
    for _ in range(new_tokens):
        token = simulated(prompt).logits[:, -1].argmax(-1, keepdim=True)
        prompt = torch.cat([prompt, token], 1)
    return prompt[0, -new_tokens:]


def test_left_padded_greedy_tokens_equal_the_prefixed_reference(checkpoint, model):
    prompts = [ids(1, length, seed=length) for length in (3, 11, 7)]
    longest = max(p.shape[1] for p in prompts)
    pad = [longest - p.shape[1] for p in prompts]
    batch = torch.cat(
        [torch.nn.functional.pad(p, (n, 0), value=1) for p, n in zip(prompts, pad, strict=True)]
    )
    mask = torch.ones_like(batch)
    for row, n in enumerate(pad):
        mask[row, :n] = 0
    together = generate(model, batch, attention_mask=mask)[:, longest:]
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, greedy_reference(checkpoint, prompt, 9))


def test_generation_modes_agree(model):
    prompt = ids(1, 11)
    greedy = generate(model, prompt)
    for arguments in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 2},
        {"num_beams": 1, "num_return_sequences": 1},
    ):
        assert torch.equal(generate(model, prompt, **arguments), greedy), arguments
    beams = generate(model, prompt, num_beams=3, num_return_sequences=2)
    assert torch.equal(
        beams, generate(model, prompt, num_beams=3, num_return_sequences=2, use_cache=False)
    )
    padded = torch.nn.functional.pad(prompt, (4, 0), value=1)
    mask = (torch.arange(15) >= 4).long()[None]
    for arguments in ({"prefill_chunk_size": 4}, {"cache_implementation": "static"}):
        again = generate(model, padded, attention_mask=mask, **arguments)
        assert torch.equal(again[:, 4:], greedy), arguments


def test_the_cache_stores_four_bits(model):
    output = generate(model, ids(), return_dict_in_generate=True)
    layers = output.past_key_values.layers
    assert all(type(layer) is QuantizedLayer for layer in layers)
    assert layers[0].keys.dtype == torch.uint8
    assert layers[0].keys.shape[-1] == 16 // 2  # two values a byte


def test_pipeline(checkpoint):
    generator = pipeline("text-generation", model=str(checkpoint))
    text = "Some text"  # no near tie among its tokens
    result = generator([text, "A longer text"], max_new_tokens=4, do_sample=False, batch_size=2)
    assert all(
        r[0]["generated_text"].startswith(t)
        for r, t in zip(result, (text, "A longer"), strict=True)
    )
    prompt = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
    expected = byte_tokenizer().decode(greedy_reference(checkpoint, prompt, 4))
    alone = generator(text, max_new_tokens=4, do_sample=False)
    assert alone[0]["generated_text"] == text + expected


# ---------------------------------------------------------------------------- refusals


def test_another_attention_is_refused(model):
    model.set_attn_implementation("sdpa")
    for call in (model, model.model, lambda x: generate(model, x)):
        with pytest.raises(ValueError, match="attn_implementation: expected 'prefixquant'"):
            call(ids())


def test_asking_for_another_attention_is_answered(checkpoint, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa")
    if hasattr(HfQuantizer, "update_attn_implementation"):  # transformers from 5.18 on lets us know
        assert "attn_implementation='sdpa' is replaced" in caplog.text
    assert torch.equal(model(ids()).logits, prefixquant.load(checkpoint)(ids()).logits)


def test_attention_weights_are_refused(model):
    message = "output_attentions: expected False"
    with pytest.raises(ValueError, match=message):
        model(ids(), output_attentions=True)
    with pytest.raises(ValueError, match=message):
        generate(model, ids(), output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="output_attentions"):  # transformers' own refusal
        model.config.output_attentions = True


SLIDING_QWEN3 = {
    "model_type": "qwen3",
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": DYNAMIC_ROPE}, "dynamic"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral", "sliding_window": 64}, "full attention"),
        (SLIDING_QWEN3, "full attention"),
        ({"model_type": "gemma3_text", "sliding_window": 512}, "gemma3_text"),
    ],
)
def test_models_that_would_lose_the_prefix_are_refused(checkpoint, tmp_path, changes, message):
    folder = shutil.copytree(checkpoint, tmp_path / "q")
    config = json.loads((folder / CONFIG_NAME).read_text())
    config.pop("rope_parameters", None)
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "q")
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["quantization_config"]["prefix_token_ids"] = [5]
    config["quantization_config"]["prefix_text"] = ["x"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="prefix_key expected shape"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_float_model_with_our_config_is_refused(tmp_path):
    folder = tmp_path / "float"
    tiny_family("llama").save_pretrained(folder)
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=PrefixQuantConfig())


def test_device_map():
    assert _single_device(None) == "cpu"
    assert _single_device({"": 1}) == "cuda:1"
    assert _single_device("cuda") == "cuda"
    with pytest.raises(ValueError, match="device_map: expected one device"):
        _single_device({"model": "cpu", "lm_head": "disk"})


# ---------------------------------------------------------------------------- registration


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


LOAD = """
import sys
{before}
from transformers import AutoModelForCausalLM
{after}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **dict({arguments}))
print(model.hf_quantizer.quantization_config.quant_method)
"""


def check_registration(checkpoint, before, after="", arguments=""):
    done = run_python(LOAD.format(before=before, after=after, arguments=arguments), checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "prefixquant"


def test_import_before_transformers(checkpoint):
    check_registration(checkpoint, "import prefixquant; assert 'transformers' not in sys.modules; ")


@pytest.mark.slow
def test_import_after_transformers(checkpoint):
    check_registration(checkpoint, "", "import prefixquant")


@pytest.mark.slow
def test_auto_map_imports_the_package(checkpoint):
    check_registration(checkpoint, "", "", "trust_remote_code=True")


NOT_INSTALLED = """
class Missing:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "prefixquant":
            raise ModuleNotFoundError("No module named 'prefixquant'", name="prefixquant")
sys.meta_path.insert(0, Missing())
"""


@pytest.mark.slow
def test_without_the_package_auto_map_says_what_to_install(checkpoint):
    code = LOAD.format(before=NOT_INSTALLED, after="", arguments="trust_remote_code=True")
    done = run_python(code, checkpoint)
    assert done.returncode != 0
    assert "pip install prefixquant" in done.stderr
