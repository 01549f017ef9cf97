"""`bench probe`: figures with spread, busy machines told so, a file that a plan can read."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench import probe as probe_module
from bench.cli import main
from bench.probe import Figure, HostProbe, beyond_caches, judge, last_level_bytes, thread_counts
from bench.probe_file import device_table, toml_text, write_device
from hwmodel.devices import load_device
from refimpl.engine.probe_compute import kernel_throughput, waiting_times
from refimpl.engine.probe_disk import read_disk
from refimpl.engine.simd import choose_simd
from refimpl.engine.threads import Team
from refimpl.errors import InputError

MEMORY = Figure("bandwidth.measured_bytes_per_s", (4.9e10, 5e10, 5.1e10), "2 threads; 1 GB")
FIGURES = (
    MEMORY,
    Figure("bandwidth.by_threads.1", (3e10, 3e10), "1 thread"),
    Figure("bandwidth.by_threads.2", (5e10, 5e10), "2 threads"),
    Figure("bandwidth.cache_bytes_per_s", (1.9e11, 2e11, 2.1e11), "2 threads", judged=False),
    Figure("flop.measured_fp32_per_s", (2.6e11,), "BLAS"),
    Figure("overhead.barrier_s", (1.5e-7, 2e-7, 9e-7), "a barrier", judged=False),
    Figure("disk.random_read_bytes_per_s", (1e9, 2e9, 3e9), "cold", judged=False),
)


def found(*doubts: str) -> HostProbe:
    return HostProbe(FIGURES, doubts, (), 2, 1.8e9, 12.0, cache_bytes=32 << 20)


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, ["probe", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes the probe find `found(doubts)`; gives the folder of device files."""

    def use(*doubts: str) -> Path:
        monkeypatch.setenv("HWMODEL_DEVICES", str(tmp_path / "devices"))
        monkeypatch.setattr(probe_module, "probe_host", lambda *_: found(*doubts))
        return tmp_path / "devices"

    return use


def test_a_figure_is_a_median_with_quartiles() -> None:
    f = Figure("disk.read_bytes_per_s", (1.0, 2.0, 3.0, 4.0, 100.0), "")
    assert (f.value, f.quartiles, f.spread) == (3.0, (2.0, 4.0), pytest.approx(2 / 3))
    assert Figure("x", (7.0,), "").quartiles == (7.0, 7.0)


def test_memory_is_read_with_one_to_all_threads_and_beyond_every_cache() -> None:
    assert thread_counts(1) == (1,)
    assert thread_counts(6) == (1, 2, 3, 4, 5, 6)
    assert thread_counts(96) == (*range(1, 9), 16, 32, 64, 96)
    assert beyond_caches(32 << 20, 64 << 30, 2) == 1 << 30
    assert beyond_caches(384 << 20, 64 << 30, 2) == 8 * 384 << 20
    assert beyond_caches(0, 2 << 30, 2) == 512 << 20  # no more than a quarter of what is free
    assert last_level_bytes() >= 0


@pytest.mark.parametrize(
    ("before", "after", "others", "samples", "said"),
    [
        (5e10, 5.2e10, 0.1, (9e9, 1e10, 1.1e10), ""),
        (5e10, 4.4e10, 0.1, (1e10,), "memory was read at 50.0 GB/s at the beginning and at 44.0"),
        (5e10, 5e10, 1.5, (1e10,), "other programs were using 1.5 cores"),
        (5e10, 5e10, 0.1, (6e9, 1e10, 1.4e10), "scatters by 40%"),
    ],
)
def test_a_busy_machine_is_recognised(
    before: float, after: float, others: float, samples: tuple[float, ...], said: str
) -> None:
    doubts = judge([Figure("bandwidth.by_threads.2", samples, "")], before, after, others)
    assert len(doubts) == bool(said)
    assert said in "".join(doubts)


def test_the_disk_alone_makes_no_machine_busy() -> None:
    assert judge(FIGURES, 5e10, 5e10, 0.0) == []


def test_the_file_is_a_device_without_a_peak(probed: Callable[..., Path]) -> None:
    path = probed() / "local.toml"
    write_device(found(), path)
    device = load_device("local")
    assert device.peak_is_unknown and device.measured_bandwidth_bytes_per_s == 5e10
    assert device.bandwidth_by_threads == {1: 3e10, 2: 5e10}
    assert device.quantities["cpu.cache_bytes"].value == pytest.approx(32 << 20)
    assert device.quantities["bandwidth.cache_bytes_per_s"].value == 2e11
    assert device.flop_per_s == {"fp32": 2.6e11} and device.disk_bytes_per_s is None
    read = device.quantities["disk.random_read_bytes_per_s"]
    assert (read.value, read.low, read.high) == (2e9, 1.5e9, 2.5e9)
    assert read.source.startswith("measured by bench probe, ") and read.as_of == "2027-01-15"
    assert "quartiles of 3 samples" in read.note
    assert not device.unverified()
    assert "memory is read at 50.0 GB/s (49.5 to 50.5) by 2 threads" in device.notes


def test_the_text_is_toml_whatever_the_machine_is_called() -> None:
    table = device_table(found())
    table["title"] = 'a "quoted" \\ name\n\x7f é'
    again = tomllib.loads(toml_text(table))
    assert again["title"] == 'a "quoted" \\ name\n? é'
    assert again["bandwidth"]["by_threads"]["2"]["value"] == 5e10


def test_the_command_writes_the_file_and_a_plan_says_how_it_was_measured(
    probed: Callable[..., Path], tmp_path: Path
) -> None:
    probed()
    result = run("--no-disk")
    assert result.exit_code == 0
    assert "50 GB/s" in result.stdout and "49.5 to 50.5" in result.stdout
    from hwmodel.cli import main as hwmodel

    plan = CliRunner().invoke(hwmodel, ["plan", "--device", "local"])
    assert plan.exit_code in (0, 1)
    assert "measured by bench probe on 2027-01-15" in plan.stdout
    shown = CliRunner().invoke(hwmodel, ["devices", "show", "local"]).stdout
    assert "4.95e+10 to 5.05e+10" in shown
    run("--no-disk", "--out", str(tmp_path / "box.toml"))
    assert load_device(tmp_path / "box.toml").bandwidth_by_threads == {1: 3e10, 2: 5e10}


def test_a_model_that_stays_in_the_cache_is_planned_there(probed: Callable[..., Path]) -> None:
    probed()
    assert run("--no-disk").exit_code == 0
    from hwmodel.cli import main as hwmodel
    from refimpl.backends import model_path

    words = ["plan", "--device", "local", "--context", "1024", "--engine", "llama.cpp"]
    plan = CliRunner().invoke(hwmodel, [*words, "--model", str(model_path("mini"))])
    assert plan.exit_code == 0, plan.output
    said = "stays in the processor's last cache (11 of 34 MB), which is read at 200 GB/s"
    assert said in " ".join(plan.stdout.split())


def test_the_cache_is_read_faster_than_memory_where_one_is_known() -> None:
    assert probe_module._cache(1, 0) == []
    (figure,) = probe_module._cache(1, 32 << 20)
    assert figure.key == "bandwidth.cache_bytes_per_s" and min(figure.samples) > 0


def test_a_busy_machine_gets_no_file_unless_forced(probed: Callable[..., Path]) -> None:
    folder = probed("memory was read at 3 GB/s")
    result = run("--no-disk")
    assert result.exit_code == 1
    assert "busy: memory was read at 3 GB/s" in result.stderr
    assert "no device file was written" in result.stderr
    assert not folder.exists()
    assert run("--no-disk", "--force").exit_code == 0
    assert "the machine was busy: memory was read at 3" in load_device("local").notes


def test_json_has_every_sample(probed: Callable[..., Path]) -> None:
    probed()
    value = json.loads(run("--no-disk", "--json").stdout)
    assert value["figures"]["bandwidth.measured_bytes_per_s"]["samples"] == [4.9e10, 5e10, 5.1e10]
    assert value["doubts"] == [] and value["threads"] == 2


def test_bad_input_and_help(probed: Callable[..., Path]) -> None:
    probed()
    missing = run("--disk", "/nowhere/at/all")
    assert missing.exit_code == 2 and "no such folder" in missing.stderr
    assert run("--threads", "0").exit_code == 2
    assert "bench probe --disk /models" in run("--help").output


def test_kernels_and_barriers_are_timed() -> None:
    team = Team(2)
    speeds = kernel_throughput(team, "bf16", 2)
    assert speeds is not None and len(speeds) == 2 and min(speeds) > 0
    integers = kernel_throughput(team, "int8", 1)
    assert (integers is not None) == choose_simd().integer
    launches, barriers = waiting_times(team, 2)
    assert min(launches) > 0 and min(barriers) > 0
    team.close()


def test_the_disk_is_read_in_four_ways_and_left_as_it_was(tmp_path: Path) -> None:
    speeds = read_disk(tmp_path, readers=2, size_bytes=64 << 20)
    assert speeds.size_bytes == 64 << 20
    for samples in (speeds.warm_sequential, speeds.warm_random):
        assert samples and min(samples) > 0
    assert bool(speeds.sequential) == bool(speeds.random)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="GB are free, the disk probe needs"):
        read_disk(tmp_path, 1, 1 << 50)


def test_threads_have_left_before_what_they_waited_for_is_freed() -> None:
    """A probe's counter was once freed while a thread still looked at it, which then never came."""
    for _ in range(25):
        team = Team(2)
        kernel_throughput(team, "bf16", 1)
        waiting_times(team, 1)
        team.close()
        team.close()
