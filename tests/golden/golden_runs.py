"""The reference run on the golden files' checkpoints, and each array beside its counterpart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from golden_shared import NEW_TOKENS, Array, Golden
from threadpoolctl import threadpool_limits

from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.source import WeightSource
from refimpl.checkpoint.synth import synthesize
from refimpl.golden.dump import golden_arrays
from refimpl.reference.model import ReferenceModel
from refimpl.reference.variant import NORMATIVE, VARIANTS, Variant

WIRINGS = {"tf_wiring": "mtp_transformers", "llamacpp_wiring": "mtp_llamacpp"}
"""Arrays of a peer's own MTP wiring by prefix, and the variant that reproduces it."""


class Runs:
    """Runs the reference over golden checkpoints, each configuration once.

    Args:
        folder: where the checkpoints are made again, in float32.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: dict[str, WeightSource] = {}
        self._runs: dict[tuple[str, str, Variant, int | None, int], dict[str, Array]] = {}

    def source(self, golden: Golden) -> WeightSource:
        """The checkpoint of a golden file; its weights are checked against the file's sha256."""
        name = golden.meta["checkpoint"]
        if name not in self._sources:
            golden.weights()
            folder = synthesize(golden.config, golden.meta["seed"], self._folder / name, "f32")
            self._sources[name] = open_checkpoint(folder)
        return self._sources[name]

    def arrays(
        self,
        golden: Golden,
        dtype: str,
        variant: Variant = NORMATIVE,
        chunk: int | None = None,
        new: int = NEW_TOKENS,
    ) -> dict[str, Array]:
        """What `refimpl golden dump` would write for the golden file's prompt."""
        key = (golden.meta["checkpoint"], dtype, variant, chunk, new)
        if key not in self._runs:
            model = ReferenceModel(self.source(golden), dtype, variant)
            with threadpool_limits(1):  # matrices this small gain nothing from threads
                prompt = golden.arrays["prompt"].tolist()
                self._runs[key] = golden_arrays(model, prompt, new, chunk)
        return self._runs[key]

    def pairs(self, golden: Golden) -> Iterator[tuple[str, Array, Array]]:
        """(name, peer's array, ours) in the peer's precision, its own MTP wiring included."""
        dtype = golden.meta["dtype"]
        for name, theirs in golden.arrays.items():
            prefix, _, rest = name.partition("wiring_")
            if not rest:
                yield name, theirs, self.arrays(golden, dtype)[name]
                continue
            if rest == "rows":  # which rows of the teacher-forced arrays the peer's file holds
                continue
            wiring = prefix + "wiring"
            ours = self.arrays(golden, dtype, VARIANTS[WIRINGS[wiring]].flags)
            own = ours[f"mtp_{rest}" if rest.startswith("forced") else rest]
            rows = golden.arrays.get(f"{wiring}_rows")
            keep = rows is not None and rest.startswith("forced")
            yield name, theirs, own[rows] if keep else own
