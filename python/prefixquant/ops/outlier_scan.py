# SPDX-License-Identifier: Apache-2.0
"""The search for outlier tokens: row maxima, their median and the ratio, in one pass."""

import torch
from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import as_rows, launch


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:1]
    return (
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
        x.new_empty(rows, dtype=torch.bool),
    )


def _run_outlier_scan(x: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    row_max, median, is_outlier = _outputs(x)
    launch(
        "outlier_scan",
        x,
        x=as_rows(x),
        eta=eta,
        row_max=row_max,
        median=median,
        is_outlier=is_outlier,
    )
    return row_max, median, is_outlier


_outlier_scan = define_on_every_device(
    "outlier_scan(Tensor x, float eta) -> (Tensor row_max, Tensor median, Tensor is_outlier)",
    fake=lambda x, eta: _outputs(x),
    run=_run_outlier_scan,
)


def outlier_scan(x: Tensor, eta: float = 64.0) -> tuple[Tensor, Tensor, Tensor]:
    """``M_t = max_c |x[t, c]|``, their lower median, and ``M_t / median > eta`` (PrefixQuant, 3.1).

    As in torch, a NaN makes the maximum of its row and the median NaN, and then no row is an
    outlier; the median of no rows is NaN.

    Args:
        x: float32, bfloat16 or float16 [T, C], any strides.
        eta: the ratio above which a token is an outlier, above 0.

    Returns:
        row_max float32 [T], median float32 [], is_outlier bool [T].

    Raises:
        ValueError: a wrong dtype, rank or ``eta``.
    """
    return _outlier_scan(x, eta)
