"""The parts of `reports/mini.md` about stored types, drafts and experts, with their plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from refimpl.checkpoint.atomic import atomic_file

OVERLAP, TYPES = "mini_overlap", "mini_types"
LABELS = {
    "teacher_forced": "behind the true text",
    "loop_greedy": "loop, greedy",
    "loop_sampled": "loop, sampled at temperature 1",
}


def type_section(found: dict[str, Any]) -> list[str]:
    """Perplexity, distance from F32 and size of each type."""
    first = found["types"][0]
    lines = [
        "## Stored types", "",
        f"The held-out documents as one text, {first['windows']} evenly spaced chunks of "
        f"{found['context']} tokens of which the second half is judged "
        f"({first['judged_tokens']:,} tokens; "
        "llama-perplexity's protocol, so figures differ from those above). All on the engine, "
        "converted from the bf16 weights by `refimpl convert`; the activations of block types are "
        "int8, as in use. ± is one standard error clustered by chunk (95 %: bootstrap over "
        "chunks). The shipped file was written by the same quantiser family from weights trained "
        "with Q4_0 blocks in the forward pass (quantisation-aware), and so were those behind every "
        "other row: Q4_0 is favoured here.", "",
        f"![Perplexity against size]({TYPES}.png)", "",
        "| type | MB | bits/weight | perplexity | ratio to F32 | KL mean | KL 95 % | KL max "
        "| same top token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in found["types"]:
        lines.append(
            f"| {r['type']} | {r['file_bytes'] / 1e6:.1f} | {r['bits_per_weight']:.2f} | "
            f"{_pm(r['perplexity'], 3)} | {_distance(r.get('distance'))} |"
        )
    lines += [
        "", "What the files hold (K types need rows that divide by 256, else they fall back):", "",
    ]  # fmt: skip
    for r in found["types"]:
        held = ", ".join(
            f"{m['tensors']} {kind} ({m['bytes'] / 1e6:.2f} MB)" for kind, m in r["mixture"].items()
        )
        lines.append(f"* {r['type']}: {held}")
    return [*lines, ""]


def _distance(d: dict[str, Any] | None) -> str:
    if d is None:
        return "1 | | | |"
    same = d["top1_agreement"]
    return (
        f"{_pm(d['perplexity_ratio'], 4)} | {_pm(d['kl_mean'], 5)} | {_pm(d['kl_p95'], 4)} | "
        f"{d['kl_max']:.3f} | {100 * same['value']:.2f} ± {100 * same['standard_error']:.2f} %"
    )


def _pm(x: dict[str, Any], digits: int) -> str:
    return f"{x['value']:.{digits}f} ± {x['standard_error']:.{digits}f}"


def statistics_section(counted: dict[str, Any]) -> list[str]:
    """Acceptance and expert overlap on code and on prose."""
    sizes = ", ".join(f"{name}: {s['tokens']:,} tokens" for name, s in counted.items())
    lines = [
        "## Drafts on code and prose", "",
        f"`refimpl stats` with the shipped file on the engine ({sizes}). Code is the beginning of "
        "the held-out documents; prose is their docstrings of at least eight words. Chance that a "
        "draft stands, given that all before it in the step stood:", "",
        "| text | measured | draft 1 | draft 2 | draft 3 | accepted a step |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, record in counted.items():
        for key, label in LABELS.items():
            d = record["drafts"][key]
            each = " | ".join(_percent(x) for x in d["by_position"])
            lines.append(f"| {name} | {label} | {each} | {_pm(d['accepted_per_step'], 2)} |")
    lines += [
        "", "## Experts", "",
        "Distinct experts per layer that neighbouring tokens use, of 32 with 4 a token, beside "
        "what independent choices with the measured loads, or even ones, would use:", "",
        f"![Distinct experts]({OVERLAP}.png)", "",
        "| tokens | code | prose | independent, loads of code | independent, even |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    code, prose = counted["code"], counted["prose"]
    independent = code["overlap"]["independent"]
    for n, value in code["distinct_experts"].items():
        i = int(n) - 1
        lines.append(
            f"| {n} | {value:.2f} ± {code['overlap']['standard_errors'][i]:.2f} | "
            f"{prose['distinct_experts'][n]:.2f} ± {prose['overlap']['standard_errors'][i]:.2f} | "
            f"{independent['measured_load'][i]:.2f} | {independent['uniform'][i]:.2f} |"
        )
    lines += [
        "", "Load on code: imbalance is the busiest expert's load over the mean.", "",
        "| layer | imbalance | entropy / log 32 | share of the busiest three |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for f in code["load_by_layer"]:
        lines.append(
            f"| {f['layer']} | {f['imbalance']:.2f} | {f['entropy_share']:.3f} | "
            f"{100 * f['busiest_tenth_share']:.1f} % |"
        )
    margin = code["routing_margin"]
    return [
        *lines, "",
        f"Routing margin on code (4th minus 5th biased score): median "
        f"{_pm(margin['p50'], 4)}, 1 % of choices below {_pm(margin['p01'], 5)}.", "",
    ]  # fmt: skip


def _percent(x: dict[str, Any]) -> str:
    error = x["standard_error"]
    return f"{100 * x['value']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"


def draw(measured: dict[str, Any], out: Path) -> None:
    """Both plots, as PNG and SVG."""
    _drawn(out / TYPES, lambda axes: _types(axes, measured["by_type"]["types"]))
    _drawn(out / OVERLAP, lambda axes: _overlap(axes, measured["by_type"]["statistics"]))


def _types(axes: Any, rows: list[dict[str, Any]]) -> None:
    for r in rows[1:]:
        x = r["distance"]["perplexity_ratio"]
        y, error = 100 * (x["value"] - 1), 100 * x["standard_error"]
        color = "#D55E00" if r["type"].startswith("shipped") else "#0072B2"
        axes.errorbar(r["bits_per_weight"], y, yerr=error, fmt="o", color=color, capsize=3)
        left = r["type"] in ("iq4_xs", "q4_0")  # beside their neighbours' error bars
        axes.annotate(r["type"], (r["bits_per_weight"], y), xytext=(-8 if left else 8, 6),
                      ha="right" if left else "left", textcoords="offset points")  # fmt: skip
    axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    axes.set(xlabel="bits per weight", ylabel="perplexity above F32 (%)", xlim=(4, 9.5))
    axes.set_title("Stored types of the embedded model")


def _overlap(axes: Any, counted: dict[str, Any]) -> None:
    styles = {"code": ("#0072B2", "-"), "prose": ("#D55E00", "--")}
    for name, (color, style) in styles.items():
        y = list(counted[name]["distinct_experts"].values())
        axes.plot(range(1, len(y) + 1), y, style, marker="o", color=color, label=name)
    independent = counted["code"]["overlap"]["independent"]
    for key, label, color in (
        ("measured_load", "independent, same loads", "#009E73"),
        ("uniform", "independent, even", "#888888"),
    ):
        axes.plot(range(1, 9), independent[key], ":", color=color, label=label)
    axes.set(xlabel="neighbouring tokens", ylabel="distinct experts per layer", ylim=(0, None))
    axes.set_title("Experts that neighbouring tokens share")
    axes.legend(frameon=False)


def _drawn(path: Path, fill: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = path.name
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    fill(axes)
    axes.grid(alpha=0.25)
    for suffix in ("png", "svg"):
        with atomic_file(path.with_suffix(f".{suffix}")) as file:
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(file, format=suffix, dpi=150, metadata=metadata)
    plt.close(figure)
