# SPDX-License-Identifier: Apache-2.0
"""Static 4-bit quantization of LLM weights, activations and KV cache, with real int4 kernels."""

from typing import TYPE_CHECKING

from prefixquant._C import __version__
from prefixquant.integrations.registration import register_with_transformers

if TYPE_CHECKING:
    from prefixquant.loading import load_tokenizer
    from prefixquant.modeling import load
    from prefixquant.runtime import Runtime, Sampling

__all__ = ["Runtime", "Sampling", "__version__", "load", "load_tokenizer"]

_HOMES = {
    "Runtime": "runtime",
    "Sampling": "runtime",
    "load": "modeling",
    "load_tokenizer": "loading",
}


def __getattr__(name: str):
    # Lazily: importing the package must not import transformers.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"prefixquant.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'prefixquant' has no attribute {name!r}")


register_with_transformers()
