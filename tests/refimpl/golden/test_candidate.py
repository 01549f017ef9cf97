"""Every form that a candidate may have gives the same rows, and bad files give one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.backends import OpenModel, open_model
from refimpl.errors import InputError
from refimpl.golden.candidate import Candidate, read_candidate
from refimpl.golden.diagnose import diagnose
from refimpl.reference.model import ReferenceModel
from refimpl.reference.trace import Trace

PROMPT, CONTINUED = [5, 17, 200, 4, 9, 12], [44, 100, 7]
IDS = [*PROMPT, *CONTINUED]
K = 5
Model = tuple[OpenModel, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def model(tiny_dir: Callable[[str], Path]) -> Any:
    """An open model, its logits (T, V) over IDS, and its residual stream (L, T, H)."""
    with open_model(tiny_dir("tiny_a"), dtype="float64") as opened:
        backend = opened.backend
        assert isinstance(backend, ReferenceModel)
        trace = Trace(record=frozenset({"hidden"}))
        step = backend.prefill(IDS, backend.new_cache(len(IDS)), all_logits=True, trace=trace)
        hidden = np.stack([trace.rows("hidden", i + 1) for i in range(9)])
        yield opened, step.logits, hidden


def logprobs(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def read(model: Model, path: Path, tokens: list[int] | None = None) -> Candidate:
    return read_candidate(path, model[0].backend.config, tokens, model[0].tokenizer)


def agrees(model: Model, found: Candidate, rows: list[int]) -> None:
    """The candidate is the model's own output on IDS, at those rows."""
    (text,) = found.sequences
    assert list(text.tokens) == IDS[: len(text.tokens)]
    (seen,) = text.observations
    assert seen.positions.tolist() == rows
    np.testing.assert_allclose(seen.pick(model[1]), seen.values, atol=1e-5)
    source = model[0].backend.weights.source  # type: ignore[attr-defined]
    assert diagnose(source, found, variants={}).verdict == "noise"


def top(row: np.ndarray) -> list[int]:
    return [int(i) for i in np.argsort(-row)[:K]]


def test_plain_logits(model: Model, tmp_path: Path) -> None:
    for name, values, rows in (
        ("all.npy", model[1], list(range(9))),
        ("batch.npy", model[1][None].astype(np.float32), list(range(9))),
        ("last.npy", model[1][-1], [8]),
    ):
        np.save(tmp_path / name, values)
        agrees(model, read(model, tmp_path / name, IDS), rows)


def test_plain_log_probabilities_are_compared_as_such(model: Model, tmp_path: Path) -> None:
    np.save(tmp_path / "l.npy", logprobs(model[1]))
    found = read(model, tmp_path / "l.npy", IDS)
    assert found.notes and "log probabilities" in found.notes[0]
    agrees(model, found, list(range(len(IDS))))


@pytest.mark.parametrize(("kind", "precision"), [("float16", "float16"), ("bf16", "bf16")])
def test_arrays_show_their_precision(
    model: Model, tmp_path: Path, kind: str, precision: str
) -> None:
    """A port in half precision needs no option to be judged as such."""
    rounded = model[1].astype(np.float16 if kind == "float16" else ml_dtypes.bfloat16)
    stored = rounded if kind == "float16" else rounded.astype(np.float32)
    np.save(tmp_path / "l.npy", stored)
    found = read(model, tmp_path / "l.npy", IDS)
    assert found.precision == precision
    source = model[0].backend.weights.source  # type: ignore[attr-defined]
    assert diagnose(source, found, variants={}).verdict == "noise"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 77, np.nan, x), "is nan (1 of"),
        (lambda x: np.zeros_like(x), "is 0 in every column (9 of 9 rows"),
        (lambda x: np.exp(logprobs(x)), "are probabilities"),
    ],
)
def test_what_are_no_logits_is_said(
    model: Model, tmp_path: Path, spoil: Callable[[np.ndarray], np.ndarray], words: str
) -> None:
    np.save(tmp_path / "l.npy", spoil(model[1]))
    with pytest.raises(InputError) as error:
        read(model, tmp_path / "l.npy", IDS)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: np.roll(x, 1, axis=0), "of the row before it"),
        (lambda x: np.roll(x, -1, axis=0), "of the row after it"),
        (lambda x: x * 1.5, "1.5 times the reference's"),
    ],
)
def test_a_slip_in_writing_down_is_named(
    model: Model, tmp_path: Path, spoil: Callable[[np.ndarray], np.ndarray], words: str
) -> None:
    np.save(tmp_path / "l.npy", spoil(model[1]))
    source = model[0].backend.weights.source  # type: ignore[attr-defined]
    found = diagnose(source, read(model, tmp_path / "l.npy", IDS))
    assert found.verdict == "unexplained" and words in found.sentence


def test_maxtext_lines(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "golden.jsonl"
    short = {"prompt": "a", "tokens": IDS[:4], "logits": model[1][:4].tolist()}
    path.write_text("\n".join(json.dumps(r) for r in ({**short}, {**short})) + "\n")
    found = read(model, path)
    assert [len(t.tokens) for t in found.sequences] == [4, 4]
    ids = [top(row) for row in model[1]]
    values = [[float(row[i]) for i in t] for row, t in zip(model[1], ids, strict=True)]
    path.write_text(json.dumps({"tokens": IDS, "top_k_indices": ids, "top_k_logits": values}))
    agrees(model, read(model, path), list(range(9)))


def entry(model: Model, row: int, form: str) -> dict[str, Any]:
    """Chat-style entry for the token after `row`: by id, by vLLM's name, by bytes or by text."""
    tokenizer, values = model[0].tokenizer, logprobs(model[1])[row]
    assert tokenizer is not None

    def named(token: int) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {
            "id": {"id": token, "token": text},
            "vllm": {"token": f"token_id:{token}", "bytes": None},
            "bytes": {"token": text, "bytes": list(raw)},
        }[form] | {"logprob": round(float(values[token]), 6)}

    known = [t for t in top(values) if t < len(tokenizer)]
    return named(IDS[row + 1]) | {"top_logprobs": [named(t) for t in known]}


@pytest.mark.parametrize("form", ["id", "vllm", "bytes"])
def test_openai_chat(model: Model, tmp_path: Path, form: str) -> None:
    path = tmp_path / "answer.json"
    content = [entry(model, row, form) for row in (5, 6, 7)]
    path.write_text(json.dumps({"choices": [{"logprobs": {"content": content}}]}, indent=1))
    agrees(model, read(model, path, PROMPT), [5, 6, 7])


def test_llamacpp_server(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    path.write_text(
        json.dumps({"completion_probabilities": [entry(model, row, "id") for row in (5, 6, 7)]})
    )
    agrees(model, read(model, path, PROMPT), [5, 6, 7])


@pytest.mark.parametrize("echo", [False, True])
def test_openai_completions(model: Model, tmp_path: Path, echo: bool) -> None:
    values = logprobs(model[1])
    rows = range(9) if echo else range(6, 9)
    listed = {
        "tokens": [f"token_id:{IDS[j]}" for j in rows],
        "token_logprobs": [float(values[j - 1, IDS[j]]) if j else None for j in rows],
        "top_logprobs": [
            {f"token_id:{t}": float(values[j - 1, t]) for t in top(values[j - 1])} if j else None
            for j in rows
        ],
    }
    path = tmp_path / "answer.jsonl"
    path.write_text(json.dumps({"choices": [{"text": "", "logprobs": listed}]}) + "\n")
    agrees(model, read(model, path, PROMPT), [j - 1 for j in rows if j])


def test_vllm_prompt_logprobs(model: Model, tmp_path: Path) -> None:
    values = logprobs(model[1])
    rows = [None, *({str(t): {"logprob": float(r[t]), "rank": 1} for t in top(r)} for r in values)]
    path = tmp_path / "answer.json"
    path.write_text(json.dumps({"choices": [{"prompt_logprobs": rows[:9]}]}))
    agrees(model, read(model, path, IDS), list(range(8)))


def printed(name: str, values: np.ndarray) -> str:
    """A tensor (rows, width) in llama.cpp's form: three entries at either end of a dimension."""

    def ends(n: int) -> list[int | None]:
        return list(range(n)) if n <= 6 else [0, 1, 2, None, n - 3, n - 2, n - 1]

    height, width = values.shape
    lines = [f"common_debug_cb_eval: {name:>20} = (f32) ADD(x{{64, 9, 1, 1}}, }}) = "
             f"{{{width}, {height}, 1, 1}}", "    [", "        ["]  # fmt: skip
    for i in ends(height):
        if i is None:
            lines.append("            ..., ")
            continue
        shown = [
            "   ..., " if j is None else f"{values[i, j]:12.4f}" + (", " if j < width - 1 else "")
            for j in ends(width)
        ]
        lines.append("            [" + "".join(shown) + "  ],")
    return "\n".join([*lines, "        ],", "    ]", f"    sum = {values.sum():f}"])


def test_tensors_printed_by_llamacpp(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "dump.txt"
    hidden = [printed(f"l_out-{i}", rows) for i, rows in enumerate(model[2])]
    others = printed("attn_norm-0", model[2][0])
    path.write_text("\n".join([others, *hidden, printed("result_output", model[1][-1:])]))
    found = read(model, path, IDS)
    (text,) = found.sequences
    assert [o.place for o in text.observations] == [
        *(("hidden", i) for i in range(9)),
        ("logits", None),
    ]
    assert text.observations[0].positions.tolist() == [0, 1, 2, 6, 7, 8]
    assert text.observations[-1].positions.tolist() == [8]
    for seen in text.observations:
        full = model[1] if seen.place[0] == "logits" else model[2][seen.place[1]]
        np.testing.assert_allclose(seen.pick(full), seen.values, atol=6e-5)
    source = model[0].backend.weights.source  # type: ignore[attr-defined]
    assert diagnose(source, found, precision="float16", variants={}).verdict == "noise"


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("x.jsonl", "{", "neither JSON lines nor JSON"),
        ("x.jsonl", "[1, 2]", "not a list of JSON objects"),
        ("x.jsonl", "{}", "without log probabilities"),
        ("x.jsonl", '{"choices": []}', "a record cannot be read"),
        ("x.jsonl", '{"choices": 3}', "a record cannot be read"),
        ("x.jsonl", '{"tokens": [1], "logits": [[1, 2]]}', "has shape (1, 2), not (1, 320)"),
        ("x.jsonl", '{"tokens": [1], "logits": "x"}', "a record cannot be read"),
        ("x.jsonl", '{"tokens": [999], "logits": []}', "no id of a vocabulary of 320"),
        (
            "x.jsonl",
            '{"tokens": [1], "top_k_logits": [[1]], "top_k_indices": [[400]]}',
            "no ids of this vocabulary",
        ),
        (
            "x.jsonl",
            '{"tokens": [1], "top_k_logits": [[1]], "top_k_indices": [[99999999999999999999]]}',
            "a record cannot be read",
        ),
        (
            "x.jsonl",
            '{"prompt_logprobs": [null, {"4611686018427387904": -1.0}]}',
            "token id 4611686018427387904 among the log probabilities is outside",
        ),
        (
            "x.jsonl",
            '{"prompt_logprobs": [null, {"99999999999999999999": -1.0}]}',
            "token id 99999999999999999999 among",
        ),
        ("x.jsonl", '{"prompt_logprobs": [null, {"-3": -1.0}]}', "token id -3 among"),
        ("x.txt", "hello", "holds no tensor l_out-N"),
        ("x.txt", b"\xff\xfe", "not a form that is known"),
        ("x.npy", b"\x93NUMPY", "not a readable .npy or .npz file"),
        ("x.npz", b"PK", "not a readable golden file"),
    ],
)
def test_bad_candidates(
    model: Model, tmp_path: Path, name: str, contents: str | bytes, words: str
) -> None:
    data = contents.encode() if isinstance(contents, str) else contents
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        read(model, tmp_path / name, PROMPT)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
