# SPDX-License-Identifier: Apache-2.0
"""Loading the full-precision model: a Hugging Face folder, a hub name or a GGUF file."""

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from prefixquant.errors import UnsupportedModelError, UserError
from prefixquant.roles import model_roles


def _gguf_arguments(path: Path) -> dict:
    """transformers' arguments for a GGUF file, dequantized on load."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{path}: reading GGUF needs the packages gguf and accelerate; "
            "pip install 'prefixquant[gguf]'"
        ) from error
    arguments = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:  # newer transformers keep GGUF weights packed unless told otherwise
        from transformers import GgufConfig

        return arguments | {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:
        return arguments


def _source_arguments(source: str) -> tuple[dict, dict]:
    """Arguments of from_pretrained for the model and for the tokenizer."""
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{source}: no such file")
        model = _gguf_arguments(path)
        return model, {k: v for k, v in model.items() if k != "quantization_config"}
    if path.exists():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{source}: expected a model folder with a config.json, or a .gguf file"
            )
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        # A hub name is "owner/name"; everything else was meant as a path.
        raise UserError(f"{source}: no such file or folder")
    arguments = {"pretrained_model_name_or_path": source}
    return arguments, arguments


def load_tokenizer(source: str):
    """The tokenizer of a model folder, a GGUF file or one of our checkpoints."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**_source_arguments(str(source))[1])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: cannot load the tokenizer: {_first_line(error)}") from error


def tokenizer_without_bos(tokenizer):
    """A copy of the tokenizer that puts no BOS in front of a text, for a model whose prefix ends in
    one. A chat template is left as it is."""
    bare = copy.deepcopy(tokenizer)
    if bare.init_kwargs.get("add_bos_token"):  # saved as a setting of its own, and applied on load
        bare.add_bos_token = False
    if _adds_bos(bare):  # by the template of the post-processor
        state = json.loads(bare.backend_tokenizer.to_str())
        _drop_special_token(state["post_processor"], bare.bos_token)
        rebuilt = type(bare.backend_tokenizer).from_str(json.dumps(state))
        bare.backend_tokenizer.post_processor = rebuilt.post_processor
    return bare


def _adds_bos(tokenizer) -> bool:
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return len(ids) > len(plain) and ids[0] == tokenizer.bos_token_id


def _drop_special_token(processor: dict, token: str) -> None:
    """Takes ``token`` out of a post-processor's templates (the JSON of the tokenizers library)."""
    for inner in processor.get("processors", []):
        _drop_special_token(inner, token)
    for template in ("single", "pair"):
        if template in processor:
            processor[template] = [
                item
                for item in processor[template]
                if item.get("SpecialToken", {}).get("id") != token
            ]


def chat_template_adds_bos(tokenizer) -> bool:
    """Whether the chat template writes a BOS of its own: the model would see two."""
    if not tokenizer.chat_template or tokenizer.bos_token is None:
        return False
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return text.startswith(tokenizer.bos_token)


def load_config(source: str):
    """The transformers config of a float model, without its weights."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**_source_arguments(source)[1])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: cannot read the config: {error}") from error


def load_float_model(source: str, dtype: torch.dtype | None = None):
    """Loads a full-precision causal LM on the CPU and its tokenizer.

    Args:
        source: a folder with config.json and weights, a ``.gguf`` file, or a hub name.
        dtype: the dtype of the weights; None keeps the checkpoint's (float16 for GGUF).

    Returns:
        (model in eval mode, tokenizer)

    Raises:
        UserError: no such model, unreadable files, or a checkpoint that is already quantized.
        UnsupportedModelError: the architecture is not one of `roles.ARCHITECTURES`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    source = str(source)
    arguments, tokenizer_arguments = _source_arguments(source)
    if dtype is None and "gguf_file" in arguments:
        dtype = torch.float16  # block formats store their scales in float16
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(**tokenizer_arguments)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method not in (None, "gguf"):
            raise UserError(
                f"{source}: expected a full-precision model, got one quantized by {method!r}"
            )
        model_roles(config)  # an unsupported model fails here, before its weights are read
        model = AutoModelForCausalLM.from_pretrained(**arguments, dtype=dtype or "auto")
    except (UserError, UnsupportedModelError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot load the model: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    model.config.quantization_config = None
    return model.eval().requires_grad_(False), load_tokenizer(source)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
