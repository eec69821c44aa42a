# SPDX-License-Identifier: Apache-2.0
"""The finished blocks of a quantization, kept beside its output until the checkpoint stands.

A folder holds one JSON file that says what is being made of what, one with the prefix search, and
one safetensors file for every finished block. Each file takes its name when it is complete, so a
run that is killed at any moment leaves whole blocks. Nothing in the folder can be taken for a
checkpoint. The lock on the folder dies with the process that holds it.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prefixquant import __version__
from prefixquant.atomic import place_file
from prefixquant.block import BlockScales
from prefixquant.calibrate import CalibratedBlock
from prefixquant.config import RecipeConfig
from prefixquant.decoder import compute_device
from prefixquant.errors import UserError
from prefixquant.prefix import PrefixSearch, ScanResult, Tally
from prefixquant.roles import BlockWeights
from prefixquant.solvers import QuantizedWeight

_RUN, _SEARCH = "run.json", "search.json"
_SCALE_FORM = ("activation_bits", "kv_bits", "activation_mode", "kv_mode", "companded")


def state_folder(output: str | os.PathLike) -> Path:
    """Where the state of a run that makes ``output`` is kept."""
    output = Path(output).resolve()
    return output.parent / f".{output.name}.resume"


def run_fingerprint(model: nn.Module, recipe: RecipeConfig, calibration: Tensor) -> dict[str, str]:
    """What the blocks of a run depend on, by name; two runs with the same make the same bits."""
    config = model.config.to_json_string(use_diff=False)
    tensors = sorted(model.state_dict().items())
    return {
        "model": _digest([config.encode(), *_tensor_bytes(tensors)]),
        "calibration text": _digest(_tensor_bytes([("tokens", calibration)])),
        "recipe": json.dumps(dataclasses.asdict(recipe), sort_keys=True),
        "device": _device_name(compute_device(model)),
        "prefixquant": __version__,
        "torch": torch.__version__,
    }


def _tensor_bytes(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[Any]:
    for name, tensor in tensors:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest(parts: Iterable[Any]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclasses.dataclass
class SavedBlock:
    """What is kept of a finished block: integers, scales and biases (role -> [N]), the report's
    entry, and the floating weights that fine-tuning left behind the integers (role -> [N, K]; empty
    if not needed)."""

    weights: dict[str, QuantizedWeight]
    scales: BlockScales
    biases: dict[str, Tensor]
    report: dict[str, Any]
    latents: dict[str, Tensor]

    def rebuild(self, original: BlockWeights) -> CalibratedBlock:
        """The block again, as it was before it was saved."""
        dtype = next(iter(original.weights.values())).dtype
        weights = {role: w.dequantize(dtype) for role, w in self.weights.items()}
        simulated = dataclasses.replace(
            original,
            weights={**original.weights, **weights},
            biases={**original.biases, **self.biases},
        )
        errors = self.report["relative_error"], self.report["weight_errors"]
        return CalibratedBlock(self.weights, self.scales, simulated, *errors)


class BlockState:
    """The state folder of one run.

    Args:
        folder: made when the first thing is kept.
        fingerprint: `run_fingerprint` of this run.
        resume: continue what is there; else only an empty or missing folder will do.

    Raises:
        UserError: the folder holds blocks of another run, or there are some and ``resume`` is off,
            or another process works in it.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, str], *, resume: bool):
        self.folder, self.fingerprint = folder, fingerprint
        self._lock: int | None = None
        known = folder / _RUN
        if known.exists():
            self._hold()
            if not resume:
                self.release()
                raise UserError(
                    f"{folder}: holds the blocks of an unfinished run; continue it with --resume, "
                    "or discard it with --overwrite"
                )
            try:
                _check_same(known, fingerprint)
            except UserError:
                self.release()
                raise

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Lets other processes continue the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __del__(self):
        self.release()

    def _begin(self) -> None:
        """Makes the folder, before the first thing is kept in it."""
        if not (self.folder / _RUN).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._hold()
            _write(self.folder / _RUN, json.dumps(self.fingerprint, indent=1).encode())

    def _hold(self) -> None:
        """Holds the folder for this process; it is free again when the process ends, however."""
        try:
            import fcntl
        except ImportError:  # no such locks on Windows: two runs on one output are the user's care
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"output: another run is working in {self.folder}") from None
            return  # a file system without locks
        self._lock = handle

    def save_search(self, search: PrefixSearch) -> None:
        """Keeps the prefix search."""
        self._begin()
        _write(self.folder / _SEARCH, json.dumps(_encode_search(search)).encode())

    def load_search(self) -> PrefixSearch | None:
        """The prefix search, if it was finished before.

        Raises:
            UserError: the file is damaged.
        """
        path = self.folder / _SEARCH
        if not path.exists():
            return None
        try:
            return _decode_search(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error}); start again with --overwrite") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def save(self, index: int, block: SavedBlock) -> None:
        """Keeps a finished block; when this returns it is on the disk."""
        self._begin()
        tensors: dict[str, Tensor] = {f"latent.{r}": w for r, w in block.latents.items()}
        bits = {}
        for role, weight in block.weights.items():
            bits[role] = weight.bits
            tensors |= {f"q.{role}": weight.q, f"scale.{role}": weight.scale}
            outliers = getattr(weight, "outliers", None)
            if outliers is not None:
                tensors[f"outlier_index.{role}"] = outliers.index
                tensors[f"outlier_value.{role}"] = outliers.value
        tensors |= {f"bias.{role}": bias for role, bias in block.biases.items()}
        scales = block.scales
        tensors |= {f"activation.{point}": s for point, s in scales.activations.items()}
        tensors |= {n: t for n, t in (("k", scales.k), ("v", scales.v)) if t is not None}
        about = {
            "weight_bits": bits,
            "scales": {name: getattr(scales, name) for name in _SCALE_FORM},
            "points": list(scales.activations),
            "report": block.report,
        }
        partial = self._path(index).with_suffix(".partial")
        save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
            partial,
            metadata={"about": json.dumps(about)},
        )
        place_file(partial, self._path(index))

    def load(self, index: int, device: torch.device) -> SavedBlock | None:
        """A block that was finished before, or None.

        Raises:
            UserError: the file is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _decode(about, tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); start again with --overwrite") from error


def _decode(about: dict[str, Any], tensors: dict[str, Tensor]) -> SavedBlock:
    weights = {}
    for role, bits in about["weight_bits"].items():
        weights[role] = QuantizedWeight(tensors[f"q.{role}"], tensors[f"scale.{role}"], bits)
        if f"outlier_index.{role}" in tensors:
            from prefixquant.solvers.weight import Outliers

            weights[role].outliers = Outliers(
                tensors[f"outlier_index.{role}"], tensors[f"outlier_value.{role}"]
            )
    scales = BlockScales(
        {point: tensors[f"activation.{point}"] for point in about["points"]},
        tensors.get("k"),
        tensors.get("v"),
        **{name: about["scales"][name] for name in _SCALE_FORM},
    )

    def by_role(kind: str) -> dict[str, Tensor]:
        return {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}

    return SavedBlock(weights, scales, by_role("bias."), about["report"], by_role("latent."))


def _encode_search(search: PrefixSearch) -> dict[str, Any]:
    """Plain data; counters become pairs, because their order decides between equal counts."""

    def tally(t: Tally) -> dict[str, Any]:
        return {**vars(t), "tokens": list(t.tokens.items())}

    steps = [
        {**vars(s), "before_r4": tally(s.before_r4), "quantized": tally(s.quantized)}
        for s in search.steps
    ]
    return {**vars(search), "steps": steps}


def _decode_search(data: dict[str, Any]) -> PrefixSearch:
    def tally(fields: dict[str, Any]) -> Tally:
        return Tally(**{**fields, "tokens": Counter(dict(map(tuple, fields["tokens"])))})

    steps = [
        ScanResult(
            **{
                **step,
                "prefix": tuple(step["prefix"]),
                "before_r4": tally(step["before_r4"]),
                "quantized": tally(step["quantized"]),
            }
        )
        for step in data["steps"]
    ]
    return PrefixSearch(**{**data, "prefix": tuple(data["prefix"]), "steps": steps})


def _check_same(path: Path, fingerprint: dict[str, str]) -> None:
    try:
        known = json.loads(path.read_bytes())
        different = sorted(k for k in {*known, *fingerprint} if known.get(k) != fingerprint.get(k))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); start again with --overwrite") from error
    if different:
        raise UserError(
            f"--resume: the unfinished run in {path.parent} was of another "
            f"{' and another '.join(different)}; discard it with --overwrite"
        )


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    place_file(partial, path)
