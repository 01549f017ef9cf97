"""State files: going on from a saved prompt changes no bit, and a bad file gets a sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from refimpl.backend import Backend
from refimpl.checkpoint import fingerprint as fingerprints
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.fingerprint import fingerprint
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.cli import main
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.sampling import GREEDY, SamplingParams
from refimpl.decoding.state import MAGIC, SavedPrompt, check_state_output, read_state, save_state
from refimpl.engine.model import EngineModel
from refimpl.errors import InputError, RefimplError
from refimpl.reference.model import ReferenceModel

PROMPT = [int(i) for i in np.random.default_rng(3).integers(0, 320, 90)]
SAVED = 48
CHUNK = 16  # a divisor of SAVED, so that the reference forms the same products either way
BACKENDS = {
    "reference": lambda source: ReferenceModel(source, "float32"),
    "reference-bf16": lambda source: ReferenceModel(source, "bf16"),
    "engine": lambda source: EngineModel(source, threads=2),
    "engine-q8_0": lambda source: EngineModel(source, threads=1, kv_type="q8_0"),
    "engine-f32": lambda source: EngineModel(source, threads=1, kv_type="f32", micro_batch=16),
    "engine-exact": lambda source: EngineModel(source, threads=1, exact=True),
}


@pytest.fixture(scope="module")
def gguf(tiny_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("state") / "tiny_a.gguf"
    convert(tiny_dir("tiny_a"), out, "q8_0")
    return out


@pytest.fixture(scope="module")
def backend(gguf: Path) -> Callable[[str], Any]:
    """A backend by name over a tiny checkpoint with three MTP layers and windows of 8 or so."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = BACKENDS[name](open_checkpoint(gguf))
        return made[name]

    return get


@pytest.fixture(scope="module")
def state(backend: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The state file of a backend after the first SAVED tokens of PROMPT."""
    root, made = tmp_path_factory.mktemp("states"), {}

    def get(name: str, chunk: int = CHUNK) -> Path:
        path: Path = root / f"{name}-{chunk}.state"
        if (name, chunk) not in made:
            made[name, chunk] = run(backend(name), PROMPT[:SAVED], n=0, save=path, chunk=chunk)
        return path

    return get


def run(backend: Backend, prompt: list[int], *, n: int = 12, mtp: int = 0,
        sampling: SamplingParams = GREEDY, saved: SavedPrompt | None = None,
        save: Path | None = None, chunk: int = CHUNK) -> Any:  # fmt: skip
    def keep(cache: Any, step: Any) -> None:
        assert save is not None
        save_state(save, backend, cache, step)

    options = GenerateOptions(n, sampling, mtp, stop_tokens=(), prefill_chunk=chunk)
    given = {} if save is None else {"on_prefilled": keep}
    return generate(backend, prompt, options, saved=saved, **given)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("more", [0, 1, 42])
@pytest.mark.parametrize("mtp", [0, 3])
def test_generation_from_a_state_has_the_same_bits(backend, state, name, more, mtp) -> None:
    model, prompt = backend(name), PROMPT[: SAVED + more]
    for sampling in (GREEDY, SamplingParams(temperature=1.0, top_p=0.9, seed=11)):
        saved = read_state(state(name), model)
        plain = run(model, prompt, mtp=mtp, sampling=sampling)
        resumed = run(model, prompt, mtp=mtp, sampling=sampling, saved=saved)
        assert resumed.ids == plain.ids
        assert resumed.mtp == plain.mtp
        assert (resumed.timings.reused_tokens, plain.timings.reused_tokens) == (SAVED, 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_keys_values_and_logits_have_the_same_bits(backend, state, name, tmp_path) -> None:
    model = backend(name)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(model, PROMPT, n=0, save=whole)
    run(model, PROMPT, n=0, save=resumed, saved=read_state(state(name), model))
    a, b = (read_state(p, model).arrays for p in (whole, resumed))
    trunk = [f"kv.{i}" for i in range(model.config.num_hidden_layers)]
    kept = [key for key in a if ".".join(key.split(".")[:2]) in trunk]
    assert len(kept) >= len(trunk)  # of the MTP layers, rows that no draft sees may be kept or not
    for key in ("tokens", "hidden", "logits", *kept):
        np.testing.assert_array_equal(a[key], b[key], key, strict=True)


def test_a_chunk_of_any_length_may_end_the_saved_prompt(backend, state) -> None:
    """Without int8 activations the engine's bits do not depend on the chunks of a prompt."""
    model = backend("engine-exact")
    for chunk in (1, 7, 300):
        saved = read_state(state("engine-exact", chunk), model)
        assert run(model, PROMPT, mtp=2, saved=saved).ids == run(model, PROMPT, mtp=2).ids


def test_a_short_prompt_is_kept_too(backend, tmp_path) -> None:
    for name in BACKENDS:
        run(backend(name), PROMPT[:1], n=0, save=tmp_path / name)
        saved = read_state(tmp_path / name, backend(name))
        plain, resumed = (run(backend(name), PROMPT[:5], mtp=1, saved=s) for s in (None, saved))
        assert resumed.ids == plain.ids


def test_a_state_of_a_model_without_mtp_layers(tiny_dir, tmp_path) -> None:
    convert(tiny_dir("tiny_a"), tmp_path / "trunk.gguf", "q8_0", False)
    for make in (ReferenceModel, EngineModel):
        model = make(open_checkpoint(tmp_path / "trunk.gguf"))
        run(model, PROMPT[:SAVED], n=0, save=tmp_path / "s")
        saved = read_state(tmp_path / "s", model)
        assert run(model, PROMPT, saved=saved).ids == run(model, PROMPT).ids


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(RefimplError, match=message) as refusal:
        action()
    assert str(refusal.value).isprintable(), "one line, no control characters"


def test_the_prompt_must_begin_with_the_state(backend, state) -> None:
    model = backend("reference")
    saved = read_state(state("reference"), model)
    other = [*PROMPT[:20], (PROMPT[20] + 1) % 320, *PROMPT[21:]]
    refused(lambda: run(model, other, saved=saved), r"does not begin with the 48 .*\(token 20 is")
    refused(lambda: run(model, PROMPT[:40], saved=saved), "has 48 tokens, the prompt only 40")


def test_a_state_belongs_to_one_model_and_arithmetic(backend, state, tmp_path) -> None:
    other = synthesize(PRESETS["tiny_a"](), 2, tmp_path / "other")
    model = ReferenceModel(open_checkpoint(other))
    refused(lambda: read_state(state("reference"), model), "made with another model")
    refused(lambda: read_state(state("reference"), backend("engine")),
            "computed by 'reference float32', this run by 'engine")  # fmt: skip
    refused(lambda: read_state(state("reference"), backend("reference-bf16")), "reference bf16")
    refused(lambda: read_state(state("engine"), backend("engine-q8_0")), "f16 KV.*q8_0 KV")


def test_a_state_of_other_kernels_is_refused(backend, state, monkeypatch) -> None:
    """Their sums may have another order, and so other bits."""
    model, path = backend("engine"), state("engine")
    assert read_state(path, model).tokens == tuple(PROMPT[:SAVED])
    monkeypatch.setattr(model, "_simd", replace(model._simd, sources="older"))
    refused(lambda: read_state(path, model), "kernels .*, this run by '.* kernels older'")


def edited(path: Path, out: Path, change: Callable[[dict[str, Any], bytearray], None]) -> Path:
    """A state file with another header or data, its checksum right again."""
    content = path.read_bytes()
    n = int.from_bytes(content[48:56], "little")
    header, data = json.loads(content[56 : 56 + n]), bytearray(content[56 + n :])
    change(header, data)
    raw = json.dumps(header).encode()
    body = len(raw).to_bytes(8, "little") + raw + bytes(data)
    out.write_bytes(content[:16] + hashlib.sha256(body).digest() + body)
    return out


def put(name: str, *values: int) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], data: bytearray) -> None:
        start, stop = header[name]["data_offsets"]
        data[start:stop] = np.array(values, "<i8").tobytes()

    return change


def field(name: str, **values: Any) -> Callable[[dict[str, Any], bytearray], None]:
    return lambda header, data: header[name].update(values)


def renamed(old: str, new: str) -> Callable[[dict[str, Any], bytearray], None]:
    return lambda header, data: header.update({new: header.pop(old)})


TOKENS = [5] * SAVED
BAD = {
    "not a table of arrays": (lambda h, d: h.update({"kv.0": 7}), "lacks dtype, shape"),
    "shape that lies": (field("tokens", shape=[2**40]), "takes 8796093022208 bytes"),
    "data outside the file": (field("tokens", data_offsets=[0, 2**40]), "outside the"),
    "data left over": (lambda h, d: d.extend(bytes(8)), "the header describes"),
    "metadata is a list": (lambda h, d: h.update({"__metadata__": []}), "not an object"),
    "no metadata": (lambda h, d: h.pop("__metadata__") and None, "made with another model"),
    "array missing": (renamed("kv.1", "kv.99"), r"no 'kv\.1', expected float32 of shape"),
    "array too many": (renamed("mtp.pending.0", "mtp.pending.9"), "contradict each other"),
    "unknown type": (field("hidden", dtype="BF16", shape=[32, 64]), "has type BF16"),
    "another type": (field("kv.0", dtype="I64", shape=[1]), "takes 8 bytes"),
    "another shape": (
        lambda h, d: h["kv.0"].update(shape=[h["kv.0"]["shape"][0], 1,
                                             h["kv.0"]["shape"][1], *h["kv.0"]["shape"][2:]]),
        r"has 'kv\.0' as float32 of shape"),
    "token outside the vocabulary": (put("tokens", *TOKENS[1:], 320000), "not all of them ids"),
    "token below zero": (put("tokens", *TOKENS[1:], -1), "not all of them ids"),
    "more rows than tokens": (put("mtp.rows", 2**62), "contradict each other"),
    "rows below zero": (put("mtp.rows", -1), "contradict each other"),
    "fewer rows": (put("mtp.rows", 3), "contradict each other"),
    "rows done from nowhere": (put("mtp.done", 0, 2**60, 0), "contradict each other"),
    "rows done below zero": (put("mtp.done", 0, -(2**63), 0), "contradict each other"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_contents_that_cannot_be_used(backend, state, tmp_path, name) -> None:
    change, message = BAD[name]
    path = edited(state("reference"), tmp_path / "bad.state", change)
    model = backend("reference")
    refused(lambda: run(model, PROMPT, saved=read_state(path, model)), message)


@pytest.mark.parametrize("name", ["mtp.start", "mtp.rows"])
def test_the_engine_checks_counts_before_kernels_see_them(backend, state, tmp_path, name) -> None:
    model = backend("engine")
    values = {"mtp.start": (2**40, 0, 0), "mtp.rows": (2**40,)}[name]
    path = edited(state("engine"), tmp_path / "bad.state", put(name, *values))
    refused(lambda: run(model, PROMPT, saved=read_state(path, model)), "contradict each other")


def test_damage_is_seen_before_anything_is_used(backend, state, tmp_path) -> None:
    model, good = backend("reference"), state("reference").read_bytes()
    bad = tmp_path / "bad.state"

    def says(content: bytes, message: str) -> None:
        bad.unlink(missing_ok=True)
        bad.write_bytes(content)
        refused(lambda: read_state(bad, model), message)

    says(b"", "the file is empty")
    says(good[:20], "a state file begins with b'REFSTATE'")
    says(b"GGUF" + good[4:], "begins with b'GGUF")
    says(MAGIC + b"\2" + good[9:], "version 2.0, this program reads 1")
    for n in (48, 60, 1000, len(good) // 2, len(good) - 1):
        says(good[:n], "checksum is wrong; truncated or damaged")
    for at in (20, 50, 300, len(good) // 2, len(good) - 1):
        says(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :], "checksum is wrong")
    refused(lambda: read_state(tmp_path / "none", model), "no such file")


def test_infinite_values_in_a_state_end_with_a_sentence(backend, state, tmp_path) -> None:
    def spoil(header: dict[str, Any], data: bytearray) -> None:
        start, stop = header["logits"]["data_offsets"]
        data[start:stop] = b"\xff" * (stop - start)

    path = edited(state("engine"), tmp_path / "bad.state", spoil)
    model = backend("engine")
    saved = read_state(path, model)
    refused(lambda: run(model, PROMPT[:SAVED], saved=saved), "logit|finite|number")


def test_a_state_needs_the_room_of_its_tokens(backend, state) -> None:
    model = backend("reference")
    saved = read_state(state("reference"), model)
    refused(lambda: saved.fill(model.new_cache(SAVED - 1), model.config), "the context holds 47")


def test_the_fingerprint_covers_config_table_and_weights(gguf, tiny_dir, tmp_path) -> None:
    mine = fingerprint(open_checkpoint(gguf))
    assert fingerprint(open_checkpoint(gguf)) == mine
    assert fingerprint(open_checkpoint(tiny_dir("tiny_a"))) != mine  # other stored types
    folder = shutil.copytree(tiny_dir("tiny_a"), tmp_path / "m")
    before = fingerprint(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-5}))
    assert fingerprint(open_checkpoint(folder)) != before
    (folder / "config.json").write_text(json.dumps(config))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content)
    assert fingerprint(open_checkpoint(folder)) != before


def test_the_fingerprint_reads_pieces_of_large_tensors(gguf, monkeypatch) -> None:
    whole = fingerprint(open_checkpoint(gguf))
    monkeypatch.setattr(fingerprints, "WHOLE_BYTES", 4096)
    monkeypatch.setattr(fingerprints, "PIECE_BYTES", 64)
    read = 0
    real = fingerprints.np.ascontiguousarray

    def counted(array: np.ndarray) -> np.ndarray:
        nonlocal read
        read += array.nbytes
        return real(array)

    monkeypatch.setattr(fingerprints.np, "ascontiguousarray", counted)
    assert fingerprint(open_checkpoint(gguf)) != whole
    assert read < gguf.stat().st_size / 2


def invoke(*args: str) -> Any:
    done = CliRunner().invoke(main, args)
    assert not done.exception or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.mark.parametrize("backend_name", ["reference", "engine"])
def test_the_command_line(gguf, tmp_path, backend_name) -> None:
    ids, state = tmp_path / "ids.json", str(tmp_path / "p.state")
    ids.write_text(json.dumps(PROMPT[:SAVED]))
    given = ("generate", "--model", str(gguf), "--backend", backend_name, "--mtp", "1")
    only = invoke(*given, "--tokens", str(ids), "--save-state", state, "--max-new-tokens", "0")
    assert (only.exit_code, only.stdout) == (0, ""), only.stderr
    assert f"wrote {state} (48 tokens, 0." in only.stderr
    ids.write_text(json.dumps(PROMPT))
    more = (*given, "--tokens", str(ids), "--max-new-tokens", "9", "--json")
    plain, resumed = invoke(*more), invoke(*more, "--load-state", state)
    assert "48 tokens of the prompt came from" in resumed.stderr
    assert "prompt: 42 of 90 tokens in" in resumed.stderr
    a, b = json.loads(plain.stdout), json.loads(resumed.stdout)
    assert (a["ids"], a["mtp"]) == (b["ids"], b["mtp"])
    assert b["timings"]["reused_tokens"] == SAVED
    ids.write_text(json.dumps(PROMPT[1:]))
    done = invoke(*more, "--load-state", state)
    assert done.exit_code == 2 and "does not begin with the 48 tokens" in done.stderr
    done = invoke(*more, "--load-state", str(gguf))
    assert done.exit_code == 2 and "begins with b'GGUF" in done.stderr


def test_nothing_else_is_replaced_by_a_state(gguf, tmp_path, state, monkeypatch) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "mine.txt").write_text("mine")
    for path, message in (
        (tmp_path / "mine.txt", "exists and is no state file"),
        (tmp_path / "none" / "x", "folder .* does not exist"),
        (tmp_path / ("x" * 300), "cannot be written"),
        (tmp_path, "is a folder"),
        (gguf, "is read by this run"),
    ):
        refused(lambda path=path: check_state_output(path, gguf), message)  # type: ignore[misc]
    check_state_output(state("reference"), gguf)
    done = invoke("generate", "a", "--model", str(gguf), "--save-state", str(tmp_path / "mine.txt"))
    assert done.exit_code == 2 and (tmp_path / "mine.txt").read_text() == "mine"
    monkeypatch.setattr(tempfile, "mkstemp", refusing)
    refused(lambda: check_state_output(tmp_path / "new", gguf), "cannot be written .Read-only")


def test_a_full_disk_leaves_no_half_file(backend, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refimpl.checkpoint.atomic.os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        run(backend("reference"), PROMPT[:4], n=0, save=tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
