"""Golden files: NumPy .npz archives with a JSON description under `meta`.

Arrays (axes: T prompt, N new tokens, L trunk layers, M MoE layers, H hidden_size, V vocabulary,
k experts per token): `prompt` (T,), `logits` (T, V), `hidden` (L+1, T, H), `final` (T, H),
`attn_out`, `ffn_out` (L, T, H), `moe_layers` (M,), `route_idx`, `route_w` (M, T, k),
`route_margin` (M, T); with new tokens `greedy` (N,), `greedy_logits` (N, V); with MTP layers
`mtp_forced_logits_j` (T-1-j, V), `mtp_forced_hidden_j` (T-1-j, H) teacher-forced over the prompt;
`draft_chain` (J,), `draft_chain_logits` (J, V): one draft per MTP layer after the prompt and its
greedy continuation; `spec_accepted`: accepted drafts of each verification at full depth.
Experts of a row may be in any order, as long as `route_idx` and `route_w` have the same.
Floats are in the run's own precision (bf16 runs: float32 arrays that hold bf16 values).
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from refimpl.checkpoint.atomic import atomic_file, check_writable
from refimpl.config import ModelConfig
from refimpl.config_io import to_hf
from refimpl.errors import InputError

Array = NDArray[Any]
MAGIC = "refimpl-golden"
VERSION = 1
_MAX_ARRAYS = 4096
_MAX_BYTES = 1 << 40
_MAX_META_BYTES = 1 << 20


def config_hash(config: ModelConfig) -> str:
    """SHA-256 of the configuration in its config.json spelling."""
    text = json.dumps(to_hf(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_golden(path: Path, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Write a golden file whole or not at all.

    Raises:
        InputError: a value is not finite, or the file cannot be written.
    """
    for name, array in arrays.items():
        _require_finite(name, array)
    header = {"magic": MAGIC, "version": VERSION, **meta}
    with atomic_file(path) as file:
        np.savez(file, meta=np.array(json.dumps(header)), **dict(arrays))  # type: ignore[arg-type]


def check_output(path: Path, *inputs: str | Path | None) -> None:
    """Refuse, before a long run, an output that would replace anything but an older golden file.

    Raises:
        InputError: `path` is one of `inputs` or a file that is no .npz, or cannot be written.
    """
    check_writable(path)
    if not path.is_file():
        return
    read = [Path(given) for given in inputs if given is not None]
    if any(p.exists() and p.samefile(path) for p in read):
        raise InputError(f"{path}: is read by this run; choose another name for the output")
    if path.stat().st_size and not zipfile.is_zipfile(path):
        raise InputError(f"{path}: exists and is no golden file; choose another name")


def stored_precision(arrays: Mapping[str, Array]) -> str:
    """The precision that the arrays of a run show by themselves: `float16` by their type, `bf16`
    where activations in float32 have nothing in the 16 bits that bf16 lacks."""
    shown = [arrays[n] for n in (*_ACTIVATIONS, "logits") if n in arrays and arrays[n].size]
    if any(x.dtype == np.float16 for x in shown):
        return "float16"
    if any(x.dtype == np.float32 and _is_bf16(x) for x in shown):
        return "bf16"
    return "float64" if any(x.dtype == np.float64 for x in arrays.values()) else "float32"


_ACTIVATIONS = ("hidden", "attn_out", "ffn_out")


def _is_bf16(x: Array) -> bool:
    return bool(x.any()) and not (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF).any()


def _require_finite(name: str, array: Array) -> None:
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        at = ", ".join(str(i) for i in wrong[0])
        raise InputError(
            f"{name}[{at}] is {array[tuple(wrong[0])]} ({len(wrong)} of {array.size} are not "
            "finite): the checkpoint is damaged, or its values overflow this precision; try "
            "--dtype float64"
        )


def read_golden(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and description of a golden file (an .npz without `meta` has an empty one).

    Raises:
        InputError: missing, damaged, pickled, of another version, or implausibly large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        size, on_disk = sum(e.file_size for e in entries), path.stat().st_size
        if len(entries) > _MAX_ARRAYS or size > _MAX_BYTES or size > 1000 * on_disk + (1 << 20):
            raise InputError(f"{path}: {len(entries)} arrays of {size} bytes is no golden file")
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for entry in entries:
                with archive.open(entry) as stream:
                    name = entry.filename.removesuffix(".npy")
                    arrays[name] = _array(stream, entry.file_size)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # zipfile and NumPy trust the file; what they trip over is its fault
        raise InputError(
            f"{path}: not a readable golden file ({reason(error)}); expected an .npz written by "
            "`refimpl golden dump`"
        ) from None
    return arrays, _meta(path, arrays.pop("meta", None))


def read_npy(path: Path) -> Array:
    """The array of an .npy file.

    Raises:
        InputError: damaged or pickled.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return _array(file, path.stat().st_size)
        except Exception as error:  # NumPy's parser of headers raises whatever it trips over
            raise InputError(
                f"{path}: not a readable .npy or .npz file ({reason(error)})"
            ) from None


def _array(stream: IO[bytes], size: int) -> Array:
    """The array of an .npy stream of `size` bytes; room is made once the header agrees with them
    (np.load makes it first, whatever a header says).

    Raises:
        ValueError and others: damaged, or of Python objects.
    """
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if dtype.hasobject or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{dtype} of shape {shape}")
    needed, left = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if needed != left:
        raise ValueError(f"{dtype} of shape {shape} takes {needed} bytes, {left} are there")
    data = bytearray(stream.read(needed))
    if len(data) != needed:
        raise ValueError("truncated")
    if not needed:
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")


def reason(error: Exception) -> str:
    """What a library says about a stranger's file, as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:100])


def _meta(path: Path, value: Array | None) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        if value.nbytes > _MAX_META_BYTES or value.dtype.kind != "U":
            raise ValueError("wrong type or size")
        meta = json.loads(str(value))
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its description `meta` is not valid ({reason(error)})") from None
    if meta.get("magic") == MAGIC and meta.get("version") != VERSION:
        raise InputError(
            f"{path}: golden version {meta.get('version')!r}, this program reads {VERSION}"
        )
    return meta


def read_tokens(text: str, origin: str) -> list[int]:
    """A JSON list of token ids.

    Raises:
        InputError: not JSON, not a list of non-negative integers, or empty.
    """
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin}: not valid JSON ({error}); expected a list of ids") from None
    ok = isinstance(ids, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in ids
    )
    if not ok:
        raise InputError(f"{origin}: expected a JSON list of token ids such as [1, 5, 7]")
    if not ids:
        raise InputError(f"{origin}: the list of token ids is empty; at least one is needed")
    return list(ids)
