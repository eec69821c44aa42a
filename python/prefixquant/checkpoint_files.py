# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint folder: JSON, safetensors shards and their index, read without trust.

What is read may be damaged or hostile: every failure is a `CheckpointError` that names the file,
and the sizes that a file claims are checked before anything of that size is read. Whether the
tensors found are those of a checkpoint is for `checkpoint_layout` to say.
"""

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefixquant.atomic import usual_mode
from prefixquant.checkpoint_layout import short
from prefixquant.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4_000_000_000

# A config of a real model is a few KB and an index of a 70B model 200 KB.
_MAX_JSON_BYTES = 64 << 20
# The bound of the safetensors format itself.
_MAX_HEADER_BYTES = 100_000_000


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


# ---------------------------------------------------------------------------- writing


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def write_shards(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    """The tensors as one file, or as several and their index."""
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
        (folder / shard).chmod(usual_mode(0o666))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX_NAME, index)


# ---------------------------------------------------------------------------- reading


def read_headers(
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
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index_path}: weight_map expected an object")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not is_plain_file_name(shard):
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


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system says of a file that cannot be read, as a CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of one shard."""
    _check_length(path)
    with _open_shard(path) as file:
        entries = {}
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            view = file.get_slice(name)
            entries[name] = (tuple(view.get_shape()), view.get_dtype())
    return entries


def _check_length(path: Path) -> None:
    """The file is as long as its header says.

    Checked here for a message that a person understands; everything else about the header
    (overlaps, gaps, sizes against shapes) is checked by safetensors as it opens the file.
    """
    with _readable(path), path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > min(_MAX_HEADER_BYTES, max(size - 8, 0)):
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file ({size} bytes, "
                f"header length {'missing' if length is None else length})"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
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


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file ({short(error, 300)})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    with _readable(path):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB")
        text = path.read_bytes()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({short(error, 200)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def is_plain_file_name(name: str) -> bool:
    """True for a name that stays inside the folder, on any system."""
    return (
        bool(name)
        and len(name) <= 255
        and name not in (".", "..")
        and not any(character in name for character in "/\\:\0")
        and not any("\ud800" <= character <= "\udfff" for character in name)  # in no encoding
    )
