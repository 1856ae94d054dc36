"""An HTTP server that misbehaves in the ways that our error handling is for."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.server.http_peer import serving

HANG_UP = -1  # a status: the connection is closed without an answer


@dataclass
class FaultyPeer:
    """Answers each request with the next of ``answers``, (status, body), and the last for ever;
    those to a path of ``fixed`` with that path's, at once."""

    url: str
    answers: list[tuple[int, str]]
    delay_s: float = 0.0
    requests: list[tuple[str, Any]] = field(default_factory=list)  # path, parsed body
    fixed: dict[str, tuple[int, str]] = field(default_factory=dict)


def _handler(peer: FaultyPeer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length) or "null")
            peer.requests.append((self.path, body))
            if self.path in peer.fixed:
                status, text = peer.fixed[self.path]
            else:
                status, text = peer.answers.pop(0) if len(peer.answers) > 1 else peer.answers[0]
                time.sleep(peer.delay_s)
            if status == HANG_UP:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler


@contextlib.contextmanager
def faulty_peer(answers: Sequence[tuple[int, str]], delay_s: float = 0.0) -> Iterator[FaultyPeer]:
    peer = FaultyPeer("", list(answers), delay_s)
    with serving(_handler(peer)) as peer.url:
        yield peer
