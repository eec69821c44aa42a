# SPDX-License-Identifier: Apache-2.0
"""Writing and reading checkpoints: a Hugging Face folder of safetensors shards and a config.json.

Writing is all or nothing (`atomic_folder`). Reading trusts nothing: config.json, the index and
every safetensors header are checked against `checkpoint_layout` before a tensor is handed out, and
the values of the scales before a model is built. Nothing here unpickles.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixquant.atomic import atomic_folder
from prefixquant.checkpoint_files import (
    INDEX_NAME,
    MAX_SHARD_BYTES,
    WEIGHTS_NAME,
    LazyTensors,
    is_plain_file_name,
    read_headers,
    read_json,
    write_json,
    write_shards,
    write_text,
)
from prefixquant.checkpoint_layout import (
    ModelSizes,
    TensorSpec,
    check_model_config,
    check_tensors,
    expected_tensors,
    short,
)
from prefixquant.config import QUANT_METHOD, QuantizationConfig
from prefixquant.errors import CheckpointError, UserError

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
CODE_NAME = "modeling_prefixquant.py"

# Under trust_remote_code=True transformers looks here; where prefixquant is not installed it then
# says so, and how to install it.
_CODE = """\
# SPDX-License-Identifier: Apache-2.0
\"\"\"This checkpoint runs on prefixquant: pip install prefixquant.\"\"\"

from prefixquant.integrations.transformers import PrefixQuantForCausalLM  # noqa: F401
"""
_AUTO_MAP = {"AutoModelForCausalLM": f"{Path(CODE_NAME).stem}.PrefixQuantForCausalLM"}

_SAFETENSORS_DTYPE = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, shapes and dtypes have been checked; no tensor is in memory yet."""

    path: Path
    config: dict[str, Any]  # config.json without its quantization_config
    quantization: QuantizationConfig
    sizes: ModelSizes
    tensors: Mapping[str, Tensor]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return expected_tensors(self.sizes, self.quantization)

    def hf_config(self) -> Any:
        """The transformers configuration object, unquantized.

        Raises:
            CheckpointError: transformers does not accept the values of config.json.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.for_model(**{**self.config, "auto_map": {}})
        except Exception as error:  # transformers validates by many exception types
            raise CheckpointError(
                f"{self.path / CONFIG_NAME}: transformers refuses it ({short(error, 300)})"
            ) from error

    def check_values(self) -> None:
        """Reads every floating-point tensor once: all values finite, all scales above zero; and
        the indices of outliers: ascending and inside their weight.

        The packed weights have no illegal values, so most of the file is not read.
        """
        for name, spec in self.specs.items():
            if spec.dtypes[0] in ("U8", "I8"):
                continue
            if spec.below:
                self._check_indices(name, spec.below)
                continue
            # As rows, so that a large embedding is checked in pieces, not in a copy of itself.
            rows = self.tensors[name]
            rows = rows.reshape(1, -1) if rows.dim() < 2 else rows.flatten(0, -2)
            for piece in rows.split(8192):
                if not torch.isfinite(piece).all():
                    raise CheckpointError(
                        f"{self.path}: tensor {name} expected finite values, got inf or NaN"
                    )
                if spec.is_scale and not (piece > 0).all():
                    raise CheckpointError(
                        f"{self.path}: tensor {name} expected scales above zero, "
                        f"got {piece.min().item():g}"
                    )

    def _check_indices(self, name: str, below: int) -> None:
        index = self.tensors[name]
        if index[0] < 0 or index[-1] >= below or not (index[1:] > index[:-1]).all():
            raise CheckpointError(
                f"{self.path}: tensor {name} expected ascending indices from 0 to {below - 1}, "
                f"got some from {index.min().item()} to {index.max().item()}"
            )


# ---------------------------------------------------------------------------- writing


def is_prefixquant_checkpoint(path: str | os.PathLike) -> bool:
    """Whether the folder says of itself that it is one; says nothing about its health."""
    try:
        config = read_json(Path(path) / CONFIG_NAME)
    except CheckpointError:
        return False
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def check_output_folder(path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Refuses, before hours of work, an output folder `write_checkpoint` would refuse after."""
    path = Path(path).resolve()
    if not path.exists():
        return path
    if not path.is_dir():
        raise UserError(f"output {path}: expected a folder, found a file")
    if any(path.iterdir()):
        if not overwrite:
            raise UserError(f"output {path}: the folder is not empty; choose another or overwrite")
        if not is_prefixquant_checkpoint(path):
            raise UserError(
                f"output {path}: only a prefixquant checkpoint is overwritten, this folder is none"
            )
    return path


def write_checkpoint(
    path: str | os.PathLike,
    tensors: dict[str, Tensor],
    model_config: dict[str, Any],
    quantization: QuantizationConfig,
    *,
    tokenizer: Any = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a complete checkpoint at ``path`` or nothing at all.

    Args:
        path: the folder to make. It may exist if it is empty, or with ``overwrite`` if it is itself
            a prefixquant checkpoint.
        tensors: exactly the tensors of docs/checkpoint-format.md.
        model_config: the content of the Hugging Face config.json.
        quantization: stored as its ``quantization_config``.
        tokenizer: anything with ``save_pretrained(folder)``.
        extra_files: name -> content of further files (report.json, README.md, ...).

    Raises:
        UserError: the output folder may not be used.
        CheckpointError: the tensors are not those that the config implies.
    """
    path = check_output_folder(path, overwrite)
    config = {**model_config, "tie_word_embeddings": False}
    sizes = check_model_config(config, quantization)
    config["quantization_config"] = quantization.to_dict()
    config["auto_map"] = _AUTO_MAP
    check_tensors(
        {
            name: (tuple(t.shape), _SAFETENSORS_DTYPE.get(t.dtype, str(t.dtype)))
            for name, t in tensors.items()
        },
        expected_tensors(sizes, quantization),
        "checkpoint to write",
    )
    extra_files = {CODE_NAME: _CODE, **(extra_files or {})}
    for name in extra_files:
        if not is_plain_file_name(name) or name in (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME):
            raise UserError(f"extra file {name!r}: expected a plain file name of its own")

    with atomic_folder(path) as partial:
        write_shards(partial, tensors, max_shard_bytes)
        write_json(partial / CONFIG_NAME, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if CARD_NAME not in extra_files:
            from prefixquant.report import model_card

            extra_files[CARD_NAME] = model_card(config, quantization)
        for name, content in extra_files.items():
            if isinstance(content, bytes):
                (partial / name).write_bytes(content)
            else:
                write_text(partial / name, content)
    return path


# ---------------------------------------------------------------------------- reading


def read_checkpoint(path: str | os.PathLike, check_values: bool = True) -> Checkpoint:
    """Opens a checkpoint and checks it; the tensors stay on the disk until they are asked for.

    Args:
        path: the checkpoint folder.
        check_values: also read all floating-point values (see `Checkpoint.check_values`).

    Raises:
        CheckpointError: anything is missing, damaged, of a later format or not what config.json
            implies. The message names the file or tensor, what was expected and what was found.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    config_path = path / CONFIG_NAME
    config = read_json(config_path)
    raw = config.pop("quantization_config", None)
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{config_path}: quantization_config is missing; not a prefixquant checkpoint"
        )
    try:
        quantization = QuantizationConfig.from_dict(raw)
    except (UserError, TypeError) as error:
        raise CheckpointError(f"{config_path}: {short(error, 300)}") from error
    _check_types(quantization, str(config_path))
    sizes = check_model_config(config, quantization, str(config_path))

    shard_of, found = read_headers(path)
    check_tensors(found, expected_tensors(sizes, quantization), str(path))
    checkpoint = Checkpoint(path, config, quantization, sizes, LazyTensors(path, shard_of))
    if check_values:
        checkpoint.check_values()
    return checkpoint


def _check_types(quantization: QuantizationConfig, where: str) -> None:
    """JSON has no types to enforce; what passes as 4 must not be 4.0, nor a text be a list."""
    for name in ("weight_bits", "activation_bits", "kv_bits", "format_version"):
        if type(getattr(quantization, name)) is not int:
            raise CheckpointError(f"{where}: {name} expected an integer")
    names = ("prefix_mode", "solver", "producer", "activation_mode", "kv_mode")
    texts = {name: getattr(quantization, name) for name in names}
    texts.update({f"prefix_text[{i}]": text for i, text in enumerate(quantization.prefix_text)})
    for name, value in texts.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{where}: {name} expected text")
