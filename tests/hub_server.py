"""A hub on localhost: the part of the Hugging Face hub's protocol that huggingface_hub's client
calls to create a repository, commit to a branch of it, and fetch it.

Large files go by LFS, not by Xet, which the client uses with the hub itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34
LARGE = 1000
"""Bytes from which a file that is no text by its name goes by LFS, as the hub decides by size."""


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    """Branch to commit."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Commit to all its files."""
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The state of the server, which tests read and change."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Contents that arrived by LFS, by SHA-256."""
    uploads: list[str] = field(default_factory=list)
    """SHA-256 of each upload that was tried."""
    failing_uploads: tuple[int, int] = (0, 0)
    """Uploads from the first number to before the second are answered by 500, counted from 1."""
    paths: list[str] = field(default_factory=list)
    """Method and path of each request."""
    url: str = ""

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches.get(revision, revision)]

    def put(self, name: str, files: dict[str, bytes]) -> None:
        """A repository with these files, as another program pushed them."""
        self.repositories[name] = Repository(False, {"main": "0" * 40}, {"0" * 40: files})


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _by_lfs(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".bin")) and size >= LARGE


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _absent(self, code: str) -> None:
        self._answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid credentials"})
        return False

    def _serve(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        self.hub.paths.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if self.command == "PUT":
            return self._upload(parts[-1], body)
        if path == "/api/repos/create":
            return self._may_write() and self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._may_write() and self._batch(json.loads(body))
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._absent("RepoNotFound")
        if parts[0] != "api":
            return self._resolve(repository, parts[3], "/".join(parts[4:]))
        action, revision = parts[4] if len(parts) > 4 else "revision", "/".join(parts[5:]) or "main"
        if action == "branch":
            return self._may_write() and self._branch(repository, revision)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self._absent("RevisionNotFound")
        if action == "revision":
            files = [{"rfilename": file} for file in repository.commits[commit]]
            about = {"id": name, "sha": commit, "private": repository.private}
            return self._answer(200, {**about, "siblings": files, "tags": [], "downloads": 0})
        if action == "tree":
            return self._answer(200, [_entry(*f) for f in repository.commits[commit].items()])
        if action == "preupload":
            return self._may_write() and self._modes(repository, commit, json.loads(body))
        assert action == "commit", path
        return self._may_write() and self._commit(name, repository, revision, body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.put(name, {".gitattributes": b""})
        self.hub.repositories[name].private = asked.get("visibility") == "private"
        return self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def _branch(self, repository: Repository, branch: str) -> None:
        known = branch in repository.branches
        repository.branches.setdefault(branch, repository.branches["main"])
        self._answer(409 if known else 200, {})

    def _modes(self, repository: Repository, commit: str, asked: dict[str, Any]) -> None:
        answers = []
        for file in asked["files"]:
            lfs = _by_lfs(file["path"], file["size"])
            old = repository.commits[commit].get(file["path"])
            mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            oid = None if old is None else _entry(file["path"], old)
            known = oid and (oid["lfs"]["oid"] if "lfs" in oid else oid["oid"])
            answers.append({"path": file["path"], **mode, "oid": known})
        self._answer(200, {"files": answers})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}
            actions = {} if item["oid"] in self.hub.objects else {"actions": action}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes) -> None:
        self.hub.uploads.append(oid)
        first, last = self.hub.failing_uploads
        if first <= len(self.hub.uploads) < last:
            return self._answer(500, {"error": "Internal"})
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        return self._answer(200, {})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.commits[repository.branches[branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = hashlib.sha1(body + repository.branches[branch].encode()).hexdigest()
        repository.branches[branch], repository.commits[commit] = commit, files
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._answer(200, {"commitUrl": url, "commitOid": commit})

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self._absent("RevisionNotFound")
        data = repository.commits[commit].get(path)
        if data is None:
            return self._absent("EntryNotFound")
        entry = _entry(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return self._answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=commit)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    about = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if not _by_lfs(path, len(data)):
        return about
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {**about, "lfs": lfs}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub without repositories, which serves until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
