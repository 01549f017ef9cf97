"""What is done with a damaged file: everything that a user's command would do, as far as it gets.

Each target takes the folder of one case and either returns or raises. Files that open are used:
a few tokens run through the reference and the engine, whose kernels index unchecked.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from seeds import PROMPT, Seeds

from refimpl.backends import quiet
from refimpl.checkpoint.fingerprint import fingerprint
from refimpl.checkpoint.inspection import inspect
from refimpl.checkpoint.open import open_checkpoint
from refimpl.config_io import from_hf, load_hf_config, to_hf
from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.state import read_state
from refimpl.engine.model import EngineModel
from refimpl.errors import InputError, RefimplError
from refimpl.golden.candidate import read_candidate
from refimpl.golden.compare import compare
from refimpl.golden.files import read_golden, read_tokens
from refimpl.golden.pieces import read_hidden
from refimpl.inventory import inventory
from refimpl.reference.model import ReferenceModel
from refimpl.text.template import ChatTemplate, Limits
from refimpl.text.tokenizer import tokenizer_of

TEXT = "def f(x):\n    return 'né <|im_end|>' + 12345 日本"
INSPECTED = 3  # a checkpoint of so many is inspected too
_LIMITS = Limits(cpu_s=0.3, memory_bytes=64 << 20, output_chars=1 << 20)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "<think>\na</think>\nhi", "tool_calls": [
        {"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "user", "content": "bye\n"},
]  # fmt: skip


def checkpoint(folder: Path, name: str, seeds: Seeds) -> None:
    """Open a checkpoint, read its tokenizer, inspect it, run it on both backends."""
    path = folder / name if name else folder
    written = b"".join(p.read_bytes()[-64:] for p in sorted(folder.iterdir()))
    if zlib.crc32(written) % INSPECTED == 0:
        run_all(lambda: inspect(path, check=True).to_json())
    with quiet():
        source = open_checkpoint(path)
        try:
            run_all(
                lambda: use_tokenizer(tokenizer_of(path, source.metadata or None)),
                lambda: fingerprint(source),
                lambda: run_model(ReferenceModel(source)),
            )
            run_engine(source)
        finally:
            source.close()


def run_all(*actions: Callable[[], Any]) -> None:
    """Every action, even after one was refused; the first refusal goes on."""
    refusals = []
    for action in actions:
        try:
            action()
        except RefimplError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def run_engine(source: Any) -> None:
    """The same on the engine, which may lack kernels for what the reference can run."""
    try:
        run_model(EngineModel(source, threads=1))
    except InputError as error:
        assert str(error).isprintable(), error


def run_model(model: Any) -> None:
    """A few tokens: a chunk of a prompt, drafts, and their verification."""
    config = model.config
    if config.num_hidden_layers > 64 or config.num_nextn_predict_layers > 8:
        raise InputError("more layers than are run here")  # slow, and like the others
    tokens = [t % config.vocab_size for t in PROMPT]
    room = min(len(tokens) + 4, config.max_position_embeddings)
    depth = min(1, config.num_nextn_predict_layers)
    options = GenerateOptions(2, mtp=depth, context=room, stop_tokens=(), prefill_chunk=4)
    generate(model, tokens[: max(1, room - 4)], options)


def use_tokenizer(tokenizer: Any) -> None:
    """Encode, decode, and look at single tokens."""
    if tokenizer is None:
        return
    ids = tokenizer.encode(TEXT)
    tokenizer.encode(TEXT, parse_special=False)
    stream = tokenizer.stream()
    for i in ids:
        stream.push(i)
    stream.finish()
    tokenizer.decode([*ids, 0, len(tokenizer) - 1, len(tokenizer) + 5], skip_special=True)
    for i in range(min(len(tokenizer), 40)):
        tokenizer.token_bytes(i)
    tokenizer.id_of("<|im_end|>")


def tokenizer_only(folder: Path, name: str, seeds: Seeds) -> None:
    """The tokenizer of a folder or of a GGUF file's keys."""
    use_tokenizer(tokenizer_of(folder / name if name else folder))


def config_json(folder: Path, name: str, seeds: Seeds) -> None:
    """A configuration: read, written back, its tensor table made; then the whole checkpoint."""
    config = load_hf_config(folder / "config.json")
    if from_hf(json.loads(json.dumps(to_hf(config)))) != config:
        raise AssertionError("a configuration is not read back as it was written")
    if config.num_layers <= 256:
        for spec in inventory(config):
            assert spec.elements > 0
    checkpoint(folder, "", seeds)


def template(folder: Path, name: str, seeds: Seeds) -> None:
    """A chat template over a conversation."""
    source = (folder / name).read_text(encoding="utf-8", errors="replace")
    with ChatTemplate(source, name, {"bos_token": "<s>"}, _LIMITS) as made:
        made.render(messages=MESSAGES, tools=[{"name": "f"}], add_generation_prompt=True)


def state(folder: Path, name: str, seeds: Seeds) -> None:
    """A state file: read, and gone on from."""
    model = seeds.backend(name.partition(".")[0])
    with quiet():
        saved = read_state(folder / name, model)
        options = GenerateOptions(3, mtp=1, context=40, stop_tokens=(), prefill_chunk=4)
        generate(model, [*saved.tokens, 7, 9], options, saved=saved)


def golden(folder: Path, name: str, seeds: Seeds) -> None:
    """A golden file: compared with a good one both ways, taken as candidate and as a piece."""
    good, _ = read_golden(seeds.root / "g.npz")
    with quiet():
        arrays, meta = read_golden(folder / name)
        json.dumps(meta)
        run_all(
            lambda: compare(good, arrays).to_json(),
            lambda: compare(arrays, good).to_json(),
            lambda: read_candidate(folder / name, seeds.backend("reference").config, PROMPT),
            lambda: read_hidden(folder / name, 1, len(PROMPT), 32),
        )


def candidate(folder: Path, name: str, seeds: Seeds) -> None:
    """A candidate of any form, or a list of ids."""
    path = folder / name
    config = seeds.backend("reference").config
    tokenizer = tokenizer_of(seeds.gguf("q8_0"))
    with quiet():
        if name == "c.json":
            read_tokens(path.read_bytes().decode("utf-8", "replace"), name)
            return
        read = read_candidate(path, config, PROMPT, tokenizer)
        logits = np.zeros((4096, config.vocab_size))
        for text in read.sequences:
            for seen in text.observations:
                if seen.place[0] == "logits" and len(text.tokens) <= len(logits):
                    seen.pick(logits[: len(text.tokens)])


TARGETS: dict[str, tuple[Callable[[Path, str, Seeds], None], float]] = {
    # kind: what is done, and its share of the cases
    "gguf": (checkpoint, 24),
    "gguf-vocabulary": (tokenizer_only, 8),
    "hf": (checkpoint, 12),
    "fp8": (checkpoint, 8),
    "mlx": (checkpoint, 8),
    "config.json": (config_json, 10),
    "tokenizer.json": (tokenizer_only, 8),
    "template": (template, 4),
    "state": (state, 8),
    "golden": (golden, 6),
    "candidate": (candidate, 4),
}


def main_name(names: list[str]) -> str:
    """The file that is opened: of a folder, the folder itself."""
    if "config.json" in names or "tokenizer.json" in names:
        return ""
    return sorted(names)[0]
