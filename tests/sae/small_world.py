"""A small corpus, an autoencoder of random weights, and what it does, written out in full."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from conftest import tiny_policy

from dlmctl.models.blocks import block_outputs
from dlmctl.models.policy import Policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import word_tokenizer
from dlmctl.records.jsonl import Record
from dlmctl.sae.corpus import Document, MaskLaw, Positions, documents, masked_corpus
from dlmctl.sae.features.code_batch import CodeBatch, code_batches
from dlmctl.sae.topk import TopKSae
from dlmctl.settings.small import SmallModel
from dlmctl.tasks.sources import prompts

LAYER = 1
LATENTS = 40


def random_sae(width: int = 16, latents: int = LATENTS, k: int = 3) -> TopKSae:
    sae = TopKSae(width, latents, k)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


class Sight(NamedTuple):
    """A document as it was seen, by itself."""

    document: Document
    level: float
    hidden: list[bool]
    looked_at: list[bool]
    codes: list[list[float]]
    """[T, F], all 0 on tokens that are not looked at."""


class World(NamedTuple):
    policy: Policy
    sae: TopKSae
    records: list[Record]
    law: MaskLaw

    def stream(
        self, positions: Positions, batch_size: int, latents: tuple[int, ...] | None = None
    ) -> Iterator[CodeBatch]:
        wanted = torch.tensor(range(LATENTS) if latents is None else latents)
        batches = masked_corpus(self.documents(), self.policy, self.law, batch_size)
        return code_batches(batches, self.policy, LAYER, self.sae, positions, wanted)

    def documents(self) -> Iterator[Document]:
        return documents(self.records, self.policy, 24)

    @torch.no_grad()
    def sights(self, positions: Positions) -> list[Sight]:
        """One document after the other, dense codes by sorting."""
        made = []
        for document in self.documents():
            [batch] = masked_corpus([document], self.policy, self.law, 1)
            batch = batch.clean() if positions == "clean" else batch
            x = block_outputs(self.policy, batch.rows(self.policy), [LAYER])[LAYER][0].float()
            pre = (x - self.sae.b_dec) @ self.sae.W_enc + self.sae.b_enc
            least = pre.sort(dim=1, descending=True).values[:, self.sae.k - 1 : self.sae.k]
            chosen = batch.selected(positions)[0]
            codes = pre.relu() * (pre >= least) * chosen[:, None]
            level, hidden = float(batch.level), batch.masked[0].tolist()
            made.append(Sight(document, level, hidden, chosen.tolist(), codes.tolist()))
        return made


@functools.cache
def small_world() -> World:
    """Sixty texts of digits, some of them samples of one prompt."""
    generator = torch.Generator().manual_seed(7)
    records = []
    for number in range(60):
        size = int(torch.randint(5, 30, (1,), generator=generator))
        digits = torch.randint(0, 5, (size,), generator=generator).tolist()
        fields: dict[str, Any] = {"id": f"text/{number}", "text": "".join(map(str, digits))}
        records.append(Record(fields | ({"sample": 0} if number < 20 else {})))
    world = World(tiny_policy(), random_sae(), records, MaskLaw(0.1, 0.9, seed=3))
    _centre(world)
    return world


@torch.no_grad()
def _centre(world: World) -> None:
    """Without this the mean of the activations decides, and most features are dead."""
    [batch] = masked_corpus(world.documents(), world.policy, world.law, 60)
    states = block_outputs(world.policy, batch.rows(world.policy), [LAYER])[LAYER]
    world.sae.b_dec.copy_(states[batch.valid].mean(dim=0))
    world.sae.b_enc.zero_()


def word_policy() -> Policy:
    """A small model whose tokens are the words of task concepts."""
    texts = [t for r in prompts("concepts", limit=300) for t in (r["prompt"], r["completion"])]
    return make_policy(SmallModel("llada", 16, 2, 2), word_tokenizer(texts))
