"""The architecture as a trainable PyTorch model: parameters by their published names, and losses.

Master weights are fp32 tensors under the names of the published checkpoint layout.  The forward
pass reads *compute copies*: the masters rounded to bf16 (exactly what the export will hold; with
`quantised=True` also through Q4_0 blocks), with matrices that share an input fused into one.
Gradients arrive on the copies and are handed back per master name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import torch_ops as ops
from .torch_ops import BF16, AttentionShape, compiled

MTP = 3
Params = dict[str, Tensor]

attention = compiled(ops.attention)
dense = compiled(ops.dense)
route = compiled(ops.route)
choose = compiled(ops.choose)
shared = compiled(ops.shared)
head_loss = compiled(ops.head_loss)
mtp_input = compiled(ops.mtp_input)


@dataclass(frozen=True)
class Fused:
    """A compute copy: masters concatenated along `axis`, as bf16 or (rounded to bf16) fp32."""

    masters: tuple[str, ...]
    axis: int = 0
    fp32: bool = False


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dictionary."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def is_full(config: dict[str, Any], layer: int) -> bool:
    """True for full attention, False for sliding."""
    return bool(config["layer_types"][layer] == "full_attention")


def moe_layers(config: dict[str, Any]) -> set[int]:
    """Indices of the mixture-of-experts layers."""
    return {int(x) for x in config["moe_layers_enum"].split(",")}


def _attention_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    d, dim, g = config["hidden_size"], config["head_dim"], config["num_attention_groups"]
    sliding = config["attention_other_setting"]["num_attention_heads"]
    n_q = config["num_attention_heads"] if is_full(config, layer) else sliding
    return {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (n_q * dim, d),
        "self_attn.k_proj.weight": (g * dim, d),
        "self_attn.v_proj.weight": (g * dim, d),
        "self_attn.g_proj.weight": (n_q, d),
        "self_attn.o_proj.weight": (d, n_q * dim),
        "self_attn.q_norm.weight": (dim,),
        "self_attn.k_norm.weight": (dim,),
    }


def _swiglu_shapes(prefix: str, width: int, d: int, *lead: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (*lead, width, d),
        f"{prefix}up_proj.weight": (*lead, width, d),
        f"{prefix}down_proj.weight": (*lead, d, width),
    }


def shapes(config: dict[str, Any], mtp: int = MTP) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with `mtp` MTP layers: published name -> shape."""
    d, vocab, n = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    experts = config["moe_num_experts"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d)}
    for layer in range(n + mtp):
        at = f"model.layers.{layer}."
        own = _attention_shapes(config, layer)
        if layer in moe_layers(config):
            own["moe.gate.weight"] = (experts, d)
            own["moe.router_bias"] = (experts,)
            own |= _swiglu_shapes("moe.", config["moe_intermediate_size"], d, experts)
            own |= _swiglu_shapes("share_expert.", config["share_expert_dim"], d)
        else:
            own |= _swiglu_shapes("mlp.", config["intermediate_size"], d)
        if layer >= n:
            own |= {"enorm.weight": (d,), "hnorm.weight": (d,), "eh_proj.weight": (d, 2 * d)}
            own["transformer.shared_head.norm.weight"] = (d,)
            own["transformer.shared_head.output.weight"] = (vocab, d)
        out |= {at + name: shape for name, shape in own.items()}
    out["model.norm.weight"] = (d,)
    out["lm_head.weight"] = (vocab, d)
    return out


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """True for what the int4 file stores in blocks: all matrices but the routers."""
    return len(shape) > 1 and not name.endswith("moe.gate.weight")


def initial(config: dict[str, Any], seed: int, embedding_std: float, mtp: int = 1) -> Params:
    """Random fp32 masters.  Gates and norms start at 0, output projections are scaled down."""
    generator = torch.Generator().manual_seed(seed)
    out: Params = {}
    for name, shape in shapes(config, mtp).items():
        if len(shape) == 1 or name.endswith("g_proj.weight"):
            out[name] = torch.zeros(shape)
            continue
        std = embedding_std if "embed_tokens" in name else 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config["num_hidden_layers"])
        out[name] = torch.randn(shape, generator=generator) * std
    return out


def fuse_plan(config: dict[str, Any], names: set[str]) -> dict[str, Fused]:
    """Compute-copy name -> Fused, covering every master in `names` except router biases."""
    plan: dict[str, Fused] = {}
    done: set[str] = set()
    groups = (
        ("self_attn.qkvg", tuple(f"self_attn.{x}_proj.weight" for x in "qkvg"), 0),
        ("mlp.gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0),
        ("share_expert.gate_up", tuple(f"share_expert.{x}_proj.weight" for x in ("gate", "up")), 0),
        ("moe.gate_up", ("moe.gate_proj.weight", "moe.up_proj.weight"), 1),
    )
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    for layer in sorted(layers, key=int):
        at = f"model.layers.{layer}."
        for fused, parts, axis in groups:
            masters = tuple(at + part for part in parts)
            if masters[0] in names:
                plan[at + fused] = Fused(masters, axis)
                done |= set(masters)
    for name in sorted(names - done):
        if not name.endswith("router_bias"):
            fp32 = name.endswith(("norm.weight", "moe.gate.weight", "embed_tokens.weight"))
            plan[name] = Fused((name,), 0, fp32)
    return plan


def _fake_q4_0(w: Tensor) -> Tensor:
    """(..., n) fp32 -> the values that Q4_0 would store: blocks of 32, fp16 scale, 16 levels."""
    x = w.reshape(-1, 32)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    extreme = torch.where(-low >= high, low, high)  # the entry of largest magnitude, with its sign
    d = extreme / -8.0
    inverse = torch.where(d == 0, 0.0, 1.0 / d)
    q = (x * inverse + 8.5).clamp(0.0, 15.0).floor()
    return ((q - 8.0) * d.half().float()).view(w.shape)


fake_q4_0 = compiled(_fake_q4_0, dynamic=True)


def rope_tables(config: dict[str, Any], layer: int, t: int) -> tuple[Tensor, Tensor]:
    """cos and sin (t, R/2) fp32 of a layer, with the llama3 scaling where it applies."""
    rotated = int(config["head_dim"] * config["partial_rotary_factors"][layer])
    theta = config["rope_theta"][layer]
    f = theta ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    if config["layer_types"][layer] in config["yarn_only_types"]:
        s = config["rope_scaling"]
        ratio = s["original_max_position_embeddings"] * f / (2 * math.pi)  # length / wavelength
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        share = ((ratio - low) / (high - low)).clamp(0.0, 1.0)
        f = share * f + (1 - share) * f / s["factor"]
    angle = torch.arange(t, dtype=torch.float64)[:, None] * f
    return angle.cos().float(), angle.sin().float()


def sliding_mask(t: int, w: int) -> Tensor:
    """(t/w, 1, w, 2w) bf16: query i of a block sees the w newest keys, itself included."""
    query, key = torch.arange(w)[:, None] + w, torch.arange(2 * w)[None, :]
    seen = (key <= query) & (key > query - w)
    seen = seen.expand(t // w, w, 2 * w).clone()
    seen[0] &= key >= w  # nothing lies before the first block
    return torch.where(seen, 0.0, -1e30).to(BF16).unsqueeze(1)


def causal_mask(t: int) -> Tensor:
    """(t, t) bf16."""
    return torch.triu(torch.full((t, t), -1e30), 1).to(BF16)


class Model:
    """Masters, compute copies and the forward pass for windows of one length."""

    def __init__(self, config: dict[str, Any], masters: Params, length: int) -> None:
        self.config, self.masters, self.length = config, masters, length
        self.plan = fuse_plan(config, set(masters))
        self.mtp_layers = sum(name.endswith("eh_proj.weight") for name in masters)
        self.copies: Params = {}
        self.trained: set[str] = set(self.plan)
        self.quantised = False
        n = config["num_hidden_layers"]
        self.rope = [rope_tables(config, i, length) for i in range(n + MTP)]
        w = config["sliding_window"]
        self.masks = (sliding_mask(length, w), causal_mask(length))
        self.counts: list[Tensor] = []
        self.refresh()

    # -- compute copies ---------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the compute copies up to date with the masters; drop their gradients."""
        with torch.no_grad():
            for name, fused in self.plan.items():
                if name in self.copies and name not in self.trained:
                    continue
                parts = [self._rounded(m) for m in fused.masters]
                value = parts[0] if len(parts) == 1 else torch.cat(parts, fused.axis)
                value = value.float() if fused.fp32 else value
                if name in self.copies:
                    self.copies[name].copy_(value)
                else:
                    self.copies[name] = value.clone()
        for name, copy in self.copies.items():
            copy.requires_grad_(name in self.trained)
            copy.grad = None

    def _rounded(self, name: str) -> Tensor:
        master = self.masters[name]
        if self.quantised and is_matrix(name, tuple(master.shape)):
            return fake_q4_0(master.to(BF16).float()).to(BF16)
        return master.to(BF16)

    def gradients(self) -> Params:
        """Master name -> gradient (a view of the copy's)."""
        out: Params = {}
        for name, fused in self.plan.items():
            grad = self.copies[name].grad
            if grad is None:
                continue
            sizes = [self.masters[m].shape[fused.axis] for m in fused.masters]
            out |= dict(zip(fused.masters, grad.split(sizes, fused.axis), strict=True))
        return out

    # -- forward ----------------------------------------------------------------------------

    def _attention(self, h: Tensor, layer: int) -> Tensor:
        c, full = self.config, is_full(self.config, layer)
        p = {k: self.copies[f"model.layers.{layer}.{k}"] for k in _ATTENTION}
        other = c["attention_other_setting"]["num_attention_heads"]
        shape = AttentionShape(
            c["num_attention_heads"] if full else other,
            c["num_attention_groups"],
            c["head_dim"],
            0 if full else c["sliding_window"],
        )
        cos, sin = self.rope[layer]
        return attention(h, *p.values(), cos, sin, self.masks[full], shape)

    def _dense(self, h: Tensor, layer: int) -> Tensor:
        at, limit = f"model.layers.{layer}.", self.config["swiglu_limits_shared"][layer]
        names = ("post_attention_layernorm.weight", "mlp.gate_up", "mlp.down_proj.weight")
        return dense(h, *(self.copies[at + n] for n in names), limit)

    def _moe(self, h: Tensor, layer: int) -> Tensor:
        at, c = f"model.layers.{layer}.", self.config
        get = self.copies
        norm, router = "post_attention_layernorm.weight", "moe.gate.weight"
        x, scores = route(h, get[at + norm], get[at + router])
        bias = self.masters[at + "moe.router_bias"]
        experts, weights = choose(scores, bias, c["moe_top_k"], c["moe_router_scaling_factor"])
        plan = ops.dispatch(experts, c["moe_num_experts"])
        self.counts.append(plan.counts)
        limit = c["swiglu_limits"][layer]
        gate_up, down = get[at + "moe.gate_up"], get[at + "moe.down_proj.weight"]
        y = ops.Experts.apply(x, weights, gate_up, down, plan, limit)
        gate_up, down = get[at + "share_expert.gate_up"], get[at + "share_expert.down_proj.weight"]
        return shared(h, x, y, gate_up, down, c["swiglu_limits_shared"][layer])

    def trunk(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) int64 -> h (B,T,d), the hidden state before the final norm."""
        self.counts = []
        h = self.embed(tokens)
        for layer in range(self.config["num_hidden_layers"]):
            h = self._attention(h, layer)
            moe = layer in moe_layers(self.config)
            h = self._moe(h, layer) if moe else self._dense(h, layer)
        return h

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) -> (B,T,d) fp32 rows of the table."""
        return torch.nn.functional.embedding(tokens, self.copies["model.embed_tokens.weight"])

    def head(self, h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Trunk head: h (B,T,d), target (B,T) -> loss (nats/token) and logits (B*T,V)."""
        get = self.copies
        return head_loss(h, get["model.norm.weight"], get["lm_head.weight"], target)

    def mtp(self, u: Tensor, tokens: Tensor, k: int) -> Tensor:
        """MTP layer k: u (B,T,d), tokens (B,T) = x[t+1+k] -> m (B,T,d) before its own norm."""
        layer = self.config["num_hidden_layers"] + k
        at, get = f"model.layers.{layer}.", self.copies
        names = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
        r = mtp_input(self.embed(tokens), u, *(get[at + n] for n in names))
        return self._dense(self._attention(r, layer), layer)

    def mtp_head(self, m: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """MTP head k: m (B,T,d), target (B,T) = x[t+2+k] -> loss and logits."""
        at = f"model.layers.{self.config['num_hidden_layers'] + k}.transformer.shared_head."
        norm, head = self.copies[at + "norm.weight"], self.copies[at + "output.weight"]
        return head_loss(m, norm, head, target)

    def losses(self, window: Tensor, mtp: int) -> list[Tensor]:
        """window (B, T+1+MTP) int64 -> [trunk loss, MTP-1 loss, ...], each in nats/token."""
        t = self.length
        h = self.trunk(window[:, :t])
        out = [self.head(h, window[:, 1 : t + 1])[0]]
        u = h
        for k in range(mtp):
            u = self.mtp(u, window[:, 1 + k : t + 1 + k], k)
            out.append(self.mtp_head(u, window[:, 2 + k : t + 2 + k], k)[0])
        return out


_ATTENTION = (
    "input_layernorm.weight",
    "self_attn.qkvg",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.o_proj.weight",
)
