"""Which type each tensor of a GGUF file gets: llama.cpp's default mixtures, without an imatrix.

Source: llama.cpp src/llama-quant.cpp (`tensor_allows_quantization`, `llama_tensor_get_type`,
`tensor_type_fallback`) as of llama-cpp-python 0.3.36, reduced to what the architecture `step35`
has. `tests/golden/quantize.json` records llama-quantize's own choices and the tests compare.

The rules in words, n being the number of layers with the MTP layers that are written:

* vectors, norms, the router and its bias, and the RoPE divisors stay F32;
* the output head gets Q6_K, or Q8_0 where the file's main type is Q8_0 or does not divide rows;
  the heads of MTP layers and the embedding table get the main type;
* attn_v and ffn_down (dense, routed and shared alike) of some layers get a better type, as
  `_Mixture` lists;
* with exactly eight experts attn_v and attn_k get Q8_0, and attn_output Q5_K in 4-bit mixtures
  of the newer types;
* a type whose blocks do not divide the rows gives way to one of 32 values, and that to F16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refimpl.checkpoint.block_types import block_type
from refimpl.config import ModelConfig
from refimpl.inventory import TensorSpec

TypeOf = Callable[[TensorSpec], str]
Layers = Callable[[int, int], bool]
"""Whether a layer is one of those that get more bits: (layer, number of layers) -> bool."""


def _never(layer: int, n: int) -> bool:
    return False


def _first_four(layer: int, n: int) -> bool:
    return layer < 4


def _first_eighth(layer: int, n: int) -> bool:
    return layer < n // 8


def _ends_and_every_third(layer: int, n: int) -> bool:
    """The first and the last eighth, and every third layer between them."""
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _every(layer: int, n: int) -> bool:
    return True


@dataclass(frozen=True)
class _Mixture:
    """One kind of file.

    Attributes:
        main: the type of most matrices.
        file_type: `general.file_type` as llama.cpp numbers it (llama.h, `llama_ftype`).
        better: what attn_v and ffn_down get in the layers below.
        attn_v, ffn_down: those layers. attn_v's rule applies only where at least
            `attn_v_heads` query heads share a KV head (in layer 0, as llama.cpp counts).
        eight_expert_output: attn_output's type in models of exactly eight experts.
    """

    main: str
    file_type: int
    better: str = ""
    attn_v: Layers = _never
    ffn_down: Layers = _never
    attn_v_heads: int = 0
    eight_expert_output: str = ""


MIXTURES = {
    "f32": _Mixture("F32", 0),
    "f16": _Mixture("F16", 1),
    "bf16": _Mixture("BF16", 32),
    "q8_0": _Mixture("Q8_0", 7),
    "q4_0": _Mixture("Q4_0", 2),
    "q4_k_s": _Mixture("Q4_K", 14, "Q5_K", _first_four, _first_eighth, 0, "Q5_K"),
    "q4_k_m": _Mixture("Q4_K", 15, "Q6_K", _ends_and_every_third, _ends_and_every_third, 0, "Q5_K"),
    "q5_k_s": _Mixture("Q5_K", 16),
    "q5_k_m": _Mixture("Q5_K", 17, "Q6_K", _ends_and_every_third, _ends_and_every_third),
    "q6_k": _Mixture("Q6_K", 18),
    "iq4_nl": _Mixture("IQ4_NL", 25, "Q5_K", _every, _first_eighth, 4, "Q5_K"),
    "iq4_xs": _Mixture("IQ4_XS", 30, "Q5_K", _every, _first_eighth, 4, "Q5_K"),
}
"""Name of a file's type to its mixture."""

FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
"""What takes the place of a type of 256-value blocks where rows do not fill them."""

_DOWN = ("down_proj", "experts.down", "shared.down")


def file_type_id(name: str) -> int:
    """`general.file_type` of a type's files, as llama.cpp numbers it."""
    return MIXTURES[name].file_type


def mixture(name: str, config: ModelConfig) -> TypeOf:
    """The type of each tensor in a file of that type (a key of `MIXTURES`).

    Args:
        config: the model as it is written; MTP layers count as layers where they are kept.
    """
    chosen = MIXTURES[name]
    plain = block_type(chosen.main).plain is not None

    def type_of(spec: TensorSpec) -> str:
        if spec.stays_f32 or len(spec.shape) == 1:
            return "F32"
        return chosen.main if plain else _that_fits(spec, _wanted(chosen, spec, config))

    return type_of


def _wanted(mix: _Mixture, spec: TensorSpec, config: ModelConfig) -> str:
    """The mixture's choice for a matrix, whatever the length of its rows."""
    if spec.key == "lm_head":
        odd = spec.shape[-1] % block_type(mix.main).block_values
        return "Q8_0" if odd or mix.main == "Q8_0" else "Q6_K"
    if spec.layer is None:
        return mix.main
    n, eight = config.num_layers, config.moe_num_experts == 8
    if spec.key == "v_proj":
        first = config.layers[0]
        shared_by = first.num_attention_heads // first.num_attention_groups
        if eight:
            return "Q8_0"
        if shared_by >= mix.attn_v_heads and mix.attn_v(spec.layer, n):
            return mix.better
    elif spec.key == "k_proj" and eight:
        return "Q8_0"
    elif spec.key in _DOWN and mix.ffn_down(spec.layer, n):
        return mix.better
    elif spec.key == "o_proj" and eight:
        return mix.eight_expert_output or mix.main
    return mix.main


def _that_fits(spec: TensorSpec, name: str) -> str:
    for fitting in (name, FALLBACK.get(name, name)):
        if spec.shape[-1] % block_type(fitting).block_values == 0:
            return fitting
    return "F16"
