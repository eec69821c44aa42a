# SPDX-License-Identifier: Apache-2.0
"""A random two-layer llama with a byte tokenizer, saved as a Hugging Face folder in a moment."""

import torch


def byte_tokenizer():
    """256 byte tokens, <s> and </s>: any text has as many tokens as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_config(**changes):
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return LlamaConfig(**{**sizes, **changes})


def save_tiny_llama(folder, **changes):
    """Writes model and tokenizer to ``folder`` and returns it."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(**changes)).to(torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
