"""A server that answers with recorded bytes of a real one (tests/bench/streams)."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "bench" / "streams"


def recorded(name: str) -> dict[str, Any]:
    """What was recorded of a server: `pages`, and answers by name."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


@contextlib.contextmanager
def replay(streams: dict[str, Any], given: dict[str, str]) -> Iterator[str]:
    """Its address.

    Args:
        given: the names of the answers to streamed (`stream`) and to whole (`whole`) requests, and
            of pages by path; looked up at every request, so that a test may change them.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            pages = {p["path"]: p for p in streams["pages"]}
            found = streams[given[self.path]] if self.path in given else pages.get(self.path)
            self.send(found or {"status": 404, "type": "", "body": "{}"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(streams[given["stream" if body.get("stream") else "whole"]])

        def send(self, found: dict[str, Any]) -> None:
            self.send_response(found["status"])
            self.send_header("Content-Type", found["type"])
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in found["body"].split("\n\n"):
                data = (event + "\n\n").encode() if event else b""
                if data:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                    self.wfile.flush()
            if found.get("whole", True):
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()
