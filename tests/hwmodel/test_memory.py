"""The memory ledger: KV cache under each engine's policy, and what is left."""

import dataclasses

import pytest

from hwmodel.devices import load_device
from hwmodel.engines import load_engine
from hwmodel.memory import kv_bytes, kv_rows, kv_value_bytes, ledger, stated_scale
from hwmodel.model import step_shape
from hwmodel.quant import load_quant
from hwmodel.run import DeviceCount, EngineChoice, RunConfig, Workload
from refimpl.errors import InputError


def a_run(device: str = "m4max", engine: str = "llama.cpp", quant: str = "Q4_K_S") -> RunConfig:
    return RunConfig(
        model=step_shape(),
        quant=load_quant(quant),
        devices=(DeviceCount(load_device(device)),),
        engine=EngineChoice(load_engine(engine)),
    )


@pytest.mark.parametrize(
    ("context", "size"), [(8192, 471_859_200), (32768, 1_679_818_752), (262144, 12_954_107_904)]
)
def test_kv_of_the_published_table(context: int, size: int) -> None:
    """Full layers grow, sliding ones stop at 512 rows (section 6 of the specification)."""
    assert kv_bytes(step_shape(), context, "f16", "window", micro_batch=0) == size


def test_engines_that_reserve_full_length_for_sliding_layers_pay_for_it() -> None:
    capped = kv_bytes(step_shape(), 131072, sliding_cache="window", micro_batch=512)
    full = kv_bytes(step_shape(), 131072, sliding_cache="full")
    assert full == 45 * 4096 * 131072
    assert full / capped > 3


def test_sliding_layers_hold_window_and_micro_batch() -> None:
    assert kv_rows(512, 100_000, 1024, "window") == 1536
    assert kv_rows(512, 300, 1024, "window") == 300
    assert kv_rows(None, 100_000, 1024, "window") == 100_000


def test_kv_types() -> None:
    assert kv_value_bytes("f16") == 2
    assert kv_value_bytes("q8_0") == 34 / 32
    with pytest.raises(InputError, match="f16"):
        kv_value_bytes("int3")


def test_the_int4_file_needs_the_raised_limit_on_a_128_gb_mac() -> None:
    found = ledger(a_run(), 32768)
    assert not found.fits
    assert found.raised_margin_bytes > 0
    assert found.weights_bytes / 1e9 == pytest.approx(111.494, abs=0.001)
    assert found.used_bytes == pytest.approx(found.usable_bytes - found.margin_bytes)


def test_memory_grows_with_context_and_drafts() -> None:
    run = a_run()
    with_drafts = dataclasses.replace(run, workload=Workload(drafts=3))
    assert ledger(run, 65536).used_bytes > ledger(run, 32768).used_bytes
    assert ledger(with_drafts, 32768).mtp_bytes > ledger(run, 32768).mtp_bytes == 0


def test_a_stated_size_counts_where_it_differs_from_the_type() -> None:
    """212.5 GB for FP8 carry a vision tower that text never reads; 98 GB of IQ4_XS do not."""
    vision = dataclasses.replace(a_run(quant="FP8-experts"), weights_bytes=212.5e9)
    other_mix = dataclasses.replace(a_run(quant="IQ4_XS"), weights_bytes=98e9)
    assert stated_scale(vision) == 1
    assert stated_scale(other_mix) == pytest.approx(98 / 105.48, rel=1e-3)
