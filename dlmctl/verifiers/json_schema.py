"""Verifier `json-schema`: a completion that is JSON and valid by the record's JSON Schema.

    schema    an object, true or false, or either as JSON text; `$schema` names its draft, which is
              2020-12 if it does not

JSON is the whole completion, or the last ```json fence in it, else the last fence; within <answer>
tags if there are any. It must be strict (RFC 8259). A reference to another document is not fetched:
it is an error of the schema. `format` is an annotation and checks nothing, as the standard has it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

from dlmctl.records.errors import DataError, missing_package
from dlmctl.records.jsonl import deeper_than
from dlmctl.verifiers.answer import ANSWER_TAG, Verdict, completion_text, judged
from dlmctl.verifiers.code import fenced

LONGEST_JSON = 1 << 20
"""Most characters of the JSON in a completion."""
DEEPEST = 64
"""Most levels of lists and objects in it. Validation recurses a few calls for each level."""
RECURSION = 5000
"""Calls within one another: enough for DEEPEST levels, each through references and `anyOf`."""
LONGEST_SHOWN = 200


def json_schema(record: Mapping[str, Any]) -> Verdict:
    """1 if the completion is JSON and valid.

    Raises:
        DataError: there is no schema, it is not one, or it refers to what is not in it.
        UnavailableError: jsonschema is not installed.
    """
    if record.get("schema") is None:
        raise DataError("field 'schema' is missing: the JSON Schema that completions are to follow")
    schema = _parsed_schema(record["schema"])
    validator = _validator(orjson.dumps(schema))
    text = _json_text(completion_text(record))
    if len(text) > LONGEST_JSON:
        return judged(False, f"has {len(text)} characters, at most {LONGEST_JSON}")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return judged(False, f"not JSON ({error})")
    if deeper_than(value, DEEPEST):
        return judged(False, f"is nested more than {DEEPEST} levels deep")
    return _validity(validator, value)


def _json_text(text: str) -> str:
    answers = ANSWER_TAG.findall(text)
    region = answers[-1] if answers else text
    return fenced(region, {"json"}).strip()


def _parsed_schema(schema: Any) -> Any:
    if isinstance(schema, str):
        try:
            schema = orjson.loads(schema)
        except orjson.JSONDecodeError as error:
            raise DataError(f"field 'schema' is a text, but not JSON ({error})") from None
    if not isinstance(schema, (dict, bool)):
        raise DataError(f"field 'schema' is {type(schema).__name__}, expected an object")
    if deeper_than(schema, DEEPEST):
        raise DataError(f"field 'schema' is nested more than {DEEPEST} levels deep")
    return schema


@lru_cache(maxsize=64)
def _validator(dumped: bytes) -> Any:
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from jsonschema_specifications import REGISTRY
    except ImportError:
        raise missing_package("jsonschema", "json", "verifier json-schema") from None
    schema = orjson.loads(dumped)
    draft: Any = Draft202012Validator
    if isinstance(schema, dict) and "$schema" in schema:
        unknown: Any = None
        named = schema["$schema"]
        draft = validator_for(schema, default=unknown) if isinstance(named, str) else None
        if draft is None:
            raise DataError(f"the schema is of an unknown draft, {str(named)[:LONGEST_SHOWN]}")
    try:
        draft.check_schema(schema)
    except SchemaError as error:
        raise DataError(f"the schema is none: {_said(error)}") from None
    # A registry of one's own has the published drafts, and fetches nothing.
    return draft(schema, registry=REGISTRY)


def _validity(validator: Any, value: Any) -> Verdict:
    from referencing.exceptions import Unresolvable

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, RECURSION))
    try:
        error = next(validator.iter_errors(value), None)
    except Unresolvable as missing:
        raise DataError(
            f"the schema refers to {str(missing.ref)[:LONGEST_SHOWN]}, which is not in it, and is "
            "not fetched: put it under $defs"
        ) from None
    except RecursionError:
        raise DataError("the schema refers to itself without end") from None
    except re.error as problem:
        raise DataError(f"the schema has a pattern that is none ({problem})") from None
    finally:
        sys.setrecursionlimit(before)
    return judged(error is None, "" if error is None else _said(error))


def _said(error: Any) -> str:
    """Where an error is and what it says, in one short line."""
    place = error.json_path if error.path else "$"
    message = " ".join(str(error.message)[-2 * LONGEST_SHOWN :].split())
    return f"{place[:LONGEST_SHOWN]}: {message[-LONGEST_SHOWN:]}"
