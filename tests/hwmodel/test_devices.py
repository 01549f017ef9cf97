"""Device files: every number has a source, and a file that lacks one is refused."""

from pathlib import Path

import pytest

from hwmodel.device_file import DEFAULT_API, DEVICE_CLASSES
from hwmodel.devices import device_names, load_device, parse_device, read_device, user_folder
from hwmodel.errors import DeviceFileError, UnknownNameError
from hwmodel.names import canonical

REQUIRED = [
    "h100", "h100-pcie", "rtx4090", "m4max", "m4max-32core", "dgx-spark", "h200", "b200", "a100",
    "rtx5090", "rtx3090", "rtx-pro-6000", "m3-ultra", "m5-max", "ryzen-ai-max-395",
    "server-ddr5-12ch", "desktop-ddr5",
]  # fmt: skip
SHIPPED = [name for name in device_names() if name != "local"]
EXAMPLE = """
schema = 1
name = "My-Box"
class = "nvidia-consumer"
api = ["cuda"]

[sources]
sheet = "https://example.com/sheet"

[memory]
total_bytes = { value = 24e9, source = "sheet", as_of = "2026-03" }

[bandwidth]
peak_bytes_per_s = { value = 1e12, source = "unverified", as_of = "2026-03" }
"""


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def file(text: str, name: str = "my-box.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return file


def test_a_file_without_backends_has_those_of_its_class(write) -> None:  # type: ignore[no-untyped-def]
    assert read_device(write(EXAMPLE.replace('api = ["cuda"]\n', ""))).api == ("cuda", "vulkan")
    assert read_device(write(EXAMPLE)).api == ("cuda",)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_backends_of_a_class_run_on_every_shipped_device_of_it(name: str) -> None:
    device = load_device(name)
    assert device.api[0] == DEFAULT_API[device.device_class][0]


def test_the_devices_people_ask_for_are_there() -> None:
    assert set(REQUIRED) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_device_is_named_as_its_file_and_known_to_the_registry(name: str) -> None:
    device = load_device(name)
    found = canonical("device", name)
    assert device.name == name
    assert found is not None
    assert found.id == name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_device_has_plausible_numbers_with_sources(name: str) -> None:
    device = load_device(name)
    assert device.device_class in DEVICE_CLASSES
    assert 0 < device.usable_bytes <= device.memory_bytes
    assert 4e10 < device.bandwidth_bytes_per_s < 1e13
    if device.measured_bandwidth_bytes_per_s is not None:
        assert device.measured_bandwidth_bytes_per_s < device.bandwidth_bytes_per_s
    assert device.flop_per_s
    assert device.api
    for quantity in device.quantities.values():
        assert quantity.source
        assert quantity.as_of


def test_a_raised_limit_says_how() -> None:
    m4max = load_device("m4max")
    assert m4max.raised_usable_bytes == 122880 * 2**20
    assert m4max.raise_how == "sudo sysctl iogpu.wired_limit_mb=122880"
    assert m4max.usable_bytes == 0.75 * m4max.memory_bytes
    for name in SHIPPED:
        device = load_device(name)
        if device.raised_usable_bytes is not None:
            assert device.raised_usable_bytes > device.usable_bytes
            assert device.raise_how


def test_datasheet_figures_that_anyone_can_look_up() -> None:
    assert load_device("h100").bandwidth_bytes_per_s == 3.35e12
    assert load_device("h100-pcie").bandwidth_bytes_per_s == 2.0e12
    assert load_device("rtx4090").bandwidth_bytes_per_s == 1.008e12
    assert load_device("m4max").bandwidth_bytes_per_s == 546e9
    assert load_device("m4max-32core").bandwidth_bytes_per_s == 410e9
    assert load_device("dgx-spark").bandwidth_bytes_per_s == 273e9
    assert load_device("h100").flop_per_s["bf16"] == 989e12


# cards whose integer units engines do not multiply with: none beside the 16-bit ones, or very few
FEW_INTEGERS = ("p40", "v100", "b300")
NVIDIA = [n for n in SHIPPED if load_device(n).device_class.startswith("nvidia")]


@pytest.mark.parametrize("name", [n for n in NVIDIA if n not in FEW_INTEGERS])
def test_integers_run_at_a_fixed_ratio_to_16_bits_on_nvidia(name: str) -> None:
    """Twice, or four times where sums in fp32 halve fp16: a card without its rate would be
    predicted slower in llama.cpp than a lesser one that states it."""
    device = load_device(name)
    halved = "GeForce" in device.title or name == "dgx-spark"
    ratio = device.flop_per_s["int8"] / device.flop_per_s["fp16"]
    assert ratio == pytest.approx(4 if halved else 2, rel=0.02)


def test_devices_alone_in_their_machine_are_linked_by_the_network() -> None:
    spark, h100 = load_device("dgx-spark"), load_device("h100")
    assert (spark.link_kind, spark.link_bytes_per_s) == ("RoCE", 25e9)
    assert (h100.link_kind, h100.link_bytes_per_s) == ("NVLink", 450e9)


def test_a_user_adds_a_file_by_path_or_in_a_folder(
    write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    path = write(EXAMPLE)
    by_path = load_device(path)
    assert by_path.name == "my-box"
    assert by_path.quantities["memory.total_bytes"].source == "https://example.com/sheet"
    assert by_path.unverified() == ("bandwidth.peak_bytes_per_s",)
    monkeypatch.setenv("HWMODEL_DEVICES", str(tmp_path))
    assert load_device("MY-BOX").name == "my-box"
    assert "my-box" in device_names()


def test_a_user_without_a_home_has_the_shipped_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable names one, and the user's number has no account."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "HWMODEL_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", unknown)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    assert user_folder() == Path(".config/hwmodel/devices")
    assert load_device("h100").name == "h100"


def test_local_describes_this_host_and_prefers_the_probe(
    write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setenv("HWMODEL_DEVICES", str(tmp_path))
    told = load_device("local")
    assert told.device_class == "cpu"
    assert "bandwidth.peak_bytes_per_s" in told.unverified()
    write(EXAMPLE.replace("My-Box", "local"), "local.toml")
    assert load_device("local").memory_bytes == 24e9


MEASURED = """
measured_bytes_per_s = { value = 5e10, low = 4.9e10, high = 5.1e10, source = "s", as_of = "2026" }
[bandwidth.by_threads]
1 = { value = 3e10, source = "s", as_of = "2026" }
2 = { value = 5e10, source = "s", as_of = "2026" }
"""


def test_measured_figures_stand_where_no_peak_is_known(write) -> None:  # type: ignore[no-untyped-def]
    peak = 'peak_bytes_per_s = { value = 1e12, source = "unverified", as_of = "2026-03" }'
    assert peak in EXAMPLE
    both = load_device(write(EXAMPLE.replace(peak, peak + MEASURED)))
    assert (both.bandwidth_bytes_per_s, both.measured_bandwidth_bytes_per_s) == (1e12, 5e10)
    assert not both.peak_is_unknown
    alone = load_device(write(EXAMPLE.replace(peak, MEASURED)))
    assert alone.peak_is_unknown and alone.bandwidth_bytes_per_s == 5e10
    assert alone.bandwidth_by_threads == {1: 3e10, 2: 5e10}
    read = alone.quantities["bandwidth.measured_bytes_per_s"]
    assert (read.low, read.high) == (4.9e10, 5.1e10)


def test_measured_arithmetic_never_stands_beside_a_peak(write) -> None:  # type: ignore[no-untyped-def]
    measured = '[flop]\nmeasured_fp32_per_s = { value = 2e11, source = "s", as_of = "2026" }\n'
    peak = 'bf16_per_s = { value = 9e11, source = "s", as_of = "2026" }\n'
    assert load_device(write(EXAMPLE + measured)).flop_per_s == {"fp32": 2e11}
    assert load_device(write(EXAMPLE + measured + peak)).flop_per_s == {"bf16": 9e11}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("low = 6e10", "not between its 'low' and 'high'"),
        ("high = -1", "'bandwidth.measured_bytes_per_s.high' is -1"),
        ("low = true", "'bandwidth.measured_bytes_per_s.low' has value True"),
    ],
)
def test_quartiles_must_enclose_the_number(write, line: str, message: str) -> None:  # type: ignore[no-untyped-def]
    entry = f'measured_bytes_per_s = {{ value = 5e10, {line}, source = "s", as_of = "2026" }}\n'
    with pytest.raises(DeviceFileError, match=message):
        load_device(write(EXAMPLE.replace("[bandwidth]", "[bandwidth]\n" + entry)))


def test_threads_are_counted_in_whole_numbers(write) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DeviceFileError, match=r"by_threads\.many': expected a number of threads"):
        load_device(write(EXAMPLE + MEASURED[MEASURED.index("[") :].replace("2 =", "many =")))


def test_unknown_devices_are_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownNameError, match="'m4maxx'; did you mean m4max"):
        load_device("m4maxx")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (', source = "sheet"', "", "'memory.total_bytes' has no source"),
        (', as_of = "2026-03" }', " }", "has no as_of"),
        ("{ value = 24e9, source", "{ value = true, source", "expected a number"),
        ("value = 24e9", "value = -1", "expected a finite number"),
        ("value = 24e9", "value = inf", "expected a finite number"),
        ("value = 24e9", "value = 24", "expected bytes"),
        ("value = 1e12", "value = 1000", "expected bytes/s"),
        (
            'total_bytes = { value = 24e9, source = "sheet", as_of = "2026-03" }',
            "total_bytes = 24e9",
            "has no source, expected memory.total_bytes = {",
        ),
        ("total_bytes =", "totl_bytes =", "unknown key 'memory.totl_bytes'"),
        ("[bandwidth]", "[bandwith]", "unknown key 'bandwith'"),
        ('class = "nvidia-consumer"', 'class = "toaster"', "'class' is 'toaster'"),
        ('api = ["cuda"]', 'api = ["cudda"]', "unknown backend 'cudda'"),
        ("schema = 1", "schema = 9", "'schema' is 9"),
        ("schema = 1\n", "", "'schema' is missing, expected 1"),
        ('name = "My-Box"', "name = 3", "'name' is 3"),
        ('as_of = "2026-03" }', 'as_of = "2026-03", surce = "x" }', "unknown entry 'surce'"),
        ("[memory]", "[memory", "not a TOML file"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(
    write,
    old: str,
    new: str,
    message: str,  # type: ignore[no-untyped-def]
) -> None:
    path = write(EXAMPLE.replace(old, new, 1))
    with pytest.raises(DeviceFileError) as caught:
        read_device(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceFileError, match="cannot be read"):
        load_device(tmp_path / "none.toml")
    with pytest.raises(DeviceFileError, match=r"'bandwidth\.peak_bytes_per_s' is missing"):
        total = {"value": 24e9, "source": "sheet", "as_of": "2026"}
        parse_device(
            {"schema": 1, "name": "x", "class": "cpu", "memory": {"total_bytes": total}}, "x.toml"
        )


def test_a_raised_limit_without_a_setting_is_refused(write) -> None:  # type: ignore[no-untyped-def]
    raised = 'raised_usable_bytes = { value = 23e9, source = "sheet", as_of = "2026" }\n\n[band'
    path = write(EXAMPLE.replace("\n[band", raised, 1))
    with pytest.raises(DeviceFileError, match=r"needs 'memory\.raise_how'"):
        read_device(path)
