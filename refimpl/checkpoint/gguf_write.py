"""Writing GGUF files that llama.cpp loads: architecture `step35`.

Tensors, names, keys and transforms follow llama.cpp's loader and converter (src/models/step35.cpp,
conversion/step3.py): norms hold 1 + w, the router and every vector stay F32, the llama3
divisors travel as `rope_freqs.weight`. The header is the `gguf` package's; tensor bytes are
written a few rows at a time, so memory stays bounded, and the file appears when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.atomic import atomic_file
from refimpl.checkpoint.block_types import BlockType, block_type, encode
from refimpl.checkpoint.fingerprint import fingerprint
from refimpl.checkpoint.hf_write import Progress
from refimpl.checkpoint.mixtures import MIXTURES, TypeOf, file_type_id, mixture
from refimpl.checkpoint.partial import PartialFile, Say, require_space, resumable_file
from refimpl.checkpoint.stored import StoredSource, StoredTensor
from refimpl.checkpoint.workers import Workers
from refimpl.config import FULL, ModelConfig
from refimpl.config_gguf import to_gguf
from refimpl.config_io import GGUF_ARCHITECTURE
from refimpl.errors import CheckpointError, InputError
from refimpl.inventory import TensorSpec, gguf_inventory
from refimpl.text.pretokenizer import SPLITS
from refimpl.text.vocabulary import Vocabulary

Array = NDArray[Any]
Blocks = Callable[[TensorSpec, BlockType], Iterable[Array]]
"""Gives a tensor's stored bytes in a type, in order, as arrays of bytes or of plain values."""

CHUNK_VALUES = 1 << 22
PIECE_VALUES = 1 << 19
"""Values that one thread decodes and encodes at a time."""
QUANTISERS = 1
"""Counts changes of the quantisers, so that no file is continued with others than it began."""
_QUANTIZATION_VERSION = 2


def write_gguf(
    source: StoredSource,
    out: Path,
    file_type: str,
    vocabulary: Vocabulary | None = None,
    mtp: bool = True,
    type_of: TypeOf | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    say: Say = lambda remark: None,
    threads: int | None = None,
) -> None:
    """Write a checkpoint as one GGUF file.

    A tensor that already has the wanted type is copied bit by bit; others are decoded and
    encoded in pieces of `PIECE_VALUES` values on all cores, of which a few per thread are in
    memory (about 20 MB a thread). The bytes do not depend on the number of threads. An
    interrupted run leaves OUT.partial, which the same call continues (see
    `refimpl.checkpoint.partial`).

    Args:
        file_type: a key of `refimpl.checkpoint.mixtures.MIXTURES`.
        vocabulary: the tokenizer; without one the file says so and prompts must be token ids.
        mtp: whether the MTP layers are written.
        type_of: the type of each tensor, in place of the mixture's.
        name: `general.name`; the default is the name of the output file.
        progress: called with (bytes written, bytes in all).
        say: takes remarks for the user, one sentence each.
        threads: the default is one for each physical core.

    Raises:
        InputError: unknown type, or the file cannot be written.
        CheckpointError: a value does not fit the type.
        ConfigError: the configuration cannot be expressed in GGUF.
    """
    if file_type not in MIXTURES:
        raise InputError(f"type is {file_type!r}, expected one of {', '.join(MIXTURES)}")
    config = source.config if mtp else source.config.without_mtp()
    about = f"{fingerprint(source)} {QUANTISERS}"
    with Workers(threads) as workers:
        write_blocks(
            config, Path(out), file_type_id(file_type), type_of or mixture(file_type, config),
            lambda spec, kind: _encoded(source, spec, kind, workers), vocabulary, name, progress,
            resumable=about, say=say,
        )  # fmt: skip


def write_blocks(
    config: ModelConfig,
    out: Path,
    file_type_id: int,
    type_of: TypeOf,
    blocks: Blocks,
    vocabulary: Vocabulary | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    hole: Callable[[TensorSpec], bool] = lambda spec: False,
    resumable: str = "",
    say: Say = lambda remark: None,
) -> None:
    """Write one GGUF file whose tensors' bytes come from a function.

    Args:
        file_type_id: `general.file_type` as llama.cpp numbers it.
        blocks: gives the stored bytes of each tensor of `gguf_inventory(config)`, in order.
        hole: which tensors are left out as holes: zeros that take no room on the disk.
        resumable: names what the bytes come from; an interrupted call can then be continued by
            one of the same name. Empty: the file appears whole or not at all.
        say: takes remarks for the user, one sentence each.

    Raises:
        InputError, ConfigError: as `write_gguf`.
    """
    from gguf import size_label

    plan = [(spec, block_type(type_of(spec))) for spec in gguf_inventory(config)]
    sizes = [kind.row_bytes(s.shape[-1]) * (s.elements // s.shape[-1]) for s, kind in plan]
    writer = _header(config, file_type_id, vocabulary, name or out.stem)
    for (spec, kind), size in zip(plan, sizes, strict=True):
        ggml = _ggml_type(kind)
        writer.add_tensor_info(spec.gguf_name, spec.shape, np.dtype(np.float32), size, ggml)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    header = _header_bytes(writer)
    total = sum(sizes)
    require_space(out, sum(n for (s, _), n in zip(plan, sizes, strict=True) if not hole(s)))
    with _opened(out, resumable, header, len(plan), say) as target:
        file, done = target.file, sum(sizes[: target.complete])
        for number in range(target.complete, len(plan)):
            (spec, kind), size = plan[number], sizes[number]
            before = file.tell()
            for block in () if hole(spec) else blocks(spec, kind):
                file.write(block.data)
                done += block.nbytes
                if progress:
                    progress(done, total)
            if hole(spec):
                file.seek(size, 1)
                done += size
            if file.tell() - before != size:
                raise AssertionError(f"{spec.gguf_name}: wrote {file.tell() - before} of {size}")
            _pad(file, writer.data_alignment)
            target.finished(number + 1)
        file.truncate()  # a hole at the end counts as well


@contextmanager
def _opened(
    out: Path, resumable: str, header: bytes, tensors: int, say: Say
) -> Iterator[PartialFile]:
    """The output at the place where the next tensor goes."""
    if resumable:
        identity = sha256(resumable.encode() + header).hexdigest()
        with resumable_file(out, identity, header, tensors, say) as target:
            yield target
        return
    with atomic_file(out) as file:
        file.write(header)
        yield PartialFile(file, 0, len(header))


def _ggml_type(kind: BlockType) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind.ggml_id)


def _header(
    config: ModelConfig, file_type_id: int, vocabulary: Vocabulary | None, name: str
) -> Any:
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(None, GGUF_ARCHITECTURE)
    writer.add_type("model")
    writer.add_name(name)
    for key, value in to_gguf(config).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.INT32}
            kind = kinds.get(type(value[0]), GGUFValueType.FLOAT32)
            writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
    writer.add_file_type(file_type_id)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    _add_vocabulary(writer, vocabulary, config)
    return writer


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None, config: ModelConfig) -> None:
    if vocabulary is None:
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
    else:
        full = vocabulary.padded(config.vocab_size)
        if not full.pre:
            raise CheckpointError(
                "the tokenizer's pre-tokenizer is not one that GGUF files can name "
                f"({', '.join(SPLITS)}); convert without the tokenizer"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(full.pre)
        writer.add_token_list(list(full.tokens))
        writer.add_token_types(list(full.types))
        writer.add_token_merges(list(full.merges))
    for kind, token in _special_ids(vocabulary, config).items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)
    if vocabulary is None:
        return
    if vocabulary.add_bos is not None:
        writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.add_eos is not None:
        writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _special_ids(vocabulary: Vocabulary | None, config: ModelConfig) -> dict[str, int]:
    """The tokenizer's special ids, completed by config.json's; GGUF holds one end-of-turn id
    beside the end of text, so of several stop ids the last one becomes it."""
    ids = dict(vocabulary.special_ids) if vocabulary else {}
    if config.bos_token_id is not None:
        ids.setdefault("bos", config.bos_token_id)
    for token in config.eos_token_id[:1]:
        ids.setdefault("eos", token)
    for token in [t for t in config.eos_token_id if t != ids["eos"]][-1:]:
        ids.setdefault("eot", token)
    return ids


def _header_bytes(writer: Any) -> bytes:
    """All that comes before the first tensor, padding included."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % writer.data_alignment)


def _pad(file: Any, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _encoded(
    source: StoredSource, spec: TensorSpec, kind: BlockType, workers: Workers
) -> Iterator[Array]:
    if spec.key == "rope_freqs":
        yield rope_divisors(source.config)
        return
    tensor = source.stored(spec.key, spec.layer)
    if spec.plus_one:
        scale = source.norm_scale(spec.key, spec.layer, np.float32)
        yield encode(kind, scale[None, :], tensor.where)
        return
    same = tensor.kind.name == kind.name

    def piece(rows: tuple[int, int]) -> Array:
        if same:
            return np.ascontiguousarray(tensor.rows[rows[0] : rows[1]])
        values = tensor.values(*rows).astype(np.float32, copy=False)
        return encode(kind, values, tensor.where)

    yield from workers.ordered(piece, row_ranges(tensor, PIECE_VALUES))


def row_ranges(tensor: StoredTensor, values: int = CHUNK_VALUES) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `values` values that cover a tensor."""
    step = max(1, values // tensor.spec.shape[-1])
    n = tensor.rows.shape[0]
    for start in range(0, n, step):
        yield start, min(n, start + step)


def rope_divisors(config: ModelConfig) -> Array:
    """The tensor `rope_freqs.weight` (head_dim / 2,) float32: divisors of the base frequencies
    of full-attention layers, then ones for the lanes that those layers do not rotate."""
    from refimpl.reference.rope import llama3_divisors

    padded = np.ones(config.head_dim // 2, dtype=np.float32)
    if config.rope_divisors is not None:
        found = np.asarray(config.rope_divisors, dtype=np.float32)[: len(padded)]
    elif config.rope_scaling is not None:
        full = next((s for s in config.layers if s.kind == FULL), config.layers[0])
        lanes = np.arange(0, full.rotary_dim, 2, dtype=np.float64)
        base = full.rope_theta ** (-lanes / full.rotary_dim)
        found = llama3_divisors(base, config.rope_scaling).astype(np.float32)
    else:
        return padded
    padded[: len(found)] = found
    return padded
