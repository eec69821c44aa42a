# SPDX-License-Identifier: Apache-2.0
"""A real OpenAI client against `prefixquant serve`, over loopback, streaming included."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import prefixquant
import pytest
import torch
from prefixquant.errors import UserError
from prefixquant.integrations.runtime_generate import generate_on_runtime
from prefixquant.integrations.serve import start_server
from test_cli import SMALL, assert_one_line_error, run
from tiny_model import byte_tokenizer, save_tiny_llama

PROMPT = "Once upon a time"
ROOT = Path(__file__).resolve().parent.parent


def make_checkpoint(folder, **sizes):
    save_tiny_llama(folder / "llama", **sizes)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    tokenizer.save_pretrained(folder / "llama")
    result = run("quantize", folder / "llama", "-o", folder / "q", *SMALL)
    assert result.exit_code == 0, result.stderr
    return folder / "q"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("serve"))


def expected(checkpoint, text, new_tokens, device="cpu"):
    """The greedy continuation, by plain generate; on a GPU by the runtime on the model."""
    tokenizer, model = byte_tokenizer(), prefixquant.load(checkpoint, device=device)
    if device != "cpu":
        assert generate_on_runtime(model) is not None
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=1,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_up(port, alive=lambda: True, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert alive()
        url = f"http://127.0.0.1:{port}/health"
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(url, timeout=1),
        ):
            return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")


def client(port):
    import openai

    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def complete(text):
    """Without the half character that random bytes may end in: a stream keeps it back."""
    return text.rstrip("\ufffd")


def check_completions(api, checkpoint, device="cpu"):
    """Whole and streamed, both ways of asking: the text of plain `generate`."""
    arguments = {"model": checkpoint.name, "max_tokens": 7, "temperature": 0, "seed": 0}
    wanted = expected(checkpoint, PROMPT, 7, device)
    whole = api.completions.create(prompt=PROMPT, **arguments)
    assert whole.choices[0].text == wanted
    parts = api.completions.create(prompt=PROMPT, stream=True, **arguments)
    streamed = [part.choices[0].text for part in parts if part.choices]
    assert complete("".join(streamed)) == complete(wanted)

    messages = [{"role": "user", "content": PROMPT}]
    wanted = expected(checkpoint, PROMPT + "|", 7, device)
    whole = api.chat.completions.create(messages=messages, **arguments)
    assert whole.choices[0].message.content == wanted
    parts = api.chat.completions.create(messages=messages, stream=True, **arguments)
    streamed = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert complete("".join(streamed)) == complete(wanted)
    assert len(streamed) > 1  # it came in pieces


@pytest.fixture
def needs_packages():
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="the [serve] extra is not installed")


def server(checkpoint, port, device="cpu"):
    command = [sys.executable, "-m", "prefixquant.cli", "serve", str(checkpoint)]
    options = {"--port": port, "--log-level": "error", "--seed": 0, "--device": device}
    return subprocess.Popen(
        [*command, *(str(word) for option in options.items() for word in option)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def test_client(checkpoint, needs_packages):
    port = free_port()
    process = server(checkpoint, port)
    try:
        wait_until_up(port, lambda: process.poll() is None)
        with client(port) as api:
            check_completions(api, checkpoint)
        client_code = str(ROOT / "examples" / "chat_client.py")
        example = [sys.executable, client_code, checkpoint.name, PROMPT]
        shown = subprocess.run(
            [*example, f"http://127.0.0.1:{port}/v1"], capture_output=True, check=True
        )
        assert shown.stdout.strip()
        with pytest.raises(UserError, match="cannot listen there"):
            start_server(str(checkpoint), port=port)
        process.terminate()
        assert process.wait(30) in (0, -15)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.gpu
def test_client_of_a_gpu(tmp_path, needs_packages):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    checkpoint, port = make_checkpoint(tmp_path, **sizes), free_port()
    process = server(checkpoint, port, "cuda")
    try:
        wait_until_up(port, lambda: process.poll() is None)
        with client(port) as api:
            check_completions(api, checkpoint, "cuda")
    finally:
        process.kill()
        process.communicate()


def test_what_cannot_be_served(checkpoint, tmp_path):
    assert_one_line_error(run("serve", tmp_path), "expected a prefixquant checkpoint")
    result = run("serve", checkpoint, "--log-level", "loud")
    assert_one_line_error(result, "--log-level", "'loud'")
    assert_one_line_error(run("serve", checkpoint, "--device", "cuda:99"), "cuda:99")
    result = run("serve", checkpoint, "--host", "256.256.256.256")
    assert_one_line_error(result, "--host 256.256.256.256", "cannot listen there")
    with pytest.raises(UserError, match="@ for a revision"):
        start_server(str(checkpoint.rename(checkpoint.parent / "a@b")))
    (checkpoint.parent / "a@b").rename(checkpoint)


def test_missing_packages_are_named(checkpoint, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert_one_line_error(run("serve", checkpoint), "pip install 'prefixquant[serve]'")
