# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint puts no BOS in front of a text: the prefix holds it."""

import pytest
from prefixquant.loading import chat_template_adds_bos, tokenizer_without_bos
from tiny_model import byte_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

TEMPLATE = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A <s> $B", special_tokens=[("<s>", 0), ("</s>", 1)]
)


@pytest.mark.parametrize("post_processor", [None, TEMPLATE, processors.Sequence([TEMPLATE])])
def test_bos_is_not_added(post_processor, tmp_path):
    tokenizer = byte_tokenizer()
    plain = tokenizer("text")["input_ids"]
    if post_processor is not None:
        tokenizer.backend_tokenizer.post_processor = post_processor
        assert tokenizer("text")["input_ids"] == [0, *plain, 1]
    bare = tokenizer_without_bos(tokenizer)
    expected = plain if post_processor is None else [*plain, 1]
    bare.save_pretrained(tmp_path)
    for again in (bare, AutoTokenizer.from_pretrained(tmp_path)):
        assert again("text")["input_ids"] == expected
    if post_processor is not None:  # the caller's is as it was
        assert tokenizer("text")["input_ids"] == [0, *plain, 1]


def test_chat_template_with_bos_is_noticed():
    tokenizer = byte_tokenizer()
    assert not chat_template_adds_bos(tokenizer)
    for start, expected in (("{{ bos_token }}", True), ("", False)):
        tokenizer.chat_template = start + "{{ messages[0]['content'] }}"
        assert chat_template_adds_bos(tokenizer) == expected
