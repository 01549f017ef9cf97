"""Perplexity, distances and statistics: the arithmetic, the commands, and what refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hwmodel.cli import main as hwmodel
from hwmodel.model import shape_of_config
from hwmodel.statistics_file import read_stats
from refimpl.backends import open_model
from refimpl.cli import main
from refimpl.config_io import load_hf_config
from refimpl.errors import InputError
from refimpl.quality.clustered import mean
from refimpl.quality.drafts import looped, teacher_forced
from refimpl.quality.inputs import ids_of_text
from refimpl.quality.perplexity import compare, measure, require_same_tokens
from refimpl.quality.routing import distinct
from refimpl.quality.windows import chunks, strided, windows_of

EMBEDDED = Path(__file__).parents[2] / "refimpl" / "mini" / "step-mini-q4_0.gguf"
BF16 = Path(__file__).parents[2] / "refimpl" / "mini" / "bf16"
IDS = [int(i) for i in np.random.default_rng(1).integers(3, 4096, 200)]


def test_chunks_judge_their_second_half() -> None:
    made = list(chunks(range(20), 8, bos=99))
    assert [w.tokens[0] for w in made] == [99, 99]
    assert [(w.first, w.judged) for w in made] == [(4, 3), (4, 3)]


def test_strided_windows_judge_every_token_once() -> None:
    judged = [t for w in strided(range(50), 16, 5) for t in w.tokens[w.first + 1 :]]
    assert judged == list(range(1, 50))


def test_correlated_tokens_have_a_larger_error() -> None:
    same = mean([np.full(100, 1.0), np.full(100, 3.0)])
    assert (same.value, same.standard_error) == (2.0, pytest.approx(1.0))
    assert mean([np.arange(4.0)]).standard_error is None


def test_perplexity_equals_the_plain_computation() -> None:
    with open_model("mini", "reference") as model:
        windows = windows_of(IDS, model.backend.config, 64)
        made = measure(model.backend, windows)
        nats = []
        for w in windows:
            cache = model.backend.new_cache(64)
            x = model.backend.prefill(w.tokens, cache, all_logits=True).logits.astype(float)
            p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
            nats += [-math.log(p[i, w.tokens[i + 1]]) for i in range(32, 63)]
    assert made.judged_tokens == len(nats) == 93
    assert made.nats_per_token.value == pytest.approx(np.mean(nats), rel=1e-5)


def test_a_model_is_at_no_distance_from_itself() -> None:
    with open_model("mini", "engine") as model:
        windows = windows_of(IDS, model.backend.config, 64)
        _, d = compare(model.backend, model.backend, windows)
    assert (d.kl_mean.value, d.kl_max, d.top1_agreement.value) == (0, 0, 1)
    assert d.perplexity_ratio.value == 1


def test_a_draft_counts_only_behind_those_that_stood() -> None:
    greedy = np.array([1, 2, 3, 4, 5, 6])
    right, wrong = np.array([2, 3, 4, 5, 6]), np.array([0, 0, 5, 6])
    assert teacher_forced(greedy, [right, wrong]) == ([4, 4], [4, 2])
    assert teacher_forced(greedy, [np.zeros(5), np.array([3, 4, 5, 6])]) == ([4, 0], [0, 0])


def test_ctrl_c_in_a_loop_ends_the_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    # generate() keeps what there is of a text; of statistics a part is nothing
    with open_model("mini", "reference") as model:
        real, calls = model.backend.decode, iter(range(3))

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(model.backend, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            looped(model.backend, IDS[:8], 2, 0.0, 1, 16)


def test_distinct_experts_of_neighbours() -> None:
    chosen = np.array([[0, 1], [1, 2], [5, 6]])
    assert distinct(chosen, 1, 8).tolist() == [2, 2, 2]
    assert distinct(chosen, 2, 8).tolist() == [3, 4]
    assert distinct(chosen, 3, 8).tolist() == [5]


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(IDS))
    return path


def test_the_statistics_file_is_what_the_cost_model_reads(ids: Path, tmp_path: Path) -> None:
    args = ["stats", "--tokens", str(ids), "--context", "64", "--loops", "1", "--json"]
    done = CliRunner().invoke(main, [*args, "--new-tokens", "8"])
    assert done.exit_code == 0, done.stderr
    path = tmp_path / "stats.json"
    path.write_text(done.stdout)
    config = load_hf_config(BF16 / "config.json")
    accepted, experts = read_stats(str(path), shape_of_config(config, "mini"))
    record = json.loads(done.stdout)
    assert accepted == tuple(record["acceptance_by_position"])
    assert experts is not None and len(experts) == 8
    assert experts[0] == config.moe_top_k
    assert sum(record["expert_load"][0]) == 192 * config.moe_top_k


def test_a_plan_takes_the_statistics_of_its_own_model_only(ids: Path, tmp_path: Path) -> None:
    args = ["stats", "--tokens", str(ids), "--context", "64", "--loops", "0", "--json"]
    path = tmp_path / "stats.json"
    path.write_text(CliRunner().invoke(main, args).stdout)
    plan = ["plan", "--device", "dgx-spark", "--stats", str(path)]
    own = ["--model", str(EMBEDDED), "--context", "512"]
    done = CliRunner().invoke(hwmodel, [*plan, *own])
    assert done.exit_code == 0, done.stderr
    other = CliRunner().invoke(hwmodel, plan)
    assert other.exit_code == 2 and other.stderr.count("\n") == 1
    assert "one token uses 4 distinct experts, expected 8" in other.stderr
    assert "it was counted on another model" in other.stderr


def test_json_of_a_comparison(ids: Path) -> None:
    args = ["perplexity", "--tokens", str(ids), "--context", "64", "--against", "mini", "--json"]
    found = json.loads(CliRunner().invoke(main, args).stdout)
    assert found["distance"]["kl_max"] == 0
    assert found["judged_tokens"] == 93


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "give either --text FILE or --tokens FILE"),
        (["--context", "128"], "expected at least 256"),
        (["--context", "2"], "context is 2, expected 4 to 1024"),
        (["--context", "64", "--stride", "64"], "stride is 64, expected 1 to 63"),
        (["--max-tokens", "0"], "max-tokens is 0"),
    ],
)
def test_mistakes_get_a_sentence(args: list[str], sentence: str, ids: Path) -> None:
    given = ["--tokens", str(ids)] if args else []
    done = CliRunner().invoke(main, ["perplexity", *given, *args])
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_models_of_different_vocabularies_are_not_compared() -> None:
    with open_model("mini", "reference") as model:
        windows = windows_of(IDS, model.backend.config, 64)
        other = SimpleNamespace(config=dataclasses.replace(model.backend.config, vocab_size=5000))
        with pytest.raises(InputError, match="vocabularies of 4096 and 5000 tokens"):
            compare(model.backend, other, windows)  # type: ignore[arg-type]
        tokenizer = model.tokenizer
        assert tokenizer is not None
        require_same_tokens(tokenizer, tokenizer)
        require_same_tokens(tokenizer, None)
        tokens = list(tokenizer.vocabulary.tokens)
        tokens[300] = "other"
        changed = SimpleNamespace(vocabulary=SimpleNamespace(tokens=tokens))
        with pytest.raises(InputError, match=r"token 300 is .* and 'other' for the other"):
            require_same_tokens(tokenizer, changed)  # type: ignore[arg-type]


def test_texts_and_tokenizers_that_are_missing() -> None:
    with open_model("mini", "reference") as model:
        with pytest.raises(InputError, match="the text is empty"):
            ids_of_text(model, "")
        with pytest.raises(InputError, match="tokenizer"):
            ids_of_text(dataclasses.replace(model, tokenizer=None), "text")


def test_logits_that_are_not_finite_are_no_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model("mini", "reference") as model:
        windows = windows_of(IDS, model.backend.config, 64)
        prefill = model.backend.prefill

        def broken(*args: Any, **kwargs: Any) -> Any:
            step = prefill(*args, **kwargs)
            return dataclasses.replace(step, logits=step.logits * np.nan)

        monkeypatch.setattr(model.backend, "prefill", broken)
        with pytest.raises(InputError, match=r"not finite: .* inspect --check"):
            measure(model.backend, windows)


def test_tokens_outside_the_vocabulary() -> None:
    with open_model("mini", "reference") as model, pytest.raises(InputError, match="5000"):
        windows_of([5000] * 200, model.backend.config, 64)
