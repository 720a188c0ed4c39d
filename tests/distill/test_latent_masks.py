"""Several mask tokens: the mixture's likelihood, its sampler, what it learns, who refuses it."""

from __future__ import annotations

from collections import Counter
from math import log
from pathlib import Path

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl, tiny_policy
from nested_pairs import PROMPT, gradient, pair

from dlmctl.diffusion.noise import key_tensor, subkeys
from dlmctl.diffusion.proposals import latent, predict_tokens
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.distill.mixture import mixture_gradient
from dlmctl.distill.nested_masks import NestedExample
from dlmctl.models.latent_masks import with_latent_masks
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_policy

PAIRS = [
    pair([0, 1, 3], [1], [3, 4, 5, 6]),
    pair([2], [], [6, 6, 4, 3]),
    pair([0, 1, 2, 3, 4], [0, 2], [3, 7, 5, 4, 8]),
]


def mixture(family: str = "llada", count: int = 3, seed: int = 1) -> Policy:
    return with_latent_masks(tiny_policy(family, seed=seed), count, seed=5)


def likelihoods(policy: Policy, one: NestedExample) -> torch.Tensor:
    """log p(y_A | z, mask token c) of each c, by whole logits: [C]."""
    values = []
    for mask_id in policy.latent_masks:
        ids = torch.tensor([[*one.prompt, *one.completion]])
        ids[0, len(one.prompt) :][one.masks.at_t] = mask_id
        first = len(one.prompt) - policy.shift
        logits = policy.model(input_ids=ids).logits[0][first:].log_softmax(-1)
        places = one.masks.decided.nonzero()[:, 0].tolist()
        values.append(sum(logits[place, one.completion[place]] for place in places))
    return torch.stack(values)


@pytest.mark.parametrize("family", ["llada", "dream", "mlm"])
def test_loss_and_gradient_are_those_of_the_mixture(family):
    student = mixture(family)
    total, used = torch.zeros((), dtype=torch.float64), 0.0
    for one in PAIRS:
        values = likelihoods(student, one)
        total = total - (values.logsumexp(0) - log(3)) / int(one.masks.decided.sum())
        posterior = values.detach().softmax(0)
        used += log(3) + float((posterior * posterior.log()).sum())
    (total / len(PAIRS)).backward()
    expected = gradient(student)
    for batch_size in (1, 3, 64):
        found = mixture_gradient(student, PAIRS[::-1], batch_size)
        assert found["loss"] == pytest.approx(float(total.detach()) / len(PAIRS), rel=1e-9)
        assert found["latent_nats"] == pytest.approx(used / len(PAIRS), rel=1e-6)
        torch.testing.assert_close(gradient(student), expected, rtol=1e-8, atol=1e-11)


def test_components_that_are_alike_are_one():
    """Then it is the mean log-probability of the decided tokens, and the latent says nothing."""
    student = mixture()
    with torch.no_grad():
        table = student.model.get_input_embeddings().weight
        table[list(student.latent_masks)] = table[student.mask_id].clone()
    found = mixture_gradient(student, PAIRS, 8)
    alone = [
        -float(likelihoods(student, one)[0].detach()) / int(one.masks.decided.sum())
        for one in PAIRS
    ]
    assert found["loss"] == pytest.approx(sum(alone) / 3, rel=1e-9)
    assert found["latent_nats"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_each_pass_of_a_row_has_one_of_the_mask_tokens(family, temperature):
    """The sampler, by hand: what it draws with the mask token that its noise says."""
    policy = mixture(family)
    settings = SamplerConfig(
        gen_length=6, block_length=6, steps=3, temperature=temperature, remasking="low_confidence"
    )
    used = set()
    for key in range(8):
        steps = subkeys(key_tensor([key]).expand(3), torch.arange(3))
        drawn = latent(steps, 3).tolist()
        used.update(drawn)
        tokens, order = torch.full((6,), -1), [-1] * 6
        for step in range(3):
            masked = (tokens < 0).nonzero()[:, 0]
            seen = tokens.where(tokens >= 0, policy.latent_masks[drawn[step]])
            states = policy.hidden(torch.tensor([[*PROMPT, *seen.tolist()]]), None)[0]
            picked = [states[policy.source(masked + len(PROMPT))]]
            token, sure = predict_tokens(policy, picked, subkeys(steps[step], masked), settings)
            best = sure.topk(2).indices
            tokens[masked[best]] = token[best]
            for place in masked[best].tolist():
                order[place] = step
        found = sample(policy, [PROMPT], [key], settings)[0]
        assert (found.tokens, found.order) == (tokens.tolist(), order)
    assert used == {0, 1, 2}


def test_further_mask_tokens_are_never_sampled():
    policy = mixture()
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[list(policy.latent_masks)] *= 100
    settings = SamplerConfig(gen_length=6, block_length=6, steps=2, temperature=1.0)
    for drawn in sample(policy, [PROMPT] * 8, list(range(8)), settings):
        assert not set(drawn.tokens) & set(policy.latent_masks)


def test_a_row_does_not_depend_on_its_neighbours():
    policy = mixture()
    settings = SamplerConfig(gen_length=6, block_length=6, steps=3, temperature=1.0)
    together = sample(policy, [PROMPT, [4], PROMPT[:2]], [1, 2, 3], settings)
    for prompt, key, found in zip([PROMPT, [4], PROMPT[:2]], [1, 2, 3], together, strict=True):
        assert sample(policy, [prompt], [key], settings)[0].tokens == found.tokens


def test_the_latent_variable_is_uniform():
    drawn = Counter(latent(key_tensor(list(range(20_000))), 5).tolist())
    assert set(drawn) == set(range(5))
    assert all(abs(count - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5 for count in drawn.values())


@pytest.mark.parametrize("count", [1, 4])
def test_one_pass_gives_answers_that_belong_together(tmp_path: Path, count: int):
    """Every prompt has the answers 1111 and 2222. Tokens that are independent get one in eight."""
    new = ["init", tmp_path / "new", "--family", "llada", "--hidden-size", 32, "--layers", 2]
    assert invoke(*new, "--gen-length", 4, "--block-length", 4).exit_code == 0
    model = tmp_path / "new"
    if count > 1:
        made = invoke("init", tmp_path / "several", "--from", model, "--latents", count)
        assert made.exit_code == 0, made.stderr
        model = tmp_path / "several"
    file = tmp_path / "answers.jsonl"
    records = [
        {"id": str(n), "prompt": f"{n % 7}=", "completion": "12"[n // 7 % 2] * 4}
        for n in range(16 * 120)
    ]
    file.write_bytes(b"\n".join(map(orjson.dumps, records)))
    run = tmp_path / "run"
    trained = invoke(
        "distill", "masked", file, "-m", model, "-o", run, "--decided", 4, "--rounds", 1,
        "--steps-per-round", 120, "--records-per-step", 16, "--lr", 3e-3, "-q",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    if count > 1:
        # Only where all four tokens are masked, in one of four draws, are there two answers.
        last = read_jsonl(run / "metrics.jsonl")[-40:]
        used = sum(row["latent_nats"] for row in last) / len(last)
        assert used == pytest.approx(log(2) / 4, abs=0.08)
    asked = [orjson.dumps({"id": r["id"], "prompt": r["prompt"]}) for r in records]
    (tmp_path / "asked.jsonl").write_bytes(b"\n".join(asked))
    drawn = invoke("rollout", tmp_path / "asked.jsonl", "-m", run, "--steps", 1, "-n", 1, "-q")
    answers = Counter(orjson.loads(line)["completion"] for line in drawn.stdout.splitlines())
    share = (answers["1111"] + answers["2222"]) / len(records)
    assert share > 0.9 if count > 1 else share < 0.4, answers
    assert min(answers["1111"], answers["2222"]) > (0.2 * len(records) if count > 1 else 0)


def test_it_is_saved_loaded_and_resumed(tmp_path: Path):
    made = invoke("init", tmp_path / "new", "--from", "builtin:puzzles", "--latents", 3)
    assert made.exit_code == 0, made.stderr
    policy, base = load_policy(str(tmp_path / "new")), load_policy("builtin:puzzles")
    assert policy.latent_masks == (base.mask_id, base.vocab_size, base.vocab_size + 1)
    save_policy(policy, tmp_path / "again")
    again = load_policy(str(tmp_path / "again"))
    assert (again.latent_masks, again.revision) == (policy.latent_masks, policy.revision)
    ours, theirs = (p.model.get_input_embeddings().weight for p in (policy, base))
    assert torch.equal(ours[: base.vocab_size], theirs)
    file = tmp_path / "some.jsonl"
    prompts = invoke("prompts", "sudoku", "-n", 32, "--completions", "-q")
    file.write_text(prompts.stdout)
    options = ["-m", tmp_path / "new", "--steps-per-round", 2, "--rounds", 2, "-q"]
    options += ["--records-per-step", 8, "-b", 6]
    assert invoke("distill", "masked", file, "-o", tmp_path / "a", *options).exit_code == 0
    half = tmp_path / "half.jsonl"
    half.write_text("".join(prompts.stdout.splitlines(keepends=True)[:16]))
    assert invoke("distill", "masked", half, "-o", tmp_path / "b", *options).exit_code == 0
    assert (
        invoke("distill", "masked", file, "-o", tmp_path / "b", *options, "--resume").exit_code == 0
    )
    one, two = (load_policy(str(tmp_path / name)) for name in "ab")
    assert one.revision == two.revision != policy.revision


def test_what_cannot_read_several_mask_tokens_says_so(tmp_path: Path):
    model = tmp_path / "new"
    assert invoke("init", model, "--from", "builtin:puzzles", "--latents", 2).exit_code == 0
    file = tmp_path / "records.jsonl"
    file.write_text(invoke("prompts", "sudoku", "-n", 2, "--completions", "-q").stdout)
    calls = [
        ("score-elbo", "-m", model),
        ("update", "--algo", "sft", "-m", model, "-o", tmp_path / "run", "--prompts-per-step", 2),
        (
            "sae-train",
            "-m",
            model,
            "-o",
            tmp_path / "saes",
            "--layers",
            "1",
            "--latents",
            64,
            "-k",
            2,
        ),
        ("distill", "masked", "--certainty", 0.1, "-m", model, "-o", tmp_path / "sure"),
        ("rollout", "--cache", "prefix", "-m", model),
        ("init", tmp_path / "more", "--from", model, "--latents", 3),
        ("init", tmp_path / "none", "--latents", 3),
    ]
    for call in calls:
        done = invoke(*call, *([file] if call[0] != "init" else []))
        assert done.exit_code == 2, (call, done.stderr)
        assert "mask token" in done.stderr or "--latents" in done.stderr, done.stderr


@pytest.mark.parametrize("masks", [[2], [2, 2], [2, -1], [2, 10**9], [3, 2], ["2", 3], 7, {"a": 1}])
def test_impossible_mask_tokens_are_refused(tmp_path: Path, masks: object):
    model = tmp_path / "new"
    assert invoke("init", model, "--from", "builtin:puzzles", "--latents", 2).exit_code == 0
    config = orjson.loads((model / "config.json").read_bytes())
    config["dlmctl"]["latent_masks"] = masks
    (model / "config.json").write_bytes(orjson.dumps(config))
    done = invoke("rollout", "-m", model, "-n", 1)
    assert done.exit_code not in (0, 1)
    assert str(model) in done.stderr
