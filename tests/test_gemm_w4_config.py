# SPDX-License-Identifier: Apache-2.0
"""The config choice of the CUDA GEMM: pure arithmetic, tested without a GPU (with a CUDA build)."""

import pytest
from prefixquant import _C

if not _C.with_cuda:
    pytest.skip("needs a CUDA build", allow_module_level=True)

H100 = {"sm_count": 132, "arch": 90}
KERNELS = ("gemv", "mma_skinny", "mma_tiled", "wgmma_sm90", "mma_int4_sm80", "gemv_stream")


def choose(m, n, k, weight_bits=4, activation_bits=8, family="", **device):
    config = _C.gemm_config_cuda(
        m=m, n=n, k=k, weight_bits=weight_bits, activation_bits=activation_bits, family=family,
        **(device or H100),
    )  # fmt: skip
    assert _C.gemm_config_text(config).startswith("{" + KERNELS[config[0]])
    return KERNELS[config[0]], config


@pytest.mark.parametrize(
    ("m", "kernel"),
    [(1, "gemv_stream"), (8, "gemv_stream"), (9, "mma_skinny"), (300, "wgmma_sm90")],
)
def test_kernel_by_tokens_on_hopper(m, kernel):
    assert choose(m, 4096, 4096)[0] == kernel
    assert choose(8, 8192, 28672)[0] == "gemv"  # there the ring gains nothing


@pytest.mark.parametrize("arch", [80, 86, 89])
def test_int4_tensor_cores_are_used_where_they_exist(arch):
    device = {"sm_count": 108, "arch": arch}
    assert choose(64, 4096, 4096, activation_bits=4, **device)[0] == "mma_int4_sm80"
    assert choose(64, 4096, 4096, activation_bits=8, **device)[0] == "mma_skinny"
    assert choose(64, 4096, 4096, weight_bits=8, activation_bits=4, **device)[0] == "mma_skinny"


@pytest.mark.parametrize("arch", [80, 86, 89, 100, 120])
@pytest.mark.parametrize("m", [1, 17, 64, 5000])
def test_other_archs_get_no_kernel_of_hopper(arch, m):
    kernel = choose(m, 4096, 4096, sm_count=100, arch=arch)[0]
    assert kernel not in ("wgmma_sm90", "gemv_stream")


@pytest.mark.parametrize("arch", [80, 86, 89])
def test_no_clusters_before_hopper(arch):
    for m in (1, 16, 64, 300):
        assert choose(m, 4096, 14336, sm_count=108, arch=arch)[1][4] == 1


def test_splits_leave_work_for_every_warp():
    for m in (1, 16, 32):
        assert choose(m, 64, 64, family="mma")[1][6] == 1  # one unit of 64 k cannot be split
        assert choose(m, 64, 28672, family="mma")[1][6] >= 4  # few rows: split k


def test_measured_choices():
    # The table of gemm_w4_mma_config.cpp: (rows, tokens, stages, splits)
    def shape_of(m, n, k):
        config = choose(m, n, k, family="mma")[1]
        return config[1], config[2], config[3], config[6]

    assert shape_of(1, 4096, 4096) == (64, 8, 8, 4)
    assert shape_of(1, 6144, 4096) == (64, 8, 4, 2)
    assert shape_of(1, 4096, 14336) == (16, 8, 8, 4)
    assert shape_of(8, 4096, 14336) == (64, 8, 8, 4)
    assert shape_of(1, 28672, 4096) == (64, 8, 4, 1)
    assert shape_of(1, 57344, 8192) == (64, 8, 8, 4)
    assert shape_of(16, 4096, 14336) == (64, 16, 4, 2)
    assert shape_of(16, 28672, 4096) == (128, 16, 4, 1)
    assert shape_of(32, 6144, 4096) == (128, 32, 4, 4)
    assert shape_of(64, 28672, 4096) == (256, 64, 4, 1)


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("sm_count", [78, 114, 132])
@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize(
    ("n", "k"), [(64, 64), (1000, 576), (4096, 4096), (4096, 14336), (152064, 8192), (8192, 131000)]
)
def test_stream_rings_fit_shared_memory(n, k, m, sm_count, weight_bits):
    _, config = choose(
        m, n, k, weight_bits, family="stream", sm_count=sm_count, arch=90
    )  # fmt: skip
    stages, splits = config[3], config[6]
    if stages == 0:
        return  # left to the other kernels
    ring = stages * 64 * 128 * weight_bits // 8
    blocks = -(-k // 128)
    split_k = -(-blocks // splits) * 128
    assert ring + m * split_k <= 227 * 1024
    assert 2 <= stages <= max(2, split_k // 128)
    assert stages % 2 == 0 or stages >= split_k // 128  # a slot belongs to one group of warps
    assert config[5] == -(-n // 64) * splits


def test_measured_stream_choices():
    # The table of gemm_w4_stream_config.cpp: (stages, splits, release), 4 KB (int8: 8 KB) a stage
    def ring_of(m, n, k, weight_bits=4):
        config = choose(m, n, k, weight_bits, family="stream")[1]
        return config[3], config[6], config[8]

    assert ring_of(1, 4096, 14336) == (16, 4, 16)
    assert ring_of(1, 28672, 4096) == (24, 1, 0)
    assert ring_of(1, 57344, 8192)[0] == 0  # the register ring is as good
    assert ring_of(2, 4096, 14336) == (16, 2, 16)
    assert ring_of(4, 28672, 4096)[0] == 0
    assert ring_of(1, 4096, 4096, weight_bits=8) == (8, 4, 8)
    assert ring_of(9, 4096, 14336)[0] == 0  # too many tokens
    # Unmeasured shapes go by the estimate: enough CTAs to fill the SMs.
    for n, k in ((1024, 8192), (2048, 8192), (5120, 5120), (13824, 5120), (152064, 3584)):
        stages, splits, _ = ring_of(1, n, k)
        assert stages > 0
        assert n // 64 * splits >= 0.7 * 132 or splits == 8


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family"):
        choose(1, 64, 64, family="cublas")
