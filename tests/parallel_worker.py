# SPDX-License-Identifier: Apache-2.0
"""What each rank of test_parallel.py runs under torchrun."""

import sys

import prefixquant  # noqa: F401
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

checkpoint, inputs, output, saved = sys.argv[1:]
torch.set_num_threads(1)
config = DistributedConfig(tp_size=2)
model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=config)
data = load_file(inputs)
mask = data["mask"]
with torch.no_grad():
    logits = model(data["ids"], attention_mask=mask).logits
    tokens = model.generate(
        data["ids"],
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
    )
packed = sum(b.numel() for n, b in model.named_buffers() if n.endswith("proj.weight"))
model.save_pretrained(saved)
if torch.distributed.get_rank() == 0:
    save_file({"logits": logits, "tokens": tokens, "packed": torch.tensor(packed)}, output)
torch.distributed.destroy_process_group()
