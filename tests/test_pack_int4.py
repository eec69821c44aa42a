# SPDX-License-Identifier: Apache-2.0
"""The canonical int4 layout, exhaustively."""

import pytest
import reference
import torch
from compare import assert_bits_equal
from prefixquant.ops import pack_int4, unpack_int4


def test_every_byte_unpacks_to_its_two_nibbles():
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = []
    for byte in range(256):
        for nibble in (byte & 15, byte >> 4):
            expected.append(nibble - 16 if nibble > 7 else nibble)
    q = unpack_int4(packed)
    assert q.tolist() == expected
    assert_bits_equal(reference.unpack_int4(packed), q)
    assert_bits_equal(pack_int4(q), packed)


def test_even_index_is_the_low_nibble():
    assert pack_int4(torch.tensor([1, -2], dtype=torch.int8)).tolist() == [0xE1]


def test_every_pair_packs_and_returns():
    values = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(values, values)
    assert_bits_equal(pack_int4(pairs), reference.pack_int4(pairs))
    assert_bits_equal(unpack_int4(pack_int4(pairs)), pairs)


@pytest.mark.parametrize("shape", [(0,), (2,), (3, 0), (0, 4), (1, 2), (17, 34), (2, 3, 130)])
def test_shapes_round_trip(shape):
    q = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack_int4(q)
    assert_bits_equal(packed, reference.pack_int4(q))
    assert_bits_equal(unpack_int4(packed), q)


def test_strided_input():
    q = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    assert_bits_equal(pack_int4(q.T), reference.pack_int4(q.T))
    packed = torch.randint(0, 256, (16, 64), dtype=torch.uint8)
    assert_bits_equal(unpack_int4(packed[:, ::2]), reference.unpack_int4(packed[:, ::2]))


def test_opcheck():
    q = torch.randint(-8, 8, (3, 8), dtype=torch.int8)
    torch.library.opcheck(torch.ops.prefixquant.pack_int4.default, (q,))
    torch.library.opcheck(torch.ops.prefixquant.unpack_int4.default, (pack_int4(q),))


@pytest.mark.parametrize("value", [-9, 8, 127, -128])
@pytest.mark.parametrize("index", [0, 1, 63])
def test_value_out_of_range(value, index):
    q = torch.zeros(64, dtype=torch.int8)
    q[index] = value
    with pytest.raises(ValueError, match=r"q: expected values in \[-8, 7\]"):
        pack_int4(q)
