"""From one checkpoint format to another."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.atomic import check_writable
from refimpl.checkpoint.block_types import PLAIN
from refimpl.checkpoint.gguf_write import row_ranges, write_gguf
from refimpl.checkpoint.hf_write import STORED, Progress, write_hf
from refimpl.checkpoint.mixtures import MIXTURES, mixture
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.partial import Say
from refimpl.checkpoint.stored import StoredSource
from refimpl.config import ModelConfig
from refimpl.errors import ConfigError, InputError
from refimpl.inventory import TensorSpec, inventory
from refimpl.text.tokenizer import tokenizer_of

Array = NDArray[Any]
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
)  # fmt: skip


def convert(
    src_path: str | Path,
    out_path: str | Path,
    file_type: str,
    mtp: bool = True,
    progress: Progress | None = None,
    name: str | None = None,
    overwrite: bool = False,
    say: Say = lambda remark: None,
    threads: int | None = None,
    mtp_path: str | Path | None = None,
) -> tuple[str, ...]:
    """Convert a checkpoint to one GGUF file, or to a Hugging Face folder.

    An interrupted conversion to GGUF leaves OUT.partial, which the same call continues.

    Args:
        out_path: ends in .gguf for a GGUF file; anything else is a new folder.
        file_type: a key of `MIXTURES` for a GGUF file; 'f32', 'f16' or 'bf16' for a folder.
        mtp: whether the MTP layers are kept.
        progress: called with (bytes written, bytes in all).
        name: `general.name` of a GGUF file; the source's name if not given.
        overwrite: replace a GGUF file that is there already.
        say: takes the notes as they arise.
        threads: that quantise to GGUF; the default is one for each physical core.
        mtp_path: a second checkpoint that holds the MTP layers; the output holds both.

    Returns:
        Notes for the user, one sentence each.

    Raises:
        InputError: unknown type, or the output cannot be written or is the input.
        CheckpointError, ConfigError: the source cannot be used or not expressed.
    """
    src, out = Path(src_path), Path(out_path)
    to_gguf = out.suffix == ".gguf"
    sources = [src] if mtp_path is None else [src, Path(mtp_path)]
    if to_gguf:
        check_writable(out)
    if out.exists() and any(p.exists() and out.samefile(p) for p in sources):
        raise InputError(f"{out}: is the checkpoint itself; choose another name for the output")
    _check_output(out, to_gguf, file_type, overwrite)
    notes = _Notes(say)
    with contextlib.closing(open_checkpoint(src, mtp_path=mtp_path)) as source:
        for warning in source.warnings:
            notes.add(warning)
        if to_gguf:
            _to_gguf(source, src, out, file_type, mtp, name, progress, notes, threads)
        else:
            _to_folder(source, src, out, file_type, mtp, progress)
    return tuple(notes.texts)


def _to_gguf(source: StoredSource, src: Path, out: Path, file_type: str, mtp: bool,
             name: str | None, progress: Progress | None, notes: _Notes,
             threads: int | None) -> None:  # fmt: skip
    """With the vocabulary that lies beside the source or in it."""
    tokenizer = tokenizer_of(src, source.metadata or None)
    vocabulary = tokenizer.vocabulary if tokenizer else None
    if vocabulary is None:
        notes.add(f"{src}: no tokenizer found; the file will take token ids only")
    _note_requantising(source, src, file_type, notes)
    write_gguf(
        source, out, file_type, vocabulary, mtp, name=name or src.resolve().stem,
        progress=progress, say=notes.add, threads=threads,
    )  # fmt: skip


def _to_folder(source: StoredSource, src: Path, out: Path, file_type: str, mtp: bool,
               progress: Progress | None) -> None:  # fmt: skip
    """With the tokenizer's files of the source as they are."""
    config = source.config if mtp else source.config.without_mtp()
    _require_expressible(config, src)
    extra = {n: (src / n).read_bytes() for n in _TOKENIZER_FILES if (src / n).is_file()}
    write_hf(
        config, lambda t: hf_chunks(source, t), out, file_type, extra_files=extra,
        progress=progress,
    )  # fmt: skip


def _check_output(out: Path, to_gguf: bool, file_type: str, overwrite: bool) -> None:
    known = tuple(MIXTURES if to_gguf else STORED)
    if file_type not in known:
        form = "GGUF file" if to_gguf else "folder of safetensors"
        raise InputError(f"type is {file_type!r}; a {form} can hold {', '.join(known)}")
    if to_gguf and out.exists() and not overwrite:
        raise InputError(f"{out}: already exists; choose another name, or --force to replace it")


class _Notes:
    """Remarks for the user, kept and passed on."""

    def __init__(self, say: Say) -> None:
        self.texts: list[str] = []
        self._say = say

    def add(self, text: str) -> None:
        self.texts.append(text)
        self._say(text)


def _note_requantising(source: StoredSource, src: Path, file_type: str, notes: _Notes) -> None:
    """Quantised values carry their rounding into any further type. llama-quantize refuses this
    unless asked; here the user has named the source and is told."""
    if MIXTURES[file_type].main in PLAIN:
        return
    type_of = mixture(file_type, source.config)
    lossy = Counter(
        (tensor.kind.name, wanted)
        for spec in inventory(source.config)
        if (tensor := source.stored(spec.key, spec.layer)).kind.plain is None
        and (wanted := type_of(spec)) != tensor.kind.name
    )
    if lossy:
        (before, after), _ = lossy.most_common(1)[0]
        notes.add(
            f"{src}: {lossy.total()} tensors are quantised already and are quantised again (most "
            f"from {before} to {after}), which adds to their error; convert from the original if "
            "you have it"
        )


def _require_expressible(config: ModelConfig, src: Path) -> None:
    """GGUF holds the divisors that llama3 scaling leads to, config.json the settings behind them;
    a folder without them would be another model."""
    if config.rope_divisors and any(d != 1.0 for d in config.rope_divisors):
        raise ConfigError(
            "rope_scaling",
            f"{src} holds only its divisors (rope_freqs.weight), which config.json cannot state; "
            "convert from the original folder",
        )


def hf_chunks(source: StoredSource, spec: TensorSpec) -> Iterator[Array]:
    """A tensor's values for `write_hf`, a few rows at a time; norms as w = scale - 1."""
    if spec.plus_one:
        yield source.norm_scale(spec.key, spec.layer, np.float64) - 1.0
        return
    tensor = source.stored(spec.key, spec.layer)
    for start, stop in row_ranges(tensor):
        yield tensor.values(start, stop)
