# SPDX-License-Identifier: Apache-2.0
"""The dtypes that a checkpoint's 16-bit tensors take on a device."""

import torch
from torch import Tensor


def usual_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Of the residual stream: float32 on a CPU, elsewhere ``stored``, the checkpoint's 16 bits."""
    return torch.float32 if device.type == "cpu" else stored


def head_weight(stored: Tensor, device: torch.device) -> Tensor:
    """The ``lm_head`` on the device in 16 bits: bfloat16 on a CPU, elsewhere as it is stored."""
    # CPUs multiply float16 slowly, or not at all.
    return stored.to(torch.bfloat16) if device.type == "cpu" else stored.to(device)
