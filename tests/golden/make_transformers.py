"""Golden outputs of transformers' `step3p7` text modules, lifted to float64 and in float32.

Run: python tests/golden/make_transformers.py [--out FOLDER]    (needs torch and transformers)

What runs is transformers' code: `Step3p7TextModel` (embedding, decoder layers, masks, rotary
embedding, router, experts, final norm) with eager attention, and for the MTP layers its
`MtpLayer` around its `Step3p7DecoderLayer`. Ours is only this:

* Weights are renamed (`_trunk_state`, `_mtp_state`): expert gate and up projections are stacked
  into their `gate_up_proj`; norms stay zero-centred, as their norm adds the one.
* float64: their norm, router, softmax and rotary embedding cast to float32 inside. `lifted()`
  makes `torch.float`, `torch.float32` (as these two modules of theirs see them) and
  `Tensor.float` mean float64, and the model is built and run inside it. No operation and no
  order of operations changes, only the width, so the mathematics stays theirs. The float32 run
  uses their code untouched.
* MTP, `mtp_forced_*`: the chain as the checkpoint was trained for: hidden before the final norm,
  `MtpLayer(use_post_norm=False)`, its output passed on before the head's norm, and then the
  layer's own norm and head (`Step3p7RMSNorm`, `nn.Linear`). Their decoder layer is told its place
  in the whole layer list, so it has the sliding layers' head count.
* MTP, `tf_wiring_*`: what their `MtpModel` computes (post-norm hidden states, main head) with
  the one repair it cannot run without: `mtp_per_layer_config` gives its layers the sliding head
  count, which their configuration loses. All rows with `forward_layer`, and the greedy drafts of
  its `forward` after prompt + greedy[0].
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from golden_shared import CHECKPOINTS, FOLDER, Array, Checkpoint, greedy, save
from torch import nn
from transformers import modeling_layers, modeling_rope_utils
from transformers.cache_utils import DynamicCache, MtpCache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.step3p7 import configuration_step3p7, modeling_step3p7

from refimpl.checkpoint.synth import random_weights
from refimpl.config import ModelConfig
from refimpl.config_io import to_hf


class _Wide(ModuleType):
    """The torch module with `float` and `float32` meaning float64."""

    float = torch.float64
    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def lifted(dtype: torch.dtype) -> Iterator[None]:
    """While active and `dtype` is float64, every float32 cast of the modules is a float64 one."""
    if dtype != torch.float64:
        yield
        return
    modules = (modeling_step3p7, modeling_rope_utils)
    narrow = torch.Tensor.float
    for module in modules:
        module.torch = _Wide("torch")
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch
        torch.Tensor.float = narrow


def text_config(config: ModelConfig) -> Any:
    """Their configuration from the published spelling, eager attention."""
    text = configuration_step3p7.Step3p7TextConfig(**_fields(config))
    text._attn_implementation = "eager"
    return text


def _fields(config: ModelConfig) -> dict[str, Any]:
    dropped = ("model_type", "architectures", "torch_dtype", "num_attention_groups")
    fields = {k: v for k, v in to_hf(config).items() if k not in dropped}
    return fields | {"num_key_value_heads": config.num_attention_groups}


def _as_trunk(config: ModelConfig) -> Any:
    """Their configuration with the MTP layers counted as ordinary layers, for the layer class."""
    fields = _fields(config) | {
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": 0,
    }
    text = configuration_step3p7.Step3p7TextConfig(**fields)
    text._attn_implementation = "eager"
    return text


State = dict[str, torch.Tensor]


def _layer_state(weights: dict[str, Array], layer: int) -> State:
    """One decoder layer's tensors under their names."""
    prefix = f"model.layers.{layer}."
    renamed = {
        "moe.gate.weight": "mlp.gate.weight",
        "moe.router_bias": "mlp.gate.e_score_correction_bias",
        "moe.down_proj.weight": "mlp.experts.down_proj",
        **{f"share_expert.{p}_proj.weight": f"mlp.shared_experts.{p}_proj.weight"
           for p in ("gate", "up", "down")},
    }  # fmt: skip
    state: State = {}
    found = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    for name, values in found.items():
        if name.startswith(("moe.gate_proj", "moe.up_proj", "enorm", "hnorm", "eh_proj")):
            continue
        if name.startswith("transformer."):
            continue
        state[renamed.get(name, name)] = torch.from_numpy(values)
    if "moe.gate_proj.weight" in found:
        pair = (found["moe.gate_proj.weight"], found["moe.up_proj.weight"])
        state["mlp.experts.gate_up_proj"] = torch.from_numpy(np.concatenate(pair, axis=1))
    return state


def _trunk_state(config: ModelConfig, weights: dict[str, Array]) -> State:
    state = {
        "embed_tokens.weight": torch.from_numpy(weights["model.embed_tokens.weight"]),
        "norm.weight": torch.from_numpy(weights["model.norm.weight"]),
    }
    for layer in range(config.num_hidden_layers):
        own = _layer_state(weights, layer)
        state |= {f"layers.{layer}.{name}": values for name, values in own.items()}
    return state


def _mtp_state(weights: dict[str, Array], layer: int) -> State:
    """An `MtpLayer`'s tensors without its post norm."""
    prefix = f"model.layers.{layer}."
    state = {f"mtp_block.{n}": v for n, v in _layer_state(weights, layer).items()}
    for name in ("enorm", "hnorm", "eh_proj"):
        state[f"{name}.weight"] = torch.from_numpy(weights[f"{prefix}{name}.weight"])
    return state


class _MainModel(modeling_step3p7.Step3p7PreTrainedModel):
    """Their text model with an output head, in the shape that their `MtpModel` asks for."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = modeling_step3p7.Step3p7TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens


def build(checkpoint: Checkpoint, weights: dict[str, Array], dtype: torch.dtype) -> _MainModel:
    """The main model with the checkpoint's weights, every tensor in `dtype`."""
    main = _MainModel(text_config(checkpoint.config)).eval().to(dtype)
    main.model.load_state_dict(_trunk_state(checkpoint.config, weights), strict=True)
    main.lm_head.load_state_dict({"weight": torch.from_numpy(weights["lm_head.weight"])})
    return main


def trunk(main: _MainModel, config: ModelConfig, prompt: Array) -> dict[str, Array]:
    """Logits and activations of the prompt, recorded by hooks on their modules."""
    seen: dict[str, list[Any]] = {"hidden": [], "attn_out": [], "ffn_out": [], "router": []}
    hooks = []
    for layer in main.model.layers:
        hooks += [
            layer.register_forward_pre_hook(lambda m, a: seen["hidden"].append(a[0])),
            layer.self_attn.register_forward_hook(lambda m, a, o: seen["attn_out"].append(o[0])),
            layer.mlp.register_forward_hook(lambda m, a, o: seen["ffn_out"].append(o)),
        ]
        if hasattr(layer.mlp, "gate"):
            router = layer.mlp.gate
            hooks += [router.register_forward_hook(lambda m, a, o: seen["router"].append((m, *o)))]
    hooks += [main.model.norm.register_forward_pre_hook(lambda m, a: seen["hidden"].append(a[0]))]
    final = main.model(torch.from_numpy(prompt)[None], use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    arrays = {name: _stack(seen[name]) for name in ("hidden", "attn_out", "ffn_out")}
    arrays |= {"final": final[0].numpy(), "logits": main.lm_head(final)[0].numpy()}
    return arrays | _routing(seen["router"], config)


def _stack(rows: list[torch.Tensor]) -> Array:
    return np.stack([r[0].numpy() for r in rows])


def _routing(seen: list[Any], config: ModelConfig) -> dict[str, Array]:
    """Selected experts ascending, their scaled weights, and the margin of the selection."""
    index, weight, margin = [], [], []
    for router, logits, weights, chosen in seen:
        order = chosen.argsort(dim=-1)
        index.append(chosen.gather(1, order).numpy())
        scaled = weights.gather(1, order) * config.moe_router_scaling_factor
        weight.append(scaled.numpy())
        scores = (logits.sigmoid() + router.e_score_correction_bias).sort(-1, descending=True)[0]
        k = config.moe_top_k
        whole = k == config.moe_num_experts
        margin.append(np.ones(len(chosen)) if whole else (scores[:, k - 1] - scores[:, k]).numpy())
    return {
        "moe_layers": np.array(config.moe_layers, dtype=np.int64),
        "route_idx": np.stack(index),
        "route_w": np.stack(weight),
        "route_margin": np.stack(margin).astype(weight[0].dtype),
    }


def continuation(main: _MainModel, prompt: Array) -> dict[str, Array]:
    """Greedy tokens with their cache (sliding layers keep a window of keys)."""
    cache = DynamicCache(config=main.config)

    def step(tokens: list[int]) -> Array:
        out = main.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        return main.lm_head(out.last_hidden_state)[0, -1].numpy()

    tokens, logits = greedy(step, prompt)
    return {"greedy": tokens, "greedy_logits": logits}


class Chain:
    """The MTP layers, chained, each with its own norm and head."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Array], embedding: nn.Module
    ) -> None:
        dtype = embedding.weight.dtype
        self.embedding = embedding
        self.config = _as_trunk(config)
        self.rotary = modeling_step3p7.Step3p7RotaryEmbedding(self.config)
        self.layers, self.norms, self.heads = [], [], []
        for layer in range(config.num_hidden_layers, config.num_layers):
            block = modeling_layers.MtpLayer(
                self.config,
                modeling_step3p7.Step3p7DecoderLayer,
                modeling_step3p7.Step3p7RMSNorm,
                layer,
                use_post_norm=False,
            )
            block.load_state_dict(_mtp_state(weights, layer), strict=True)
            norm = modeling_step3p7.Step3p7RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            own = f"model.layers.{layer}.transformer.shared_head."
            norm.load_state_dict({"weight": torch.from_numpy(weights[own + "norm.weight"])})
            head.load_state_dict({"weight": torch.from_numpy(weights[own + "output.weight"])})
            for module, kept in ((block, self.layers), (norm, self.norms), (head, self.heads)):
                kept.append(module.eval().to(dtype))

    def forced(self, tokens: Array, hidden: torch.Tensor) -> list[tuple[Array, Array]]:
        """Logits (T-1-k, V) and block outputs (T-1-k, H) of each layer k, true tokens only.

        `hidden` (T, H) is the trunk's output before its final norm.
        """
        results = []
        ids = torch.from_numpy(tokens)
        for k, (layer, norm, head) in enumerate(
            zip(self.layers, self.norms, self.heads, strict=True)
        ):
            rows = min(len(tokens) - 1 - k, len(hidden))
            embeds = self.embedding(ids[k + 1 : k + 1 + rows])[None]
            positions = torch.arange(k + 1, k + 1 + rows)[None]
            mask = create_sliding_window_causal_mask(
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=None,
                past_key_values=None,
                position_ids=torch.arange(rows)[None],
            )
            hidden = layer(
                embeds,
                hidden[None, :rows],
                position_embeddings=self.rotary(embeds, positions, "sliding_attention"),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=None,
            )[0]
            results.append((head(norm(hidden)).numpy(), hidden.numpy()))
        return results


def chain(
    main: _MainModel, config: ModelConfig, weights: dict[str, Array], tokens: Array, hidden: Array
) -> dict[str, Array]:
    """`mtp_forced_logits_k` and `mtp_forced_hidden_k`."""
    rows = Chain(config, weights, main.get_input_embeddings())
    arrays: dict[str, Array] = {}
    for k, (logits, output) in enumerate(rows.forced(tokens, torch.from_numpy(hidden))):
        arrays[f"mtp_forced_logits_{k}"] = logits
        arrays[f"mtp_forced_hidden_{k}"] = output
    return arrays


def own_wiring(
    main: _MainModel, config: ModelConfig, weights: dict[str, Array], prompt: Array, first: int
) -> dict[str, Array]:
    """transformers' `MtpModel` as it is: teacher-forced rows and the drafts after `first`."""
    sliding = {"num_attention_heads": config.sliding_attention_heads}
    depth = config.num_nextn_predict_layers
    main.config.mtp_per_layer_config = {k: dict(sliding) for k in range(depth)}
    model = modeling_layers.MtpModel(main, depth).eval()
    for k, layer in enumerate(model.layers):
        at = config.num_hidden_layers + k
        name = f"model.layers.{at}.transformer.shared_head.norm.weight"
        state = _mtp_state(weights, at) | {"post_norm.weight": torch.from_numpy(weights[name])}
        layer.to(main.dtype).load_state_dict(state, strict=True)
    given = main.model(  # `hidden_states[-1]` is what their candidate generator hands on
        torch.from_numpy(prompt)[None], use_cache=False, output_hidden_states=True
    ).hidden_states[-1]
    arrays: dict[str, Array] = {}
    cache, hidden = MtpCache(config=main.config.get_mtp_config()), given
    for k in range(depth):
        rows = len(prompt) - 1 - k
        ids = torch.from_numpy(prompt[k + 1 :])[None]
        positions = torch.arange(k + 1, len(prompt))[None]
        hidden = model.forward_layer(k, hidden[:, :rows], positions, cache, input_ids=ids)
        arrays[f"tf_wiring_forced_logits_{k}"] = model._project_to_logits(hidden)[0].numpy()
    ids = torch.from_numpy(np.append(prompt[1:], first))[None]
    drafts, logits, _ = model(
        input_ids=ids,
        last_hidden_states=given,
        attention_mask=None,
        position_ids=torch.arange(1, len(prompt) + 1)[None],
        mtp_cache=MtpCache(config=main.config.get_mtp_config()),
    )
    arrays["tf_wiring_draft_chain"] = drafts[0].numpy()
    arrays["tf_wiring_draft_chain_logits"] = logits[0].numpy()
    return arrays


def drafts(
    main: _MainModel, config: ModelConfig, weights: dict[str, Array], prompt: Array, first: int
) -> dict[str, Array]:
    """`draft_chain`, `draft_chain_logits`: one draft per MTP layer after prompt + `first`.

    Each draft is the teacher-forced chain's last row on the tokens drafted so far, which is what
    drafting computes: the row of layer k sees the same tokens either way.
    """
    rows = Chain(config, weights, main.get_input_embeddings())
    hidden = torch.from_numpy(trunk(main, config, prompt)["hidden"][-1])
    tokens, logits = [*prompt.tolist(), first], []
    for k in range(config.num_nextn_predict_layers):
        row = rows.forced(np.array(tokens), hidden)[k][0][len(prompt) - 1]
        logits.append(row)
        tokens.append(int(row.argmax()))
    return {
        "draft_chain": np.array(tokens[len(prompt) + 1 :], dtype=np.int64),
        "draft_chain_logits": np.stack(logits),
    }


def outputs(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Array]:
    """All arrays of one golden file."""
    config, prompt = checkpoint.config, checkpoint.prompt
    weights = random_weights(config, checkpoint.seed)
    with torch.no_grad(), lifted(dtype):
        main = build(checkpoint, weights, dtype)
        arrays = {"prompt": prompt, **trunk(main, config, prompt), **continuation(main, prompt)}
        first = int(arrays["greedy"][0])
        arrays |= chain(main, config, weights, prompt, arrays["hidden"][-1])
        arrays |= drafts(main, config, weights, prompt, first)
        arrays |= own_wiring(main, config, weights, prompt, first)
    wanted = np.float64 if dtype == torch.float64 else np.float32
    for name, values in arrays.items():
        assert values.dtype in (np.int64, wanted), f"{name} is {values.dtype}, a cast was missed"
    return arrays


LARGE = ("attn_out", "ffn_out")  # kept for the first checkpoint only, to keep the files small
SMALL = ("prompt", "logits", "greedy", "route_idx", "moe_layers")


def kept(checkpoint: str, dtype: str, arrays: dict[str, Array]) -> dict[str, Array]:
    """What goes into the file: float64 holds everything but their wiring, float32 the rest."""
    if dtype == "float32":
        return {k: v for k, v in arrays.items() if k in SMALL or k.startswith("tf_wiring_")}
    small = {k: v for k, v in arrays.items() if not k.startswith("tf_wiring_")}
    return {k: v for k, v in small.items() if checkpoint == "tiny_a" or k not in LARGE}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder to write to (default: here)"
    )
    out = parser.parse_args().out
    torch.set_num_threads(1)
    facts = {
        "peer_version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "command": "python tests/golden/make_transformers.py",
    }
    for checkpoint in CHECKPOINTS.values():
        for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
            arrays = kept(checkpoint.name, name, outputs(checkpoint, dtype))
            path = save(checkpoint, "transformers", name, arrays, facts, out)
            print(f"{path.name}: {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
