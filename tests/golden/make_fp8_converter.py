"""Records what llama.cpp's converter makes of an FP8 folder of this project.

    python tests/golden/make_fp8_converter.py --llama-cpp DIR

DIR and what is needed: as in make_converter.py. Writes tests/golden/fp8_converter.json: keys and
tensors (type, dimensions, start of the SHA-256) of the F32 file made from tiny_a with FP8 experts
in the published blocks of 128 x 128, which the edges of these matrices cut.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from make_converter import HERE, SEED, describe, run_converter


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True)
    llama_cpp = parser.parse_args().llama_cpp.resolve()
    sys.path.insert(0, str(llama_cpp / "gguf-py"))  # its own `gguf`, before anything loads another

    from refimpl.checkpoint.synth import PRESETS, synthesize

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = synthesize(PRESETS["tiny_a"](), SEED, work / "tiny_a", "fp8")
        run_converter(llama_cpp, folder, "f32", work / "out.gguf")
        found = describe(work / "out.gguf")
    header = {"seed": SEED, "preset": "tiny_a", "by": "llama.cpp convert_hf_to_gguf.py"}
    out = HERE / "fp8_converter.json"
    text = json.dumps(header | found, ensure_ascii=False)
    out.write_text(text.replace("], [", "],\n[").replace('": {', '":\n{') + "\n")
    print(f"wrote {out.name}, {out.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
