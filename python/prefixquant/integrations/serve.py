# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server: `transformers serve` in a process that knows our quantizer.

Everything a client sees (completions, chat, streaming, /v1/models, /health) is transformers' own;
the model behind it is loaded once, as `AutoModelForCausalLM.from_pretrained` loads it. The server
calls `model.generate` for every request: that is the hook by which requests reach our runtime. Its
continuous batching is off: it knows only attention without a prefix, and keeps a cache of its own.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixquant.checkpoint import is_prefixquant_checkpoint, read_checkpoint
from prefixquant.errors import UserError
from prefixquant.loading import load_tokenizer
from prefixquant.modeling.load import check_device


def start_server(
    target: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "cpu",
    seed: int | None = None,
    log_level: str = "warning",
) -> None:
    """Loads the checkpoint and serves it until interrupted.

    Args:
        target: a prefixquant checkpoint.
        port: 0 takes a free one.

    Raises:
        UserError: no such checkpoint or device, a port that is taken, or packages that are not
            installed.
    """
    if not is_prefixquant_checkpoint(target):
        raise UserError(f"{target}: expected a prefixquant checkpoint to serve")
    # What is wrong is said before a port opens.
    read_checkpoint(target, check_values=False)
    check_device(device)
    name = model_name(target)
    if "@" in name:
        raise UserError(f"{target}: transformers serve takes what follows an @ for a revision")
    port = _free_port(host, port)
    serve = _serve_class()
    # Clients have to name the model as the server loads it: from beside it, by its folder's name.
    before = Path.cwd()
    os.chdir(Path(target).resolve().parent)
    try:
        with _models_on_the_runtime():
            serve(
                force_model=name,
                host=host,
                port=port,
                device=device,
                default_seed=seed,
                log_level=log_level,
            )
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _models_on_the_runtime() -> Iterator[None]:
    """Models that are loaded meanwhile generate on `Runtime` where it can run them."""
    from prefixquant.integrations.runtime_generate import generate_on_runtime
    from prefixquant.integrations.transformers import PrefixQuantizer

    PrefixQuantizer.after_loading = generate_on_runtime
    try:
        yield
    finally:
        PrefixQuantizer.after_loading = None


def model_name(target: str) -> str:
    """What clients call the model: the name of its folder."""
    return Path(target).resolve().name


def has_chat_template(target: str) -> bool:
    """Whether ``/v1/chat/completions`` can work: it needs a chat template."""
    return bool(load_tokenizer(target).chat_template)


def _serve_class() -> Any:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise UserError(
            "serve needs fastapi, uvicorn, openai and pydantic; pip install 'prefixquant[serve]'"
        )
    from transformers.cli.serve import Serve

    return Serve


def _free_port(host: str, port: int) -> int:
    """The port, checked to be free (a server would load the model first and fail after)."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason})") from error
