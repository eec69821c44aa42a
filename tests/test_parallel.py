# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism through transformers: two ranks are one model, on the CPU (gloo) and on GPUs
(NCCL)."""

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


def save(folder, family="llama", scheme="w4a8kv4", r4_block_size=40, r5_block_size=0, **changes):
    model = tiny_family(family, **{**SIZES, **changes})
    recipe = RecipeConfig(
        scheme=Scheme.parse(scheme),
        prefix="text:ab",
        nsamples=2,
        seqlen=32,
        search_samples=2,
        search_seqlen=32,
        r4_block_size=r4_block_size,
        r5_block_size=r5_block_size,
    )
    result = quantize(model, byte_tokenizer(), recipe, CALIBRATION)
    config = hf_config_dict(model, result.tensors)
    write_checkpoint(folder, result.tensors, config, result.quantization)
    return folder


def inputs(length=11):
    """Two prompts, the first padded on the left: ids and mask [2, length]."""
    ids = torch.randint(2, 97, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def run_two_ranks(folder, ids, mask, environment):
    """What parallel_worker.py has found out under torchrun; it saves the model to ``saved``."""
    folder, worker = Path(folder), Path(__file__).with_name("parallel_worker.py")
    save_file({"ids": ids, "mask": mask}, folder.parent / "in")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [folder, *(folder.parent / name for name in ("in", "out", "saved"))]
    done = subprocess.run(
        [*command, str(worker), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder.parent / "out")


def device_of(output):
    return "".join(map(chr, output["device"].tolist()))


def generate(model, ids, mask):
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
    )


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"scheme": "w4a4kv4", "r5_block_size": 32}),
        pytest.param("qwen2", {}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one_model(family, options, tmp_path):
    pytest.importorskip("transformers.distributed", reason="transformers 5.16 has it elsewhere")
    folder = save(tmp_path / "q", family, **options)
    # R6 is over the residual stream, which both ranks have whole.
    assert read_checkpoint(folder).quantization.rotations.r6 == ("scheme" in options)
    ids, mask = inputs()
    # Without GPUs in sight the ranks run on the CPU.
    output = run_two_ranks(folder, ids, mask, {"CUDA_VISIBLE_DEVICES": ""})
    assert device_of(output) == "cpu"
    model = prefixquant.load(folder)
    expected = model(ids, attention_mask=mask).logits
    # The float sums of two ranks in another order: an activation at a tie may take the next level.
    error = (output["logits"] - expected)[mask.bool()].square().sum()
    assert error / expected[mask.bool()].square().sum() < 1e-4
    assert torch.equal(output["tokens"], generate(model, ids, mask))
    whole = sum(b.numel() for n, b in model.named_buffers() if n.endswith("proj.weight"))
    assert output["packed"] < 0.75 * whole  # half, and the padding of small kernels' layouts
    saved = folder.parent / "saved" / WEIGHTS_NAME
    assert saved.read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


# Parts that fill the blocks of the GPU kernels' layout: 64 rows, 128 inputs.
GPU_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("length", [11, 40])
def test_two_gpus_are_one(family, length, tmp_path):
    """Over NCCL. The sums of two ranks are rounded to 16 bits once more than those of one."""
    pytest.importorskip("transformers.distributed", reason="transformers 5.16 has it elsewhere")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = save(tmp_path / "q", family, r4_block_size=128, **GPU_SIZES)
    ids, mask = inputs(length)
    output = run_two_ranks(folder, ids, mask, {})
    assert device_of(output) == "cuda:0"
    model = prefixquant.load(folder, device="cuda")
    expected = model(ids.cuda(), attention_mask=mask.cuda()).logits.cpu().float()
    seen = mask.bool()
    error = (output["logits"].float() - expected)[seen].square().sum()
    assert error / expected[seen].square().sum() < 0.01
    # Every token of the two ranks is the likeliest of one, or near it.
    tokens = output["tokens"]
    longer = torch.cat([mask, torch.ones(len(tokens), tokens.shape[1] - length)], 1).long()
    positions = (longer.cumsum(-1) - 1).clamp(min=0)  # as generate counts them
    logits = model(
        tokens.cuda(), attention_mask=longer.cuda(), position_ids=positions.cuda()
    ).logits
    logits = logits[:, length - 1 : -1].cpu().float()
    chosen = logits.gather(-1, tokens[:, length:, None])[..., 0]
    assert ((logits.max(-1).values - chosen) / logits.std(-1)).max() < 0.2
    alone = generate(model, ids.cuda(), mask.cuda()).cpu()
    assert (alone[:, length] == tokens[:, length]).all()
    whole = sum(b.numel() for n, b in model.named_buffers() if n.endswith("proj.weight"))
    assert 2 * output["packed"] == whole
    saved = folder.parent / "saved" / WEIGHTS_NAME
    assert saved.read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


def test_parts_make_up_the_whole(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path / "q", "qwen2"))
    roles = ARCHITECTURES["qwen2"]
    parts = [ShardedTensors(checkpoint.tensors, roles, Shard(rank, 2)) for rank in (0, 1)]
    assert set(parts[0]) == set(checkpoint.tensors)
    cut = 0
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            continue
        both = [part[name] for part in parts]
        if both[0].shape == tensor.shape:
            assert all(torch.equal(one, tensor) for one in both)
            continue
        dim = next(i for i, n in enumerate(tensor.shape) if both[0].shape[i] != n)
        assert torch.equal(torch.cat(both, dim), tensor)
        cut += 1
    # packed weights, scales and biases of q k v gate up, what K and V have
    assert cut == 2 * (7 + 5 + 5 + 5)


def test_a_bias_of_sums_is_added_once(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path / "q"))
    first, second = (
        ShardedTensors(checkpoint.tensors, ARCHITECTURES["llama"], Shard(rank, 2))
        for rank in (0, 1)
    )
    names = [
        f"model.layers.{i}.{n}.bias" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert set(first) - set(second) == set(names)
    assert len(first) - len(second) == 4
    with pytest.raises(KeyError):
        second[names[0]]


def test_what_cannot_be_cut(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path / "q", r4_block_size=0))
    with pytest.raises(UserError, match="R4 blocks of 160 do not fit the 2 parts"):
        Shard(0, 2).check(checkpoint)
    checkpoint = read_checkpoint(save(tmp_path / "r5", scheme="w4a4kv4"))
    with pytest.raises(UserError, match=r"R5 blocks of 64 do not fit .* --r5-block-size"):
        Shard(0, 2).check(checkpoint)
    blocks = save(tmp_path / "blocks", scheme="w4a4kv4", r5_block_size=32)
    Shard(0, 2).check(read_checkpoint(blocks))
    with pytest.raises(UserError, match="divides the 2 KV heads, got 4"):
        Shard(0, 4).check(checkpoint)

    class Config:
        distributed_config = type("D", (), {"tp_size": 2, "fsdp_size": 2})()

    with pytest.raises(UserError, match="tensor parallelism alone, got fsdp_size"):
        shard_of(Config())
