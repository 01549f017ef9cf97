"""What an implementation under suspicion has written down, in whatever form.

A candidate is one or more sequences of tokens, each with observations: rows of the residual
stream, logits, or log probabilities, at some positions and all or some columns. Readers: golden
files and plain arrays here, JSON lines in `refimpl.golden.logprobs`, llama.cpp's printed tensors
in `refimpl.golden.llamacpp_dump`.

Axes: T tokens, R observed rows, W width of a row (V vocabulary or H hidden size), K columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.config import ModelConfig
from refimpl.errors import InputError
from refimpl.golden.files import read_golden, read_npy, stored_precision
from refimpl.text.tokenizer import Tokenizer

Array = NDArray[Any]
Place = tuple[str, int | None]
"""Array name as in golden files, and the layer (`hidden`: -1 embeddings, i layer i's output)."""


@dataclass(frozen=True)
class Observation:
    """Observed rows of one array.

    Attributes:
        positions: (R,) rows of the full array (T, W) that were seen.
        values: (R, W), or (R, K) where `columns` (R, K) says which columns they are.
        logprob: the values are log probabilities; logits must be normalised to compare.
    """

    place: Place
    positions: Array
    values: Array
    columns: Array | None = None
    logprob: bool = False

    def pick(self, rows: Array) -> Array:
        """The same entries of a full array (T, W) -> like `values`."""
        picked = rows[self.positions]
        if self.logprob:
            shifted = picked - picked.max(axis=-1, keepdims=True)
            picked = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return picked if self.columns is None else np.take_along_axis(picked, self.columns, -1)


@dataclass(frozen=True)
class ObservedText:
    """One sequence: its tokens, what was observed, and the whole residual stream if it was.

    `hidden` (L+1, T, H) allows every layer to be judged from the candidate's own input.
    """

    tokens: tuple[int, ...]
    observations: tuple[Observation, ...]
    hidden: Array | None = None


@dataclass(frozen=True)
class Candidate:
    """All sequences of a candidate, its precision by name ('float32' if neither stated nor seen
    in its arrays), and what its reader took it for where that was not stated."""

    sequences: tuple[ObservedText, ...]
    precision: str = "float32"
    notes: tuple[str, ...] = field(default=())


def read_candidate(
    path: Path,
    config: ModelConfig,
    tokens: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Candidate:
    """Read a candidate of any known form.

    Args:
        tokens: the prompt, for forms that do not state it.
        tokenizer: for log probabilities that name tokens by their text.

    Raises:
        InputError: unknown form, no prompt, or arrays that do not fit the model.
    """
    if path.suffix in (".npz", ".npy"):
        arrays, meta = _arrays(path)
        return from_arrays(str(path), arrays, meta, config, tokens)
    text = _text(path)
    if text.lstrip()[:1] in ("{", "["):
        from refimpl.golden.logprobs import parse_json_lines

        sequences = parse_json_lines(text, str(path), config, tokens, tokenizer)
    else:
        from refimpl.golden.llamacpp_dump import parse_dump

        sequences = [parse_dump(text, str(path), config, tokens)]
    return Candidate(tuple(sequences))


_MAX_TEXT_BYTES = 4 << 30


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise InputError(f"{path}: larger than {_MAX_TEXT_BYTES} bytes; give fewer rows")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: not a form that is known; expected a golden file or .npy/.npz logits, JSON "
            "lines with logits or logprobs, or tensors printed by llama-eval-callback"
        ) from None


def _arrays(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    if path.suffix == ".npz":
        return read_golden(path)
    return {"logits": read_npy(path)}, {}


def from_arrays(
    path: str,
    arrays: Mapping[str, Array],
    meta: Mapping[str, Any],
    config: ModelConfig,
    tokens: Sequence[int] | None = None,
) -> Candidate:
    """The candidate in the arrays of a golden file, or in logits alone.

    Args:
        path: for messages.
        meta: the file's description; `dtype` states the precision.

    Raises:
        InputError: no prompt, or arrays that do not fit the model.
    """
    if "prompt" in arrays:
        prompt = checked_tokens(arrays["prompt"].reshape(-1).tolist(), config, path)
        if tokens is not None and list(tokens) != prompt:
            raise InputError(f"{path}: was made from another prompt than the tokens given")
        tokens = prompt
    if tokens is None:
        raise InputError(f"{path}: does not state its prompt; give its ids with --tokens FILE")
    ids = tuple(checked_tokens(list(tokens), config, "--tokens"))
    named = dict(arrays)
    if "logits" not in named and len(named) == 1:
        named = {"logits": next(iter(named.values()))}
    observations, hidden = [], None
    if "hidden" in named:
        shape = (config.num_hidden_layers + 1, len(ids), config.hidden_size)
        hidden = _numbers(path, "hidden", named["hidden"])
        if hidden.shape != shape:
            raise InputError(f"{path}: `hidden` has shape {hidden.shape}, expected {shape}")
        rows = np.arange(len(ids))
        observations += [
            Observation(("hidden", i - 1), rows, hidden[i]) for i in range(len(hidden))
        ]
    notes: tuple[str, ...] = ()
    if "logits" in named:
        seen = _logits(path, named["logits"], len(ids), config.vocab_size)
        observations.append(seen)
        if seen.logprob:
            notes = (f"{path}: its logits are log probabilities; compared as such",)
    for k in range(config.num_nextn_predict_layers):
        for name, width in (("hidden", config.hidden_size), ("logits", config.vocab_size)):
            full = f"mtp_forced_{name}_{k}"
            if full in named and len(ids) > 1 + k:
                values = _numbers(path, full, named[full])
                if values.shape != (len(ids) - 1 - k, width):
                    raise InputError(f"{path}: `{full}` has shape {values.shape}")
                rows = np.arange(len(values))
                observations.append(Observation((full, None), rows, values))
    if not observations:
        raise InputError(f"{path}: holds neither `logits` nor `hidden`")
    precision = meta.get("dtype")
    return Candidate(
        (ObservedText(ids, tuple(observations), hidden),),
        precision if isinstance(precision, str) else stored_precision(named),
        notes,
    )


def _numbers(path: str, name: str, values: Array) -> Array:
    if values.dtype.kind not in "fiu":
        raise InputError(f"{path}: `{name}` does not hold numbers")
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        at = ", ".join(str(i) for i in wrong[0])
        raise InputError(
            f"{path}: `{name}`[{at}] is {values[tuple(wrong[0])]} ({len(wrong)} of {values.size} "
            "are not finite); nothing can be said of such numbers"
        )
    return values.astype(np.float64)


def _kind_of(path: str, values: Array) -> bool:
    """Whether rows (R, V) are log probabilities; refuses those that are no logits at all."""
    low, high = values.min(axis=-1), values.max(axis=-1)
    flat = np.flatnonzero(low == high)
    if len(flat):
        raise InputError(
            f"{path}: row {flat[0]} of the logits is {low[flat[0]] + 0.0:g} in every column "
            f"({len(flat)} of {len(values)} rows are so); was it never written?"
        )
    if (low >= 0).all() and (np.abs(values.sum(axis=-1) - 1) < _NORMALISED).all():
        raise InputError(
            f"{path}: its logits are probabilities (rows sum to 1), expected logits or log "
            "probabilities"
        )
    sums = high + np.log(np.exp(values - high[:, None]).sum(axis=-1))
    return bool((np.abs(sums) < _NORMALISED).all())


_NORMALISED = 1e-2  # what is left of a sum of 1 after rounding to 16 bits


def _logits(path: str, values: Array, count: int, vocab: int) -> Observation:
    values = _numbers(path, "logits", values)
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    values = np.atleast_2d(values)
    if values.ndim != 2 or values.shape[1] != vocab or len(values) not in (1, count):
        raise InputError(
            f"{path}: logits of shape {values.shape}, expected ({count}, {vocab}) for the whole "
            f"prompt or (1, {vocab}) for its last token"
        )
    rows = np.arange(count) if len(values) == count else np.array([count - 1])
    return Observation(("logits", None), rows, values, logprob=_kind_of(path, values))


def checked_tokens(tokens: Sequence[Any], config: ModelConfig, where: str) -> list[int]:
    """Token ids as integers.

    Raises:
        InputError: none, not integers, or outside the vocabulary.
    """
    if not tokens:
        raise InputError(f"{where}: the list of tokens is empty")
    for t in tokens:
        if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < config.vocab_size:
            raise InputError(
                f"{where}: token {str(t)[:30]!r} is no id of a vocabulary of {config.vocab_size}"
            )
    return list(tokens)
