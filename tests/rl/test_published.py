"""Steps at the defaults of the rivals: loss and gradient as their papers and their code have them.

Each is written again on whole logits of the model, and differentiated by autograd through it: the
masks alone are ours, those of the prompt and of earlier blocks among them.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.scoring import MaskPlan, even_masks, example_of
from dlmctl.records.jsonl import Record
from dlmctl.rl.advantages import Normalization
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients

SAMPLES, LENGTH = 4, 8


def order(algo, number):
    """The steps of a completion: in no block order, but from left to right for justgrpo."""
    return (
        [*range(LENGTH)] if algo == "justgrpo" else [(5 * t) % (3 + number) for t in range(LENGTH)]
    )


def verified(policy, algo):
    """Two prompts; some completions end early."""
    generator = torch.Generator().manual_seed(3)
    groups = []
    for g in range(2):
        group = []
        for i in range(SAMPLES):
            ids = torch.randint(3, 9, (LENGTH,), generator=generator).tolist()
            if i % 2:
                ids[2 * i :] = [policy.eos_id] * (LENGTH - 2 * i)
            reward = float(torch.rand(1, generator=generator))
            prompt = [3 + g, 5, 4, 6, 7, 3]
            record = Record(id=f"p{g}", sample=i, reward=reward)
            record["tokens"] = {"prompt": prompt, "completion": ids}
            record["rollout"] = {"samples": SAMPLES, "order": order(algo, i)}
            group.append(record)
        groups.append(group)
    return groups


class Whole:
    """log p of every token of the completion [N, K, L] under the masks of one step."""

    def __init__(self, policy, groups, plan):
        self.records = [r for group in groups for r in group]
        self.examples = even_masks([example_of(r, policy, plan) for r in self.records])
        self.hidden = torch.stack([e.masks.masked for e in self.examples])
        self.scored = torch.stack([e.masks.scored for e in self.examples])
        self.lengths = self.scored.sum(dim=1)
        rewards = torch.tensor([[r["reward"] for r in group] for group in groups]).double()
        self.rewards = rewards
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (SAMPLES - 1)
        self.less_mean = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
        self.less_others = (rewards - others).flatten()

    def __call__(self, policy):
        tables = []
        for example, hidden in zip(self.examples, self.hidden, strict=True):
            prompt = torch.tensor(example.prompt).expand(len(hidden), -1)
            if example.masks.prompt_masked is not None:
                prompt = prompt.where(~example.masks.prompt_masked, policy.mask_id)
            tokens = torch.tensor(example.completion).expand(len(hidden), -1)
            ids = torch.cat([prompt, tokens.where(~hidden, policy.mask_id)], dim=1)
            logits = policy.model(input_ids=ids).logits[:, prompt.shape[1] :].log_softmax(-1)
            tables.append(logits.gather(2, tokens[:, :, None])[:, :, 0])
        return torch.stack(tables)


def diffu_grpo(of, now, old, reference, clip=0.5, beta=0.04):
    """d1: all tokens up to the end, each once, under one mask of everything."""
    assert of.hidden.shape[1] == 1
    assert of.hidden.all()
    losses = []
    for i in range(len(now)):
        for t in range(int(of.lengths[i])):
            ratio = (now[i, 0, t] - old[i, 0, t]).exp()
            a = of.less_mean[i]
            away = reference[i, 0, t] - now[i, 0, t]
            surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            losses.append(-surrogate + beta * (away.exp() - away - 1))
    return sum(losses) / len(losses)


def wd1(of, now, old, reference):
    """Mean over the prompts of the sums of likelihoods, weighted by softmax of +A and of -A."""
    assert of.hidden.shape[1] == 1
    assert of.hidden.all()
    likelihood = (now[:, 0] * of.scored).sum(dim=1)
    loss = 0.0
    for group in torch.arange(len(now)).split(SAMPLES):
        a = of.less_mean[group]
        good, bad = a.exp() / a.exp().sum(), (-a).exp() / (-a).exp().sum()
        loss = loss + ((bad - good) * likelihood[group]).sum()
    return loss / (len(now) / SAMPLES)


def coupled(of):
    """Masks in pairs that have every token of the canvas once."""
    assert of.scored.all()
    assert of.hidden.shape[1] == 4
    assert torch.equal(of.hidden[:, 0::2], ~of.hidden[:, 1::2])


def espo(of, now, old, reference, clip=0.2, beta=1e-3):
    """Both halves of a pair averaged, each token over the share l / (L + 1) of its mask."""
    coupled(of)
    share = of.hidden.sum(dim=2, keepdim=True) / (LENGTH + 1)

    def elbo(values):
        return (values * of.hidden / share.clamp(min=1e-9)).sum(dim=2).mean(dim=1)

    ratio = ((elbo(now) - elbo(old)) / LENGTH).exp()
    a = of.less_others
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    penalty = (elbo(now) - elbo(reference)) ** 2 / 2
    return -surrogate.mean() + beta * penalty.sum() / (len(now) * LENGTH)


def gdsd(of, now, old, reference, clip=4e-4, beta=1e-3, psi=10.0):
    """Half of the pair's whole log-likelihood, clamped and regressed on the advantage."""
    coupled(of)

    def half(values):
        return (values * of.hidden).sum(dim=2).unflatten(1, (2, 2)).sum(dim=2) / 2

    moved = (half(now) - half(old)).clamp(math.log(1 - clip), math.log(1 + clip))
    distance = moved / LENGTH - psi * of.less_others[:, None]
    penalty = (half(now) - half(reference)) ** 2 / 2
    return (distance**2).sum() / len(now) + beta * penalty.sum() / (len(now) * 2 * LENGTH)


def spg(of, now, old, reference, beta=1.5, omega=0.5):
    """Lower bound for the good; half of it and half the upper bound for the bad."""
    assert of.hidden.shape[1] == 2
    # Where the first block of four comes first, the second one is masked whole.
    assert any(h[:4].any() and not h[4:].all() for rows in of.hidden for h in rows)
    total = 0.0
    for i in range(len(now)):
        targets = of.hidden[i] & of.scored[i]
        lower = sum(now[i, k][targets[k]].mean() for k in range(2)) / 2
        terms = []
        for t in targets.any(dim=0).nonzero()[:, 0]:
            powers = [
                now[i, k, t].exp() ** beta * of.lengths[i] / targets[k].sum()
                for k in range(2)
                if targets[k, t]
            ]
            terms.append((sum(powers) / 2).log() / beta)
        upper = sum(terms) / len(terms)
        a = of.less_mean[i]
        bound = lower if a > 0 else omega * upper + (1 - omega) * lower
        total = total - a * bound * of.lengths[i]
    return total / of.lengths.sum()


def tracerl(of, now, old, reference, clip=0.2, beta=0.01):
    """dLLM-RL: a row for every two steps that decided something; the penalty is a sum over it."""
    deviation = of.rewards.var(dim=1, correction=0, keepdim=True).sqrt()
    advantage = ((of.rewards - of.rewards.mean(dim=1, keepdim=True)) / deviation).flatten()
    rows = []
    for i, record in enumerate(of.records):
        steps = record["rollout"]["order"]
        merged = [sorted({*steps}).index(step) // 2 for step in steps]
        of_this = 0
        for step in sorted({*merged}):
            places = [t for t in range(int(of.lengths[i])) if merged[t] == step]
            if not places:
                continue
            assert of.hidden[i, of_this].tolist() == [other >= step for other in merged]
            ratio = (now[i, of_this, places] - old[i, of_this, places]).exp()
            gain = torch.minimum(
                ratio * advantage[i], ratio.clamp(1 - clip, 1 + clip) * advantage[i]
            )
            k3 = 1 / ratio - 1 + ratio.log()
            rows.append(-gain.mean() + beta * k3.sum())
            of_this += 1
        assert not of.hidden[i, of_this:].any()
    return sum(rows) / len(rows)


def justgrpo(of, now, old, reference, clip=0.2):
    """The sum over all positions of the canvas, each with all later ones masked."""
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu()
    assert all(torch.equal(hidden, later) for hidden in of.hidden)
    deviation = of.rewards.std(dim=1, keepdim=True) + 1e-4
    advantage = ((of.rewards - of.rewards.mean(dim=1, keepdim=True)) / deviation).flatten()[:, None]
    ratio = (now - old).diagonal(dim1=1, dim2=2).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -gain.sum() / (len(now) * LENGTH)


def coupled_grpo(of, now, old, reference, clip=0.5, beta=0.01):
    """The full mask, and half of a pair with the weight 1/t or 1/(1 - t), in equal parts."""
    assert of.hidden[:, 0].all()
    assert torch.equal(of.hidden[:, 1], ~of.hidden[:, 2])
    weights = torch.stack([e.masks.weights for e in of.examples]) / 1.5
    # 1/t and 1/(1 - t), either of which is 0 if none of its tokens count.
    assert torch.allclose((1 / weights[:, 1:]).sum(dim=1)[weights.all(dim=1)], weights.new_ones(()))
    first, second = weights[:, 1:2], weights[:, 2:]

    def score(values):
        half = torch.where(of.hidden[:, 1], first * values[:, 1], second * values[:, 2])
        return ((values[:, 0] + half) / 2)[of.scored]

    a = of.less_others[:, None].expand(-1, LENGTH)[of.scored]
    ratio, away = (score(now) - score(old)).exp(), score(reference) - score(now)
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    return (-gain + beta * (away.exp() - away - 1)).mean()


def d2(of, now, old, reference, clip=0.5, beta=0.04):
    """diffu-GRPO's loss of every token up to the end, each at its own step."""
    losses = []
    for i in range(len(now)):
        for t in range(int(of.lengths[i])):
            [k] = of.examples[i].masks.targets[:, t].nonzero()[:, 0].tolist()
            assert of.hidden[i, k, t]
            ratio, away = (now[i, k, t] - old[i, k, t]).exp(), reference[i, k, t] - now[i, k, t]
            a = of.less_mean[i]
            gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            losses.append(-gain + beta * (away.exp() - away - 1))
    return sum(losses) / len(losses)


def gdpo(of, now, old, reference, clip=0.5):
    """The ratio of sequences by their bound at three nodes, without penalty."""
    nodes = torch.tensor([0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5]).double()[:, None]
    shares = torch.tensor([5, 8, 5]).double()[:, None] / 18
    assert of.hidden.shape[1] == 3
    assert of.scored.all()
    moved = ((now - old) * of.hidden * shares / nodes).sum(dim=(1, 2))
    ratio, a = (moved / LENGTH).exp(), of.less_mean
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a).mean()


def bgpo(of, now, old, reference, clip=0.2, dual=3.0):
    """Each of 16 masks has a ratio: linear for the good, exponential for the bad."""
    deviation = of.rewards.std(dim=1, keepdim=True) + 1e-4
    advantage = ((of.rewards - of.rewards.mean(dim=1, keepdim=True)) / deviation).flatten()
    total = 0.0
    for i in range(len(now)):
        for k in range(16):
            targets = of.hidden[i, k] & of.scored[i]
            moved = (now[i, k] - old[i, k])[targets].sum() / targets.sum()
            a = advantage[i]
            ratio = moved.exp() if a < 0 else 1 + moved
            gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            total = total - (torch.maximum(gain, dual * a) if a < 0 else gain) * of.lengths[i] / 16
    return total / of.lengths.sum()


PUBLISHED = {"diffu-grpo": diffu_grpo, "wd1": wd1, "espo": espo, "gdsd": gdsd, "spg": spg}
PUBLISHED |= {"tracerl": tracerl, "justgrpo": justgrpo, "coupled-grpo": coupled_grpo}
PUBLISHED |= {"d2": d2, "gdpo": gdpo, "bgpo": bgpo}


def gradient_of(policy):
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()])


@pytest.mark.parametrize("algo", PUBLISHED)
def test_loss_and_gradient_at_the_defaults(algo):
    policy, reference = tiny_policy(seed=1), tiny_policy(seed=1)
    generator = torch.Generator().manual_seed(0)

    def move(moving, size):
        with torch.no_grad():
            for p in moving.model.parameters():
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))

    move(reference, 0.01)
    sampler = replace(policy, model=copy.deepcopy(policy.model))
    objective = make_objective(algo)
    recipe, groups = objective.recipe, verified(policy, algo)
    plan = MaskPlan(
        recipe.law, recipe.samples, 0, recipe.until_eos, recipe.prompt_mask, 4, shrink=2
    )
    batching = Batching(plan, Normalization.of(algo), inner=2)
    frozen = Reference("r", lambda examples: log_probs(reference, examples, 8))
    steps = policy_gradients(policy, frozen, groups, objective, batching, 3)
    for step, metrics in enumerate(steps):
        ours = gradient_of(policy)
        whole = Whole(policy, groups, replace(plan, draw=2 * step))
        with torch.no_grad():
            then, far = whole(sampler), whole(reference)
        policy.model.zero_grad()
        loss = PUBLISHED[algo](whole, whole(policy), then, far)
        loss.backward()
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-9)
        assert torch.allclose(ours, gradient_of(policy), rtol=1e-5, atol=1e-8)
        assert float(ours.norm()) > 1e-4
        policy.model.zero_grad()
        move(policy, 1e-5 if algo == "gdsd" else 0.02)
    if recipe.prompt_mask:
        assert any(bool(e.masks.prompt_masked.any()) for e in whole.examples)
