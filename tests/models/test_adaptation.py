"""`init --from`: an autoregressive model is made to see both sides, its weights unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
import tokenizers
import torch
import transformers
from conftest import invoke
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlmctl.diffusion.elbo import token_log_probs
from dlmctl.models.loading import load_policy
from dlmctl.models.sight import left_to_right_blocks
from dlmctl.records.jsonl import read_records

WINDOW = 3
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 1,
    "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.5,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=1,
        bos_token_id=None, pad_token_id=0, initializer_range=0.5,
    ),
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def plain_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """Characters, an end-of-sequence token, and `more` tokens with the highest ids."""
    vocabulary = {t: n for n, t in enumerate(["<pad>", "<eos>", *"0123456789+=,:", *more])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )
    assert made.mask_token is None
    return made


def autoregressive(place: Path, kind: str, *more: str, **saving: Any) -> Path:
    """A small stock checkpoint in bfloat16."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(place, **saving)
    plain_tokenizer(*more).save_pretrained(place)
    return place


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def made(source: Path, *options: str | int) -> Path:
    target = made_already(source)
    result = invoke("init", target, "--from", source, *options)
    assert result.exit_code == 0, result.output
    return target


def made_already(source: Path) -> Path:
    return source.parent / f"{source.name}-a2d"


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_the_stock_model_under_a_mask_that_hides_nothing(tmp_path, kind):
    source = autoregressive(tmp_path / kind, kind, "<unused0>", "<unused1>")
    policy = load_policy(str(made(source)), "cpu", "float32")
    assert (policy.family, policy.shift, policy.eos_id) == ("a2d", 1, 1)
    assert policy.tokenizer.convert_ids_to_tokens(policy.mask_id) == "<unused0>"
    before, after = weights(source), weights(tmp_path / f"{kind}-a2d")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.randint(2, 16, (2, 9), generator=torch.Generator().manual_seed(0))
    places = torch.arange(9)
    everything = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    near = ((places[:, None] - places).abs() <= WINDOW).expand(2, 1, 9, 9)
    mask: Any = near if kind == "mistral" else everything
    if kind == "gemma3":
        mask = {"full_attention": everything, "sliding_attention": near}
    body = getattr(stock, stock.base_model_prefix)
    expected = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(policy.hidden(ids, None), expected)
    # A mask of four dimensions leaves the windows of the layers as they are.
    allowed = torch.ones(2, 9, 9, dtype=torch.bool)
    torch.testing.assert_close(policy.hidden(ids, None, allowed=allowed), expected)
    # Rows of other lengths: the padding is seen by nobody.
    padded = torch.ones(2, 9, dtype=torch.bool)
    padded[1, 7:] = False
    short = policy.hidden(ids[1:, :7], None)
    torch.testing.assert_close(policy.hidden(ids, padded)[1:, :7], short)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_later_token_changes_what_every_block_says_of_earlier_ones(tmp_path, kind):
    source = autoregressive(tmp_path / kind, kind)
    blocks = len(left_to_right_blocks(load_policy(str(source), "cpu", "float32")))
    assert blocks == (2 if kind == "gpt2" else 3)
    policy = load_policy(str(made(source)), "cpu", "float32")
    assert left_to_right_blocks(policy) == []
    ids = torch.tensor([[2, 3, 4, 5]])
    rows, places = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    other = policy.predict(torch.tensor([[2, 3, 4, 6]]), None, rows, places)
    assert not torch.equal(policy.predict(ids, None, rows, places), other)


@pytest.mark.parametrize("kind", CONFIGS)
def test_block_by_block_it_is_the_stock_model_under_a_mask_of_blocks(tmp_path, kind):
    source = autoregressive(tmp_path / kind, kind)
    target = made(source, "--pattern", "block-causal", "--block-length", 2)
    policy = load_policy(str(target), "cpu", "float32")
    assert (policy.family, policy.blocks and policy.blocks.length) == ("bd3lm", 2)
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.randint(2, 16, (2, 9), generator=torch.Generator().manual_seed(0))
    places = torch.arange(9)
    past = places // 2 <= (places // 2)[:, None]
    near = (places[:, None] - places).abs() <= WINDOW
    mask: Any = (past & near if kind == "mistral" else past).expand(2, 1, 9, 9)
    if kind == "gemma3":
        mask = {"full_attention": mask, "sliding_attention": (past & near).expand(2, 1, 9, 9)}
    body = getattr(stock, stock.base_model_prefix)
    expected = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(policy.hidden(ids, None), expected)
    # The sampler reuses keys only if no layer has a window.
    (tmp_path / "p").write_text('{"id": 1, "prompt": "12="}\n')
    arguments = ["-m", target, "-n", 1, "--gen-length", 6, "--raw"]
    plain = invoke("rollout", tmp_path / "p", *arguments)
    assert plain.exit_code == 0, plain.output
    cached = invoke("rollout", tmp_path / "p", *arguments, "--cache", "exact")
    assert (cached.exit_code == 2) == (kind in ("mistral", "gemma3"))
    result = invoke("init", tmp_path / "new", "--from", source, "--pattern", "block-causal")
    assert (result.exit_code, "--block-length" in result.stderr) == (2, True)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_new_mask_token_gets_the_mean_of_the_tokens(tmp_path, kind):
    source = autoregressive(tmp_path / kind, kind, "<a>", "<b>", "<c>", "<d>")  # all 20 rows
    target = made(source, "--shift", 0)
    policy = load_policy(str(target), "cpu", "float32")
    assert (policy.mask_id, policy.vocab_size, policy.shift) == (20, 21, 0)
    assert policy.tokenizer.mask_token == "<|mask|>"
    before, after = weights(source), weights(target)
    grown = {name for name in before if before[name].shape != after[name].shape}
    assert len(grown) == (2 if kind == "llama" else 1)
    for name in before:
        if name in grown:
            mean = before[name].double().mean(dim=0).bfloat16()
            assert torch.equal(after[name], torch.cat([before[name], mean[None]]))
        else:
            assert torch.equal(after[name], before[name])


def test_a_row_that_no_token_had_is_no_word_of_the_source(tmp_path):
    source = autoregressive(tmp_path / "llama", "llama", "<a>")  # 17 tokens for 20 rows
    target = made(source)
    before, after = weights(source), weights(target)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = before[name].clone()
        rows[17] = rows[:17].double().mean(dim=0).bfloat16()
        assert torch.equal(after[name], rows)
    assert load_policy(str(target), "cpu", "float32").mask_id == 17


def test_a_reserved_token_that_was_never_trained_gets_the_mean_too(tmp_path):
    name = "<|reserved_special_token_0|>"
    source = autoregressive(tmp_path / "llama", "llama", "<a>", name, "<b>")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][17] *= 1e-3
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    after = weights(made(source))
    rows = tensors["model.embed_tokens.weight"]
    others = torch.cat([rows[:17], rows[18:19]])
    mean = others.double().mean(dim=0)
    found = after["model.embed_tokens.weight"][17].double()
    torch.testing.assert_close(found, mean, rtol=0.01, atol=1e-3)
    assert torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("more", "options", "token", "number"),
    [
        (["<unused7>", "<mask>"], [], "<mask>", 17),
        (["<unused7>", "<unused0>"], [], "<unused7>", 16),
        (["<|reserved_3|>"], [], "<|reserved_3|>", 16),
        (["<unused7>", "<x>"], ["--mask-token", "<x>"], "<x>", 17),
        (["<unused7>"], ["--mask-token", "[M]"], "[M]", 17),
        (["<used>"], [], "<|mask|>", 17),
    ],
)
def test_which_token_is_the_mask(tmp_path, more, options, token, number):
    policy = load_policy(
        str(made(autoregressive(tmp_path / "llama", "llama", *more), *options)), "cpu", "float32"
    )
    assert (policy.tokenizer.mask_token, policy.mask_id) == (token, number)
    assert policy.encode_text(f"1{token}2") == [3, number, 4]


def test_shards_stay_shards_and_the_rest_of_the_files_is_kept(tmp_path):
    source = autoregressive(tmp_path / "llama", "llama", *"abcd", max_shard_size="2KB")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    target = made(source, "--gen-length", 32, "--steps", 8)
    names = {file.name for file in source.glob("*.safetensors")}
    assert len(names) > 2
    assert {file.name for file in target.glob("*.safetensors")} == names
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(target).values())
    policy = load_policy(str(target), "cpu", "float32")
    assert policy.ends == {1, 3}
    assert policy.sampling == {"gen_length": 32, "steps": 8}
    assert policy.tokenizer.chat_template == TEMPLATE
    # transformers reads it as it is.
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ids = torch.tensor([[2, 3, 4]])
    body = stock.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(body, policy.hidden(ids, None))


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_trains_an_adapter_and_is_merged_with_it(tmp_path, kind):
    source = autoregressive(tmp_path / kind, kind)
    (tmp_path / "data").write_text('{"id": 1, "prompt": "12=", "completion": "345"}\n')
    options = ["--algo", "sft", "--raw", "--lora-rank", 2, "--lr", 0.1, "-m", made(source)]
    done = invoke("update", tmp_path / "data", *options, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    done = invoke("merge", "-m", tmp_path / "run", "-o", tmp_path / "plain", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    adapted, plain = (
        load_policy(str(tmp_path / name), "cpu", "float32") for name in ("run", "plain")
    )
    assert (plain.family, plain.mask_id, plain.shift) == ("a2d", adapted.mask_id, 1)
    ids = torch.tensor([[2, 3, 4, 5]])
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(plain.hidden(ids, None), adapted.hidden(ids, None), **close)
    base = load_policy(str(made_already(source)), "cpu", "float32")
    assert not torch.allclose(plain.hidden(ids, None), base.hidden(ids, None), **close)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_noised_blocks_after_clean_ones_are_read_within_the_windows(tmp_path, kind):
    """The two streams of a pass, compared with a pass over a clean past and one noised block."""
    source = autoregressive(tmp_path / kind, kind)
    target = made(source, "--pattern", "block-causal", "--block-length", 2, "--shift", 0)
    policy = load_policy(str(target), "cpu", "float32")
    prompt, completion, mask = [2, 3, 4, 5], [6, 7, 8, 9, 10, 11], policy.mask_id
    masked = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    found = token_log_probs(policy, [prompt], [completion], [masked])[0]
    for block in range(3):
        past = [*prompt, *completion[: 2 * block]]
        own = completion[2 * block : 2 * block + 2]
        noised = [mask if masked[2 * block + n] else token for n, token in enumerate(own)]
        columns = torch.arange(len(past), len(past) + 2)
        ids = torch.tensor([[*past, *noised]])
        logits = policy.predict(ids, None, torch.zeros(2, dtype=torch.int64), columns)
        values = logits.log_softmax(-1)[[0, 1], own].where(masked[2 * block :][:2], 0)
        torch.testing.assert_close(found[2 * block : 2 * block + 2], values)


def refused(source: Path | str, *options: str) -> str:
    target = Path(options[0]) if options else Path(str(source) + "-a2d")
    result = invoke("init", target, "--from", source)
    assert result.exit_code == 2, result.output
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}*"))
    return str(result.stderr)


@pytest.mark.parametrize("family", ["llada", "dream", "a2d", "mlm"])
def test_a_model_that_denoises_is_refused(saved_models, tmp_path, family):
    message = refused(saved_models(family), str(tmp_path / "new"))
    assert f"it denoises already (family {family})" in message


def test_what_is_no_autoregressive_language_model_is_refused(tmp_path, saved_models):
    source = autoregressive(tmp_path / "llama", "llama")
    raw = json.loads((source / "config.json").read_text())

    def with_fields(**fields: Any) -> Path:
        (source / "config.json").write_text(json.dumps(raw | fields))
        return source

    assert "is an encoder" in refused(with_fields(model_type="bert"))
    assert "is an encoder" in refused(with_fields(use_bidirectional_attention=True))
    assert "quantized" in refused(with_fields(quantization_config={"quant_method": "x"}))
    (source / "adapter_config.json").write_text("{}")
    assert "merge" in refused(source)
    assert "has more parts" in refused(saved_models("qwen2.5-vl"), str(tmp_path / "new"))


def test_a_model_with_layers_that_look_back_only_is_refused(tmp_path):
    config = transformers.Lfm2Config(
        **SIZES, layer_types=["full_attention", "conv", "full_attention"], block_multiple_of=8
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "lfm2")
    plain_tokenizer().save_pretrained(tmp_path / "lfm2")
    result = invoke("init", tmp_path / "new", "--from", tmp_path / "lfm2")
    assert result.exit_code == 65, result.output
    assert "block 1 of a Lfm2ForCausalLM reads from left to right only" in result.stderr
    assert not list(tmp_path.glob("*new*"))


def test_a_class_that_attends_as_it_likes_is_refused(tmp_path):
    """StableLM is causal if it is given no mask, whatever `is_causal` says."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = transformers.StableLmConfig(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "stable")
    plain_tokenizer().save_pretrained(tmp_path / "stable")
    result = invoke("init", tmp_path / "new", "--from", tmp_path / "stable")
    assert (result.exit_code, "block 0 of a StableLmForCausalLM" in result.stderr) == (65, True)


def test_options_of_a_new_model_are_refused_and_a_directory_is_kept(tmp_path):
    source = autoregressive(tmp_path / "llama", "llama")
    for option in (["--layers", 3], ["--original-naming"], ["--tokenizer", "byte"]):
        result = invoke("init", tmp_path / "new", "--from", source, *option)
        assert (result.exit_code, option[0] in result.stderr) == (2, True)
    result = invoke("init", tmp_path / "new", "--mask-token", "<x>")
    assert (result.exit_code, "--from" in result.stderr) == (2, True)
    result = invoke("init", tmp_path / "new", "--from", source, "--mask-token", "<eos>")
    assert (result.exit_code, "another use" in result.stderr) == (2, True)
    assert invoke("init", source, "--from", source).exit_code == 73
    assert invoke("init", tmp_path / "new", "--from", tmp_path / "none").exit_code == 66


@pytest.mark.parametrize(
    "options", [[], ["--shift", 0], ["--pattern", "block-causal", "--block-length", 2]]
)
def test_an_autoregressive_model_learns_to_denoise(tmp_path, options):
    """From a left-to-right model through `init --from` and `update --algo sft` to `rollout`."""
    rows = [{"id": f"{a}", "prompt": f"{a}+1=", "completion": f"{(a + 1) % 10}"} for a in range(10)]
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join(orjson.dumps(row) for row in rows * 20))
    common = ["--algo", "sft", "--lr", 0.01, "--grad-norm", 1, "--prompts-per-step", 10]
    source = autoregressive(tmp_path / "llama", "llama")
    runs = [*common, "--raw", "--fill-to", 2]
    result = invoke("update", data, *runs, "-m", source, "-o", tmp_path / "ar")
    assert result.exit_code == 0, result.output
    target = tmp_path / "a2d"
    result = invoke("init", target, "--from", tmp_path / "ar", "--gen-length", 2, *options)
    assert result.exit_code == 0, result.output
    for _ in range(2):
        annealed = [*runs, "--anneal-attention", 5]
        result = invoke("update", data, *annealed, "-m", target, "-o", tmp_path / "sft")
        assert result.exit_code == 0, result.output
    losses = [r["loss"] for r in read_records([str(tmp_path / "sft" / "metrics.jsonl")])]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    answers = tmp_path / "answers.jsonl"
    options = ["-m", tmp_path / "sft", "--raw", "-n", 1, "--temperature", 0, "-o", answers]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(
        b"\n".join(orjson.dumps({"id": r["id"], "prompt": r["prompt"]}) for r in rows)
    )
    assert invoke("rollout", prompts, *options).exit_code == 0
    found = {r["id"]: r["completion"] for r in read_records([str(answers)])}
    assert sum(found[row["id"]] == row["completion"] for row in rows) >= 8
