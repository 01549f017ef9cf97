"""The registry of names: every published spelling resolves, unknown ones are reported."""

import csv
from pathlib import Path

import pytest

from bench.runs import published_runs_path
from hwmodel import names
from hwmodel.catalogue import load_model
from hwmodel.devices import device_names
from hwmodel.engines import engine_names
from hwmodel.quant import QUANTS

NOT_ONE_DEVICE = {
    "dgx-spark or m4max (table not attributable)",
    "Apple Silicon (unstated)",
    "unknown NVIDIA GPU + CPU RAM",
    "StepFun API (Hopper, unknown count)",
    "mixed 5090+2x4090+3090+A6000",
}


def published(column: str) -> list[str]:
    with Path(published_runs_path()).open(encoding="utf-8") as file:
        return sorted({row[column] for row in csv.DictReader(file)})


@pytest.mark.parametrize("kind", ["engine", "quant", "model"])
def test_every_published_spelling_resolves(kind: names.Kind) -> None:
    unknown = [text for text in published(kind) if names.canonical(kind, text) is None]
    assert unknown == []


def test_every_published_device_resolves_or_is_said_to_be_no_single_device() -> None:
    unknown = {text for text in published("device") if names.canonical("device", text) is None}
    assert unknown == NOT_ONE_DEVICE
    for text in unknown:
        assert "is not one thing" in names.why_unknown("device", text)


def test_canonical_names_are_those_of_the_files_and_tables() -> None:
    assert set(names.ids("device")) == set(device_names()) - {"local"}
    assert set(names.ids("engine")) == set(engine_names())
    assert set(names.ids("quant")) == set(QUANTS)


@pytest.mark.parametrize("model", published("model"))
def test_a_known_model_has_a_shape_or_is_predicted_from_its_totals(model: str) -> None:
    name = names.canonical("model", model)
    assert name is not None
    if name.id.startswith(("step", "gpt-oss", "llama")):
        assert load_model(name.id).parameters > 1e9


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("device", "RTX 4090", "rtx4090"),
        ("device", "NVIDIA GeForce RTX 4090", "rtx4090"),
        ("device", "8x H100", "h100"),
        ("device", "H100 SXM5", "h100"),
        ("device", "M4MAX", "m4max"),
        ("device", "GB10", "dgx-spark"),
        ("device", "NVIDIA H100 80GB HBM3", "h100"),
        ("device", "8xH100", "h100"),
        ("device", "2x3090", "rtx3090"),
        ("device", "H200 x8", "h200"),
        ("device", "Mac Studio M2 Ultra", "m2-ultra"),
        ("device", "Ryzen AI Max+ 395 128GB", "ryzen-ai-max-395"),
        ("device", "RTX PRO 6000 Max-Q", "rtx-pro-6000"),
        ("device", "Strix Halo", "ryzen-ai-max-395"),
        ("quant", "q4ks", "Q4_K_S"),
        ("quant", "UD-IQ3_XXS", "IQ3_XXS"),
        ("quant", "AWQ", "INT4"),
        ("quant", "4-bit (MLX)", "MLX-4bit"),
        ("engine", "llama.cpp PR12345", "llama.cpp"),
        ("engine", "llama.cpp b9999 (Vulkan)", "llama.cpp"),
        ("engine", "vLLM 0.19.1", "vllm"),
        ("engine", "SGLang nightly", "sglang"),
        ("backend", "HIP", "rocm"),
        ("model", "stepfun-ai/Step-3.5-Flash-FP8", "step-3.5-flash"),
        ("model", "openai/gpt-oss-120b", "gpt-oss-120b"),
        ("quantity", "tg", "decode_tok_s"),
        ("quantity", "Prompt processing", "prefill_tok_s"),
    ],
)
def test_spellings_people_use(kind: names.Kind, text: str, expected: str) -> None:
    found = names.canonical(kind, text)
    assert found is not None
    assert found.id == expected


def test_an_engine_spelling_gives_its_backend() -> None:
    assert names.canonical("engine", "llama.cpp (Metal)").backend == "metal"  # type: ignore[union-attr]
    assert names.canonical("engine", "llama.cpp CUDA").backend == "cuda"  # type: ignore[union-attr]
    assert names.canonical("engine", "mlx").backend == "metal"  # type: ignore[union-attr]
    assert names.canonical("engine", "llama.cpp").backend == ""  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", ["Q4-class (not stated)", "int4 (GGUF)", "4-bit (unspecified)", "IQ4_XS-class", "FP4"]
)
def test_a_class_of_types_is_never_passed_off_as_a_type(text: str) -> None:
    found = names.canonical("quant", text)
    assert found is not None
    assert not found.exact
    assert found.note


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("device", "rtx9080"),
        ("device", ""),
        ("device", "x" * 500),
        ("device", "RTX 4090 Laptop"),
        ("device", "3090 and 4090"),
        ("engine", "frobnicator"),
        ("quant", "Q9_Z"),
        ("model", "gpt-7"),
        ("quantity", "joules"),
    ],
)
def test_the_unknown_is_not_mapped(kind: names.Kind, text: str) -> None:
    assert names.canonical(kind, text) is None
    assert text[:20] in names.why_unknown(kind, text)


def test_near_names_are_offered() -> None:
    assert names.suggest("device", "m4maxx")[0] == "m4max"
    assert names.suggest("device", "rtx5091")[0] == "rtx5090"
    assert names.suggest("engine", "lama.cpp")[0] == "llama.cpp"
    assert names.suggest("quant", "Q4_K_SS")[0] == "Q4_K_S"
    assert names.suggest("device", "my-bx", ["my-box"])[0] == "my-box"


def test_every_alias_leads_to_one_name_only() -> None:
    """No spelling is claimed twice; `setdefault` would hide the second claim."""
    from hwmodel import names_data as data

    tables = [data.ENGINES, data.BACKENDS, data.DEVICES, data.MODELS, data.QUANTITIES, data.QUANTS]
    for table in tables:
        claims: dict[str, set[str]] = {}
        for name, aliases in table.items():
            for text in (name, *aliases):
                claims.setdefault(names.key(text), set()).add(name)
        assert {k: v for k, v in claims.items() if len(v) > 1} == {}


@pytest.mark.parametrize(
    ("kind", "text", "found", "exact"),
    [
        ("device", "Intel Arc B580 x8", "arc-b580", True),
        ("device", "2x H100 NVL", "h100", False),
        ("device", "NVIDIA A100-SXM4-40GB", "a100", False),
        ("device", "A100-SXM4-80GB", "a100", True),
        ("device", "GB300 NVL72", "b300", True),
        ("device", "AMD Ryzen 9 9950X", "desktop-ddr5", True),
        ("quant", "IQ4_KSS", "IQ4_XS", False),
        ("quant", "AWQ 4-bit", "INT4", False),
        ("model", "stepfun-ai/Step-3.5-Flash-Base", "step-3.5-flash", True),
    ],
)
def test_spellings_that_strangers_use(kind: names.Kind, text: str, found: str, exact: bool) -> None:
    name = names.canonical(kind, text)
    assert name is not None
    assert (name.id, name.exact) == (found, exact)


def test_nothing_stated_is_not_called_unknown() -> None:
    assert names.why_unknown("device", " ") == "no device is stated"
