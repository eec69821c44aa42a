# SPDX-License-Identifier: Apache-2.0
"""The command line on a tiny random llama: results on stdout, one-line errors with exit code 2."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
from prefixquant.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_checkpoint
from prefixquant.cli import app
from tiny_model import save_tiny_llama
from typer.testing import CliRunner

SCAN = ["--nsamples", "4", "--seqlen", "32"]
SMALL = [*SCAN, "--search-samples", "2", "--search-seqlen", "32"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, model_folder):
    out = tmp_path_factory.mktemp("quantized") / "w4a4kv4"
    result = run("quantize", model_folder, "-o", out, *SMALL)
    assert result.exit_code == 0, result.stderr
    return out


def run(*arguments):
    """The real command in this process; anything unexpected propagates with its traceback."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def assert_one_line_error(result, *words):
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("prefixquant: error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]


# ---------------------------------------------------------------------------- the good path


def test_quantize_writes_a_complete_checkpoint(checkpoint):
    names = {p.name for p in checkpoint.iterdir()}
    assert {CONFIG_NAME, WEIGHTS_NAME, "tokenizer.json", "README.md"} <= names
    assert {"report.json", "report.html"} <= names
    assert str(read_checkpoint(checkpoint).quantization.scheme) == "w4a4kv4"
    report = json.loads((checkpoint / "report.json").read_text())
    assert report["scheme"] == "w4a4kv4"
    assert report["recipe"]["nsamples"] == 4
    assert report["peak_memory_bytes"]["host"] > 0
    assert report["environment"]["versions"]["torch"]
    page = (checkpoint / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_r6_of_the_recipe(checkpoint, model_folder, tmp_path):
    """On by default with 4-bit activations; --no-r6 and more bits have R1 in its place."""
    rotations = read_checkpoint(checkpoint).quantization.rotations
    assert rotations.r6
    assert not rotations.r1
    assert "rotations  R2, R3, R4, R5, R6 (" in run("inspect", checkpoint).stdout
    assert json.loads((checkpoint / "report.json").read_text())["recipe"]["r6"] is True
    for name, arguments in {"r1": ["--no-r6"], "a8": ["--scheme", "w4a8kv4", "--r6"]}.items():
        result = run("quantize", model_folder, "-o", tmp_path / name, *SMALL, *arguments)
        assert result.exit_code == 0, result.stderr
        rotations = read_checkpoint(tmp_path / name).quantization.rotations
        assert rotations.r1
        assert not rotations.r6
        assert "rotations  R1, R2, R3, R4" in run("inspect", tmp_path / name).stdout
    # recipe.yaml remembers it, an option wins over it
    recipe = tmp_path / "r1" / "recipe.yaml"
    assert "\nr6: false\n" in recipe.read_text()
    again = ["--recipe", recipe, "--r6"]
    result = run("quantize", model_folder, "-o", tmp_path / "again", *again)
    assert result.exit_code == 0, result.stderr
    assert read_checkpoint(tmp_path / "again").quantization.rotations.r6


def test_inspect(checkpoint):
    result = run("inspect", checkpoint)
    assert result.exit_code == 0
    assert "w4a4kv4" in result.stdout
    assert "linear weights" in result.stdout
    assert "; centred, keys too" in result.stdout
    data = json.loads(run("inspect", checkpoint, "--json", "--check-values").stdout)
    assert data["bytes"]["linear_weights"] == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3) // 2
    assert data["architecture"]["num_layers"] == 2
    content = (checkpoint / WEIGHTS_NAME).read_bytes()
    assert data["bytes"]["total"] == len(content) - 8 - struct.unpack("<Q", content[:8])[0]
    assert data["bytes"]["shifts"] == 2 * (2 * 32 * 2 + 16 * 4)


def test_inspect_reads_no_weights(checkpoint, tmp_path):
    """A NaN among the values is not its business, unless asked."""
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    path = damaged / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    entry = json.loads(content[8 : 8 + length])["model.layers.0.mlp.input_scale"]
    start = 8 + length + entry["data_offsets"][0]
    content[start : start + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(content)
    assert run("inspect", damaged).exit_code == 0
    assert_one_line_error(run("inspect", damaged, "--check-values"), "mlp.input_scale", "finite")
    assert_one_line_error(run("eval", damaged), "mlp.input_scale", "finite")


def test_eval(checkpoint, model_folder, tmp_path):
    arguments = ["--windows", "2", "--seqlen", "64", "--json"]
    result = run("eval", checkpoint, *arguments, "--reference", model_folder, "-o", tmp_path / "r")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert json.loads((tmp_path / "r").read_text()) == report
    evaluation = report["evaluation"]
    assert evaluation["protocol"] == {"text": "pydoc", "tail": 0.18, "windows": 2, "seqlen": 64}
    # Random weights predict nothing: about as many choices as tokens, quantized or not.
    assert 200 < evaluation["ppl"] < 350
    assert 0 <= evaluation["kl"] < 0.1
    assert 0 <= evaluation["top1"] <= 1
    plain = json.loads(run("eval", model_folder, *arguments).stdout)["evaluation"]
    assert plain["ppl"] == pytest.approx(evaluation["ppl"], rel=0.1)
    assert "perplexity" in run("eval", checkpoint, "--windows", "1", "--seqlen", "64").stdout


def test_generate(checkpoint, model_folder):
    for target in (checkpoint, model_folder):
        result = run("generate", target, "Once upon", "--max-new-tokens", "5", "--json")
        assert result.exit_code == 0, result.stderr
        data = json.loads(result.stdout)
        assert data["prompt_tokens"] == 9
        assert 1 <= data["new_tokens"] <= 5
    result = run("generate", checkpoint, "Once", "--max-new-tokens", "3", "--temperature", "0.8")
    assert result.exit_code == 0
    assert "tokens/s" in result.stderr
    assert "tokens/s" not in result.stdout


def test_seed_of_generate_decides_the_samples(checkpoint):
    def sample(seed):
        arguments = ["--max-new-tokens", "12", "--temperature", "1", "--seed", seed, "--json"]
        return json.loads(run("generate", checkpoint, "Once", *arguments).stdout)["text"]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(3)}) > 1


def test_narrow_sampling_is_greedy(checkpoint):
    def text(*arguments):
        common = ["--max-new-tokens", "6", "--json"]
        return json.loads(run("generate", checkpoint, "Once", *common, *arguments).stdout)["text"]

    greedy = text()
    assert text("--temperature", "2", "--top-k", "1") == greedy
    assert text("--temperature", "2", "--top-p", "0.0001") == greedy
    assert_one_line_error(run("generate", checkpoint, "Once", "--top-p", "0"), "top_p")


def test_head_bits_of_generate(checkpoint):
    arguments = ["--max-new-tokens", "3", "--json", "--head-bits"]
    assert run("generate", checkpoint, "Once", *arguments, "8").exit_code == 0
    assert_one_line_error(run("generate", checkpoint, "Once", *arguments, "3"), "head", "3")


def test_weight_options(model_folder, tmp_path):
    options = ["--scheme", "w4a16kv16", "--group-size", "16", "--compensation", "0"]
    options += ["--solver", "quantease-outlier", "--outlier-fraction", "0.02"]
    out = tmp_path / "out"
    result = run("quantize", model_folder, "-o", out, *SMALL, *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["recipe"]["compensation"] == 0
    quantization = json.loads(run("inspect", out, "--json").stdout)["quantization"]
    assert (quantization["group_size"], quantization["outlier_fraction"]) == (16, 0.02)


def test_scan(model_folder):
    result = run("scan", model_folder, *SCAN, "--seed", "1", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [step["prefix"] for step in report["steps"]][:2] == [[], [0]]
    assert report["steps"][0]["float_perplexity"] > 1
    assert "verified prefix: '<s>'" in run("scan", model_folder, *SCAN).stdout


def plan_peak_bytes():
    from prefixquant.report import peak_memory_bytes

    return peak_memory_bytes()["host"]


def test_recipe_file(checkpoint, model_folder, tmp_path):
    """What a run wrote makes the same checkpoint again; options given beside it win."""
    recipe = checkpoint / "recipe.yaml"
    out = tmp_path / "again"
    assert run("quantize", model_folder, "-o", out, "--recipe", recipe).exit_code == 0
    assert (out / WEIGHTS_NAME).read_bytes() == (checkpoint / WEIGHTS_NAME).read_bytes()
    assert (out / "recipe.yaml").read_text() == recipe.read_text()
    assert "finetune:" in recipe.read_text()
    changed = ["--scheme", "w4a8kv8", "--dry-run", "--json"]
    plan = json.loads(
        run("quantize", model_folder, "-o", tmp_path / "b", "--recipe", recipe, *changed).stdout
    )
    assert plan["scheme"] == "w4a8kv8"
    assert plan["calibration_tokens_needed"] == {"maxima": 4 * 32, "search": 2 * 32}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "No such file"]),
        ("[1, 2", ["cannot be read"]),
        ("- a", ["expected a mapping"]),
        ("scheme: w4a4kv4\nmagic: 1", ["unknown key 'magic'"]),
        ("nsamples: many", ["nsamples expected int", "'many'"]),
        ("finetune: 3", ["finetune expected a mapping"]),
        ("finetune: {epochs: 1.5}", ["epochs expected int", "1.5"]),
        ("!!python/object/apply:os.system ['true']", ["cannot be read"]),
    ],
)
def test_bad_recipe_file(model_folder, tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    result = run("quantize", model_folder, "-o", tmp_path / "out", "--recipe", path)
    assert_one_line_error(result, "--recipe", *words)


def test_dry_run_writes_nothing(model_folder, tmp_path):
    result = run("quantize", model_folder, "-o", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["bytes"]["linear_weights"] == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3) // 2
    assert plan["bytes"]["shifts"] == 2 * (2 * 32 * 2 + 16 * 4)
    estimate = plan["estimate"]
    assert 0 < estimate["seconds"] < 600
    # Two layers of some thousand weights: what is held is what this process holds already.
    assert 0 <= estimate["peak_memory_bytes"]["host"] - plan_peak_bytes() < 200e6
    text = run("quantize", model_folder, "-o", tmp_path / "out", "--dry-run").stdout
    assert "time on cpu, about" in text
    assert "nothing was written" in text
    assert not list(tmp_path.iterdir())


def test_eval_text_is_measured_and_reported(model_folder, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("A line of text for a random model. " * 900)
    out = tmp_path / "out"
    result = run(
        "quantize",
        model_folder,
        "-o",
        out,
        *SMALL,
        "--eval-text",
        text,
        "--scheme",
        "w4a8kv8",
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["evaluation"]["ppl"] > 1
    assert json.loads((out / "report.json").read_text()) == report
    assert "perplexity" in (out / "README.md").read_text()
    assert run("quantize", model_folder, "-o", out, *SMALL, "--overwrite").exit_code == 0
    assert str(read_checkpoint(out).quantization.scheme) == "w4a4kv4"


def test_doctor():
    assert "cpu kernels" in run("doctor").stdout
    data = json.loads(run("doctor", "--json").stdout)
    assert data["cpu_isa"] in data["cpu_isas"]


def test_version():
    import prefixquant

    assert run("--version").stdout.strip() == prefixquant.__version__


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "w3a4kv4"], ["weight_bits", "3"]),
        (["--scheme", "w4a5kv4"], ["activation_bits", "5"]),
        (["--scheme", "w4a4kv2"], ["kv_bits", "2"]),
        (["--scheme", "w8a4kv4"], ["8-bit weights"]),
        (["--scheme", "int4"], ["w4a4kv4", "'int4'"]),
        (["--solver", "magic"], ["solver", "'magic'"]),
        (["--prefix", "confirmed"], ["prefix", "'confirmed'"]),
        (["--nsamples", "0"], ["nsamples", "0"]),
        (["--seqlen", "-5"], ["seqlen", "-5"]),
        (["--eta", "0.5"], ["eta", "0.5"]),
        (["--compensation", "-1"], ["compensation", "-1"]),
        (["--group-size", "16"], ["group_size", "activation_bits 16"]),
        (["--outlier-fraction", "2"], ["outlier_fraction", "2"]),
        (["--eta", "nan"], ["eta"]),
        (["--r4-block-size", "-1"], ["r4_block_size"]),
        (["--r5-block-size", "-1"], ["r5_block_size"]),
        (["--epochs", "-1"], ["epochs", "-1"]),
        (["--epochs", "1", "--train-samples", "8"], ["train_samples", "8"]),
        (["--epochs", "1", "--train-samples", "100000"], ["training text", "needed"]),
        (["--r4-block-size", "48"], ["48"]),
        (["--device", "abacus"], ["device", "abacus"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--calib", "no/such/file.txt"], ["no/such/file.txt", "no such file"]),
        (["--eval-text", "no/such/file.txt"], ["no/such/file.txt", "no such file"]),
        (["--nsamples", "10000000"], ["tokens found", "needed"]),
    ],
)
def test_wrong_options(model_folder, tmp_path, arguments, words):
    result = run("quantize", model_folder, "-o", tmp_path / "out", *SMALL, *arguments)
    assert_one_line_error(result, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quantize", "quantize --dry-run", "eval", "generate", "scan"])
def test_missing_model(tmp_path, command):
    name, *options = command.split()
    extra = {"quantize": ["-o", tmp_path / "out"], "generate": ["hello"]}.get(name, [])
    missing = tmp_path / "nowhere"
    for target in (missing, f"{missing}.gguf"):
        assert_one_line_error(run(name, target, *extra, *options), "nowhere", "no such file")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert_one_line_error(run(name, folder, *extra, *options), "empty", "config.json")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2"]),
        ({"model_type": "frobnicator"}, ["frobnicator"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu"]),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            ["dynamic"],
        ),
    ],
)
def test_unsupported_model(model_folder, tmp_path, changes, words, dry_run):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **changes}))
    result = run("quantize", folder, "-o", tmp_path / "out", *SMALL, *dry_run)
    assert_one_line_error(result, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_hidden_size_without_a_hadamard_matrix(tmp_path, dry_run):
    folder = save_tiny_llama(tmp_path / "odd", hidden_size=34, intermediate_size=64)
    result = run("quantize", folder, "-o", tmp_path / "out", *SMALL, *dry_run)
    assert_one_line_error(result, "34", "Hadamard")
    assert [p.name for p in tmp_path.iterdir()] == ["odd"]


def test_a_quantized_model_is_not_quantized_again(checkpoint, tmp_path):
    result = run("quantize", checkpoint, "-o", tmp_path / "out", *SMALL)
    assert_one_line_error(result, "full-precision")
    assert not list(tmp_path.iterdir())


def test_damaged_float_model(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])
    assert_one_line_error(run("quantize", folder, "-o", tmp_path / "out", *SMALL), "model")
    (folder / CONFIG_NAME).write_text("{")
    assert_one_line_error(run("quantize", folder, "-o", tmp_path / "out", *SMALL), "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("content", "words"),
    [("", ["empty"]), ("   \n", ["empty"]), ("too short", ["tokens found", "needed"])],
)
def test_empty_or_short_text(model_folder, checkpoint, tmp_path, content, words):
    text = tmp_path / "text.txt"
    text.write_text(content)
    out = tmp_path / "out"
    for arguments in (
        ["quantize", model_folder, "-o", out, *SMALL, "--calib", text],
        ["scan", model_folder, *SCAN, "--calib", text],
        ["eval", checkpoint, "--text", text],
    ):
        assert_one_line_error(run(*arguments), *words)
    assert not out.exists()


def test_output_folder_is_checked_first(checkpoint, model_folder, tmp_path):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years")
    assert_one_line_error(run("quantize", model_folder, "-o", thesis), "thesis", "not empty")
    assert_one_line_error(
        run("quantize", model_folder, "-o", thesis, "--overwrite"), "only a prefixquant checkpoint"
    )
    assert_one_line_error(run("quantize", model_folder, "-o", checkpoint), "not empty")
    assert_one_line_error(
        run("quantize", model_folder, "-o", thesis / "thesis.tex"), "expected a folder"
    )
    assert [p.name for p in thesis.iterdir()] == ["thesis.tex"]
    assert_one_line_error(
        run("eval", model_folder, "-o", tmp_path / "no" / "x.json"), "existing folder"
    )


def damage(folder, kind):
    config_path, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    config = json.loads(config_path.read_text())
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "version":
        config["quantization_config"]["format_version"] = 99
    elif kind == "dtype":
        weights.write_bytes(weights.read_bytes().replace(b'"U8"', b'"I8"', 1))
    elif kind == "shape":
        config["intermediate_size"] = 128
        config["quantization_config"]["rotations"]["r4_block_size"] = 128
    elif kind == "garbage":
        weights.write_bytes(b"\x80\x04cos\nsystem\n" * 99)
    elif kind == "missing":
        weights.unlink()
    config_path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", [WEIGHTS_NAME, "truncated"]),
        ("version", ["format_version", "99"]),
        ("dtype", ["expected dtype U8, got I8"]),
        ("shape", ["expected shape"]),
        ("garbage", [WEIGHTS_NAME, "not a safetensors file"]),
        ("missing", [WEIGHTS_NAME, "no such file"]),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "eval", "generate"])
def test_damaged_checkpoint(checkpoint, tmp_path, kind, words, command):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder, kind)
    extra = ["hello"] if command == "generate" else []
    assert_one_line_error(run(command, folder, *extra), *words)


def test_tail_of_eval(checkpoint):
    for tail in ("0", "1.5", "-1"):
        assert_one_line_error(run("eval", checkpoint, "--tail", tail), "--tail", "at most 1")
    arguments = ["--windows", "1", "--seqlen", "32", "--json"]
    whole, end = (
        json.loads(run("eval", checkpoint, "--tail", tail, *arguments).stdout)["evaluation"]
        for tail in ("1", "0.1")
    )
    assert whole["ppl"] != end["ppl"]
    assert whole["protocol"]["tail"] == 1


def test_bad_prompt(checkpoint, model_folder):
    assert_one_line_error(run("generate", model_folder, ""), "prompt")
    assert_one_line_error(run("generate", model_folder, "hi", "--chat"), "chat template")


def test_unwritable_output(model_folder, tmp_path, monkeypatch):
    """A full disk is one line too; the work done until then can be picked up."""
    import errno

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("prefixquant.checkpoint.write_shards", full)
    result = run("quantize", model_folder, "-o", tmp_path / "out", *SMALL)
    assert_one_line_error(result, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == [".out.resume"]
    monkeypatch.undo()
    again = run("quantize", model_folder, "-o", tmp_path / "out", *SMALL)
    assert_one_line_error(again, "--resume", "--overwrite")
    assert run("quantize", model_folder, "-o", tmp_path / "out", *SMALL, "--resume").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_bug_keeps_its_traceback(model_folder, tmp_path, monkeypatch):
    def bug(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("prefixquant.checkpoint.write_shards", bug)
    with pytest.raises(ZeroDivisionError):
        run("quantize", model_folder, "-o", tmp_path / "out", *SMALL)
    assert [p.name for p in tmp_path.iterdir()] == [".out.resume"]


def test_fine_tuning(model_folder, tmp_path):
    options = ["--epochs", "1", "--e2e-epochs", "1", "--train-samples", "9"]
    result = run("quantize", model_folder, "-o", tmp_path / "out", *SMALL, *options, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert "Fine-tuned: 1 epochs a block" in (tmp_path / "out" / "README.md").read_text()
    assert report["recipe"]["finetune"]["epochs"] == 1
    assert all(len(b["fine_tuning"]["training_loss"]) == 1 for b in report["blocks"])
    assert len(report["end_to_end"]["validation_loss"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------- as a process


def test_exit_codes_of_the_process(tmp_path):
    command = [sys.executable, "-m", "prefixquant.cli"]
    done = subprocess.run(
        [*command, "inspect", str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("prefixquant: error: ")
    assert len(done.stderr.splitlines()) == 1
    done = subprocess.run([*command, "--bogus"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_help_imports_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from prefixquant.cli import app;"
        "r = CliRunner().invoke(app, ['quantize', '--help']); assert r.exit_code == 0, r.output;"
        "assert '--scheme' in r.output; heavy = {'torch', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
