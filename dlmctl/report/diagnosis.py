"""What this machine has, and what is missing, with the command that installs it."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from dlmctl import __version__

MODELS = ("torch", "transformers", "safetensors", "datasets")
REQUIRED = (*MODELS, "typer", "rich", "orjson", "jinja2")
OPTIONAL = {
    "peft": ("peft", "lora", "update --lora-rank"),
    "bitsandbytes": ("bitsandbytes", "quantized", "--quantize, --optimizer adamw-8bit"),
    "math_verify": ("math-verify", "math", "verify: math"),
    "matplotlib": ("matplotlib", "plot", "plot"),
    "PIL": ("pillow", "vision", "images: prompts shapes"),
    "diffusers": ("diffusers", "diffusers", "distill: pipelines of diffusers"),
    "tensorboard": ("tensorboard", "tensorboard", "tensorboard, --log tensorboard"),
    "trackio": ("trackio", "trackio", "--log trackio"),
    "wandb": ("wandb", "wandb", "--log wandb"),
    "mlflow": ("mlflow", "mlflow", "--log mlflow"),
    "lm_eval": ("lm-eval", "eval", "lm-eval"),
}
"""Module to package, extra, and what needs it."""

BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
"""What torch calls parts of a processor that compute in bfloat16, and what they are called."""


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    state: str
    """ok, missing (something optional), doubtful (of a model), or broken (something required)."""
    detail: str


def findings() -> list[Finding]:
    """All lines of the report, in the order of a newcomer's questions."""
    return [
        Finding("dlmctl", "ok", __version__),
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Finding("machine", "ok", _machine()),
        *(_required(name) for name in REQUIRED),
        *_cpu(),
        *_cuda(),
        *(_optional(module, *row) for module, row in OPTIONAL.items()),
        _builtin(),
    ]


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError, AttributeError):
        return f"{cores} CPU cores"
    return f"{cores} CPU cores, {total:.0f} GiB memory"


def _required(name: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "broken", f"not installed: run  pip install {name}")


def _optional(module: str, package: str, extra: str, purpose: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        how = f"{purpose} needs it: run  pip install 'dlmctl[{extra}]'"
        return Finding(package, "missing", how)
    return Finding(package, "ok", f"{version(package)} ({purpose})")


def _cpu() -> list[Finding]:
    """Whether the processor computes in bfloat16; nothing if torch does not say so."""
    try:
        import torch

        able = torch.cpu.get_capabilities()
    except Exception:  # torch is broken, as the next line of the report says, or older than this
        return []
    units = [unit for name, unit in BFLOAT16.items() if able.get(name)]
    if not units:
        return [Finding("cpu", "ok", "no bfloat16 in hardware: keep --dtype float32, the default")]
    how = "--dtype bfloat16 is faster for large models, and rounds more"
    return [Finding("cpu", "ok", f"bfloat16 in hardware ({', '.join(units)}): {how}")]


def _cuda() -> list[Finding]:
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        return [Finding("torch", "broken", f"cannot be imported ({error})")]
    if torch.cuda.is_available():
        return [_device(torch, number) for number in range(torch.cuda.device_count())]
    if torch.version.cuda is None:
        why = "this torch is a CPU build: run  pip install --force-reinstall torch"
    else:
        why = f"torch is built for CUDA {torch.version.cuda} and finds no device: see nvidia-smi"
    return [Finding("cuda", "missing", f"{why} (the CPU is used)")]


def _device(torch: Any, number: int) -> Finding:
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(number))
    name = torch.cuda.get_device_name(number)
    bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
    return Finding(f"cuda:{number}", "ok", f"{name}, {free:.0f} of {total:.0f} GiB free, {bf16}")


def _builtin() -> Finding:
    weights = Path(__file__).parent.parent / "assets" / "puzzles" / "model.safetensors"
    if not weights.exists():
        return Finding("builtin:puzzles", "broken", f"{weights} is missing: install dlmctl again")
    return Finding("builtin:puzzles", "ok", f"{weights.stat().st_size / 2**20:.1f} MB")
