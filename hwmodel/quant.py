"""Weight types and mixtures: how many bytes each tensor of a model takes.

A quantisation as people name it ("Q4_K_S", "FP8") is a rule that gives every tensor its storage
type. The rules of the GGUF mixtures follow llama.cpp's `llama-quant.cpp`
(`llama_tensor_get_type_impl`, without an importance matrix unless the mixture demands one); block
sizes are ggml's. FP8 of Step 3.5 Flash stores the routed experts only, one float32 scale per
128 x 128 block (repository stepfun-ai/Step-3.5-Flash-FP8).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

from refimpl.errors import InputError

if TYPE_CHECKING:
    from hwmodel.model import ModelShape, TensorCount

# storage type -> (elements per block, bytes per block)
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "FP8": (1, 1),
    "FP8_BLOCK": (128 * 128, 128 * 128 + 4),
    "Q8_0": (32, 34),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "Q3_K": (256, 110),
    "IQ3_S": (256, 110),
    "IQ3_XXS": (256, 98),
    "Q2_K": (256, 84),
    "IQ2_S": (256, 82),
    "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66),
    "IQ1_M": (256, 56),
    "IQ1_S": (256, 50),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "INT8": (128, 130),
    "INT4_G128": (128, 66),  # 4-bit groups of 128 with one 16-bit scale
    "INT4_G32": (32, 18),
    "MLX4": (64, 36),  # 4-bit groups of 64 with 16-bit scale and bias
    "MLX8": (64, 68),
    "MLX6": (64, 52),
    "MLX5": (64, 44),
    "MLX3": (64, 28),
}

# Storage types whose decoding costs alike, for the efficiencies of the fit.
FAMILIES: dict[str, str] = {
    "F32": "f16", "F16": "f16", "BF16": "f16", "FP8": "fp8", "FP8_BLOCK": "fp8",
    "Q8_0": "q8_0", "INT8": "q8_0", "MLX8": "q8_0",
    "Q6_K": "q6_k", "Q5_K": "q5_k", "Q5_0": "q5_k", "Q5_1": "q5_k", "MLX6": "q6_k", "MLX5": "q5_k",
    "Q4_K": "q4_k", "Q4_0": "q4_0", "Q4_1": "q4_0", "MLX4": "q4_0", "INT4_G128": "q4_0",
    "INT4_G32": "q4_0", "IQ4_NL": "iq4", "IQ4_XS": "iq4", "MXFP4": "mxfp4", "NVFP4": "nvfp4",
    "Q3_K": "q3_k", "IQ3_S": "iq3", "IQ3_XXS": "iq3", "MLX3": "q3_k", "Q2_K": "q2_k",
    "IQ2_S": "iq2", "IQ2_XS": "iq2", "IQ2_XXS": "iq2", "IQ1_M": "iq2", "IQ1_S": "iq2",
}  # fmt: skip


def block_bytes(storage: str, elements: int) -> Fraction:
    """Exact bytes of `elements` values of a storage type (a fraction for part blocks)."""
    size, stored = BLOCKS[storage]
    return Fraction(elements * stored, size)


def bits_per_weight(storage: str) -> float:
    """Stored bits per value of a storage type."""
    size, stored = BLOCKS[storage]
    return 8.0 * stored / size


UNPACKED = ("F32", "F16", "BF16")  # storage types that are numbers, not blocks


@dataclass(frozen=True)
class Quant:
    """A named quantisation.

    Attributes:
        name: canonical name.
        default: storage type of a matrix that no rule singles out.
        rule: which set of exceptions applies: `gguf` (llama.cpp's mixtures), `routed` (only the
            routed experts are quantised, the rest is BF16), `linear` (all matrices of the layers,
            embedding and head stay BF16), `mlx` (everything but norms), `mxfp4` (experts MXFP4,
            the rest Q8_0 as llama.cpp does or BF16 as published), `file` (sizes as read from a
            checkpoint), or `plain`.
        sizes: for `file`, stored bytes of each tensor of the model, in the model's order.
        down: storage type of the routed experts' down projections where it is another.
        holds_mtp: for `file`, whether the MTP layers are in it.
    """

    name: str
    default: str
    rule: str
    rest: str = "BF16"
    sizes: tuple[int, ...] = ()
    down: str = ""
    holds_mtp: bool = False

    @property
    def family(self) -> str:
        """Group of storage types with similar decoding cost, decided by the bulk of the file."""
        return FAMILIES[self.default]

    @property
    def file(self) -> str:
        """The checkpoint whose sizes these are, empty for a named type."""
        return self.name if self.rule == "file" else ""

    @property
    def compute_type(self) -> str:
        """Key of `Device.flop_per_s` that a matrix product of this type can use at best."""
        return {"FP8": "fp8", "FP8_BLOCK": "fp8"}.get(self.default, "fp16")


def _quants() -> dict[str, Quant]:
    gguf = {
        "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K", "Q5_0": "Q5_0",
        "Q5_1": "Q5_1", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q4_0": "Q4_0", "Q4_1": "Q4_1",
        "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL", "Q3_K_L": "Q3_K", "Q3_K_M": "Q3_K",
        "Q3_K_S": "Q3_K", "IQ3_M": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_XS": "IQ3_S",
        "IQ3_XXS": "IQ3_XXS", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "IQ2_M": "IQ2_S",
        "IQ2_S": "IQ2_XS", "IQ2_XS": "IQ2_XS", "IQ2_XXS": "IQ2_XXS", "IQ1_M": "IQ1_M",
        "IQ1_S": "IQ1_S",
    }  # fmt: skip
    found = [Quant(name, storage, "gguf") for name, storage in gguf.items()]
    found += [
        Quant("F32", "F32", "plain"),
        Quant("F16", "F16", "plain"),
        Quant("BF16", "BF16", "plain"),
        Quant("FP8", "FP8_BLOCK", "linear"),
        Quant("FP8-experts", "FP8_BLOCK", "routed"),
        Quant("INT8", "INT8", "linear"),
        Quant("INT4", "INT4_G128", "linear"),
        Quant("INT4-experts", "INT4_G32", "routed"),
        # ds4's file is named IQ2XXS-w2Q2K-AProjQ8-SExpQ8-OutQ8 (github.com/antirez/ds4/pull/706).
        Quant("IQ2-experts", "IQ2_XXS", "routed", rest="Q8_0", down="Q2_K"),
        Quant("NVFP4", "NVFP4", "linear"),
        Quant("MXFP4", "MXFP4", "mxfp4", rest="Q8_0"),
        Quant("MXFP4-BF16", "MXFP4", "mxfp4", rest="BF16"),
        Quant("MLX-8bit", "MLX8", "mlx"),
        Quant("MLX-6bit", "MLX6", "mlx"),
        Quant("MLX-5bit", "MLX5", "mlx"),
        Quant("MLX-4bit", "MLX4", "mlx"),
        Quant("MLX-3bit", "MLX3", "mlx"),
    ]
    return {q.name: q for q in found}


QUANTS: dict[str, Quant] = _quants()


def load_quant(name: str) -> Quant:
    """The quantisation of a canonical name (case-insensitive).

    Raises:
        InputError: no such name; the message lists the nearest.
    """
    for known, quant in QUANTS.items():
        if known.lower() == name.strip().lower():
            return quant
    import difflib

    near = difflib.get_close_matches(name.upper(), QUANTS, n=4, cutoff=0.3)
    shown = ", ".join(near or QUANTS)
    raise InputError(f"quantisation '{name}' is not known; nearest: {shown}")


def closest_quant(bits: float) -> Quant:
    """The GGUF mixture whose bulk type has the nearest number of bits per weight."""
    candidates = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XXS", "IQ1_S")
    return min(
        (QUANTS[c] for c in candidates), key=lambda q: abs(bits_per_weight(q.default) - bits)
    )


def storage_types(model: ModelShape, quant: Quant) -> tuple[str, ...]:
    """The storage type of each tensor of `model.tensors`, in that order."""
    if quant.rule == "gguf":
        return tuple(_gguf_types(model, quant.name, quant.default))
    return tuple(_plain_type(t, quant) for t in model.tensors)


def tensor_bytes(model: ModelShape, quant: Quant) -> tuple[Fraction, ...]:
    """Stored bytes of each tensor of `model.tensors`, in that order."""
    if quant.rule == "file":
        return tuple(map(Fraction, quant.sizes))
    types = storage_types(model, quant)
    return tuple(block_bytes(s, t.elements) for t, s in zip(model.tensors, types, strict=True))


def _plain_type(t: TensorCount, quant: Quant) -> str:
    if t.kind == "bias":  # the router's selection bias stays float32 in every published form
        return "F32"
    if t.kind == "norm":
        return "BF16" if quant.rule != "mxfp4" else "F32"
    outside = t.kind in ("embedding", "head")
    if quant.rule in ("plain", "mlx"):
        return quant.default
    if quant.rule == "linear":
        return "BF16" if outside or t.kind == "router" or t.mtp else quant.default
    if t.role == "routed":
        return quant.down if quant.down and t.kind == "ffn_down" else quant.default
    if quant.rule == "mxfp4" and t.kind == "router":
        return "F32" if quant.rest == "Q8_0" else "BF16"
    return quant.rest


def _more_bits(layer: int, layers: int) -> bool:
    """The layers that llama.cpp's _M mixtures keep at higher precision."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _gguf_types(model: ModelShape, mixture: str, default: str) -> Iterable[str]:
    seen_v = 0
    n_v = sum(1 for t in model.tensors if t.kind == "attn_v" and not t.mtp)
    for t in model.tensors:
        if t.kind in ("norm", "bias", "router"):
            yield "F32"
        elif t.kind == "head" or (t.kind == "embedding" and model.tied_embedding):
            yield _head_type(mixture, default)
        elif t.kind == "embedding":
            yield _embedding_type(mixture, default)
        elif t.kind == "attn_v":
            yield _attn_v_type(mixture, default, seen_v, n_v, model.gqa, model.experts)
            seen_v += 1
        elif t.kind in ("attn_k", "attn_q"):
            yield _attn_qk_type(mixture, default, t.kind, model.experts)
        elif t.kind == "attn_o":
            yield _attn_o_type(mixture, default, model.experts)
        elif t.kind == "ffn_down":
            yield _ffn_down_type(mixture, default, t.layer, model.layers)
        elif t.kind in ("ffn_gate", "ffn_up") and mixture == "IQ3_XS":
            middle = model.layers // 8 <= t.layer < 7 * model.layers // 8
            yield "IQ3_XXS" if middle else default
        else:
            yield default


_IQ12 = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")


def _head_type(mixture: str, default: str) -> str:
    if mixture in (*_IQ12, "IQ3_XXS"):
        return "Q5_K"
    return "Q8_0" if default == "Q8_0" else "Q6_K"


def _embedding_type(mixture: str, default: str) -> str:
    if mixture in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return "Q2_K"
    return "IQ3_S" if mixture in ("IQ2_S", "IQ2_M", "IQ3_XXS") else default


def _attn_v_type(mixture: str, default: str, i: int, n: int, gqa: int, experts: int) -> str:
    wide = gqa >= 4
    if mixture in _IQ12:
        return "Q4_K" if wide or experts >= 4 else "Q2_K"
    rules = {
        "Q2_K": "Q4_K" if wide else "Q3_K",
        "Q2_K_S": "Q4_K" if wide else default,
        "IQ3_XXS": "Q4_K" if wide else "IQ3_S",
        "IQ3_XS": "Q4_K" if wide else default,
        "IQ3_S": "Q4_K" if wide else default,
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ4_NL": "Q5_K" if wide else default,
        "IQ4_XS": "Q5_K" if wide else default,
        "Q4_K_M": "Q6_K" if _more_bits(i, n) else default,
        "Q5_K_M": "Q6_K" if _more_bits(i, n) else default,
        "Q4_K_S": "Q5_K" if i < 4 else default,
    }
    chosen = rules.get(mixture, default)
    return "Q8_0" if experts == 8 else chosen


def _attn_qk_type(mixture: str, default: str, kind: str, experts: int) -> str:
    if kind == "attn_k" and experts == 8 and mixture not in _IQ12:
        return "Q8_0"
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mixture, default)


def _attn_o_type(mixture: str, default: str, experts: int) -> str:
    if experts == 8 and mixture in ("Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_XS", "IQ4_NL", "Q2_K"):
        return "Q5_K"
    return {
        "IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S",
        "Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K",
    }.get(mixture, default)  # fmt: skip


def _ffn_down_type(mixture: str, default: str, layer: int, layers: int) -> str:
    first = layer < layers // 8
    rules = {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if first else default,
        "IQ2_XXS": "Q2_K" if first else default,
        "IQ2_XS": "Q2_K" if first else default,
        "IQ2_S": "IQ3_S" if first else default,
        "IQ2_M": "IQ3_S" if first else default,
        "IQ1_S": "Q2_K" if first else default,
        "IQ1_M": "Q2_K" if first else default,
        "IQ3_M": "Q4_K" if first else default,
        "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_M": "Q6_K" if _more_bits(layer, layers) else default,
        "Q5_K_M": "Q6_K" if _more_bits(layer, layers) else default,
        "IQ4_NL": "Q5_K" if first else default,
        "IQ4_XS": "Q5_K" if first else default,
        "Q4_K_S": "Q5_K" if first else default,
    }
    return rules.get(mixture, default)


@lru_cache(maxsize=512)
def role_bytes(model: ModelShape, quant: Quant) -> dict[str, float]:
    """Stored bytes of the trunk by role, and of the MTP layers under `mtp`."""
    total: dict[str, Fraction] = {}
    for t, size in zip(model.tensors, tensor_bytes(model, quant), strict=True):
        key = "mtp" if t.mtp else t.role
        total[key] = total.get(key, Fraction(0)) + size
    return {role: float(value) for role, value in total.items()}


def weight_bytes(model: ModelShape, quant: Quant, mtp: bool = False) -> float:
    """Bytes of the weight file; the MTP layers count only with `mtp`."""
    return sum(v for role, v in role_bytes(model, quant).items() if mtp or role != "mtp")
