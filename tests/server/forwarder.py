"""An HTTP server before a real one that passes everything on, and can do something first."""

import contextlib
import http.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.server.http_peer import serving


@dataclass
class Forwarder:
    """``before``: by path, what to do once before the next request to it is passed on."""

    url: str
    before: dict[str, Callable[[], None]] = field(default_factory=dict)


def _handler(forwarder: Forwarder, target: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            forwarder.before.pop(self.path, lambda: None)()
            connection = http.client.HTTPConnection(target)
            with contextlib.closing(connection), contextlib.suppress(OSError):  # nobody waits
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                text = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.getheader("Content-Type", "text/plain"))
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler


@contextlib.contextmanager
def forwarder(url: str) -> Iterator[Forwarder]:
    """To the server at ``url``."""
    made = Forwarder("")
    with serving(_handler(made, urlsplit(url).netloc)) as made.url:
        yield made
