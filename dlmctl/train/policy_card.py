"""The card of a checkpoint of `update` or `distill masked`: a language model or its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmctl.models.policy import Policy
from dlmctl.train.card import DIRECTORY, Card, told_metrics
from dlmctl.train.run_directory import Progress


def policy_card(
    policy: Policy, progress: Progress, settings: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Card:
    """The card of a checkpoint.

    Args:
        settings: options of the training, by their names.
        metrics: record of the last step.
    """
    adapter = getattr(policy.model, "peft_config", {}).get("default")
    trained = "A LoRA adapter" if adapter else "All weights"
    of = progress.reference.rstrip("/").split("/")[-1]
    use = [
        ("sh", f"dlmctl rollout --model {DIRECTORY} prompts.jsonl"),
        ("python", _loading("dlmctl.models.loading", "policy", "load_policy")),
    ]
    if not adapter:
        name = type(policy.core).__name__
        use.append(("python", _loading("transformers", "model", name, ".from_pretrained")))
    lora = {"LoRA rank": adapter.r, "LoRA alpha": adapter.lora_alpha} if adapter else {}
    if policy.quantized:
        lora["base weights in training"] = f"quantized to {policy.quantized}"
    return Card(
        title=f"{of}, {progress.algo}",
        summary=f"{trained} of the {policy.model_family.title} `{progress.reference}` (weights "
        f"`{progress.reference_revision}`), trained by `{progress.algo}` of dlmctl.",
        library="peft" if adapter else "transformers",
        base=progress.reference,
        tags=[
            *(["diffusion-language-model"] if policy.diffusion else []),
            policy.family,
            progress.algo,
            *(["lora"] if adapter else []),
        ],
        pipeline="image-text-to-text" if policy.vision else "text-generation",
        settings={
            "algorithm": progress.algo,
            "steps": progress.step,
            "rounds": progress.round or None,
            "completions": progress.completions,
            "tokens": progress.tokens,
            "steps skipped": progress.skipped,
            **lora,
            **settings,
        },
        metrics=told_metrics(metrics),
        usage=use,
    )


def _loading(module: str, variable: str, name: str, method: str = "") -> str:
    return f'from {module} import {name}\n\n{variable} = {name}{method}("{DIRECTORY}")'
