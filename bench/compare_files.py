"""The files of a comparison: five pictures as PNG and SVG, the table, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.runs import RunRecord
from hwmodel.fit import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures_of(
    records: Sequence[RunRecord], result: Mapping[str, Any], fit: Fit, names: str
) -> dict[str, Figure]:
    """The pictures by file name; `names` says where the runs come from."""
    from bench.compare_plots import gains_figure, residuals_figure, roles_figure
    from bench.plots import depth_figure, scatter_figure

    basis = f"fit of {fit.as_of or 'unknown date'} to {len(fit.runs)} figures"
    source = f"measured: {names}; predicted: hwmodel, {basis if fit.runs else 'priors'}"
    return {
        "predicted-measured": scatter_figure(result["rows"], source),
        "decode-depth": depth_figure(records, source),
        "bytes-by-role": roles_figure(records),
        "draft-gain": gains_figure(records, fit, source),
        "residuals": residuals_figure(result["rows"], source),
    }


def write_comparison(
    folder: Path, records: Sequence[RunRecord], result: Mapping[str, Any], fit: Fit, names: str
) -> list[Path]:
    """Write pictures, `table.txt` and `comparison.json` into a folder (made if need be).

    Raises:
        OSError: a file cannot be written.
    """
    from bench.compare_view import comparison_text
    from hwmodel.files import write_whole
    from hwmodel.plots import save

    written: list[Path] = []
    for name, figure in figures_of(records, result, fit, names).items():
        written += save(figure, folder, name)
    table, data = folder / "table.txt", folder / "comparison.json"
    write_whole(table, (comparison_text(result) + "\n").encode())
    write_whole(data, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    return [*written, table, data]
