# SPDX-License-Identifier: Apache-2.0
"""Random models of every supported family, with sizes that are no powers of two."""

import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_family(model_type: str, **changes):
    """A two-layer float32 model: hidden 48 = 12 * 4, intermediate 80 = 20 * 4, 3 heads on 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
    }
    if model_type == "mistral":
        sizes["sliding_window"] = None
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases are 1 and 0 in a fresh model: hide nothing
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "layers" in name:
                parameter.mul_(4)  # attention and MLP must matter beside the residual stream
            # A checkpoint stores norms in 16 bits: these lose nothing by it.
            parameter.copy_(parameter.half())
    return model.requires_grad_(False)
