# SPDX-License-Identifier: Apache-2.0
"""Writes python/prefixquant/_C.pyi from the signatures that the built extension states itself.

Usage: PYTHONPATH=python python cpp/generate_stub.py. tests/test_stub.py compares the two. What only
a CUDA build offers (cpp/bindings_cuda.cpp) stays out, so that every build writes the same stub.
"""

import re
from pathlib import Path

CUDA_BINDINGS = Path(__file__).resolve().parent / "bindings_cuda.cpp"
STUB = Path(__file__).resolve().parents[1] / "python" / "prefixquant" / "_C.pyi"

_HEADER = '''\
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N999
"""The compiled extension. Outputs are the last arguments, allocated by the caller."""

from torch import Tensor

__version__: str
with_cuda: bool

'''
_TYPES = (
    ("torch.Tensor", "Tensor"),
    ("typing.SupportsInt | typing.SupportsIndex", "int"),
    ("typing.SupportsFloat | typing.SupportsIndex", "float"),
)


def cuda_names() -> set[str]:
    """What bindings_cuda.cpp defines."""
    return set(re.findall(r'm\.def\(\s*"(\w+)"', CUDA_BINDINGS.read_text(encoding="utf-8")))


def signatures(module) -> dict[str, str]:
    """name -> ``(x: Tensor, ...) -> None`` of every function of a CPU build."""
    cuda_only = cuda_names()
    found = {}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not callable(value) or name in cuda_only:
            continue
        text = value.__doc__.splitlines()[0].removeprefix(name)
        for long, short in _TYPES:
            text = text.replace(long, short)
        found[name] = text
    return found


def stub(module) -> str:
    """The content of _C.pyi; one argument a line where a signature is too long for one line."""
    lines = []
    for name, signature in signatures(module).items():
        line = f"def {name}{signature}: ..."
        if len(line) > 100:
            arguments, result = re.fullmatch(r"\((.*)\)( -> .*)", signature).groups()
            separate = ",\n    ".join(arguments.split(", "))
            line = f"def {name}(\n    {separate},\n){result}: ..."
        lines.append(line)
    return _HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    from prefixquant import _C

    STUB.write_text(stub(_C), encoding="utf-8")
