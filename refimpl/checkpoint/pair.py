"""A model whose MTP layers lie in a checkpoint of their own, as large GGUF files are published.

llama.cpp's converter writes such a pair with `--no-mtp` and `--mtp`; the second file holds the
MTP blocks under the numbers that they have in a whole file (45 to 47 of the published model), the
keys of the whole model, and once more `token_embd`, `output`, `output_norm` and `rope_freqs`
(conversion/step3.py, `filter_tensors`). Here the repeated tensors are not used: the main file's
stand for both. Either side may also be a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.checkpoint.stored import DRAFTS_OFF, StoredSource
from refimpl.config import PER_LAYER_FIELDS, ModelConfig
from refimpl.errors import CheckpointError
from refimpl.inventory import TensorSpec

_SAME = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads",
    "num_attention_groups", "head_dim", "sliding_attention_heads", "sliding_window",
    "rms_norm_eps",
)  # fmt: skip
_SAMPLED_ROWS = 64
_LEAST_COSINE = 0.8  # two quantisations of one table stay above 0.9, strangers are near 0


def needed(spec: TensorSpec) -> bool:
    """Whether a tensor of the second checkpoint is used."""
    return spec.role == "mtp"


def joined_config(path: Path, main: ModelConfig, mtp_path: Path, mtp: ModelConfig) -> ModelConfig:
    """The main model's configuration with the MTP layers of the second checkpoint.

    Raises:
        CheckpointError: the second has no MTP layers, or is of another model.
    """
    if not mtp.num_nextn_predict_layers:
        raise CheckpointError(
            f"{mtp_path}: declares no MTP layers; expected a file written with --mtp by "
            "llama.cpp's converter, or a whole checkpoint"
        )
    n = main.num_hidden_layers
    pairs = [(name, getattr(main, name), getattr(mtp, name)) for name in _SAME]
    pairs += [(name, getattr(main, name)[:n], getattr(mtp, name)[:n]) for name in PER_LAYER_FIELDS]
    for name, ours, theirs in pairs:
        if _rounded(ours) != _rounded(theirs):
            shown = "differs" if isinstance(ours, tuple) else f"is {theirs}, expected {ours}"
            raise CheckpointError(
                f"{mtp_path}: {name} {shown} as in {path}; the two belong to different models"
            )
    layers = {name: getattr(main, name)[:n] + getattr(mtp, name)[n:] for name in PER_LAYER_FIELDS}
    count = mtp.num_nextn_predict_layers
    return dataclasses.replace(main, num_nextn_predict_layers=count, **layers)


def _rounded(value: Any) -> Any:
    """Numbers as GGUF keeps them."""
    if isinstance(value, tuple):
        return tuple(_rounded(v) for v in value)
    return float(np.float32(value)) if isinstance(value, float) else value


def join(path: Path, main: StoredSource, mtp_path: Path, mtp: StoredSource) -> StoredSource:
    """One source over both.

    Args:
        main: the trunk, opened whole, without MTP layers of its own.
        mtp: the second checkpoint, opened for its MTP layers and, if it has them, embeddings.

    Raises:
        CheckpointError: the two do not belong together.
    """
    if main.config.num_nextn_predict_layers:
        raise held_already(path, mtp_path)
    config = joined_config(path, main.config, mtp_path, mtp.config)
    _check_embeddings(path, main, mtp_path, mtp)
    layers = [t for t in mtp.tensors if needed(t.spec)]
    notes = [w for w in main.warnings if not w.endswith(DRAFTS_OFF)]
    return StoredSource(config, [*main.tensors, *layers], notes, main.cache_bytes, main.metadata)


def held_already(path: Path, mtp_path: Path) -> CheckpointError:
    """The refusal of a second checkpoint that nothing is missing from."""
    return CheckpointError(
        f"{path}: holds its MTP layers itself; leave {mtp_path} out, or name a main file without "
        "them"
    )


def _check_embeddings(path: Path, main: StoredSource, mtp_path: Path, mtp: StoredSource) -> None:
    """Refuse another training's MTP layers: both files hold the same table, however stored."""
    if not any(t.spec.key == "embed_tokens" for t in mtp.tensors):
        return
    rows = np.linspace(0, main.config.vocab_size - 1, _SAMPLED_ROWS).astype(int).tolist()
    ours, theirs = (s.rows("embed_tokens", None, rows, np.float64) for s in (main, mtp))
    with np.errstate(all="ignore"):
        size = np.sqrt(np.sum(ours**2) * np.sum(theirs**2))
        cosine = float(np.sum(ours * theirs) / size)
    if not cosine >= _LEAST_COSINE:
        raise CheckpointError(
            f"{mtp_path}: its token embeddings are not those of {path} (cosine {cosine:.2f} over "
            f"{_SAMPLED_ROWS} rows, expected nearly 1); the two belong to different models"
        )
