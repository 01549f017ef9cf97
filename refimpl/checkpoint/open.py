"""One door for every checkpoint: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from refimpl.checkpoint.stored import DEFAULT_CACHE_BYTES, StoredSource, Wanted
from refimpl.errors import CheckpointError


def open_checkpoint(
    path: str | Path, cache_bytes: int = DEFAULT_CACHE_BYTES, wanted: Wanted | None = None
) -> StoredSource:
    """Open a folder with config.json and model*.safetensors, or a .gguf file.

    Args:
        cache_bytes: most bytes of decoded arrays kept (least recently used go first).
        wanted: the tensors that are needed, so that one layer can be read where the rest is not
            there; by default every tensor must be present.

    Raises:
        CheckpointError, ConfigError: what was found, what was expected, what to do.
    """
    path = Path(path)
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
