# SPDX-License-Identifier: Apache-2.0
"""The outlier scan and the two ways to choose a prefix."""

from collections import Counter

import pytest
import torch
from prefixquant.errors import UserError
from prefixquant.prefix import (
    OutlierScanner,
    ScanResult,
    Tally,
    initial_token,
    paper_prefix,
    search_prefix,
)
from tiny_families import tiny_family
from tiny_model import byte_tokenizer


def tally(outliers, tokens):
    return Tally([1.0] * len(outliers), outliers, Counter(tokens))


def test_paper_rule():
    # Block means 4/4 and 6/4 outliers a sample: o = ceil(1.5) = 2 tokens, then BOS.
    result = ScanResult((), 4, before_r4=tally([4, 6], {7: 5, 8: 3, 9: 1}))
    assert paper_prefix(result, bos=0) == (7, 8, 0)
    assert paper_prefix(ScanResult((), 4, before_r4=tally([0, 0], {})), bos=0) == (0,)


class PlantedScanner(OutlierScanner):
    """A scanner whose outliers are a function of the prefix."""

    outliers = staticmethod(lambda prefix: {})

    def __init__(self, model, samples, **kwargs):
        pass

    def scan(self, prefix):
        tokens = self.outliers(prefix)
        found = tally([sum(tokens.values())], tokens)
        return ScanResult(prefix, 4, before_r4=found, quantized=found)


@pytest.fixture
def planted(monkeypatch):
    def plant(outliers):
        monkeypatch.setattr(PlantedScanner, "outliers", staticmethod(outliers))
        monkeypatch.setattr("prefixquant.prefix.OutlierScanner", PlantedScanner)
        return tiny_family("llama")

    return plant


def search(model, mode="verified"):
    samples = torch.zeros(4, 8, dtype=torch.long)
    return search_prefix(model, byte_tokenizer(), samples, mode=mode)


def test_verified_stops_at_bos_where_the_paper_adds_a_token(planted):
    model = planted(lambda prefix: {} if prefix else {40: 4})
    found = search(model)
    assert found.prefix == (0,)
    assert [step.prefix for step in found.steps] == [(), (0,), (40, 0)]
    assert search(model, "paper").prefix == (40, 0)


def test_verified_adds_tokens_while_outliers_remain(planted):
    planted_tokens = {40: 9, 41: 5}
    model = planted(lambda prefix: {t: n for t, n in planted_tokens.items() if t not in prefix})
    assert search(model).prefix == (41, 40, 0)


def test_verified_gives_up_where_a_token_does_not_help(planted):
    model = planted(lambda prefix: {40: 9})
    assert search(model).prefix == (0,)


def test_scan_finds_a_planted_outlier_token():
    """Token 42 gets an embedding that drives one gate and up row of block 1 a hundredfold."""
    model = tiny_family("llama")
    ids = torch.randint(0, 40, (4, 32))
    ids[1, 7] = ids[3, 20] = 42
    model.get_input_embeddings().weight[42] *= 30
    for block in model.model.layers:
        block.mlp.gate_proj.weight[3] = 0
        block.mlp.up_proj.weight[3] = 0
        block.mlp.down_proj.weight[:, 3] = 0
    row = model.get_input_embeddings().weight[42]
    block = model.model.layers[0]
    block.post_attention_layernorm.weight.fill_(1)
    block.mlp.gate_proj.weight[3] = row / row.norm() * 50
    block.mlp.up_proj.weight[3] = row / row.norm() * 50
    found = OutlierScanner(model, ids, eta=64.0, r4_size=80).scan(())
    for result in (found.before_r4, found.quantized):
        assert result.tokens.most_common(1) == [(42, 2)]
        assert result.max_ratio[0] > 64
        assert result.at_position_0 == 0
    # R4 spreads the one channel over 80: the ratio falls, by at most sqrt(80).
    fall = found.before_r4.max_ratio[0] / found.quantized.max_ratio[0]
    assert 1 < fall < 9


def test_modes_that_are_given():
    model, samples = tiny_family("llama"), torch.randint(0, 97, (2, 16))
    tokenizer = byte_tokenizer()
    for mode, prefix in (
        ("none", ()),
        ("bos", (0,)),
        ("text:a", tuple(tokenizer("a", add_special_tokens=False)["input_ids"])),
    ):
        found = search_prefix(model, tokenizer, samples, mode=mode)
        assert found.prefix == prefix
        report = found.to_dict(tokenizer)
        assert report["steps"][0]["float_perplexity"] > 1
    with pytest.raises(UserError, match="text:"):
        search_prefix(model, tokenizer, samples, mode="text:")


def test_initial_token_of_families_without_bos():
    model, tokenizer = tiny_family("qwen2"), byte_tokenizer()
    tokenizer.bos_token = None
    assert initial_token(model, tokenizer) == (1, "eos_token_id of the tokenizer")
