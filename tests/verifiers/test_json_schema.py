"""JSON Schema: valid is 1; what is deep, huge or elsewhere is refused, and nothing is fetched."""

import json
import socket

import pytest

from dlmctl.records.errors import DataError
from dlmctl.verifiers.json_schema import DEEPEST, LONGEST_JSON, json_schema

pytest.importorskip("jsonschema")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"t": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/t"}}]}}
}
TREE["allOf"] = [{"$ref": "#/$defs/t"}]


def judge(completion, schema=PERSON):
    return json_schema({"completion": completion, "schema": schema})


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ('{"name": "Ada", "age": 36}', 1),
        (' \n{"name": "Ada"}\n', 1),
        ('Here it is:\n```json\n{"name": "Ada"}\n```\nDone.', 1),
        ('```\n{"name": "Ada"}\n```', 1),
        ('```json\n{"name": 1}\n```\nor\n```json\n{"name": "Ada"}\n```', 1),
        ('```json\n{"name": "Ada"}\n```\n```python\nprint()\n```', 1),
        ('<answer>{"name": "Ada"}</answer>', 1),
        ('<answer>```json\n{"name": "Ada"}\n```</answer>', 1),
        ('{"name": "Ada"}<|endoftext|>rest', 1),
        ('{"name": "Ada", "age": -1}', 0),
        ('{"name": "Ada", "age": 1.5}', 0),
        ('{"name": "Ada", "x": 1}', 0),
        ('{"age": 36}', 0),
        ('{"name": "Ada"} and more', 0),
        ("{'name': 'Ada'}", 0),
        ('{"name": "Ada", "age": NaN}', 0),
        ('{"name": "Ada",}', 0),
        ('{"name": "a\0"}', 0),
        ("[" * 100_000, 0),
        ("[" * 900 + "]" * 900, 0),
        ('{"name": "' + "x" * LONGEST_JSON + '"}', 0),
        ("", 0),
        ("\0", 0),
    ],
)
def test_json_is_found_parsed_and_validated(completion, right):
    verdict = judge(completion)
    assert verdict.reward == right
    assert right or 0 < len(verdict.detail["why"]) < 500


def test_the_failure_says_where():
    why = judge('[{"name": 1}]', {"type": "array", "items": PERSON}).detail["why"]
    assert why == "$[0].name: 1 is not of type 'string'"


def test_schemas_come_as_text_and_in_several_drafts():
    assert judge("5", json.dumps({"type": "integer"})).reward == 1
    assert judge("5", True).reward == 1
    assert judge("5", False).reward == 0
    # `items` as a list: tuple validation up to draft 2019-09, and an error of the schema since.
    pair = {"items": [{"type": "string"}, {"type": "integer"}]}
    draft7 = "http://json-schema.org/draft-07/schema#"
    assert judge('["a", "b"]', {"$schema": draft7, **pair}).reward == 0
    assert judge('["a", 1]', {"$schema": draft7, **pair}).reward == 1
    with pytest.raises(DataError, match="the schema is none"):
        judge('["a", 1]', pair)
    # The published schemas of schemas are at hand.
    assert judge('{"type": "string"}', {"$ref": draft7}).reward == 1
    assert judge('{"type": "strin"}', {"$ref": draft7}).reward == 0


def test_nothing_is_fetched(monkeypatch):
    def refuse(*_args, **_more):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for there in ("http://127.0.0.1:9/s.json", "file:///etc/passwd", "other.json", "#/$defs/none"):
        with pytest.raises(DataError, match="not fetched"):
            judge("{}", {"$ref": there})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "'schema' is missing"),
        ("{", "not JSON"),
        ("[]", "expected an object"),
        (5, "expected an object"),
        ({"type": "strin"}, "the schema is none"),
        ({"pattern": "("}, "the schema is none"),
        ({"$schema": "http://example.org/own"}, "unknown draft"),
        ({"$schema": {"a": []}}, "unknown draft"),
        ({"$schema": 1.5}, "unknown draft"),
        ({"$ref": "#"}, "without end"),
        ({"$ref": 5}, "the schema is none"),
    ],
)
def test_what_is_no_schema_is_said(schema, message):
    with pytest.raises(DataError, match=message):
        judge("{}", schema)
    deep = True
    for _ in range(DEEPEST + 1):
        deep = {"not": deep}
    with pytest.raises(DataError, match="nested"):
        judge("{}", deep)


def test_a_recursive_schema_reaches_the_deepest_json_that_is_allowed():
    for levels in (1, DEEPEST):
        assert judge("[" * levels + "]" * levels, TREE).reward == 1
        assert judge("[" * (levels - 1) + "[5]" + "]" * (levels - 1), TREE).reward == 0
    assert "levels deep" in judge("[" * 65 + "]" * 65, TREE).detail["why"]
