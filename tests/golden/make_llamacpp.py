"""Golden outputs of llama.cpp in float32: F32 weights, F32 keys and values, no flash attention.

Run: python tests/golden/make_llamacpp.py --llama-cpp DIR [--out FOLDER]
     (needs llama-cpp-python, torch and the source tree of its llama.cpp in DIR)

The checkpoint goes through llama.cpp's own converter (`convert_hf_to_gguf.py` in DIR), so names,
keys, the added one of the norms and `rope_freqs` are theirs too. Two things are put in its way,
neither touching a tensor: the tiny checkpoints have no tokenizer, so the file gets tokenizer
model "none" and the vocabulary size; and the configuration is read from `config.json` as it is,
because transformers knows the model type `step3p5` and would hand the converter its own fields.

The model is driven through llama-cpp-python's low-level interface, with `use_extra_bufts` off
(weights are not repacked for other kernels), one thread, and `load_mtp` on.

* `logits`, `greedy`: the trunk; greedy with a window-sized cache on sliding layers.
* `mtp_forced_*`: llama.cpp's own MTP graph (context type MTP), fed by hand with the chain that
  the checkpoint was trained for: head k takes (x_(t+1+k), output of head k-1 at t).
* `llamacpp_wiring_*`: the same graph fed as llama.cpp's `draft-mtp` driver feeds it (llama.cpp
  common/speculative.cpp): prefix rows pair x_p with the trunk's hidden state of p-1 for every
  head (zeros at p = 0), and only the draft rows are chained. `_forced_logits_k` holds one row per
  entry of `_rows`: head k after prompt[:t+1], true tokens in the draft region; `_draft_chain` the
  greedy drafts after prompt + greedy[0].
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from golden_shared import CHECKPOINTS, FOLDER, Array, Checkpoint, greedy, save
from llama_cpp import llama_cpp_ext

from refimpl.checkpoint.synth import synthesize

WIRING_ROWS = range(3, 64, 12)  # positions t of the teacher-forced wiring rows
NO_FLASH_ATTENTION = 0
F32 = 0


def convert(checkpoint: Checkpoint, source: Path, folder: Path) -> Path:
    """The checkpoint as an F32 GGUF file, written by llama.cpp's converter."""
    hf = synthesize(checkpoint.config, checkpoint.seed, folder / checkpoint.name, "f32")
    out = folder / f"{checkpoint.name}.gguf"
    if str(source) not in sys.path:
        sys.path.insert(1, str(source))
    import convert_hf_to_gguf  # puts the source tree's own gguf-py on the path itself
    from conversion import step3
    from conversion.base import ModelBase

    def set_vocab(self: Any) -> None:
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    def load_hparams(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        return json.loads((Path(folder) / "config.json").read_text())

    step3.Step35Model.set_vocab = set_vocab
    ModelBase.load_hparams = staticmethod(load_hparams)
    arguments, sys.argv = sys.argv, ["", str(hf), "--outfile", str(out), "--outtype", "f32"]
    try:
        convert_hf_to_gguf.main()
    finally:
        sys.argv = arguments
    return out


class Context:
    """One llama.cpp context: runs rows, gives logits and the hidden state before the norm."""

    def __init__(self, model: Any, mtp: bool, whole_cache: bool = True) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = NO_FLASH_ATTENTION
        params.type_k = params.type_v = F32
        params.swa_full = whole_cache
        params.ctx_type = llama_cpp.LLAMA_CONTEXT_TYPE_MTP if mtp else 0
        self.ctx = llama_cpp.llama_init_from_model(model, params)
        if not self.ctx:
            raise RuntimeError("llama.cpp made no context")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.width = llama_cpp.llama_model_n_embd(model)
        llama_cpp_ext.llama_set_embeddings_nextn(self.ctx, True, mtp)
        self.batch = llama_cpp.llama_batch_ext_init(self.ctx)
        self.fed: list[Array] = []  # the batch holds bare pointers to these rows

    def run(
        self, tokens: Sequence[int], first: int, hidden: Array | None = None
    ) -> tuple[Array, Array]:
        """Rows at positions first, first + 1, ...: logits (R, V) and hidden states (R, H)."""
        llama_cpp.llama_batch_ext_clear(self.batch)
        self.fed.clear()
        for i, token in enumerate(tokens):
            row = llama_cpp.llama_batch_ext_add_token(self.batch, 0, int(token))
            position = llama_cpp.llama_pos(first + i)
            llama_cpp.llama_batch_ext_set_pos(self.batch, row, ctypes.byref(position))
            if hidden is not None:
                llama_cpp.llama_batch_ext_set_embd_token(self.batch, row, self._embd(hidden[i]))
            llama_cpp.llama_batch_ext_set_output_logits(self.batch, row, True)
        code = llama_cpp.llama_process(self.ctx, 1, self.batch)
        if code != 0:
            raise RuntimeError(f"llama_process gave {code}")
        rows = range(len(tokens))
        logits = [_row(llama_cpp.llama_get_logits_ith(self.ctx, i), self.vocab) for i in rows]
        get = llama_cpp_ext.llama_get_embeddings_nextn_ith
        return np.stack(logits), np.stack([_row(get(self.ctx, i), self.width) for i in rows])

    def _embd(self, row: Array) -> Any:
        self.fed.append(np.ascontiguousarray(row, dtype=np.float32))
        pointer = self.fed[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return llama_cpp.llama_embd(data=pointer, n_rows=1, n_embd=row.size)

    def forget(self, position: int) -> None:
        """Drop the keys and values of all rows from `position` on."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        llama_cpp.llama_memory_seq_rm(memory, 0, position, -1)

    def head(self, k: int) -> None:
        """Choose which MTP layer runs."""
        llama_cpp_ext.llama_set_nextn_layer_offset(self.ctx, k)

    def close(self) -> None:
        """Give the memory back."""
        llama_cpp.llama_batch_ext_free(self.batch)
        llama_cpp.llama_free(self.ctx)


def _row(pointer: Any, size: int) -> Array:
    return np.ctypeslib.as_array(pointer, shape=(size,)).copy()


def continuation(model: Any, prompt: Array) -> Array:
    """Greedy tokens (N,), sliding layers with a cache of the window's size."""
    context, length = Context(model, mtp=False, whole_cache=False), 0

    def step(tokens: list[int]) -> Array:
        nonlocal length
        logits, _ = context.run(tokens, length)
        length += len(tokens)
        return logits[-1]

    tokens, _ = greedy(step, prompt)
    context.close()
    return tokens


def chain(model: Any, depth: int, prompt: Array, hidden: Array) -> dict[str, Array]:
    """`mtp_forced_logits_k` (T-1-k, V): every head over all rows, chained."""
    context, arrays = Context(model, mtp=True), {}
    for k in range(depth):
        context.forget(0)
        context.head(k)
        rows = len(prompt) - 1 - k
        # Every head starts at position 0; only differences of positions enter the attention.
        logits, hidden = context.run(prompt[k + 1 :], 0, hidden[:rows])
        arrays[f"mtp_forced_logits_{k}"] = logits
    context.close()
    return arrays


class Driver:
    """`draft-mtp`: how llama.cpp itself feeds the MTP graph of a model with several heads."""

    def __init__(self, model: Any, depth: int) -> None:
        self.context, self.depth = Context(model, mtp=True), depth

    def draft(
        self, prefix: Array, hidden: Array, newest: int, forced: Sequence[int] = ()
    ) -> tuple[list[int], list[Array]]:
        """Drafts after prefix + newest, and the logits (V,) of each.

        `hidden` (len(prefix), H) are the trunk's rows before the final norm. Where `forced` has
        a token, it takes the place of the draft in what follows.
        """
        context, n = self.context, len(prefix)
        context.forget(0)
        shifted = np.concatenate([np.zeros_like(hidden[:1]), hidden[:-1]])
        for k in range(self.depth):
            context.forget(0)
            context.head(k)
            context.run(prefix, 0, shifted)
        # All heads share the cache's cells, each writes its own layer of them.
        tokens, rows, drafts, logits = [newest], [hidden[-1]], [], []
        for k in range(self.depth):
            context.forget(n)
            context.head(k)
            out, states = context.run(tokens, n, np.stack(rows))
            drafts.append(int(out[-1].argmax()))
            logits.append(out[-1])
            tokens.append(int(forced[k]) if k < len(forced) else drafts[-1])
            rows.append(states[-1])
        return drafts, logits


def own_wiring(
    model: Any, depth: int, prompt: Array, hidden: Array, first: int
) -> dict[str, Array]:
    """`llamacpp_wiring_*` as described above."""
    driver = Driver(model, depth)
    rows = []
    for t in WIRING_ROWS:
        true = prompt[t + 2 : t + 1 + depth]
        rows.append(driver.draft(prompt[: t + 1], hidden[: t + 1], int(prompt[t + 1]), true)[1])
    tokens, logits = driver.draft(prompt, hidden, first)
    driver.context.close()
    arrays = {
        f"llamacpp_wiring_forced_logits_{k}": np.stack([row[k] for row in rows])
        for k in range(depth)
    }
    return arrays | {
        "llamacpp_wiring_rows": np.array(WIRING_ROWS, dtype=np.int64),
        "llamacpp_wiring_draft_chain": np.array(tokens, dtype=np.int64),
        "llamacpp_wiring_draft_chain_logits": np.stack(logits),
    }


def load(gguf: Path) -> Any:
    """A llama.cpp model, its MTP layers included, weights not repacked."""
    llama_cpp.llama_log_set(_errors_only, None)
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    params.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {gguf.name}")
    return model


def outputs(checkpoint: Checkpoint, gguf: Path) -> dict[str, Array]:
    """All arrays of one golden file."""
    model = load(gguf)
    prompt, depth = checkpoint.prompt, checkpoint.config.num_nextn_predict_layers
    context = Context(model, mtp=False)
    logits, hidden = context.run(prompt, 0)
    context.close()
    arrays = {"prompt": prompt, "logits": logits, "greedy": continuation(model, prompt)}
    arrays |= chain(model, depth, prompt, hidden)
    arrays |= own_wiring(model, depth, prompt, hidden, int(arrays["greedy"][0]))
    llama_cpp.llama_model_free(model)
    return arrays


@llama_cpp.llama_log_callback
def _errors_only(level: int, text: bytes, user_data: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp source folder")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: here)")
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    facts = {
        "peer_version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
        "command": "python tests/golden/make_llamacpp.py --llama-cpp DIR",
    }
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in CHECKPOINTS.values():
            gguf = convert(checkpoint, args.llama_cpp, Path(folder))
            path = save(
                checkpoint, "llamacpp", "float32", outputs(checkpoint, gguf), facts, args.out
            )
            print(f"{path.name}: {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
