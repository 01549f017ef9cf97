"""Pictures are drawn from the estimator, whole or not at all; the roofline's arithmetic."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from hwmodel.cli import main
from hwmodel.model import step_shape
from hwmodel.pictures import PICTURES, depth_picture, memory_picture
from hwmodel.plan import Plan, make_plan
from hwmodel.predict import predict
from hwmodel.request import make_request
from hwmodel.roofline import roofs, step_points


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [make_plan(make_request(d, step_shape())) for d in ("m4max", "h100")]


def test_phases_lie_under_the_roof_and_prefill_is_denser_than_decode(plans: list[Plan]) -> None:
    points = step_points(plans[0].chosen)
    assert all(0 < p.share < 1 for p in points)
    decode, prefill = points[0], points[-1]
    assert prefill.intensity > 10 * decode.intensity


def test_the_roof_is_bandwidth_times_intensity_or_the_peak(plans: list[Plan]) -> None:
    bandwidth, peaks = roofs(plans[0].chosen)
    assert bandwidth == pytest.approx(plans[0].chosen.device.bandwidth_bytes_per_s)
    for p in step_points(plans[0].chosen):
        assert p.roof_flop_per_s == pytest.approx(min(p.intensity * bandwidth, max(peaks.values())))


def test_decode_takes_the_time_of_the_estimate(plans: list[Plan]) -> None:
    first = step_points(plans[0].chosen)[0]
    found = predict(plans[0].chosen.at(depth=0, drafts=0), "decode_tok_s")
    assert first.seconds == pytest.approx(1 / (found.value or 0))


@pytest.mark.parametrize("kind", PICTURES)
def test_every_picture_is_drawn(kind: str, plans: list[Plan]) -> None:
    figure = PICTURES[kind](plans)
    axes = figure.get_axes()
    assert axes and any(a.has_data() for a in axes)
    for a in axes:
        if a.get_visible():
            assert a.get_xlabel()


def test_the_depth_picture_shows_the_estimates(plans: list[Plan]) -> None:
    axes = depth_picture(plans).get_axes()[0]
    line = axes.get_lines()[0]
    x, y = line.get_xdata(), line.get_ydata()
    found = predict(plans[0].chosen.at(depth=int(x[-1]), drafts=0), "decode_tok_s")  # type: ignore[index, arg-type, call-overload]
    assert y[-1] == pytest.approx(found.value)  # type: ignore[index, call-overload]


def test_memory_bars_add_up_to_the_ledger(plans: list[Plan]) -> None:
    axes = memory_picture(plans).get_axes()[0]
    ends = [b.get_x() + b.get_width() for b in axes.patches]  # type: ignore[attr-defined]
    assert max(ends) == pytest.approx(max(p.memory.used_bytes for p in plans) / 1e9, rel=1e-3)


def test_files_are_written_and_bad_names_refused(tmp_path: Path) -> None:
    runner = CliRunner()
    out = tmp_path / "depth.svg"
    run = runner.invoke(main, ["plot", "depth", "--device", "m4max", "--out", str(out)])
    assert run.exit_code == 0 and out.read_text().startswith("<?xml")
    for bad in ("depth.gif", str(tmp_path / "none" / "x.png")):
        run = runner.invoke(main, ["plot", "depth", "--device", "m4max", "--out", bad])
        assert run.exit_code == 2 and run.output.count("\n") == 1
    run = runner.invoke(main, ["plot", "all", "--device", "m4max", "--out", str(tmp_path / "all")])
    assert run.exit_code == 0
    run = runner.invoke(main, ["plot", "all", "--device", "m4max", "--out", str(out)])
    assert run.exit_code == 2 and "a file; expected a folder" in run.output
    assert len(list((tmp_path / "all").glob("*.png"))) == len(PICTURES)


def test_all_pictures_leave_out_what_a_model_has_not(tmp_path: Path) -> None:
    args = ["plot", "all", "--device", "m4max", "--model", "llama-2-7b", "--out", str(tmp_path)]
    run = CliRunner().invoke(main, args)
    assert run.exit_code == 0 and "no mtp: none of these machines drafts" in run.output
    assert {p.stem for p in tmp_path.glob("*.png")} == set(PICTURES) - {"mtp"}


def test_costs_without_a_price_are_refused_and_named_beside_others(tmp_path: Path) -> None:
    args = ["plot", "cost", "--out", str(tmp_path / "cost.svg"), "--device", "epyc-9965-1s"]
    run = CliRunner().invoke(main, args)
    assert run.exit_code == 2 and "no price is known for epyc-9965-1s" in run.output
    plans = [make_plan(make_request(d, step_shape())) for d in ("m4max", "epyc-9965-1s")]
    labels = [t.get_text() for t in PICTURES["cost"](plans).legends[0].get_texts()]
    assert ["(no price is known)" in label for label in labels] == [False, True, False]


def test_the_roofline_command_prints_its_phases(tmp_path: Path) -> None:
    out = tmp_path / "roof.png"
    run = CliRunner().invoke(main, ["roofline", "--device", "m4max", "--plot", str(out)])
    assert run.exit_code == 0 and "prefill of 2,048" in run.output and out.stat().st_size > 10_000
