"""Sizes read from a checkpoint: any GGUF file, or a Hugging Face folder, of this architecture.

The header is read by `refimpl.checkpoint`, whose reader is strict about hostile files; no weight
is decoded. Imported only where a file is given, so that a plan without one stays light.
"""

from __future__ import annotations

from pathlib import Path

from hwmodel.errors import RequestError
from hwmodel.model import ModelShape, TensorCount, shape_of_config
from hwmodel.quant import Quant, bits_per_weight, block_bytes

# Storage types that stand for a number of bits, for the efficiencies of the fit.
_TYPICAL = (
    "BF16", "FP8_BLOCK", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XXS",
)  # fmt: skip
_GGUF_TYPICAL = ("Q8_0", *(t for t in _TYPICAL if t != "FP8_BLOCK"))
MTP_STORAGE = "Q8_0"  # of the published file of MTP layers, which most trunk files lack


def read_weights(path: Path, model: ModelShape | None = None) -> tuple[ModelShape, Quant]:
    """The shape of the model in a checkpoint and the stored bytes of its tensors.

    Args:
        model: the model that the file must hold; where the file lacks its MTP layers, these get
            the size of the published file of their own. None takes the file's model as it is.

    Raises:
        CheckpointError, ConfigError: the file is damaged, incomplete, or of another architecture.
        RequestError: the file holds another model than `model`.
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
    usual = _TYPICAL if path.is_dir() else _GGUF_TYPICAL
    default = min(usual, key=lambda name: abs(bits_per_weight(name) - bits))
    holds_mtp = shape.mtp_layers > 0
    if model is not None:
        sizes = _sizes_in(model, shape, sizes, path)
        shape = model
    return shape, Quant(str(path), default, "file", sizes=sizes, holds_mtp=holds_mtp)


def _sizes_in(
    model: ModelShape, found: ModelShape, sizes: tuple[int, ...], path: Path
) -> tuple[int, ...]:
    """Sizes in the order of the model's tensors.

    Raises:
        RequestError: the trunks differ, or the MTP layers that both have.
    """

    def key(t: TensorCount) -> tuple[object, ...]:
        return t.kind, t.role, t.layer, t.elements, t.mtp

    stored: dict[tuple[object, ...], list[int]] = {}
    for t, size in zip(found.tensors, sizes, strict=True):
        stored.setdefault(key(t), []).append(size)
    ordered = []
    for t in model.tensors:
        of_kind = stored.get(key(t), [])
        if of_kind:
            ordered.append(of_kind.pop(0))
        elif t.mtp and not found.mtp_layers:
            ordered.append(round(block_bytes(MTP_STORAGE, t.elements)))
        else:
            raise _other_model(model, found, path)
    if any(stored.values()) or found.attention != model.attention:
        raise _other_model(model, found, path)
    return tuple(ordered)


def _other_model(model: ModelShape, found: ModelShape, path: Path) -> RequestError:
    def text(m: ModelShape) -> str:
        return (
            f"{m.layers} layers, width {m.hidden_size}, {m.experts} experts, "
            f"{m.parameters / 1e9:.4g} B parameters"
        )

    return RequestError(
        f"{path}: holds another model ({text(found)}), expected {model.name} ({text(model)})"
    )
