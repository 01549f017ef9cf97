"""Arithmetic: which of a device's peaks an engine's matrix products can reach, and what share.

A matrix product of many rows runs at the rate of the type that the kernel computes in, which is not
the type that the weights are stored in. llama.cpp on NVIDIA multiplies 8-bit integers (weights of
any block type, activations rounded to 8 bits); before July 2024 it unpacked the weights to 16 bits
first and let cuBLAS accumulate in 16 bits (github.com/ggml-org/llama.cpp/pull/8075); MXFP4 is
multiplied as it is on Blackwell since January 2026 (pull 17906). Servers multiply FP8 and, on
Blackwell, NVFP4 as stored, and unpack the other types to 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodel.effects import GROUPS, months_of
from hwmodel.placement import Machine
from hwmodel.quant import UNPACKED
from hwmodel.run import RunConfig

INTEGER_SINCE = 2024 * 12 + 6  # July 2024, github.com/ggml-org/llama.cpp/pull/8075
FP4_SINCE = 2026 * 12  # January 2026, github.com/ggml-org/llama.cpp/pull/17906
COMPUTE_PRIOR = 0.40  # of the dense peak, large prompts
# Other shares: integer kernels rescale every block (RTX 3090, 8B Q5_K_S: 53 of 284 TFLOP/s in pull
# 8062), native MXFP4 is 1.27 times as fast as integers at twice their peak (pull 17906), and
# block-scaled FP8 reaches 720 to 770 of 2,615 TFLOP/s on MI300X and 220 of 670 on MI308X
# (a8w8_blockscale_tuned_gemm.csv of github.com/ROCm/aiter).
INTEGER_PRIOR = 0.20
BLOCK_FP4_PRIOR = 0.13
CLASS_PRIOR = {"amd-instinct": 0.29}


@dataclass(frozen=True)
class Products:
    """How matrix products of many rows compute.

    `peak` in FLOP/s of all devices that compute at once, `share` of it that large products reach
    before any run is seen, `unpacked` whether weights are written out in 16 bits first.
    """

    peak: float
    share: float
    unpacked: bool = False


def products(run: RunConfig, m: Machine) -> Products:
    """The arithmetic of a run's prompts (and of the many rows of a batch)."""
    family = run.engine.engine.family
    share = CLASS_PRIOR.get(m.device_class, COMPUTE_PRIOR)
    if family == "llama.cpp" and m.device_class.startswith("nvidia") and m.flop_per_s.get("int8"):
        return _llama_cpp_on_nvidia(run, m)
    kind = run.quant.compute_type
    if GROUPS.get(family) == "server" and run.quant.default == "NVFP4" and "fp4" in m.flop_per_s:
        kind = "fp4"
    return Products(m.flop(kind), share)


def _llama_cpp_on_nvidia(run: RunConfig, m: Machine) -> Products:
    stored, integer = run.quant.default, m.flop_per_s["int8"]
    month = months_of(run.engine.date)
    if stored == "BF16":
        return Products(m.flop("bf16"), COMPUTE_PRIOR)
    half = Products(integer / 2, COMPUTE_PRIOR)  # 16 bits, sums in 16 bits: half the integer rate
    if stored in UNPACKED:
        return half
    if month is not None and month < INTEGER_SINCE:
        return Products(half.peak, half.share, unpacked=True)
    if stored == "MXFP4" and "fp4" in m.flop_per_s and (month is None or month >= FP4_SINCE):
        return Products(m.flop_per_s["fp4"], BLOCK_FP4_PRIOR)
    return Products(integer, INTEGER_PRIOR)
