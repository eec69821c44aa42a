# SPDX-License-Identifier: Apache-2.0
"""What `prefixquant bench` reports, on sizes that take no time."""

import json

import pytest
import torch
from prefixquant import bench
from prefixquant.bench import Case, bench_report, describe_bench, measure, step_bytes
from prefixquant.cli import app
from prefixquant.config import Scheme
from prefixquant.errors import UserError
from prefixquant.runtime import Runtime, random_weights
from typer.testing import CliRunner

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny = {
        **random_weights.SHAPES["smollm2-135m"],
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    monkeypatch.setitem(random_weights.SHAPES, "tiny", tiny)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "WARM_UPS", 1)


def test_report():
    case = Case(2, 20, 4)
    report = bench_report(
        "tiny", case, CPU, scheme=Scheme.parse("w4a4kv4"), baseline=True, profile=True
    )
    json.dumps(report)
    for name in ("runtime", "transformers"):
        assert report[name]["prefill_ms"] > 0
        assert report[name]["memory_gb"] is None
    speed = report["runtime"]
    assert speed["decode_tokens_per_s"] == pytest.approx(2e3 / speed["decode_ms"])
    assert speed["prefill_tokens_per_s"] == pytest.approx(40e3 / speed["prefill_ms"])
    names = {row["name"] for row in report["profile"]}
    assert {"prefixquant::gemm_w4a8", "prefixquant::kv_decode_attention"} <= names
    text = describe_bench(report)
    assert "runtime" in text
    assert "kv_decode_attention" in text


def test_bytes_of_a_step():
    runtime = Runtime(
        random_weights.random_weights(
            random_weights.shape_config("tiny"), Scheme.parse("w4a4kv4"), CPU
        )
    )
    found = step_bytes(runtime, Case(3, 10))
    # Inputs and outputs are multiples of what the kernels pad to: half a byte a weight.
    weights = (8 * 16 * 64 + 64 * 64 + 2 * 96 * 64 + 64 * 128) // 2
    assert found["linears"] == 2 * weights
    assert found["lm_head"] == 97 * 64 * 2
    assert found["kv_cache"] == 2 * 2 * 3 * 10 * 2 * 16 // 2


def test_measure_takes_the_median(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(bench, "WARM_UPS", 2)
    rounds = iter([(9.0, 9.0), (8.0, 8.0), (1.0, 30.0), (2.0, 10.0), (4.0, 20.0)])
    speed = measure(lambda prompts, new: next(rounds), Case(5, 7, 11), 97, CPU)
    assert (speed.prefill_ms, speed.decode_ms) == (2000.0, 2000.0)
    assert speed.decode_tokens_per_s == 2.5
    assert speed.prefill_tokens_per_s == 17.5
    speed = measure(lambda prompts, new: (2.0, 0.0), Case(1, 8, 1), 97, CPU)  # a prefill alone
    assert (speed.decode_ms, speed.decode_tokens_per_s) == (None, None)
    assert speed.prefill_tokens_per_s == 4.0


def test_one_new_token():
    report = bench_report(
        "tiny", Case(1, 20, 1), CPU, scheme=Scheme.parse("w4a4kv4"), baseline=True
    )
    for name in ("runtime", "transformers"):
        assert report[name]["decode_ms"] is None
        assert report[name]["prefill_ms"] > 0
    assert "decode " not in describe_bench(report).split("runtime", 1)[1]


def test_sixteen_bit_cache_and_eight_bit_head():
    report = bench_report(
        "tiny", Case(1, 5, 2), CPU, scheme=Scheme.parse("w4a8kv4"), kv_bits=16, head_bits=8
    )
    assert report["step_bytes"]["kv_cache"] == 2 * 2 * 5 * 2 * 16 * 4


@pytest.mark.parametrize("scheme", ["w4a16kv4", "w4a4dkv4"])
def test_wrong_scheme(scheme):
    with pytest.raises(UserError, match="scheme: expected static"):
        bench_report("tiny", Case(1, 5, 2), CPU, scheme=Scheme.parse(scheme))


def test_command(tmp_path):
    arguments = ["bench", "tiny", "--context", "8", "--new-tokens", "3", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["case"] == {"batch": 1, "context": 8, "new_tokens": 3}
    result = CliRunner().invoke(app, ["bench", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 2
    assert "expected a prefixquant checkpoint or one of" in result.stderr


def test_every_option_of_the_command():
    arguments = ["bench", "tiny", "--batch", "2", "--context", "6", "--new-tokens", "2", "--json"]
    arguments += ["--scheme", "w4a8kv8", "--head-bits", "8", "--kv-bits", "16", "--device", "cpu"]
    arguments += ["--baseline", "--profile"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["case"] == {"batch": 2, "context": 6, "new_tokens": 2}
    assert "profile" in report
    assert "transformers" in result.stdout  # the baseline
