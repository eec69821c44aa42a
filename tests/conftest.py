# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: one seed a test, and the instruction sets of the CPU kernels."""

import zlib

import pytest
import torch
from prefixquant import _C


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch with a number that depends on the test's name alone."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest):
    """Runs the test once for every instruction set of this build and CPU."""
    before = _C.current_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)
