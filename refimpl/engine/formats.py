"""Stored types that the kernels read in place (architecture notes, section 4.5).

A `Format` is a parameter object of the kernel templates. Values of a row lie in blocks of
`block_values` values; kernels walk them in sub-blocks of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.engine.simd import Parameter

SUB_BLOCK = 32
"""Values that share one activation scale; every row length must be a multiple of it."""


@dataclass(frozen=True)
class Format(Parameter):
    """A stored type.

    Attributes:
        block_values, block_bytes: size of a block.
        kind512: how AVX512 kernels want int8 activations (see `refimpl.engine.activations`), or
            '' where products are taken in float32.
        offset: what is added to the signed codes of the type to make them unsigned.
    """

    block_values: int
    block_bytes: int
    kind512: str = ""
    offset: int = 0

    @property
    def sub_blocks(self) -> int:
        """Sub-blocks of 32 values in a block."""
        return self.block_values // SUB_BLOCK


FORMATS = {
    f.name: f
    for f in (
        # plain types are walked 32 values at a time as well
        Format("F32", 32, 128),
        Format("F16", 32, 64),
        Format("BF16", 32, 64),
        Format("Q4_0", 32, 18, "eights", 8),
        Format("Q5_0", 32, 22, "quads", 16),
        Format("IQ4_NL", 32, 18, "eights", 128),
        Format("Q5_1", 32, 24, "quads_min"),
        Format("Q8_0", 32, 34, "fours", 128),
        Format("Q4_K", 256, 144, "super_high_min"),
        Format("Q5_K", 256, 176, "super_min"),
        Format("Q6_K", 256, 210, "super", 32),
        Format("IQ4_XS", 256, 136, "super_halves", 128),
    )
}

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 values of the IQ4 types."""
