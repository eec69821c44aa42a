# SPDX-License-Identifier: Apache-2.0
"""Which tokens of the samples have a say in scales, second moments and losses."""

import torch
from torch import Tensor

from prefixquant.block import Tap
from prefixquant.prefix import outlier_scan


class Counted:
    """``mask``, bool [n, T]: True for the tokens of n samples that count.

    With a prefix in front, position 0 of a sample is a token torn out of its text, and now and then
    an outlier of its own (SmolLM2 with BOS: 2 of 64 windows, 1600 medians). So may be others that
    the scan's windows did not hold (a window of the same model that begins inside a row of one rare
    token: six of them). One such token would decide scales and second moments, for the worse of
    all others (those six: 23.9 perplexity with W4A4KV4, 21.6 without their say). So position 0 has
    no say, nor has an outlier token from the block on in which it shows in the float model. Without
    prefix they are in every sequence, and count.

    Args:
        shape: (n, T).
        prefix_length: tokens of the prefix.
        eta: of the outlier scan (`prefixquant.prefix`).
    """

    def __init__(
        self, shape: tuple[int, int], prefix_length: int, eta: float, device: torch.device
    ):
        self.mask = torch.ones(shape, dtype=torch.bool, device=device)
        self.eta = eta
        self.selects = prefix_length > 0
        if self.selects:
            self.mask[:, 0] = False

    def tap(self, rows: slice) -> Tap:
        """For the float model's forward pass over these samples: looks at what down_proj reads."""

        def look(name: str, inner: Tensor) -> None:
            if name == "down" and self.selects:
                outliers = [outlier_scan(x, self.eta)[2].bool() for x in inner]
                self.mask[rows] &= ~torch.stack(outliers)

        return look
