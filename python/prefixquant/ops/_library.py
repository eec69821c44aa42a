# SPDX-License-Identifier: Apache-2.0
"""The torch.library namespace ``prefixquant::`` and the one way an operation enters it."""

from collections.abc import Callable

import torch

# Kept alive for the life of the process: torch unregisters the operations when it is collected.
_LIBRARY = torch.library.Library("prefixquant", "DEF")


def define(
    schema: str,
    *,
    fake: Callable,
    cpu: Callable,
    cuda: Callable | None = None,
) -> Callable:
    """Registers ``schema`` with its implementations and returns the operation.

    ``fake`` computes shapes and dtypes only; ``cpu`` and ``cuda`` allocate the outputs and call
    ``prefixquant._C``. An operation without ``cuda`` raises NotImplementedError on CUDA tensors.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"prefixquant::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.prefixquant, name).default


def implement(name: str, function: Callable, dispatch_key: str = "CUDA") -> None:
    """Adds the implementation for one more device to an operation that `define` registered."""
    _LIBRARY.impl(name, function, dispatch_key)
