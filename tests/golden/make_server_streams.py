"""The streaming client against a real server: llama-cpp-python's, on the embedded model.

Checks what `bench run` measures and what it makes of a server that is killed, stopped or asked
twice at once, prints the figures, and records the server's own bytes for `tests/bench`, where they
are replayed without it. By hand, with `llama-cpp-python[server]` installed for --server-python::

    python tests/golden/make_server_streams.py --server-python PATH --out tests/bench/streams

The figures are of the machine at hand and go to no file.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.runners.base import RunnerError, RunnerTest
from bench.runners.endpoint import EndpointRunner
from bench.runners.stream import Client
from refimpl.backends import model_path

PROMPT = "Write a function that adds two numbers."
# a text that holds the end of a reasoning, forced by a grammar as the embedded model never thinks
THINKS = 'root ::= [a-z ]{12} "</think>" [a-z ]{20}'
LONG = [{"role": "user", "content": "word " * 3000}]  # more than its context
PAGES = ("/v1/models", "/props", "/openapi.json", "/version")
ANSWER_S = 60.0


@contextlib.contextmanager
def server(python: str, drops: bool) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server with its address; `drops`: whether a new request breaks off the one before it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = Path(model_path("mini"))  # named without its folder, which answers repeat
    command = [python, "-m", "llama_cpp.server", "--model", model.name, "--port", str(port),
               "--host", "127.0.0.1", "--n_ctx", "1024", "--n_threads", "2", "--verbose", "false",
               "--interrupt_requests", str(drops).lower()]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=model.parent, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(RunnerError):
                if Client(url, timeout_s=5).get_json("/v1/models"):
                    break
            time.sleep(0.1)
        else:
            raise SystemExit("the server did not start within 60 s")
        yield process, url
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def raw(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the server sends for one request, byte for byte as text, cut off or not."""
    where = http.client.HTTPConnection(url.removeprefix("http://"), timeout=ANSWER_S)
    where.request(
        method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"}
    )
    response = where.getresponse()
    kind = response.getheader("content-type") or ""
    try:
        data, whole = response.read(), True
    except http.client.IncompleteRead as cut:
        data, whole = cut.partial, False
    text = data.decode()
    if path == "/openapi.json" and response.status == 200:
        text = json.dumps({"info": json.loads(text)["info"]}, ensure_ascii=False)
    return {"path": path, "status": response.status, "type": kind, "whole": whole, "body": text}


def chat(tokens: int, stream: bool = True, **more: Any) -> dict[str, Any]:
    """The body of a request."""
    found = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens,
             "temperature": 0, **more}  # fmt: skip
    return found | {"stream": True, "stream_options": {"include_usage": True}} if stream else found


def dropped(url: str) -> dict[str, Any]:
    """An answer that the server breaks off for another one."""
    found: list[dict[str, Any]] = []
    first = threading.Thread(
        target=lambda: found.append(raw(url, "POST", "/v1/chat/completions", chat(900)))
    )
    first.start()
    time.sleep(0.3)
    raw(url, "POST", "/v1/chat/completions", chat(4))
    first.join()
    return found[0]


def record(python: str, out: Path) -> None:
    """Write the streams that `tests/bench/test_real_server.py` replays."""
    with server(python, drops=True) as (_, url):
        post = "/v1/chat/completions"
        found = {
            "made_by": "llama-cpp-python's server on the embedded model, see "
            "tests/golden/make_server_streams.py",
            "pages": [raw(url, "GET", p) for p in PAGES],
            "plain": raw(url, "POST", post, chat(12)),
            "thinks": raw(url, "POST", post, chat(40, grammar=THINKS)),
            "at once": raw(url, "POST", post, chat(1, stream=False)),
            "too long": raw(url, "POST", post, chat(5, messages=LONG)),
            "too long at once": raw(url, "POST", post, chat(5, stream=False, messages=LONG)),
            "dropped": dropped(url),
        }  # fmt: skip
    path = out / "llama-cpp-python.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def asked(
    url: str, count: int, tokens: int, timeout_s: float = ANSWER_S,
    after_first: Callable[[], None] = lambda: None,
) -> str:  # fmt: skip
    """One line for a measurement, or the sentence that it ends with.

    Args:
        after_first: called once the first measured answer is there.
    """

    def keep(request: dict[str, Any]) -> None:
        if request["kind"] == "measured" and not told:
            told.append(True)
            after_first()

    told: list[bool] = []
    runner = EndpointRunner(
        Client(url, timeout_s=timeout_s), concurrency=count, requests=4, keep=keep
    )
    try:
        r = runner.measure(RunnerTest(Path(""), n_prompt=200, n_gen=tokens)).record
    except RunnerError as error:
        return str(error)
    return (
        f"{runner.engine} {runner.version}: {r['complete']} of {r['requests']} answers, "
        f"{1 / r['tpot_s']:.0f} tok/s a user, {r['aggregate_tok_s']:.0f} together, "
        f"TTFT {1e3 * r['ttft_s']:.0f} ms, prompts of {r['n_prompt']}; {r['errors'][:1]}"
    )


def soon(process: subprocess.Popen[bytes], what: signal.Signals) -> Callable[[], None]:
    """What sends a signal a little later, amid the answer after the one that calls it."""
    return threading.Timer(0.15, lambda: os.kill(process.pid, what)).start


def check(python: str) -> None:
    """Measure the server, and see what becomes of it when it misbehaves."""
    for drops in (False, True):
        with server(python, drops) as (_, url):
            for count in (1, 2):
                print(f"drops={drops} x{count}: {asked(url, count, 48)}", flush=True)
    with server(python, False) as (process, url):
        found = asked(url, 1, 600, after_first=soon(process, signal.SIGKILL))
        print(f"killed midway: {found}", flush=True)
    with server(python, False) as (process, url):
        found = asked(url, 1, 600, 2.0, soon(process, signal.SIGSTOP))
        print(f"stopped midway: {found}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    record(given.server_python, given.out)
    check(given.server_python)


if __name__ == "__main__":
    main()
