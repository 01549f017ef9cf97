"""The text of the validation report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.compare import COMPARED, speed_text, worst_rows
from bench.markdown import markdown
from bench.report import Sources, row_notes
from hwmodel.cli_support import counted

WORST = 20
NAMES = {"decode_tok_s": "decode", "prefill_tok_s": "prefill"}
_CROSS = (
    ("fit", "in the fit"), ("leave_sweep_out", "its sweep left out"),
    ("leave_device_out", "its device left out"), ("leave_model_out", "its model left out"),
    ("baseline", "baseline without a fit"),
)  # fmt: skip
_PICTURES = {
    "predicted-measured": "Every judged figure: predicted against measured, on logarithmic axes. "
    "Left: as the fit that contains the run predicts it. Right: as a fit that never saw its sweep "
    "does. [Values](compare/rows.csv).",
    "residuals": "Predicted over measured by device and by engine; in brackets the number of "
    "figures. [Values](compare/rows.csv), [errors by group](compare/errors.csv).",
    "decode-depth": "Decode against the number of tokens in the KV cache: measured points, the "
    "prediction with its band, and the datasheet's limit above. "
    "[Values](compare/decode-depth.csv).",
    "bytes-by-role": "What one decoded token reads, counted from the tensor table. "
    "[Values](compare/bytes-by-role.csv).",
    "draft-gain": "What drafts gain over none in the same sweep. [Values](compare/draft-gain.csv).",
}
Link = Callable[[Path], str]


def report_text(found: Sources, link: Link) -> str:
    """The whole report as Markdown; `link` gives a path as seen from the report."""
    folder = link(found.compare)
    parts = [
        "# Are the predictions true?",
        _introduction(found),
        *_picture("predicted-measured", folder),
        "## What was predicted, what was measured",
        _coverage(found),
        "## Errors",
        _errors_intro(found),
        markdown(*_cross_table(found.fit.errors)),
        "### By device and engine",
        _group_intro(),
        markdown(*_group_table(found.result["summary"])),
        *_picture("residuals", folder),
        "## Where it is wrong",
        _worst_intro(),
        markdown(*_worst_table(found.result["rows"])),
        "## Depth, bytes, drafts",
        *_picture("decode-depth", folder),
        *_picture("bytes-by-role", folder),
        *_picture("draft-gain", folder),
        _speed_ups(found.fit.errors),
        "## The loop closed on one host",
        *_loops(found, link),
        *_probed(),
        "## The CPU engine against llama.cpp",
        *_engine(found, link),
        "## What this does not show",
        _limits(found),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _picture(name: str, folder: str) -> list[str]:
    text = _PICTURES[name].replace("(compare/", f"({folder}/")
    return [f"![{name}]({folder}/{name}.png)", f"*{text}*"]


def _introduction(found: Sources) -> str:
    s = found.result["summary"]
    decode, prefill = (s["by_quantity"].get(q) for q in COMPARED)
    text = (
        f"{len(found.records)} runs of {_distinct(found, 'model')} models that others published "
        f"(until {max(r.date for r in found.records)}), each beside what the cost model says of "
        "its configuration. The estimator is the one that `hwmodel plan` uses; it sees the model, "
        "the type of the weights, the device, the engine and the workload, never a measured "
        "figure of the run."
    )
    if decode and prefill:
        base = decode["baseline"]["median"]
        text += (
            f" Leaving out the sweep that a run belongs to, the median error is "
            f"**{_pc(decode['held_out']['median'])} % in decode** and "
            f"**{_pc(prefill['held_out']['median'])} % in prefill**; the usual rule (80 % of the "
            f"bandwidth and 150 µs a layer) is off by {_pc(base)} % in decode."
        )
    return text + " Made by `bench report`; the same data give the same file."


def _distinct(found: Sources, column: str) -> int:
    return len({str(r[column]) for r in found.result["rows"]})


def _coverage(found: Sources) -> str:
    s = found.result["summary"]
    statuses = s["statuses"]
    unjudged = [r for r in found.result["rows"] if not r["judged"]]
    beyond = [r for r in found.result["rows"] if r["status"] == "extrapolated"]
    fitted = sum(r["held_out_predicted"] is not None for r in beyond)
    reasons = Counter(_why(r.fit_ok) for r in found.records if not r.may_fit)
    rows = [
        ("runs", str(len(found.records))),
        ("figures (decode, prefill)", str(s["rows"])),
        ("models, devices, engines", ", ".join(
            str(_distinct(found, c)) for c in ("model", "device", "engine"))),
        ("judged: may enter an error statistic", str(s["judged"])),
        ("of these predicted", f"{_pc(s['coverage'])} %"),
        ("shown but not judged", f"{len(unjudged)} figures"),
        ("calibrated: in the fit, everything of it known", str(statuses["calibrated"])),
        ("known device class and engine, configuration never seen", str(statuses["held_out"])),
        ("extrapolated: a name, a shape or a reach beyond what is known",
         f"{len(beyond)} ({fitted} of them in the fit)"),
        ("declined: no known hardware, or no size of the weights", str(statuses["declined"])),
        ("beyond the datasheet's limit (flagged, kept)", str(s["beyond_limit"])),
    ]  # fmt: skip
    why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items(), key=_often))
    return (
        markdown(("", ""), rows)
        + f"\n\nNot judged, by what the run's entry says: {why}. Such rows are predicted but not "
        "drawn; one that counts as a ratio only (drafts over none, in conditions that are not "
        "stated) is judged as a ratio below."
    )


def _why(fit_ok: str) -> str:
    if fit_ok == "mtp_ratio_only":
        return "as a ratio only"
    bare = fit_ok.strip()
    return bare[bare.find("(") + 1 : -1] if "(" in bare and bare.endswith(")") else bare or "blank"


def _often(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _errors_intro(found: Sources) -> str:
    f = found.fit
    s = found.result["summary"]["by_quantity"]
    bands = "; ".join(
        f"{NAMES[q]} {_pc(s[q]['in_band'])} % (held out {_pc(s[q]['held_out']['in_band'])} %)"
        for q in COMPARED if q in s
    )  # fmt: skip
    return (
        f"|predicted / measured - 1| in %. The fit is of {f.as_of}, made on {len(f.runs)} figures. "
        "Cross-validated columns come from refits that never saw the sweep (one table of one "
        "source), the device, or the model of the row. The baseline has no fit: every byte at "
        "0.8 of the datasheet's bandwidth, and 150 µs a layer; it says nothing of prefill. "
        f"Share of measured figures inside the printed bands: {bands}."
    )


def _cross_table(
    errors: Mapping[str, Any],
) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    rows = []
    for q in COMPARED:
        entry = errors.get(q, {})
        for key, what in _CROSS:
            e = entry.get(key)
            if e and e.get("n"):
                rows.append((NAMES[q], what, str(e["n"]), *(_pc(e[k]) for k in _STATS)))
    return ("quantity", "predicted how", "figures", "median", "p90", "worst"), rows


_STATS = ("median", "p90", "worst")


def _group_intro() -> str:
    return (
        "Held out: the row's sweep is not in the fit that predicts it. In the band: share of "
        "measured figures inside the band of the present fit laid around that prediction; the "
        "refits' own bands are wider, and are set so that nine in ten of the left-out figures "
        "lie inside."
    )


def _group_table(summary: Mapping[str, Any]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = []
    for group in ("device", "engine"):
        for name, entry in summary[f"by_{group}"].items():
            for q in COMPARED:
                if q not in entry:
                    continue
                e = entry[q]
                held, base = e["held_out"], e["baseline"]
                rows.append((
                    name[:40], NAMES[q], str(e["n"] or 0), _pc(e["median"]), _pc(held["median"]),
                    _pc(held["p90"]), _pc(held["in_band"]), _pc(base["median"]), _pc(base["p90"]),
                ))  # fmt: skip
    header = (
        "device or engine", "quantity", "figures", "in the fit: median", "held out: median",
        "p90", "in the band", "baseline: median", "p90",
    )  # fmt: skip
    return header, rows


def _worst_intro() -> str:
    return (
        f"The {WORST} figures that a fit without their sweep misses by the largest factor, and "
        "what a reading of the source says of each. None was taken out for it."
    )


def _worst_table(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    notes = row_notes()
    cells: list[tuple[str, ...]] = []
    for r in worst_rows(rows, WORST):
        predicted = r["held_out_predicted"] or r["predicted"]
        cells.append((
            str(r["id"]), NAMES[r["quantity"]],
            f"{r['model']} {r['quant']} on {r['device']}, {r['engine']}",
            speed_text(r["measured"]), speed_text(predicted), f"{predicted / r['measured']:.2f}",
            notes.get((r["id"], r["quantity"]), "No reason found in the source."),
        ))  # fmt: skip
    header = ("run", "quantity", "what", "measured tok/s", "predicted", "ratio", "reading")
    return header, cells


def _speed_ups(errors: Mapping[str, Any]) -> str:
    e = errors.get("decode_tok_s", {}).get("speed_up_of_drafts", {}).get("leave_sweep_out")
    if not e or not e.get("n"):
        return "No published run states what drafts gain."
    return (
        f"Speed-up of drafts over none, {e['n']} published ratios, their sweep left out: median "
        f"error {_pc(e['median'])} %, 90th percentile {_pc(e['p90'])} %, worst {_pc(e['worst'])} "
        "%. Ratios within a sweep need no statement of its other conditions."
    )


def _loops(found: Sources, link: Link) -> list[str]:
    """The loop, and later ones on the same host (`loop-2`, `loop-3`, ... beside it)."""
    from bench.loop_run import COMPARISON

    text = _loop(found.loop, link)
    for folder in sorted(found.loop.parent.glob(f"{found.loop.name}-*")):
        if (folder / COMPARISON).is_file():
            number = folder.name.rpartition("-")[2]
            text += [f"### Loop {number}: probed, predicted and measured again",
                     *_loop(folder, link)]  # fmt: skip
    return text


def _probed() -> list[str]:
    """Efficiencies that probed devices are planned with."""
    from bench.loop_view import fit_table
    from hwmodel.probed import read, shipped_path

    if not shipped_path().is_file():
        return []
    made = read(shipped_path())
    return [
        "### What other probed hosts are planned with",
        "`hwmodel plan --device local` needs efficiencies relative to what `bench probe` measured, "
        f"not to a datasheet. They are fitted to all points of the loop on {made['host']}; the "
        "middle rows are of refits that never saw the file (model and type) of a point. Another "
        "host's band is wider by what published runs are further off when their device was left "
        "out; `bench loop fit` replaces them by the host's own.",
        markdown(*fit_table(made)),
    ]


def _loop(where: Path, link: Link) -> list[str]:
    from bench.loop_run import COMPARISON, PREDICTIONS, read
    from bench.loop_view import errors_table, when

    path = where / COMPARISON
    if not path.is_file():
        made = (where / PREDICTIONS).is_file()
        return [
            "Predictions are written, nothing outside the probe is measured yet."
            if made
            else "Not run yet: `bench loop --help` says how."
        ]
    loop = read(path, "bench loop compare")
    folder = link(where)
    points = [
        (r["id"], "probe" if r["probe"] else "outside", _number(r["measured"]),
         _number(r["predicted"]), f"{_number(r['low'])} to {_number(r['high'])}",
         f"{r['ratio']:.2f}" if r["ratio"] else "",
         f"{r['basis']}, {counted(r['rounds'], 'round')}")
        for r in loop["rows"]
    ]  # fmt: skip
    return [
        f"{loop['host']}. A few points were measured (the probe) and this host's efficiencies "
        "fitted to them alone; every other point was predicted and the predictions "
        f"[committed]({folder}/{PREDICTIONS}) ({when(loop['predictions_made'])}, made at "
        f"{loop['predictions_commit'].rstrip('+')}) before it was measured (from "
        f"{when(loop['first_measured'])} on). Slices are five layers of the published model at "
        "its true widths; they stream from memory. The embedded model stays in the last cache. "
        f"{loop['rule']}",
        markdown(*errors_table(loop)),
        f"![loop]({folder}/loop.png)",
        f"*Predicted against measured on this host. [Values]({folder}/comparison.csv), "
        f"[raw rounds]({folder}/rounds.jsonl).*",
        _loop_notes(where),
        "<details><summary>All points</summary>",
        markdown(
            ("point", "", "measured tok/s", "predicted", "band", "ratio", "measured how"), points
        ),
        "</details>",
    ]


def _loop_notes(folder: Path) -> str:
    """What a reader says of the points that were missed (`notes.md`), empty without such a file."""
    path = folder / "notes.md"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _engine(found: Sources, link: Link) -> list[str]:
    from bench.cpu_engine import row_json, source
    from bench.engine_figures import Figures, rows_of
    from bench.engine_run import all_rounds

    rounds = all_rounds(found.engine)
    if not rounds:
        return ["Not measured yet: `bench engine --help` says how."]
    rows = [row_json(r) for r in rows_of(Figures(rounds))]
    folder = link(found.engine)
    return [
        f"{source(rounds)}. Engines take turns in one run (A B A B), memory's speed probed beside "
        "each; ratios are between engines in the same round. The whole report is "
        f"[{folder}.md]({folder}.md), every sample [rounds.jsonl]({folder}/rounds.jsonl).",
        markdown(tuple(rows[0]), [tuple(r.values()) for r in rows]),
        f"![by type]({folder}/by-type.png)" if (found.engine / "by-type.png").is_file() else "",
    ]


def _limits(found: Sources) -> str:
    s = found.result["summary"]
    most = Counter(str(r["device"]) for r in found.result["rows"] if r["judged"]).most_common(3)
    total = max(1, s["judged"])
    share = sum(n for _, n in most) / total
    step = sum(1 for r in found.result["rows"] if r["judged"] and str(r["model"])[:5] == "step-")
    prefill = [r for r in found.records if r.prefill_tok_s and r.may_fit_quantity("prefill_tok_s")]
    silent = sum(1 for r in prefill if r.micro_batch is None)
    return "\n".join((
        f"* {step} of {s['judged']} judged figures are of Step models; the rest are of other "
        "models of experts and of dense ones, which share devices and engines with it.",
        f"* {', '.join(f'{d} ({n})' for d, n in most)} hold {_pc(share)} % of the judged figures. "
        "A device with two figures has an error of two figures.",
        "* Published runs rarely state their spread; the measured side of a row may itself be off "
        "by several percent, and by more where power limits or other users are not mentioned.",
        "* Leaving a sweep out leaves its device's other sweeps in. The column *its device left "
        "out* is what an owner of an unlisted machine should expect.",
        f"* Prefill depends on the micro-batch, which {silent} of {len(prefill)} judged prefill "
        "runs do not state in a column of its own; then the engine's default is taken.",
        "* The loop on one host shows that the structure carries over to shapes, depths and types "
        "on a processor; it says nothing of GPUs beyond what the published runs say.",
        "* What drafts gain depends on acceptance, which depends on the text; published figures "
        "are taken where a run states none.",
    ))  # fmt: skip


def _pc(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
