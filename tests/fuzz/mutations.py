"""Seeded mutations of bytes, text, JSON and safetensors, by a dictionary of hostile pieces."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = [
    *("0", "-0", "-1", "1e308", "1e309", "1e999999999", "-1e999999999", "1e-999999999"),
    *("9**9**9", "9**9**9**9", "1/0", "0/0", "-/2", "1/-", "1_000", "0x1F", "1e5000", "9" * 400),
    *("9" * 5000, "1/" + "9" * 350, "0." + "0" * 400 + "1", "1,234,567", "1,23", ".5.", "--1"),
    *("nan", "inf", "-Infinity", "2147483648", "18446744073709551616", "4294967295"),
    *("٣", "３", "½", "²", "𝟙", "Ⅷ", "٣/٤", "१२३", "1²", "x²"),
]
TEXTS = [
    *("", " ", "\0", "\n", "\r\n", "\ufeff", "\u202e", "\u2028", "\u00a0", "\ufffd", "\U0010ffff"),
    *("\u0301" * 20, "e\u0301", "İ", "ß", "ﬃ", "𐍈", "\x1b[2J", "\x7f", "\u200b", "ＡＢ", "'", '"'),
    *("<answer>", "</answer>", "<reasoning>", "</reasoning>", "<reasoning>\n", "\n</reasoning>\n"),
    *("\n<answer>\n", "\n</answer>", "</reasoning>\n<answer>", "<think>", "</think>", "<image>"),
    *("<description>", "</description>", "<|eot_id|>", "<|endoftext|>", "</s>", "<eos>", "####"),
    *("\\boxed{", "\\boxed {", "\\fbox{", "\\boxed{}", "{", "}", "\\frac{1}{2}", "\\frac12", "$"),
    *("\\dfrac {", "\\text{", "\\text {cm}", "\\times", "\\div", "\\left(", "\\right)", "\\,", "^"),
    *(
        "\\circ",
        "\\sqrt{2}",
        "\\pi",
        "{,}",
        "=",
        "==",
        "+",
        "-",
        "*",
        "/",
        "**",
        "(",
        ")",
        "[",
        "]",
    ),
    *(
        "1+2",
        "(1+2)*3",
        "0123",
        "1234341221434321",
        "A",
        "(B)",
        "C.",
        "answer is",
        "option:",
        "```",
    ),
    *("```python\n", "\n```", "def f():\n", "while True: pass\n", "import os; os.abort()\n"),
    *("__import__('os').system('touch pwned')", "os:system", "subprocess:run", "antigravity:x"),
    *(":", ".x:y", "builtins:exec", "{{ 7 * 7 }}", "!!python/object/apply:os.system", "%n%s"),
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", "file:///etc/passwd", "http://127.0.0.1/x"),
    *("data:image/png;base64,", "data:;base64,AAAA", "data:,", "C:\\x", "~", "a\0b", "x" * 300),
    *("(a+)+$", "a" * 30 + "!", ".*" * 20, "[" * 50, "\\" * 50),
]
REPEATED = [
    *(
        " ",
        "\t",
        "\n",
        "\0",
        "a",
        "9",
        "1 ",
        "1,",
        "1,111",
        "1/",
        "-",
        "(",
        "[",
        "{",
        "}",
        "*",
        "=",
    ),
    *("\\boxed{", "\\frac{1}{", "\\frac", "\\frac1", "\\text{", "\\text ", "{,}", "<answer>", "$"),
    *(
        "</answer>",
        "<reasoning>",
        "</reasoning> ",
        "answer ",
        "answer is ",
        "is: ",
        "(A",
        "0|",
        "é",
    ),
    *("\\boxed {", "\\boxed{ }", "1 /", "1.", "####", "```\n", "<description>", "a week ago "),
    *(
        "a red circle in row 1, ",
        "</think>",
        "^\\circ",
        "((1)/(1))",
        "٣",
        "_",
        "\\left",
        "<|",
        "\\",
    ),
]
SIZES = (2, 17, 100, 300, 1100)
LONG = 120_000
"""Characters of the rare long text, on which quadratic time is seen."""


def mutate_text(text: str, draw: random.Random) -> str:
    """One to four changes of a text."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randint(0, len(text))
        end = min(len(text), place + draw.choice((0, 1, 1, 3, 20, 200)))
        kind = draw.randrange(10)
        if kind < 3:
            text = text[:place] + _piece(draw) + text[end:]
        elif kind == 3:
            text = text[:place] + text[place:end] * draw.choice((0, 2, 3, 40)) + text[end:]
        elif kind == 4:
            text = text[:place]
        elif kind == 5:
            text = text[place:]
        elif kind == 6:
            text = _piece(draw) + text + _piece(draw)
        elif kind == 7:
            text = text[:place] + _character(draw) + text[place + 1 :]
        elif kind == 8:
            text = draw.choice((text.upper, text.lower, text.strip, text.swapcase))()
        else:
            text = text[:place] + _run(draw) + text[place:]
    if draw.randrange(400) == 0:
        piece = draw.choice(REPEATED)
        where = draw.choice((0, len(text), draw.randint(0, len(text))))
        text = text[:where] + piece * (LONG // len(piece)) + text[where:]
    return text[: 2 * LONG]


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four changes of bytes: flips, cuts, insertions, repetitions, interesting integers."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randint(0, len(changed))
        kind = draw.randrange(8)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and place < len(changed):
            changed[place] = draw.choice((0, 9, 10, 34, 92, 127, 128, 255, draw.randrange(256)))
        elif kind == 2:
            del changed[place : place + draw.choice((1, 2, 8, 64))]
        elif kind == 3:
            del changed[place:]
        elif kind == 4:
            changed[place:place] = _piece(draw).encode("utf-8", "surrogatepass")
        elif kind == 5:
            piece = changed[place : place + draw.choice((1, 4, 16, 200))]
            changed[place:place] = piece * draw.choice((1, 2, 30))
        elif kind == 6:
            number = draw.choice((0, 1, 127, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63))
            order, size = draw.choice("<>"), draw.choice("BHIQ")
            top = 2 ** (8 * struct.calcsize(size)) - 1
            packed = struct.pack(order + size, min(number, top))
            changed[place : place + len(packed)] = packed
        else:
            opened = draw.choice((b"[", b'{"a":', b"(", b'"'))
            changed[place:place] = opened * draw.choice(SIZES)
    return bytes(changed[: 2 * LONG])


def mutate_json(data: bytes, draw: random.Random, texts: float = 0.5) -> bytes:
    """A JSON value with one to three of its parts changed; sometimes also its bytes.

    Args:
        texts: share of the changes that are within a text of it.
    """
    if draw.random() < 0.1:
        return mutate_bytes(data, draw)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, draw)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _changed(value, draw, texts)
    try:
        text = json.dumps(value, ensure_ascii=draw.random() < 0.2)
    except (ValueError, RecursionError):
        return mutate_bytes(data, draw)
    if draw.random() < 0.03:  # what json.dumps does not write
        number = draw.choice(
            ("1e400", "-1e400", "1e-400", "9" * 5000, "NaN", "0" * 20, "1.", "\\x")
        )
        text = text.replace(draw.choice(("0", "1", "2", "null", '"')), number, 1)
    written = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(written, draw) if draw.random() < 0.02 else written


def mutate_safetensors(data: bytes, draw: random.Random) -> bytes:
    """A file of safetensors with another header, another length of it, or other bytes."""
    if len(data) < 8 or draw.random() < 0.15:
        return mutate_bytes(data, draw)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        return mutate_bytes(data, draw)
    if draw.random() < 0.2 or not isinstance(entries, dict):
        header = mutate_json(header, draw, texts=0.2)
    else:
        for name in draw.sample(sorted(entries), min(len(entries), draw.choice((1, 1, 2)))):
            _tensor_entry(entries, name, draw)
        header = json.dumps(entries).encode("utf-8", "surrogatepass")
    if draw.random() < 0.05:  # the same name twice
        header = header[:-1] + b"," + header[1:]
    stated = len(header)
    if draw.random() < 0.1:
        stated = draw.choice((0, 1, 2**63, 2**64 - 1, 100_000_001, stated + 1, max(0, stated - 1)))
    if draw.random() < 0.15:
        body = draw.choice((b"", body[:-1], body * 2, body[: len(body) // 2], b"\xff" * len(body)))
    return struct.pack("<Q", stated) + header + body


def hostile(draw: random.Random, depth: int = 0) -> Any:
    """A JSON value that a reader may not expect."""
    kind = draw.randrange(9)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind <= 2:
        numbers = (0, -1, 1, 2, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**5000)
        return draw.choice((*numbers, 0.5, -0.0, 1e308, 5e-324, 1e16, float("nan"), float("inf")))
    if kind <= 5:
        return _piece(draw)
    if kind == 6 and depth < 3:
        return [hostile(draw, depth + 1) for _ in range(draw.choice((0, 1, 2, 5)))]
    if kind == 7 and depth < 3:
        names = ("a", "", "bytes", "path", "type", "content", "role", "round", "correct", "\0")
        return {draw.choice(names): hostile(draw, depth + 1) for _ in range(draw.choice((0, 1, 3)))}
    value: Any = draw.choice(("x", 0, None))
    for _ in range(draw.choice((1, 5, 120, 240, 253, 700))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def _changed(value: Any, draw: random.Random, texts: float) -> Any:
    """The value with one part of it replaced, changed, renamed, left out or added."""
    if isinstance(value, str) and draw.random() < texts:
        return mutate_text(value, draw)
    if isinstance(value, (dict, list)) and value and draw.random() < 0.9:
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        long = [k for k in keys if isinstance(value[k], str)]
        key = draw.choice(long if long and draw.random() < texts else keys)
        kind = draw.randrange(12)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[draw.choice((key + "s", key.upper(), "", "error", _piece(draw)))] = value[key]
        elif kind == 2:
            other = value[draw.choice(keys)]
            text = value[key] if isinstance(value[key], str) else json.dumps(len(keys))
            value[key] = draw.choice(([value[key]], {"a": other}, other, text))
        else:
            value[key] = _changed(value[key], draw, texts)
        return value
    if isinstance(value, (int, float)) and abs(value) < 2**64 and draw.random() < 0.4:
        return draw.choice((-value, value + 1, value - 1, value * 2, value * 10**6, value / 2))
    return hostile(draw)


def _tensor_entry(entries: dict[str, Any], name: str, draw: random.Random) -> None:
    """Another dtype, shape or place of a tensor, or another name."""
    entry = entries[name]
    absurd = (0, 1, -1, 2**31, 2**40, 2**63, 2**64 - 1, 1.5, "8", None, [0], True)
    kind = draw.randrange(6)
    if kind == 0 or not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        entries[draw.choice((name + "x", "", "\0", "__metadata__", "x" * 3000))] = entries.pop(name)
    elif kind == 1:
        kinds = (
            "F64",
            "F32",
            "F16",
            "BF16",
            "I64",
            "U8",
            "BOOL",
            "F8_E4M3",
            "C64",
            "U64",
            "I4",
            "f",
        )
        entry["dtype"] = draw.choice((*kinds, None, 5))
    elif kind == 2:
        shape = list(entry["shape"])
        place = draw.randint(0, len(shape))
        shape[place : place + 1] = [draw.choice(absurd)]
        entry["shape"] = draw.choice((shape, [2**40, 2**40], [0, 2**63], [1] * 3000, [], None))
    elif kind == 3:
        entry["data_offsets"] = [draw.choice(absurd), draw.choice(absurd)]
    elif kind == 4:
        other = entries[draw.choice(sorted(entries))]
        entry["data_offsets"] = other.get("data_offsets") if isinstance(other, dict) else other
    else:
        entry["shape"] = entry["shape"][::-1]


def _piece(draw: random.Random) -> str:
    kind = draw.randrange(8)
    if kind < 3:
        return draw.choice(NUMBERS)
    return draw.choice(TEXTS) if kind < 7 else _run(draw)


def _run(draw: random.Random) -> str:
    return draw.choice(REPEATED) * draw.choice(SIZES)


def _character(draw: random.Random) -> str:
    number = draw.choice((draw.randrange(128), draw.randrange(0x3000), draw.randrange(0x110000)))
    return chr(number) if not 0xD800 <= number < 0xE000 else "\ufffd"
