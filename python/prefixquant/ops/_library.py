# SPDX-License-Identifier: Apache-2.0
"""The torch.library namespace ``prefixquant::`` and the one way an operation enters it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from prefixquant import _C

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


def define_on_every_device(schema: str, *, fake: Callable, run: Callable) -> Callable:
    """`define` with one implementation: it allocates on its input's device and calls `launch`."""
    return define(schema, fake=fake, cpu=run, cuda=run if _C.with_cuda else None)


def implement(name: str, function: Callable, dispatch_key: str = "CUDA") -> None:
    """Adds the implementation for one more device to an operation that `define` registered."""
    _LIBRARY.impl(name, function, dispatch_key)


def stream_of(t: torch.Tensor) -> int:
    """The handle of the current CUDA stream on the device of t, as ``_C`` takes it."""
    # torch.cuda.current_stream(t.device).cuda_stream would make a Stream object first: 5 us.
    return torch._C._cuda_getCurrentRawStream(t.device.index)


_HERE = nullcontext()


def on_device(t: torch.Tensor) -> AbstractContextManager:
    """Makes the CUDA device of t the current one; costs next to nothing where it is already."""
    index = t.device.index
    return _HERE if torch.cuda.current_device() == index else torch.cuda.device(index)
