"""What the golden scripts and their tests agree on: checkpoints, prompt, file form.

A golden file has the form that `refimpl golden dump` writes and `refimpl golden compare` reads
(`refimpl.golden.files`). Its description `meta` also names the peer, its version and the command,
and holds all that is needed to make the same weights again without the peer: configuration, seed
and their sha256. Only NumPy and `refimpl` are used here.

Axes: T prompt tokens, V vocabulary, H hidden size, L trunk layers, M MTP layers, N new tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.synth import PRESETS, random_weights
from refimpl.config import FULL, SLIDING, ModelConfig
from refimpl.config_io import from_hf, to_hf
from refimpl.golden.files import MAGIC, VERSION, config_hash, read_golden

Array = NDArray[Any]

FOLDER = Path(__file__).resolve().parent
PROMPT_TOKENS = 70  # longer than every window, so that the windows bite
NEW_TOKENS = 32


@dataclass(frozen=True)
class Checkpoint:
    """A seeded tiny checkpoint: `refimpl.checkpoint.synth` makes its float32 weights from this."""

    name: str
    config: ModelConfig
    seed: int

    @property
    def prompt(self) -> Array:
        """(T,) int64, seeded."""
        rng = np.random.Generator(np.random.PCG64(self.seed))
        return rng.integers(0, self.config.vocab_size, PROMPT_TOKENS, dtype=np.int64)


def tiny_c() -> ModelConfig:
    """The rest of the space: plain RoPE, one expert of twelve, a wide window, one MTP layer.

    The window (48) is longer than most of the prompt, no frequency is scaled, sliding layers have
    the larger base, and both clamps sit on the same layer.
    """
    kinds = tuple(FULL if i in (0, 4) else SLIDING for i in range(6))
    return replace(
        PRESETS["tiny_a"](),
        num_hidden_layers=5,
        num_nextn_predict_layers=1,
        vocab_size=256,
        sliding_window=48,
        sliding_attention_heads=8,
        layer_types=kinds,
        rope_theta=tuple(50.0 if k == FULL else 2e4 for k in kinds),
        partial_rotary_factors=tuple(0.5 if k == FULL else 1.0 for k in kinds),
        rope_scaling=None,
        moe_layers=(3, 4),
        moe_num_experts=12,
        moe_top_k=1,
        moe_router_scaling_factor=1.5,
        swiglu_limits=(0.0, 0.0, 0.0, 0.0, 0.6, 0.0),
        swiglu_limits_shared=(0.0, 0.0, 0.0, 0.0, 0.4, 0.0),
    )


def tiny_quantised() -> ModelConfig:
    """The least of which whole folders are committed: every width fills groups of 64 values.

    One dense full layer, one MoE sliding one whose clamps bite, one MTP layer.
    """
    return replace(
        PRESETS["tiny_a"](),
        intermediate_size=64,
        num_hidden_layers=2,
        num_nextn_predict_layers=1,
        vocab_size=128,
        num_attention_heads=2,
        num_attention_groups=1,
        sliding_attention_heads=4,
        layer_types=(FULL, SLIDING, SLIDING),
        rope_theta=(1e4, 1e3, 1e3),
        partial_rotary_factors=(0.5, 1.0, 1.0),
        moe_layers=(1,),
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=64,
        share_expert_dim=64,
        swiglu_limits=(0.0, 0.75, 0.0),
        swiglu_limits_shared=(0.0, 0.5, 0.0),
    )


# Of the first few seeds, those where float32 amplifies rounding least (the tolerance must hold for
# any BLAS kernel) and no choice of token or expert is near a tie.
CHECKPOINTS = {
    c.name: c
    for c in (
        Checkpoint("tiny_a", PRESETS["tiny_a"](), 20260102),
        Checkpoint("tiny_b", PRESETS["tiny_b"](), 20260101),
        Checkpoint("tiny_c", tiny_c(), 20260103),
    )
}


def weights_sha256(weights: Mapping[str, Array]) -> str:
    """sha256 over names, shapes and little-endian float32 values, in name order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = np.ascontiguousarray(weights[name], dtype="<f4")
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def save(
    checkpoint: Checkpoint,
    peer: str,
    dtype: str,
    arrays: Mapping[str, Array],
    facts: Mapping[str, Any],
    folder: Path = FOLDER,
) -> Path:
    """Write `<checkpoint>_<peer>_<dtype>.npz`; `facts` joins the meta text (versions, command)."""
    weights = random_weights(checkpoint.config, checkpoint.seed)
    meta = {
        "magic": MAGIC,
        "version": VERSION,
        "checkpoint": checkpoint.name,
        "seed": checkpoint.seed,
        "config": to_hf(checkpoint.config),
        "config_hash": config_hash(checkpoint.config),
        "weights_sha256": weights_sha256(weights),
        "weights_dtype": "f32",
        "peer": peer,
        "dtype": dtype,
        **facts,
    }
    path = folder / f"{checkpoint.name}_{peer}_{dtype}.npz"
    np.savez_compressed(path, meta=np.array(json.dumps(meta, indent=1)), **arrays)
    return path


@dataclass(frozen=True)
class Golden:
    """One golden file, read back."""

    path: Path
    meta: dict[str, Any]
    arrays: dict[str, Array]

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's configuration."""
        return from_hf(self.meta["config"])

    def weights(self) -> dict[str, Array]:
        """The checkpoint's float32 weights, made again; refuses to go on if they have drifted."""
        weights = random_weights(self.config, self.meta["seed"])
        found, expected = weights_sha256(weights), self.meta["weights_sha256"]
        if found != expected:
            raise AssertionError(
                f"{self.path.name}: the synthesiser no longer makes the weights this file was "
                f"made from (sha256 {found[:12]}, expected {expected[:12]}); regenerate the goldens"
            )
        return weights


def load(path: Path) -> Golden:
    """Read a golden file written by `save`."""
    arrays, meta = read_golden(path)
    if meta.get("magic") != MAGIC or "peer" not in meta:
        raise AssertionError(f"{path.name} is not a golden file of a peer")
    return Golden(path, meta, arrays)


def goldens(peer: str = "*", dtype: str = "*", checkpoint: str = "*") -> list[Path]:
    """The committed golden files that match, sorted by name."""
    return sorted(FOLDER.glob(f"{checkpoint}_{peer}_{dtype}.npz"))


def greedy(
    step: Callable[[list[int]], Array], prompt: Array, new_tokens: int = NEW_TOKENS
) -> tuple[Array, Array]:
    """Greedy continuation with a peer's own cache.

    `step` takes the tokens not yet seen and gives the logits (V,) after the last of them. Stop
    tokens are ignored. Returns `greedy` (N,) and `greedy_logits` (N, V), the logits that each
    token was taken from.
    """
    tokens, rows = [], []
    pending = [int(t) for t in prompt]
    for _ in range(new_tokens):
        rows.append(step(pending))
        tokens.append(int(rows[-1].argmax()))
        pending = tokens[-1:]
    return np.array(tokens, dtype=np.int64), np.stack(rows)
