"""One door for every checkpoint: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from refimpl.checkpoint.stored import DEFAULT_CACHE_BYTES, StoredSource, Wanted
from refimpl.config import ModelConfig
from refimpl.config_io import load_hf_config
from refimpl.errors import CheckpointError


def open_checkpoint(
    path: str | Path,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    wanted: Wanted | None = None,
    mtp_path: str | Path | None = None,
) -> StoredSource:
    """Open a folder with config.json and model*.safetensors, or a .gguf file.

    Args:
        cache_bytes: most bytes of decoded arrays kept (least recently used go first).
        wanted: the tensors that are needed, so that one layer can be read where the rest is not
            there; by default every tensor must be present.
        mtp_path: a second checkpoint that holds the MTP layers, which the first lacks (see
            `refimpl.checkpoint.pair`).

    Raises:
        CheckpointError, ConfigError: what was found, what was expected, what to do.
    """
    path = Path(path)
    if mtp_path is not None:
        return _open_pair(path, Path(mtp_path), cache_bytes)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: no config.json in this folder; expected config.json beside "
                "model*.safetensors, or the path of a .gguf file"
            )
        from refimpl.checkpoint.hf_read import open_hf

        return open_hf(path, cache_bytes, wanted)
    if path.suffix in (".safetensors", ".json"):
        raise CheckpointError(
            f"{path}: give the folder that holds config.json and the .safetensors files"
        )
    from refimpl.checkpoint.gguf_source import open_gguf

    return open_gguf(path, cache_bytes, wanted)


def _open_pair(path: Path, mtp_path: Path, cache_bytes: int) -> StoredSource:
    from refimpl.checkpoint.listing import list_checkpoint
    from refimpl.checkpoint.pair import join, needed

    main = open_checkpoint(path, cache_bytes)
    held = {t.spec for t in list_checkpoint(mtp_path).tensors if t.fits and not t.scale}
    mtp = open_checkpoint(
        mtp_path,
        wanted=lambda spec: needed(spec) or (spec.key == "embed_tokens" and spec in held),
    )
    return join(path, main, mtp_path, mtp)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint, of which only config.json or GGUF headers are read.

    Raises:
        CheckpointError, ConfigError: as `open_checkpoint`.
    """
    path = Path(path)
    if path.is_dir():
        return load_hf_config(path / "config.json")
    from refimpl.checkpoint.gguf_parts import read_gguf_parts
    from refimpl.checkpoint.gguf_source import config_of

    return config_of(read_gguf_parts(path, partial=True))
