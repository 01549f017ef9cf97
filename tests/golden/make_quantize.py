"""Holds `refimpl convert` against llama-quantize: types, keys, errors, and whether files run.

    python tests/golden/make_quantize.py --llama-quantize PATH [--work FOLDER] [--parts PART ...]

PATH is llama.cpp's program (the fixture here: built from the source that llama-cpp-python 0.3.36
vendors); the last step needs llama-cpp-python itself (the `oracles` extra). Writes
tests/golden/quantize.json, which the tests read, and prints what differs (quantize_report.py makes
a page of it):

* types: for each model of `quantize_shared.CONFIGS` (the published one among them, as a sparse
  BF16 file) and each mixture, the type that `llama-quantize --dry-run` gives every tensor;
* keys: all keys and tensor names of files that both really quantise, which must be equal;
* errors: the root mean square error of every quantised tensor, both against the BF16 or F32
  source, for the embedded model's trained weights, Gaussian ones and ones with outliers. No
  importance matrix;
* running: the embedded model in each type in llama.cpp, against the reference and the engine on
  the same file: how often the most probable token agrees over the first bundled prompts. llama.cpp
  and the engine round activations to 8 bits, the reference does not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import quantize_report
from quantize_shared import CONFIGS, MINI, RECORD, SEED, compact, heavy_chunks, rms, wide

from refimpl.checkpoint.block_types import decode
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.gguf_read import read_gguf
from refimpl.checkpoint.gguf_write import write_blocks
from refimpl.checkpoint.hf_write import write_hf
from refimpl.checkpoint.mixtures import MIXTURES, mixture
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.inventory import gguf_inventory

MIXED = [name for name in MIXTURES if name not in ("f32", "f16", "bf16")]
PARTS = ["types", "errors", "running"]
PROMPTS, PROMPT_TOKENS = 6, 192
_LINE = re.compile(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\S+), size = (.*)$")
_TO = re.compile(r"\((\w+)\)$")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="a folder for some 3 GB")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="the rest is kept")
    args = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record["by"] = "llama.cpp as vendored by llama-cpp-python 0.3.36; no importance matrix"
    program = args.llama_quantize
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        if "types" in args.parts:
            record["types"] = {
                name: chosen_types(program, config(), work) for name, config in CONFIGS.items()
            }
        if "errors" in args.parts:
            record["errors"], record["keys"] = measured_errors(program, work)
        if "running" in args.parts:
            record["running"] = run_files(work)
    text = json.dumps(record, indent=1)
    RECORD.write_text(re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", _one_line, text) + "\n")
    keys = record["keys"]
    print(f"keys, names, shapes and types: {keys['files']} files, different: {keys['different']}")
    for source, kinds in record["errors"].items():
        print(f"{source}, rms errors of llama-quantize and of refimpl")
        for kind, row in kinds.items():
            print(f"  {kind}: {row['rms'][0]:.4g}, {row['rms'][1]:.4g}")
    print(quantize_report.running(record["running"]))
    print(f"wrote {RECORD.name}, {RECORD.stat().st_size} bytes", file=sys.stderr)


def _one_line(match: re.Match[str]) -> str:
    return "[" + " ".join(match[1].split()) + "]"


def chosen_types(program: Path, config: Any, work: Path) -> dict[str, Any]:
    """Per mixture the types that llama-quantize would give each tensor."""
    source = work / "sparse.gguf"
    write_blocks(
        config, source, MIXTURES["bf16"].file_type, mixture("bf16", config), lambda *_: (),
        hole=lambda spec: True,
    )  # fmt: skip
    found = {}
    for name in MIXED:
        types = {}
        for line in run(program, "--dry-run", source, name.upper()).splitlines():
            if match := _LINE.match(line):
                to = _TO.search(match[3].strip())
                types[match[1]] = (to[1] if to else match[2]).upper()
        ours = mixture(name, config)
        for spec in gguf_inventory(config):
            if types[spec.gguf_name] != ours(spec):
                print(f"{name}: {spec.gguf_name} theirs {types[spec.gguf_name]}, ours {ours(spec)}")
        if len(types) != len(gguf_inventory(config)):
            print(f"{name}: {len(types)} tensors, {len(gguf_inventory(config))} expected")
        found[name] = compact(types)
    source.unlink()
    return found


def run(*command: object) -> str:
    """What a program prints to both streams."""
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{text[-2000:]}")
    return text


def sources(work: Path) -> dict[str, tuple[Path, str]]:
    """Checkpoint folders to quantise, and the type of the file that llama-quantize reads."""
    write_hf(wide(), heavy_chunks, work / "heavy", "f32")
    return {
        "mini": (MINI, "bf16"),
        "gaussian": (synthesize(wide(), SEED, work / "gaussian", "f32"), "f32"),
        "heavy": (work / "heavy", "f32"),
        "tiny_a": (synthesize(PRESETS["tiny_a"](), SEED, work / "tiny_a", "f32"), "f32"),
        "tiny_b": (synthesize(PRESETS["tiny_b"](), SEED, work / "tiny_b", "f32"), "f32"),
    }


def measured_errors(program: Path, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per source, type and tensor: their error and ours; and the keys that differ."""
    errors: dict[str, Any] = {}
    keys: dict[str, Any] = {"files": 0, "different": []}
    for name, (folder, kind) in sources(work).items():
        plain, theirs, ours = (work / f"{n}.gguf" for n in ("plain", "theirs", "ours"))
        convert(folder, plain, kind, overwrite=True)
        exact = read_gguf(plain).tensors
        found: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
        for mix in MIXED:
            run(program, plain, theirs, mix.upper())
            convert(folder, ours, mix, overwrite=True)
            keys["files"] += 1
            keys["different"] += [f"{name} {mix}: {k}" for k in differences(theirs, ours)]
            a, b = read_gguf(theirs).tensors, read_gguf(ours).tensors
            for tensor, source in exact.items():
                stored = b[tensor].kind.name
                if stored not in ("F32", "F16", "BF16") and tensor not in found[stored]:
                    x = values(source)
                    found[stored][tensor] = rms(values(a[tensor]) - x), rms(values(b[tensor]) - x)
        errors[name] = {stored: summary(found[stored]) for stored in sorted(found)}
    return errors, keys


def summary(pairs: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Errors (theirs, ours) over all tensors of a type, the worst ratio, and a few tensors."""
    both = np.array(list(pairs.values()))
    names = list(pairs)
    few = [names[i] for i in sorted({0, len(names) // 3, 2 * len(names) // 3, len(names) - 1})]
    return {
        "tensors": len(pairs),
        "rms": [float(f"{rms(column):.6g}") for column in both.T],
        "worst_ratio": round(float((both[:, 1] / both[:, 0]).max()), 4),
        "some": {name: [float(f"{v:.6g}") for v in pairs[name]] for name in few},
    }


def values(tensor: Any) -> Any:
    """All values of a tensor in a GGUF file, float32."""
    width = tensor.dims[0]
    rows = np.asarray(tensor.data).view(np.uint8).reshape(-1, tensor.kind.row_bytes(width))
    return decode(tensor.kind, rows).astype(np.float32)


def differences(a: Path, b: Path) -> list[str]:
    """Keys and tensors (names, shapes, types) in which two files differ, whatever their order."""
    first, second = read_gguf(a), read_gguf(b)
    wrong = [
        key
        for key in {**first.metadata, **second.metadata}
        if plain_value(first.metadata.get(key)) != plain_value(second.metadata.get(key))
    ]
    tensors = [{t.name: (t.dims, t.kind.name) for t in f.tensors.values()} for f in (first, second)]
    return wrong + [
        n for n in {**tensors[0], **tensors[1]} if tensors[0].get(n) != tensors[1].get(n)
    ]


def plain_value(value: Any) -> Any:
    """A key's value in a form that can be compared."""
    return value if isinstance(value, str) or not hasattr(value, "__len__") else list(value)


def run_files(work: Path) -> dict[str, Any]:
    """The embedded model in each type: agreement of the most probable token, pair by pair."""
    import llama_cpp
    from make_llamacpp import Context, load

    from refimpl.backends import open_backend
    from refimpl.mini import prompts
    from refimpl.text.tokenizer import tokenizer_of

    tokenizer = tokenizer_of(MINI)
    assert tokenizer is not None
    texts = [tokenizer.encode(p.text)[-PROMPT_TOKENS:] for p in prompts.load()[:PROMPTS]]
    exact = logits(open_backend(open_checkpoint(MINI), "reference"), texts)
    found: dict[str, Any] = {}
    for name in ["f32", *MIXED]:
        path = work / "run.gguf"
        convert(MINI, path, name, overwrite=True)
        peer = load(path)
        rows = []
        for ids in texts:
            context = Context(peer, mtp=False)
            rows.append(context.run(ids, 0)[0])
            context.close()
        llama_cpp.llama_model_free(peer)
        joined = {
            "llama.cpp": np.concatenate(rows),
            "reference": logits(open_backend(open_checkpoint(path), "reference"), texts),
            "engine": logits(open_backend(open_checkpoint(path), "engine"), texts),
            "source": exact,
        }
        found[name] = {"rows": len(joined["source"])}
        for one, other in (
            ("llama.cpp", "reference"), ("llama.cpp", "engine"), ("engine", "reference"),
            ("reference", "source"),
        ):  # fmt: skip
            a, b = joined[one], joined[other]
            same = float(np.mean(a.argmax(1) == b.argmax(1)))
            found[name][f"{one} / {other}"] = [round(same, 4), round(rms(a - b), 5)]
    return found


def logits(backend: Any, texts: list[list[int]]) -> Any:
    """(rows of all texts, V)."""
    rows = []
    for ids in texts:
        cache = backend.new_cache(len(ids))
        rows.append(backend.prefill(ids[:1], cache).logits)
        rows += [backend.decode(ids[i : i + 4], cache).logits for i in range(1, len(ids), 4)]
    return np.concatenate(rows)


if __name__ == "__main__":
    main()
