"""Rewrite the output shown in the README's console blocks with what the commands print now.

Run from the checkout after a new fit: `python tests/refresh_readme.py`. Outputs that hold `...`
are written by hand and stay.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEP = re.compile(r"^\$ (?P<command>.*(?:\\\n.*)*)\n(?P<output>(?:(?!\$ |```).*\n)*)", re.M)


def refresher(folder: Path) -> Callable[[re.Match[str]], str]:
    """Gives commands their present output; they run in `folder`, where the README's paths exist."""
    for name in ("README.md", "refimpl", "hwmodel", "bench", "reports", "tests"):
        (folder / name).symlink_to(ROOT / name)
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]

    def refreshed(step: re.Match[str]) -> str:
        if "..." in step["output"]:
            return step[0]
        done = subprocess.run(
            ["bash", "-c", step["command"]],
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 1), f"{step['command']}\n{done.stderr}"
        printed = done.stdout.strip("\n")
        return f"$ {step['command']}\n" + (f"{printed}\n" if printed else "")

    return refreshed


def refreshed_block(block: re.Match[str]) -> str:
    """One console block, run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return block[0].replace(block[1], STEP.sub(refresher(Path(folder)), block[1]))


def main() -> None:
    """Rewrite README.md in place."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    blocks = re.compile(r"^```console\n(.*?)^```", re.M | re.S)
    new = blocks.sub(refreshed_block, text)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
