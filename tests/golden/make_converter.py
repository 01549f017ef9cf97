"""Records what llama.cpp's own converter writes for the tiny checkpoints.

    python tests/golden/make_converter.py --llama-cpp DIR

DIR is a checkout of llama.cpp (the fixture here: the one that llama-cpp-python 0.3.36 vendors).
Needs torch and transformers (the `oracles` extra). Writes tests/golden/converter.json: per preset
and type every key with its GGUF type and value, and every tensor with its type, dimensions and
the start of the SHA-256 of its bytes; prints how this project's writer differs.

Two things in the converter are set aside, because they concern recognition and not conversion: it
knows pre-tokenizers by a hash over the trained vocabulary, so the name is given to it; and the
configuration is read from config.json as it does for models with remote code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 3
TYPES = ("f32", "bf16", "q8_0")
LONG = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-cpp", type=Path, required=True)
    llama_cpp = parser.parse_args().llama_cpp.resolve()

    from refimpl.checkpoint.convert import convert
    from refimpl.checkpoint.synth import PRESETS, synthesize

    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for preset, config in PRESETS.items():
            folder = synthesize(config(), SEED, work / preset)
            for kind in TYPES:
                theirs, ours = work / "theirs.gguf", work / "ours.gguf"
                run_converter(llama_cpp, folder, kind, theirs)
                convert(folder, ours, kind, overwrite=True)
                found = describe(theirs)
                record.setdefault(preset, {})[kind] = found
                report(f"{preset} {kind}", found, describe(ours))
    out = HERE / "converter.json"
    header = {"seed": SEED, "dtype": "bf16", "by": "llama.cpp convert_hf_to_gguf.py"}
    text = json.dumps(header | {"presets": record}, ensure_ascii=False)
    out.write_text(text.replace("], [", "],\n[").replace('": {', '":\n{') + "\n")
    print(f"wrote {out.name}, {out.stat().st_size} bytes", file=sys.stderr)


def run_converter(llama_cpp: Path, folder: Path, kind: str, out: Path, *options: str) -> None:
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import conversion.base as base

    def config_json(folder: Path, is_mistral_format: bool) -> Any:
        return json.loads((folder / "config.json").read_text())

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
    base.ModelBase.load_hparams = staticmethod(config_json)
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", kind, "--outfile", str(out)]
    sys.argv += options
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


def describe(path: Path) -> dict[str, Any]:
    """Keys and tensors of a GGUF file, read by the `gguf` package."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    keys = {
        key: ["/".join(kind.name for kind in field.types), digest_if_long(field.contents())]
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    tensors = [
        [t.name, t.tensor_type.name, [int(d) for d in t.shape],
         hashlib.sha256(t.data.tobytes()).hexdigest()[:16]]
        for t in reader.tensors
    ]  # fmt: skip
    return {"keys": keys, "tensors": tensors}


def digest_if_long(value: Any) -> Any:
    """Long arrays as their length and SHA-256 of their JSON."""
    if isinstance(value, list) and len(value) > LONG:
        text = json.dumps(value, ensure_ascii=False)
        return {"length": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return value


def report(title: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    print(f"{title}: {len(theirs['keys'])} keys, {len(theirs['tensors'])} tensors")
    a, b = theirs["keys"], ours["keys"]
    for key in [*a, *(k for k in b if k not in a)]:
        if a.get(key) != b.get(key):
            print(f"  key {key}: theirs {a.get(key)}, ours {b.get(key)}")
    if [k for k in a if k in b] != [k for k in b if k in a]:
        print(f"  order of common keys: theirs {list(a)}, ours {list(b)}")
    c = {t[0]: t for t in theirs["tensors"]}
    d = {t[0]: t for t in ours["tensors"]}
    for name in [*c, *(n for n in d if n not in c)]:
        if c.get(name) != d.get(name):
            print(f"  tensor {name}: theirs {c.get(name)}, ours {d.get(name)}")
    if list(c) != list(d):
        print("  the order of the tensors differs")


if __name__ == "__main__":
    main()
