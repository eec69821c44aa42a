# SPDX-License-Identifier: Apache-2.0
"""Comparison of models on the same windows, against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
from prefixquant.compare import Candidate, compare


class TableModel:
    """A model whose next-token logits depend on the last token alone: a row of a table."""

    device = torch.device("cpu")

    def __init__(self, table):
        self.table = table

    def __call__(self, input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def tables():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 7, generator=generator)


def test_against_closed_forms(tables):
    samples = torch.randint(7, (3, 601), generator=torch.Generator().manual_seed(1))
    result = compare(
        {"float": Candidate(TableModel(tables[0])), "other": Candidate(TableModel(tables[1]))},
        "float",
        samples,
    )
    p, q = tables.double().log_softmax(-1)
    seen, nxt = samples[:, :-1].flatten(), samples[:, 1:].flatten()
    assert result["other"]["tokens"] == 1800
    assert result["other"]["nll"] == pytest.approx(-q[seen, nxt].mean().item(), rel=1e-5)
    assert result["other"]["ppl"] == pytest.approx(math.exp(result["other"]["nll"]), rel=1e-5)
    assert result["other"]["kl"] == pytest.approx(
        (p.exp() * (p - q)).sum(-1)[seen].mean().item(), rel=1e-5
    )
    agree = (p.argmax(-1) == q.argmax(-1)).double()[seen].mean().item()
    assert result["other"]["top1"] == pytest.approx(agree)
    assert result["float"]["kl"] == 0
    assert result["float"]["top1"] == 1
    assert result["float"]["nll"] == pytest.approx(-p[seen, nxt].mean().item(), rel=1e-5)


def test_a_prefix_is_extra_and_not_counted(tables):
    samples = torch.randint(7, (2, 9), generator=torch.Generator().manual_seed(1))
    model = TableModel(tables[0])
    result = compare({"a": Candidate(model), "b": Candidate(model, (1, 2, 3))}, "a", samples)
    assert result["a"] == result["b"]
    assert result["b"]["tokens"] == 16
