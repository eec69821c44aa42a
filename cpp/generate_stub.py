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
    ('typing.Annotated[collections.abc.Sequence[int], "FixedSize(8)"]', "list[int]"),
    (f"tuple[{', '.join(['Tensor | None'] * 4 + ['Tensor'] * 4)}]", "tuple[Tensor | None, ...]"),
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
        if not isinstance(value, type):
            found[name] = _signature(value)
    return found


def classes(module) -> dict[str, dict[str, str]]:
    """name -> the signatures of its methods, of every class of a CPU build."""
    return {
        name: {
            method: _signature(value).replace(f"self: prefixquant._C.{name}", "self")
            for method, value in sorted(vars(cls).items())
            if callable(value) and (not method.startswith("_") or method == "__init__")
        }
        for name, cls in sorted(vars(module).items())
        if isinstance(cls, type) and not name.startswith("_")
    }


def _signature(function) -> str:
    text = function.__doc__.splitlines()[0].removeprefix(function.__name__)
    for long, short in _TYPES:
        text = text.replace(long, short)
    return text


def _definition(name: str, signature: str, indent: str = "") -> str:
    """One argument a line where the signature is too long for one line."""
    line = f"{indent}def {name}{signature}: ..."
    if len(line) <= 100:
        return line
    arguments, result = re.fullmatch(r"\((.*)\)( -> .*)", signature).groups()
    # A comma inside brackets belongs to a type.
    separate = (
        _broken_tuple(f"{indent}    {argument},")
        for argument in re.split(r", (?![^\[]*\])", arguments)
    )
    return "\n".join([f"{indent}def {name}(", *separate, f"{indent}){result}: ..."])


def _broken_tuple(line: str) -> str:
    """One type a line where the line, an argument that is a tuple, is too long."""
    if len(line) <= 100:
        return line
    indent, begin, types, end = re.fullmatch(r"( *)(.*tuple\[)(.*)(\],)", line).groups()
    each = (f"{indent}    {kind},\n" for kind in types.split(", "))
    return f"{indent}{begin}\n{''.join(each)}{indent}{end}"


def stub(module) -> str:
    """The content of _C.pyi."""
    lines = [
        "\n".join(
            [f"class {name}:", *(_definition(m, text, "    ") for m, text in methods.items()), ""]
        )
        for name, methods in classes(module).items()
    ]
    lines += [_definition(name, signature) for name, signature in signatures(module).items()]
    return _HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    from prefixquant import _C

    STUB.write_text(stub(_C), encoding="utf-8")
