"""Feeds damaged files of every kind to the readers and to what uses them, and counts.

    python tests/fuzz/run.py [--cases N] [--seed S] [--kinds A,B] [--jobs J] [--report FILE.md]

Each case is a good file with one to four changes that know its structure (`mutate.py`), used as a
command would use it (`targets.py`). Cases run in forked children, under a limit of memory and of
processor time each. What is right: the file is accepted, or refused with a `RefimplError` of one
printable line. All else is a failure: another exception, an empty or many-lined message, a crash, a
case over its time, memory taken beyond the limit.

Guided by coverage: a case that is refused at a place in the code, or comes to a line, that none
came to before is kept and damaged further. (Lines are watched in one case of forty, for tracing
is slow; places of refusals in all.)

Failures are made smaller and saved under tests/fuzz/failures/ (not part of the repository), with
their traceback. Exits 1 if there are any. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "shared")]

import mutate  # noqa: E402
from seeds import MLX, Seeds  # noqa: E402
from tally import Tally, merged, report, shown  # noqa: E402
from targets import TARGETS, main_name  # noqa: E402

from refimpl.errors import RefimplError  # noqa: E402

MORE_MEMORY_BYTES = 1 << 30  # address space beyond what the parent has
MORE_RESIDENT_BYTES = 256 << 20  # of which a batch may touch
CASE_CPU_S = 20.0
LIMITS = (
    f"{CASE_CPU_S:g} s of processor time, {MORE_MEMORY_BYTES >> 20} MiB of address space and "
    f"{MORE_RESIDENT_BYTES >> 20} MiB of memory beyond what the process has"
)
MOST_LINE = 2000  # characters of a message
BATCH = 200
TRACED = 40  # every so many cases
CORPUS = 150  # kept cases of a kind
PACKAGE = str(Path(sys.modules["refimpl"].__path__[0]))


@dataclass
class Outcome:
    """How a case ended: 'accepted', 'refused', or a failure; where, and its words."""

    result: str
    site: str = ""
    detail: str = ""
    lines: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--failures", type=Path, default=HERE / "failures")
    options = parser.parse_args()
    chosen = options.kinds.split(",") if options.kinds else [k for k in TARGETS if available(k)]
    total = sum(TARGETS[k][1] for k in chosen)
    plan = {k: max(1, round(options.cases * TARGETS[k][1] / total)) for k in chosen}
    shares = [
        {k: n // options.jobs + (j < n % options.jobs) for k, n in plan.items()}
        for j in range(options.jobs)
    ]
    given = [(share, options.seed, j, options.failures) for j, share in enumerate(shares)]
    if options.jobs == 1:
        results = [work(*given[0])]
    else:
        with get_context("spawn").Pool(options.jobs) as pool:
            results = pool.starmap(work, given)
    tallies = merged(results)
    if options.report:
        command = (
            f"python tests/fuzz/run.py --cases {options.cases} --seed {options.seed} "
            f"--jobs {options.jobs} --report reports/fuzz.md"
        )
        options.report.write_text(report(tallies, command, LIMITS), encoding="utf-8")
    counts = {k: shown(t) for k, t in tallies.items()}
    failures = sum(t.failures for t in tallies.values())
    cases = sum(t.cases for t in tallies.values())
    print(json.dumps({"cases": cases, "failures": failures, "kinds": counts}))
    return int(failures > 0)


def available(kind: str) -> bool:
    return kind != "mlx" or MLX.is_dir()


def work(share: dict[str, int], seed: int, job: int, failures: Path) -> dict[str, Tally]:
    """All cases of one process."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        seeds = Seeds(Path(name))
        prepare(seeds)
        return {
            kind: Fuzzer(kind, seeds, f"{seed}/{job}/{kind}", failures).run(count)
            for kind, count in share.items()
            if count
        }


def prepare(seeds: Seeds) -> None:
    """Make shared files and compile every kernel once, so that no case pays for it."""
    from refimpl.engine.formats import FORMATS
    from refimpl.engine.kernels import kernel
    from refimpl.engine.simd import choose_simd

    for name in FORMATS:
        for rows in (1, 2, 4):
            kernel(choose_simd(None), name, rows, False)
    kernel(choose_simd(None), "F32", 1, True)
    seeds.of("state")
    seeds.of("golden")


class Fuzzer:
    """Cases of one kind, in batches of forked children."""

    def __init__(self, kind: str, seeds: Seeds, seed: str, failures: Path) -> None:
        self.kind, self.seeds, self.seed, self.failures = kind, seeds, seed, failures
        self.target = TARGETS[kind][0]
        self.good = seeds.of(kind)
        self.corpus: list[mutate.Files] = []
        self.tally = Tally()
        self.found: set[str] = set()
        self.folder = Path(tempfile.mkdtemp(dir=seeds.root))

    def run(self, count: int) -> Tally:
        began = cpu_s()
        for files in self.good:
            outcome = self.alone(files)
            if outcome.result not in ("accepted", "refused"):
                raise SystemExit(f"a good file of kind {self.kind} fails: {outcome.detail}")
        at = 0
        while at < count:
            at = self.batch(at, min(at + BATCH, count))
        self.tally.cpu_s = cpu_s() - began
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.tally

    def case(self, i: int) -> mutate.Files:
        """The files of a case; the same for the same seed, number and corpus."""
        rng = random.Random(f"{self.seed}/{i}")
        if self.corpus and rng.random() < 0.5:
            base = rng.choice(self.corpus)
        else:
            base = rng.choice(self.good)
        return mutate.mutate(base, rng, self.good)

    def batch(self, start: int, stop: int) -> int:
        """Run cases in a child until it has done them or ended; the number of the next case."""
        ready, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ready)
            in_child(lambda: self.all_cases(start, stop, write))
        os.close(write)
        at, done = start, False
        with os.fdopen(ready, "rb") as pipe:
            for line in pipe:
                if line == b"done\n":
                    done = True
                    continue
                number, outcome = json.loads(line)
                self.book(number, Outcome(**outcome))
                at = number + 1
        _, status = os.waitpid(child, 0)
        if not done:
            self.book(at, Outcome("crash", "", ended_by(status)))
            at += 1
        return at

    def all_cases(self, start: int, stop: int, pipe: int) -> None:
        limit_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(start, stop):
            outcome = self.attempt(self.case(i), traced=i % TRACED == 0)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            if grown > MORE_RESIDENT_BYTES:
                outcome = Outcome("memory", outcome.site, f"{grown >> 20} MiB more in use")
            os.write(pipe, json.dumps([i, asdict(outcome)]).encode() + b"\n")
            if outcome.result == "memory":
                break  # the next batch begins with little memory in use
        os.write(pipe, b"done\n")

    def attempt(self, files: mutate.Files, traced: bool = False) -> Outcome:
        """Use the files, in this process, under the limit of time."""
        for path in self.folder.iterdir():
            path.unlink()  # new files: the old ones may still be mapped
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        lines: set[str] = set()
        signal.setitimer(signal.ITIMER_PROF, CASE_CPU_S * (5 if traced else 1))
        if traced:
            sys.settrace(tracer(lines))
        try:
            name = main_name(sorted(files)) if files else "none"
            self.target(self.folder, name, self.seeds)
            outcome = Outcome("accepted")
        except RefimplError as error:
            outcome = judged(error)
        except BaseException as error:
            outcome = Outcome(
                "memory" if isinstance(error, MemoryError) else "exception",
                site_of(error),
                "".join(traceback.format_exception(error))[-3000:],
            )
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_PROF, 0)
        outcome.lines = sorted(lines - self.tally.lines)
        return outcome

    def book(self, number: int, outcome: Outcome) -> None:
        """Count a case; keep it if it came to a new place."""
        tally = self.tally
        tally.cases += 1
        new = bool(outcome.site and outcome.site not in tally.sites)
        new = new or bool(set(outcome.lines) - tally.lines)
        tally.sites.add(outcome.site)
        tally.lines.update(outcome.lines)
        if outcome.result in ("accepted", "refused"):
            setattr(tally, outcome.result, getattr(tally, outcome.result) + 1)
            if new and len(self.corpus) < CORPUS:
                self.corpus.append(self.case(number))
                tally.kept += 1
            return
        tally.failures += 1
        first_line = (outcome.detail.strip().splitlines() or [""])[-1][:300]
        print(f"{self.kind} case {number} of {self.seed}: {outcome.result}: {first_line}",
              file=sys.stderr, flush=True)  # fmt: skip
        if outcome.result + outcome.site not in self.found:
            self.found.add(outcome.result + outcome.site)
            self.save(number, outcome)

    def save(self, number: int, outcome: Outcome) -> None:
        """Write a failing case, as small as it gets, with what happened."""
        files = self.smaller(self.case(number), outcome)
        out = self.failures / f"{self.kind}-{self.seed.replace('/', '-')}-{number}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for name, content in files.items():
            (out / name).write_bytes(content)
        (out / "what.txt").write_text(f"{outcome.result}\n{outcome.site}\n{outcome.detail}\n")

    def smaller(self, files: mutate.Files, outcome: Outcome) -> mutate.Files:
        """Fewer changes with the same failure: whole files, then runs of bytes, are put back."""

        def fails(trial: mutate.Files) -> bool:
            again = self.alone(trial)
            return (again.result, again.site) == (outcome.result, outcome.site)

        until = time.process_time() + 60
        base = min(self.good, key=lambda g: (g.keys() != files.keys(), distance(g, files)))
        for name in list(files):
            if name in base and files[name] != base[name]:
                trial = {**files, name: base[name]}
                if fails(trial):
                    files = trial
        for name in files:
            good, run = base.get(name, b""), 1 << 16
            while len(good) == len(files[name]) and run and time.process_time() < until:
                for at in range(0, len(good), run):
                    part = good[at : at + run]
                    if files[name][at : at + run] != part:
                        trial = {**files}
                        trial[name] = files[name][:at] + part + files[name][at + run :]
                        if fails(trial):
                            files = trial
                run //= 8
        return files

    def alone(self, files: mutate.Files) -> Outcome:
        """The outcome of some files, in a child of their own."""
        ready, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ready)

            def once() -> None:
                limit_memory()
                os.write(write, json.dumps(asdict(self.attempt(files))).encode())

            in_child(once)
        os.close(write)
        with os.fdopen(ready, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        return Outcome(**json.loads(told)) if told else Outcome("crash", "", ended_by(status))


def distance(a: mutate.Files, b: mutate.Files) -> int:
    return sum(a[n] != b.get(n) for n in a)


def in_child(action: Any) -> None:
    """Run in a forked child, which then ends without the parent's cleaning up."""
    code = 1
    try:
        warnings.simplefilter("error")
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # time over: the child ends
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def limit_memory() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    limit = size + MORE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def judged(error: RefimplError) -> Outcome:
    """A refusal, if its message is one printable line."""
    text = str(error)
    good = text.isprintable() and 10 <= len(text) <= MOST_LINE
    return Outcome("refused" if good else "message", site_of(error), text[:3000])


def site_of(error: BaseException) -> str:
    """The lines of the package that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if f.filename.startswith(PACKAGE)]
    return " ".join([type(error).__name__, *own[-6:]])


def tracer(lines: set[str]) -> Any:
    """A trace function that notes the package's lines."""

    def on_line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            lines.add(f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}")
        return on_line

    def on_call(frame: Any, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    return on_call


def ended_by(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGPROF:
            return f"hang: more than {CASE_CPU_S:g} s of processor time"
        return f"ended by {signal.Signals(number).name}"
    return f"ended with code {os.waitstatus_to_exitcode(status)}"


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


if __name__ == "__main__":
    sys.exit(main())
