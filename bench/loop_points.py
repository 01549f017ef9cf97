"""The points of the local loop: what is measured here, and which of it the probe may see.

Probe points are measured first, and this host's efficiencies are fitted to them. Everything else
is predicted, the predictions are written down, and only then measured: other lengths, depths,
numbers of drafts, and weight types, on true-width slices of the published model (they stream from
memory) and on the embedded model (it lies in the processor's cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.engine_cases import ACCEPTANCE, Case, Entry, make_models, slice_name
from bench.runners.base import RunnerTest
from hwmodel.run import Quantity

EMBEDDED = "mini"
REFIMPL, LLAMA = "refimpl", "llama.cpp"
ENGINES = (REFIMPL, LLAMA)
_SLICE_GEN, _MINI_GEN = 48, 128


@dataclass(frozen=True)
class Point:
    """One configuration on this host.

    Attributes:
        engine: `refimpl` or `llama.cpp`.
        model: a slice by type (`q4_0`, `q4_0-mtp3`), `mini`, or the embedded model in another
            type (`mini-q8_0`).
        prompt: tokens of a timed prefill, or 0 for decoding.
        depth: tokens in the cache before the clock starts.
        drafts: per step, with the published acceptance simulated.
        probe: whether the fit of this host may see it.
    """

    engine: str
    model: str
    prompt: int = 0
    depth: int = 0
    drafts: int = 0
    probe: bool = False

    @property
    def id(self) -> str:
        """Unique, such as `refimpl/q4_0/decode-d1024`."""
        what = f"prefill-{self.prompt}" if self.prompt else f"decode-d{self.depth}"
        return f"{self.engine}/{self.model}/{what}" + (f"-mtp{self.drafts}" if self.drafts else "")

    @property
    def quantity(self) -> Quantity:
        """What is measured."""
        return "prefill_tok_s" if self.prompt else "decode_tok_s"

    @property
    def generated(self) -> int:
        """Tokens that are decoded."""
        if self.prompt:
            return 0
        return _MINI_GEN if self.is_embedded else _SLICE_GEN

    @property
    def is_embedded(self) -> bool:
        """Of the embedded model, whose weights fit in a processor's cache."""
        return self.model.partition("-")[0] == EMBEDDED

    @property
    def type(self) -> str:
        """Type of the weights."""
        if self.is_embedded:
            return self.model.partition("-")[2] or "q4_0"
        return self.model.partition("-")[0]

    @property
    def anchor(self) -> str:
        """The probe point of the same engine, kind of model and quantity that busy rounds are
        judged by."""
        return Point(
            self.engine, EMBEDDED if self.is_embedded else "q4_0", prompt=128 if self.prompt else 0
        ).id


def model_file(model: str, folder: Path) -> Path:
    """Where the file of a point's model lies."""
    if model == EMBEDDED:
        from refimpl.backends import model_path

        return Path(model_path(EMBEDDED))
    if model.startswith(f"{EMBEDDED}-"):
        return folder / f"{model.replace('-', '_')}.gguf"
    return folder / slice_name(model)


def make(folder: Path, models: Sequence[str]) -> list[str]:
    """Write the models that are missing; returns the names of those written.

    Raises:
        InputError: the folder cannot be written.
    """
    from refimpl.backends import model_path
    from refimpl.checkpoint.convert import convert

    made = make_models(folder, [m for m in models if not m.startswith(EMBEDDED)])
    for model in models:
        path = model_file(model, folder)
        if model.startswith(f"{EMBEDDED}-") and not path.is_file():
            convert(model_path(EMBEDDED), path, model.partition("-")[2])
            made.append(path.name)
    return made


def _grid(
    engine: str, model: str, prompts: Sequence[int], depths: Sequence[int], drafts: Sequence[int],
    probe: Sequence[str] = (),
) -> list[Point]:  # fmt: skip
    found = [Point(engine, model, depth=d) for d in depths]
    found += [Point(engine, model, prompt=p) for p in prompts]
    found += [Point(engine, model, drafts=n) for n in drafts]
    return [
        Point(p.engine, p.model, p.prompt, p.depth, p.drafts, p.id.rpartition("/")[2] in probe)
        for p in found
    ]


def points() -> tuple[Point, ...]:
    """All points; llama.cpp fills a depth by a prefill and llama-bench times no drafts, which is
    what limits its depths and leaves out its drafts."""
    fast, slow = REFIMPL, LLAMA
    found = _grid(fast, "q4_0", (128, 256, 512, 1024, 2048), (0, 1024, 4096, 16384, 65536), (),
                  ("decode-d0", "decode-d16384", "prefill-128", "prefill-1024"))  # fmt: skip
    found += _grid(slow, "q4_0", (128, 256, 512, 1024), (0, 512, 1024, 2048), (),
                   ("decode-d0", "decode-d1024", "prefill-128", "prefill-512"))  # fmt: skip
    found += _grid(fast, "q4_k_s", (128, 512, 1024), (0, 4096, 16384), (), ("prefill-512",))
    found += _grid(slow, "q4_k_s", (128, 256, 512), (0, 512), (), ("prefill-128",))
    found += _grid(fast, "q8_0", (128, 512, 1024), (0, 4096), (), ("decode-d0", "prefill-512"))
    found += _grid(slow, "q8_0", (128, 256), (0, 512), (), ("decode-d0", "prefill-128"))
    found += _grid(fast, "q4_0-mtp3", (), (), (1, 2, 3), ("decode-d0-mtp1",))
    found += _grid(fast, "q4_k_s-mtp3", (), (), (1, 2, 3))
    for engine in ENGINES:
        drafts = (1, 2, 3) if engine == fast else ()
        # the embedded model's context ends at 1024 tokens
        seen = ("decode-d0", "decode-d768", "prefill-128", "prefill-768", "decode-d0-mtp1")
        found += _grid(engine, EMBEDDED, (64, 128, 256, 512, 768), (0, 256, 768), drafts, seen)
        found += _grid(engine, f"{EMBEDDED}-q8_0", (512,), (0, 256), (), ("decode-d0",))
        found += _grid(engine, f"{EMBEDDED}-q4_k_s", (512,), (0,), ())
    return tuple(found)


def runner_test(point: Point, folder: Path, threads: int) -> RunnerTest:
    """How a point is measured."""
    small = point.is_embedded
    return RunnerTest(
        model=model_file(point.model, folder),
        n_prompt=point.prompt,
        n_gen=point.generated,
        n_depth=point.depth,
        repetitions=5 if small else 2 if point.prompt else 3,
        threads=threads,
        mtp=str(point.drafts) if point.drafts else "",
        acceptance=ACCEPTANCE[: point.drafts],
        synthetic_kv=point.engine == REFIMPL and point.depth > 0,
    )


def cases(folder: Path, threads: int, probe: bool) -> tuple[Case, ...]:
    """The points as cases of interleaved rounds, one for each model, the engines by turns.

    Outside the probe each case begins with the anchors of its points, and what takes long (depths
    and prompts of many tokens) is a case of its own, `... deep`.
    """
    mine = [p for p in points() if p.probe == probe]
    anchors = {p.id: p for p in points() if p.id in {q.anchor for q in mine}}
    found = []
    for model in dict.fromkeys(p.model for p in mine):
        own = [p for p in mine if p.model == model]
        deep = [p for p in own if not probe and not p.is_embedded and max(p.depth, p.prompt) > 512]
        for part, name in (([p for p in own if p not in deep], model), (deep, f"{model} deep")):
            if not part:
                continue
            names = sorted({p.anchor for p in part}, key=lambda k: ("decode" not in k, k))
            first = [] if probe else [anchors[k] for k in names]
            ordered = sorted(part, key=lambda p: (p.prompt, p.depth, p.drafts))
            entries = tuple(
                Entry(p.id, runner_test(p, folder, threads), "default" if p.engine == LLAMA else "",
                      anchor=p in first)
                for p in dict.fromkeys([*first, *ordered])
            )  # fmt: skip
            name = ("probe " if probe else "loop ") + name
            found.append(Case(name, model, "", entries, apart=True))
    return tuple(found)
