"""From the prompt of a record to text, and from text to token ids.

A prompt goes through the tokenizer's chat template and gets only the special tokens that the
template writes. A text without a template gets those that the tokenizer itself puts around a text
(its post-processor): beginning-of-sequence in Gemma and Llama, [CLS] and [SEP] in BERT, none in
Qwen. In both cases the ids are the same as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmctl.models.vision import Vision, image_parts
from dlmctl.records.errors import DataError
from dlmctl.settings.models import Prompting
from dlmctl.tasks.image_columns import MARK as IMAGE_MARK


def prompt_ids(
    record: Mapping[str, Any],
    tokenizer: Any,
    name: str,
    prompting: Prompting,
    images: int = 0,
    vision: Vision | None = None,
) -> list[int]:
    """The ids of `messages` or `prompt` of a record, with one placeholder for each image.

    Args:
        name: of the model, for error messages.
        images: number of images of the record.

    Raises:
        DataError: there is no prompt, or the template or tokenizer cannot express it.
    """
    messages = _messages(record)
    if images:
        messages = _with_images(messages, images)
    if tokenizer.chat_template is None or not prompting.chat:
        text = _only_content(messages, name, raw=tokenizer.chat_template is not None)
        text = text.replace(IMAGE_MARK, vision.mark) if vision else text
        return text_ids(tokenizer, text + prompting.prefill, name, special=True)
    if images:
        messages = [{**m, "content": image_parts(m["content"])} for m in messages]
    # An answer that has begun is continued, as in transformers' pipelines.
    begun = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
    arguments = record.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise DataError("field 'chat_template_kwargs' is not an object")
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
                **{**prompting.template_args, **arguments},
            )
        )
    except Exception as error:  # the template is a program by the model's author
        raise DataError(f"the chat template of {name} refuses it: {error}") from None
    return text_ids(tokenizer, text + prompting.prefill, name)


def text_ids(tokenizer: Any, text: str, name: str, special: bool = False) -> list[int]:
    """Ids of a text by the tokenizer of the model `name`.

    Args:
        special: include the special tokens that the tokenizer puts around a text.

    Raises:
        DataError: a character has no token.
    """
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(f"{name} has no tokens for {text!r} ({error})") from None
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and not tokenizer.chat_template:
        raise DataError(f"{name} has no tokens for some characters of {text!r}")
    return ids


def context_ids(tokenizer: Any, text: str, name: str) -> list[int]:
    """Ids of a text to be continued: with the special tokens before it, without those after it.

    Raises:
        DataError: a character has no token.
    """
    whole, plain = (text_ids(tokenizer, text, name, special) for special in (True, False))
    if not plain:
        return [i for i in whole if i in (tokenizer.bos_token_id, tokenizer.cls_token_id)]
    ends = range(len(plain), len(whole) + 1)
    return next((whole[:n] for n in ends if whole[n - len(plain) : n] == plain), whole)


def _messages(record: Mapping[str, Any]) -> list[Any]:
    messages = record.get("messages")
    if messages is None:
        messages = record.get("prompt")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise DataError("the record has no 'prompt' and no 'messages'; nothing to complete")
    return messages


def _with_images(messages: list[Any], images: int) -> list[dict[str, Any]]:
    """Messages whose contents are texts with at least as many image marks as there are images.

    Missing marks are put first.

    Raises:
        DataError: a message is not an object with a content.
    """
    texts = [_text_of(message) for message in messages]
    first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), 0)
    missing = images - sum(text.count(IMAGE_MARK) for text in texts)
    texts[first] = IMAGE_MARK * missing + texts[first]  # as `prompts` puts them
    return [{**m, "content": text} for m, text in zip(messages, texts, strict=True)]


def _text_of(message: Any) -> str:
    """The content of a message, with its image parts as marks."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError("a message has no 'content' that is a text or a list of parts")
    return "".join(
        IMAGE_MARK if str(part.get("type", "")).startswith("image") else str(part.get("text", ""))
        for part in content
    )


def _only_content(messages: list[Any], name: str, raw: bool) -> str:
    """The content of the only message, which can be written without a template."""
    if len(messages) == 1 and isinstance(messages[0], dict):
        return str(messages[0].get("content", ""))
    why, instead = f"{name} has no chat template", "give 'prompt' instead"
    if raw:
        why, instead = "--raw leaves out the chat template", "leave --raw out"
    raise DataError(
        f"{why}, so a conversation of {len(messages)} messages cannot be written as text: {instead}"
    )
