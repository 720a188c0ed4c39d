"""Objectives against what their authors' code makes of the same numbers.

The code is of Gen-Verse/dLLM-RL (train/rl_llada.py), LeapLabTHU/JustGRPO (grpo.py),
apple/ml-diffucoder (src/open_r1/coupled_grpo.py), kuleshov-group/d2 (diffu_grpo_trainer.py) and
KevinRojas1499/GDPO (gdpo_trainer.py, likelihood_estimators.py); of BGPO there is only the function
compute_policy_loss_bgpo of yjyddq/DARE. It was given a model whose log-probabilities of
token t of completion i under mask k are `now`, `then` (the policy that sampled) and `far` (the
reference) below, in float64, JustGRPO's in the float32 that it casts to.
"""

import json

import pytest
import torch
from conftest import invoke, read_jsonl, shell, tiny_policy

from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.masks import draw_masks, padded
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.rl.advantages import Normalization, advantages
from dlmctl.rl.decoding import check_left_to_right
from dlmctl.rl.objectives.scores import Scores
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients
from dlmctl.settings.mask_laws import ALL


def now(i, k, t):
    return -0.2 - ((3 * i + 5 * k + 7 * t) % 11) / 10


def then(i, k, t):
    return now(i, k, t) + ((2 * i + 3 * k + 5 * t) % 7 - 3) / 10


def far(i, k, t):
    return now(i, k, t) + ((4 * i + 2 * k + 3 * t) % 5 - 2) / 10


def table(of, targets):
    n, k, g = targets.shape
    values = [[[of(i, j, t) for t in range(g)] for j in range(k)] for i in range(n)]
    return torch.tensor(values, dtype=torch.float64) * targets


def loss_of(algo, targets, weights, advantage, old=then, lengths=(8.0, 8.0), **constants):
    """The loss and its gradient by the log-probabilities of the target tokens."""
    current = table(now, targets).requires_grad_()
    scores = Scores(
        current,
        table(old, targets),
        table(far, targets),
        targets,
        weights,
        torch.tensor(lengths, dtype=torch.float64),
        torch.tensor(advantage, dtype=torch.float64),
        torch.zeros(len(targets), dtype=torch.int64),
    )
    loss = make_objective(algo, **constants).loss(scores)
    loss.backward()
    return float(loss.detach()), current.grad * targets


def test_tracerl():
    """Shrink 2, advantages 1 and -0.5, all tokens kept."""
    orders = [0, 2, 1, 0, 4, 3, 4, 7], [5, 0, 1, 1, 2, 5, 3, 3]
    masks = [
        draw_masks("trajectory", ALL, torch.ones(8).bool(), (0, i), 0, order=order, shrink=2)
        for i, order in enumerate(orders)
    ]
    masks = [padded(one, 4) for one in masks]  # of a batch where another has more
    targets = torch.stack([one.targets for one in masks])
    weights = torch.stack([one.weights for one in masks])
    loss, gradient = loss_of("tracerl", targets, weights, [1.0, -0.5])
    assert loss == pytest.approx(-0.2831708595032882, rel=1e-12)
    assert float(gradient[1, 0].sum()) == pytest.approx(0.08807934172, rel=1e-9)
    assert float(gradient.abs().sum()) == pytest.approx(0.403198220622473, rel=1e-12)


def test_tracerl_normalizes_by_the_deviation_of_the_population():
    group = [1.0, 0.0, 0.0, 0.0]
    [values] = advantages([group], Normalization.of("tracerl"))
    assert values == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])
    assert advantages([[0.1] * 3], Normalization.of("tracerl")) == [[0.0] * 3]


def test_justgrpo():
    """Rewards 1, 0, 0.5, 0.75, 0.25, of which one has no advantage and does not count."""
    rewards = [1.0, 0.0, 0.5, 0.75, 0.25]
    [advantage] = advantages([rewards], Normalization.of("justgrpo"))
    kept = [a for a in advantage if a]
    masks = draw_masks("left-to-right", ALL, torch.ones(4).bool(), (0, "a"), 0)
    targets, weights = masks.targets.expand(4, -1, -1), masks.weights.expand(4, -1)
    loss, gradient = loss_of("justgrpo", targets, weights, kept, now, (4.0,) * 4)
    assert loss == pytest.approx(0.0, abs=1e-12)
    per_token = gradient.diagonal(dim1=1, dim2=2)
    wanted = [-0.0790367, 0.0790367, -0.0395184, 0.0395184]
    for row, value in zip(per_token.tolist(), wanted, strict=True):
        assert row == pytest.approx([value] * 4, rel=1e-5)


def test_coupled_grpo():
    """t = 0.35, a completion of 8 tokens and one that ends after 5; advantages 1 and -0.5."""
    first = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 1, 1, 0]]).bool()
    scored = torch.tensor([[1] * 8, [1] * 5 + [0] * 3]).bool()[:, None]
    targets = torch.stack([torch.ones_like(first), first, ~first], dim=1) & scored
    weights = torch.tensor([[1, 1 / 0.35, 1 / 0.65]] * 2).double() * 1.5
    loss, gradient = loss_of("coupled-grpo", targets, weights, [1.0, -0.5])
    assert loss == pytest.approx(-0.3720282486741105, rel=1e-6)
    wanted = [
        [-0.044649331419563176, -0.03224449779093329, -0.025092773353586076],
        [-0.12756951834160907, 0.0, -0.07169363815310308],
        [0.0, -0.0496069196783589, 0.0],
    ]
    for row, values in zip(gradient[0, :, :3].tolist(), wanted, strict=True):
        assert row == pytest.approx(values, rel=1e-5)
    assert float(gradient.abs().sum()) == pytest.approx(1.2570958107923653, rel=1e-6)


def test_d2():
    """Two segments of four steps; a completion of 8 tokens and one that ends after 5."""
    orders = [0, 2, 1, 3, 4, 6, 5, 7], [7, 0, 4, 1, 2, 5, 3, 6]
    scored = torch.tensor([[1] * 8, [1] * 5 + [0] * 3]).bool()
    masks = [
        draw_masks("trajectory", ALL, tokens, (0, "a"), 0, order=order, shrink=4)
        for order, tokens in zip(orders, scored, strict=True)
    ]
    targets = torch.stack([one.targets for one in masks])
    weights = torch.stack([one.weights for one in masks])
    loss, gradient = loss_of("d2", targets, weights, [1.0, -0.5])
    assert loss == pytest.approx(-0.4502802752172446, rel=1e-12)
    assert float(gradient.abs().sum()) == pytest.approx(0.8831287966870455, rel=1e-12)
    first = [-0.10327754136147096, -0.06330289152315446, -0.0766302689785722, -0.09463529757589051]
    assert gradient[0, 0, :4].tolist() == pytest.approx(first, rel=1e-12)
    second = [0.03178245229365789, 0.0, 0.04697702916000653, 0.0, 0.0]
    assert gradient[1, 1, :5].tolist() == pytest.approx(second, rel=1e-12)


def test_the_segments_of_a_decoding_share_the_masks_of_their_prompt():
    given = {"order": range(6), "prompt_length": 40, "prompt_mask": 0.3}
    masks = draw_masks("trajectory", ALL, torch.ones(6).bool(), (0, "a"), 0, **given)
    assert masks.prompt_masked.shape == (6, 40)
    assert (masks.prompt_masked == masks.prompt_masked[0]).all()
    assert 4 < int(masks.prompt_masked[0].sum()) < 20


@pytest.mark.parametrize(
    ("beta", "loss", "size"),
    [
        (0.0, -0.22803563972229052, 0.538328368058113),
        (0.02, -0.22762723708717286, 0.5219171468707312),
    ],
)
def test_gdpo(beta, loss, size):
    """Three nodes; the first, where t is 0.11, masks none of the 8 tokens."""
    drawn = [
        ["........", "..##.#.#", "#####.##"],
        ["........", "##...##.", "#.######"],
    ]
    targets = torch.tensor([[[c == "#" for c in row] for row in rows] for rows in drawn])
    root = (3 / 5) ** 0.5
    levels = torch.tensor([1 - root, 1.0, 1 + root], dtype=torch.float64) / 2
    shares = torch.tensor([5, 8, 5]).double() / 18
    weights = (3 * shares / levels).expand(2, -1)
    found, gradient = loss_of("gdpo", targets, weights, [1.0, -0.5], beta=beta)
    assert found == pytest.approx(loss, rel=1e-12)
    assert float(gradient.abs().sum()) == pytest.approx(size, rel=1e-12)


BGPO_MASKS = [["#.##..", ".#...#"], ["######", "...##."], ["##..#.", "#....."]]


def bgpo_masks():
    """Targets of three completions of six tokens under two masks, and the masks' weights."""
    targets = torch.tensor([[[c == "#" for c in row] for row in rows] for rows in BGPO_MASKS])
    return targets, 6 / targets.sum(dim=2).double()


def test_bgpo():
    """Advantages 1, -0.5, -2: a linear ratio that is clipped, exponential ones, a dual clip."""

    def before(i, k, t):
        return then(i, k, t) - 1.5 * (i == 2)

    targets, weights = bgpo_masks()
    loss, gradient = loss_of("bgpo", targets, weights, [1.0, -0.5, -2.0], before, (6.0,) * 3)
    assert loss == pytest.approx(1.758516979177576, rel=1e-12)
    wanted = [[-1 / 6, 0.0], [0.08473386086552175, 0.0682275627564985], [0.0, 0.0]]
    for row, values in zip(gradient.sum(dim=2).tolist(), wanted, strict=True):
        assert row == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_bgpo_is_a_lower_bound_that_touches_on_policy(advantage):
    """Of the ratio by the mean over the masks, without clips; equal with its gradient at 1."""
    generator = torch.Generator().manual_seed(4)
    targets, weights = (given[:1] for given in bgpo_masks())
    old, lengths = table(now, targets), torch.tensor([6.0]).double()
    gaps = []
    for size in [0.0] + [1.0] * 20:
        moved = size * torch.randn(old.shape, generator=generator, dtype=torch.float64)
        current = (old + moved * targets).requires_grad_()
        a = torch.tensor([advantage]).double()
        scores = Scores(current, old, old, targets, weights, lengths, a, lengths.long())
        whole = ((scores.elbo(current - old) / lengths).exp() * a).sum()
        bound = -make_objective("bgpo", clip=1e9, dual_clip=1e9).loss(scores)
        slopes = [torch.autograd.grad(value, current)[0] for value in (whole, bound)]
        if not size:
            assert float(bound.detach()) == pytest.approx(float(whole.detach()))
            assert torch.allclose(*slopes)
        gaps.append(float((whole - bound).detach()))
    assert min(gaps) >= -1e-12
    assert max(gaps) > 0.1


@pytest.mark.parametrize(
    ("order", "length", "taken"),
    [
        ([0, 1, 2, 3], 4, True),
        ([4, 9, 11, 30], 4, True),
        (None, 4, True),
        ([0, 0, 1, 2], 4, False),
        ([1, 0, 2, 3], 4, False),
        ([0, 1, 7, 7], 2, True),  # the canvas ends with the second token
        ([0, 1, 1, 7], 3, False),
    ],
)
def test_justgrpo_takes_what_was_sampled_from_left_to_right(order, length, taken):
    policy = tiny_policy()
    ids = [4] * (length - 1) + [policy.eos_id] * (5 - length)
    record = Record(tokens={"prompt": [3], "completion": ids}, rollout={"order": order})
    record.where = "<stdin>:3"
    if taken:
        check_left_to_right([record], policy)
        return
    with pytest.raises(DataError, match="--block-length 1") as caught:
        check_left_to_right([record], policy)
    assert caught.value.where == "<stdin>:3"


def test_justgrpo_is_grpo_for_a_model_that_decodes_so_anyway():
    """One pass scores every token; the loss is the one of `grpo` with the same average."""
    policy, found = tiny_policy("ar"), []
    tokens = [{"prompt": [3], "completion": [4, 5 + i]} for i in range(3)]
    group = [Record(id="p", sample=i, reward=float(i), tokens=tokens[i]) for i in range(3)]
    for algo, constants in (("justgrpo", {}), ("grpo", {"loss_type": "dr_grpo"})):
        objective = make_objective(algo, **constants)
        law = objective.recipe.law
        batching = Batching(MaskPlan(law, objective.recipe.samples), Normalization.of(algo))
        frozen = Reference("r", lambda examples: log_probs(policy, examples, 8))
        [metrics] = policy_gradients(policy, frozen, [group], objective, batching, 8)
        gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
        policy.model.zero_grad()
        found.append((metrics["loss"], gradient))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    assert torch.allclose(found[0][1], found[1][1])
    assert float(found[0][1].norm()) > 0


@pytest.mark.parametrize("algo", ["tracerl", "d2"])
def test_steps_of_denoising_mean_nothing_to_an_autoregressive_model(tmp_path, saved_models, algo):
    row = {"id": "a", "prompt": "1", "completion": "2", "reward": 1, "rollout": {"order": [0]}}
    (tmp_path / "v.jsonl").write_text(json.dumps(row))
    model = ("-m", saved_models("ar"), "-o", tmp_path / "run")
    refused = invoke("update", tmp_path / "v.jsonl", "--algo", algo, *model)
    assert refused.exit_code == 2
    assert f"--algo {algo} trains diffusion models alone: it scores the steps" in refused.output


PIPES = {
    "tracerl": ("--block-length 4 --steps 4", "--shrink 2"),
    "justgrpo": ("--block-length 1", ""),
    "coupled-grpo": ("--block-length 4", ""),
    "d2": ("--block-length 4 --steps 4", "--shrink 2 --inner 2"),
    "gdpo": ("--block-length 4", "--inner 2"),
    "bgpo": ("--block-length 4", "-k 2"),
}


@pytest.mark.parametrize("algo", PIPES)
def test_a_pipe_trains(tmp_path, saved_models, algo):
    (tmp_path / "checks.py").write_text("def place(record): return record['sample'] % 2")
    sampler, more = PIPES[algo]
    done = shell(
        f"dlmctl prompts sudoku -n 2 | dlmctl rollout -m {saved_models('llada')} -n 2 "
        f"--gen-length 8 --temperature 1 {sampler} | dlmctl verify --verifier checks:place | "
        f"tee v.jsonl | dlmctl update --algo {algo} {more} --lr 1e-2 -o run",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert len(metrics) == (2 if algo in ("coupled-grpo", "d2", "gdpo") else 1)
    assert all(step["grad_norm"] > 0 for step in metrics)
    if algo not in ("tracerl", "justgrpo", "d2"):
        return
    text = (tmp_path / "v.jsonl").read_text().splitlines()
    text[1] = text[1].replace('"order":[', '"order":[0,')
    (tmp_path / "bad.jsonl").write_text("\n".join(text))
    bad = shell(f"dlmctl update --algo {algo} -o bad bad.jsonl", tmp_path)
    assert bad.returncode == 65
    assert "bad.jsonl:2: field 'rollout.order' is something else" in bad.stderr
