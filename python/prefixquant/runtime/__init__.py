# SPDX-License-Identifier: Apache-2.0
"""Running a checkpoint without transformers' model code: prefill, decode and sampling on the fused
operations. `decoder.py` is the place to start reading."""

from prefixquant.runtime.generation import Runtime
from prefixquant.runtime.sampling import Sampling

__all__ = ["Runtime", "Sampling"]
