# SPDX-License-Identifier: Apache-2.0
"""Mutated checkpoints: the reader and the loader answer with one clear line or work; they do not
crash, hang, or ask for memory beyond the file's size times a small factor."""

import contextlib
import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys

import pytest
from prefixquant.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    read_checkpoint,
    write_checkpoint,
)
from prefixquant.errors import CheckpointError, UserError
from prefixquant.modeling import load
from test_checkpoint import CONFIG, quantization, random_tensors

SECONDS_A_CASE = 5  # of wall time; a case takes a millisecond
MEMORY = 256 << 20  # bytes beyond what the process has mapped; the files have 30 kB

HOSTILE = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**6,
    2**31, 2**63, 10**40, "", "x", "4", "\u0000", "\ud800", "../../etc/passwd", "a" * 5000, [], [0],
    [1, -1], [[]], [[[[[1]]]]], ["full_attention"], {}, {"a": {}}, {"rope_type": "yarn"},
    {"rope_type": "yarn", "factor": 0, "rope_theta": -1}, {"rope_type": "llama3"}, {"": None},
)  # fmt: skip
HEADER_VALUES = (
    *HOSTILE, "F32", "F16", "BF16", "U8", "I8", "F64", "BOOL", "F8_E4M3", [0, 0], [0, 10**18],
    [2**63 - 1, 2**64], [5, 4], [-1, 4], [2**32, 2**32], [1] * 70, [0, 1 << 40],
)  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "single"
    return write_checkpoint(folder, random_tensors(), CONFIG, quantization())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    return write_checkpoint(folder, random_tensors(), CONFIG, quantization(), max_shard_bytes=900)


@pytest.fixture
def memory_limit():
    """An allocation of absurd size fails at once, as MemoryError, and so fails the test."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def time_limit():
    def too_long(*arguments):
        raise AssertionError(f"more than {SECONDS_A_CASE} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def outcome(folder, use, what):
    """ "works", or "refused"; everything else is a failure that shows the case."""
    try:
        with time_limit():
            use(folder)
        return "works"
    except UserError as error:
        message = str(error)
    except BaseException as error:
        pytest.fail(f"{type(error).__name__}: {error} on {what}")
    assert "\n" not in message, what
    assert len(message) < 700, what
    return "refused"


# ---------------------------------------------------------------------------- mutations


def places(value, path=()):
    """The paths of all values inside JSON data."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def mutate_json(data, choose, values):
    """One to three places of the data replaced, removed or duplicated."""
    data = json.loads(json.dumps(data))
    for _ in range(choose.randint(1, 3)):
        found = [p for p in places(data) if p]
        if not found:
            break
        *parents, last = choose.choice(found)
        target = data
        for key in parents:
            target = target[key]
        action = choose.randrange(4)
        if action == 0:
            del target[last]
        elif action == 1 and isinstance(target, dict):
            key = choose.choice(["x", "", "rope_scaling", "layer_types"])
            target[key] = copy.deepcopy(choose.choice(values))
        else:
            target[last] = copy.deepcopy(choose.choice(values))
    return data


def mutate_bytes(content, choose, end=None):
    """Flipped, removed, repeated or inserted bytes among the first ``end``."""
    content = bytearray(content)
    for _ in range(choose.randint(1, 4)):
        end = min(end or len(content), len(content))
        if not end:
            break
        at = choose.randrange(end)
        action = choose.randrange(5)
        if action == 0:
            content[at] = choose.randrange(256)
        elif action == 1:
            content[at] ^= 1 << choose.randrange(8)
        elif action == 2:
            del content[at : at + choose.randint(1, 9)]
        elif action == 3:
            content[at:at] = content[at : at + choose.randint(1, 40)]
        else:
            content[at:at] = bytes(choose.choices(b'{}[]",:0123456789-eE\\ \x00\xff', k=3))
    return bytes(content)


def split(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def dump(data):
    return json.dumps(data).encode("utf-8", "surrogatepass")


def mutated_config(folder, choose):
    path = folder / CONFIG_NAME
    content = path.read_bytes()
    if choose.random() < 0.75:
        path.write_bytes(dump(mutate_json(json.loads(content), choose, HOSTILE)))
    else:
        path.write_bytes(mutate_bytes(content, choose))


def mutated_weights(folder, choose):
    path = folder / WEIGHTS_NAME
    content = path.read_bytes()
    kind = choose.random()
    if kind < 0.5:
        header, data = split(content)
        encoded = dump(mutate_json(header, choose, HEADER_VALUES))
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    elif kind < 0.85:
        header_end = 8 + struct.unpack("<Q", content[:8])[0]
        path.write_bytes(mutate_bytes(content, choose, header_end))
    else:
        path.write_bytes(mutate_bytes(content, choose))


def mutated_index(folder, choose):
    path = folder / INDEX_NAME
    content = path.read_bytes()
    if choose.random() < 0.75:
        path.write_bytes(dump(mutate_json(json.loads(content), choose, HOSTILE)))
    else:
        path.write_bytes(mutate_bytes(content, choose))


def run_cases(folder, tmp_path, mutate, name, use, cases, seed):
    """Mutates the file ``name`` of a copy, each case from the original; counts the outcomes."""
    target = shutil.copytree(folder, tmp_path / "copy")
    original = (folder / name).read_bytes()
    counts = {"works": 0, "refused": 0}
    for case in range(cases):
        (target / name).write_bytes(original)
        mutate(target, random.Random(seed * 1_000_003 + case))
        counts[outcome(target, use, f"{name}, seed {seed}, case {case}")] += 1
    return counts


FILES = {
    "config": ("single", mutated_config, CONFIG_NAME),
    "weights": ("single", mutated_weights, WEIGHTS_NAME),
    "index": ("sharded", mutated_index, INDEX_NAME),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "cases", [150, pytest.param(15_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_reader(kind, cases, request, tmp_path, memory_limit):
    checkpoint, mutate, name = FILES[kind]
    folder = request.getfixturevalue(checkpoint)
    counts = run_cases(folder, tmp_path, mutate, name, read_checkpoint, cases, seed=1)
    assert counts["refused"] > cases / 4  # the mutations do damage
    if kind == "config":
        assert counts["works"] > 0  # and some of it is harmless


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
@pytest.mark.parametrize(
    "cases", [60, pytest.param(6_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_loader(cases, single, tmp_path, memory_limit):
    """What the reader accepts goes on to transformers' configuration and model classes."""
    counts = run_cases(single, tmp_path, mutated_config, CONFIG_NAME, load, cases, seed=2)
    assert min(counts.values()) > 0


def test_peak_memory_follows_the_file(single, tmp_path):
    """A file of 30 kB that claims terabytes costs no more memory to refuse than to read."""
    target = shutil.copytree(single, tmp_path / "copy")
    header, data = split((target / WEIGHTS_NAME).read_bytes())
    for value in header.values():
        if "shape" in value:
            value["shape"] = [1 << 20, 1 << 20]
            value["data_offsets"] = [0, 1 << 40]
    encoded = dump(header)
    (target / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    read_checkpoint(single)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        read_checkpoint(target)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # kB
