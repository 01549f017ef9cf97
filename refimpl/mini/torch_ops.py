"""The costly pieces of the trainable model: attention, feed-forward, experts, heads.

Plain functions over tensors, written so that one compiled graph serves every layer of a kind.
Matrix products run in bf16, everything between them in fp32; the residual stream h is fp32.

Axes: B windows, T positions, N = B*T rows, d hidden, D head dim, G KV heads, r query heads per KV
head, W sliding window, E experts, k chosen experts, f expert width, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

BF16 = torch.bfloat16
PAD = 128  # rows; expert groups are padded so that few matmul shapes ever occur
EPS = 1e-5

F = TypeVar("F")


def compiled(function: F, dynamic: bool = False) -> F:
    """`torch.compile` (fixed shapes by default), unless MINI_EAGER is set (tests, debugging)."""
    if os.environ.get("MINI_EAGER"):
        return function
    return torch.compile(function, dynamic=dynamic)  # type: ignore[call-overload,no-any-return]


def rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """(..., n) -> (..., n) fp32: zero-centred RMSNorm, multiplies by 1 + weight."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1.0 + weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, heads..., D) fp32 -> same: half-split RoPE on the first 2*cos.shape[-1] lanes."""
    half = cos.shape[-1]
    shape = (1, cos.shape[0]) + (1,) * (x.ndim - 3) + (half,)
    cos, sin = cos.view(shape), sin.view(shape)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class MaskedSoftmax(Function):
    """softmax(scores * scale + mask) over the last axis, bf16 in and out, fp32 inside."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, scale: float) -> Tensor:
        """scores (..., Q, K) bf16, mask broadcastable bf16 (0 or -inf-like)."""
        p = torch.softmax(scores.float() * scale + mask.float(), -1).to(BF16)
        ctx.save_for_backward(p)
        ctx.scale = scale
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the scores; the mask has none."""
        (saved,) = ctx.saved_tensors
        p, g = saved.float(), grads[0].float()
        return ((g - (p * g).sum(-1, keepdim=True)) * p * ctx.scale).to(BF16), None, None


@dataclass(frozen=True)
class AttentionShape:
    """What one attention layer needs besides tensors; `window` 0 means full attention."""

    n_q: int
    n_kv: int
    head_dim: int
    window: int
    chunk: int = 256  # query rows at a time in full attention: skips keys of the future


def _sliding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, s: AttentionShape) -> Tensor:
    """q (B,T,G,r,D), k and v (B,T,G,D), mask (T/W, 1, W, 2W) -> (B,T,G,r,D)."""
    b, t, g, r, d = q.shape
    w = s.window
    n = t // w

    def two_blocks(x: Tensor) -> Tensor:  # (B,T,G,D) -> (B*G*n, 2W, D): previous and own block
        x = x.view(b, n, w, g, d).permute(0, 3, 1, 2, 4)
        previous = torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, :-1]), 2)
        return torch.cat((previous, x), 3).reshape(b * g * n, 2 * w, d)

    qb = q.view(b, n, w, g, r, d).permute(0, 3, 1, 4, 2, 5).reshape(b * g * n, r * w, d)
    scores = torch.bmm(qb, two_blocks(k).transpose(1, 2))  # (B*G*n, r*W, 2W)
    p = MaskedSoftmax.apply(scores.view(b * g, n, r, w, 2 * w), mask, d**-0.5)
    y = torch.bmm(p.view(b * g * n, r * w, 2 * w), two_blocks(v))
    return y.view(b, g, n, r, w, d).permute(0, 2, 4, 1, 3, 5).reshape(b, t, g, r, d)


def _full(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, s: AttentionShape) -> Tensor:
    """As `_sliding`, for causal attention over everything; mask (T, T)."""
    b, t, g, r, d = q.shape
    kb = k.permute(0, 2, 1, 3).reshape(b * g, t, d)
    vb = v.permute(0, 2, 1, 3).reshape(b * g, t, d)
    qb = q.permute(0, 2, 3, 1, 4)  # (B,G,r,T,D)
    parts = []
    for start in range(0, t, s.chunk):
        end = min(start + s.chunk, t)
        n = end - start
        rows = qb[:, :, :, start:end].reshape(b * g, r * n, d)
        scores = torch.bmm(rows, kb[:, :end].transpose(1, 2))
        p = MaskedSoftmax.apply(scores.view(b * g, r, n, end), mask[start:end, :end], d**-0.5)
        y = torch.bmm(p.view(b * g, r * n, end), vb[:, :end])
        parts.append(y.view(b, g, r, n, d))
    return torch.cat(parts, 3).permute(0, 3, 1, 2, 4)


def attention(
    h: Tensor,
    norm: Tensor,
    qkvg: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    o_proj: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    s: AttentionShape,
) -> Tensor:
    """h (B,T,d) fp32 -> h + attention(norm(h)); qkvg (Hq*D + 2*G*D + Hq, d) is one matrix."""
    b, t, d = h.shape
    r = s.n_q // s.n_kv
    a = rms(h, norm).to(BF16).view(b * t, d)
    z = (a @ qkvg.t()).view(b, t, -1)
    widths = [s.n_q * s.head_dim, s.n_kv * s.head_dim, s.n_kv * s.head_dim, s.n_q]
    q, k, v, gate = z.split(widths, -1)
    q = rms(q.reshape(b, t, s.n_kv, r, s.head_dim), q_norm)
    k = rms(k.reshape(b, t, s.n_kv, s.head_dim), k_norm)
    q, k = rotate(q, cos, sin).to(BF16), rotate(k, cos, sin).to(BF16)
    v = v.reshape(b, t, s.n_kv, s.head_dim)
    y = (_sliding if s.window else _full)(q, k, v, mask, s)
    open_ = torch.sigmoid(gate.float()).view(b, t, s.n_kv, r, 1)
    y = (y.float() * open_).to(BF16).reshape(b * t, s.n_q * s.head_dim)
    return h + (y @ o_proj.t()).float().view(b, t, d)


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """(N, 2f) -> (N, f) fp32: min(silu(gate), L) * clip(up, -L, L); L = 0 means no limit."""
    gate, up = gate_up.float().chunk(2, -1)
    gate = torch.nn.functional.silu(gate)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * up


def dense(h: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """h (B,T,d) -> h + down(swiglu(norm(h))); gate_up (2f, d), down (d, f)."""
    b, t, d = h.shape
    x = rms(h, norm).to(BF16).view(b * t, d)
    y = swiglu(x @ gate_up.t(), limit).to(BF16) @ down.t()
    return h + y.float().view(b, t, d)


def route(h: Tensor, norm: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """h (B,T,d) -> normed rows (N,d) bf16 and fp32 sigmoid scores (N,E)."""
    x = rms(h, norm).view(-1, h.shape[-1])
    x = x.to(BF16)
    return x, torch.sigmoid(x.float() @ router.t())


def choose(scores: Tensor, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Scores (N,E) -> experts (N,k) int64 by score + bias, and weights that sum to `scaling`."""
    experts = torch.topk(scores.detach() + bias, k, dim=-1).indices
    chosen = scores.gather(1, experts)
    return experts, chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scaling


def shared(
    h: Tensor, x: Tensor, routed: Tensor, gate_up: Tensor, down: Tensor, lim: float
) -> Tensor:
    """h + routed + shared expert: x (N,d) bf16, routed (N,d) fp32."""
    y = swiglu(x @ gate_up.t(), lim).to(BF16) @ down.t()
    return h + (routed + y.float()).view(h.shape)


# ---- routed experts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Dispatch:
    """Where each (row, choice) goes: groups by expert, each padded to a multiple of PAD rows."""

    source: Tensor  # (R,) int64 row of x for every buffer row (0 in padding)
    target: Tensor  # (N, k) int64 buffer row of every choice
    groups: list[tuple[int, int, int]]  # (expert, first buffer row, end)
    counts: Tensor  # (E,) rows per expert


def dispatch(experts: Tensor, n_experts: int) -> Dispatch:
    """experts (N,k) -> Dispatch over a buffer of fixed size R = N*k + PAD*E."""
    n, k = experts.shape
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=n_experts)
    padded = (counts + PAD - 1) // PAD * PAD
    first = torch.cumsum(padded, 0) - padded
    plain = torch.cumsum(counts, 0) - counts
    place = torch.arange(n * k) + (first - plain)[flat[order]]
    target = torch.empty_like(flat)
    target[order] = place
    source = torch.zeros(n * k + PAD * n_experts, dtype=torch.int64)
    source[place] = order // k
    groups = [
        (e, a, a + p)
        for e, (a, p) in enumerate(zip(first.tolist(), padded.tolist(), strict=True))
        if p
    ]
    return Dispatch(source, target.view(n, k), groups, counts)


def _gather_sum(y: Tensor, target: Tensor) -> Tensor:
    """y (R,d) bf16, target (N,k) -> (N,d) fp32: sum over the k gathered rows."""
    return y[target].float().sum(1)


def _expert_act(gate_up: Tensor, weight: Tensor, limit: float) -> Tensor:
    """(R,2f) and routing weight (R,) -> weighted activation (R,f) bf16."""
    return (swiglu(gate_up, limit) * weight[:, None]).to(BF16)


def _expert_act_backward(
    gate_up: Tensor, weight: Tensor, grad: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient (R,2f) of gate_up, (R,) of the weight, and the weighted activation again."""
    gate, up = gate_up.float().chunk(2, -1)
    sig = torch.sigmoid(gate)
    silu = gate * sig
    slope = sig * (1.0 + gate * (1.0 - sig))
    g = grad.float()
    if limit:
        slope = torch.where(silu <= limit, slope, 0.0)
        inside = (up.abs() <= limit).float()
        silu, up = silu.clamp(max=limit), up.clamp(-limit, limit)
    else:
        inside = torch.ones_like(up)
    w = weight[:, None]
    act = silu * up
    grad_gu = torch.cat((g * w * up * slope, g * w * silu * inside), -1).to(BF16)
    return grad_gu, (g * act).sum(-1), (act * w).to(BF16)


gather_sum = compiled(_gather_sum)
expert_act = compiled(_expert_act)
expert_act_backward = compiled(_expert_act_backward)


class Experts(Function):
    """All routed experts of a layer at once; gathers in both directions, no scatter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, gu: Tensor, down: Tensor, plan: Dispatch, limit: float
    ) -> Tensor:
        """x (N,d) bf16, weights (N,k), gu (E,2f,d), down (E,d,f) -> (N,d) fp32."""
        rows = len(plan.source)
        xg = x.index_select(0, plan.source)
        wg = torch.zeros(rows).index_copy_(0, plan.target.view(-1), weights.reshape(-1))
        z = x.new_empty(rows, gu.shape[1])
        y = x.new_empty(rows, x.shape[1])
        end = plan.groups[-1][2]
        z[end:].zero_()
        for e, a, b in plan.groups:
            torch.mm(xg[a:b], gu[e].t(), out=z[a:b])
        act = expert_act(z, wg, limit)
        for e, a, b in plan.groups:
            torch.mm(act[a:b], down[e].t(), out=y[a:b])
        ctx.save_for_backward(x, wg, z, gu, down)
        ctx.plan, ctx.limit = plan, limit
        return gather_sum(y, plan.target)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weights, gu, down; padding rows carry weight 0 and add nothing."""
        x, wg, z, gu, down = ctx.saved_tensors
        plan, limit = ctx.plan, ctx.limit
        xg = x.index_select(0, plan.source)
        gy = grads[0].to(BF16).index_select(0, plan.source)
        ga = z.new_empty(len(xg), down.shape[2])
        ga[plan.groups[-1][2] :].zero_()
        for e, a, b in plan.groups:
            torch.mm(gy[a:b], down[e], out=ga[a:b])
        gz, gw, act = expert_act_backward(z, wg, ga, limit)
        gx = torch.empty_like(xg)
        g_gu, g_down = torch.zeros_like(gu), torch.zeros_like(down)
        for e, a, b in plan.groups:
            torch.mm(gz[a:b], gu[e], out=gx[a:b])
            torch.mm(gz[a:b].t(), xg[a:b], out=g_gu[e])
            torch.mm(gy[a:b].t(), act[a:b], out=g_down[e])
        g_x = gather_sum(gx, plan.target).to(BF16)
        return g_x, gw[plan.target], g_gu, g_down, None, None


# ---- embedding, heads, MTP input ------------------------------------------------------------


class HeadLoss(Function):
    """Mean cross entropy of x (N,d) bf16 against W (V,d); saves bf16 logits only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """-> mean loss, and the logits (N,V) bf16, without gradient, for evaluation."""
        logits = x @ head.t()
        z = logits.float()
        lse = torch.logsumexp(z, -1)
        loss = (lse - z.gather(1, target[:, None])[:, 0]).mean()
        ctx.save_for_backward(x, head, target, logits, lse)
        ctx.mark_non_differentiable(logits)
        return loss, logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Softmax minus one-hot, times the incoming scalar / N."""
        x, head, target, logits, lse = ctx.saved_tensors
        p = torch.exp(logits.float() - lse[:, None])
        hot = torch.arange(p.shape[1])[None, :] == target[:, None]
        g = ((p - hot.float()) * (grads[0] / p.shape[0])).to(BF16)
        return g @ head, g.t() @ x, None


def head_loss(h: Tensor, norm: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """h (B,T,d), target (B,T) -> mean cross entropy of norm(h) @ head^T, and the logits."""
    x = rms(h, norm).to(BF16).view(-1, h.shape[-1])
    return HeadLoss.apply(x, head, target.reshape(-1))  # type: ignore[no-any-return]


def mtp_input(e: Tensor, h: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor) -> Tensor:
    """e, h (B,T,d) -> (B,T,d): eh_proj of concat(enorm(e), hnorm(h)), embedding half first."""
    c = torch.cat((rms(e, enorm), rms(h, hnorm)), -1).to(BF16)
    return (c.view(-1, c.shape[-1]) @ eh_proj.t()).float().view(h.shape)
