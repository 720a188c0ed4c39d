"""JSON over HTTP to one inference server, and what its failures mean.

A failure that another server, or the same one later, may not have is `Lost`. Everything else is an
error of the user's, in one line.
"""

from __future__ import annotations

import os
from typing import Any

import orjson

from dlmctl.records.errors import DataError, UsageError, missing_package, reason_of

CONNECT_SECONDS = 10.0
KEY = "DLMCTL_ENGINE_KEY"
"""The environment variable with the key of servers that want one."""
PASSING = (408, 425, 429)
"""Answers below 500 that another try may not get."""
ABSENT = (404, 405, 501)
LONGEST_REASON = 200


class Lost(Exception):  # noqa: N818 (not an error until no server is left)
    """The request was lost: there was no answer, or one that says to try again."""


class Connection:
    """One server, used by several threads."""

    def __init__(self, url: str, timeout: float, option: str = "--engine", key: str = KEY) -> None:
        """Args:
            url: with or without /v1 at its end.
            timeout: seconds without an answer after which a request is lost.
            option: that the URL was given with, for messages.
            key: the environment variable with the key of a server that wants one.

        Raises:
            UsageError: it is no URL of HTTP.
            UnavailableError: httpx2 is not installed.
        """
        try:
            import httpx2
        except ImportError:
            raise missing_package("httpx2", "engine", option) from None
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        token = os.environ.get(key)
        try:
            if httpx2.URL(self.url).scheme not in ("http", "https") or not httpx2.URL(url).host:
                raise UsageError(f"{option} {url} is not a URL, as http://HOST:PORT")
            self._client = httpx2.Client(
                timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
                limits=httpx2.Limits(max_connections=None),
                headers={"Authorization": f"Bearer {token}"} if token else None,
            )
        except httpx2.InvalidURL as error:
            raise UsageError(f"{option} {url} is not a URL ({error})") from None
        self._failed = httpx2.RequestError

    def get(self, path: str) -> Any:
        """What the server has there; None if it has no such path. Raises as `post`."""
        return self._call("GET", path, None, {}, absent=True)

    def post(
        self, path: str, body: Any, absent: bool = False, plain: bool = False, **parameters: str
    ) -> Any:
        """The JSON that the server answers.

        Args:
            absent: whether the answer may be None because the server has no such path.
            plain: whether success is said in words, which are left out: the answer is then {}.

        Raises:
            Lost: it does not answer, or cannot now.
            UsageError: it wants another key.
            DataError: it refuses the request, or the answer is not JSON.
        """
        return self._call("POST", path, body, parameters, absent, plain)

    def _call(
        self,
        method: str,
        path: str,
        body: Any,
        parameters: dict[str, str],
        absent: bool,
        plain: bool = False,
    ) -> Any:
        content = None if body is None else orjson.dumps(body)
        headers = None if body is None else {"Content-Type": "application/json"}
        try:
            answer = self._client.request(
                method, self.url + path, content=content, headers=headers, params=parameters
            )
        except self._failed as error:
            reason = reason_of(error)
            raise Lost(f"{self.url} does not answer ({reason})") from None
        status = answer.status_code
        if status in PASSING or (status >= 500 and status not in ABSENT):
            raise Lost(f"{self.url} answers {path} with HTTP {status}{_said(answer.content)}")
        if status in ABSENT and absent:
            return None
        if status in (401, 403):
            raise UsageError(
                f"{self.url} wants another key (HTTP {status}): it is in the environment variable "
                f"{self._key}"
            )
        if status != 200:
            raise DataError(f"{self.url} refuses {path} with HTTP {status}{_said(answer.content)}")
        return {} if plain else self._parsed(path, answer.content)

    def _parsed(self, path: str, content: bytes) -> Any:
        if not content.strip():
            return {}
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            raise DataError(
                f"{self.url} answers {path} with something that is not JSON: it may be another "
                "program, or a proxy"
            ) from None


def _said(content: bytes) -> str:
    """What an error says for itself, in brackets; nothing for a page or an empty answer."""
    text = content[:100_000].decode("utf-8", "replace").strip()
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        value = None
    while isinstance(value, dict):
        value = next((value[k] for k in ("error", "message", "detail") if k in value), None)
    if isinstance(value, str):
        text = value.strip()
    elif value is None and text.startswith("{"):
        text = ""
    line = text.split("\n")[0][:LONGEST_REASON]
    return "" if not line or line.startswith("<") else f" ({line})"
