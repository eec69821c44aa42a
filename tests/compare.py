# SPDX-License-Identifier: Apache-2.0
"""How results are compared: bit for bit, or level for level where roundings may tie."""

import torch
from torch import Tensor

_INT_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    """The bit pattern, all NaNs as one (their payload is not part of any definition)."""
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.contiguous().view(_INT_OF_WIDTH[x.element_size()])


def assert_bits_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Fails with the first differing coordinate and the number of differences."""
    assert actual.dtype == expected.dtype, f"{what} dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what} shape {actual.shape}, expected {expected.shape}"
    different = _bits(actual) != _bits(expected)
    if different.any():
        where = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} elements differ, first at "
            f"{where}: got {actual[where].item()!r}, expected {expected[where].item()!r}"
        )


def assert_quantized_close(
    actual: Tensor,
    expected: Tensor,
    quotient: Tensor,
    tie_width: float = 1e-5,
    max_fraction: float = 1e-4,
) -> None:
    """For results whose quotient x / s was computed in another order than the reference's.

    Levels may differ by 1, only where `quotient` (float64, unrounded) lies within `tie_width`
    (relative to its size, at least to 1) of a rounding tie, and only in `max_fraction` of all
    elements.
    """
    assert actual.dtype == expected.dtype == torch.int8
    assert actual.shape == expected.shape == quotient.shape
    step = (actual.int() - expected.int()).abs()
    if not step.any():
        return
    to_tie = (quotient - quotient.floor() - 0.5).abs() / quotient.abs().clamp_min(1.0)
    bad = (step > 1) | ((step == 1) & (to_tie > tie_width))
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(bad.sum())} levels differ away from a tie, first at {where}: got "
            f"{actual[where].item()}, expected {expected[where].item()}, x / s = {quotient[where]}"
        )
    fraction = float((step != 0).double().mean())
    assert fraction <= max_fraction, f"{fraction:.2e} of the levels differ, at most {max_fraction}"


def assert_float_error(
    actual: Tensor, torch_same_dtype: Tensor, exact: Tensor, atol: float = 1e-6
) -> None:
    """max |actual - exact| <= 2 max |torch in the same dtype - exact| + atol."""
    error = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    allowed = (torch_same_dtype.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= 2 * allowed + atol, f"error {error:.3e}, torch's own is {allowed:.3e}"
