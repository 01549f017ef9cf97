"""Rewrite the output shown in the README's console blocks with what the commands print now.

Run from the checkout after a new fit: `python tests/refresh_readme.py`. Outputs that hold `...`
are written by hand and stay.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEP = re.compile(r"^\$ (?P<command>.*(?:\\\n.*)*)\n(?P<output>(?:(?!\$ |```).*\n)*)", re.M)


def refreshed(step: re.Match[str]) -> str:
    """One command with its present output."""
    if "..." in step["output"]:
        return step[0]
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    done = subprocess.run(
        ["bash", "-c", step["command"]],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), f"{step['command']}\n{done.stderr}"
    return f"$ {step['command']}\n{done.stdout.strip()}\n"


def main() -> None:
    """Rewrite README.md in place."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    blocks = re.compile(r"^```console\n(.*?)^```", re.M | re.S)
    new = blocks.sub(lambda b: b[0].replace(b[1], STEP.sub(refreshed, b[1])), text)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
