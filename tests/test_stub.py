# SPDX-License-Identifier: Apache-2.0
"""_C.pyi says what the extension offers: the same names, arguments and types."""

import importlib.util
from pathlib import Path

from prefixquant import _C

ROOT = Path(__file__).resolve().parent.parent


def load_generator():
    path = ROOT / "cpp" / "generate_stub.py"
    spec = importlib.util.spec_from_file_location("generate_stub", path)
    generate_stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate_stub)
    return generate_stub


def test_stub_matches_the_extension():
    # In every build: a CUDA build leaves out what it alone offers.
    generate_stub = load_generator()
    assert len(generate_stub.signatures(_C)) >= 10
    written = generate_stub.STUB.read_text(encoding="utf-8")
    assert generate_stub.stub(_C) == written, "run cpp/generate_stub.py"


def test_what_a_cuda_build_adds_is_known_by_name():
    generate_stub = load_generator()
    names = generate_stub.cuda_names()
    definitions = generate_stub.CUDA_BINDINGS.read_text(encoding="utf-8").count("m.def(")
    assert len(names) == definitions  # none is missed for the way its line is broken
    assert not names & set(generate_stub.signatures(_C))
    present = {name for name in names if hasattr(_C, name)}
    assert present == (names if _C.with_cuda else set())
