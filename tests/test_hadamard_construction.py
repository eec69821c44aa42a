# SPDX-License-Identifier: Apache-2.0
"""The Hadamard matrices of prefixquant.hadamard: orthogonal, quick, and never changing."""

import hashlib
import time

import pytest
import torch
from cases import SIGN_SIZES
from prefixquant import hadamard
from prefixquant.errors import UnsupportedModelError, UserError
from prefixquant.hadamard import apply_hadamard, hadamard_matrix, hadamard_signs, split_size

# SHA-256 of the int8 bytes. Rotated weights are stored in checkpoints and the rotation of the
# activations is rebuilt from these matrices: a new digest means unreadable old checkpoints.
DIGESTS = {
    12: "db7478025ce7",
    20: "d04b56030867",
    28: "75a65a7aa5dd",
    36: "1a7aed2f42a8",
    40: "3c2e966aff89",
    44: "7608149d8967",
    52: "fe5f3d0d5c15",
    60: "91a505ae266d",
    68: "90f5a68830fd",
    76: "290dc2c593bb",
    84: "698e79250ff2",
    92: "b6d01decfca7",
    100: "6b328e214074",
    108: "7deb180ca833",
    124: "afa026e6da7d",
    132: "1a068e9d8c24",
    140: "902eb66771c6",
    148: "1a8964dfe75c",
    156: "ad8b003097c0",
    164: "4f5d6f926990",
    172: "989de5975199",
    924: "43a042d7e9d5",
}


def test_the_sizes_of_real_models_are_pinned():
    assert set(SIGN_SIZES) <= set(DIGESTS)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 64, *DIGESTS])
def test_orthogonal_signs(k):
    signs = hadamard_signs(k)
    assert signs.dtype == torch.int8
    assert signs.shape == (k, k)
    assert (signs.abs() == 1).all()
    assert torch.equal(signs.int() @ signs.int().T, k * torch.eye(k, dtype=torch.int32))
    assert torch.equal(signs.int().T @ signs.int(), k * torch.eye(k, dtype=torch.int32))


@pytest.mark.parametrize(("k", "digest"), DIGESTS.items())
def test_matrices_never_change(k, digest):
    data = bytes(hadamard_signs(k).flatten().view(torch.uint8).tolist())
    assert hashlib.sha256(data).hexdigest().startswith(digest)


def test_every_constructible_size_up_to_400():
    """Whatever _construction promises, hadamard_signs keeps (it checks H H^T = k I itself)."""
    promised = [k for k in range(1, 401) if hadamard._construction(k) is not None]
    for k in promised:
        assert hadamard_signs(k).shape == (k, k)
    assert all(k in (1, 2) or k % 4 == 0 for k in promised)
    missing = sorted(set(range(4, 200, 4)) - set(promised))
    assert missing == [116, 188]


@pytest.mark.parametrize("k", [92, 156, 172, 924])
def test_searches_are_quick(k):
    hadamard_signs.cache_clear()
    hadamard._williamson_rows.cache_clear()
    start = time.process_time()
    hadamard_signs(k)
    assert time.process_time() - start < 3.0  # 0.4 s at most when nothing else runs


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, (1, 1)),
        (64, (64, 1)),
        (4096, (4096, 1)),
        (96, (8, 12)),
        (576, (16, 36)),  # SmolLM2-135M
        (1536, (128, 12)),
        (896, (32, 28)),  # Qwen2-0.5B
        (4864, (64, 76)),
        (2560, (128, 20)),
        (8960, (64, 140)),  # Qwen2-1.5B
        (18944, (128, 148)),  # Qwen2-7B
        (27648, (256, 108)),  # Qwen2.5-32B
        (29568, (32, 924)),  # Qwen2-72B
        (11008, (64, 172)),  # Llama-2-7B
        (13824, (128, 108)),  # Llama-2-13B
        (14336, (512, 28)),  # Llama-3-8B, Mistral-7B
        (28672, (1024, 28)),
        (9728, (128, 76)),  # Qwen3-4B
        (17408, (256, 68)),  # Qwen3-14B
        (25600, (256, 100)),  # Qwen3-32B
        (160, (8, 20)),  # 40 is 2 * 20: the smallest sign matrix wins
    ],
)
def test_split_size(n, expected):
    assert split_size(n) == expected


@pytest.mark.parametrize("n", [-4, 0, 3, 6, 18, 116, 188, 2 * 167, 4 * 2003])
def test_sizes_without_a_construction(n):
    with pytest.raises(UnsupportedModelError, match=f"size {n} has no Hadamard construction"):
        split_size(n)
    assert issubclass(UnsupportedModelError, UserError)


@pytest.mark.parametrize("k", [-1, 0, 3, 10, 116])
def test_signs_without_a_construction(k):
    with pytest.raises(UnsupportedModelError, match=f"{k} x {k}"):
        hadamard_signs(k)


@pytest.mark.parametrize("n", [1, 2, 64, 96, 576, 1536])
def test_matrix_is_orthonormal(n):
    h = hadamard_matrix(n)
    assert h.dtype == torch.float64
    assert (h @ h.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12
    assert hadamard_matrix(n, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("n", [1, 64, 96])
def test_apply_is_the_matrix(n):
    x = torch.randn(5, 192)
    exact = (x.double().view(5, -1, n) @ hadamard_matrix(n).T).view(5, 192)
    assert (apply_hadamard(x, n) - exact).abs().max() < 1e-5
