# SPDX-License-Identifier: Apache-2.0
"""``quant_method: "prefixquant"`` in transformers: after ``import prefixquant``,
`AutoModelForCausalLM.from_pretrained` and everything built on it load our checkpoints.

transformers makes the skeleton, and its loader is then shown a model without tensors:
`read_checkpoint` validates the folder and `fill_model` builds the modules, as in
`prefixquant.load`. So there is one way from a file to a running model, whoever asks for it.

This module is imported while transformers imports its quantizers: it may import no more of it than
those at the top level.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from prefixquant import _C
from prefixquant.checkpoint import Checkpoint, read_checkpoint
from prefixquant.config import QUANT_METHOD

logger = logging.get_logger(__name__)


class PrefixQuantConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint, as it stands in config.json.

    Plain data on purpose: what it says is validated by `prefixquant.checkpoint.read_checkpoint`,
    against the tensors too, before anything is loaded.
    """

    def __init__(self, **keys: Any):
        keys["quant_method"] = QUANT_METHOD
        self.__dict__.update(keys)


class PrefixQuantizer(HfQuantizer):
    """Loads and saves checkpoints under transformers' `from_pretrained` and `save_pretrained`."""

    requires_calibration = True  # a float model is quantized by `prefixquant quantize`
    # Called with every model that from_pretrained has loaded; a server sets it.
    after_loading: ClassVar[Callable[[nn.Module], Any] | None] = None

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.checkpoint: Checkpoint | None = None
        self._device = torch.device("cpu")
        self._dtype: torch.dtype | None = None
        self._children: dict[str, nn.Module] = {}

    # ------------------------------------------------------------ what from_pretrained was asked

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        from prefixquant.modeling.load import check_device

        self._device = check_device(_single_device(device_map))

    def update_device_map(self, device_map: Any) -> Any:
        return None if device_map is None else {"": self._device}

    def update_attn_implementation(self, config: Any) -> Any:
        from prefixquant.modeling import attention

        attention.register()
        asked = getattr(config, "_attn_implementation_internal", None)
        if asked not in (None, attention.NAME):
            logger.warning(
                f"attn_implementation={asked!r} is replaced by {attention.NAME!r}: it holds the "
                "prefix of the checkpoint"
            )
        config._attn_implementation = attention.NAME
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype between the quantized operations: float32 on a CPU; elsewhere what was asked
        for if it has 16 bits (a config's own dtype arrives here too), else the checkpoint's.
        `prefixquant.load` takes any."""
        self._dtype = dtype
        return dtype

    # ------------------------------------------------------------ loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from prefixquant.modeling import attention
        from prefixquant.roles import model_roles

        if not checkpoint_files:
            raise ValueError("from_pretrained: expected a checkpoint folder, got a state_dict")
        model_roles(model.config)  # an unsupported model fails here, before anything is read
        self.checkpoint = read_checkpoint(Path(checkpoint_files[0]).parent)
        # transformers before 5.18 has no update_attn_implementation.
        attention.register()
        model.config._attn_implementation = attention.NAME
        # Without its children the model has no tensors: transformers' loader finds nothing to fill,
        # and nothing in the files that it could miss.
        self._children = dict(model._modules)
        model._modules.clear()
        model._keys_to_ignore_on_load_unexpected = {".*"}

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Nothing: there are no parameters to shard."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from prefixquant.modeling.load import default_dtype, fill_model
        from prefixquant.modeling.parallel import shard_of

        model._modules.update(self._children)
        self._children = {}
        dtype = default_dtype(self._device, self.checkpoint)
        if self._device.type != "cpu" and self._dtype in (torch.float16, torch.bfloat16):
            dtype = self._dtype
        shard = shard_of(model.config)
        model = fill_model(model, self.checkpoint, self._device, dtype, shard).eval()
        if PrefixQuantizer.after_loading is not None:
            PrefixQuantizer.after_loading(model)
        return model

    # ------------------------------------------------------------ saving

    def get_state_dict_and_metadata(self, model: nn.Module):
        """The tensors of the checkpoint the model was loaded from, in the checkpoint's layout.

        They are mapped from its files, which stay readable even if the folder is replaced; what the
        model holds is made of them and never changes.
        """
        return dict(self.checkpoint.tensors.items()), {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrefixQuantizer":
        """Copies of a model share the checkpoint, which never changes."""
        return copy.copy(self)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False


def _single_device(device_map: Any) -> Any:
    """The one device of a device_map; a model of ours is not spread over several this way."""
    if device_map is None:
        return "cpu"
    if isinstance(device_map, dict):
        devices = set(device_map.values())
        if len(devices) != 1:
            raise ValueError(
                "device_map: expected one device for the whole model, got "
                f"{', '.join(sorted(map(str, devices)))}"
            )
        (device,) = devices
    else:
        device = device_map
    if device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda:0" if _C.with_cuda and torch.cuda.is_available() else "cpu"
    return f"cuda:{device}" if isinstance(device, int) else device


def attach_quantizer(model: nn.Module, checkpoint: Checkpoint) -> None:
    """What makes a loaded model one of ours in the eyes of transformers: `save_pretrained` writes
    the checkpoint again, and nothing tries to train or cast it."""
    config = PrefixQuantConfig(**checkpoint.quantization.to_dict())
    quantizer = PrefixQuantizer(config)
    quantizer.checkpoint = checkpoint
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    # It names a file of the checkpoint's folder, which save_pretrained does not copy.
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


class PrefixQuantForCausalLM:
    """What ``auto_map`` of a checkpoint names: under ``trust_remote_code=True`` transformers comes
    here where prefixquant was not imported, or says that it is not installed."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """transformers calls it on every class it found through auto_map."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any):
        from transformers import AutoModelForCausalLM

        kwargs.pop("trust_remote_code", None)
        return AutoModelForCausalLM.from_pretrained(
            path, *args, **{**kwargs, "trust_remote_code": False}
        )


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # it is, where this module is reloaded
    register_quantization_config(QUANT_METHOD)(PrefixQuantConfig)
    register_quantizer(QUANT_METHOD)(PrefixQuantizer)
