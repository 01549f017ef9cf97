"""Where the routed experts of a checkpoint lie in its files, and what lies around them."""

from __future__ import annotations

from refimpl.checkpoint.stored import StoredSource, StoredTensor
from refimpl.engine.disk import BLOCK
from refimpl.engine.files import MappedFile, map_under, path_of
from refimpl.engine.memory import address, round_up

KEYS = ("experts.gate", "experts.up", "experts.down")


def stacks_of(source: StoredSource) -> dict[int, list[StoredTensor]]:
    """The stacked tensors of each MoE layer: gate, up, down."""
    moe = [spec.index for spec in source.config.layers if spec.is_moe]
    return {i: [source.stored(key, i) for key in KEYS] for i in moe}


def area_bytes(tensor: StoredTensor) -> int:
    """Room in a slot for one expert of a stack, wherever in its first block it begins."""
    return round_up(tensor.rows.nbytes // tensor.spec.shape[0] + BLOCK - 1, BLOCK)


def lies_in(tensor: StoredTensor, file: MappedFile) -> bool:
    """Whether a tensor's bytes are part of a mapped file."""
    return 0 <= address(tensor.rows) - file.address < file.size


def offset_of(tensor: StoredTensor, file: MappedFile) -> int:
    """Where a tensor begins in the file that it lies in, in bytes."""
    return address(tensor.rows) - file.address


def slot_bytes(source: StoredSource) -> int:
    """Bytes of a slot, which holds one expert of any layer."""
    return max(sum(area_bytes(t) for t in stacks) for stacks in stacks_of(source).values())


def shared_parts(
    source: StoredSource, files: tuple[MappedFile, ...]
) -> list[tuple[MappedFile, int, int]]:
    """The parts (file, start, length) of the files that are no routed experts, whole pages."""
    out = []
    for file in files:
        at = 0
        taken = sorted(
            (offset_of(t, file), t.rows.nbytes)
            for stacks in stacks_of(source).values()
            for t in stacks
            if lies_in(t, file)
        )
        for start, length in [*taken, (file.size, 0)]:
            low, high = at // BLOCK * BLOCK, min(round_up(start, BLOCK), file.size)
            if high > low:
                out.append((file, low, high - low))
            at = start + length
    return out


def expert_slices(source: StoredSource) -> list[tuple[str, int, int]]:
    """Path, offset and bytes of every matrix of every routed expert, for a probe of the disk."""
    out = []
    for stack in (t for stacks in stacks_of(source).values() for t in stacks):
        mapped = map_under(stack.rows)
        if mapped is None:
            continue
        path = path_of(stack)
        start, count = offset_of(stack, MappedFile.of(mapped, path)), stack.spec.shape[0]
        size = stack.rows.nbytes // count
        out += [(path, start + e * size, size) for e in range(count)]
    return out
