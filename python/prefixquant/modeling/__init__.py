# SPDX-License-Identifier: Apache-2.0
"""Running a checkpoint: transformers models whose linears, norms and attention are ours."""

from prefixquant.modeling.load import load

__all__ = ["load"]
