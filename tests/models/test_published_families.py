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
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.architecture import architecture, recognised_family
from dlmctl.models.attention import Blocks
from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_original, save_policy
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.records.errors import DataError, UnavailableError
from dlmctl.settings.models import Reading
from dlmctl.settings.optimizer import Adapter
from dlmctl.train.lora import add_adapter

PUBLISHED = Path(__file__).parent / "published"
NAMES = sorted(directory.name for directory in PUBLISHED.iterdir())
MASK = 60


class Published:
    """A published model, loaded, and what its authors' code computes."""

    def __init__(self, name, place, reading=None, **fields):
        self.source = PUBLISHED / name
        self.config = json.loads((self.source / "config.json").read_text()) | fields
        self.expected = json.loads((self.source / "reference.json").read_text())
        (place / "config.json").write_text(json.dumps(self.config))
        shutil.copy(self.source / "model.safetensors", place)
        character_tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 61)))).save_pretrained(place)
        reading = reading or self.expected.get("reading", f"mask_id={MASK}")
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
    if recognised_family(published.config).name in ("a2d", "ar"):
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


def test_a_family_that_is_named_renames_the_weights(tmp_path):
    names = {"architectures": ["GPT2LMHeadModel"]}
    published = Published("diffugpt", tmp_path, f"family=diffugpt,mask_id={MASK}", **names)
    test_its_logits_are_those_of_the_authors_code(published)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mdlm", "it is MDLM: its layer norms"),
        ("bd3lm", "it is BD3-LM"),
        ("DUO", "it is Duo"),
        ("llava_llada", "LLaDA-V or LaViDa: .* images are not supported"),
        ("llava_dream", "LaViDa-Dream"),
        ("mmada", "it is MMaDA"),
        ("diffusion_gemma", "DiffusionGemma, .* no mask token"),
    ],
)
def test_published_models_that_are_not_loaded_are_named(kind, message):
    for reading in Reading(), Reading("llada", mask_id=2):
        with pytest.raises(DataError, match=message):
            architecture({"model_type": kind}, "config.json", reading)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llada-moe", "shared_expert_intermediate_size", 8),
        ("llada-moe", "moe_router_enable_expert_bias", True),
        ("llada-moe", "qk_layernorm", False),
        ("llada2", "score_function", "softmax"),
        ("llada2", "use_bias", True),
        ("llada2", "num_shared_experts", None),
    ],
)
def test_a_mixture_that_is_not_the_stock_one_is_refused(name, field, value):
    config = json.loads((PUBLISHED / name / "config.json").read_text()) | {field: value}
    with pytest.raises(DataError, match=f"{field} = {value} is not"):
        architecture(config, "config.json")


def test_blocks_of_llada2_have_32_tokens_unless_the_name_says_otherwise():
    config = json.loads((PUBLISHED / "llada2" / "config.json").read_text())
    assert architecture(config, "config.json").blocks == Blocks(32, "text")
    assert architecture(config, "config.json", Reading(block_length=8)).blocks == Blocks(8, "text")


def test_llada2_says_which_transformers_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("dlmctl.models.families.llada2.STOCK", "a_type_of_tomorrow")
    with pytest.raises(UnavailableError, match=r"needs transformers 5\.24 or later"):
        Published("llada2", tmp_path)


@pytest.mark.parametrize(
    ("weight", "other", "message"),
    [
        ("mlp.experts.1.up_proj", None, r"experts\.1\.up_proj\.weight is missing"),
        ("mlp.experts.1.up_proj", (8, 15), r"has the shape \[8, 15\], expected \[8, 16\]"),
        ("mlp.experts.4.up_proj", (8, 16), r"experts\.4\.up_proj\.weight belongs to no part"),
    ],
)
def test_an_expert_that_does_not_fit_is_named(tmp_path, weight, other, message):
    published = Published("llada-moe", tmp_path)
    file, name = tmp_path / "model.safetensors", f"model.layers.1.{weight}.weight"
    weights = load_file(file)
    weights.pop(name, None)
    save_file(weights if other is None else weights | {name: torch.zeros(other)}, file)
    with pytest.raises(DataError, match=message):
        load_policy(published.policy.name, "cpu")


def test_lora_of_a_mixture_changes_no_expert_and_no_router(tmp_path):
    pytest.importorskip("peft")
    policy = add_adapter(Published("llada2", tmp_path).policy, Adapter(rank=2))
    changed = {n.partition(".lora_")[0] for n, _ in policy.model.named_parameters() if "lora_" in n}
    assert not any(".experts" in name or name.endswith(".gate") for name in changed)
    assert {name.rpartition(".")[2] for name in changed if ".1." in name} >= {"q_proj", "up_proj"}
