"""What the quantisation script and its tests agree on: models, tensors, how types are written down.

Only NumPy and `refimpl` are used here.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.checkpoint.slice import published_config, slice_config
from refimpl.checkpoint.synth import PRESETS, weight_std
from refimpl.config import ModelConfig
from refimpl.config_io import from_hf
from refimpl.inventory import TensorSpec

Array = NDArray[Any]

FOLDER = Path(__file__).resolve().parent
RECORD = FOLDER / "quantize.json"
MINI = FOLDER.parents[1] / "refimpl" / "mini" / "bf16"
SEED = 11


def wide() -> ModelConfig:
    """tiny_a with rows that fill blocks of 256 values, but for some of attn_output's."""
    return dataclasses.replace(
        PRESETS["tiny_a"](), hidden_size=256, intermediate_size=512, head_dim=64,
        moe_intermediate_size=256, share_expert_dim=256, vocab_size=512,
    )  # fmt: skip


def odd() -> ModelConfig:
    """Rows of 256, of 96 and of 40 values: blocks of 256, blocks of 32, none."""
    return dataclasses.replace(
        wide(), moe_intermediate_size=96, share_expert_dim=40, sliding_attention_heads=8
    )


def mini() -> ModelConfig:
    """The embedded model."""
    return from_hf(json.loads((MINI / "config.json").read_text()))


CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "published": lambda: published_config(0),
    "published with MTP": lambda: published_config(3),
    "slice": lambda: slice_config(16, 512, 1),
    "mini": mini,
    "mini without MTP": lambda: mini().without_mtp(),
    "eight experts": lambda: dataclasses.replace(wide(), moe_num_experts=8, moe_top_k=2),
    "wide": wide,
    "odd": odd,
    **PRESETS,
}
"""The models whose tensor types are recorded."""


def heavy_chunks(spec: TensorSpec) -> Iterator[Array]:
    """Values with outliers: Student's t with four degrees of freedom, seeded."""
    rng = np.random.default_rng([SEED, len(spec.hf_name), sum(spec.hf_name.encode())])
    for start in range(0, spec.shape[0], 4096 if len(spec.shape) < 3 else 1):
        n = min(4096, spec.shape[0] - start) if len(spec.shape) < 3 else 1
        values = rng.standard_t(4, (n, *spec.shape[1:])) * weight_std(spec) / np.sqrt(2.0)
        yield values.astype(np.float32)


def compact(types: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Type by tensor name as type -> name without its layer -> layers, such as '0-4, 7'."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, kind in types.items():
        if name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            found[kind][rest].append(int(layer))
        else:
            found[kind][name] = []
    return {
        kind: {rest: _ranges(layers) for rest, layers in sorted(names.items())}
        for kind, names in sorted(found.items())
    }


def _ranges(layers: list[int]) -> str:
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def rms(difference: Array) -> float:
    """Root mean square in float64."""
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
