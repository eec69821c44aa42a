# SPDX-License-Identifier: Apache-2.0
"""The levels of companded 4-bit activations."""

from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import launch


def _run_compand(q: Tensor) -> None:
    launch("compand", q, q=q)


_compand = define_on_every_device(
    "compand_(Tensor(a!) q) -> ()",
    fake=lambda q: None,
    run=_run_compand,
)


def compand_(q: Tensor) -> Tensor:
    """Every integer becomes the nearest of ``+-(5, 14, 25, 38, 53, 72, 95, 126)``, in place; 0
    becomes 5.

    They are the sixteen values of a companded 4-bit activation, in units of an 8-bit scale:
    ``compand_(rmsnorm_quantize(..., bits=8))`` is the input of `gemm_w4a8` then. They follow
    ``126 sinh(2t) / sinh(2)``, t = 1/15, 3/15 .. 1: values of rotated activations are dense near 0,
    and so are the levels (companding: Bennett, Spectra of Quantized Signals, 1948).

    Args:
        q: int8, any shape, contiguous; written in place.

    Returns:
        q.

    Raises:
        ValueError: a wrong dtype or strides.
    """
    _compand(q)
    return q
