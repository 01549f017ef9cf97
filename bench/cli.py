"""The command `bench`: parses and prints; everything else is imported when it is used."""

from __future__ import annotations

import click

from hwmodel.cli_support import SETTINGS, CommandGroup


@click.group(
    cls=CommandGroup,
    lazy={
        "calibrate": "bench.cli_model:calibrate",
        "compare": "bench.cli_model:compare",
        "engine": "bench.cli_engine:engine",
        "import": "bench.cli_import:import_command",
        "loop": "bench.cli_loop:loop",
        "probe": "bench.cli_probe:probe",
        "run": "bench.cli_run:run",
        "report": "bench.cli_report:report",
    },
    context_settings=SETTINGS,
)
@click.version_option(package_name="step-flash-reference", prog_name="bench")
def main() -> None:
    """Measured runs against the cost model: fit it, and say how far off it is.

    \b
    Example:
      bench compare --runs my-runs.csv --json comparison.json
    """
