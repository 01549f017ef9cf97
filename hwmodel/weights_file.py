"""Sizes read from a checkpoint: any GGUF file, or a Hugging Face folder, of this architecture.

The header is read by `refimpl.checkpoint`, whose reader is strict about hostile files; no weight
is decoded. Imported only where a file is given, so that a plan without one stays light.
"""

from __future__ import annotations

from pathlib import Path

from hwmodel.model import ModelShape, shape_of_config
from hwmodel.quant import Quant, bits_per_weight

# Storage types that stand for a number of bits, for the efficiencies of the fit.
_TYPICAL = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XXS")


def read_weights(path: Path) -> tuple[ModelShape, Quant]:
    """The shape of the model in a checkpoint and the stored bytes of its tensors.

    Raises:
        CheckpointError, ConfigError: the file is damaged, incomplete, or of another architecture.
    """
    from refimpl.checkpoint.open import open_checkpoint
    from refimpl.inventory import inventory

    source = open_checkpoint(path)
    try:
        shape = shape_of_config(source.config, path.stem)
        table = inventory(source.config)
        sizes = tuple(source.stored_bytes(t.key, t.layer) for t in table)
    finally:
        source.close()
    matrices = [
        (8.0 * size / t.elements, t.elements)
        for t, size in zip(table, sizes, strict=True)
        if t.part in ("routed", "dense", "attention") and len(t.shape) > 1
    ]
    bits = sum(b * n for b, n in matrices) / sum(n for _, n in matrices)
    default = min(_TYPICAL, key=lambda name: abs(bits_per_weight(name) - bits))
    return shape, Quant(path.name, default, "file", sizes=sizes)
