# SPDX-License-Identifier: Apache-2.0
"""The residual stream of all training samples between two blocks, on the device, host or disk."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

PLACES = ("auto", "device", "host", "disk")
_FORWARD_BATCH = 4  # samples at once where nothing is trained


def batches(first: int, last: int, size: int = _FORWARD_BATCH) -> Iterator[slice]:
    """The samples first .. last - 1, ``size`` at a time."""
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


class ActivationStore:
    """``[n, T, C]`` values that are read and written by samples.

    ``place``: "device"; "host" (page-locked where there is a GPU); "disk", a file in ``folder``
    that is mapped into memory and has no name of its own, so that nothing is left behind.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        place: str,
        dtype: torch.dtype = torch.float32,
        folder: str | os.PathLike | None = None,
    ):
        self.device = device
        self.place = place
        if place == "disk":
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".activations-") as file:
                count = shape[0] * shape[1] * shape[2]
                self.values = torch.from_file(
                    str(Path(file.name)), shared=True, size=count, dtype=dtype
                ).view(shape)
        elif place == "host":
            self.values = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        else:
            self.values = torch.empty(shape, dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self.values)

    def read(self, rows: slice | Tensor) -> Tensor:
        """Samples as float32 on the device."""
        if isinstance(rows, Tensor):
            rows = rows.to(self.values.device)
        return self.values[rows].to(self.device, torch.float32)

    def write(self, rows: slice, values: Tensor) -> None:
        self.values[rows] = values.to(self.values.device, self.values.dtype)

    def advance(self, forward: Callable[[slice, Tensor], Tensor], last: int | None = None) -> None:
        """Replaces the samples, all or those before ``last``, by ``forward`` of their rows and
        values, a batch at a time."""
        for rows in batches(0, len(self) if last is None else last):
            self.write(rows, forward(rows, self.read(rows)))


def choose_place(place: str, needed_bytes: int, device: torch.device) -> str:
    """ "auto": on the device where the streams take less than a third of its free memory."""
    if place != "auto" or device.type != "cuda":
        return "device" if place == "auto" else place
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if needed_bytes < free / 3 else "host"
