# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices of every size the models need, constructed, not tabulated.

A transform of size n = 2^m k is ``H_k (x) H_{2^m}``, k outer: an index of the last dimension reads
``j * 2^m + r``. H_{2^m} is Sylvester's matrix (the FWHT butterflies of the operation ``hadamard``),
H_k comes from the first of these that reaches k:

- Sylvester: k a power of two, [[H, H], [H, -H]].
- Paley I: k - 1 a prime power, 3 mod 4.
- Paley II: k / 2 - 1 a prime power, 1 mod 4.
- Williamson: k = 4 t, four symmetric circulant t x t matrices with A^2 + B^2 + C^2 + D^2 = 4 t I,
  found by a search that is small because the rows are constant on the orbits of a multiplier group.
- Cooper-Wallis: k = 12 w, T-matrices of order 3 on Williamson matrices of order w, put together by
  the Goethals-Seidel array.
- Doubling of k / 2.

The matrices are part of the checkpoint format: weights are stored rotated, and the rotation of the
activations is rebuilt here at load. A change of any sign breaks every checkpoint written before;
tests/test_hadamard_construction.py pins them.
"""

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prefixquant.errors import UnsupportedModelError
from prefixquant.ops import hadamard

# The k part costs k additions an element; beyond this a size is refused rather than made slow.
MAX_SIGNS_SIZE = 2048

# Orders t of Williamson's construction whose search is quick (well under a second) and whose size
# 4 t Paley leaves open: 92 and 172. Order 29 (116) has no solution with a multiplier beyond -1.
_WILLIAMSON_ORDERS = frozenset({23, 43})
_COOPER_WALLIS_ORDERS = frozenset({13})
_MAX_SEARCH_ORBITS = 11


# ---- sizes ----


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e and p an odd prime, else None."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    e = 0
    while q % p == 0:
        q //= p
        e += 1
    return (p, e) if q == 1 else None


def _construction(k: int) -> str | None:
    """The name of the construction that gives a k x k Hadamard matrix, None when there is none."""
    if k < 1:
        return None
    if k & (k - 1) == 0:
        return "sylvester"
    if k % 4:
        return None
    if _prime_power(k - 1) is not None:
        return "paley1"  # k - 1 is 3 mod 4 because 4 divides k
    if (k // 2 - 1) % 4 == 1 and _prime_power(k // 2 - 1) is not None:
        return "paley2"
    if k // 4 in _WILLIAMSON_ORDERS:
        return "williamson"
    if k % 12 == 0 and k // 12 in _COOPER_WALLIS_ORDERS:
        return "cooper-wallis"
    if _construction(k // 2) is not None:
        return "doubling"
    return None


def split_size(n: int) -> tuple[int, int]:
    """(2^m, k) with n = 2^m k and k the smallest size that has a construction (1 for powers of 2).

    Raises:
        UnsupportedModelError: no such k up to MAX_SIGNS_SIZE.
    """
    if n >= 1:
        odd = n // (n & -n)
        k = odd
        while k <= min(n, MAX_SIGNS_SIZE):
            if _construction(k) is not None:
                return n // k, k
            k *= 2
    raise UnsupportedModelError(
        f"size {n} has no Hadamard construction: it is not 2^m k with k a power of two or a Paley, "
        f"Williamson or Cooper-Wallis size up to {MAX_SIGNS_SIZE}"
    )


# ---- quadratic characters of finite fields (Paley) ----


def _powers_of_x(p: int, e: int) -> list[tuple[int, ...]]:
    """x^0, x^1, ..., x^(q-2) in GF(p^e) = GF(p)[x]/f, as coefficient tuples, lowest degree first.

    f is the first monic polynomial (in the order of itertools.product) for which the powers of x
    reach all q - 1 nonzero elements: that alone proves f irreducible and x a generator.
    """
    q = p**e
    one = (1,) + (0,) * (e - 1)
    for low in itertools.product(range(p), repeat=e):
        element, powers = one, []
        while len(powers) < q - 1:
            powers.append(element)
            top = element[-1]
            shifted = (0, *element[:-1])
            element = tuple((s - top * c) % p for s, c in zip(shifted, low, strict=True))
            if element == one or not any(element):
                break
        if len(powers) == q - 1 and element == one:
            return powers
    raise AssertionError(f"GF({q}) has no generator")


def _character_matrix(q: int) -> Tensor:
    """Q[i, j] = chi(a_i - a_j) over GF(q), chi the quadratic character; int8 [q, q]."""
    field = _prime_power(q)
    assert field is not None, f"{q} is not an odd prime power"
    p, e = field
    if e == 1:
        chi = torch.full((q,), -1, dtype=torch.int8)
        chi[torch.arange(1, q) ** 2 % q] = 1
        chi[0] = 0
        index = torch.arange(q)
        return chi[(index[:, None] - index[None, :]) % q]
    # Element a_i has the base-p digits of i; chi(x^n) = (-1)^n for a generator x.
    weights = torch.tensor([p**d for d in range(e)])
    powers = torch.tensor(_powers_of_x(p, e)) @ weights
    chi = torch.zeros(q, dtype=torch.int8)
    chi[powers[0::2]] = 1
    chi[powers[1::2]] = -1
    digits = torch.arange(q)[:, None] // weights % p
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return chi[(difference * weights).sum(-1)]


def _bordered(q: int, corner_sign: int) -> Tensor:
    """[[0, 1...], [corner_sign, Q]]: the conference matrix of order q + 1."""
    c = torch.ones(q + 1, q + 1, dtype=torch.int8)
    c[0, 0] = 0
    c[1:, 0] = corner_sign
    c[1:, 1:] = _character_matrix(q)
    return c


def _paley1(k: int) -> Tensor:
    return _bordered(k - 1, -1) + torch.eye(k, dtype=torch.int8)


def _paley2(k: int) -> Tensor:
    conference = _bordered(k // 2 - 1, 1)
    off_diagonal = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    identity = torch.eye(k // 2, dtype=torch.int8)
    return torch.kron(conference, off_diagonal) + torch.kron(identity, diagonal)


# ---- Williamson and Cooper-Wallis ----


def _multiplier_groups(t: int) -> Iterator[list[int]]:
    """The groups generated by -1 and one other unit of Z_t, largest first, each once."""
    groups = set()
    for g in range(1, t):
        if math.gcd(g, t) == 1:
            powers = {pow(g, i, t) for i in range(t)}
            groups.add(tuple(sorted(powers | {-u % t for u in powers})))
    yield from (list(group) for group in sorted(groups, key=lambda group: (-len(group), group)))


def _orbits(group: list[int], t: int) -> list[list[int]]:
    """The orbits of the nonzero residues mod t under multiplication by `group`."""
    seen: set[int] = set()
    orbits = []
    for i in range(1, t):
        if i not in seen:
            orbit = sorted({i * u % t for u in group})
            seen.update(orbit)
            orbits.append(orbit)
    return orbits


def _search_williamson(t: int, orbits: list[list[int]]) -> Tensor | None:
    """Four rows [4, t] constant on `orbits`, row[0] = 1, whose periodic autocorrelations sum to 0.

    Meet in the middle: all pairs are hashed by the sum of their autocorrelations, and a pair is
    matched with one that has the opposite sum.
    """
    m = len(orbits)
    bits = torch.arange(2**m)[:, None] >> torch.arange(m) & 1
    rows = torch.ones(2**m, t, dtype=torch.int64)
    for index, orbit in enumerate(orbits):
        rows[:, orbit] = 1 - 2 * bits[:, index : index + 1]
    # Autocorrelations are constant on orbits too, so one shift an orbit tells all.
    correlation = torch.stack([(rows * rows.roll(o[0], 1)).sum(1) for o in orbits], dim=1)

    first, second = torch.triu_indices(2**m, 2**m)
    # A linear hash (arithmetic mod 2^64): equal sums have equal keys, opposite sums opposite keys.
    multipliers = torch.tensor([pow(2 * t + 1, 2 * i + 1, 2**61 - 1) for i in range(m)])
    key_of_row = (correlation * multipliers).sum(1)
    key = key_of_row[first] + key_of_row[second]
    sorted_key, order = key.sort(stable=True)
    position = torch.searchsorted(sorted_key, -key).clamp_(max=len(key) - 1)
    for pair in torch.nonzero(sorted_key[position] == -key).flatten().tolist():
        other = int(order[position[pair]])
        chosen = [int(first[pair]), int(second[pair]), int(first[other]), int(second[other])]
        if not correlation[chosen].sum(0).any():
            return rows[chosen].to(torch.int8)
    return None


@functools.cache
def _williamson_rows(t: int) -> Tensor:
    """The first rows of Williamson matrices A, B, C, D of order t, int8 [4, t]."""
    for group in _multiplier_groups(t):
        orbits = _orbits(group, t)
        if len(orbits) <= _MAX_SEARCH_ORBITS:
            rows = _search_williamson(t, orbits)
            if rows is not None:
                return rows
    raise AssertionError(f"no Williamson matrices of order {t} within the search")


def _circulant(row: Tensor) -> Tensor:
    index = torch.arange(len(row))
    return row[(index[None, :] - index[:, None]) % len(row)]


def _blocks(rows: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)


def _williamson(k: int) -> Tensor:
    a, b, c, d = (_circulant(row) for row in _williamson_rows(k // 4))
    return _blocks([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _cooper_wallis(k: int) -> Tensor:
    a, b, c, d = (_circulant(row) for row in _williamson_rows(k // 12))
    # T-matrices of order 3: I, P, P^2 and 0 are disjoint circulants with sum T_i T_i^T = 3 I.
    shift = torch.eye(3, dtype=torch.int8)
    t1, t2, t3 = shift, shift.roll(1, 1), shift.roll(2, 1)
    x1 = torch.kron(t1, a) + torch.kron(t2, b) + torch.kron(t3, c)
    x2 = torch.kron(t2, a) - torch.kron(t1, b) + torch.kron(t3, d)
    x3 = torch.kron(t3, a) - torch.kron(t1, c) - torch.kron(t2, d)
    x4 = torch.kron(t2, c) - torch.kron(t1, d) - torch.kron(t3, b)
    # R reverses both indices: X R is then symmetric for every X that is circulant in both.
    b_r, c_r, d_r = (x.flip(1) for x in (x2, x3, x4))
    bt_r, ct_r, dt_r = (x.T.flip(1) for x in (x2, x3, x4))
    return _blocks(
        [
            [x1, b_r, c_r, d_r],
            [-b_r, x1, dt_r, -ct_r],
            [-c_r, -dt_r, x1, bt_r],
            [-d_r, ct_r, -bt_r, x1],
        ]
    )


def _doubled(h: Tensor) -> Tensor:
    return _blocks([[h, h], [h, -h]])


# ---- the matrices ----


@functools.cache
def hadamard_signs(k: int) -> Tensor:
    """A k x k matrix of +-1 with H H^T = k I (checked in float64); int8 [k, k] on the CPU.

    The tensor is cached and shared: do not write to it.

    Raises:
        UnsupportedModelError: k has no construction.
    """
    name = _construction(k)
    if name is None:
        raise UnsupportedModelError(f"there is no construction of a {k} x {k} Hadamard matrix")
    if name == "sylvester":
        signs = torch.ones(1, 1, dtype=torch.int8)
        while len(signs) < k:
            signs = _doubled(signs)
    elif name == "paley1":
        signs = _paley1(k)
    elif name == "paley2":
        signs = _paley2(k)
    elif name == "williamson":
        signs = _williamson(k)
    elif name == "cooper-wallis":
        signs = _cooper_wallis(k)
    else:
        signs = _doubled(hadamard_signs(k // 2))
    signs = signs.contiguous()
    h = signs.double()
    if not (h.abs() == 1).all() or not torch.equal(h @ h.T, k * torch.eye(k, dtype=torch.float64)):
        raise AssertionError(f"the {name} construction failed for k = {k}")
    return signs


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal H_k (x) H_{2^m} / sqrt(n) that the operation ``hadamard`` applies; [n, n]."""
    pow2, k = split_size(n)
    signs = torch.kron(hadamard_signs(k).double(), hadamard_signs(pow2).double())
    return (signs / math.sqrt(n)).to(dtype)


def apply_hadamard(x: Tensor, block_size: int) -> Tensor:
    """``x @ H.T`` on each block of the last dimension, H = `hadamard_matrix(block_size)`.

    The operation ``hadamard`` with its signs looked up: float32 arithmetic, any of its dtypes.
    Offline rotations in float64 are `prefixquant.rotate`'s.
    """
    k = split_size(block_size)[1]
    return hadamard(x, hadamard_signs(k).to(x.device) if k > 1 else None, block_size)
