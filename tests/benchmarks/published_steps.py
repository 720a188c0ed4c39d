"""A step of d1 (diffu-GRPO) and of ESPO by their own code, and by ours: seconds and peak memory.

    git clone https://github.com/dllm-reasoning/d1
    git clone https://github.com/ML-GSAI/ESPO
    OMP_NUM_THREADS=1 python tests/benchmarks/published_steps.py --d1 d1 --espo ESPO

Both take the reference's scores and the gradient of one step on the same completions, by the same
network of random weights. Theirs is what their trainers do with a batch: the methods are taken out
of their classes, so that TRL, whose trainer they extend, is not needed. Each draws its own masks,
as many for a completion. Writes a record for each: seconds, the fastest of the runs; ratio, theirs
over ours; megabytes on top of the weights; the norm of the gradient.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import gc
import time
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from script import script
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.bench.memory import Peak
from dlmctl.bench.shapes import bench_policy, random_prompts
from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.scoring import mask_plan
from dlmctl.models.policy import Policy
from dlmctl.records.jsonl import Record, write_records
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients
from dlmctl.settings import Knob
from dlmctl.settings.algorithms import RECIPES
from dlmctl.settings.masks import Masks

Row = dict[str, Any]
SHARPNESS = {"diffu-grpo": {"beta": 0.04, "clip": 0.5}, "espo": {"beta": 0.01, "clip": 0.2}}


class Trainer:
    """The methods of a trainer's class, over attributes that are put in by hand."""

    def __init__(self, path: Path, **attributes: Any) -> None:
        names: Row = {
            "torch": torch,
            "F": functional,
            "set_seed": lambda seed: torch.manual_seed(int(seed)),
            "nanmin": lambda values: values,
            "nanmax": lambda values: values,
        }
        body: list[Any] = []
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                body.append(node)
            elif isinstance(node, ast.ClassDef):
                body += [part for part in node.body if isinstance(part, ast.FunctionDef)]
        body = [node for node in body if node.name not in ("__init__", "split_tensor_dict")]
        for node in body:
            node.returns, node.decorator_list = None, []
            for argument in node.args.args:
                argument.annotation = None
        exec(compile(ast.Module(body, []), str(path), "exec"), names)
        self._names = names
        self._metrics: Any = defaultdict(lambda: defaultdict(list))
        self.control = types.SimpleNamespace(should_evaluate=False)
        self.accelerator = types.SimpleNamespace(gather_for_metrics=lambda values: values)
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return types.MethodType(self._names[name], self)


class Logits(nn.Module):
    """A model that is called as theirs."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        self.config = types.SimpleNamespace(name_or_path="LLaDA")

    def forward(self, ids: Tensor) -> Any:
        return types.SimpleNamespace(logits=self.model(input_ids=ids, use_cache=False).logits)


def d1_step(path: str, policy: Policy, reference: Policy, batch: Row) -> Callable[[], None]:
    shared = {"num_iterations": 1, "mask_id": policy.mask_id, "cfg_scale": 0.0}
    trainer = Trainer(
        Path(path) / "diffu-grpo" / "diffu_grpo_trainer.py",
        args=types.SimpleNamespace(p_mask_prompt=0.15, **shared),
        num_iterations=1,
        beta=SHARPNESS["diffu-grpo"]["beta"],
        epsilon=SHARPNESS["diffu-grpo"]["clip"],
        _step=0,
    )
    model, frozen = Logits(policy), Logits(reference)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)[None]
    length = batch["completion_ids"].shape[1]

    def step() -> None:
        with torch.no_grad():
            scores = trainer._get_per_token_logps(frozen, ids, length, [1])
        inputs = {**batch, "mask_seeds": [1], "ref_per_token_logps": scores}
        trainer.compute_loss(model, inputs).backward()

    return step


def espo_step(
    path: str, policy: Policy, reference: Policy, batch: Row, pairs: int
) -> Callable[[], None]:
    shared = {"num_iterations": 1, "gradient_accumulation_steps": 1}
    trainer = Trainer(
        Path(path) / "espo" / "espo_trainer.py",
        args=types.SimpleNamespace(**shared),
        num_iterations=1,
        num_mc=pairs,
        beta=SHARPNESS["espo"]["beta"],
        epsilon_low=SHARPNESS["espo"]["clip"],
        epsilon_high=SHARPNESS["espo"]["clip"],
        processing_class=types.SimpleNamespace(mask_token_id=policy.mask_id),
        _step=1,
    )
    model, frozen = Logits(policy), Logits(reference)
    trainer.model = model
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)[None]
    seeds = torch.arange(pairs)[None]

    def step() -> None:
        length = batch["completion_ids"].shape[1]
        with torch.no_grad():
            scores = trainer._get_elbo_mc(frozen, ids, length, seeds, num_mc=pairs)
        inputs = {**batch, "mask_seeds": seeds[None], "ref_per_token_logps": scores}
        trainer.compute_loss(model, inputs).backward()

    return step


def our_step(
    algo: Any, policy: Policy, reference: Policy, batch: Row, masks: int, size: int
) -> Callable[[], None]:
    rows = zip(
        batch["prompt_ids"].tolist(),
        batch["completion_ids"].tolist(),
        batch["advantages"].tolist(),
        strict=True,
    )
    records = [
        Record(id="p", sample=n, tokens={"prompt": p, "completion": c}, advantage=a)
        for n, (p, c, a) in enumerate(rows)
    ]
    plan = mask_plan(Masks(samples=masks), 0, RECIPES[algo])
    objective = make_objective(algo, **SHARPNESS[algo])
    frozen = Reference("r", lambda examples: log_probs(reference, examples, size))

    def step() -> None:
        for _ in policy_gradients(policy, frozen, [records], objective, Batching(plan), size):
            pass

    return step


def measured(step: Callable[[], None], policy: Policy, repeats: int) -> Row:
    """Seconds, memory and the norm of the gradient."""
    seconds, peak = float("inf"), Peak(policy.device)
    for _ in range(repeats):
        policy.model.zero_grad(set_to_none=True)
        gc.collect()
        with peak:
            begun = time.perf_counter()
            step()
            seconds = min(seconds, time.perf_counter() - begun)
    grads = [p.grad.norm() for p in policy.model.parameters() if p.grad is not None]
    norm = float(torch.stack(grads).norm())
    return {"seconds": seconds, "peak_memory_mb": peak.megabytes, "gradient": norm}


def command(
    d1: Annotated[str, Knob("A clone of d1.")],
    espo: Annotated[str, Knob("A clone of ESPO.")],
    model: Annotated[str, Knob("Random weights of this shape.")] = "random:100m",
    prompt_length: Annotated[int, Knob("Tokens of the prompt.", minimum=1)] = 64,
    gen_length: Annotated[int, Knob("Tokens of a completion.", minimum=1)] = 128,
    completions: Annotated[int, Knob("Completions of the prompt.", minimum=2)] = 6,
    batch_size: Annotated[int, Knob("Sequences in a pass of ours.", minimum=1)] = 4,
    pairs: Annotated[int, Knob("Pairs of complementary masks, for ESPO.", minimum=1)] = 2,
    repeats: Annotated[int, Knob("Runs; the fastest counts.", minimum=1)] = 2,
) -> None:
    """A step of d1 and of ESPO by their own code, and by ours."""
    policy = bench_policy(model, "cpu", "float32")
    reference = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    (prompt,) = random_prompts(policy, 1, prompt_length, prompt_length)
    texts = torch.tensor(random_prompts(policy, completions, gen_length, gen_length))
    batch = {
        "prompt_ids": torch.tensor([prompt]).expand(completions, -1),
        "prompt_mask": None,
        "completion_ids": texts,
        "completion_mask": torch.ones_like(texts),
        "advantages": torch.linspace(-1, 1, completions),
    }
    cases: list[tuple[Any, int, Callable[[], None]]] = [
        ("diffu-grpo", 1, d1_step(d1, policy, reference, batch)),
        ("espo", 2 * pairs, espo_step(espo, policy, reference, batch, pairs)),
    ]
    for algo, masks, step in cases:
        theirs = measured(step, policy, repeats)
        ours = measured(
            our_step(algo, policy, reference, batch, masks, batch_size), policy, repeats
        )
        common = {"algo": algo, "model": model, "completions": completions, "masks": masks}
        write_records(
            [
                {**common, "by": "published", "ratio": 1.0, **theirs},
                {**common, "by": "ours", "ratio": theirs["seconds"] / ours["seconds"], **ours},
            ]
        )


if __name__ == "__main__":
    script(command)()
