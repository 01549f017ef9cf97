"""The one registry of names: models, quant types, engines, backends, devices, quantities.

Command lines, importers and tables of runs go through it. A spelling is compared by its letters
and digits alone, then once more without what people add to names: a build, a pull request, a
version, a remark in brackets, an organisation before a slash. An unknown name gives None, with
`suggest` for the nearest ones; it is never mapped to something else. Where a spelling stands for
a class of things (`Q4-class`), the representative comes back with `exact` false and a `note`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from hwmodel import names_data as data

Kind = Literal["model", "quant", "engine", "backend", "device", "quantity"]


@dataclass(frozen=True)
class Name:
    """A name that the registry knows.

    Attributes:
        kind: what is named.
        id: the canonical spelling.
        text: the spelling that was found.
        exact: False where the text states a class or a guess and `id` is its representative.
        note: what the text says beyond the name: a build, a backend, what is not stated.
        backend: of an engine, the backend that its spelling states; empty otherwise.
    """

    kind: Kind
    id: str
    text: str
    exact: bool = True
    note: str = ""
    backend: str = ""


def key(text: str) -> str:
    """What two spellings must share: lower-case letters and digits."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def canonical(kind: Kind, text: str) -> Name | None:
    """The name that `text` spells, None where the registry does not know it.

    `why_unknown` tells whether None means "never heard of" or "not one thing".
    """
    text = text.strip()
    if not text or len(text) > 200:
        return None
    if key(text) in _refused(kind):
        return None
    finders = {"engine": _engine, "quant": _quant, "device": _device, "model": _model}
    finder = finders.get(kind)
    if finder is not None:
        return finder(text)
    found = _index(kind).get(key(text))
    return None if found is None else Name(kind, found, text)


def why_unknown(kind: Kind, text: str) -> str:
    """One clause that says why `canonical` gave None, with the nearest names if there are any."""
    if not text.strip():
        return f"no {kind} is stated"
    refused = _refused(kind).get(key(text))
    if refused:
        return f"{kind} {text!r} is not one thing: {refused}"
    near = suggest(kind, text)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"unknown {kind} {text!r}{hint}"


def suggest(kind: Kind, text: str, among: Iterable[str] = (), count: int = 3) -> tuple[str, ...]:
    """Up to `count` canonical names that `text` may have meant, best first.

    Args:
        among: further names to offer, such as a user's own device files.
    """
    index = {**_index(kind), **{key(name): name for name in among}}
    close = difflib.get_close_matches(key(text), list(index), n=4 * count, cutoff=0.5)
    return tuple(dict.fromkeys(index[k] for k in close))[:count]


def ids(kind: Kind) -> tuple[str, ...]:
    """All canonical names of a kind, in registry order."""
    return tuple(dict.fromkeys(_index(kind).values()))


def device_count(text: str) -> int | None:
    """The number of devices that a spelling states (`4x RTX 3090`, `H200 x8`), None without one.

    A spelling that is one device's own name, such as `2x EPYC 9654`, states none.
    """
    if key(text) in _index("device"):
        return None
    found = _COUNT.search(_BRACKETS.sub(" ", text).strip())
    return int(re.sub(r"\D", "", found[0])) if found else None


def engine_backend(engine: str) -> str:
    """The backend that an engine's own name fixes (`mlx` runs on Metal), empty where none."""
    return data.ENGINE_BACKEND.get(engine, "")


@lru_cache(maxsize=8)
def _index(kind: Kind) -> dict[str, str]:
    tables: dict[Kind, dict[str, tuple[str, ...]]] = {
        "engine": data.ENGINES,
        "backend": data.BACKENDS,
        "device": data.DEVICES,
        "model": data.MODELS,
        "quantity": data.QUANTITIES,
        "quant": data.QUANTS,
    }
    table = tables[kind]
    index = {key(name): name for name in table}
    for name, aliases in table.items():
        for alias in aliases:
            index.setdefault(key(alias), name)
    return index


@lru_cache(maxsize=8)
def _refused(kind: Kind) -> dict[str, str]:
    return {key(text): reason for text, reason in data.UNRESOLVABLE.get(kind, {}).items()}


_BRACKETS = re.compile(r"\(([^()]*)\)|\[([^\[\]]*)\]")
_BUILD = re.compile(
    r"(?:^|[\s,;_@-])(pr[\s#]*\d+|b\d{3,6}|master|main|nightly|v?\d+(?:\.\d+)+[\w.+-]*)(?=$|[\s,;])",
    re.IGNORECASE,
)


def _strip(text: str, builds: bool = True) -> tuple[str, str]:
    """A spelling without its remarks in brackets and its builds, and what was taken away.

    Devices have no builds: the B580 is a card.
    """
    remarks = [a or b for a, b in _BRACKETS.findall(text)]
    bare = _BRACKETS.sub(" ", text)
    if builds:
        remarks += [m.strip() for m in _BUILD.findall(bare)]
        bare = _BUILD.sub(" ", bare)
    return " ".join(bare.split()), ", ".join(r.strip() for r in remarks if r.strip())


def _engine(text: str) -> Name | None:
    bare, note = _strip(text)
    found = _index("engine").get(key(text)) or _index("engine").get(key(bare))
    words = re.split(r"[\s,;/+-]+", f"{bare} {note}")
    backend = ""
    for word in words:
        named = canonical("backend", word)
        if named is not None and key(word) not in ("none", "apple", "amd", "nvidia"):
            backend = named.id
    if found is None and backend:  # "llama.cpp CUDA"
        rest = " ".join(w for w in bare.split() if canonical("backend", w) is None)
        found = _index("engine").get(key(rest))
        note = note or backend
    if found is None:
        return None
    if found == "unspecified":
        return Name("engine", found, text, exact=False, note="the engine is not stated")
    return Name("engine", found, text, note=note, backend=backend or engine_backend(found))


def _quant(text: str) -> Name | None:
    index = _index("quant")
    classes = {key(k): v for k, v in data.QUANT_CLASSES.items()}
    bare, note = _strip(text)
    unsloth = re.match(r"(?i)ud[-_ ]", bare)
    if unsloth:
        bare, note = bare[unsloth.end() :], note or "Unsloth dynamic mixture"
    if key(text) in index:
        return _quant_name(index[key(text)], text)
    for spelling in (text, bare):
        if key(spelling) in classes:
            name, why = classes[key(spelling)]
            why = ", ".join(filter(None, (why, note)))
            return _quant_name(name, text, exact=False, note=why)
    if key(bare) in index:
        vague = re.search(r"not stated|unspecified|unknown", note)
        return _quant_name(index[key(bare)], text, exact=not vague, note=note)
    inexact = re.match(r"(?i)(.+?)[-_ ](class|like|ish|equivalent)\b", bare)
    if inexact and key(inexact[1]) in index:
        return _quant_name(index[key(inexact[1])], text, exact=False, note="a class, not a type")
    plain = key(re.sub(r"(?i)\bgguf\b|\bmlx\b|\bmoe\b", " ", bare))
    return _quant_name(index[plain], text, note=note) if plain in index else None


def _quant_name(name: str, text: str, exact: bool = True, note: str = "") -> Name:
    return Name("quant", name, text, exact, note)


# what people put before or after the name of a device
_COUNT = re.compile(r"(?i)^\s*\d{1,4}\s*[x×]\s*(?=\D|\d{4})|(?<=[\s\d)])[x×]\s*\d{1,2}\s*$")
_MAKER = re.compile(
    r"(?i)^\s*(nvidia|apple|amd|intel|geforce|mac ?(studio|book pro|book air|mini|pro))\s+"
)
_TRIM = re.compile(
    r"(?i)[\s,-]+(\d+\s?gi?b|hbm\d?e?|gddr\d\w?|sxm\d?|max-?q|workstation|server|edition|gpus?)$"
)


def _device(text: str) -> Name | None:
    guesses = {key(k): v for k, v in data.DEVICE_GUESSES.items()}
    if key(text) in guesses:
        name, why = guesses[key(text)]
        return Name("device", name, text, exact=False, note=why)
    index = _index("device")
    if key(text) in index:
        return Name("device", index[key(text)], text)
    bare, note = _strip(text, builds=False)
    vague = re.search(r"(?i)probabl|likely|unstated|\?", note)
    for pattern in (None, _COUNT, _MAKER, _MAKER, _TRIM, _TRIM, _TRIM):
        if pattern is not None:
            shorter = pattern.sub("", bare)
            if shorter == bare:
                continue
            bare = shorter
        if key(bare) in guesses:
            name, why = guesses[key(bare)]
            return Name("device", name, text, exact=False, note=why)
        if key(bare) in index:
            note = note or ("" if bare == text else text)
            return Name("device", index[key(bare)], text, exact=not vague, note=note)
    return None


def _model(text: str) -> Name | None:
    index = _index("model")
    bare = text.rsplit("/", 1)[-1]
    tail = re.compile(
        r"(?i)[-_ ](gguf|fp8|int4|int8|bf16|nvfp4|mxfp4|awq|mlx|4bit|8bit|it|hf|base)$"
    )
    while True:
        if key(bare) in index:
            name = index[key(bare)]
            note = "" if key(bare) == key(text) else text
            return Name("model", name, text, note=note)
        shorter = tail.sub("", bare)
        if shorter == bare:
            return None
        bare = shorter
