"""Images of a row in the form of a record: paths and data URIs, each with a mark in the prompt.

Bytes become a data URI without decoding, so that Pillow is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.tasks.images import as_data_uri, image_path, record_folder

MARK = "<image>"
"""The place of an image in a prompt; in a message, a part of type image is one too."""
Message = dict[str, Any]


def with_images(fields: Mapping[str, Any], sources: Sequence[Any], where: str) -> dict[str, Any]:
    """The fields with `images`, and with a mark for each image in the prompt.

    Missing marks are put at the beginning of the prompt.

    Args:
        fields: with `prompt` or `messages`.
        sources: content of the column of images.
        where: the `file:line` of the row; paths relative to its folder are completed.

    Raises:
        DataError: the prompt has more marks than images, or an image has a kind that a record
            cannot contain.
    """
    name = "messages" if "messages" in fields else "prompt"
    prompt = fields[name]
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise DataError(f"field '{name}' is neither text nor a list of messages", where)
    marks = prompt.count(MARK) if isinstance(prompt, str) else sum(map(_marks, prompt))
    if marks > len(sources):
        raise DataError(f"the prompt has {marks} marks {MARK} for {len(sources)} images", where)
    missing = len(sources) - marks
    return {
        **fields,
        name: _marked(prompt, missing),
        "images": [_portable(source, where) for source in sources],
        "drop": (*fields.get("drop", ()), "image"),
    }


def _portable(source: Any, where: str) -> str:
    if isinstance(source, Mapping):
        data = source.get("bytes")
        source = source.get("path") if data is None else data
    if isinstance(source, str):
        if source[:5].lower() == "data:" or "://" in source:
            return source
        return str(image_path(source, record_folder(where)))
    if isinstance(source, bytes) or hasattr(source, "getbands"):
        return as_data_uri(source)
    raise DataError(f"an image is a path, a data: URI or bytes, not {type(source).__name__}", where)


def _are_messages(prompt: Any) -> bool:
    """Whether it is a list of objects whose content is text, a list of objects, or empty."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict)
            and (
                isinstance(content := message.get("content") or "", str)
                or (isinstance(content, list) and all(isinstance(part, dict) for part in content))
            )
            for message in prompt
        )
    )


def _marks(message: Message) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return content.count(MARK)
    return sum(
        part.get("type") == "image" or str(part.get("text", "")).count(MARK)
        for part in content or ()
    )


def _marked(prompt: Any, missing: int) -> Any:
    """The prompt, text or messages, with `missing` more marks at its beginning."""
    if not missing:
        return prompt
    if isinstance(prompt, str):
        return MARK * missing + prompt
    first = next((n for n, m in enumerate(prompt) if m.get("role") == "user"), 0)
    message = dict(prompt[first])
    content = message.get("content") or ""
    if isinstance(content, str):
        message["content"] = MARK * missing + content
    else:
        message["content"] = [{"type": "image"}] * missing + list(content)
    return [*prompt[:first], message, *prompt[first + 1 :]]
