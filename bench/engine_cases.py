"""What is measured for the report on the CPU engine, and how each case is put together.

Models are true-width slices of the published shape (`refimpl synth --preset slice`) in three
types, with MTP layers where drafts are measured, and the embedded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.interleave import Arm
from bench.runners.base import Runner, RunnerError, RunnerTest
from bench.runners.llamacpp import VARIANTS
from bench.runners.refimpl import RefimplRunner
from hwmodel.errors import RequestError

TYPES = ("q4_0", "q4_k_s", "q8_0")
MTP_TYPES = ("q4_0", "q4_k_s")
ACCEPTANCE = (0.88, 0.77, 0.69)  # published for the model's three MTP layers
EMBEDDED = "mini"
ENGINE = "refimpl"
DRAFTS = ("0", "1", "2", "3", "auto")
DEPTHS = (0, 1024, 4096, 16384, 65536, 261120)
KV_TYPES = ("f16", "q8_0")
LLAMA_DEPTHS = (0, 1024, 2048)  # filled by a prefill, which is what limits them
ROWS = (1, 2, 3, 4)
MICRO_BATCHES = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Entry:
    """One arm of a case before it has runners.

    Attributes:
        label: unique in its case; those of llama.cpp begin with 'llama.cpp'.
        variant: of llama.cpp, or '' for refimpl.
        turns: see `bench.interleave.Arm`.
        anchor: measured for the sake of the others only.
    """

    label: str
    test: RunnerTest
    variant: str = ""
    turns: str = ""
    anchor: bool = False


@dataclass(frozen=True)
class Case:
    """One question: the arms that answer it, over one model.

    Attributes:
        apart: every arm counts on its own; else they are compared with each other.
    """

    name: str
    model: str
    question: str
    entries: tuple[Entry, ...]
    apart: bool = False


def slice_name(model: str) -> str:
    """File name of a slice: 'q4_0', or 'q4_0-mtp3' with three MTP layers."""
    return f"slice_{model.replace('-', '_')}.gguf"


def _path(model: str) -> Path:
    return Path(EMBEDDED if model == EMBEDDED else slice_name(model))


def models() -> tuple[str, ...]:
    """All slices that the cases use."""
    return tuple(dict.fromkeys(c.model for c in cases(2) if c.model != EMBEDDED))


def cases(threads: int) -> tuple[Case, ...]:
    """All cases, in the order in which they are worth measuring; `threads` is all of them."""
    out = []
    for kind in TYPES:
        base = RunnerTest(Path(slice_name(kind)), threads=threads, repetitions=5)
        out.append(_against_llama(f"decode-{kind}", kind, replace(base, n_gen=64), "decoding"))
    for kind in TYPES:
        base = RunnerTest(Path(slice_name(kind)), threads=threads, repetitions=2)
        what = "prefill of 512 tokens"
        out.append(_against_llama(f"prefill-{kind}", kind, replace(base, n_prompt=512), what))
    out += [_verify(kind, threads) for kind in (*TYPES, EMBEDDED)]
    out += [_drafts(f"{kind}-mtp3", threads, ACCEPTANCE, 96, 2) for kind in MTP_TYPES]
    out.append(_drafts(EMBEDDED, threads, (), 64, 3))
    mini = RunnerTest(_path(EMBEDDED), threads=threads, repetitions=5, n_gen=512)
    out.append(_against_llama("decode-mini", EMBEDDED, mini, "decoding"))
    out += [*(_depth(kv, threads) for kv in KV_TYPES), _depth_llama(threads)]
    out += [_variants("decode", threads), _variants("prefill", threads)]
    out += [_threads("q4_0", threads), _threads("q4_k_s", threads), _micro_batch(threads)]
    return tuple(out)


def _against_llama(name: str, model: str, test: RunnerTest, what: str) -> Case:
    entries = (
        Entry(ENGINE, test),
        Entry("llama.cpp default", test, "default"),
        Entry("llama.cpp no-repack", test, "no-repack"),
    )
    return Case(name, model, f"{what} against llama.cpp", entries)


def _variants(what: str, threads: int) -> Case:
    """All variants of llama.cpp, once: is one better than those that every case has?"""
    base = RunnerTest(_path("q4_k_s"), threads=threads, repetitions=2)
    test = replace(base, n_gen=32) if what == "decode" else replace(base, n_prompt=512)
    entries = tuple(Entry(f"llama.cpp {v}", test, v) for v in VARIANTS)
    return Case(f"variants-{what}", "q4_k_s", f"variants of llama.cpp, {what}", entries)


def _verify(kind: str, threads: int) -> Case:
    tokens = 480 if kind == EMBEDDED else 60
    base = RunnerTest(_path(kind), n_gen=tokens, threads=threads, repetitions=3)
    entries = tuple(Entry(f"{r} rows", replace(base, n_rows=r)) for r in ROWS)
    return Case(f"verify-{kind}", kind, "verification of 2 to 4 tokens", entries)


def _drafts(
    model: str, threads: int, acceptance: tuple[float, ...], tokens: int, repetitions: int
) -> Case:
    base = RunnerTest(_path(model), n_gen=tokens, threads=threads, repetitions=repetitions,
                      acceptance=acceptance)  # fmt: skip
    entries = tuple(Entry(f"mtp {m}", replace(base, mtp=m), turns="drafts") for m in DRAFTS)
    rates = "simulated" if acceptance else "real"
    return Case(f"drafts-{model}", model, f"drafts, {rates} acceptance", entries)


def depth_case(kv: str) -> str:
    """Name of the case that measures decoding against depth with a KV type."""
    return f"depth-{kv}"


def _depth(kv: str, threads: int) -> Case:
    base = RunnerTest(
        _path("q4_k_s"), n_gen=24, threads=threads, repetitions=2, synthetic_kv=True, kv_type=kv
    )
    entries = tuple(Entry(f"{ENGINE} d{d}", replace(base, n_depth=d)) for d in DEPTHS)
    return Case(depth_case(kv), "q4_k_s", f"decoding against depth, {kv} KV", entries)


def _depth_llama(threads: int) -> Case:
    base = RunnerTest(Path(slice_name("q4_k_s")), n_gen=24, threads=threads, repetitions=2)
    entries = [
        Entry(f"{ENGINE} d{d}", replace(base, n_depth=d, synthetic_kv=d > 0)) for d in LLAMA_DEPTHS
    ]
    entries += [
        Entry(f"llama.cpp default d{d}", replace(base, n_depth=d), "default") for d in LLAMA_DEPTHS
    ]
    return Case("depth-llama", "q4_k_s", "decoding at depth against llama.cpp", tuple(entries))


def _threads(kind: str, threads: int) -> Case:
    base = RunnerTest(Path(slice_name(kind)), n_gen=48, repetitions=3)
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < threads] + [threads]
    entries = []
    for n in counts:
        entries.append(Entry(f"{ENGINE} t{n}", replace(base, threads=n)))
        entries.append(Entry(f"llama.cpp default t{n}", replace(base, threads=n), "default"))
    return Case(f"threads-{kind}", kind, "decoding against threads", tuple(entries))


def _micro_batch(threads: int) -> Case:
    base = RunnerTest(Path(slice_name("q4_0")), n_prompt=512, threads=threads, repetitions=2)
    entries = tuple(Entry(f"ub {n}", replace(base, micro_batch=n)) for n in MICRO_BATCHES)
    return Case("micro-batch-q4_0", "q4_0", "prefill against micro-batch", entries)


def chosen(names: Sequence[str], threads: int) -> list[Case]:
    """The cases named exactly or by a prefix ('decode', 'verify-q4_0'); all without any name.

    Raises:
        RequestError: a name that no case begins with.
    """
    known = cases(threads)
    for name in names:
        if not any(c.name.startswith(name) for c in known):
            raise RequestError(f"no case '{name}'; expected {', '.join(c.name for c in known)}")
    if not names:
        return list(known)
    exact = {c.name for c in known if c.name in names}
    return [
        c for c in known
        if c.name in exact or any(c.name.startswith(n) and n not in exact for n in names)
    ]  # fmt: skip


def arms(case: Case, folder: Path, llama: dict[str, Runner]) -> list[Arm]:
    """A case's arms over the models of a folder.

    Args:
        llama: runners by variant; a variant that is not there is left out. A 'no-amx' one joins
            wherever the default is measured.

    Raises:
        RunnerError: no arm is left.
    """
    out = []
    for entry in case.entries:
        model = entry.test.model if case.model == EMBEDDED else folder / entry.test.model
        test = replace(entry.test, model=model)
        if not entry.variant:
            out.append(Arm(entry.label, RefimplRunner(), test, entry.turns))
            continue
        labels = {entry.variant: entry.label}
        if entry.variant == "default":
            labels["no-amx"] = entry.label.replace("default", "no-amx")
        out += [Arm(label, llama[v], _for_llama(test)) for v, label in labels.items() if v in llama]
    if not out:
        raise RunnerError(f"{case.name}: no engine to measure; is llama-bench missing?")
    return out


def _for_llama(test: RunnerTest) -> RunnerTest:
    if str(test.model) != EMBEDDED:
        return test
    from refimpl.backends import model_path

    return replace(test, model=model_path(EMBEDDED))


def make_models(folder: Path, wanted: Sequence[str]) -> list[str]:
    """Write the slices that are missing; returns the names of those written.

    Raises:
        InputError: the folder cannot be written.
    """
    from refimpl.checkpoint.slice import slice_config, write_random

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for model in wanted:
        path = folder / slice_name(model)
        if model == EMBEDDED or path.is_file():
            continue
        kind, _, mtp = model.partition("-mtp")
        write_random(slice_config(mtp=int(mtp or 0)), path, kind, seed=1)
        made.append(path.name)
    return made
