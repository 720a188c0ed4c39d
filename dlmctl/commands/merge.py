"""`dlmctl merge`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from dlmctl.settings import Knob
from dlmctl.settings.compute import Model
from dlmctl.settings.models import Reading


def command(
    output: Annotated[Path, Knob("Directory of the plain model.", "-o", "--output", metavar="DIR")],
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    dtype: Annotated[
        str,
        Knob(
            "float32, bfloat16 or float16. Adapters are merged in float32, then rounded.",
            "--dtype",
            metavar="DTYPE",
            shown_default="that of the base model's weights",
        ),
    ] = "auto",
) -> None:
    """Write a model as plain weights, its adapters merged in.

    DIR is a Hugging Face directory that transformers and every --model load without peft: the
    weights of the base model plus those of its adapter, or of all its adapters if a LoRA run began
    from another. A model without an adapter is written as it is, under transformers' names, with
    what --family, --shift and --mask-id say in its config.json.

    Example:

    dlmctl merge -m runs/lora -o models/tuned
    """
    from dlmctl.models.adapters import merged
    from dlmctl.models.loading import base_directory, load_policy, resolve_dtype
    from dlmctl.models.saving import save_policy
    from dlmctl.models.weights import stored_dtype, weight_files
    from dlmctl.records.files import check_free, publish_directory

    check_free(output)
    name = reading.name(model)
    policy = merged(load_policy(name, "cpu", "float32"))
    kind = stored_dtype(weight_files(base_directory(name))) if dtype == "auto" else dtype
    policy.model.to(resolve_dtype(kind, policy.device))
    publish_directory(output, lambda directory: save_policy(policy, directory))
    print(f"dlmctl: wrote {output}", file=sys.stderr)
