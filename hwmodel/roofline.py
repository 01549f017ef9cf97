"""The roofline of a machine with the model's phases under it.

A phase is a step of so many rows: its operations per byte read (weights and KV cache) say which
roof is above it, the estimator how far below it stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodel.candidate import Candidate
from hwmodel.memory import kv_value_bytes
from hwmodel.operations import step_counts
from hwmodel.placement import machine
from hwmodel.predict import predict
from hwmodel.probed import in_cache

PREFILL = 2048


@dataclass(frozen=True)
class PhasePoint:
    """One phase: `intensity` in FLOP per byte, `share` of the roof that the estimate reaches."""

    name: str
    intensity: float
    flop_per_s: float
    roof_flop_per_s: float
    seconds: float
    limiting: str

    @property
    def share(self) -> float:
        """Predicted over the roof."""
        return self.flop_per_s / self.roof_flop_per_s


def roofs(candidate: Candidate) -> tuple[float, dict[str, float]]:
    """Read bandwidth (bytes/s) and dense peaks (FLOP/s by type) of all devices at work."""
    m = machine(in_cache(candidate.run))
    peaks = {}
    for dtype in ("fp16", candidate.run.quant.compute_type):
        peaks[dtype] = m.flop(dtype)
    return m.bandwidth_bytes_per_s, peaks


def step_points(candidate: Candidate) -> list[PhasePoint]:
    """Decode at several depths, a verification, a batch, and prefill."""
    deep = max(1024, candidate.context - 1)
    drafts = min(3, candidate.engine.max_drafts, candidate.run.model.mtp_layers)
    found = [_decode(candidate, "decode, empty cache", 0, 1)]
    if deep > 1024:
        found.append(_decode(candidate, f"decode, {deep:,} tokens", deep, 1))
    if drafts:
        found.append(_decode(candidate, f"verification of {drafts + 1}", 0, 1, drafts))
    found.append(_decode(candidate, "decode, 16 sequences", 1024, 16))
    for tokens in (128, PREFILL):
        found.append(_prefill(candidate, tokens))
    return found


def _decode(c: Candidate, name: str, depth: int, sequences: int, drafts: int = 0) -> PhasePoint:
    run = c.at(depth=depth, concurrency=sequences, drafts=drafts)
    counts = step_counts(run.model, run.quant, depth, 1 + drafts, sequences)
    kv = counts.cache_bytes(kv_value_bytes(run.workload.kv_type))
    moved = sum(counts.weight_bytes.values()) + kv
    estimate = predict(run, "decode_tok_s")
    seconds = sum(t.seconds for t in estimate.terms)
    return _point(c, name, counts.flop, moved, seconds, estimate.limiting)


def _prefill(c: Candidate, tokens: int) -> PhasePoint:
    """A prompt in chunks: every chunk reads the weights (all experts that its tokens choose)."""
    run = c.at(depth=0, prompt_tokens=tokens, concurrency=1, drafts=0)
    unfold = c.engine.latent_prompts == "heads"
    counts = step_counts(run.model, run.quant, 0, tokens, logit_rows=1, unfold=unfold)
    chunk = min(tokens, run.workload.micro_batch or c.engine.micro_batch)
    each = step_counts(run.model, run.quant, 0, chunk, logit_rows=1)
    kv = counts.cache_bytes(kv_value_bytes(run.workload.kv_type))
    moved = sum(each.weight_bytes.values()) * -(-tokens // chunk) + kv
    estimate = predict(run, "prefill_tok_s")
    seconds = tokens / estimate.value if estimate.value else float("inf")
    return _point(c, f"prefill of {tokens:,}", counts.flop, moved, seconds, estimate.limiting)


def _point(
    c: Candidate, name: str, flop: float, moved: float, seconds: float, limiting: str
) -> PhasePoint:
    bandwidth, peaks = roofs(c)
    intensity = flop / moved
    roof = min(intensity * bandwidth, max(peaks.values()))
    return PhasePoint(name, intensity, flop / seconds, roof, seconds, limiting)
