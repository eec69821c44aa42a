# SPDX-License-Identifier: Apache-2.0
"""Static 4-bit quantization of LLM weights, activations and KV cache, with real int4 kernels."""

from prefixquant._C import __version__

__all__ = ["__version__"]
