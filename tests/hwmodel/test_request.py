"""What a user types becomes a request, or one sentence that says what is wrong."""

import pytest

from hwmodel.errors import HwmodelError, RequestError
from hwmodel.model import step_shape
from hwmodel.request import make_request, parse_context

MODEL = step_shape()


def test_a_request_resolves_its_names() -> None:
    r = make_request("RTX 4090", MODEL, quant="fp8", engine="vLLM", context="32K", count=4)
    assert r.device.name == "rtx4090"
    assert r.quant == "FP8-experts"
    assert r.engine is not None
    assert r.engine.name == "vllm"
    assert r.context == 32768


def test_int4_means_what_its_vendor_calls_int4() -> None:
    assert make_request("m4max", MODEL, quant="int4").quant == "Q4_K_S"


@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("128K", 131072), ("256k", 262144), (" 1 ", 1), (7, 7)]
)
def test_contexts(text: str | int, tokens: int) -> None:
    assert parse_context(text, MODEL) == tokens


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1.5", "9" * 30, "262145", "257K", "1M"])
def test_contexts_that_cannot_be(text: str) -> None:
    with pytest.raises(RequestError, match="--context is"):
        parse_context(text, MODEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "foo"}, "unknown device 'foo'; see 'hwmodel devices list'"),
        ({"device": "h100", "quant": "zzz"}, "unknown quant type 'zzz'; expected a type such as"),
        ({"device": "m4maxx"}, "unknown device 'm4maxx'; did you mean m4max"),
        ({"device": "h100", "engine": "vlm"}, "unknown engine 'vlm'; did you mean"),
        ({"device": "h100", "quant": "Q4_K_SS"}, "unknown quant type 'Q4_K_SS'; did you mean"),
        ({"device": "m4max", "engine": "vllm"}, "runs on cuda, rocm, m4max offers metal"),
        ({"device": "h100", "engine": "ollama"}, "a plan cannot be made for Ollama"),
        ({"device": "h100", "engine": "vllm", "quant": "Q4_K_S"}, "vLLM cannot load Q4_K_S"),
        ({"device": "h100", "context": "300K"}, "expected 1 to 262144"),
        ({"device": "h100", "count": 0}, "--count is 0, expected 1 to 1024"),
        ({"device": "h100", "count": 1000000}, "--count is 1000000, expected 1 to 1024"),
        ({"device": "h100", "count": -3}, "--count is -3"),
        ({"device": "h100", "concurrency": 10**9}, "--concurrency is 1000000000"),
        ({"device": "rtx4090", "ram_gb": float("nan")}, "--ram is nan"),
        ({"device": "rtx4090", "ram_gb": -4.0}, "--ram is -4"),
        ({"device": "laptop-32gb", "ram_gb": 4.0}, "expected at least 8"),
        ({"device": "h100", "min_decode": float("inf")}, "--min-decode is inf"),
        ({"device": "b300", "max_price": 5000.0}, "no price is known for b300"),
        ({"device": "rtx4090", "ram_gb": 64.0, "host": "h100"}, "is no processor"),
        ({"device": "rtx4090", "host": "desktop-ddr5"}, "--host needs --ram"),
    ],
)
def test_mistakes_get_a_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(HwmodelError, match=message) as caught:
        make_request(model=MODEL, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_ram_is_a_processors_own_memory_and_a_gpus_helper() -> None:
    laptop = make_request("laptop-32gb", MODEL, ram_gb=64)
    assert laptop.device.memory_bytes == 64 * 2**30
    assert laptop.host is None
    card = make_request("rtx4090", MODEL, ram_gb=128)
    assert card.device.memory_bytes < 30e9
    assert card.host is not None
    assert card.host.name == "desktop-ddr5"


def test_a_mac_comes_in_several_sizes() -> None:
    small = make_request("m4max", MODEL, ram_gb=64).device
    assert small.usable_bytes == 48 * 2**30
    assert small.raised_usable_bytes == 56 * 2**30
    assert small.raise_how == "sudo sysctl iogpu.wired_limit_mb=57344"
    assert "64 GB" in small.title
    assert make_request("m4max", MODEL, ram_gb=128).device == make_request("m4max", MODEL).device
