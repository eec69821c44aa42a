# SPDX-License-Identifier: Apache-2.0
"""Writing and reading checkpoints: a Hugging Face folder of safetensors shards and a config.json.

Writing is all or nothing (`atomic_folder`). Reading trusts nothing: config.json, the index and
every safetensors header are checked against `checkpoint_layout` before a tensor is handed out, and
the values of the scales before a model is built. Nothing here unpickles.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefixquant.atomic import atomic_folder
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
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CARD_NAME = "README.md"
CODE_NAME = "modeling_prefixquant.py"
MAX_SHARD_BYTES = 4_000_000_000

# Under trust_remote_code=True transformers looks here; where prefixquant is not installed it then
# says so, and how to install it.
_CODE = """\
# SPDX-License-Identifier: Apache-2.0
\"\"\"This checkpoint runs on prefixquant: pip install prefixquant.\"\"\"

from prefixquant.integrations.transformers import PrefixQuantForCausalLM  # noqa: F401
"""
_AUTO_MAP = {"AutoModelForCausalLM": f"{Path(CODE_NAME).stem}.PrefixQuantForCausalLM"}

# A config of a real model is a few KB and an index of a 70B model 200 KB.
_MAX_JSON_BYTES = 64 << 20
# The bound of the safetensors format itself.
_MAX_HEADER_BYTES = 100_000_000

_SAFETENSORS_DTYPE = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


class LazyTensors(Mapping[str, Tensor]):
    """name -> CPU tensor, memory-mapped from its shard when asked for."""

    def __init__(self, folder: Path, shard_of: dict[str, str]):
        self._folder = folder
        self._shard_of = shard_of
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        shard = self._shard_of[name]
        if shard not in self._open:
            self._open[shard] = _open_shard(self._folder / shard)
        return self._open[shard].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)


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
        config = _read_json(Path(path) / CONFIG_NAME)
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
        if not _is_plain_file_name(name) or name in (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME):
            raise UserError(f"extra file {name!r}: expected a plain file name of its own")

    with atomic_folder(path) as partial:
        _write_shards(partial, tensors, max_shard_bytes)
        _write_text(partial / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if CARD_NAME not in extra_files:
            from prefixquant.report import model_card

            extra_files[CARD_NAME] = model_card(config, quantization)
        for name, content in extra_files.items():
            if isinstance(content, bytes):
                (partial / name).write_bytes(content)
            else:
                _write_text(partial / name, content)
    return path


def _write_shards(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    # Imported here: it costs 0.2 s, and a reader never needs it.
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_bytes)
    for shard, names in split.filename_to_tensors.items():
        save_file(
            {name: tensors[name].detach().cpu().contiguous() for name in names},
            folder / shard,
            metadata={"format": "pt"},
        )
        # safetensors makes its files private (0600), unlike everything else in the folder.
        (folder / shard).chmod((folder / shard).stat().st_mode | 0o044)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_text(folder / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


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
    config = _read_json(config_path)
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

    shard_of, found = _read_headers(path)
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


def _read_headers(
    folder: Path,
) -> tuple[dict[str, str], dict[str, tuple[tuple[int, ...], str]]]:
    """name -> shard, and name -> (shape, dtype), of all shards; checks the index against them."""
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        weight_map = None
        shards = [WEIGHTS_NAME]
    elif (folder / WEIGHTS_NAME).exists():
        raise CheckpointError(f"{folder}: holds both {WEIGHTS_NAME} and {INDEX_NAME}")
    else:
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index_path}: weight_map expected an object")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not _is_plain_file_name(shard):
                raise CheckpointError(
                    f"{index_path}: tensor {short(name)} expected a file name in the checkpoint "
                    f"folder, got {short(shard)}"
                )
        shards = sorted(set(weight_map.values()))

    shard_of: dict[str, str] = {}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for shard in shards:
        for name, entry in _read_header(folder / shard).items():
            if weight_map is not None and weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard}: tensor {short(name)} is in this shard but "
                    f"{INDEX_NAME} says {short(weight_map.get(name))}"
                )
            shard_of[name] = shard
            found[name] = entry
    for name, shard in (weight_map or {}).items():
        if name not in found:
            raise CheckpointError(
                f"{folder / shard}: tensor {short(name)} is missing from its shard"
            )
    return shard_of, found


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of one shard.

    The length is checked here, for a message that a person understands; everything else about the
    header (overlaps, gaps, sizes against shapes) is checked by safetensors as it opens the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > min(_MAX_HEADER_BYTES, max(size - 8, 0)):
                raise CheckpointError(
                    f"{path}: truncated or not a safetensors file ({size} bytes, "
                    f"header length {'missing' if length is None else length})"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON") from error
    if isinstance(header, dict):
        ends = [
            entry["data_offsets"][-1]
            for entry in header.values()
            if isinstance(entry, dict)
            and isinstance(entry.get("data_offsets"), list)
            and entry["data_offsets"]
            and type(entry["data_offsets"][-1]) is int
        ]
        expected = 8 + length + max(ends, default=0)
        if size != expected:
            raise CheckpointError(
                f"{path}: truncated or padded, expected {expected} bytes, found {size}"
            )
    with _open_shard(path) as file:
        entries = {}
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            view = file.get_slice(name)
            entries[name] = (tuple(view.get_shape()), view.get_dtype())
    return entries


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file ({short(error, 300)})"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON ({short(error, 200)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _is_plain_file_name(name: str) -> bool:
    """True for a name that stays inside the folder, on any system."""
    return (
        bool(name)
        and len(name) <= 255
        and name not in (".", "..")
        and not any(character in name for character in "/\\:\0")
    )
