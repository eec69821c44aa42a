# SPDX-License-Identifier: Apache-2.0
"""`prefixquant eval --tasks` runs the unchanged harness on local data, without network."""

import json

import pytest
import torch
from prefixquant.errors import UserError
from prefixquant.integrations.lm_eval import ZERO_SHOT, describe_tasks, task_names
from test_cli import SMALL, assert_one_line_error, run
from tiny_model import byte_tokenizer, save_tiny_llama

DOCUMENTS = [
    {"question": "The sky is", "choices": [" blue", " a fish", " loud"], "answer": 0},
    {"question": "Two and two are", "choices": [" five", " four"], "answer": 1},
    {"question": "Water", "choices": [" is wet", " is dry", " is", " burns"], "answer": 3},
    {"question": "A", "choices": ["b", "cdefghij"], "answer": 1},
]
TASK = """
task: toy
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "toy.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (folder / "toy.yaml").write_text(TASK.format(data=data))
    return folder


def expected_accuracy(model):
    """acc and acc_norm by hand: the text alone, no BOS in front, no padding, no cache."""
    tokenizer = byte_tokenizer()
    right = {"acc": 0, "acc_norm": 0}
    for document in DOCUMENTS:
        scores = []
        start = tokenizer(document["question"])["input_ids"]
        for choice in document["choices"]:
            ids = torch.tensor([start + tokenizer(choice)["input_ids"]])
            logits = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            rows = torch.arange(len(start) - 1, ids.shape[1] - 1)
            scores.append(logits[rows, ids[0, len(start) :]].sum().item())
        normed = [s / len(c) for s, c in zip(scores, document["choices"], strict=True)]
        right["acc"] += scores.index(max(scores)) == document["answer"]
        right["acc_norm"] += normed.index(max(normed)) == document["answer"]
    return {name: count / len(DOCUMENTS) for name, count in right.items()}


def test_a_local_task(toy, tmp_path):
    pytest.importorskip("lm_eval", reason="the [eval] extra is not installed")
    import prefixquant
    from prefixquant.loading import load_float_model

    model = save_tiny_llama(tmp_path / "llama")
    out = tmp_path / "q"
    assert run("quantize", model, "-o", out, *SMALL).exit_code == 0
    arguments = ["--tasks", "toy", "--task-folder", toy, "--reference", model, "--batch-size", "3"]
    result = run("eval", out, "--windows", "0", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    tasks = json.loads(result.stdout)["evaluation"]["tasks"]
    assert tasks["protocol"]["add_bos_token"] is False
    for name, loaded in (
        ("model", prefixquant.load(out)),
        ("reference", load_float_model(str(model), torch.float32)[0]),
    ):
        found = tasks["results"][name]["toy"]
        expected = expected_accuracy(loaded)
        assert {k: found[k] for k in expected} == expected
        assert tasks["average_acc"][name] == expected["acc"]
    text = run("eval", out, "--windows", "1", "--seqlen", "32", *arguments, "--limit", "2").stdout
    assert "perplexity" in text
    assert "first 2 documents" in text
    shots = run("eval", out, "--windows", "0", *arguments[:4], "--shots", "2", "--json")
    protocol = json.loads(shots.stdout)["evaluation"]["tasks"]["protocol"]
    assert protocol["num_fewshot"] == 2
    assert_one_line_error(run("eval", out, "--tasks", "toyz", "--task-folder", toy), "'toyz'")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model = save_tiny_llama(tmp_path / "llama")
    result = run("eval", model, "--windows", "0", "--tasks", "toy")
    assert_one_line_error(result, "--tasks", "pip install 'prefixquant[eval]'")
    assert_one_line_error(run("eval", model, "--windows", "0"), "expected --tasks")


def test_task_names():
    assert task_names("zero-shot") == list(ZERO_SHOT)
    assert task_names("a, b,zero-shot")[:3] == ["a", "b", "piqa"]
    with pytest.raises(UserError, match="expected names"):
        task_names(" , ")


def test_table():
    results = {"toy": {"acc": 0.5, "acc_stderr": 0.1}}
    protocol = {"harness": "lm_eval 0", "num_fewshot": 0, "limit": None, "tasks": ["toy"]}
    text = describe_tasks(
        {"results": {"model": results}, "average_acc": {"model": 0.5}, "protocol": protocol}
    )
    assert "stderr" not in text
    assert text.splitlines()[2].split() == ["average", "acc", "0.5000"]
