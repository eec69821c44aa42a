# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning after calibration: block by block (Block-AP), then end to end (E2E-QP)."""

from prefixquant.finetune.block_ap import BlockTuner
from prefixquant.finetune.end_to_end import EndToEnd, Teacher
from prefixquant.finetune.generated import generate_samples
from prefixquant.finetune.learned import Learned, LearnedBlock

__all__ = ["BlockTuner", "EndToEnd", "Learned", "LearnedBlock", "Teacher", "generate_samples"]
