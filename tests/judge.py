"""A small HTTP server that scores rollouts as a test says (docs/judge.md)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[[list[dict[str, Any]]], tuple[int, bytes]]
"""Rollouts of a request -> status and body of the answer."""


@contextmanager
def judge(rule: Rule, port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """A server whose `rule(rollouts)` gives status and body; its address, and the keys it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            rollouts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["rollouts"]
            asked.extend(item["key"] for item in rollouts)
            status, body = rule(rollouts)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/judge", asked
        finally:
            server.shutdown()
