"""How much a step along a feature raises the probability of a value's words (measure `output`).

A feature that responds to a value need not cause it: features chosen by what they respond to steer
worse than those chosen by what they do (Arad et al. 2025, arXiv 2505.20063). Here the effect is
measured where labelled texts have a word of the concept: at masked tokens for a diffusion model, at
the next token for an autoregressive one. With q_i(v) the probability at place i of the words of
value v (`value_words`), and the step of `rollout --steer` at every position of the pass,

    H' = H + amplitude * max_j z_j(H) * W_dec_f

    effect(f, v) = mean_i [q_i(v) after the step - q_i(v) before],

over the places i whose token is a word of v's concept, of whichever value. Arad et al. take words
from the feature's own effect on the logits, and one neutral sentence.

1. The effect of all features is estimated to first order, for the logarithm, which has a slope
   where a probability is near 0 too:

       d/d amplitude sum_i log q_i(v) = [sum_t max_j z_j(H_t) d(sum_i log q_i(v)) / dH_t] . W_dec_f

2. The features with the largest estimates are measured on the texts of even numbers, together with
   the feature whose AUROC is highest there. Each pass measures one feature for all values.
3. The best feature is measured on the texts of odd numbers, with a standard error over texts.

Compared with the autoencoder are as many random directions, and the difference of the mean
activations with a value and without it (`means`, one direction for each value), both of length 1
and with the autoencoder's max_j z_j.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.fused_linear_logprob import rows_per_chunk, wide
from dlmctl.models.blocks import Edit, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.sae.chunks import encoded
from dlmctl.sae.corpus import Positions
from dlmctl.sae.evaluation.halves import Names
from dlmctl.sae.evaluation.sentences import LabelledBatch
from dlmctl.sae.topk import TopKSae


class WordPlaces(NamedTuple):
    """Where the B texts of a batch have words that the model is to predict: P places."""

    part: LabelledBatch
    row: Tensor
    """int64 [P]."""
    column: Tensor
    """int64 [P]."""
    counts: Tensor
    """bool [P, V]: the token is a word of the concept of this value."""


class Texts(NamedTuple):
    """Half of the texts, with P places in all."""

    batches: list[WordPlaces]
    counts: Tensor
    """bool [P, V], on the CPU."""
    document: Tensor
    """int64 [P], on the CPU."""


def word_places(
    policy: Policy,
    batches: Sequence[LabelledBatch],
    names: Names,
    concept_words: Mapping[str, set[int]],
) -> Texts:
    """The places of words in texts.

    Args:
        concept_words: the words of all values of a concept.

    Raises:
        DataError: a concept has no place.
    """
    kind: Positions = "mask" if policy.diffusion else "all"
    parts, documents = [], []
    for part in batches:
        ids = part.batch.ids.cpu()
        of_concept = torch.stack(
            [torch.isin(ids, torch.tensor(sorted(concept_words[c]))) for c, _ in names], dim=-1
        )  # [B, T, V]
        predicted = part.batch.selected(kind).cpu() & (part.sentence >= 0)
        row, column = (predicted & of_concept.any(dim=-1)).nonzero(as_tuple=True)
        parts.append(WordPlaces(part, row, column, of_concept[row, column]))
        documents.append(torch.tensor([d.number for d in part.batch.documents])[row])
    counts = torch.cat([part.counts for part in parts])
    for number, (concept, _) in enumerate(names):
        if not counts[:, number].any():
            raise DataError(
                f"no word of concept '{concept}' is to be predicted in half of the texts: give "
                "more texts, or a higher --t"
            )
    return Texts(parts, counts, torch.cat(documents))


def log_masses(policy: Policy, states: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """log q, [N, V]: the probability of the words of each value, at hidden states [N, H]."""
    logs = wide(policy.logits(states)).log_softmax(dim=-1)
    return torch.stack([logs[:, list(tokens)].logsumexp(dim=-1) for tokens in words], dim=1)


@torch.no_grad()
def probabilities(
    policy: Policy,
    texts: Texts,
    words: Sequence[Sequence[int]],
    edits: dict[int, Edit] | None = None,
) -> Tensor:
    """q, float64 [P, V] on the CPU, in passes with these blocks edited."""
    parts = []
    for places in texts.batches:
        with edited_blocks(policy, edits) if edits else contextlib.nullcontext():
            states = _predicting(policy, places)
        for chunk in states.split(rows_per_chunk(policy.vocab_size)):
            parts.append(log_masses(policy, chunk, words).double().exp().cpu())
    return torch.cat(parts)


def step(sae: TopKSae, direction: Tensor, amplitude: float) -> Edit:
    """The edit that takes a step along a direction [d] at every position."""

    def edit(output: Tensor, ids: Tensor) -> Tensor:
        where = ids >= 0
        before = output[where].to(direction.dtype)  # [N, d]
        lengths = amplitude * encoded(sae, before).values.amax(dim=1)
        after = before + lengths[:, None] * direction
        return output.index_put((where,), after.to(output.dtype))

    return edit


def slopes(
    policy: Policy, sae: TopKSae, layer: int, texts: Texts, words: Sequence[Sequence[int]]
) -> Tensor:
    """float64 [V, d]: its product with a direction is d/d amplitude of sum_i log q_i(v)."""
    total = torch.zeros(len(words), sae.d_in, dtype=torch.float64, device=policy.device)
    for places in texts.batches:
        if not len(places.row):
            continue
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(output: Tensor, ids: Tensor, kept: list[tuple[Tensor, Tensor]] = kept) -> Tensor:
            leaf = output.detach().requires_grad_()
            kept.append((leaf, ids >= 0))
            return leaf

        with torch.enable_grad(), edited_blocks(policy, {layer: keep}):
            states = _predicting(policy, places)
        [(leaf, where)] = kept
        lengths = encoded(sae, leaf.detach()[where].to(sae.W_enc.dtype)).values.amax(dim=1)
        for number, upstream in enumerate(_state_gradients(policy, places, states, words)):
            [gradient] = torch.autograd.grad(states, leaf, upstream, retain_graph=True)
            total[number] += lengths.double() @ gradient[where].double()
    return total


def _predicting(policy: Policy, places: WordPlaces) -> Tensor:
    """The hidden states that predict the tokens at these places, [P, H]."""
    batch = places.part.batch
    rows = batch.rows(policy)
    row, column = places.row.to(policy.device), places.column.to(policy.device)
    return policy.hidden_of(rows)[row, rows.sources(row, column, policy.shift)]


def _state_gradients(
    policy: Policy, places: WordPlaces, states: Tensor, words: Sequence[Sequence[int]]
) -> Iterator[Tensor]:
    """For each value the gradient of sum_i log q_i(v) by the hidden states, [P, H]."""
    counts = places.counts.to(policy.device)
    size = rows_per_chunk(policy.vocab_size)
    parts: list[list[Tensor]] = [[] for _ in words]
    for start in range(0, len(states), size):
        chunk = states[start : start + size].detach().requires_grad_()
        with torch.enable_grad():
            sums = (log_masses(policy, chunk, words) * counts[start : start + size]).sum(dim=0)
        for of_value, one in zip(parts, sums, strict=True):
            of_value += torch.autograd.grad(one, chunk, retain_graph=True)
    return (torch.cat(of_value) for of_value in parts)
