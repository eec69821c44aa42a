# SPDX-License-Identifier: Apache-2.0
"""_C.pyi says what the extension offers: the same names, arguments and types."""

import importlib.util
from pathlib import Path

from prefixquant import _C

ROOT = Path(__file__).resolve().parent.parent


def test_stub_matches_the_extension():
    path = ROOT / "cpp" / "generate_stub.py"
    spec = importlib.util.spec_from_file_location("generate_stub", path)
    generate_stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate_stub)
    assert len(generate_stub.signatures(_C)) >= 10
    written = generate_stub.STUB.read_text(encoding="utf-8")
    assert generate_stub.stub(_C) == written, "run cpp/generate_stub.py"
