"""Bytes of the weights: exact for the published files, tensor by tensor."""

import pytest

from hwmodel.catalogue import load_model
from hwmodel.model import shape_of_config, step_shape
from hwmodel.quant import (
    BLOCKS,
    QUANTS,
    bits_per_weight,
    block_bytes,
    closest_quant,
    load_quant,
    role_bytes,
    storage_types,
    weight_bytes,
)
from refimpl.errors import InputError

# Decimal GB of the published files, trunk only unless said (data sheet of the runs).
PUBLISHED = {
    "Q4_K_S": 111.5,
    "IQ4_XS": 105.0,
    "Q3_K_L": 102.5,
    "Q3_K_M": 93.8,
    "IQ3_XXS": 75.8,
    "BF16": 393.9,
}


@pytest.mark.parametrize(("name", "size"), PUBLISHED.items())
def test_sizes_equal_the_published_files(name: str, size: float) -> None:
    assert weight_bytes(step_shape(), load_quant(name)) / 1e9 == pytest.approx(size, rel=0.006)


def test_default_q4_k_s_mixture_reproduces_the_official_file() -> None:
    assert round(weight_bytes(step_shape(), load_quant("Q4_K_S")) / 1e9, 3) == 111.494


def test_fp8_stores_routed_experts_only() -> None:
    shape = step_shape()
    types = storage_types(shape, load_quant("FP8-experts"))
    eights = {t.role for t, s in zip(shape.tensors, types, strict=True) if s == "FP8_BLOCK"}
    assert eights == {"routed"}
    assert weight_bytes(shape, load_quant("FP8-experts"), mtp=True) / 1e9 == pytest.approx(
        208.56, abs=0.01
    )


def test_bytes_by_role_of_the_official_int4_file() -> None:
    """Routed experts 2,983 MB and head 433 MB per token (section 6 of the specification)."""
    found = role_bytes(step_shape(), load_quant("Q4_K_S"))
    assert found["routed"] / 36 / 1e6 == pytest.approx(2983.2, abs=0.1)
    assert found["head"] / 1e6 == pytest.approx(433.1, abs=0.1)
    assert found["attention"] / 1e6 == pytest.approx(2545.0, abs=0.1)
    assert found["shared"] / 1e6 == pytest.approx(372.9, abs=0.1)
    assert found["dense"] / 1e6 == pytest.approx(250.9, abs=0.1)
    assert found["router"] / 1e6 == pytest.approx(198.2, abs=0.1)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q6_K"])
def test_uniform_types_keep_router_and_norms_in_f32(name: str) -> None:
    shape = step_shape()
    for tensor, storage in zip(shape.tensors, storage_types(shape, load_quant(name)), strict=True):
        if tensor.kind in ("norm", "bias", "router"):
            assert storage == "F32"


def test_blocks_are_those_of_ggml() -> None:
    import gguf

    for name, (elements, size) in BLOCKS.items():
        kind = getattr(gguf.GGMLQuantizationType, name, None)
        if kind is not None:
            assert gguf.GGML_QUANT_SIZES[kind] == (elements, size), name


def test_every_quant_has_a_family_and_a_size() -> None:
    shape = load_model("gpt-oss-20b")
    for quant in QUANTS.values():
        assert quant.family
        assert weight_bytes(shape, quant) > 0


def test_part_blocks_are_exact_fractions() -> None:
    assert block_bytes("Q4_K", 128) == 72
    assert bits_per_weight("Q4_K") == 4.5


def test_closest_quant_by_bits() -> None:
    assert closest_quant(4.6).name == "Q4_K_M"
    assert closest_quant(16).name == "BF16"


def test_unknown_quant_offers_the_nearest() -> None:
    with pytest.raises(InputError, match="Q4_K_S"):
        load_quant("Q4_K_SS")


@pytest.mark.parametrize("name", ["Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS"])
def test_mixtures_are_those_that_the_converter_writes(name: str) -> None:
    """One rule each in hwmodel (any model) and refimpl (which writes the files): the same types."""
    from refimpl.checkpoint.mixtures import mixture
    from refimpl.config import published
    from refimpl.inventory import inventory

    config = published().without_mtp()
    chosen = mixture(name.lower(), config)
    types = storage_types(shape_of_config(config), load_quant(name))
    for spec, found in zip(inventory(config), types, strict=True):
        if len(spec.shape) > 1:
            assert chosen(spec) == found, spec.gguf_name
