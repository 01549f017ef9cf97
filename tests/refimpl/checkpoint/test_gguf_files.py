"""GGUF files as they come: both versions, the other byte order, and models split over files."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader, GGUFWriter

from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.gguf_source import config_of
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.open import open_checkpoint
from refimpl.cli import main
from refimpl.errors import CheckpointError
from refimpl.inventory import gguf_inventory

Made = Callable[[str, str], Path]
COUNT = 4


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def rewrite(source: Path, out: Path, names: set[str] | None, **split: int) -> None:
    """Some tensors of a GGUF file in a file of their own, written by the `gguf` package.

    Without `split` all keys are copied; with it they go to part 0 only, as llama-gguf-split does.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(out, "step35")
    if not split or split["no"] == 0:
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kinds = [*field.types, None]
                writer.add_key_value(key, field.contents(), kinds[0], kinds[1])
    for key, value in split.items():
        if key == "total":
            writer.add_int32("split.tensors.count", value)
        else:
            writer.add_uint16(f"split.{key}", value)
    for t in reader.tensors:
        if names is None or t.name in names:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def part(folder: Path, number: int, stem: str = "m") -> Path:
    return folder / f"{stem}-{number:05d}-of-{COUNT:05d}.gguf"


def layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


@pytest.fixture(scope="module")
def split(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_a over four parts: layers 0-2 with all that is outside the layers, 3-5, 6-8, MTP."""
    folder, whole = tmp_path_factory.mktemp("split"), made("tiny_a", "q8_0")
    names = set(read_gguf(whole).tensors)
    for i in range(COUNT):
        chosen = {n for n in names if max(0, layer_of(n)) // 3 == i}
        rewrite(whole, part(folder, i + 1), chosen, no=i, count=COUNT, total=len(names))
    return folder


@pytest.fixture
def copy(split: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split, tmp_path / "split"))


def test_version_2_is_version_3_with_another_number(made: Made, tmp_path: Path) -> None:
    """Since version 2 counts and lengths have 64 bits; version 3 only added big-endian files."""
    data = bytearray(made("micro", "q8_0").read_bytes())
    assert struct.unpack_from("<I", data, 4) == (3,)
    struct.pack_into("<I", data, 4, 2)
    (tmp_path / "v2.gguf").write_bytes(data)
    a, b = open_checkpoint(made("micro", "q8_0")), open_checkpoint(tmp_path / "v2.gguf")
    for spec in gguf_inventory(a.config):
        x, y = (s.stored(spec.key, spec.layer).rows for s in (a, b))
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_big_endian_file_gets_one_sentence(tmp_path: Path, command: str) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64))
    args = (path,) if command == "inspect" else ("x", "--model", path)
    done = run(command, *args)
    assert done.exit_code == 2
    expected = f"refimpl: error: {path}: a big-endian GGUF file; only little-endian can be read\n"
    assert done.stderr == expected


def test_a_split_model_is_the_whole(split: Path, made: Made) -> None:
    whole, parts = open_checkpoint(made("tiny_a", "q8_0")), open_checkpoint(part(split, 1))
    assert parts.config == whole.config
    assert parts.warnings == ()
    for spec in gguf_inventory(whole.config):
        a, b = (s.stored(spec.key, spec.layer).rows for s in (whole, parts))
        np.testing.assert_array_equal(a, b)
    found = inspect(part(split, 1), check=True)
    assert found.problems == ()
    assert found.roles == inspect(made("tiny_a", "q8_0")).roles
    assert found.listing.files == tuple(part(split, i + 1).name for i in range(COUNT))


def test_a_missing_part_is_named(copy: Path) -> None:
    part(copy, 3).unlink()
    with pytest.raises(CheckpointError, match=r"00003-of-00004.gguf: part 3 of 4 is missing"):
        open_checkpoint(part(copy, 1))
    done = run("inspect", part(copy, 1))
    assert done.exit_code == 1
    assert f"problem: the file {part(copy, 3).name} is missing\n" in done.stdout
    assert "51 tensors are missing: blk.6." in done.stdout


def test_another_part_than_the_first_is_refused(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not the first of 4 parts; open m-00001-of-00004"):
        open_checkpoint(part(copy, 2))


def test_shuffled_parts_are_refused(copy: Path) -> None:
    part(copy, 2).rename(copy / "x")
    part(copy, 3).rename(part(copy, 2))
    (copy / "x").rename(part(copy, 3))
    with pytest.raises(CheckpointError, match=r"00002-of-00004.gguf: is not part 2 of 4"):
        open_checkpoint(part(copy, 1))


def test_a_part_twice_is_refused(copy: Path) -> None:
    shutil.copy(part(copy, 2), part(copy, 3))
    with pytest.raises(CheckpointError, match=r"00003-of-00004.gguf: is not part 3 of 4"):
        open_checkpoint(part(copy, 1))


def test_a_tensor_in_two_parts_is_refused(copy: Path, made: Made) -> None:
    names = {n for n in read_gguf(made("tiny_a", "q8_0")).tensors if layer_of(n) in (5, 6, 7, 8)}
    rewrite(made("tiny_a", "q8_0"), part(copy, 3), names, no=2, count=COUNT)
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.5\..*' is in an earlier part too"):
        open_checkpoint(part(copy, 1))


def test_a_renamed_part_is_refused(copy: Path) -> None:
    part(copy, 1).rename(copy / "model.gguf")
    with pytest.raises(CheckpointError, match=r"one of 4 parts, expected a name ending in -00001"):
        open_checkpoint(copy / "model.gguf")


def test_parts_that_hold_fewer_tensors_than_stated_are_refused(copy: Path, made: Made) -> None:
    names = {n for n in read_gguf(made("tiny_a", "q8_0")).tensors if layer_of(n) in (6, 7)}
    rewrite(made("tiny_a", "q8_0"), part(copy, 3), names, no=2, count=COUNT)
    with pytest.raises(CheckpointError, match=r"hold \d+ tensors, split.tensors.count is 198"):
        open_checkpoint(part(copy, 1))


def test_layers_of_a_split_model_need_their_own_parts_only(copy: Path, made: Made) -> None:
    part(copy, 2).unlink()
    part(copy, 4).unlink()
    source = open_checkpoint(part(copy, 1), wanted=lambda spec: spec.layer == 7)
    whole = open_checkpoint(made("tiny_a", "q8_0"))
    assert source.config == whole.config
    np.testing.assert_array_equal(
        source.expert("experts.up", 7, 3, "f4"), whole.expert("experts.up", 7, 3, "f4")
    )
    message = r"blk.4.attn_norm.weight is missing.*in one of m-00002.*, m-00004.*not here"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(part(copy, 1), wanted=lambda spec: spec.layer == 4)
    done = run("inspect", part(copy, 1), "--layers", "7:8")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        f"{part(copy, 1).name}: 1 tensors of these layers, here",  # rope_freqs
        f"{part(copy, 3).name}: 17 tensors of these layers, here",
    ]
    assert run("inspect", part(copy, 1), "--layers", "4").exit_code == 1


def test_without_the_part_of_the_rope_divisors_nothing_is_guessed(
    made: Made, tmp_path: Path
) -> None:
    whole = made("tiny_a", "q8_0")
    names = set(read_gguf(whole).tensors)
    first = {n for n in names if layer_of(n) == 0 or n == "token_embd.weight"}
    rewrite(whole, part(tmp_path, 1), first, no=0, count=COUNT, total=len(names))
    with pytest.raises(CheckpointError, match=r"3 parts are missing .* rope_freqs.weight; downl"):
        open_checkpoint(part(tmp_path, 1), wanted=lambda spec: spec.layer == 0)


def test_the_configuration_is_the_same_from_all_and_from_some_parts(copy: Path, made: Made) -> None:
    from refimpl.checkpoint.gguf_parts import read_gguf_parts

    part(copy, 2).unlink()
    some = read_gguf_parts(part(copy, 1), partial=True)
    assert some.missing_parts == (part(copy, 2).name,)
    assert config_of(some) == open_checkpoint(made("tiny_a", "q8_0")).config
