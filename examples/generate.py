# SPDX-License-Identifier: Apache-2.0
"""Plain transformers code on a checkpoint: a left-padded batch, greedy, then beams.

python examples/generate.py model-w4a4kv4
"""

import sys

import prefixquant  # noqa: F401 - lets transformers know the format
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The sky is blue because", "One, two, three,"]


def main(checkpoint: str, new_tokens: int = 24) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The prefix, BOS included, is inside the model: the text goes in as it is.
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, add_special_tokens=False)
    for name, arguments in (("greedy", {}), ("3 beams", {"num_beams": 3})):
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **arguments)
        for text in tokenizer.batch_decode(output, skip_special_tokens=True):
            sys.stdout.write(f"{name}: {text}\n")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
