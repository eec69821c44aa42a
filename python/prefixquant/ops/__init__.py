# SPDX-License-Identifier: Apache-2.0
"""The quantized operations, each registered as ``torch.ops.prefixquant.<name>``."""

from prefixquant.ops.pack_int4 import pack_int4, unpack_int4

__all__ = ["pack_int4", "unpack_int4"]
