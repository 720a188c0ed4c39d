"""Vision-language policies: loading, placeholders, slices of pixels, sampling and scoring."""

from __future__ import annotations

import pytest
import torch
from conftest import noise_image, tiny_vision_policy
from safetensors.torch import load_file, save_file

from dlmctl.diffusion.corrupted import with_corrupted_images
from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import load_policy, reload_policy
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import Sampler

KINDS = ["qwen2.5-vl", "qwen3-vl", "llava"]
RECORDS = [
    {"id": "one", "prompt": "<image>12?", "images": [noise_image(1)]},
    {
        "id": "two",
        "prompt": "3<image>4<image>?",
        "images": [noise_image(2), noise_image(3, 112, 56)],
    },
    {"id": "none", "prompt": "12=1=2?"},
    {"id": "unmarked", "prompt": "1?", "images": [noise_image(4, 56, 84)]},
]


@pytest.fixture(scope="module", params=KINDS)
def policy(request) -> Policy:
    return tiny_vision_policy(request.param)


def records() -> list[Record]:
    return [Record(record) for record in RECORDS]


def sampled(policy: Policy, batch_size: int, temperature: float = 1.0) -> list[Record]:
    settings = configured(policy, Sampler(temperature=temperature))
    return list(rollout(records(), policy, settings, 2, 0, batch_size))


def test_a_saved_model_is_loaded_and_is_the_same(policy, tmp_path):
    save_policy(policy, tmp_path)
    loaded = load_policy(str(tmp_path))
    loaded.model.double()
    assert (loaded.family, loaded.vision.kind) == ("vlm", policy.vision.kind)
    examples = [example_of(record, policy, MaskPlan()) for record in sampled(policy, 8)]
    again = [example_of(record, loaded, MaskPlan()) for record in sampled(loaded, 8)]
    assert [e.completion for e in examples] == [e.completion for e in again]
    # Weights went through float32.
    assert torch.allclose(log_probs(policy, examples, 8), log_probs(loaded, again, 8), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_newer_weights_are_copied_into_the_tensors_that_are_there(kind, tmp_path):
    """Whatever their names on disk, which for two of the three are others than in the model."""
    save_policy(tiny_vision_policy(kind, seed=1), tmp_path / "old")
    save_policy(tiny_vision_policy(kind, seed=2), tmp_path / "new")
    loaded = load_policy(str(tmp_path / "old"))
    places = {name: p.data_ptr() for name, p in loaded.model.named_parameters()}
    newer = reload_policy(loaded, str(tmp_path / "new"), "cpu", "auto")
    fresh = load_policy(str(tmp_path / "new"))
    assert newer.revision == fresh.revision != loaded.revision
    wanted = fresh.model.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in newer.model.state_dict().items())
    assert {name: p.data_ptr() for name, p in newer.model.named_parameters()} == places


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
def test_places_are_those_of_transformers_for_each_row(kind, left):
    """With padding on either side, a hole, rows alike, grids turned over, and rows of text."""
    policy = tiny_vision_policy(kind)
    twin = {"prompt": "<image>12?", "images": [noise_image(1)]}
    turned = [noise_image(2, 112, 56), noise_image(3, 56, 112)]
    rows = [*RECORDS, twin, *({"prompt": "<image>1?", "images": [image]} for image in turned)]
    prompts, pictures = [policy.encode(r) for r in rows], [policy.pictures(r) for r in rows]
    width = max(map(len, prompts)) + 3
    ids = torch.full((len(rows), width), policy.pad_id)
    there = torch.zeros_like(ids)
    for n, prompt in enumerate(prompts):
        begin = width - len(prompt) if left else 0
        ids[n, begin : begin + len(prompt)] = torch.tensor(prompt)
        there[n, begin : begin + len(prompt)] = 1
        there[n, begin + len(prompt) - 2] = 0
    wanted, _ = policy.core.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == policy.vision.image_id).int(),
        image_grid_thw=torch.tensor([p.grid for row in pictures for p in row]),
        attention_mask=there,
    )
    asked = []
    rope_index = policy.core.model.get_rope_index
    policy.core.model.get_rope_index = lambda given, **more: (
        asked.append(len(given)) or rope_index(given, **more)
    )
    made = policy.vision.places(policy.core, ids, there, pictures)
    assert torch.equal(made[:, there.bool()], wanted[:, there.bool()])
    # One row of text is not asked about, and two are alike.
    assert asked == [len(rows) - 2]


def test_names_of_the_hub_are_loaded(tmp_path):
    """Released checkpoints of Qwen2.5-VL and LLaVA have other names than the modules have now."""
    policy = tiny_vision_policy("llava")
    save_policy(policy, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    now = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head"): tensor
        for name, tensor in weights.items()
    }  # fmt: skip
    assert now.keys() != weights.keys()
    save_file(now, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_policy(str(tmp_path))
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.float()), name


def test_each_image_has_its_placeholders(policy):
    for record in records():
        ids, pictures = policy.encode(record), policy.pictures(record)
        count = sum(i == policy.vision.image_id for i in ids)
        assert count == sum(picture.tokens for picture in pictures)
    text = policy.tokenizer.decode(policy.encode(RECORDS[1]))
    assert text.index("3") < text.index(policy.tokenizer.decode([policy.vision.image_id]))


def test_a_sample_depends_on_its_image_and_on_no_neighbour(policy):
    together = sampled(policy, 8)
    assert [r["tokens"] for r in together] == [r["tokens"] for r in sampled(policy, 1)]
    other = Record(RECORDS[0], images=[noise_image(9)])
    settings = configured(policy, Sampler(temperature=1.0))
    changed = list(rollout([other], policy, settings, 2, 0, 8))
    assert [r["tokens"] for r in changed] != [r["tokens"] for r in together[:2]]
    assert changed[0]["rollout"]["images"] != together[0]["rollout"]["images"]
    assert "images" not in together[4]["rollout"]


def test_greedy_sampling_with_a_cache_is_the_argmax_of_the_whole_sequence(policy):
    banned = list(policy.vision.banned)
    for record in sampled(policy, 3, temperature=0.0)[::2]:
        prompt, completion = record["tokens"]["prompt"], record["tokens"]["completion"]
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            states = policy.hidden(ids, None, pictures=[policy.pictures(record)])[0]
            scores = policy.logits(states[len(prompt) - 1 : -1])
        scores[:, banned] = -torch.inf
        assert scores.argmax(1).tolist() == completion


def test_scores_depend_on_no_neighbour(policy):
    examples = [example_of(record, policy, MaskPlan()) for record in sampled(policy, 8)]
    together = log_probs(policy, examples, 8)
    for n, example in enumerate(examples):
        alone = log_probs(policy, [example], 1)[0]
        assert torch.allclose(together[n, :, : alone.shape[1]], alone, atol=1e-9)


def test_an_image_that_rows_share_is_looked_at_once_with_the_same_result(policy, monkeypatch):
    shared, other = policy.pictures(RECORDS[1]), policy.pictures(RECORDS[0])
    rows = [shared, other, shared]
    ids = policy.encode(RECORDS[1]), policy.encode(RECORDS[0]), policy.encode(RECORDS[1])
    width = max(map(len, ids))
    batch = torch.tensor([row + [policy.pad_id] * (width - len(row)) for row in ids])
    attention = torch.arange(width) < torch.tensor([[len(row)] for row in ids])
    looked = []
    features = policy.core.model.get_image_features

    def counted(*given, **named):
        looked.append(len(named["pixel_values"]))
        return features(*given, **named)

    def states(pictures):
        policy.model.zero_grad()
        found = policy.hidden(batch, attention, pictures=pictures)[attention]
        found.square().sum().backward()
        gradients = [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]
        return found.detach(), gradients

    monkeypatch.setattr(policy.core.model, "get_image_features", counted)
    once, gradients = states(rows)
    seen_once = looked.copy()
    monkeypatch.setattr(policy.core.model, "get_image_features", features)
    copies = [[p._replace(pixels=p.pixels.clone()) for p in row] for row in rows]
    apart, expected = states(copies)
    total = sum(len(p.pixels) for row in rows for p in row)
    assert seen_once == [total - sum(len(p.pixels) for p in shared)]
    assert torch.allclose(once, apart, atol=1e-9)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-7)


def test_placeholders_are_never_sampled(policy):
    """A head that wants nothing else must still not get one."""
    weight = policy.model.get_output_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        for banned in policy.vision.banned:
            weight[banned] = 50 * kept.abs().mean() * torch.sign(kept[banned])
    try:
        tokens = {t for record in sampled(policy, 8) for t in record["tokens"]["completion"]}
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not tokens & set(policy.vision.banned)


def test_what_does_not_fit_is_refused(policy):
    one_more = {**RECORDS[1], "prompt": "3<image>?"}
    assert policy.encode(one_more) == policy.encode({**one_more, "prompt": "<image>3<image>?"})
    with pytest.raises(DataError, match="2 places for images, and the record 1 images"):
        policy.encode({**RECORDS[0], "prompt": "<image><image>?"})
    changed = {**sampled(policy, 8)[0], "images": [noise_image(8)]}
    with pytest.raises(DataError, match="not those that the completion was sampled with"):
        example_of(Record(changed), policy, MaskPlan())


def test_what_was_sampled_with_corrupted_images_is_not_trained_on_with_whole_ones(policy):
    blind = with_corrupted_images(policy, "blank", 0.6, 0)
    made = sampled(blind, 8)
    assert [r["tokens"] for r in made[:4]] != [r["tokens"] for r in sampled(policy, 8)[:4]]
    same = rollout(
        [Record(RECORDS[0], images=[noise_image(9)])],
        blind,
        configured(blind, Sampler(temperature=1.0)),
        2,
        0,
        8,
    )
    # Nothing is to be seen, so that another image gives the same.
    assert [r["tokens"] for r in same] == [r["tokens"] for r in made[:2]]
    example_of(made[0], blind, MaskPlan())
    with pytest.raises(DataError, match="not those that the completion was sampled with"):
        example_of(made[0], policy, MaskPlan())


def test_without_images_prompts_are_those_of_text_alone(policy):
    hidden = with_corrupted_images(policy, "no-image", 0.6, 0)
    made = sampled(hidden, 8)
    plain = [
        {**r, "prompt": str(r["prompt"]).replace("<image>", ""), "images": []} for r in RECORDS
    ]
    assert [r["tokens"]["prompt"] for r in made[::2]] == [policy.encode(r) for r in plain]
    settings = configured(policy, Sampler(temperature=1.0))
    blind = rollout([Record(record) for record in plain], policy, settings, 2, 0, 8)
    assert [r["tokens"] for r in made] == [r["tokens"] for r in blind]
    # What rollout wrote can be read again, and is not taken for what was seen.
    assert hidden.encode(sampled(policy, 8)[0]) == policy.encode(plain[0])
    with pytest.raises(DataError, match="not those that the completion was sampled with"):
        example_of(made[0], policy, MaskPlan())


def test_a_model_of_text_takes_no_images(saved_models):
    policy = load_policy(saved_models("ar"))
    with pytest.raises(DataError, match="takes none"):
        policy.encode({"prompt": "12", "images": [noise_image(1)]})
    with pytest.raises(UsageError, match="takes none"):
        with_corrupted_images(policy, "blank", 0.6, 0)


def test_an_aspect_ratio_that_the_model_refuses_is_one_line():
    policy = tiny_vision_policy("qwen2.5-vl")
    with pytest.raises(DataError, match="aspect ratio"):
        policy.encode({"prompt": "<image>1", "images": [noise_image(1, 900, 4)]})


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "1<image>2"},
        {"messages": [{"role": "user", "content": "1<image>2"}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "1"},
                        {"type": "image"},
                        {"type": "text", "text": "2"},
                    ],
                }
            ]
        },
    ],
)
def test_a_chat_template_gets_parts(prompt):
    policy = tiny_vision_policy("qwen2.5-vl", alphabet="12<>user")
    policy.tokenizer.chat_template = TEMPLATE
    ids = policy.encode({**prompt, "images": [noise_image(1)]})
    pads = "<|image_pad|>" * 9
    assert policy.tokenizer.decode(ids) == f"<user>1<|vision_start|>{pads}<|vision_end|>2"


def test_images_without_marks_come_first():
    policy = tiny_vision_policy("llava", alphabet="12")
    ids = policy.encode({"prompt": "12", "images": [noise_image(1)]})
    assert ids == [policy.vision.image_id] * 36 + policy.encode_text("12")
