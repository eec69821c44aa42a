# SPDX-License-Identifier: Apache-2.0
"""Reports: strict JSON, a page that loads nothing, a model card, README tables."""

import importlib.util
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from prefixquant.config import QuantizationConfig, RecipeConfig, Rotations
from prefixquant.report import (
    describe_search,
    format_bytes,
    model_card,
    plain,
    quantize_report,
    replace_files,
    report_json,
    table,
)
from prefixquant.report_html import line_chart, render_html

ROOT = Path(__file__).resolve().parent.parent

QUANTIZATION = QuantizationConfig(
    weight_bits=4,
    activation_bits=4,
    kv_bits=4,
    rotations=Rotations(r4_block_size=64),
    prefix_token_ids=(0,),
    prefix_text=("<s>",),
    prefix_mode="verified",
    solver="rtn",
    producer="test",
)


STEP = {
    "float_perplexity": 14.125,
    "outlier_tokens": 12,
    "most_frequent": [{"token": 3, "text": " the", "count": 9}],
}


STEP["before_r4"] = {"max_ratio": [5.0, 3000.0, 1.0], "outliers": [0, 4, 0]}


def report(**details):
    return quantize_report(
        {
            "prefix": {
                "steps": [
                    {"prefix": [], "text": [], "max_ratio": [3.0, 2450.5, math.nan], **STEP},
                    {
                        **STEP,
                        "prefix": [0],
                        "text": ["<s>"],
                        "max_ratio": [3.0, 21.5, 2.0],
                        "before_r4": {"max_ratio": [2.0, 17.25, 1.0], "outliers": [0, 0, 0]},
                    },
                ],
                "prefix": [0],
                "profiles": {
                    "block": 1,
                    "steps": [
                        {"before_r4": [3000.0, 1.0, 2.0], "quantized": [2450.0, 1.0, 2.0]},
                        {"before_r4": [1.5, 1.0, 2.0], "quantized": [1.5, 1.0, 2.0]},
                    ],
                },
                "bos_source": "bos_token_id of the tokenizer",
            },
            "blocks": [
                {"block": i, "relative_error": 10.0**-i, "qkv_scale": 1.5, "k_scale": [0.1, 0.2]}
                for i in range(3)
            ],
            "stage_seconds": {"prefix_search": torch.tensor(0.25)},
            **details,
        },
        RecipeConfig(),
        QUANTIZATION,
        source="owner/<model>",
        calibration="pydoc",
        command=["/opt/bin/prefixquant", "quantize", "a b"],
        seconds=12.5,
    )


def test_report_is_strict_json():
    data = json.loads(report_json(report()))
    assert data["prefix"]["steps"][0]["max_ratio"] == [3.0, 2450.5, None]
    assert data["stage_seconds"] == {"prefix_search": 0.25}
    assert data["recipe"]["scheme"] == "w4a4kv4"
    assert data["command_line"] == "prefixquant quantize 'a b'"
    assert data["peak_memory_bytes"]["host"] > 10**7
    assert data["time"].endswith("+00:00")


def test_plain():
    value = {1: (torch.tensor([1, 2]), torch.float16, {3}, True, None, math.inf)}
    assert plain(value) == {"1": [[1, 2], "torch.float16", [3], True, None, None]}


def test_page_is_self_contained_and_escaped():
    page = render_html(report(surprise="<script>alert(1)</script>"))
    assert "<script" not in page
    assert not re.search(r"(src|href|url|@import)\s*[=(]", page)
    assert "owner/&lt;model&gt;" in page
    # Token maxima, ratios, outlier tokens; error, activation scales, scales of heads.
    assert page.count("<svg") == 6
    assert "<b>3000</b> medians" in page
    assert "With prefix &#x27;&lt;s&gt;&#x27; no token after position 0" in page
    assert "<b>17.2</b>" in page
    assert "block 1, one window" in page
    assert re.search(r"<td class=.n.>2450.5</td>", page)  # the control table
    assert "eta = 64" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_page_without_details():
    bare = report()
    for key in ("prefix", "blocks", "stage_seconds"):
        del bare[key]
    assert "<svg" not in render_html(bare)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[1.0], [5.0, 5.0], [0.0, 0.0], [1e-9, 1e9], [None, 2.0, math.nan, 3.0], [-1.0, 2.0]]
)
def test_charts_of_awkward_values(values, log):
    svg = line_chart({"a & b": values}, x_label="x", y_label="y", log=log)
    assert "nan" not in svg
    assert "inf" not in svg
    assert "a &amp; b" in svg or "No values" in svg


def test_chart_of_nothing():
    assert "No values" in line_chart({"a": [None]}, x_label="x", y_label="y")


def test_model_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = model_card({"model_type": "llama"}, QUANTIZATION, {**report(), "model": "owner/name"})
    assert card.startswith("---\nlibrary_name: prefixquant\n")
    assert "base_model: owner/name\n" in card
    assert "w4a4kv4" in card
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for local in ("owner/name", "/models/x", "./a", "plain"):
        card = model_card({"model_type": "llama"}, QUANTIZATION, {**report(), "model": local})
        assert "base_model:" not in card


def test_replace_files_is_atomic(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(TypeError):
        replace_files(tmp_path, {"a.json": None})
    assert (tmp_path / "a.json").read_text() == "old"
    replace_files(tmp_path, {"a.json": "new", "b": "x"})
    assert (tmp_path / "a.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b"]


def test_search_as_text():
    lines = describe_search(plain(report()["prefix"])).splitlines()
    assert [line.split() for line in lines] == [
        ["prefix", "outlier", "tokens", "largest", "ratio", "float", "perplexity"],
        ["none", "12", "2450.5", "14.125"],
        ["'<s>'", "12", "21.5", "14.125"],
    ]


def test_text_helpers():
    assert [format_bytes(n) for n in (0, 999, 53_084_160, 10**12)] == [
        "0 B",
        "999 B",
        "53.1 MB",
        "1000.0 GB",
    ]
    assert table([["a", "1"], ["long", "22"]]) == "a      1\nlong  22"


# ---------------------------------------------------------------------------- README


@pytest.fixture
def update_readme(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # it imports its neighbour
    spec = importlib.util.spec_from_file_location(
        "update_readme", ROOT / "benchmarks" / "update_readme.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_documents_are_those_of_the_results(update_readme):
    module = update_readme
    results = module.load_results(ROOT / "benchmarks" / "results")
    for path in module.DOCUMENTS:
        document = path.read_text(encoding="utf-8")
        assert module.update(document, results) == document
    for path, chart in module.charts(ROOT / "benchmarks" / "results").items():
        assert path.read_text(encoding="utf-8") == chart


def test_update_readme(update_readme):
    module = update_readme
    text = "x\n<!-- table:a -->\nold\n<!-- /table -->\ny <!-- table:b -->\n<!-- /table -->"
    results = [
        {"table": "a", "title": "T", "columns": ["s", "n"], "rows": [["p", 1.23456], ["q", None]]},
        {"table": "other", "columns": [], "rows": []},
    ]
    after = module.update(text, results)
    assert "| p | 1.235 |" in after
    assert "| q |  |" in after
    assert "old" not in after
    assert "Not measured yet" in after.split("table:b")[1]
    assert module.update(after, results) == after
    with pytest.raises(ValueError, match="expected 2 cells"):
        module.markdown_table({"columns": ["a", "b"], "rows": [["x"]]})


def test_relative_links_of_the_docs_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
