"""What autoencoders are compared with: ablation, noise of equal norm, principal components."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor

from dlmctl.models.attention import Blocks
from dlmctl.models.blocks import block_outputs
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.chunks import encode_chunks, join_codes, reconstruct
from dlmctl.sae.corpus import MaskedBatch, MaskLaw, documents, masked_corpus
from dlmctl.sae.evaluation.controls import Explained, gaussian, sampled
from dlmctl.sae.evaluation.evaluate import Evaluation, evaluate
from dlmctl.sae.evaluation.insertion import seen
from dlmctl.sae.evaluation.placed import PlacedSae
from dlmctl.sae.evaluation.stability import stability
from dlmctl.sae.topk import Codes, TopKSae
from dlmctl.settings.sae import Insertion

MATCHING = Insertion("matching")


def _batches(policy: Policy, size: int = 6, count: int = 20) -> list[MaskedBatch]:
    texts = ["".join("01234="[(n * k * k) % 6] for k in range(5 + n % 7)) for n in range(count)]
    records = [Record(id=n, text=text) for n, text in enumerate(texts)]
    stream = documents(records, policy, 99)
    return list(masked_corpus(stream, policy, MaskLaw(0.2, 0.8, seed=1), size))


def _random(width: int = 16, seed: int = 0, k: int = 4) -> TopKSae:
    sae, generator = TopKSae(width, 40, k), torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return sae.double()


def _constant(value: Tensor) -> TopKSae:
    """Reconstructs everything as the same vector [d]."""
    sae = TopKSae(len(value), 4, 2).double()
    sae.b_dec.data = value.double()
    return sae


def _one(policy: Policy, sae: TopKSae, kind: Any = "mask", **settings: Any) -> dict[str, Any]:
    insertion = dataclasses.replace(MATCHING, **settings)
    placed = PlacedSae("s", sae, 0, kind)
    [row] = evaluate(policy, _batches(policy), [placed], insertion, {})
    return row


@torch.no_grad()
def _masked_states(policy: Policy, batches: list[MaskedBatch]) -> Tensor:
    """Outputs of the first block at masked tokens, [N, d]."""
    outputs = [block_outputs(policy, b.rows(policy), [0])[0][b.masked] for b in batches]
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "settings", [{"control": "pca"}, {"control": "gaussian"}, {"scope": "both"}]
)
def test_what_needs_an_insertion_is_refused_without(settings: Any) -> None:
    with pytest.raises(UsageError, match="--no-insert"):
        Insertion(insert=False, **settings)


@torch.no_grad()
@pytest.mark.parametrize("ending", ["", "_mean"])
def test_ablation_of_the_last_block_leaves_one_prediction_for_all_tokens(ending: str) -> None:
    """It is what the head makes of the vector that stands in, on which loss and KL depend."""
    policy = tiny_policy(layers=1)
    batches = _batches(policy)
    states = _masked_states(policy, batches)
    value = states.mean(dim=0) if ending else torch.zeros(16, dtype=torch.float64)
    q = policy.logits(policy.core.model.norm(value[None])).log_softmax(-1)[0]
    p = policy.logits(policy.core.model.norm(states)).log_softmax(-1)
    ids = torch.cat([batch.ids[batch.masked] for batch in batches])
    row = _one(policy, _random())
    loss, far = -float(q[ids].mean()), float((p.exp() * (p - q)).sum(dim=1).mean())
    assert row[f"ce_loss_with_ablation{ending}"] == pytest.approx(loss)
    assert row[f"kl_div_with_ablation{ending}"] == pytest.approx(far)
    recovered = (loss - row["loss_mask"] - row["delta_mask"]) / (loss - row["loss_mask"])
    assert row[f"ce_loss_score{ending}"] == pytest.approx(recovered)
    score = 1 - row["kl_div_with_sae"] / far
    assert row[f"kl_div_score{ending}"] == pytest.approx(score)
    assert row[f"kl_div_score{ending}_se"] > 0


@torch.no_grad()
def test_the_divergence_is_that_of_the_whole_logits() -> None:
    policy, sae = tiny_policy(layers=1), _random()
    states = _masked_states(policy, _batches(policy))
    p, q = (policy.logits(policy.core.model.norm(x)).log_softmax(-1) for x in (states, sae(states)))
    found = _one(policy, sae, ablate=False)
    assert found["kl_div_with_sae"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()))
    assert not any("ablation" in name or "score" in name for name in found)


def test_an_autoencoder_recovers_as_much_as_what_it_reconstructs() -> None:
    policy = tiny_policy()
    nothing = _one(policy, _constant(torch.zeros(16)))
    assert nothing["ce_loss_score"] == nothing["kl_div_score"] == 0.0
    mean = _masked_states(policy, _batches(policy)).mean(dim=0)
    average = _one(policy, _constant(mean))
    assert average["ce_loss_score_mean"] == pytest.approx(0.0, abs=1e-9)
    assert average["kl_div_score_mean"] == pytest.approx(0.0, abs=1e-9)
    both = TopKSae(16, 32, 32).double()
    both.W_dec.data = torch.cat([torch.eye(16), -torch.eye(16)]).double()
    both.W_enc.data = both.W_dec.data.T.contiguous()
    whole = _one(policy, both)
    for name in ("ce_loss_score", "kl_div_score", "ce_loss_score_mean", "kl_div_score_mean"):
        assert (whole[name], whole[f"{name}_se"]) == (1.0, 0.0)
    assert whole["kl_div_with_sae"] == 0.0


def test_autoencoders_at_the_same_tokens_share_their_ablation() -> None:
    policy = tiny_policy()
    saes = [PlacedSae(str(n), _random(seed=n), 0, "mask") for n in range(2)]
    rows = evaluate(policy, _batches(policy), saes, MATCHING, {})
    assert rows[0]["ce_loss_with_ablation_mean"] == rows[1]["ce_loss_with_ablation_mean"]
    for placed, row in zip(saes, rows, strict=True):
        alone = _one(policy, placed.sae)
        assert {**alone, "sae": row["sae"]} == row


# --- noise ----------------------------------------------------------------------------------


def test_noise_has_the_norm_of_the_error_and_no_preferred_direction() -> None:
    sae, generator = _random(8), torch.Generator().manual_seed(1)
    x = torch.randn(4000, 8, dtype=torch.float64, generator=generator)
    keys = torch.arange(4000) * 7919
    noise = (gaussian(sae)(x, keys) - x).detach()
    error = (sae(x) - x).detach()
    torch.testing.assert_close(noise.norm(dim=1), error.norm(dim=1))
    directions = torch.nn.functional.normalize(noise, dim=1)
    covariance = directions.T @ directions / 4000  # of uniform directions, 1 / 8 on the diagonal
    torch.testing.assert_close(covariance, torch.eye(8).double() / 8, rtol=0, atol=0.01)
    cosine = (directions * torch.nn.functional.normalize(error, dim=1)).sum(dim=1)
    assert abs(float(cosine.mean())) < 5 / (8 * 4000) ** 0.5


def test_noise_does_not_depend_on_the_batch() -> None:
    policy, rows = tiny_policy(), []
    saes = [PlacedSae("s", _random(), 0, "mask")]
    for size in (2, 20):
        insertion = dataclasses.replace(MATCHING, control="gaussian")
        [row] = evaluate(policy, _batches(policy, size), saes, insertion, {}, seed=3)
        rows.append(row)
    assert rows[0]["delta_mask"] == pytest.approx(rows[1]["delta_mask"], rel=1e-9)
    [other] = evaluate(policy, _batches(policy), saes, insertion, {}, seed=4)
    assert other["delta_mask"] != pytest.approx(rows[0]["delta_mask"], rel=1e-3)
    assert other["control"] == "gaussian"
    assert other["fve"] == pytest.approx(rows[0]["fve"])  # of the autoencoder, as without control


# --- principal components -------------------------------------------------------------------

SIZES = torch.tensor([4.0, 3.0, 1.0, 0.5], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def _known() -> Tensor:
    """Rows of a known mean and, along the axes, known sums of squares: 2 SIZES^2."""
    return MEAN + torch.cat([torch.diag(SIZES), -torch.diag(SIZES)])


def _keeps(axes: list[int]) -> TopKSae:
    """Reconstructs these axes of `_known`, and the mean of the others."""
    sae, rows = TopKSae(4, 8, 8).double(), torch.eye(4).double()
    rows = rows * torch.isin(torch.arange(4), torch.tensor(axes)).double()[:, None]
    sae.W_dec.data = torch.cat([rows, -rows])
    sae.W_enc.data, sae.b_dec.data = sae.W_dec.data.T.contiguous(), MEAN.clone()
    return sae


@pytest.mark.parametrize(
    ("axes", "rank"),
    [([], 0), ([3], 1), ([0], 1), ([1], 1), ([0, 3], 2), ([0, 1], 2), ([0, 1, 3], 3)],
)
def test_as_many_components_as_explain_what_the_autoencoder_does(
    axes: list[int], rank: int
) -> None:
    explained, x = Explained(_keeps(axes)), _known()
    for part in x.split(3):
        explained.add(part)
    components, sae = explained.components(), _keeps(axes)
    assert components is not None
    assert components.basis.shape == (4, rank)
    made, error = components.replace(x, x), (sae(x) - x).detach().square().sum()
    torch.testing.assert_close((made - x).square().sum(), error)
    # The axes are in order of their size, and only the last one can be explained in part.
    whole = torch.arange(4) < rank - 1
    torch.testing.assert_close(made[:, whole], x[:, whole])
    torch.testing.assert_close(made[:, rank:], MEAN[rank:].expand(8, -1))


def test_components_stand_in_for_the_autoencoder() -> None:
    policy, sae = tiny_policy(), _random(k=20)
    states = _masked_states(policy, _batches(policy))
    sae.b_dec.data = states.mean(dim=0)
    sae.W_enc.data = 0.05 * sae.W_dec.data.T.contiguous()
    row = _one(policy, sae, control="pca")
    assert row["fve"] > 0.01
    assert row["control_fve"] == pytest.approx(row["fve"])
    centred = states - states.mean(dim=0)
    left = 1 - torch.linalg.svdvals(centred).square().cumsum(0) / centred.square().sum()
    rank = int((1 - left < row["fve"]).sum()) + 1
    assert row["components"] == rank
    axes = torch.linalg.svd(centred).Vh[:rank]
    unexplained = torch.cat([torch.ones(1).double(), left])
    share = (1 - row["fve"] - unexplained[rank]) / (unexplained[rank - 1] - unexplained[rank])
    scaled = axes.clone()
    scaled[-1] *= 1 - share.sqrt()
    same = TopKSae(16, 2 * rank, 2 * rank).double()  # which reconstructs the same
    same.W_dec.data, same.b_dec.data = torch.cat([scaled, -scaled]), states.mean(dim=0)
    same.W_enc.data = torch.cat([axes, -axes]).T.contiguous()
    assert row["delta_mask"] == pytest.approx(_one(policy, same)["delta_mask"])


# --- both autoencoders at once ----------------------------------------------------------------


def _pair(name: str = "a", seed: int = 0) -> list[PlacedSae]:
    return [
        PlacedSae(f"{name}/{kind}", _random(seed=seed + n), 0, kind)  # type: ignore[arg-type]
        for n, kind in enumerate(("unmask", "mask"))
    ]


def test_two_autoencoders_stand_in_each_for_its_own_kind() -> None:
    """After the last block a token depends on nothing but what stands at its own place."""
    policy = tiny_policy(layers=1)
    both = evaluate(policy, _batches(policy), [*_pair(), *_pair("b", 5)], Insertion("both"), {})
    assert [row["sae"] for row in both] == ["a/mask+a/unmask", "b/mask+b/unmask"]
    visible, masked = evaluate(policy, _batches(policy), _pair(), MATCHING, {})
    assert both[0]["positions"] == "both"
    assert both[0]["delta_mask"] == masked["delta_mask"] != 0
    assert both[0]["delta_unmask"] == visible["delta_unmask"] != 0
    assert both[0]["kl_div_with_sae"] == masked["kl_div_with_sae"]
    assert both[0]["ce_loss_score_mean"] == masked["ce_loss_score_mean"]
    assert both[0]["tokens"] == masked["tokens"] + visible["tokens"]
    dead = (masked["dead"] + visible["dead"]) / 2
    assert both[0]["dead"] == pytest.approx(dead)
    cosines = [row["cos"] * row["tokens"] for row in (masked, visible)]
    # Tokens of a document count together: the error is not that of twice as many documents.
    assert both[0]["cos_se"] == pytest.approx(_error_of_pair(policy))
    assert both[0]["cos"] == pytest.approx(sum(cosines) / both[0]["tokens"])


@torch.no_grad()
def _error_of_pair(policy: Policy) -> float:
    """The standard error of the mean cosine, document by document."""
    sums: list[tuple[float, int]] = []
    for batch in _batches(policy):
        x = block_outputs(policy, batch.rows(policy), [0])[0]
        for b in range(len(batch.documents)):
            cosines = []
            for _, sae, _, kind, _ in _pair():
                rows = x[b][batch.selected(kind)[b]]
                cosines += torch.nn.functional.cosine_similarity(rows, sae(rows)).tolist()
            sums.append((sum(cosines), len(cosines)))
    tokens = sum(n for _, n in sums)
    mean = sum(d for d, _ in sums) / tokens
    squares = sum((d - mean * n) ** 2 for d, n in sums)
    return (squares * len(sums) / (len(sums) - 1)) ** 0.5 / tokens  # type: ignore[no-any-return]


@pytest.mark.parametrize("control", ["gaussian", "pca"])
def test_a_pair_has_controls_too(control: str) -> None:
    policy = tiny_policy(layers=1)
    settings: Any = {"control": control}
    [both] = evaluate(policy, _batches(policy), _pair(), Insertion("both", **settings), {})
    insertion = Insertion("matching", **settings)
    visible, masked = evaluate(policy, _batches(policy), _pair(), insertion, {})
    assert both["delta_mask"] == pytest.approx(masked["delta_mask"])
    assert both["delta_unmask"] == pytest.approx(visible["delta_unmask"])
    if control == "pca":
        assert both["components_mask"] == masked["components"]
        assert both["components_unmask"] == visible["components"]


@pytest.mark.parametrize("left", [[0], [1], [0, 1, 1]])
def test_an_autoencoder_without_a_partner_is_refused(left: list[int]) -> None:
    policy, pair = tiny_policy(), _pair()
    with pytest.raises(UsageError, match=r"--scope both takes .* \((un)?mask\)"):
        evaluate(policy, [], [pair[n] for n in left], Insertion("both"), {})


# --- first tokens, blocks, parts ----------------------------------------------------------------


def test_the_first_token_can_be_left_as_it_is() -> None:
    policy = tiny_policy()
    view = seen(policy, _batches(policy)[0])
    for where in ("all", "unmask", "mask"):
        every, kept = (view.spliced(where, keep_first=k) for k in (False, True))  # type: ignore[arg-type]
        assert bool(every[:, 0].all()) == (where != "mask")  # which is never masked
        assert not bool(kept[:, 0].any())
        assert torch.equal(every[:, 1:], kept[:, 1:])
        assert not bool((every & ~view.batch.valid).any())
    rows = [_one(policy, _random(), "unmask", keep_first=keep) for keep in (False, True)]
    assert rows[0]["delta_mask"] != rows[1]["delta_mask"]
    assert [row["keep_first"] for row in rows] == [False, True]
    # The mean that stands in is that of the tokens at which it does.
    assert rows[0]["ce_loss_with_ablation_mean"] != rows[1]["ce_loss_with_ablation_mean"]


def test_a_block_causal_model_has_first_tokens_in_both_copies() -> None:
    policy = dataclasses.replace(tiny_policy(), blocks=Blocks(4))
    batch = _batches(policy)[0]
    view, width = seen(policy, batch), batch.ids.shape[1]
    every, kept = (view.spliced("all", keep_first=k) for k in (False, True))
    assert (every & ~kept).nonzero()[:, 1].unique().tolist() == [0, width]
    assert len(view.keys[view.there].unique()) == int(view.there.sum())
    # In a batch of its own the copy of a shorter text begins at another column.
    [alone] = _batches(policy, count=1)
    for column, there in enumerate(alone.valid[0].tolist()):
        mine = seen(policy, alone).keys[0, [column, alone.ids.shape[1] + column]]
        assert not there or torch.equal(mine, view.keys[0, [column, width + column]])
    row = _one(policy, _random(), "mask")
    assert row["tokens"] == sum(int(b.masked.sum()) for b in _batches(policy))
    assert row["delta_mask"] != 0


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sae = tiny_policy(), _random()
    wanted = _one(policy, sae, control="gaussian")
    x = _masked_states(policy, _batches(policy))
    codes, made = sae.encode(x), reconstruct(sae, x)
    monkeypatch.setattr("dlmctl.sae.chunks.NUMBERS", 3 * sae.d_sae)
    parts = list(encode_chunks(sae, x))
    assert {len(part) for part, _ in parts[:-1]} == {3}
    together_again = join_codes([code for _, code in parts])
    torch.testing.assert_close(together_again.dense(40), codes.dense(40))
    torch.testing.assert_close(reconstruct(sae, x), made)
    for name, value in _one(policy, sae, control="gaussian").items():
        close = isinstance(value, float)
        assert value == (pytest.approx(wanted[name], abs=1e-9) if close else wanted[name])


def test_codes_of_several_widths_are_joined() -> None:
    first = Codes(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 1]]))
    second = Codes(torch.tensor([[4.0]]), torch.tensor([[2]]))
    wanted = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 4.0, 0.0]])
    assert torch.equal(join_codes([first, second]).dense(4), wanted)


def test_without_ablation_or_components_no_sample_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, passes = tiny_policy(), []
    monkeypatch.setattr(type(policy), "hidden_of", lambda *_: passes.append(1))
    for settings in ({"ablate": False}, {"insert": False}):
        insertion = dataclasses.replace(MATCHING, **settings)  # type: ignore[arg-type]
        Evaluation(policy, [PlacedSae("s", _random(), 0, "mask")], insertion).prepare(
            _batches(policy)
        )
    assert not passes


# --- the sample -------------------------------------------------------------------------------


def test_the_sample_is_the_first_documents_whatever_the_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dlmctl.sae.evaluation.controls.SAMPLE", 5)
    policy, placed, rows = tiny_policy(layers=1), [PlacedSae("s", _random(), 0, "mask")], []
    for size in (1, 3, 20):
        batches = _batches(policy, size)
        first, every = sampled(iter(batches))
        numbers = {d.number for batch in first for d in batch.documents}
        assert numbers >= set(range(5))
        assert (size < 20) == (len(numbers) < 20)
        assert [*every] == batches
        insertion = dataclasses.replace(MATCHING, control="pca")
        rows += evaluate(policy, batches, placed, insertion, {})
    for row in rows[1:]:
        assert row["components"] == rows[0]["components"]
        for name in ("ce_loss_with_ablation_mean", "delta_mask", "control_fve"):
            assert row[name] == pytest.approx(rows[0][name])
    [whole] = evaluate(policy, _batches(policy)[:1], placed, MATCHING, {})
    assert whole["ce_loss_with_ablation_mean"] != rows[0]["ce_loss_with_ablation_mean"]


@pytest.mark.parametrize("settings", [{"ablate": True}, {"control": "pca", "ablate": False}])
def test_a_sample_without_a_token_of_the_kind_is_an_error(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlmctl.sae.evaluation.controls.SAMPLE", 0)
    with pytest.raises(DataError, match="texts have no token at positions mask"):
        _one(tiny_policy(), _random(), **settings)


@pytest.mark.parametrize("settings", [{"scope": "both"}, {"control": "pca"}])
def test_controls_of_the_same_model_are_the_same_before_and_after(settings: Any) -> None:
    policy, insertion = tiny_policy(), dataclasses.replace(MATCHING, **settings)
    rows = stability(policy, policy, _batches(policy), _pair(), insertion, {}, _pair("b"), seed=1)
    assert len(rows) == (1 if "scope" in settings else 2)
    for row in rows:
        for name, value in row.items():
            if name.startswith("base_"):
                assert row[f"tuned_{name.removeprefix('base_')}"] == value
        assert (row["jaccard"], row["jaccard_se"]) == (1.0, 0.0)
        assert "matched" in row
