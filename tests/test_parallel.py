# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism through transformers: two ranks (gloo, on the CPU) are one model."""

import os
import subprocess
import sys
from pathlib import Path

import prefixquant
import pytest
import torch
from prefixquant.checkpoint import WEIGHTS_NAME, read_checkpoint, write_checkpoint
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.errors import UserError
from prefixquant.modeling.parallel import Shard, ShardedTensors, shard_of
from prefixquant.quantize import quantize
from prefixquant.roles import ARCHITECTURES
from prefixquant.workflow import hf_config_dict
from safetensors.torch import load_file, save_file
from tiny_families import tiny_family
from tiny_model import byte_tokenizer

CALIBRATION = torch.randint(0, 97, (400,), generator=torch.Generator().manual_seed(1))
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}


def save(folder, family="llama", r4_block_size=40, **changes):
    model = tiny_family(family, **{**SIZES, **changes})
    recipe = RecipeConfig(
        scheme=Scheme.parse("w4a8kv4"),
        prefix="text:ab",
        nsamples=2,
        seqlen=32,
        search_samples=2,
        search_seqlen=32,
        r4_block_size=r4_block_size,
    )
    result = quantize(model, byte_tokenizer(), recipe, CALIBRATION)
    config = hf_config_dict(model, result.tensors)
    write_checkpoint(folder, result.tensors, config, result.quantization)
    return folder


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_two_ranks_are_one_model(family, tmp_path):
    pytest.importorskip("transformers.distributed", reason="transformers 5.16 has it elsewhere")
    folder = save(tmp_path / "q", family)
    ids = torch.randint(2, 97, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    save_file({"ids": ids, "mask": mask}, tmp_path / "in")
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [folder, tmp_path / "in", tmp_path / "out", tmp_path / "saved"]
    done = subprocess.run(
        [*command, str(worker), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = load_file(tmp_path / "out")
    model = prefixquant.load(folder)
    expected = model(ids, attention_mask=mask).logits
    # The float sums of two ranks in another order: an activation at a tie may take the next level.
    error = (output["logits"] - expected)[mask.bool()].square().sum()
    assert error / expected[mask.bool()].square().sum() < 1e-4
    alone = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
    )
    assert torch.equal(output["tokens"], alone)
    whole = sum(b.numel() for n, b in model.named_buffers() if n.endswith("proj.weight"))
    assert output["packed"] < 0.75 * whole  # half, and the padding of small kernels' layouts
    assert (tmp_path / "saved" / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


def test_parts_make_up_the_whole(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path / "q", "qwen2"))
    roles = ARCHITECTURES["qwen2"]
    parts = [ShardedTensors(checkpoint.tensors, roles, Shard(rank, 2)) for rank in (0, 1)]
    assert set(parts[0]) == set(checkpoint.tensors)
    cut = 0
    for name, tensor in checkpoint.tensors.items():
        both = [part[name] for part in parts]
        if both[0].shape == tensor.shape:
            assert all(torch.equal(one, tensor) for one in both)
            continue
        dim = next(i for i, n in enumerate(tensor.shape) if both[0].shape[i] != n)
        assert torch.equal(torch.cat(both, dim), tensor)
        cut += 1
    assert cut == 2 * (7 + 5 + 3 + 4)  # packed weights, scales of q k v gate up, biases, K and V


def test_a_bias_of_sums_is_added_once(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path / "q", "llama", attention_bias=True))
    first, second = (
        ShardedTensors(checkpoint.tensors, ARCHITECTURES["llama"], Shard(rank, 2))
        for rank in (0, 1)
    )
    name = "model.layers.0.self_attn.o_proj.bias"
    assert name in first
    assert name not in second
    assert len(first) - len(second) == 2
    with pytest.raises(KeyError):
        second[name]


def test_what_cannot_be_cut(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path / "q", r4_block_size=0))
    with pytest.raises(UserError, match="R4 blocks of 160 do not fit the 2 parts"):
        Shard(0, 2).check(checkpoint)
    with pytest.raises(UserError, match="divides the 2 KV heads, got 4"):
        Shard(0, 4).check(checkpoint)

    class Config:
        distributed_config = type("D", (), {"tp_size": 2, "fsdp_size": 2})()

    with pytest.raises(UserError, match="tensor parallelism alone, got fsdp_size"):
        shard_of(Config())
