"""One streamed answer of an OpenAI-compatible endpoint, with the time of every piece.

`POST /v1/chat/completions` with `stream` and `stream_options.include_usage`, read as server-sent
events (platform.openai.com/docs/api-reference/chat/streaming). Whatever goes wrong becomes the
answer's `error`, one phrase; what came before it is kept.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from bench.runners.base import RunnerError
from hwmodel.cli_support import counted

_LONGEST_LINE = 1 << 20
_MOST_BYTES = 64 << 20
_SHOWN = 160
_OPEN, _CLOSE = "<think>", "</think>"
# drafted, accepted, steps: see bench.runners.acceptance
_TIMINGS = (("draft_n",), ("draft_n_accepted",), ())
_METRICS = (("num_draft_tokens",), ("num_accepted_draft_tokens",), ("num_spec_steps",))
_META_INFO = (
    ("spec_draft_token_num", "spec_proposed_drafts", "spec_num_proposed_drafts"),
    ("spec_accept_token_num", "spec_accepted_drafts", "spec_num_correct_drafts"),
    ("spec_verify_ct",),
)
_MOST_TOKENS_A_PIECE = 64  # drafts and batched sending included; more is no honest count


@dataclass
class Answer:
    """What came back for one request; times in seconds since it was sent.

    Attributes:
        arrivals: when each piece with text came.
        reasoning_pieces: those of them that are reasoning: sent as such, or before `</think>` in
            the text of a server that does not take it apart.
        prompt_tokens, completion_tokens, reasoning_tokens: as the server counts them, else None.
        drafted, accepted, draft_steps: draft tokens and the steps that verified them, as the
            server reports them (`bench.runners.acceptance`), else None.
        server: the server's own timings, where it gives any (llama-server).
        ended_s: when the stream ended; None where it never began.
        error: what went wrong, or empty.
    """

    started: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    reasoning_pieces: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    draft_steps: int | None = None
    server: dict[str, float] = field(default_factory=dict)
    finish_reason: str = ""
    ended_s: float | None = None
    error: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the answer, reasoning included: the server's count if it can be one, else
        pieces, of which servers without drafts send one a token."""
        stated, pieces = self.completion_tokens, len(self.arrivals)
        if stated is not None and pieces <= stated <= _MOST_TOKENS_A_PIECE * pieces:
            return stated
        return pieces

    @property
    def ttft_s(self) -> float | None:
        """Time to the first piece of text."""
        return self.arrivals[0] if self.arrivals else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token: (end-to-end − TTFT) / (N − 1), None for fewer than two."""
        if self.tokens < 2 or len(self.arrivals) < 2:
            return None
        taken = self.arrivals[-1] - self.arrivals[0]
        return taken / (self.tokens - 1) if taken > 0 else None

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies: times between pieces, each of which may hold several tokens."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        more = {"tokens": self.tokens, "ttft_s": self.ttft_s, "tpot_s": self.tpot_s}
        return {**asdict(self), **more}


class Client:
    """Connections to one endpoint.

    Args:
        url: `http://host:port`, with or without `/v1`.
        key: sent as a bearer token; empty for none.
        timeout_s: longest silence of the server.

    Raises:
        RunnerError: no address of a web server.
    """

    def __init__(self, url: str, key: str = "", timeout_s: float = 300.0) -> None:
        self._parts = _checked(url)
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self.timeout_s = timeout_s
        base = self._parts.path.rstrip("/").removesuffix("/v1")
        self._base = base

    @property
    def where(self) -> str:
        """Host and port, for messages."""
        return self._parts.netloc.rpartition("@")[2]

    def connection(self) -> http.client.HTTPConnection:
        """A new connection, not yet opened."""
        kind = (
            http.client.HTTPSConnection
            if self._parts.scheme == "https"
            else http.client.HTTPConnection
        )
        host = self._parts.hostname or ""
        return kind(host, self._parts.port, timeout=self.timeout_s)

    def get(self, path: str) -> str:
        """The text of a page such as `/v1/models`.

        Raises:
            RunnerError: the endpoint cannot be reached or refuses.
        """
        connection = self.connection()
        try:
            connection.request("GET", self._base + path, headers=self._headers)
            response = connection.getresponse()
            data = response.read(_MOST_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RunnerError(f"{self.where}: {self.reason(error)}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise RunnerError(f"{self.where}: {path} gives {_refusal(response.status, data)}")
        return data.decode("utf-8", "replace")

    def get_json(self, path: str) -> dict[str, Any]:
        """A JSON object; empty where the endpoint has no such page.

        Raises:
            RunnerError: the endpoint cannot be reached.
        """
        try:
            found = json.loads(self.get(path))
        except RunnerError as error:
            if " gives HTTP " in str(error):
                return {}
            raise
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def at_once(self, body: Mapping[str, Any]) -> tuple[int | None, str]:
        """Ask without streaming for one token: tokens of the prompt, or None, and the refusal, or
        empty. llama-cpp-python's server tells neither in a stream."""
        connection = self.connection()
        whole = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
        try:
            path = self._base + "/v1/chat/completions"
            connection.request("POST", path, json.dumps({**whole, "max_tokens": 1}), self._headers)
            response = connection.getresponse()
            data = response.read(_LONGEST_LINE)
            if response.status != 200:
                return None, _refusal(response.status, data)
            return _whole(json.loads(data)["usage"]["prompt_tokens"], None) or None, ""
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError,
                RecursionError):  # fmt: skip
            return None, ""
        finally:
            connection.close()

    def ask(self, body: Mapping[str, Any]) -> Answer:
        """Send one request and read its answer to the end."""
        answer, connection = Answer(started=time.time()), self.connection()
        began = time.perf_counter()
        try:
            path = self._base + "/v1/chat/completions"
            connection.request("POST", path, json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                answer.error = _refusal(response.status, response.read(_LONGEST_LINE))
                answer.error += self._remedy(response)
            else:
                _read_stream(response, answer, began)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.error = self.reason(error)
            if answer.arrivals:
                answer.error += f" after {counted(len(answer.arrivals), 'piece')}"
        finally:
            connection.close()
        answer.ended_s = time.perf_counter() - began
        return answer

    def _remedy(self, response: http.client.HTTPResponse) -> str:
        """What the user can do about a refusal; empty where it is not known."""
        if 300 <= response.status < 400:
            where = str(response.getheader("Location") or "elsewhere")[:_SHOWN]
            return f"; it sends on to {where}, give that address"
        if response.status in (401, 403) and "Authorization" not in self._headers:
            return "; --api-key-env NAME names the variable that holds its key"
        return ""

    def reason(self, error: Exception) -> str:
        """What a failed connection means, one phrase."""
        if isinstance(error, TimeoutError):
            return f"no answer within {self.timeout_s:g} s"
        if isinstance(error, http.client.RemoteDisconnected):
            return "the connection was closed without an answer"
        if isinstance(error, http.client.IncompleteRead | ConnectionResetError | BrokenPipeError):
            return "the connection dropped midway"
        if isinstance(error, OSError):
            return f"cannot be reached ({error.strerror or error})"
        return f"no HTTP answer ({str(error)[:_SHOWN]!r})"


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80)
    except ValueError:
        known = False
    if not known or any(c.isspace() for c in url):
        raise RunnerError(f"{url!r} is no endpoint, expected such as http://localhost:8080")
    return parts


def _refusal(status: int, data: bytes) -> str:
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = json.loads(text)["error"]
    return f"HTTP {status}: {_said(text)}"


def _said(error: Any) -> str:
    """The message of an error, alone or in an object, on one line."""
    text = error.get("message", error) if isinstance(error, dict) else error
    words = " ".join(str(text)[: 100 * _SHOWN].split()) or "no message"
    return words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "..."


def _read_stream(response: http.client.HTTPResponse, answer: Answer, began: float) -> None:
    """Events until [DONE], the end, or something that is no event.

    An answer that nothing finished was broken off, also where [DONE] follows: llama-cpp-python's
    server drops one answer so when the next is asked for.

    Raises:
        OSError, http.client.HTTPException: the connection failed.
    """
    seen, heard = 0, _Heard()
    while line := response.readline(_LONGEST_LINE):
        now, seen = time.perf_counter() - began, seen + len(line)
        if seen > _MOST_BYTES or (len(line) >= _LONGEST_LINE and not line.endswith(b"\n")):
            answer.error = f"the answer is longer than {_MOST_BYTES >> 20} MiB or has endless lines"
            return
        if not line.strip() or line.startswith((b":", b"event:", b"id:", b"retry:")):
            continue
        if not line.startswith(b"data:"):
            answer.error = f"no stream of events: {line[:_SHOWN].decode('utf-8', 'replace')!r}"
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        if not _take(data, answer, now, heard):
            return
    if not answer.finish_reason:
        count = len(answer.arrivals)
        midway = f"the answer stopped midway, after {counted(count, 'piece')}"
        answer.error = midway if count else "an answer without text"


@dataclass
class _Heard:
    """The text of an answer so far, as far as it decides what is reasoning."""

    begins: str = ""
    ends: str = ""
    marked: bool = False  # reasoning comes apart from the text

    def add(self, text: str, answer: Answer) -> None:
        """Count pieces before `</think>`, or all of a text that opened `<think>`, as reasoning."""
        if self.marked:
            return
        self.begins = (self.begins + text).lstrip()[: len(_OPEN)]
        self.ends = self.ends[1 - len(_CLOSE) :] + text
        if _CLOSE in self.ends:
            answer.reasoning_pieces, self.marked = len(answer.arrivals), True
        elif self.begins == _OPEN:
            answer.reasoning_pieces = len(answer.arrivals)


def _take(data: bytes, answer: Answer, now: float, heard: _Heard) -> bool:
    """One event into the answer; whether the stream goes on."""
    try:
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError
        if event.get("error") is not None:
            answer.error = f"the server says: {_said(event['error'])}"
            return False
        for choice in (event.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            if reasoning or delta.get("content"):
                answer.arrivals.append(now)
                if reasoning:
                    answer.reasoning_pieces += 1
                    heard.marked = True
                else:
                    heard.add(str(delta["content"]), answer)
            _drafts_of(choice.get("meta_info") or {}, answer, _META_INFO)
            answer.finish_reason = str(choice.get("finish_reason") or answer.finish_reason)
        _count(event, answer)
    except (ValueError, AttributeError, TypeError, RecursionError):
        answer.error = f"no event of a completion: {data[:_SHOWN].decode('utf-8', 'replace')!r}"
        return False
    return True


def _count(event: Mapping[str, Any], answer: Answer) -> None:
    """What the server counts: usage (OpenAI), timings (llama-server), metrics (vLLM)."""
    usage = event.get("usage") or {}
    details = usage.get("completion_tokens_details") or {}
    answer.prompt_tokens = _whole(usage.get("prompt_tokens"), answer.prompt_tokens)
    answer.completion_tokens = _whole(usage.get("completion_tokens"), answer.completion_tokens)
    counted = details.get("reasoning_tokens", usage.get("reasoning_tokens"))  # SGLang: in usage
    answer.reasoning_tokens = _whole(counted, answer.reasoning_tokens)
    timings = event.get("timings") or {}
    _drafts_of(timings, answer, _TIMINGS)
    _drafts_of((event.get("metrics") or {}).get("speculative_decoding") or {}, answer, _METRICS)
    _drafts_of(event.get("meta_info") or {}, answer, _META_INFO)
    _drafts_of((event.get("sglext") or {}).get("spec_tokens_details") or {}, answer, _META_INFO)
    for name in ("prompt_n", "prompt_per_second", "predicted_n", "predicted_per_second"):
        value = timings.get(name)
        if isinstance(value, int | float) and 0 < value < float("inf"):
            answer.server[name] = float(value)


def _drafts_of(told: Mapping[str, Any], answer: Answer, names: tuple[tuple[str, ...], ...]) -> None:
    """Drafted, accepted and steps under the names that a server has for them."""
    for which, known in zip(("drafted", "accepted", "draft_steps"), names, strict=True):
        for name in known:
            setattr(answer, which, _whole(told.get(name), getattr(answer, which)))


def _whole(value: Any, before: int | None) -> int | None:
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
    return value if known else before
