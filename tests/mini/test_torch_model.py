"""The trainable model's costly pieces against plain fp32 formulas (only where torch is there)."""

import os
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("MINI_EAGER", "1")  # compiling would take longer than the tests
torch: Any = pytest.importorskip("torch")

from refimpl.mini import data, optim, torch_model, torch_ops, train, train_mtp  # noqa: E402


def _relative(a: Any, b: Any) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


def _leaves(*tensors: Any) -> list[Any]:
    return [t.detach().float().clone().requires_grad_() for t in tensors]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_experts_equal_the_naive_sum_over_choices() -> None:
    n, d, e, k, f = 256, 64, 8, 2, 32
    x = torch.randn(n, d).bfloat16().requires_grad_()
    chosen, weights = torch_ops.choose(torch.rand(n, e), torch.zeros(e), k, 2.0)
    assert torch.allclose(weights.sum(1), torch.full((n,), 2.0))
    weights = weights.clone().requires_grad_()
    gu = (torch.randn(e, 2 * f, d) * 0.1).bfloat16().requires_grad_()
    down = (torch.randn(e, d, f) * 0.2).bfloat16().requires_grad_()
    y = torch_ops.Experts.apply(x, weights, gu, down, torch_ops.dispatch(chosen, e), 0.0)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weights, gu, down), grad)
    nx, nw, ng, nd = _leaves(x, weights, gu, down)
    naive = sum(
        torch.einsum(
            "nf,ndf->nd",
            torch_ops.swiglu(torch.einsum("nd,nfd->nf", nx, ng[chosen[:, j]]), 0.0),
            nd[chosen[:, j]],
        )
        * nw[:, j : j + 1]
        for j in range(k)
    )
    assert _relative(y, naive) < 0.01
    theirs = torch.autograd.grad(naive, (nx, nw, ng, nd), grad)
    assert max(_relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 0.01


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_expert_activation_gradient(limit: float) -> None:
    z, w = torch.randn(64, 32, requires_grad=True), torch.rand(64, requires_grad=True)
    grad = torch.randn(64, 16)
    true = torch.autograd.grad(torch_ops.swiglu(z, limit) * w[:, None], (z, w), grad)
    ours = torch_ops._expert_act_backward(z.detach(), w.detach(), grad, limit)
    assert _relative(ours[0], true[0]) < 0.01
    assert _relative(ours[1], true[1]) < 0.01


@pytest.mark.parametrize(("layer", "n_q", "window"), [(0, 8, 0), (1, 12, 64)])
def test_attention_equals_the_masked_formula(layer: int, n_q: int, window: int) -> None:
    b, t, d, dim, g = 1, 320, 256, 32, 2
    config = torch_model.read_config(data.HERE / "bf16")
    h, norm = torch.randn(b, t, d), torch.randn(d) * 0.1
    qkvg = torch.randn(n_q * dim + 2 * g * dim + n_q, d) * 0.05
    o, qn, kn = torch.randn(d, n_q * dim) * 0.05, torch.randn(dim) * 0.3, torch.randn(dim) * 0.3
    cos, sin = torch_model.rope_tables(config, layer, t)
    mask = torch_model.sliding_mask(t, window) if window else torch_model.causal_mask(t)
    shape = torch_ops.AttentionShape(n_q, g, dim, window)
    bf = qkvg.bfloat16(), o.bfloat16()
    ours = torch_ops.attention(h, norm, bf[0], qn, kn, bf[1], cos, sin, mask, shape) - h

    q, k, v, gate = (torch_ops.rms(h, norm) @ qkvg.T).split([n_q * dim, g * dim, g * dim, n_q], -1)
    q = torch_ops.rotate(torch_ops.rms(q.view(b, t, n_q, dim), qn), cos, sin)
    k = torch_ops.rotate(torch_ops.rms(k.reshape(b, t, g, dim), kn), cos, sin)
    k, v = (x.repeat_interleave(n_q // g, 2) for x in (k, v.reshape(b, t, g, dim)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * dim**-0.5
    i = torch.arange(t)
    seen = i[None] <= i[:, None]
    seen = seen & (i[None] > i[:, None] - window) if window else seen
    p = scores.masked_fill(~seen, -1e30).softmax(-1)
    y = torch.einsum("bhqk,bkhd->bqhd", p, v) * gate.sigmoid()[..., None]
    assert _relative(ours, y.reshape(b, t, -1) @ o.T) < 0.02


def test_llama3_scaling_touches_full_layers_only() -> None:
    config = torch_model.read_config(data.HERE / "bf16")
    plain = config | {"yarn_only_types": []}
    for layer, rotated in ((0, 16), (1, 32)):
        theta = config["rope_theta"][layer]
        base = theta ** (-np.arange(0, rotated, 2) / rotated)
        angle = np.arctan2(*(x[1].numpy() for x in torch_model.rope_tables(plain, layer, 2)[::-1]))
        assert np.allclose(angle, base, rtol=1e-5)
        scaled = torch_model.rope_tables(config, layer, 2)[1][1].asin().numpy()
        if layer == 0:
            assert scaled[-1] == pytest.approx(base[-1] / 2, rel=1e-5)
        else:
            assert scaled[1:] == pytest.approx(base[1:], rel=1e-5)


def test_q4_0_round_trip_is_the_file_formats() -> None:
    quants = pytest.importorskip("gguf.quants")
    kind = pytest.importorskip("gguf").GGMLQuantizationType.Q4_0
    w = torch.cat((torch.randn(8, 64), torch.zeros(1, 64)))
    stored = quants.dequantize(quants.quantize(w.numpy(), kind), kind)
    assert np.array_equal(torch_model._fake_q4_0(w).numpy(), stored)


def test_newton_schulz_flattens_singular_values() -> None:
    u = optim.orthogonal(torch.randn(3, 64, 256).bfloat16()).float()
    values = torch.linalg.svdvals(u)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.4


def test_schedule_has_its_bends_where_it_says() -> None:
    s = train.Settings(steps=1000, decay_start=400, seed=1, length=1024, quantise_from=800)
    assert s.rate(0) == pytest.approx(1 / train.WARM_UP)
    assert s.rate(399) == 1.0 and s.rate(700) == pytest.approx(0.5) and s.rate(999) < 0.01
    assert (s.mtp_weight(499), s.mtp_weight(500)) == (0.3, 0.1)
    assert [s.bias_rate(x) for x in (0, 500, 900)] == [0.01, 0.001, 0.0]


def test_one_step_of_each_phase_changes_what_it_should() -> None:
    config = torch_model.read_config(data.HERE / "bf16")
    masters = torch_model.initial(config, seed=1, embedding_std=1.0)
    assert set(masters) == set(torch_model.shapes(config, 1))
    model = torch_model.Model(config, masters, 64)
    window = torch.randint(11, 4096, (1, 64 + data.EXTRA))
    losses = model.losses(window, 1)
    assert all(abs(x.item() - np.log(4096)) < 0.6 for x in losses)
    sum(losses).backward()
    trained = {n for n in masters if not n.endswith("router_bias")}
    assert set(model.gradients()) == trained

    train_mtp.clone_heads(masters, config["num_hidden_layers"], 2)
    assert set(masters) == set(torch_model.shapes(config))
    model = torch_model.Model(config, masters, 64)
    heads = tuple(f"model.layers.{layer}." for layer in (9, 10, 11))
    model.trained = {n for n in model.plan if n.startswith(heads)}
    model.refresh()
    sum(train_mtp.chained(model, window)).backward()
    assert set(model.gradients()) == {n for n in masters if n.startswith(heads)}
