"""Golden files hold what the documentation says and departures are named where they begin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.checkpoint.source import WeightSource
from refimpl.errors import InputError
from refimpl.golden.compare import compare
from refimpl.golden.dump import golden_arrays
from refimpl.golden.files import read_golden, read_tokens, write_golden
from refimpl.reference.model import ReferenceModel
from refimpl.reference.variant import VARIANTS

Tiny = Callable[[str], WeightSource]
T, N = 34, 10


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(i) for i in np.random.default_rng(3).integers(0, 320, T)]


@pytest.fixture(scope="module")
def golden(tiny: Tiny, ids: list[int]) -> dict[str, np.ndarray]:
    return golden_arrays(ReferenceModel(tiny("tiny_a"), "float64"), ids, N)


def test_shapes(golden: dict[str, np.ndarray], tiny: Tiny) -> None:
    c = tiny("tiny_a").config
    layers, moe, h, v, k = 9, len(c.moe_layers), c.hidden_size, c.vocab_size, c.moe_top_k
    expected: dict[str, tuple[int, ...]] = {
        "prompt": (T,),
        "logits": (T, v),
        "hidden": (layers + 1, T, h),
        "final": (T, h),
        "attn_out": (layers, T, h),
        "ffn_out": (layers, T, h),
        "moe_layers": (moe,),
        "route_idx": (moe, T, k),
        "route_w": (moe, T, k),
        "route_margin": (moe, T),
        "greedy": (N,),
        "greedy_logits": (N, v),
        "draft_chain": (3,),
        "draft_chain_logits": (3, v),
    }
    for j in range(3):
        expected[f"mtp_forced_logits_{j}"] = (T - 1 - j, v)
        expected[f"mtp_forced_hidden_{j}"] = (T - 1 - j, h)
    assert set(golden) == {*expected, "spec_accepted"}
    for name, shape in expected.items():
        assert golden[name].shape == shape, name
        assert golden[name].dtype.kind == "i" or golden[name].dtype == np.float64


def test_arrays_are_consistent_with_each_other(golden: dict[str, np.ndarray]) -> None:
    g = golden
    blocks = g["hidden"][:-1] + g["attn_out"] + g["ffn_out"]
    np.testing.assert_allclose(blocks, g["hidden"][1:], atol=1e-12)
    assert np.all(np.diff(g["route_idx"], axis=-1) > 0)
    np.testing.assert_allclose(g["route_w"].sum(axis=-1), 3.0)
    assert np.all(g["route_margin"] > 0)
    np.testing.assert_array_equal(g["greedy_logits"][0], g["logits"][-1])
    np.testing.assert_array_equal(g["greedy"], g["greedy_logits"].argmax(axis=-1))


def test_speculation_steps_settle_exactly_the_wanted_tokens(golden: dict[str, np.ndarray]) -> None:
    accepted = golden["spec_accepted"]
    assert (1 + accepted).sum() >= N > (1 + accepted[:-1]).sum()


def test_without_new_tokens_one_chain_is_drafted(
    tiny: Tiny, ids: list[int], golden: dict[str, np.ndarray]
) -> None:
    short = golden_arrays(ReferenceModel(tiny("tiny_a"), "float64"), ids)
    np.testing.assert_array_equal(short["draft_chain"], golden["draft_chain"])
    np.testing.assert_array_equal(short["draft_chain_logits"], golden["draft_chain_logits"])
    assert short["spec_accepted"].shape == (0,)
    assert "greedy" not in short


def test_drafts_are_verified_against_the_greedy_text(tiny: Tiny, ids: list[int]) -> None:
    """With drafts that are always right, every step settles one token more than it drafts."""
    model = ReferenceModel(tiny("tiny_a"), "float64")
    truth = list(golden_arrays(model, ids, 16)["greedy"])
    state = {"at": len(ids)}

    def perfect(cache: Any, hidden: Any, following: Any, depth: int, choose: Any) -> list[int]:
        state["at"] = cache.length
        known = [*ids, *truth]
        for token in known[cache.length + 1 : cache.length + 1 + depth]:
            choose(np.eye(model.config.vocab_size)[token])
        return [int(t) for t in known[cache.length + 1 : cache.length + 1 + depth]]

    model.draft = perfect  # type: ignore[method-assign]
    assert golden_arrays(model, ids, 12)["spec_accepted"].tolist() == [3, 3, 3]


def test_chunks_do_not_matter(tiny: Tiny, ids: list[int], golden: dict[str, np.ndarray]) -> None:
    other = golden_arrays(ReferenceModel(tiny("tiny_a"), "float64"), ids, N, chunk=5)
    assert compare(golden, other).first_departure is None


def test_round_trip(tmp_path: Path, golden: dict[str, np.ndarray]) -> None:
    write_golden(tmp_path / "g.npz", golden, {"dtype": "float64"})
    arrays, meta = read_golden(tmp_path / "g.npz")
    assert meta["dtype"] == "float64"
    assert compare(golden, arrays).differences[0].max == 0.0


@pytest.mark.parametrize(
    ("variant", "place"),
    [
        ("window_plus_1", "layer 1 attn_out"),
        ("full_rotary", "layer 0 attn_out"),
        ("no_routed_clamp", "layer 7 ffn_out"),
        ("no_shared_clamp", "layer 8 ffn_out"),
        ("router_scale_1", "layer 2 route_w"),
        ("router_bias_ignored", "layer 2 route_idx"),
        ("mtp_trunk_to_all", "mtp_forced_hidden_1"),
    ],
)
def test_first_departure_is_named(
    tiny: Tiny, ids: list[int], golden: dict[str, np.ndarray], variant: str, place: str
) -> None:
    model = ReferenceModel(tiny("tiny_a"), "float64", VARIANTS[variant].flags)
    first = compare(golden, golden_arrays(model, ids)).first_departure
    assert first is not None
    assert first.place == place
    assert first.first
    assert first.max > 1e-3


def test_a_nan_is_a_departure(golden: dict[str, np.ndarray]) -> None:
    broken = {**golden, "logits": np.where(golden["logits"] > 0, np.nan, golden["logits"])}
    first = compare(golden, broken).first_departure
    assert first is not None
    assert first.place == "logits"


def test_experts_of_a_row_may_be_in_any_order(golden: dict[str, np.ndarray]) -> None:
    """Top-k routines need not sort; other experts, or weights of other experts, still differ."""
    turned = {n: golden[n][..., ::-1] for n in ("route_idx", "route_w")}
    assert compare(golden, {**golden, **turned}).first_departure is None
    mixed = compare(golden, {**golden, "route_w": turned["route_w"]}).first_departure
    assert mixed is not None and mixed.name == "route_w"
    other = {**golden, **turned, "route_idx": turned["route_idx"].copy()}
    other["route_idx"][0, 0, 0] = 1 + max(other["route_idx"][0, 0])
    found = compare(golden, other).first_departure
    assert found is not None and found.name == "route_idx"


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_a_run_in_half_precision_is_known_by_its_arrays(
    golden: dict[str, np.ndarray], kind: type
) -> None:
    halved = {
        n: x.astype(kind).astype(np.float32 if kind is ml_dtypes.bfloat16 else kind)
        if x.dtype.kind == "f"
        else x
        for n, x in golden.items()
    }
    found = compare(golden, halved, ("float64", None))
    assert found.first_departure is None
    assert found.tolerance == (0.05 if kind is ml_dtypes.bfloat16 else 0.01)


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1.0])
def test_a_tolerance_is_a_number(golden: dict[str, np.ndarray], tolerance: float) -> None:
    with pytest.raises(InputError, match=r"tolerance is .*, expected a number from 0 on"):
        compare(golden, golden, tolerance=tolerance)


def test_what_cannot_be_compared_is_refused(golden: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="different prompts"):
        compare(golden, {**golden, "prompt": golden["prompt"] + 1})
    with pytest.raises(InputError, match="shape"):
        compare(golden, {**golden, "logits": golden["logits"][:-1]})
    with pytest.raises(InputError, match="no array in common"):
        compare(golden, {"other": golden["logits"]})
    with pytest.raises(InputError, match="numbers"):
        compare({"logits": golden["logits"]}, {"logits": golden["logits"].astype("U4")})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("moe_layers", np.array(5), "not a list of layers 0 to 8"),
        ("moe_layers", np.array(["a"]), "not a list of layers"),
        ("moe_layers", np.zeros(7, "V8"), "not a list of layers"),
        ("prompt", np.zeros(T, "V8"), "`prompt` does not hold integers"),
        ("moe_layers", np.array([2, 3, 4, 5, 6, 7, 9]), "not a list of layers"),
        ("hidden", np.array(5.0), "0 axes"),
        ("hidden", np.zeros((5, T, 64)), "different numbers of layers: 4 in `hidden`|9 in"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    golden: dict[str, np.ndarray], name: str, value: np.ndarray, words: str
) -> None:
    broken = {**golden, name: value}
    with pytest.raises(InputError, match=words):
        compare(broken, broken)


def test_files_of_other_moe_layers_are_refused(golden: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="different MoE layers"):
        compare(golden, {**golden, "moe_layers": golden["moe_layers"] - 1})


def test_json_of_infinite_values_stays_json(golden: dict[str, np.ndarray]) -> None:
    infinite = {**golden, "logits": np.full_like(golden["logits"], np.inf)}
    for pair in ((golden, infinite), (infinite, infinite)):
        first = compare(*pair).to_json()["first_departure"]
        assert first["place"] == "logits"
        json.dumps(first, allow_nan=False)


def test_values_that_are_not_finite_are_not_written(
    tmp_path: Path, golden: dict[str, np.ndarray]
) -> None:
    hidden = golden["hidden"].copy()
    hidden[3, 1, 2] = np.nan
    with pytest.raises(InputError, match=r"hidden\[3, 1, 2\] is nan \(1 of"):
        write_golden(tmp_path / "g.npz", {**golden, "hidden": hidden}, {})
    assert not list(tmp_path.iterdir())


def test_context_and_counts_are_checked(tiny: Tiny, ids: list[int]) -> None:
    model = ReferenceModel(tiny("tiny_a"), "float32")
    with pytest.raises(InputError, match="context of 512"):
        golden_arrays(model, ids, 500)
    with pytest.raises(InputError, match="new is -1"):
        golden_arrays(model, ids, -1)
    with pytest.raises(InputError, match="chunk is 0"):
        golden_arrays(model, ids, 1, chunk=0)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    with pytest.raises(InputError, match="no such file"):
        read_golden(path)
    path.write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(InputError, match="not a readable golden file"):
        read_golden(path)
    np.savez(path, logits=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="not a readable golden file"):
        read_golden(path)
    write_golden(path, {"logits": np.zeros((2, 3))}, {})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a readable golden file"):
        read_golden(path)
    np.savez(path, meta=np.array('{"magic": "refimpl-golden", "version": 9}'))
    with pytest.raises(InputError, match="version 9"):
        read_golden(path)


@pytest.mark.parametrize("text", ["", "{", "[1, -1]", "[1.5]", '["a"]', "[true]", "{}", "[]"])
def test_token_files_are_checked(text: str) -> None:
    with pytest.raises(InputError):
        read_tokens(text, "tokens.json")
