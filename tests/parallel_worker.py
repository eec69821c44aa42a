# SPDX-License-Identifier: Apache-2.0
"""What each rank of test_parallel.py runs under torchrun, on GPUs where there are any."""

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
data = {name: tensor.to(model.device) for name, tensor in load_file(inputs).items()}
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
    found = {"logits": logits, "tokens": tokens, "packed": torch.tensor(packed)}
    device = torch.tensor([ord(c) for c in str(model.device)])
    save_file({name: t.cpu() for name, t in {**found, "device": device}.items()}, output)
torch.distributed.destroy_process_group()
