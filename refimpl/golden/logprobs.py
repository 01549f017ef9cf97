"""Logits and top-k log probabilities as JSON lines: one record a line, or one JSON value.

Forms, by their fields:

* MaxText golden logits (`generate_hf_golden_logits.py`): `tokens` and `logits` (T, V); also
  `top_k_logits` with `top_k_indices`, (T, K) each.
* OpenAI chat completions: `choices[0].logprobs.content[]` with `token`, `logprob`, `bytes`,
  `top_logprobs[]`.
* OpenAI completions: `choices[0].logprobs` with `tokens`, `token_logprobs`, `top_logprobs[]`
  (token text to value); with `echo` the prompt's tokens come first and the first value is null.
* vLLM's `prompt_logprobs[]` (token id to `{logprob}`), and `token_id:N` in place of a text.
* llama.cpp's server: `completion_probabilities[]` or chat `content[]` with `id` beside `token`.

Entry j of a continuation tells the distribution from which its token was taken, which is the row
of the token before it. Tokens are identified by id, then by bytes, then by text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.config import ModelConfig
from refimpl.errors import InputError
from refimpl.golden.candidate import Observation, ObservedText, checked_tokens
from refimpl.text.tokenizer import Tokenizer

Array = NDArray[Any]
Row = dict[int, float]
_LOGITS = ("logits", None)
_UNREADABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)
_WANTED = (
    "expected MaxText's `tokens` with `logits`, or OpenAI's `choices` with `logprobs` "
    "(ask the server for them: logprobs=true, top_logprobs=5)"
)


def parse_json_lines(
    text: str,
    where: str,
    config: ModelConfig,
    tokens: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[ObservedText]:
    """One observed text per record.

    Args:
        tokens: the prompt, for records that do not state it as ids.

    Raises:
        InputError: not JSON, an unknown form, or tokens that cannot be identified.
    """
    reader = _Reader(where, config, tokens, tokenizer)
    return [reader.read(record) for record in _records(text, where)]


def _records(text: str, where: str) -> list[Mapping[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = str(error).split("\n")[0][:100]
            raise InputError(f"{where}: neither JSON lines nor JSON ({reason})") from None
        records = whole if isinstance(whole, list) else [whole]
    if len(records) == 1 and isinstance(records[0], list):
        records = records[0]
    if not records or not all(isinstance(r, dict) for r in records):
        raise InputError(f"{where}: not a list of JSON objects; {_WANTED}")
    return records


class _Reader:
    """Reads records against one model and one prompt."""

    def __init__(
        self,
        where: str,
        config: ModelConfig,
        tokens: Sequence[int] | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._where, self._config = where, config
        self._prompt = None if tokens is None else checked_tokens(list(tokens), config, "--tokens")
        self._tokenizer = tokenizer
        self._of_bytes: dict[bytes, int] | None = None

    def read(self, record: Mapping[str, Any]) -> ObservedText:
        """One record."""
        try:
            if "logits" in record or "top_k_logits" in record:
                return self._maxtext(record)
            return self._openai(record)
        except _UNREADABLE as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self._where}: a record cannot be read; {_WANTED}") from None

    def _maxtext(self, record: Mapping[str, Any]) -> ObservedText:
        ids = record.get("tokens")
        if ids is None and isinstance(record.get("prompt"), str) and self._tokenizer is not None:
            ids = self._tokenizer.encode(record["prompt"])
        ids = self._prompt if ids is None else ids
        if ids is None:
            raise InputError(f"{self._where}: no `tokens`; give the prompt's ids with --tokens")
        ids = checked_tokens(list(ids), self._config, self._where)
        columns = None
        name = "logits" if "logits" in record else "top_k_logits"
        values = np.array(record[name], dtype=np.float64)
        if name == "top_k_logits":
            columns = np.array(record["top_k_indices"], dtype=np.int64)
            inside = columns.size and columns.min() >= 0
            if not inside or columns.max() >= self._config.vocab_size:
                raise InputError(f"{self._where}: `top_k_indices` are no ids of this vocabulary")
        width = self._config.vocab_size if columns is None else columns.shape[-1]
        expected = (len(ids), width)
        if values.shape != expected or (columns is not None and columns.shape != expected):
            raise InputError(f"{self._where}: `{name}` has shape {values.shape}, not {expected}")
        return ObservedText(
            tuple(ids), (Observation(_LOGITS, np.arange(len(ids)), values, columns),)
        )

    def _openai(self, record: Mapping[str, Any]) -> ObservedText:
        choice = record["choices"][0] if "choices" in record else record
        rows: dict[int, Row] = {}
        ids = list(self._prompt or ())
        prompt_rows = choice.get("prompt_logprobs") or record.get("prompt_logprobs")
        if prompt_rows is not None:
            if not ids:
                raise InputError(f"{self._where}: give the prompt's ids with --tokens FILE")
            for j, entry in enumerate(prompt_rows):
                if j and entry:
                    rows[j - 1] = {int(t): _value(v) for t, v in entry.items()}
        found = choice.get("logprobs") or {}
        entries = found.get("content") or choice.get("completion_probabilities")
        if entries is None and "tokens" in found:
            entries = list(_completion_entries(found))
            if entries and entries[0]["logprob"] is None:
                ids = []  # echo: the prompt comes again, token by token
        for entry in entries or ():
            row = self._row(entry)
            if ids and row:
                rows[len(ids) - 1] = row
            ids.append(self._id(entry, required=True))
        if not rows:
            raise InputError(f"{self._where}: a record without log probabilities; {_WANTED}")
        size = self._config.vocab_size
        outside = next((t for row in rows.values() for t in row if not 0 <= t < size), None)
        if outside is not None:
            raise InputError(
                f"{self._where}: token id {str(outside)[:20]} among the log probabilities is "
                f"outside the vocabulary of {size}; is it of the same model?"
            )
        if self._prompt is None and found.get("content") is not None:
            raise InputError(f"{self._where}: does not state its prompt; give --tokens FILE")
        return ObservedText(
            tuple(checked_tokens(ids, self._config, self._where)), (_observation(rows),)
        )

    def _row(self, entry: Mapping[str, Any]) -> Row:
        row: Row = {}
        for candidate in [*(entry.get("top_logprobs") or ()), entry]:
            token = self._id(candidate, required=False)
            if candidate.get("logprob") is not None and token is not None:
                row.setdefault(token, float(candidate["logprob"]))
        return row

    def _id(self, entry: Mapping[str, Any], required: bool) -> Any:
        if type(entry.get("id")) is int:
            return entry["id"]
        text = entry.get("token")
        if isinstance(text, str) and text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        raw = entry.get("bytes")
        data = bytes(raw) if raw is not None else (text or "").encode("utf-8", "surrogatepass")
        found = self._bytes_table().get(data)
        if found is None and required:
            raise InputError(
                f"{self._where}: token {str(text)[:40]!r} is not one of this tokenizer's, or of "
                "several; ask the server for token ids"
            )
        return found

    def _bytes_table(self) -> dict[bytes, int]:
        if self._of_bytes is None:
            if self._tokenizer is None:
                raise InputError(
                    f"{self._where}: names tokens by text and the model has no tokenizer; ask the "
                    "server for token ids"
                )
            table: dict[bytes, int] = {}
            twice: set[bytes] = set()
            for i in range(len(self._tokenizer)):
                data = self._tokenizer.token_bytes(i)
                if data in table:
                    twice.add(data)
                table.setdefault(data, i)
            self._of_bytes = {k: v for k, v in table.items() if k and k not in twice}
        return self._of_bytes


def _value(entry: Any) -> float:
    return float(entry["logprob"] if isinstance(entry, Mapping) else entry)


def _completion_entries(found: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    for token, value, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True):
        listed = [{"token": t, "logprob": p} for t, p in (top or {}).items()]
        yield {"token": token, "logprob": value, "top_logprobs": listed}


def _observation(rows: dict[int, Row]) -> Observation:
    """Rows of different lengths as one rectangle: shorter ones repeat their first entry."""
    width = max(len(row) for row in rows.values())
    positions = np.array(sorted(rows), dtype=np.int64)
    columns = np.zeros((len(positions), width), dtype=np.int64)
    values = np.zeros((len(positions), width))
    for i, position in enumerate(positions.tolist()):
        row = list(rows[position].items())
        row += row[:1] * (width - len(row))
        columns[i], values[i] = [t for t, _ in row], [v for _, v in row]
    return Observation(_LOGITS, positions, values, columns, logprob=True)
