"""Every known mistake turns a passing golden comparison into a failing one.

Each entry of `refimpl.reference.variant.VARIANTS` is run on the golden checkpoints. Without it
the comparison with transformers' float64 modules passes at 1e-9; with it at least one checkpoint
must miss by more than a hundred times that, and, but for the epsilon, by more than a hundred
times the float32 tolerance too, so that a float32 comparison catches it as surely.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from golden_runs import Runs
from golden_shared import Golden, goldens, load

from refimpl.golden.compare import compare
from refimpl.reference.moe import route
from refimpl.reference.variant import VARIANTS, Variant

FLOAT64 = 1e-9
FLOAT32 = 5e-5
FILES = goldens("transformers", "float64")

# Typical mistakes of ports.
MISTAKES = (
    "window_minus_1",
    "window_plus_1",
    "no_llama3_scaling",
    "llama3_scaling_everywhere",
    "full_rotary",
    "rotary_last_half",
    "interleaved_rope",
    "one_theta",
    "no_routed_clamp",
    "no_shared_clamp",
    "clamp_lists_swapped",
    "clamp_before_silu",
    "clamp_up_above_only",
    "router_scale_1",
    "router_not_renormalised",
    "router_softmax",
    "router_bias_ignored",
    "router_bias_in_weights",
    "norm_without_plus_1",
    "no_attention_gate",
    "expert_gate_up_swapped",
    "eps_1e-6",
)
# Shows only where all selected scores are tiny, which no seeded checkpoint reaches.
UNREACHED = ("router_llamacpp_floor",)
MTP = tuple(name for name in VARIANTS if name.startswith("mtp_"))
TRUNK = tuple(name for name in VARIANTS if name not in MTP + UNREACHED)
SMALL = {"eps_1e-6": 1e-4}  # the one mistake that costs less than 5e-3: what it must cost


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("mutations"))


def misses(runs: Runs, part: str, variant: Variant) -> Iterator[float]:
    """Largest |difference| from the golden logits, one number per checkpoint."""
    return (_miss(runs, load(path), part, variant) for path in FILES)


def _miss(runs: Runs, golden: Golden, part: str, variant: Variant) -> float:
    ours = runs.arrays(golden, "float64", variant, new=0)
    names = [name for name in golden.arrays if name.startswith(part)]
    return max(float(np.abs(ours[name] - golden.arrays[name]).max()) for name in names)


def test_every_row_of_the_mistake_table_is_registered() -> None:
    assert set(MISTAKES) <= set(TRUNK)
    assert len(FILES) == 3


def test_every_registered_variant_has_its_phrase_and_source() -> None:
    assert all(known.phrase and known.source for known in VARIANTS.values())
    assert all(known.flags != Variant() for known in VARIANTS.values())


@pytest.mark.parametrize("part", ["logits", "mtp_forced_logits"])
def test_the_comparison_passes_without_a_mistake(part: str, runs: Runs) -> None:
    assert max(misses(runs, part, Variant())) <= FLOAT64


@pytest.mark.parametrize("name", TRUNK)
def test_the_mistake_breaks_the_comparison(name: str, runs: Runs) -> None:
    needed = max(100 * FLOAT64, SMALL.get(name, 100 * FLOAT32))
    assert any(miss > needed for miss in misses(runs, "logits", VARIANTS[name].flags))


@pytest.mark.parametrize("name", MTP)
def test_mtp_wiring_changes_the_drafts_and_never_the_text(name: str, runs: Runs) -> None:
    wiring = VARIANTS[name].flags
    assert any(miss > 100 * FLOAT32 for miss in misses(runs, "mtp_forced_logits", wiring))
    assert _miss(runs, load(FILES[0]), "logits", wiring) <= FLOAT64


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("norm_without_plus_1", "layer 0 attn_out"),
        ("no_attention_gate", "layer 0 attn_out"),
        ("no_llama3_scaling", "layer 0 attn_out"),
        ("full_rotary", "layer 0 attn_out"),
        ("window_plus_1", "layer 1 attn_out"),
        ("llama3_scaling_everywhere", "layer 1 attn_out"),
        ("router_bias_ignored", "layer 2 route_idx"),
        ("router_scale_1", "layer 2 route_w"),
        ("expert_gate_up_swapped", "layer 2 ffn_out"),
        ("no_routed_clamp", "layer 7 ffn_out"),
        ("shared_clamp_as_3.7", "layer 7 ffn_out"),
        ("no_shared_clamp", "layer 8 ffn_out"),
        ("mtp_trunk_to_all", "mtp_forced_hidden_1"),
        ("mtp_main_head", "mtp_forced_logits_0"),
    ],
)
def test_the_comparison_names_the_place_of_the_mistake(name: str, place: str, runs: Runs) -> None:
    golden = load(FILES[0])
    ours = runs.arrays(golden, "float64", VARIANTS[name].flags, new=0)
    departure = compare(golden.arrays, ours).first_departure
    assert departure is not None
    assert departure.place == place
    assert departure.first


def test_llamacpp_floor_shows_only_where_all_selected_scores_are_tiny() -> None:
    """Disagreement 5: max(sum, 2^-14) instead of sum + 1e-20, with weights that then miss 3."""
    floor = VARIANTS["router_llamacpp_floor"].flags
    tiny, usual = np.full((1, 4), -12.0), np.zeros((1, 4))
    bias = np.zeros(4)
    assert route(tiny, bias, 2, 3.0).weights.sum() == pytest.approx(3.0)
    assert route(tiny, bias, 2, 3.0, floor).weights.sum() == pytest.approx(
        3.0 * 2 / (1 + np.exp(12.0)) * 2**14
    )
    np.testing.assert_array_equal(
        route(usual, bias, 2, 3.0, floor).weights, route(usual, bias, 2, 3.0).weights
    )
