"""How a model that is larger than memory divides the memory that it may use."""

from __future__ import annotations

from refimpl.checkpoint.stored import StoredSource
from refimpl.engine.disk import supported
from refimpl.engine.expert_files import shared_parts, slot_bytes
from refimpl.engine.expert_slots import minimal_slots, require_slots
from refimpl.engine.files import fits_memory
from refimpl.engine.memory import available_bytes, own_bytes, round_up, size_text
from refimpl.engine.program import Program
from refimpl.errors import InputError

_LEAST_SPARE, _MOST_SPARE = 256 << 20, 1 << 30


def planned_slots(
    source: StoredSource, program: Program, memory_bytes: int | None = None, cache_bytes: int = 0
) -> int | None:
    """Slots for experts in memory, or None if the checkpoint is used from its memory map alone:
    all of it fits, it has no routed experts, or this system cannot read into given memory.

    Args:
        memory_bytes: what the process may use, mapped files included; by default what is free
            but for a sixteenth (256 MB to 1 GB).
        cache_bytes: of a cache that is to be made beside them: slots include the room for it.

    Raises:
        InputError: less than a step needs, the cache aside, or more than there is.
    """
    size = sum(file.size for file in program.files)
    if not supported() or not any(spec.is_moe for spec in source.config.layers):
        return None
    if memory_bytes is None and fits_memory(program.files):
        return None
    free, left = available_bytes(), "that are free for it"
    if memory_bytes is None:
        room = free - min(max(free // 16, _LEAST_SPARE), _MOST_SPARE)
    elif memory_bytes >= size + cache_bytes + own_bytes():
        return None
    elif memory_bytes > free + own_bytes():
        raise InputError(
            f"{size_text(memory_bytes)} of memory may be used, but only {size_text(free)} are "
            "free; allow less"
        )
    else:
        own = own_bytes()
        room = memory_bytes - own
        left = f"that {size_text(memory_bytes)} leave beside the {size_text(own)} of this process"
    slots, each = _slots(source, program, size, room, left), slot_bytes(source)
    beside = round_up(cache_bytes, each) // each
    require_slots(slots - beside, minimal_slots(source.config), each, cache_bytes)
    moe = sum(spec.is_moe for spec in source.config.layers)
    return min(slots, moe * source.config.moe_num_experts + beside)


def _slots(source: StoredSource, program: Program, size: int, room: int, left: str) -> int:
    """As many as there is room for beside what every token needs, more than experts even; `left`
    says in a refusal what the room is."""
    shared = sum(length for _, _, length in shared_parts(source, program.files))
    working = sum(part.nbytes for part in program.working_memory())
    each, least = slot_bytes(source), minimal_slots(source.config)
    slots = (room - shared - working) // each
    if slots < least:
        needed = shared + working + least * each
        raise InputError(
            f"the model's {size_text(size)} do not fit the {size_text(max(0, room))} "
            f"{left}, and experts cannot be left on disk with less than {size_text(needed)}: "
            f"{size_text(shared)} that every token reads, {size_text(working)} to compute in, "
            f"{size_text(least * each)} for {least} experts; "
            "free or allow more memory, or use a smaller type"
        )
    return int(slots)
