"""The embedded model in every stored type, on held-out text: perplexity, distance, sizes; drafts
and experts on code and on prose. Everything runs on the engine, whose activations are int8 for
block types as in use; the base is the F32 file.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.backends import EMBEDDED_FILE, open_model
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.inspection import inspect
from refimpl.mini import data
from refimpl.quality.perplexity import compare, measure
from refimpl.quality.statistics import statistics
from refimpl.quality.windows import Window, bos_of, windows_of
from refimpl.text.tokenizer import Tokenizer

TYPES = ("f32", "q8_0", "q6_k", "q4_k_s", "iq4_xs", "q4_0")
SHIPPED = "shipped q4_0"
CONTEXT = 512
CHUNKS = 32  # of the held-out text, evenly spaced
STAT_CONTEXT = 256
STAT_TOKENS = 8_192
PROSE_WORDS = 8


def held_documents(tokenizer: Tokenizer) -> list[str]:
    """The text of every held-out document, in the order of the file."""
    held = data.held_out()
    documents, start = [], 0
    for length in held["lengths"].tolist():
        ids = held["tokens"][start + 1 : start + length - 1]  # without bos and eos
        documents.append(tokenizer.decode(ids.tolist()))
        start += length
    return documents


def prose(documents: list[str]) -> str:
    """The docstrings of the held-out documents that have at least eight words."""
    found = []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for text in documents:
        for node in ast.walk(ast.parse(text)):
            doc = ast.get_docstring(node) if isinstance(node, kinds) else None
            if doc is not None and len(doc.split()) >= PROSE_WORDS:
                found.append(doc)
    return "\n\n".join(found) + "\n"


def by_type(windows: list[Window], folder: Path) -> list[dict[str, Any]]:
    """One row per file, the base first."""
    shipped = data.HERE / EMBEDDED_FILE
    files = {name: folder / f"mini-{name}.gguf" for name in TYPES}
    for name, path in files.items():
        convert(data.HERE / "bf16", path, name)
    rows = []
    with open_model(files["f32"], "engine") as base:
        for name, path in {**files, SHIPPED: shipped}.items():
            with open_model(path, "engine") as model:
                row = _row(path) | {"type": name}
                if name == "f32":
                    row |= asdict(measure(model.backend, windows))
                else:
                    own, distance = compare(model.backend, base.backend, windows)
                    row |= asdict(own) | {"distance": asdict(distance)}
            rows.append(row)
            print(f"types: {name} done", file=sys.stderr)
    return rows


def _row(path: Path) -> dict[str, Any]:
    found = inspect(path)
    return {
        "file_bytes": path.stat().st_size,
        "bits_per_weight": found.bits_per_weight,
        "mixture": {kind: {"tensors": n, "bytes": b} for kind, (n, b) in found.types.items()},
    }


def measure_types() -> dict[str, Any]:
    """All of it, for `reports/mini.json`."""
    with open_model("mini", "engine") as model:
        assert model.tokenizer is not None
        tokenizer, backend = model.tokenizer, model.backend
        documents = held_documents(tokenizer)
        code = tokenizer.encode("".join(documents))
        texts = {"code": code[:STAT_TOKENS], "prose": tokenizer.encode(prose(documents))}
        bos = bos_of(tokenizer)
        counted: dict[str, Any] = {}
        for name, ids in texts.items():
            cut = windows_of(ids, backend.config, STAT_CONTEXT, None, bos)
            engine: Any = backend
            counted[name] = statistics(engine, cut[: STAT_TOKENS // STAT_CONTEXT], loops=4)
            print(f"statistics: {name} done", file=sys.stderr)
        windows = windows_of(code, backend.config, CONTEXT, None, bos)
        windows = [windows[int(i)] for i in np.linspace(0, len(windows) - 1, CHUNKS)]
    with tempfile.TemporaryDirectory() as folder:
        rows = by_type(windows, Path(folder))
    return {"context": CONTEXT, "types": rows, "statistics": counted}
