"""Muon for the hidden matrices, AdamW for the rest, both over plain dictionaries of tensors.

State and parameters are fp32.  Matrices of equal shape (transposed to rows <= columns) are
orthogonalised together in one batch.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .torch_ops import BF16

Params = dict[str, Tensor]

NS_STEPS = 5
NS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz coefficients
MUON_DECAY = 0.1
MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)


def orthogonal(x: Tensor) -> Tensor:
    """(n, r, c) with r <= c, bf16 -> approximately the nearest semi-orthogonal matrices."""
    a, b, c = NS
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(NS_STEPS):
        gram = torch.bmm(x, x.transpose(1, 2))
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def adam_rate(name: str) -> float | None:
    """Learning rate (relative to the schedule) of what AdamW trains; None for Muon's matrices."""
    if name.endswith("moe.gate.weight"):
        return 5e-4
    if "embed_tokens" in name:
        return 2e-2  # its rows have RMS 1 and each is seen seldom
    if name.endswith(("lm_head.weight", "shared_head.output.weight")):
        return 4e-3
    if name.endswith(("norm.weight", "g_proj.weight")):
        return 2e-3
    return None


class Optimiser:
    """Both methods at once; `state` is a flat dictionary that can be saved as it is."""

    def __init__(self, params: Params, muon_rate: float) -> None:
        """`params` are updated in place; `muon_rate` is Muon's peak rate."""
        self.params, self.muon_rate = params, muon_rate
        self.steps = 0
        self.adam: dict[str, float] = {}
        self.groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        self.state: Params = {}
        for name, p in params.items():
            rate = adam_rate(name)
            self.state[f"m.{name}"] = torch.zeros_like(p)
            if rate is not None:
                self.adam[name] = rate
                self.state[f"v.{name}"] = torch.zeros_like(p)
            else:
                small, large = sorted(p.shape[-2:])
                self.groups[small, large].append(name)

    @torch.no_grad()
    def step(self, grads: Params, scale: float, factor: float) -> None:
        """Apply gradients times `scale` (clipping) at `factor` of the peak learning rates."""
        self.steps += 1
        names = [n for n in self.adam if n in grads]
        if names:
            self._adam(names, grads, scale, factor)
        for shape, group in self.groups.items():
            self._muon(shape, group, grads, scale, factor)

    def _adam(self, names: list[str], grads: Params, scale: float, factor: float) -> None:
        b1, b2 = ADAM_BETAS
        fix1, fix2 = 1 - b1**self.steps, 1 - b2**self.steps
        g = torch._foreach_mul([grads[n].float() for n in names], scale)
        m = [self.state[f"m.{n}"] for n in names]
        v = [self.state[f"v.{n}"] for n in names]
        torch._foreach_lerp_(m, g, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)
        root = torch._foreach_sqrt(torch._foreach_div(v, fix2))
        torch._foreach_add_(root, 1e-8)
        step = torch._foreach_div(m, root)
        torch._foreach_mul_(step, [-self.adam[n] * factor / fix1 for n in names])
        torch._foreach_add_([self.params[n] for n in names], step)

    def _muon(
        self, shape: tuple[int, int], group: list[str], grads: Params, scale: float, factor: float
    ) -> None:
        rate = self.muon_rate * factor
        updates, present = [], [n for n in group if n in grads]
        for name in present:
            g = grads[name].float().mul_(scale) if scale != 1.0 else grads[name].float()
            m = self.state[f"m.{name}"].lerp_(g, 1 - MOMENTUM)
            u = torch.lerp(g, m, MOMENTUM).to(BF16)
            u = u.transpose(-2, -1) if u.shape[-2] > u.shape[-1] else u
            updates.append(u.reshape(-1, *shape))
        if not updates:
            return
        sizes = [len(u) for u in updates]
        parts = orthogonal(torch.cat(updates)).split(sizes)
        for name, u in zip(present, parts, strict=True):
            p = self.params[name]
            u = u.transpose(-2, -1) if p.shape[-2] > p.shape[-1] else u
            p.mul_(1 - rate * MUON_DECAY)
            p.add_(u.reshape(p.shape).float(), alpha=-rate * 0.2 * max(shape) ** 0.5)
