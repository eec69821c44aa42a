# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the row-wise operations share."""

from collections.abc import Callable

import torch
from timing import as_row, copies_out_of_l2, time_graph

MAX_COPIES = 64  # of operands that are too small to matter


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of a device copy of 1 GiB."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_graph(lambda _: target.copy_(source)).us * 1e6


def measure(
    launch: Callable, shape: tuple[int, int], operands: int, bytes_moved: float
) -> list[float]:
    """[median, 10th, 90th percentile] us of ``launch(*operands)``, bfloat16 of that shape."""
    copies = min(MAX_COPIES, copies_out_of_l2(max(1, int(bytes_moved))))
    tensors = [
        [torch.randn(shape, device="cuda").bfloat16() for _ in range(operands)]
        for _ in range(copies)
    ]
    timing = time_graph(lambda i: launch(*tensors[i]), copies)
    torch.cuda.empty_cache()
    row = as_row(timing)
    assert row is not None
    return row


def share_of_copy(bytes_moved: float, us: list[float], copy: float) -> float:
    """Percent of the copy bandwidth that moving these bytes in that time is."""
    return bytes_moved / us[0] * 1e6 / copy * 100
