"""Engine files: policies, numbers with sources, and command lines that the engines accept."""

import itertools
import shlex
from pathlib import Path

import pytest

from hwmodel.command import Launch, build_command
from hwmodel.devices import device_names, read_toml
from hwmodel.engines import engine_names, load_engine, parse_engine
from hwmodel.errors import DeviceFileError, RequestError, UnknownNameError
from hwmodel.memory import KV_TYPES
from hwmodel.model import step_shape
from hwmodel.plan import make_plan
from hwmodel.quant import FAMILIES, QUANTS
from hwmodel.request import make_request
from hwmodel.run import Placement

DATA = Path(__file__).parent / "data"
ALL = engine_names()


@pytest.mark.parametrize("name", ALL)
def test_an_engine_is_complete_and_refers_to_things_that_exist(name: str) -> None:
    engine = load_engine(name)
    assert engine.name == name
    assert set(engine.quants) <= set(QUANTS)
    assert set(engine.published) <= set(engine.quants)
    assert set(engine.kv_types) <= set(KV_TYPES)
    assert engine.micro_batch >= 1
    assert set(engine.unsupported) <= set(device_names())
    assert set(engine.fp8_without_rate) <= set(engine.backends)
    for key, quantity in engine.quantities.items():
        assert quantity.source
        if key.startswith("efficiency."):
            _, backend, family = key.split(".")
            assert backend in engine.backends
            assert family in FAMILIES.values()


@pytest.mark.parametrize(
    ("device", "engines"),
    [
        ("v100", "llama.cpp"),
        ("p40", "llama.cpp"),
        ("mi50", "llama.cpp"),
        ("rx7900xtx", "llama.cpp vllm"),
        ("ryzen-ai-max-395", "llama.cpp vllm"),
        ("mi300x", "llama.cpp sglang vllm"),
        ("rtx3090", "llama.cpp sglang vllm"),
    ],
)
def test_a_plan_takes_only_engines_that_support_the_device(device: str, engines: str) -> None:
    asked = make_request(device, step_shape())
    assert [e.name for e in asked.engines] == engines.split()
    for name in {"vllm", "sglang"} - set(engines.split()):
        with pytest.raises(RequestError, match=f"does not support {device}; engines for it"):
            make_request(device, step_shape(), engine=name)


def test_fp8_on_amd_needs_a_device_with_that_arithmetic() -> None:
    vllm = load_engine("vllm")
    able = {
        device: make_request(device, step_shape()).can_load(vllm, "FP8-experts")
        for device in ("rx7900xtx", "ryzen-ai-max-395", "mi250x", "mi300x", "r9700", "rtx3090")
    }
    assert [d for d, can in able.items() if can] == ["mi300x", "r9700", "rtx3090"]
    asked = make_request("mi250x", step_shape(), quant="FP8-experts", engine="vllm")
    assert make_plan(asked).problem.endswith("mi250x: vLLM needs FP8 arithmetic for it")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"machines": ["p40"], "source": "here"}, "unknown key 'unsupported.machines'"),
        ({"devices": ["p40"]}, "'unsupported' has no source"),
        ({"devices": ["p40"], "source": "nowhere"}, "'unsupported' has no source"),
    ],
)
def test_what_an_engine_does_not_support_has_a_source(
    table: dict[str, object], message: str
) -> None:
    raw = read_toml(Path(load_engine("vllm").file)) | {"unsupported": table}
    with pytest.raises(DeviceFileError, match=message):
        parse_engine(raw, "engine.toml")


def test_what_a_plan_may_recommend() -> None:
    assert engine_names(for_plan=True) == ("llama.cpp", "mlx", "sglang", "vllm")
    for name in engine_names(for_plan=True):
        assert load_engine(name).flags["program"]
        assert load_engine(name).published


def test_policies_that_decide_memory() -> None:
    assert load_engine("llama.cpp").sliding_cache == "window"
    assert load_engine("vllm").sliding_cache == "full"
    assert load_engine("vllm").memory_fraction == 0.9
    assert load_engine("llama.cpp").memory_fraction == 1
    assert load_engine("mlx").max_drafts == 0


def test_unknown_engines_and_bad_files_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'lama\.cp'; did you mean llama\.cpp"):
        load_engine("lama.cp")
    raw = read_toml(Path(load_engine("vllm").file))
    for key, value, message in [
        ("sliding_cache", "half", "must be one of window, full"),
        ("splits", ["diagonal"], "split 'diagonal'"),
        ("backends", ["cudda"], "unknown backend"),
        ("surprise", 1, "unknown key 'surprise'"),
        ("schema", 2, "'schema' is 2"),
        ("flags", {"porgram": "x"}, "unknown flag 'porgram'"),
        ("efficiency", {"cuda": {"f16": {"value": 2, "source": "x", "as_of": "y"}}}, "no share"),
        ("memory", {}, "'memory.micro_batch' is missing"),
        ("memory", {"micro_batch": 512}, "has no source"),
    ]:
        with pytest.raises(DeviceFileError, match=message):
            parse_engine({**raw, key: value}, "x.toml")


def options(file: str, program: str = "") -> dict[str, tuple[int, str]]:
    """Option -> (values it takes, choices) as recorded."""
    found: dict[str, tuple[int, str]] = {}
    for line in (DATA / file).read_text().splitlines():
        if not line.startswith("#"):
            cells = line.split("\t")
            if program and cells.pop(0) != program:
                continue
            found[cells[0]] = (int(cells[1]), cells[2] if not program else "")
    return found


def parse(command: str, known: dict[str, tuple[int, str]], words_before: int) -> None:
    """Read a command as the program would; unknown options, values or choices fail."""
    words = shlex.split(command)[words_before:]
    while words:
        option = words.pop(0)
        assert option in known, option
        values, choices = known[option]
        for _ in range(values):
            value = words.pop(0)
            assert not value.startswith("--"), (option, value)
            if "|" in choices:
                assert value in choices.split("|"), (option, value)
            if choices == "N":
                assert value == "all" or int(value) >= 0


LLAMA_CASES = [
    {"drafts": d, "kv_type": kv, "host_layers": h, "count": n, "hosts": m}
    for d, kv, h, (n, m) in itertools.product(
        (0, 1, 3), ("f16", "q8_0"), (0, 12, None), ((1, 1), (4, 1), (2, 2))
    )
]


@pytest.mark.parametrize("case", LLAMA_CASES, ids=str)
def test_llama_server_knows_every_option_of_a_command(case: dict[str, int]) -> None:
    """Against the options in llama.cpp's own source (data/llama_server_flags.tsv)."""
    engine = load_engine("llama.cpp")
    split = "layer" if case["count"] > 1 else "single"
    command = build_command(
        Launch(
            engine, "cuda", "Q4_K_S", 32768, placement=Placement(split=split), micro_batch=4096,
            numa=True, **case,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    assert command.startswith("llama-server --model step3.5_flash_Q4_K_S.gguf --ctx-size 32768")
    parse(command, options("llama_server_flags.tsv"), 1)
    assert ("--spec-type draft-mtp" in command) == bool(case["drafts"])
    assert ("--cpu-moe" in command) == (case["host_layers"] is None)
    assert ("--rpc host2:50052" in command) == (case["hosts"] == 2)


def test_drafts_on_the_processor_do_not_wait_for_polling_threads() -> None:
    for backend, drafts, polls in (("cpu", 2, False), ("cpu", 0, True), ("cuda", 2, True)):
        command = build_command(
            Launch(load_engine("llama.cpp"), backend, "Q4_K_S", 4096, drafts=drafts)
        )
        assert ("--poll 0" not in command) == polls
        parse(command, options("llama_server_flags.tsv"), 1)


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_that_holds_the_mtp_layers_drafts_without_another(inside: bool) -> None:
    """llama-server drafts with the layers of the model itself where no draft model is named."""
    command = build_command(
        Launch(
            load_engine("llama.cpp"), "cpu", "Q4_K_S", 4096, drafts=2, file="own.gguf",
            holds_mtp=inside,
        )
    )  # fmt: skip
    assert "--spec-type draft-mtp --spec-draft-n-max 2" in command
    assert ("--spec-draft-model" in command) != inside


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("split", ["tensor", "expert"])
@pytest.mark.parametrize(("name", "before"), [("vllm", 3), ("sglang", 2)])
def test_server_commands_use_recorded_options(
    name: str, before: int, split: str, hosts: int
) -> None:
    command = build_command(
        Launch(
            load_engine(name), "cuda", "FP8-experts", 65536, count=4, kv_type="fp8", sequences=8,
            placement=Placement(split=split), drafts=3, hosts=hosts,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    assert "stepfun-ai/Step-3.5-Flash-FP8" in command
    parse(command, options("server_flags.tsv", name), before)


def test_the_words_of_a_server_command() -> None:
    launch = Launch(
        load_engine("vllm"), "cuda", "BF16", 32768, count=8, placement=Placement(split="tensor"),
        drafts=1,
    )  # fmt: skip
    words = shlex.split(build_command(launch))
    assert words[:3] == ["vllm", "serve", "stepfun-ai/Step-3.5-Flash"]
    assert words[words.index("--tensor-parallel-size") + 1] == "8"
    config = words[words.index("--speculative-config") + 1]
    assert config == '{"method": "step3p5_mtp", "num_speculative_tokens": 1}'


def test_experts_that_stay_on_disk_are_left_to_the_processor() -> None:
    place = Placement(ssd_share=0.5)
    engine = load_engine("llama.cpp")
    metal = build_command(Launch(engine, "metal", "Q4_K_S", 8192, placement=place))
    cpu = build_command(Launch(engine, "cpu", "Q4_K_S", 8192, placement=place))
    assert "--cpu-moe --load-mode mmap" in metal
    assert "--cpu-moe" not in cpu
    parse(metal, options("llama_server_flags.tsv"), 1)


def test_llama_server_divides_its_context_among_sequences() -> None:
    shared = build_command(Launch(load_engine("llama.cpp"), "cuda", "Q4_K_S", 8192, sequences=4))
    each = build_command(Launch(load_engine("vllm"), "cuda", "BF16", 8192, sequences=4))
    assert "--ctx-size 32768 " in shared
    assert "--parallel 4" in shared
    assert "--max-model-len 8192 " in each
    assert "--max-num-seqs 4" in each
