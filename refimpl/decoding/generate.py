"""The loop that continues a prompt, over any backend.

    prefill the prompt in chunks, pick the first token from its last logits; then in each step
    draft from the MTP layers, verify newest token and drafts in one trunk pass, keep what
    stands, roll the rest back (architecture of multi-token prediction: `refimpl.backend`).

Every step is recorded once, whole, after it is decided; ids, text and statistics all come from
these records, so that an interruption at any moment leaves them consistent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from refimpl.backend import Array, Backend, Cache, Step, Tokens
from refimpl.decoding.generation import (
    DraftStats,
    GenerateOptions,
    Generation,
    StepRecord,
    Timings,
)
from refimpl.decoding.kept import KeptCache
from refimpl.decoding.kv import SPECULATIVE_ROWS
from refimpl.decoding.policy import AutoDepth, DraftPolicy, FixedDepth
from refimpl.decoding.sampling import fresh_seed
from refimpl.decoding.speculative import Picker
from refimpl.decoding.state import SavedPrompt
from refimpl.decoding.stopping import Ending, FinishReason, TextDecoder
from refimpl.errors import InputError

_HISTORY = 7
"""Rows of the text that drafts rest on when a depth is taken up in the middle; the more there are,
the dearer the first step, and they come by themselves from there."""
_WAITING = 16
"""Verified rows that wait here before they are handed over to the MTP layers."""

OnTokens = Callable[[Sequence[int], str], None]
OnPrefill = Callable[[int, int], None]
OnPrefilled = Callable[[Cache, Step], None]


def generate(
    backend: Backend,
    prompt_ids: Tokens,
    options: GenerateOptions,
    *,
    new_decoder: Callable[[], TextDecoder] | None = None,
    on_tokens: OnTokens | None = None,
    on_prefill: OnPrefill | None = None,
    kept: KeptCache | None = None,
    mark: int = 0,
    saved: SavedPrompt | None = None,
    on_prefilled: OnPrefilled | None = None,
    policy: DraftPolicy | None = None,
) -> Generation:
    """Continue `prompt_ids` until a stop, the wanted number of tokens, or the context's end.

    Args:
        backend: reference or engine.
        prompt_ids: (T,) the prompt, at least one token.
        options: what is wanted.
        new_decoder: makes the decoder of the new tokens' text; needed for text and stop strings.
        on_tokens: called after each step with its new ids and the text that can now be shown;
            once more at the end, with no ids, if text was still held back.
        on_prefill: called after each chunk with the tokens done and the tokens in all.
        kept: the cache of a conversation: what it holds of the prompt is not run again. Its
            capacity should be `options.context`.
        mark: after so many tokens of the prompt, mark the moment in `kept` (0: do not).
        saved: the prompt's beginning as a state file holds it, which is not run again; not
            together with `kept`.
        on_prefilled: called once the prompt has been run, with what `save_state` takes.
        policy: the draft policy of earlier texts of this open model, made by `policy_for` (None:
            a new one).

    Returns:
        What there is; after Ctrl-C (KeyboardInterrupt, from anywhere) what there is until then.

    Raises:
        InputError: the prompt is empty, holds an id outside the vocabulary or exceeds the
            context, does not begin with the tokens of `saved`, the model has too few MTP layers
            for `options.mtp`, or `policy` is another one's.
    """
    if options.stop_strings and new_decoder is None:
        raise InputError("stop strings need the text: give generate() a decoder")
    # A state is for runs with drafts too, so the MTP layers must see the rows of its prompt.
    drafting = options.mtp != 0 or on_prefilled is not None
    chosen = _begun(policy, policy_for(backend, options.mtp))
    run = _Run(backend, prompt_ids, options, chosen, new_decoder, on_tokens, kept, saved, drafting)
    try:
        run.prefill(on_prefill, mark, on_prefilled)
        while run.finish_reason is None:
            run.step()
        run.flush()
    except KeyboardInterrupt:
        run.finish_reason = "interrupted"
    return run.result()


def check_prompt(prompt_ids: Tokens, vocab_size: int, context: int) -> list[int]:
    """`prompt_ids` as a list of ids.

    Raises:
        InputError: no ids, an id outside 0..vocab_size-1, or more of them than `context`.
    """
    ids = [int(i) for i in prompt_ids]
    if not ids:
        raise InputError("the prompt is empty: give at least one token")
    for at, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token {at} of the prompt is {token}, outside the model's vocabulary "
                f"(0..{vocab_size - 1})"
            )
    if len(ids) > context:
        raise InputError(
            f"the prompt has {len(ids)} tokens, the context holds {context}: shorten the prompt"
        )
    return ids


def draft_policy(
    mtp: int | str, layers: int, cost: Callable[[int], float] | None = None
) -> DraftPolicy:
    """The policy that `mtp` (a number of drafts or "auto") asks of a model with MTP `layers`.

    `cost` is `Backend.draft_cost`; without it, drafts are first thought to cost nothing.

    Raises:
        InputError: more drafts than layers, or than one step can verify.
    """
    if mtp == "auto":
        most = min(layers, SPECULATIVE_ROWS)
        return AutoDepth(most, cost and [cost(k) for k in range(1, most + 1)])
    depth = int(mtp)
    if depth > SPECULATIVE_ROWS:
        raise InputError(f"mtp is {depth}; at most {SPECULATIVE_ROWS} drafts can be verified")
    if depth > layers:
        have = f"{layers} MTP layer" + ("" if layers == 1 else "s")
        raise InputError(f"mtp is {depth}, but the model has {have}: ask for at most {layers}")
    return FixedDepth(depth)


def policy_for(backend: Backend, mtp: int | str) -> DraftPolicy:
    """The policy of a model's texts with so many drafts; `generate` can be given it for one text
    after the other.

    Raises:
        InputError: as `draft_policy`.
    """
    cost = backend.draft_cost if mtp == "auto" else None
    return draft_policy(mtp, backend.config.num_nextn_predict_layers, cost)


def _begun(kept: DraftPolicy | None, wanted: DraftPolicy) -> DraftPolicy:
    """The kept policy, told of a new text, if it is one for what is wanted."""
    if kept is None:
        return wanted
    if (kept.mtp, kept.most) != (wanted.mtp, wanted.most):
        raise InputError(
            f"the kept draft policy is for mtp {kept.mtp} (at most {kept.most} drafts), this text "
            f"wants mtp {wanted.mtp} (at most {wanted.most}): keep one for each model and mtp"
        )
    kept.begin()
    return kept


class _Run:
    """One generation under way."""

    def __init__(
        self,
        backend: Backend,
        prompt_ids: Tokens,
        options: GenerateOptions,
        policy: DraftPolicy,
        new_decoder: Callable[[], TextDecoder] | None,
        on_tokens: OnTokens | None,
        kept: KeptCache | None,
        saved: SavedPrompt | None,
        drafting: bool,
    ) -> None:
        config = backend.config
        layers = config.num_nextn_predict_layers
        context = options.context or config.max_position_embeddings
        stops = config.eos_token_id if options.stop_tokens is None else options.stop_tokens
        sampling = options.sampling
        seed = fresh_seed() if sampling.seed is None else sampling.seed
        self._backend = backend
        self._prompt = check_prompt(prompt_ids, config.vocab_size, context)
        self._options = options
        self._policy = policy
        self._drafting = drafting and layers > 0
        if saved is not None:
            saved.require_prefix(self._prompt)
        # The trunk runs every token but the newest: one more token than positions is possible.
        room = context + 1 - len(self._prompt)
        self._ending = Ending(
            frozenset(stops), options.stop_strings, options.max_new_tokens, room, new_decoder
        )
        self._on_tokens = on_tokens
        # Drafts may go beyond the last wanted token, but never beyond the context.
        wanted = len(self._prompt) + options.max_new_tokens + layers
        self._kept = kept or KeptCache(backend, min(wanted, context))
        self._done = self._kept.begin(self._prompt, self._drafting)
        self._cache = self._kept.cache
        self._resumed: Step | None = None
        if saved is not None:
            self._resumed, self._done = saved.fill(self._cache, config), len(saved.tokens)
        self._all = list(self._prompt)  # tokens of the trunk and the newest one
        self._seed = None if sampling.greedy else seed
        self._picker = Picker(sampling, np.random.default_rng(seed))
        # Newest rows, (R, H) each, and the token after each row.
        self._hidden: list[Array] = []
        self._following: list[int] = []
        # A fixed depth rests on all of the text, so the first step is none that goes deeper.
        self._depth_before = SPECULATIVE_ROWS
        self._started = time.perf_counter()
        self._prefill_s = 0.0
        self._ttft_s: float | None = None
        self._first: tuple[int, ...] = ()
        self._records: list[StepRecord] = []
        self.finish_reason: FinishReason | None = None

    def prefill(
        self, on_prefill: OnPrefill | None, mark: int, on_prefilled: OnPrefilled | None
    ) -> None:
        """Run the prompt, except what the cache holds of it, and emit the first new token."""
        prompt, end, size = self._prompt, self._done, self._options.prefill_chunk
        self._kept.busy()
        start, step = 0, self._resumed
        if step is not None:
            start = end - len(step.hidden)
            if end < len(prompt):
                self._draft(step.hidden, prompt[start + 1 : end + 1], 0)
        if self._kept.waiting is not None:
            hidden, following = self._kept.waiting
            self._draft(np.concatenate(hidden), following, 0)
        while end < len(prompt):
            began = time.perf_counter()
            # Chunks end at multiples of their size, wherever the first one begins.
            start, end = end, min((end // size + 1) * size, len(prompt))
            if start < mark < len(prompt):
                end = min(end, mark)
            self._kept.busy()
            step = self._backend.prefill(prompt[start:end], self._cache)
            if end < len(prompt):
                self._draft(step.hidden, prompt[start + 1 : end + 1], 0)
                self._kept.hold(prompt[: end + 1], None)
            if end == mark < len(prompt):
                self._kept.mark()
            self._prefill_s += time.perf_counter() - began
            if on_prefill is not None:
                on_prefill(end, len(prompt))
        assert step is not None
        if on_prefilled is not None:
            on_prefilled(self._cache, step)
        if not self._options.max_new_tokens:
            self.finish_reason = "length"
            return
        began = time.perf_counter()
        token = self._picker.pick(step.logits[-1])
        now = time.perf_counter()
        self._prefill_s += now - began
        self._ttft_s = now - self._started
        self._hidden, self._following = [step.hidden], [*prompt[start + 1 :], token]
        self._hold([token])
        self._first, text, self.finish_reason = self._ending.push([token])
        self._show(self._first, text)

    def step(self) -> None:
        """Draft, verify, keep what stands, emit it."""
        began = time.perf_counter()
        self._kept.busy()
        newest = self._all[-1]
        drafts, looked = self._drafts(self._depth()), list[int]()
        if self._policy.looking:
            drafts, looked = [], drafts
        step = self._backend.decode([newest, *drafts], self._cache)
        stood = self._picker.would_stand(step.logits[0], looked[0]) if looked else 0.0
        verdict = self._picker.verify(step.logits, drafts)
        new, rows = [verdict.token], step.hidden
        if drafts:
            accepted = verdict.accepted
            self._cache.rollback(len(drafts) - accepted)
            new, rows = [*drafts[:accepted], verdict.token], rows[: accepted + 1]
        if self._drafting:
            self._hidden.append(rows)
            self._following += new
        self._hold(new)
        seconds = time.perf_counter() - began
        if looked:
            self._policy.looked(stood, seconds)
        else:
            self._policy.update(len(drafts), verdict.accepted, seconds)
        ids, text, self.finish_reason = self._ending.push(new)
        self._records.append(StepRecord(len(drafts), ids, seconds))
        self._show(ids, text)

    def _drafts(self, depth: int) -> list[int]:
        """Draft; rows wait for a step that does, so that those that do not cost nothing more."""
        self._picker.begin()
        if not self._drafting:
            return []
        waiting = len(self._following)
        deeper, self._depth_before = depth > self._depth_before, depth
        if not depth and waiting < _WAITING:
            return []
        hidden = self._hidden[0] if len(self._hidden) == 1 else np.concatenate(self._hidden)
        following = self._following
        self._hidden, self._following = [], []
        if deeper:
            self._cache.shorten_history(max(0, _HISTORY - waiting))
        return self._draft(hidden, following, depth)

    def _hold(self, new: Sequence[int]) -> None:
        self._all += new
        waiting = (self._hidden, self._following) if self._drafting else None
        self._kept.hold(self._all, waiting)

    def _depth(self) -> int:
        """Drafts of the next step: what the policy wants and the context has room for."""
        limit = self._cache.capacity - self._cache.length - 1
        if self._options.mtp == "auto":
            # A draft beyond the last wanted token gains nothing; a fixed depth drafts it anyway.
            limit = min(limit, self._options.max_new_tokens - self._ending.count - 1)
        return self._policy.next_depth(limit)

    def _draft(self, hidden: Array, next_tokens: Sequence[int], depth: int) -> list[int]:
        """Drafts after rows (R, H), each followed by one of `next_tokens` (R,)."""
        if not self._drafting:
            return []
        return self._backend.draft(self._cache, hidden, next_tokens, depth, self._picker.choose)

    def _show(self, ids: Sequence[int], text: str) -> None:
        if self._on_tokens is not None:
            self._on_tokens(ids, text)

    def flush(self) -> None:
        """Show the text that was held back."""
        if text := self._ending.finish():
            self._show((), text)

    def result(self) -> Generation:
        """What there is."""
        records = list(self._records)
        decoded = tuple(token for r in records for token in r.ids)
        assert self.finish_reason is not None
        return Generation(
            ids=self._first + decoded,
            text=self._ending.text_of(self._first + decoded),
            finish_reason=self.finish_reason,
            seed=self._seed,
            timings=Timings(
                prompt_tokens=len(self._prompt),
                prefill_s=self._prefill_s,
                ttft_s=self._ttft_s,
                decoded_tokens=len(decoded),
                decode_s=sum(r.seconds for r in records),
                reused_tokens=self._done,
            ),
            mtp=DraftStats.of(records),
        )
