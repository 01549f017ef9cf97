"""An endpoint of known speed, whose answers a test can change, and the runner that asks it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench.runners.base import RunnerTest
from bench.runners.endpoint import EndpointRunner
from bench.runners.stream import Client

FIRST_S, EACH_S = 0.06, 0.01
TEST = RunnerTest(Path(""), n_prompt=100, n_gen=12)


class Server:
    """An endpoint that sends the first token after `first_s` and one every `each_s` from then on.

    It notes when it sent them, so that tests hold on a busy machine too.

    `script` may take the place of the stream: it writes to the handler itself.
    """

    def __init__(self) -> None:
        self.first_s, self.each_s = FIRST_S, EACH_S
        self.reasoning = 0
        self.usage: dict[str, Any] | None = {}
        self.timings: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.meta_info: dict[str, Any] = {}
        self.sglext: dict[str, Any] = {}
        self.script: Callable[[Any], None] | None = None
        self.own_status = False  # the script sends the status too
        self.url = ""
        self.leave: Callable[[], None] = lambda: None  # nobody listens any more
        self.pages: dict[str, str] = {"/v1/models": '{"data": [{"id": "tiny", "owned_by": "me"}]}'}
        self.bodies: list[dict[str, Any]] = []
        self.most = self.now = 0
        self.sent: list[float] = []  # when the last answer's pieces were really sent
        self.together: threading.Barrier | None = None  # answers begin when so many are asked
        self.lock = threading.Lock()

    def answer(self, handler: Any, body: dict[str, Any]) -> None:
        with self.lock:
            self.bodies.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            scripted = self.script is not None and body["max_tokens"] > 2
            if not (scripted and self.own_status):
                handler.send_response(200)
                handler.end_headers()
            if scripted and self.script is not None:
                self.script(handler)
                return
            self.tokens(handler, body["max_tokens"])
        finally:
            # before the client can know the end and ask the next: this thread may go on much later
            with self.lock:
                self.now -= 1
        self.finish(handler, body)

    def tokens(self, handler: Any, count: int) -> None:
        began = time.perf_counter()
        if self.together is not None and count > 2:
            self.together.wait(30)
        due = began + self.first_s
        sent = []
        for i in range(count):
            time.sleep(max(0.0, due - time.perf_counter()))
            sent.append(time.perf_counter() - began)
            self.sent = sent
            name = "reasoning_content" if i < self.reasoning else "content"
            handler.event({"choices": [{"delta": {name: "x"}}]})
            due += self.each_s

    def finish(self, handler: Any, body: dict[str, Any]) -> None:
        count, asked = body["max_tokens"], len(body["messages"][0]["content"])
        last = {"delta": {}, "finish_reason": "length", "meta_info": self.meta_info}
        handler.event({"choices": [last], "timings": self.timings})
        if self.sglext:
            handler.event({"choices": [], "sglext": self.sglext})
        if self.usage is not None:
            usage = {"prompt_tokens": asked // 4, "completion_tokens": count, **self.usage}
            handler.event({"choices": [], "usage": usage, "metrics": self.metrics})
        handler.raw(b"data: [DONE]\n\n")


@contextlib.contextmanager
def known_speed() -> Iterator[Server]:
    """A running server."""
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = made.pages.get(self.path)
            self.send_response(200 if page else 404)
            self.end_headers()
            self.wfile.write((page or "{}").encode())

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(size))
            with contextlib.suppress(OSError):  # the client went away
                made.answer(self, body)

        def raw(self, data: bytes) -> None:
            self.wfile.write(data)
            self.wfile.flush()

        def event(self, value: dict[str, Any]) -> None:
            self.raw(b"data: " + json.dumps(value).encode() + b"\n\n")

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    made.url = f"http://127.0.0.1:{web.server_port}"
    made.leave = web.server_close
    yield made
    web.shutdown()
    web.server_close()


def runner(server: Server, timeout: float = 60.0, **more: Any) -> EndpointRunner:
    """What asks it."""
    return EndpointRunner(Client(server.url, timeout_s=timeout), **more)
