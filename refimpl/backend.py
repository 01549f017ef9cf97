"""What a backend offers: the interface between the mathematics and the decoding loop.

The reference (`refimpl.reference.model.ReferenceModel`) and the engine implement `Backend`;
`refimpl.decoding` knows nothing else of either. Axes: T rows of one call, H hidden_size,
V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refimpl.config import ModelConfig

Array = NDArray[Any]
Tokens = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Step:
    """Result of running T tokens through the trunk.

    Attributes:
        logits: (T, V) after `decode`; (1, V), the last row only, after `prefill` unless all
            rows were asked for.
        hidden: (T, H), the trunk's output before the final norm: what the MTP layers take.
    """

    logits: Array
    hidden: Array


class Cache(Protocol):
    """Keys and values of one sequence: trunk layers, MTP layers, and what drafting keeps."""

    @property
    def length(self) -> int:
        """Tokens that the trunk has processed and not rolled back."""

    @property
    def capacity(self) -> int:
        """The most tokens that this cache can hold."""

    def rollback(self, n: int) -> None:
        """Forget the trunk's last `n` rows (rejected drafts); `n` is at most 3."""

    def shorten_history(self, keep: int) -> None:
        """Of the rows that wait for the MTP layers (`Backend.draft` runs them when drafting
        begins), all but the newest `keep` may be left out: drafts then rest on less of the text
        and are judged as ever. A backend may ignore it."""

    def export(self) -> dict[str, Array]:
        """Everything that is needed to go on from here, by name (see `decoding.state`)."""

    def refill(self, arrays: dict[str, Array]) -> None:
        """Fill this empty cache with what `export` gave for another one of the same backend;
        takes what it uses out of `arrays`. Raises `InputError` for anything that does not fit."""

    def snapshot(self) -> Any:
        """What `restore` needs to come back to this moment: the rows that rings will overwrite
        are copied, those of full-attention layers are not."""

    def restore(self, snapshot: Any) -> None:
        """Back to the moment of `snapshot`, any number of tokens ago; it stays usable until a
        `rollback` or an older `restore` goes behind it."""


class Backend(Protocol):
    """A model that can be run. All methods raise `InputError` for bad tokens or lengths."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration; `config.num_nextn_predict_layers` MTP layers are usable."""

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for at most `capacity` tokens."""

    def identity(self) -> Mapping[str, str]:
        """What the bits of a cache depend on besides its tokens: 'weights' (a fingerprint) and
        'arithmetic' (the backend with its precision, KV type, instruction set and kernels)."""

    def prefill(self, tokens: Tokens, cache: Cache, all_logits: bool = False) -> Step:
        """Append a chunk of a prompt; any split into chunks gives the same result."""

    def decode(self, tokens: Tokens, cache: Cache) -> Step:
        """Append 1..4 tokens (the newest token and drafts to verify); logits of every row."""

    def draft_cost(self, depth: int) -> float:
        """What a step that drafts and verifies `depth` tokens reads, over what a plain step does:
        a guess at its time before it has been measured."""

    def draft(
        self,
        cache: Cache,
        hidden: Array,
        next_tokens: Tokens,
        depth: int,
        choose: Callable[[Array], int],
    ) -> list[int]:
        """Extend the MTP layers with verified rows and draft up to `depth` further tokens.

        Call it after every `prefill` (each chunk; depth 0 is allowed) and every verified
        `decode`, so that the MTP layers see every row once.

        Args:
            hidden: (R, H) rows of `Step.hidden` for the R newest verified positions, in order.
            next_tokens: R tokens; `next_tokens[r]` is the verified token that follows row r
                (the last one is the newest token, not yet run through the trunk).
            depth: how many drafts are wanted, 0..number of MTP layers.
            choose: picks a token from the draft logits (V,); called once per draft, in order.
        """
