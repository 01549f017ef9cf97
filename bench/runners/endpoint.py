"""Any OpenAI-compatible endpoint (vLLM, SGLang, llama-server) behind the runners' interface."""

from __future__ import annotations

import itertools
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import median
from typing import Any

from bench.runners.acceptance import acceptance, ask_server, llama_server_drafts
from bench.runners.base import Measurement, RunnerError, RunnerTest
from bench.runners.stream import Answer, Client
from bench.runners.texts import CHARACTERS_A_TOKEN, prompt

Keep = Callable[[dict[str, Any]], None]

# Numbers of prompts: no two alike in a process, nor in two that follow each other, since a server
# may have kept what it computed for an earlier one.
_NUMBERS = itertools.count(int(time.time()) % 1_000_000)
_ENGINES = (("vllm", "vLLM"), ("sglang", "SGLang"), ("llamacpp", "llama.cpp"))
# llama-server's own threads go on polling after each graph of the model while the context that
# drafts computes with threads of its own (common/speculative.cpp attaches no pool to it): with as
# many threads as cores, every barrier waits until the system takes a core from one that polls.
_POLLING = (
    "; this llama-server drafts: on the processor its polling threads hold up those that draft, "
    "a hundredfold where they are as many as the cores; start it with --poll 0"
)


class EndpointRunner:
    """Streams answers to real text from an endpoint.

    Args:
        client: the endpoint.
        model: the served model's name, or '' for the first one it lists.
        concurrency: requests at the same time.
        requests: of a measurement; at least `concurrency`.
        keep: given every request as it ends, whatever became of it.
    """

    flags: tuple[str, ...] = ()

    def __init__(
        self, client: Client, model: str = "", concurrency: int = 1, requests: int = 4,
        keep: Keep = lambda _: None,
    ) -> None:  # fmt: skip
        self._client, self._given, self._keep = client, model, keep
        self._concurrency, self._requests = concurrency, max(requests, concurrency)
        self._per_token = 0.0

    @property
    def name(self) -> str:
        """Address and concurrency."""
        return f"{self._client.where} x{self._concurrency}"

    @cached_property
    def _listed(self) -> dict[str, Any]:
        models = self._client.get_json("/v1/models").get("data")
        first = models[0] if isinstance(models, list) and models else {}
        return first if isinstance(first, dict) else {}

    @cached_property
    def _props(self) -> dict[str, Any]:
        return self._client.get_json("/props")

    @cached_property
    def model(self) -> str:
        """The served model's name.

        Raises:
            RunnerError: the endpoint cannot be reached, or lists none.
        """
        name = self._given or str(self._listed.get("id") or "")
        if not name:
            raise RunnerError(
                f"{self._client.where}: lists no model at /v1/models; name it with --served-model"
            )
        return name

    @cached_property
    def engine(self) -> str:
        """vLLM, SGLang or llama.cpp, as the endpoint tells; else 'openai-compatible'."""
        said = str(self._listed.get("owned_by", "")).lower()
        if "build_info" in self._props or self._python_server:
            return "llama.cpp"
        return next((name for word, name in _ENGINES if word in said), "openai-compatible")

    @cached_property
    def _python_server(self) -> str:
        """Version of llama-cpp-python, whose server names itself in its description only."""
        info = self._client.get_json("/openapi.json").get("info")
        if not isinstance(info, dict) or "llama.cpp python" not in str(info.get("title")).lower():
            return ""
        return f"llama-cpp-python {info.get('version', '')}".strip()

    @cached_property
    def _drafting_llama_server(self) -> bool:
        return self.engine == "llama.cpp" and llama_server_drafts(self._client)

    @cached_property
    def version(self) -> str:
        """Build, as the endpoint tells, or empty."""
        told = self._props.get("build_info") or self._python_server
        if not told and self.engine == "SGLang":
            told = self._client.get_json("/server_info").get("version")
        return str(told or self._client.get_json("/version").get("version") or "")

    def measure(self, test: RunnerTest) -> Measurement:
        """Ask `requests` times with prompts of about `n_prompt` tokens, `n_gen` new ones each.

        Samples are of each complete request: tokens/s after the first token (1 / TPOT); where
        none was complete, of what came before they broke, and the record says so.

        Raises:
            RunnerError: no request gave two tokens; the first one's error is told.
        """
        # asked before the server is busy, or gone with answers that are to be kept
        _ = self._listed, self.version, self._drafting_llama_server
        self._warm_up(test)
        before, began = ask_server(self._client, self.engine), time.perf_counter()
        answers = self._all(test)
        seconds = time.perf_counter() - began
        whole = [a for a in answers if not a.error]
        used = [a for a in whole if a.tpot_s is not None]
        used = used or [a for a in answers if a.tpot_s is not None]
        if not used:
            why = next((a.error for a in answers if a.error), "answers of less than two tokens")
            raise RunnerError(f"{self._client.where}: {why}{self._hint(answers)}")
        drafts = acceptance(answers, before, ask_server(self._client, self.engine))
        record = {**self._facts(), **self._summary(test, answers, used, seconds), **drafts,
                  "complete": len(whole)}  # fmt: skip
        return Measurement(
            engine=self.engine,
            build=self.version,
            flags=f"concurrency {self._concurrency}, prompt ~{test.n_prompt}, "
            f"at most {test.n_gen} new tokens, temperature 0",
            samples_ts=tuple(1.0 / _tpot(a) for a in used),
            samples_ns=tuple(round(1e9 * a.arrivals[-1]) for a in used),
            record=record,
        )

    def _warm_up(self, test: RunnerTest) -> None:
        """One request, which also tells how many characters make a token.

        Raises:
            RunnerError: it failed.
        """
        characters = round(max(64, test.n_prompt) * (self._per_token or CHARACTERS_A_TOKEN))
        answer = self._ask(test, characters, 2, "warm-up")
        counted, refusal = answer.prompt_tokens, ""
        if not answer.arrivals or not counted:
            counted, refusal = self._client.at_once(self._body(next(_NUMBERS), characters, 1))
        if answer.error and not answer.arrivals:
            why = refusal or f"{answer.error}{self._hint([answer])}"
            raise RunnerError(f"{self._client.where}: {why}")
        if counted:
            self._per_token = min(12.0, max(0.5, characters / counted))

    def _hint(self, answers: Sequence[Answer]) -> str:
        """What is known of servers that are as slow as this one; empty where nothing is."""
        slow = any("no answer within" in a.error for a in answers)
        return _POLLING if slow and self._drafting_llama_server else ""

    def _body(self, number: int, characters: int, tokens: int) -> dict[str, Any]:
        body = {
            "model": self.model, "stream": True, "stream_options": {"include_usage": True},
            "temperature": 0, "max_tokens": tokens,
            "messages": [{"role": "user", "content": prompt(number, characters)}],
        }  # fmt: skip
        return body | {"return_spec_tokens_details": True} if self.engine == "SGLang" else body

    def _ask(self, test: RunnerTest, characters: int, tokens: int, kind: str) -> Answer:
        answer = self._client.ask(self._body(next(_NUMBERS), characters, tokens))
        about = {"endpoint": self._client.where, "kind": kind, "concurrency": self._concurrency}
        self._keep({**about, **answer.json()})
        return answer

    def _all(self, test: RunnerTest) -> list[Answer]:
        """All requests, `concurrency` of them at any time."""
        characters = round(test.n_prompt * (self._per_token or CHARACTERS_A_TOKEN))
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(self._requests):
            left.put(i)
        done: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    left.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put(self._ask(test, characters, test.n_gen, "measured"))
                except BaseException as error:  # handed to the caller
                    done.put(error)

        for _ in range(self._concurrency):
            threading.Thread(target=work, daemon=True).start()
        answers: list[Answer] = []
        try:
            while len(answers) < self._requests:
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                answers.append(found)
        finally:
            stop.set()
        return answers

    def _facts(self) -> dict[str, Any]:
        told = self._listed.get("meta")
        meta = told if isinstance(told, dict) else {}
        known = {"model_n_params": meta.get("n_params"), "model_size": meta.get("size")}
        path = str(self._props.get("model_path") or "")
        local = self.model.startswith(("/", ".")) or "\\" in self.model
        return {
            "model": _last_part(self.model) if local else self.model,
            "model_filename": _last_part(path),
            **{k: v for k, v in known.items() if isinstance(v, int | float) and v > 0},
        }

    def _summary(
        self, test: RunnerTest, answers: Sequence[Answer], used: Sequence[Answer], seconds: float
    ) -> dict[str, Any]:
        gaps = sorted(g for a in used for g in a.gaps_s)
        prompts = [a.prompt_tokens for a in used if a.prompt_tokens]
        errors = [a.error for a in answers if a.error]
        # vLLM counts reasoning that has ended only, and answers end before it does
        reasoning = sum(max(a.reasoning_tokens or 0, a.reasoning_pieces) for a in used)
        told = any(a.reasoning_tokens is not None for a in used)
        counted = all(a.completion_tokens == a.tokens for a in used)
        prefill = [a.server["prompt_per_second"] for a in used if _prefilled_all(a)]
        return {
            "concurrency": self._concurrency,
            "requests": len(answers),
            "errors": errors,
            "n_gen": round(median(a.tokens for a in used)),
            "n_prompt": round(median(prompts)) if prompts else test.n_prompt,
            "prompt_counted": bool(prompts or self._per_token),
            "tokens_counted_by": "server" if counted else "pieces",
            "reasoning_tokens": reasoning if reasoning or told else None,
            "reasoning_pieces": sum(a.reasoning_pieces for a in used),
            "ttft_s": median(a.arrivals[0] for a in used),
            "tpot_s": median(_tpot(a) for a in used),
            "itl_median_s": median(gaps),
            "itl_p99_s": gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
            "aggregate_tok_s": sum(a.tokens for a in used) / seconds,
            "server_prefill_tok_s": median(prefill) if prefill and self._concurrency == 1 else None,
            "short_answers": sum(not a.error and a.tpot_s is None for a in answers),
        }


def _prefilled_all(answer: Answer) -> bool:
    """Whether the server computed the prompt rather than remembered it."""
    told = answer.server.get("prompt_n", 0.0), answer.prompt_tokens
    return (
        "prompt_per_second" in answer.server and bool(told[1]) and told[0] >= 0.9 * (told[1] or 0)
    )


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path)[-1]


def _tpot(answer: Answer) -> float:
    assert answer.tpot_s is not None
    return answer.tpot_s
