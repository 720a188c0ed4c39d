"""Checkpoints as their authors publish them, against what the authors' own code computes.

`published/NAME` has a config.json with the fields of the published one and the sizes of a very
small model, its weights under the authors' names, and what their code computed with them in an
older transformers: logits for rows with masked tokens, and greedy completions of their own sampler.

How a directory was made: the authors' modeling code was imported, the model built in float32 with
two layers, 16 dimensions, 64 tokens of which 60 is the mask, and four experts of which a token
takes two; every weight was drawn from N(0, 0.25), those of queries and keys from N(0, 1), those of
norms from N(1, 0.25), and the row of the output head for the mask token set to 0, so that it is
never predicted; then the state_dict was saved, and the logits written down with six decimals.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.architecture import recognised_family
from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_original, save_policy
from dlmctl.models.tokenizers import character_tokenizer

PUBLISHED = Path(__file__).parent / "published"
NAMES = sorted(directory.name for directory in PUBLISHED.iterdir())
MASK = 60


class Published:
    """A published model, loaded, and what its authors' code computes."""

    def __init__(self, name, place):
        self.source = PUBLISHED / name
        self.config = json.loads((self.source / "config.json").read_text())
        self.expected = json.loads((self.source / "reference.json").read_text())
        for file in ("config.json", "model.safetensors"):
            (place / file).write_bytes((self.source / file).read_bytes())
        character_tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 61)))).save_pretrained(place)
        reading = self.expected.get("reading", f"mask_id={MASK}")
        self.policy = load_policy(f"{place},{reading}".rstrip(","), "cpu")

    @property
    def ids(self):
        return torch.tensor(self.expected["ids"])


@pytest.fixture(params=NAMES)
def published(request, tmp_path):
    return Published(request.param, tmp_path)


def logits(policy, ids):
    """Logits [B, T, V] of the tokens themselves, whatever the shift."""
    rows, positions = torch.ones_like(ids).nonzero(as_tuple=True)
    with torch.no_grad():
        return policy.predict(ids, None, rows, positions).view(*ids.shape, -1)


def test_its_family_and_conventions_are_recognised(published):
    policy, expected = published.policy, published.expected
    assert (policy.family, policy.shift) == (expected["family"], expected["shift"])
    assert policy.mask_id == MASK
    assert not policy.model.config.is_causal


def test_its_logits_are_those_of_the_authors_code(published):
    policy, expected = published.policy, torch.tensor(published.expected["logits"])
    if policy.shift:
        expected = torch.cat([expected[:, :1], expected[:, :-1]], dim=1)
    error = (logits(policy, published.ids) - expected).abs().max()
    assert float(error) < 1e-5 * float(expected.abs().max())


def test_its_greedy_completions_are_those_of_the_authors_sampler(published):
    for wanted in published.expected["samples"]:
        settings = SamplerConfig(**wanted["settings"])
        [completion] = sample(published.policy, [wanted["prompt"]], [0], settings)
        assert completion.tokens == wanted["completion"]


def test_saved_in_the_authors_naming_it_has_their_weights(published, tmp_path):
    policy = published.policy
    if not recognised_family(published.config).own_config:
        pytest.skip("its authors publish a stock model")
    save_original(policy, tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    wanted = load_file(published.source / "model.safetensors")
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    special = {f"{token}_token_id" for token in ("bos", "eos", "pad", "mask")} | {"block_length"}
    shared = (fields.keys() & published.config.keys()) - special
    assert {name: fields[name] for name in shared} == {n: published.config[n] for n in shared}
    again = load_policy(str(tmp_path / "again"), "cpu")
    assert again.family == policy.family
    assert torch.equal(logits(again, published.ids), logits(policy, published.ids))


def test_saved_and_loaded_it_computes_the_same(published, tmp_path):
    save_policy(published.policy, tmp_path / "again")
    again = load_policy(str(tmp_path / "again"), "cpu")
    assert (again.family, again.shift) == (published.policy.family, published.policy.shift)
    ids = published.ids
    assert torch.equal(logits(again, ids), logits(published.policy, ids))
