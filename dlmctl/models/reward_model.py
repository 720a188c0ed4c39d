"""Verifier `reward-model`: a sequence classifier of transformers scores prompt and completion.

The text is the chat template of its tokenizer over the messages with the completion as the last
one; without a template it is the prompt and the completion, one behind the other, for records with
`prompt`. A model with one label gives its logit. One with several gives the probability (softmax)
of the label that --reward-label names.

Weights are safetensors, and none may be missing: transformers would fill in a random head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dlmctl.models.loading import model_directory, resolve_device, resolve_dtype
from dlmctl.models.weights import weight_files
from dlmctl.records.errors import DataError, MissingInputError, UsageError, reason_of
from dlmctl.records.jsonl import Record
from dlmctl.settings.verify import Rewarding
from dlmctl.verifiers.answer import Verdict, completion_text

Ids = tuple[int, ...]


class RewardModel:
    """The model, its tokenizer, and the rewards of the window that was looked at."""

    def __init__(self, rewarding: Rewarding = Rewarding()) -> None:
        """Load the model.

        Raises:
            UsageError: no model is given, or its label is not told.
            MissingInputError: there is none.
            DataError: its files cannot be used, or lack weights.
            UnavailableError: the device is missing.
        """
        if not rewarding.reward_model:
            raise UsageError("verifier reward-model needs --reward-model MODEL")
        self.name, self.window = rewarding.reward_model, rewarding.batch_size
        self._device = resolve_device(rewarding.device)
        directory = model_directory(self.name)
        self._config = _config(directory)
        self._tokenizer = _tokenizer(directory)
        dtype = resolve_dtype(rewarding.dtype, self._device)
        self._model = _model(directory, self._config, dtype).to(self._device).eval()
        self._label = _label(self.name, self._config, rewarding.reward_label)
        self._rewards: dict[Ids, float] = {}

    def look(self, records: Sequence[Record]) -> None:
        """Score these records in batches."""
        texts: dict[Ids, None] = {}
        for record in records:
            with contextlib.suppress(DataError):  # raised again when it is judged
                texts[self._ids(record)] = None
        # Like lengths together, so that little is padding.
        order = sorted(texts, key=len)
        size = self.window if self._config.get_text_config().pad_token_id is not None else 1
        self._rewards = {}
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            self._rewards.update(zip(batch, self._scores(batch).tolist(), strict=True))

    def __call__(self, record: Mapping[str, Any]) -> Verdict:
        """The reward, and the number of tokens that were read.

        Raises:
            DataError: the record has no request or completion, or is too long for the model.
        """
        ids = self._ids(record)
        if ids not in self._rewards:
            self.look([Record(record)])
        return Verdict(self._rewards[ids], {"tokens": len(ids)})

    def close(self) -> None:
        """Nothing to release."""

    @torch.inference_mode()
    def _scores(self, batch: Sequence[Ids]) -> Tensor:
        """Rewards [B] in float64 of sequences of ids, padded on the right."""
        longest = max(map(len, batch))
        pad = self._config.get_text_config().pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        answer = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device))
        logits = answer.logits.double().cpu()  # [B, labels]
        rewards = logits[:, 0] if self._label is None else logits.softmax(-1)[:, self._label]
        if not rewards.isfinite().all():
            raise DataError(f"{self.name} gives rewards that are no numbers; try --dtype float32")
        return rewards

    def _ids(self, record: Mapping[str, Any]) -> Ids:
        completion = completion_text(record)
        templated = self._tokenizer.chat_template is not None
        if templated:
            asked: Any = [*_messages(record), {"role": "assistant", "content": completion}]
        elif not isinstance(asked := record.get("prompt"), str):
            raise DataError(f"{self.name} has no chat template, and the record no 'prompt'")
        try:
            if templated:
                text = self._tokenizer.apply_chat_template(asked, tokenize=False)
            else:
                text = asked + completion
            ids = self._tokenizer.encode(text, add_special_tokens=not templated)
        except Exception as error:  # templates and tokenizers raise bare Exceptions
            raise DataError(
                f"the chat template or the tokenizer of {self.name} refuses it: {reason_of(error)}"
            ) from None
        most = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        if not ids or (most is not None and len(ids) > most):
            raise DataError(f"{len(ids)} tokens for {self.name}, which reads 1 to {most}")
        return tuple(ids)


def _messages(record: Mapping[str, Any]) -> list[Any]:
    messages, prompt = record.get("messages"), record.get("prompt")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        if messages[-1].get("role") == "assistant":
            raise DataError("the last message is the assistant's; a completion continues it")
        return messages
    if messages is None and isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    raise DataError("the record has neither 'prompt', a text, nor 'messages', a list of objects")


def _config(directory: Path) -> Any:
    if not (directory / "config.json").exists():
        raise MissingInputError(f"{directory} has no config.json: it is not a model")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"{directory}: its config.json cannot be used ({reason_of(error)})"
        ) from None


def _tokenizer(directory: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(
            f"{directory}: its tokenizer cannot be loaded ({reason_of(error)})"
        ) from None


def _model(directory: Path, config: Any, dtype: torch.dtype) -> Any:
    weight_files(directory)  # refuses pickled weights
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise DataError(f"{directory} is no sequence classifier: {reason_of(error)}") from None
    missing = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
    if missing:
        raise DataError(
            f"{directory}: {len(missing)} weights of a {type(model).__name__} are missing or "
            f"misshapen, first {missing[0]}: it is no reward model"
        )
    return model


def _label(name: str, config: Any, wanted: str | None) -> int | None:
    """The number of the label whose probability is the reward; None: the only logit is."""
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    if len(labels) == 1:
        if wanted is not None:
            raise UsageError(f"--reward-label: {name} has one label, whose logit is the reward")
        return None
    shown = ", ".join(labels)[:300]
    if wanted is None:
        raise UsageError(f"{name} has {len(labels)} labels: give one as --reward-label ({shown})")
    if wanted in labels:
        return labels.index(wanted)
    raise UsageError(f"--reward-label {wanted} is no label of {name}; they are {shown}")
