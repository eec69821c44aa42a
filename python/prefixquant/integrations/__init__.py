# SPDX-License-Identifier: Apache-2.0
"""Where other people's code meets ours: transformers, and what is built on it."""
