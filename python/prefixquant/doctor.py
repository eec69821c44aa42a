# SPDX-License-Identifier: Apache-2.0
"""What this installation is and which kernels it will run: text to paste in an issue."""

import importlib.metadata
import os
import platform
from typing import Any

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "accelerate",
    "gguf",
    "numpy",
    "typer",
    "rich",
    "PyYAML",
    "lm_eval",
    "compressed-tensors",
    "fastapi",
    "openai",
)


def kernel_path(capability: tuple[int, int]) -> str:
    """The GEMM family of a compute capability (docs: int4 tensor cores end with sm_89)."""
    if capability in ((8, 0), (8, 6), (8, 9)):
        return "int4 tensor cores (mma s4)"
    if capability == (9, 0):
        return "int8 warpgroup MMA, weights unpacked in registers (wgmma s8)"
    if capability >= (8, 0):
        return "int8 tensor cores, weights unpacked in registers (mma s8)"
    return "none: compute capability 8.0 or later is needed"


def environment() -> dict[str, Any]:
    """Versions, machine and kernel choice, as plain data for reports: no names, no paths."""
    import torch

    from prefixquant import _C, __version__

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    info: dict[str, Any] = {
        "prefixquant": __version__,
        "versions": versions,
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "cpu_isa": _C.current_isa(),
        "cpu_isas": list(_C.available_isas()),
        "cuda_build": _C.with_cuda,
        "torch_cuda": torch.version.cuda,
        "gpus": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = (properties.major, properties.minor)
            info["gpus"].append(
                {
                    "name": properties.name,
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                    "kernels": kernel_path(capability) if _C.with_cuda else "none: built for CPU",
                }
            )
    return info


def describe(info: dict[str, Any]) -> str:
    """`environment` as text."""
    lines = [
        f"prefixquant {info['prefixquant']}",
        "versions    " + ", ".join(f"{k} {v}" for k, v in info["versions"].items()),
        f"platform    {info['platform']}",
        f"cpu         {info['cpu']}, {info['cores']} cores, {info['threads']} threads",
        f"cpu kernels {info['cpu_isa']} (available: {', '.join(info['cpu_isas'])})",
        f"cuda build  {'yes' if info['cuda_build'] else 'no'}",
        f"torch cuda  {info['torch_cuda'] or 'no'}",
    ]
    for index, gpu in enumerate(info["gpus"]):
        lines.append(
            f"gpu {index}       {gpu['name']}, sm_{gpu['compute_capability'].replace('.', '')}, "
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB; {gpu['kernels']}"
        )
    if not info["gpus"]:
        lines.append("gpu         none")
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
