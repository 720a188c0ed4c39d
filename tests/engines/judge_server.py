"""A server of chat completions that scores by a rule, and fails when it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
    """A server on a free port of this machine; leave the `with` block and it is gone.

    Args:
        reply: the text of a reply to a question.
        fault: the HTTP status that the request of this number, from 1, gets; None is success, and
            "drop" cuts the connection.
    """

    def __init__(
        self, reply: Callable[[str], Any], fault: Callable[[int], Any] = lambda number: None
    ) -> None:
        self.reply, self.fault = reply, fault
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.requests = self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.hold: threading.Barrier | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"owner": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.requests += 1
            number = owner.requests
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
            owner.keys.append(self.headers.get("Authorization"))
        if owner.hold is not None:
            owner.hold.wait(60)
        fault = owner.fault(number) if self.path == "/v1/chat/completions" else 404
        with owner.lock:
            owner.at_once -= 1
            if fault is None:
                owner.bodies.append(body)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        text = owner.reply(body["messages"][0]["content"]) if fault is None else ""
        answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        sent = json.dumps(answer if fault is None else {"error": "busy"}).encode()
        self.send_response(fault or 200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)
