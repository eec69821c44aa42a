# SPDX-License-Identifier: Apache-2.0
"""Every argument of every row-wise operation, wrong in every way: a ValueError that names it.

The first table goes through the public functions; the second calls the extension itself, which must
be safe alone, with outputs of a wrong dtype, shape or layout.
"""

import pytest
import torch
from prefixquant import _C, ops
from prefixquant.hadamard import hadamard_signs


def f(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def scalar(value=0.1):
    return torch.tensor(value)


def i8(*shape):
    return f(*shape, dtype=torch.int8)


SIGNS = hadamard_signs(12)
BAD_SIGNS = {
    "dtype": SIGNS.float(),
    "rank": SIGNS.flatten(),
    "not square": SIGNS[:8].contiguous(),
    "size": i8(6, 6) + 1,
    "values": torch.zeros_like(SIGNS),
    "value 2": torch.where(torch.eye(12).bool(), 2, SIGNS).to(torch.int8),
    "layout": SIGNS.T if not SIGNS.T.is_contiguous() else SIGNS.flip(0).T,
}
BAD_SCALES = {"dtype": scalar().double(), "rank": f(1), "int": torch.tensor(1)}

# operation -> arguments that are accepted
VALID = {
    "pack_int4": {"q": i8(2, 24)},
    "unpack_int4": {"packed": f(2, 12, dtype=torch.uint8)},
    "quantize_static": {"x": f(2, 24), "scale": scalar(), "bits": 4},
    "rmsnorm_quantize": {
        "x": f(2, 24), "weight": f(24), "eps": 1e-5, "scale": scalar(), "bits": 4,
        "shift": f(24),
    },
    "quantize_dynamic": {"x": f(2, 24), "bits": 4, "clip": 1.0},
    "rmsnorm": {"x": f(2, 24), "weight": f(24), "eps": 1e-5},
    "add_rmsnorm_quantize": {
        "residual": f(2, 24), "x": f(2, 24), "weight": f(24), "eps": 1e-5, "scale": scalar(),
        "bits": 4, "shift": f(24),
    },
    "rmsnorm_quantize_dynamic": {"x": f(2, 24), "weight": f(24), "eps": 1e-5, "bits": 4},
    "rmsnorm_hadamard_quantize": {
        "x": f(2, 24), "weight": f(24), "eps": 1e-5, "signs": SIGNS, "scale": scalar(), "bits": 4,
        "shift": f(24),
    },
    "hadamard": {"x": f(2, 24), "signs": SIGNS, "block_size": 24},
    "hadamard_quantize": {
        "x": f(2, 24), "signs": SIGNS, "block_size": 24, "scale": scalar(), "bits": 4,
    },
    "swiglu_hadamard_quantize": {
        "gate": f(2, 24), "up": f(2, 24), "signs": SIGNS, "block_size": 24, "scale": scalar(),
        "bits": 4,
    },
    "swiglu_hadamard_quantize_dynamic": {
        "gate": f(2, 24), "up": f(2, 24), "signs": SIGNS, "block_size": 24, "bits": 4,
    },
    "outlier_scan": {"x": f(2, 24), "eta": 64.0},
    "kv_quantize": {
        "x": f(2, 3, 4, 24), "scale": f(3) + 1, "bits": 4, "signs": SIGNS, "block_size": 24,
        "shift": f(3, 24),
    },
    "kv_append": {
        "x": f(2, 3, 4, 24), "scale": f(3) + 1, "bits": 4, "signs": SIGNS, "block_size": 24,
        "cache": f(2, 3, 9, 12, dtype=torch.uint8), "position": 5, "shift": f(3, 24),
    },
    "kv_dequantize": {
        "q": f(2, 3, 4, 12, dtype=torch.uint8), "scale": f(3) + 1, "bits": 4,
        "dtype": torch.float32,
    },
}  # fmt: skip

BAD_X = {"dtype": i8(2, 24), "double": f(2, 24).double(), "rank": scalar(), "empty row": f(2, 0)}
BAD_BLOCKS = {"zero": 0, "negative": -24, "not 2^m k": 36, "k only partly": 8, "too large": 48}

# (operation, argument) -> values that are refused, by kind of mistake
WRONG = {
    ("pack_int4", "q"): {"dtype": f(2, 24), "odd": i8(2, 23)},
    ("unpack_int4", "packed"): {"dtype": i8(2, 24)},
    ("quantize_static", "x"): BAD_X,
    ("quantize_dynamic", "x"): BAD_X,
    ("quantize_dynamic", "clip"): {"zero": 0.0, "negative": -1.0, "nan": float("nan")},
    ("add_rmsnorm_quantize", "residual"): {
        **BAD_X, "size": f(2, 23), "rows": f(3, 24), "half": f(2, 24).half(),
        "overlap": f(24).expand(2, 24),
    },
    ("hadamard", "x"): {**BAD_X, "size": f(2, 36)},
    ("hadamard_quantize", "x"): {**BAD_X, "size": f(2, 36)},
    ("outlier_scan", "x"): {**BAD_X, "rank 3": f(2, 3, 24), "rank 1": f(24)},
    ("outlier_scan", "eta"): {"zero": 0.0, "negative": -1.0, "nan": float("nan")},
    ("kv_quantize", "x"): {
        "dtype": i8(2, 3, 4, 24), "rank": f(3, 4, 24), "odd": f(2, 3, 4, 23),
        "empty row": f(2, 3, 4, 0),
    },
    ("kv_quantize", "shift"): {
        "dtype": i8(3, 24), "rank": f(72), "heads": f(2, 24), "dim": f(3, 12), "layout": f(24, 3).T,
    },
    ("kv_append", "x"): {"dtype": i8(2, 3, 4, 24), "rank": f(3, 4, 24), "empty": f(2, 3, 4, 0)},
    ("kv_append", "cache"): {
        "dtype": i8(2, 3, 9, 12), "rank": f(3, 9, 12, dtype=torch.uint8),
        "batch": f(1, 3, 9, 12, dtype=torch.uint8), "heads": f(2, 4, 9, 12, dtype=torch.uint8),
        "dim": f(2, 3, 9, 24, dtype=torch.uint8),
        "layout": f(2, 3, 9, 24, dtype=torch.uint8)[..., ::2],
    },
    ("kv_append", "shift"): {"dtype": i8(3, 24), "heads": f(2, 24), "dim": f(3, 12)},
    ("kv_append", "position"): {"negative": -1, "past the end": 6, "huge": 2**62},
    ("kv_dequantize", "q"): {"dtype": i8(2, 3, 4, 12), "rank": f(3, 4, 12, dtype=torch.uint8)},
}  # fmt: skip
for _op in VALID:
    if "rmsnorm" in _op:
        WRONG[_op, "x"] = BAD_X
        for _vector in {"weight", "shift"} & set(VALID[_op]):
            WRONG[_op, _vector] = {
                "dtype": i8(24), "rank": f(1, 24), "size": f(23), "layout": f(48)[::2],
            }  # fmt: skip
        WRONG[_op, "eps"] = {"negative": -1e-6, "nan": float("nan")}
    if "gate" in VALID[_op]:
        WRONG[_op, "gate"] = {"dtype": i8(2, 24), "rank": scalar()}
        WRONG[_op, "up"] = {
            "dtype": f(2, 24, dtype=torch.float16), "rank": f(2, 1, 24), "size": f(2, 48),
        }  # fmt: skip
    if "signs" in VALID[_op]:
        WRONG[_op, "signs"] = BAD_SIGNS
    if "block_size" in VALID[_op]:
        WRONG[_op, "block_size"] = BAD_BLOCKS
    if "bits" in VALID[_op]:
        kv = _op.startswith("kv_")
        WRONG[_op, "bits"] = {str(b): b for b in ((3, 5, 16, 0) if kv else (0, 1, 9, -4))}
    if "scale" in VALID[_op]:
        WRONG[_op, "scale"] = (
            {"dtype": f(3).double(), "rank": scalar(), "size": f(4), "layout": f(6)[::2]}
            if _op.startswith("kv_")
            else BAD_SCALES
        )

CASES = [
    pytest.param(op, name, value, id=f"{op}-{name}-{kind}")
    for (op, name), values in WRONG.items()
    for kind, value in values.items()
]


@pytest.mark.parametrize("op", VALID)
def test_the_valid_arguments_are_accepted(op):
    getattr(ops, op)(**VALID[op])


@pytest.mark.parametrize(("op", "name", "value"), CASES)
def test_wrong_argument(op, name, value):
    # "block_size: 48" is a size that x is too short for: either of the two may be blamed.
    also = "|x|gate" if name == "block_size" else ""
    with pytest.raises(ValueError, match=rf"^{op}: ({name}{also}): "):
        getattr(ops, op)(**{**VALID[op], name: value})


def test_every_argument_is_tried():
    tried = set(WRONG)
    expected = {(op, name) for op, arguments in VALID.items() for name in arguments}
    assert expected - tried == {("kv_dequantize", "dtype")}


def test_dequantize_to_an_integer_dtype():
    with pytest.raises(ValueError, match="y: expected dtype float32, bfloat16 or float16"):
        ops.kv_dequantize(**{**VALID["kv_dequantize"], "dtype": torch.int32})


U8_CACHE = f(2, 3, 4, 12, dtype=torch.uint8)
BAD_Q = {"dtype": f(2, 24), "shape": i8(2, 23), "rank": i8(48), "layout": i8(2, 48)[:, ::2]}
BAD_PACKED = {
    "packed shape": f(2, 11, dtype=torch.uint8),
    "packed layout": f(2, 24, dtype=torch.uint8)[:, ::2],
}
BAD_ROW_SCALES = {"dtype": f(2).double(), "rank": scalar(), "size": f(3), "layout": f(4)[::2]}
BAD_ROWS = {"layout": f(2, 48)[:, ::2], "rows": f(3, 2, 24).transpose(0, 1)}

# The extension itself: outputs, and inputs in a layout that the public functions would have copied.
RAW = {
    ("pack_int4", "packed"): {"dtype": i8(2, 12), "size": f(2, 13, dtype=torch.uint8)},
    ("unpack_int4", "q"): {"dtype": f(2, 24), "size": i8(2, 23)},
    ("quantize_static", "q"): BAD_Q,
    ("quantize_static", "x"): BAD_ROWS,
    ("quantize_dynamic", "q"): BAD_Q,
    ("quantize_dynamic", "scale"): BAD_ROW_SCALES,
    ("quantize_dynamic", "x"): BAD_ROWS,
    ("rmsnorm", "y"): {"dtype": f(2, 24).half(), "shape": f(2, 48), "layout": f(24, 2).T},
    ("rmsnorm", "x"): BAD_ROWS,
    ("rmsnorm_quantize", "q"): {**BAD_Q, **BAD_PACKED},
    ("rmsnorm_quantize", "x"): BAD_ROWS,
    ("add_rmsnorm_quantize", "q"): {**BAD_Q, **BAD_PACKED},
    ("add_rmsnorm_quantize", "x"): BAD_ROWS,
    ("add_rmsnorm_quantize", "residual"): BAD_ROWS,
    ("rmsnorm_quantize_dynamic", "q"): BAD_Q,
    ("rmsnorm_quantize_dynamic", "scale"): BAD_ROW_SCALES,
    ("rmsnorm_hadamard_quantize", "q"): {**BAD_Q, **BAD_PACKED},
    ("rmsnorm_hadamard_quantize", "x"): BAD_ROWS,
    ("swiglu_hadamard_quantize_dynamic", "q"): BAD_Q,
    ("swiglu_hadamard_quantize_dynamic", "scale"): BAD_ROW_SCALES,
    ("hadamard", "y"): {"dtype": f(2, 24).half(), "shape": f(2, 48), "layout": f(24, 2).T},
    ("hadamard", "x"): BAD_ROWS,
    ("hadamard_quantize", "q"): BAD_Q,
    ("hadamard_quantize", "x"): BAD_ROWS,
    ("swiglu_hadamard_quantize", "q"): BAD_Q,
    ("swiglu_hadamard_quantize", "up"): {"layout": f(2, 48)[:, ::2]},
    ("outlier_scan", "row_max"): {"dtype": f(2).half(), "size": f(3), "rank": f(2, 1)},
    ("outlier_scan", "median"): {"dtype": scalar().double(), "rank": f(1)},
    ("outlier_scan", "is_outlier"): {"dtype": f(2), "size": torch.zeros(3, dtype=torch.bool)},
    ("outlier_scan", "x"): {"layout": f(2, 48)[:, ::2]},
    ("kv_quantize", "q"): {"dtype": U8_CACHE.char(), "dim": f(2, 3, 4, 24, dtype=torch.uint8)},
    ("kv_quantize", "x"): {"layout": f(2, 3, 4, 48)[..., ::2]},
    ("kv_append", "x"): {"layout": f(2, 3, 4, 48)[..., ::2]},
    ("kv_dequantize", "y"): {
        "dtype": f(2, 3, 4, 24).int(), "dim": f(2, 3, 4, 12), "rank": f(6, 4, 24),
        "layout": f(2, 3, 24, 4).transpose(2, 3),
    },
    ("kv_dequantize", "q"): {"layout": f(2, 3, 4, 24, dtype=torch.uint8)[..., ::2]},
}  # fmt: skip
OUTPUTS = {
    "pack_int4": {"packed": f(2, 12, dtype=torch.uint8)},
    "unpack_int4": {"q": i8(2, 24)},
    "quantize_static": {"q": i8(2, 24)},
    "quantize_dynamic": {"q": i8(2, 24), "scale": f(2)},
    "rmsnorm": {"y": f(2, 24)},
    "rmsnorm_quantize": {"q": i8(2, 24)},
    "add_rmsnorm_quantize": {"q": i8(2, 24)},
    "rmsnorm_quantize_dynamic": {"q": i8(2, 24), "scale": f(2)},
    "rmsnorm_hadamard_quantize": {"q": i8(2, 24)},
    "swiglu_hadamard_quantize_dynamic": {"q": i8(2, 24), "scale": f(2)},
    "hadamard": {"y": f(2, 24)},
    "hadamard_quantize": {"q": i8(2, 24)},
    "swiglu_hadamard_quantize": {"q": i8(2, 24)},
    "outlier_scan": {
        "row_max": f(2), "median": scalar(), "is_outlier": torch.zeros(2, dtype=torch.bool),
    },
    "kv_quantize": {"q": U8_CACHE},
    "kv_append": {},
    "kv_dequantize": {"y": f(2, 3, 4, 24)},
}  # fmt: skip
RAW_CASES = [
    pytest.param(op, name, value, id=f"{op}-{name}-{kind}")
    for (op, name), values in RAW.items()
    for kind, value in values.items()
]


@pytest.mark.parametrize(("op", "name", "value"), RAW_CASES)
def test_wrong_argument_of_the_extension(op, name, value):
    arguments = {**VALID[op], **OUTPUTS[op]}
    arguments.pop("dtype", None)
    getattr(_C, op)(**arguments)
    with pytest.raises(ValueError, match=f"^{op}: {name}: "):
        getattr(_C, op)(**{**arguments, name: value})


@pytest.mark.parametrize("op", ["rmsnorm_quantize", "add_rmsnorm_quantize"])
def test_packed_levels_need_four_bits_and_an_even_width(op):
    with pytest.raises(ValueError, match=f"^{op}: bits: expected 2 to 4"):
        getattr(ops, op)(**{**VALID[op], "bits": 5}, packed=True)
    odd = {name: value for name, value in VALID[op].items() if name in ("eps", "scale", "bits")}
    odd |= {"weight": None, "x": f(2, 23)} | ({"residual": f(2, 23)} if "add" in op else {})
    with pytest.raises(ValueError, match=f"^{op}: q: expected the shape of x"):
        getattr(ops, op)(**odd, packed=True)


def test_tensors_with_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"unsupported tensor dtype torch\.complex64"):
        ops.quantize_static(torch.zeros(4, dtype=torch.complex64), scalar(), 4)


def test_device_meta_only_computes_shapes():
    q = ops.quantize_static(torch.empty(3, 5, device="meta"), torch.empty((), device="meta"), 4)
    assert q.device.type == "meta"
    assert q.shape == (3, 5)
