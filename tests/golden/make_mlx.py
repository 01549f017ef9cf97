"""Golden outputs of mlx-lm's `step3p5` model in float32 on the CPU.

Run: python tests/golden/make_mlx.py [--out FOLDER]    (needs mlx and mlx-lm)

What runs is mlx-lm's code: `Model` with its `sanitize` (which renames, stacks nothing, adds the
one of the zero-centred norms and drops the MTP layers) and its caches (`RotatingKVCache` of
window size on sliding layers) for the greedy continuation. It has no MTP; `mtp_forced_*` is
composed here of its own parts: `Step3p5DecoderLayer` with the checkpoint's layer index,
`ZeroCenteredRMSNorm` and `nn.Linear`, chained as the checkpoint was trained for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from golden_shared import CHECKPOINTS, FOLDER, Array, Checkpoint, greedy, save
from mlx import nn
from mlx_lm.models import step3p5
from mlx_lm.models.base import create_attention_mask

from refimpl.checkpoint.synth import random_weights
from refimpl.config_io import to_hf

Weights = dict[str, mx.array]


def model_args(checkpoint: Checkpoint) -> step3p5.ModelArgs:
    """Their arguments from the published spelling of the configuration."""
    return step3p5.ModelArgs.from_dict(to_hf(checkpoint.config))


def load_model(checkpoint: Checkpoint, weights: Weights) -> step3p5.Model:
    """Their model with the checkpoint's trunk, all names and shapes checked by MLX."""
    model = step3p5.Model(model_args(checkpoint))
    model.load_weights(list(model.sanitize(dict(weights)).items()), strict=True)
    return model


def continuation(model: step3p5.Model, prompt: Array) -> Array:
    """Greedy tokens (N,) with their caches."""
    cache = model.make_cache()

    def step(tokens: list[int]) -> Array:
        return np.array(model(mx.array([tokens]), cache)[0, -1])

    return greedy(step, prompt)[0]


def trunk_hidden(model: step3p5.Model, prompt: Array) -> mx.array:
    """(1, T, H): the trunk's output before the final norm, with that norm switched off."""
    norm, model.model.norm = model.model.norm, nn.Identity()
    hidden = model.model(mx.array(prompt)[None])
    model.model.norm = norm
    return hidden


def chain(
    checkpoint: Checkpoint, model: step3p5.Model, weights: Weights, prompt: Array
) -> dict[str, Array]:
    """`mtp_forced_logits_k` (T-1-k, V) and `mtp_forced_hidden_k` (T-1-k, H)."""
    config, args = checkpoint.config, model_args(checkpoint)
    hidden, arrays = trunk_hidden(model, prompt), {}
    for k, spec in enumerate(config.mtp):
        prefix = f"model.layers.{spec.index}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        # Their `sanitize` adds one to every norm weight of the original naming; so here.
        own = {n: w + 1 if "norm" in n else w for n, w in own.items()}
        layer = step3p5.Step3p5DecoderLayer(args, spec.index)
        block = ("self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.")
        layer.load_weights([(n, w) for n, w in own.items() if n.startswith(block)], strict=True)
        norms = {}
        for name in ("enorm", "hnorm", "transformer.shared_head.norm"):
            norms[name] = step3p5.ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
            norms[name].load_weights([("weight", own[f"{name}.weight"])])
        rows = len(prompt) - 1 - k
        embeds = model.model.embed_tokens(mx.array(prompt[k + 1 :])[None])
        both = [norms["enorm"](embeds), norms["hnorm"](hidden[:, :rows])]
        entry = mx.concatenate(both, axis=-1) @ own["eh_proj.weight"].T
        mask = create_attention_mask(entry, None, window_size=args.sliding_window)
        hidden = layer(entry, mask=mask)
        last = norms["transformer.shared_head.norm"](hidden)
        logits = last @ own["transformer.shared_head.output.weight"].T
        arrays[f"mtp_forced_logits_{k}"] = np.array(logits[0])
        arrays[f"mtp_forced_hidden_{k}"] = np.array(hidden[0])
    return arrays


def outputs(checkpoint: Checkpoint) -> dict[str, Array]:
    """All arrays of one golden file."""
    prompt = checkpoint.prompt
    values = random_weights(checkpoint.config, checkpoint.seed)
    weights = {name: mx.array(w) for name, w in values.items()}
    model = load_model(checkpoint, weights)
    arrays = {
        "prompt": prompt,
        "logits": np.array(model(mx.array(prompt)[None])[0]),
        "greedy": continuation(model, prompt),
        **chain(checkpoint, model, weights, prompt),
    }
    for name, values_ in arrays.items():
        assert values_.dtype in (np.int64, np.float32), f"{name} is {values_.dtype}"
    return {k: v for k, v in arrays.items() if not k.startswith("mtp_forced_hidden")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: here)")
    out = parser.parse_args().out
    mx.set_default_device(mx.cpu)
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("mlx-lm", "mlx")]
    facts = {
        "peer_version": ", ".join(versions),
        "command": "python tests/golden/make_mlx.py",
    }
    for checkpoint in CHECKPOINTS.values():
        path = save(checkpoint, "mlx", "float32", outputs(checkpoint), facts, out)
        print(f"{path.name}: {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
