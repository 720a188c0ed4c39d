"""Reward models: the numbers are those of transformers' own forward pass, in any batch."""

import json

import pytest
import torch
from conftest import invoke, read_jsonl
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from dlmctl.models.reward_model import RewardModel
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.records.jsonl import Record, dump
from dlmctl.settings.verify import Rewarding

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
ROWS = [
    Record({"prompt": "1+1=", "completion": "2"}),
    Record({"prompt": "12345+1=", "completion": "12346 is right"}),
    Record({"messages": [{"role": "user", "content": "a"}], "completion": "b" * 40}),
    Record({"prompt": "", "completion": ""}),
    Record({"prompt": "1+1=", "completion": "3<|endoftext|>junk"}),
]


def save(directory, kind="llama", labels=1, template=TEMPLATE, pad=True):
    """A random model with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer("".join(map(chr, range(32, 127))))
    tokenizer.chat_template = template
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
    # A token of its own: those that stand in a text are no padding.
    sizes |= {"num_labels": labels, "pad_token_id": tokenizer.pad_token_id if pad else None}
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**sizes))
    elif kind == "causal":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def judge(directory, rows=ROWS, batch_size=16, **options):
    model = RewardModel(Rewarding(str(directory), batch_size=batch_size, device="cpu", **options))
    model.look(rows)
    return [model(row).reward for row in rows]


def by_transformers(directory, rows=ROWS):
    """Logits of each record alone, without a mask or padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    logits = []
    for row in rows:
        asked = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        said = row["completion"].partition("<|endoftext|>")[0]
        messages = [*asked, {"role": "assistant", "content": said}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            logits.append(model(ids).logits[0].double())
    return torch.stack(logits)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_reward_is_the_logit_of_transformers_in_any_batch(tmp_path, kind):
    save(tmp_path, kind)
    wanted = by_transformers(tmp_path)[:, 0]
    assert wanted.std() > 0.01
    for batch_size in (1, 2, 3, 16):
        torch.testing.assert_close(
            torch.tensor(judge(tmp_path, batch_size=batch_size), dtype=torch.float64),
            wanted,
            atol=1e-5,
            rtol=1e-5,
        )


def test_a_model_without_padding_token_reads_one_by_one(tmp_path):
    save(tmp_path, pad=False)
    wanted = by_transformers(tmp_path)[:, 0].tolist()
    assert judge(tmp_path) == pytest.approx(wanted, abs=1e-5)


def test_of_several_labels_one_is_named(tmp_path):
    save(tmp_path, "bert", labels=3)
    wanted = by_transformers(tmp_path).softmax(-1)
    assert judge(tmp_path, reward_label="LABEL_2") == pytest.approx(wanted[:, 2].tolist(), abs=1e-5)
    for label in (None, "good"):
        with pytest.raises(UsageError, match="LABEL_0, LABEL_1, LABEL_2"):
            judge(tmp_path, reward_label=label)
    with pytest.raises(UsageError, match="has one label"):
        judge(save(tmp_path / "one"), reward_label="LABEL_0")


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing.*score.weight.*no reward model"):
        judge(save(tmp_path / "causal", "causal"))
    pickled = save(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickled weights, which are not read"):
        judge(pickled)
    remote = save(tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match=r"config.json cannot be used"):
        judge(remote)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(MissingInputError):
        judge(tmp_path / "none")
    with pytest.raises(UsageError, match="needs --reward-model"):
        RewardModel()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completion": "x"}, "neither 'prompt'"),
        ({"prompt": 5, "completion": "x"}, "neither 'prompt'"),
        ({"messages": ["x"], "completion": "x"}, "neither 'prompt'"),
        ({"messages": [{"content": "x"}], "completion": "x"}, "chat template"),
        ({"messages": [{"role": "assistant", "content": "x"}], "completion": "x"}, "continues it"),
        ({"prompt": "x" * 1000, "completion": "x"}, "reads 1 to 128"),
        ({"prompt": "x"}, "'completion' is missing"),
        ({"prompt": "\0", "completion": "x"}, "refuses it"),
    ],
)
def test_what_cannot_be_scored_is_said(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        judge(save(tmp_path), [Record(record)])


def test_without_a_template_prompt_and_completion_are_one_text(tmp_path):
    save(tmp_path, template=None)
    joined = judge(tmp_path, [Record({"prompt": "12", "completion": "34"})])
    assert joined == judge(tmp_path, [Record({"prompt": "1", "completion": "234"})])
    with pytest.raises(DataError, match="no chat template"):
        judge(tmp_path, ROWS[2:3])


def test_the_stage_scores_and_keeps_the_order(tmp_path):
    save(tmp_path / "model")
    rows = [row for row in ROWS for _ in range(2)]
    (tmp_path / "in.jsonl").write_bytes(b"".join(map(dump, rows)))
    options = ["--verifier", "reward-model", "--reward-model", tmp_path / "model", "-b", 3]
    done = invoke("verify", *options, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.stderr
    wanted = [reward for reward in judge(tmp_path / "model") for _ in range(2)]
    assert [r["reward"] for r in read_jsonl(tmp_path / "out.jsonl")] == pytest.approx(
        wanted, abs=1e-5
    )
