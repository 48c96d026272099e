"""python -m pytest -q results/test_results.py

Tests of the scripts here: radii and attacks, CIFAR-10, the GPU's jobs, sweeps, tables and figures.
"""
import argparse
import hashlib
import io
import json
import math
import random
import shutil
import signal
import sys
import tarfile
import time
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "results")]

from test_lip import (GPU, HEADS, TINY, certified, certify, data, gpt, here, log_lines, one_line, parts,
                      random_weights, read_report, refuses_bad_values, run_main, server,
                      start)  # before torch, whose threads it sets; three are fixtures

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import bench
import cifar
import constrain
import gpu
import measure
import model
import plot
import prepare
import sweep
import train
from constrain import rms_norm
from model import onto_ball
from prepare import UserError


# --- certify.py ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_attacks_find_what_they_should_whatever_torch_is_told_of_gradients(mode):
    """Of changes of almost 0 none alters a prediction; where every embedding can become every other, all."""
    torch.manual_seed(0)
    W, X = torch.randn(7, 12, dtype=torch.float64), torch.randn(2, 3, 12).double()
    net, tokens = random_weights(gpt(H=2, d=8, logit_scale=6.0), 0.8), torch.randint(11, (60, ))
    right, z = certify.margins(net, tokens)[1], net(tokens[None, 48:59])[0]  # of the last window, a short one
    with mode():
        found = certify.ascend(lambda X: X @ W.T, X, 1.0, 30)
        at_once, climbed = (certify.attack(net, 6, 4, steps, tokens) for steps in (0, 5))
        radii = certify.attack_radii(constrain.exact_model(net), net.wte(tokens[None, :6]).double(), 3)
        none, some, all_ = (certify.attacked(net, tokens, r) for r in (1e-12, 0.05, 3.0))
    assert found == pytest.approx(rms_norm(W).item(), rel=1e-3)  # the gain of a linear map
    assert 0 < at_once <= climbed == certify.attack(net, 6, 4, 5, tokens) <= 10 ** certified(net)
    assert right.any() and torch.equal(none, right) and right.sum() >= some.sum() > 0 == all_.sum()
    assert torch.equal(right[48:], z[0].argmax(-1) == tokens[49:]) and radii.isfinite().all()


def test_radii_far_from_the_middle():
    """Leads of all sizes, constants below and above 1: rounded down by 1 %, not cut off; none for a tie."""
    torch.manual_seed(0)
    for scale in (0.01, 0.8, 3.0):
        net = random_weights(gpt(L=2), scale)
        layers, R = constrain.layer_norms(net), constrain.embedding_norm(net)
        bears = torch.cat((torch.zeros(1), torch.logspace(-25, 25, 101))).double()
        reached = lambda r: math.log10(r) + constrain.body_bound(layers, R + r)[0]
        tie, *radii = certify.log10_radii(net, bears, layers).tolist()
        assert tie == -math.inf
        for b, x in zip(bears[1:].log10().tolist(), radii, strict=True):
            assert reached(10 ** x) <= b + 1e-9 and b < reached(1.0101 * 10 ** x) + 1e-9


TEXT_MODELS = {"paper": dict(c=3.0), "gelu alone": dict(L=1, c=0.0, position_bias=True), "maxmin": HEADS,
               "relu": dict(activation="relu"), "ball": dict(L=3, ball=0.5),
               "no residual": dict(c=0.0, alpha=1.0, mlp_layers=3, mlp_ratio=1, **HEADS)}


of_text_models = pytest.mark.parametrize("options", TEXT_MODELS.values(), ids=TEXT_MODELS)


def at_a_text(options, trained=True):
    """A net in float64, embeddings X (12, 10, 16), layer_norms and block_norms."""
    torch.manual_seed(0)
    net = random_weights(gpt(**dict(H=2, L=2, T=10, logit_scale=4.0) | options), 0.9 if trained else 1.3)
    ids = torch.randint(11, (12, 11))
    ids[:, 3::2] = ids[:, 1:2]  # something to learn
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60 * trained):
        optimizer.zero_grad()
        net(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
    net = constrain.exact_model(net)
    layers = constrain.layer_norms(net)
    return net, net.wte(ids[:, :-1]), layers, certify.block_norms(net, layers)


@pytest.mark.parametrize("trained", (False, True))
@of_text_models
def test_local_radii_lie_between_the_constants_and_an_attacks(options, trained):
    """Prediction by prediction; and much above the constant's with content. What is unknown has none."""
    net, X, layers, norms = at_a_text(options, trained)
    bears, top = (found.view(12, 10) for found in certify.predictions(net, X))
    by_constant, local, labels = certify.local_radii(net, norms, X)
    assert torch.equal(by_constant, certify.log10_radii(net, bears, layers)) and torch.equal(labels, top)
    assert (local >= by_constant).all() and (local[:, -1] <= certify.attack_radii(net, X)).all()
    if options.get("c", 1.0) and trained:
        assert (local - by_constant).median() > 0.5
    y = torch.where(torch.rand(120) < 0.5, labels.flatten(), 12)
    last = (torch.arange(10) > 6).expand(12, 10)
    for asked, which in ((dict(y=y), y.view(12, 10) < 12), (dict(last=3), last)):
        some = certify.local_radii(net, norms, X, **asked)[1]
        assert torch.equal(some, torch.where(which, local, by_constant))
    X[0, 3, 5] = math.nan
    for radii in certify.local_radii(net, norms, X)[:2]:
        assert (radii[0, 3:] == -math.inf).all() and radii[1].isfinite().any()


@of_text_models
def test_shares_certified_at_a_text_lie_between_those_of_radii_and_an_attack(options):
    net, _, layers, norms = at_a_text(options)
    text = torch.randint(11, (126, ))  # windows of 10, the last of 5
    windows = list(certify.whole_windows(net, text, 1))
    found = [certify.local_radii(net, norms, net.wte(x)) for x, _ in windows]
    right, constant, local = (torch.cat(x) for x in zip(*(
        ((top.flatten() == y), a.flatten(), b.flatten()) for (a, b, top), (_, y) in zip(found, windows))))
    shares = certify.all_at_text(net, layers, text, (1e-3, 0.01, 0.1))
    assert right.sum() > 3 and [*shares] == ["0.001", "0.01", "0.1"]
    for r, share in shares.items():
        least = right & (local > constant) & (local > math.log10(float(r)))
        left = certify.attacked(net, text, float(r))
        assert least.sum() <= round(125 * share, 3) <= left.sum() <= right.sum()


def test_what_softmax_leaves_of_higher_order_is_never_too_small():
    """Against 60 digits, for changes of scores down to 1e-14, where the terms of the formula cancel."""
    torch.manual_seed(0)
    p = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    at = SimpleNamespace(p=p / p.sum(-1, keepdim=True), apart=torch.ones_like(p), scale=1.0,
                         cov=torch.zeros(1, 1, 4))
    for size in torch.logspace(-14, -0.5, 30).tolist():
        e, none = size * torch.rand_like(p), torch.zeros_like(p)
        _, beyond = certify.score_output(at, e, none, none, none, torch.zeros(1, 4))
        with localcontext(prec=60):
            for p_t, e_t, found in zip(at.p[0, 0], e[0, 0], beyond[0, 0].tolist()):
                p_t, e_t = ([Decimal(x) for x in row.tolist()] for row in (p_t, e_t))
                mean = lambda f: sum(a * f(b) for a, b in zip(p_t, e_t)) / sum(p_t)
                exact = mean(lambda b: b.exp() / (2 - mean(Decimal.exp)) - 1 - b - mean(lambda x: x))
                assert exact * (1 - Decimal(1e-12)) <= found <= exact * (1 + Decimal(1e-3))


def test_keys_and_values_that_are_nearly_alike_count_as_far_apart_as_they_are():
    """Two tokens beside each other along one axis, which queries do not see, with scores of 0: k and v are
    half of the distance from their means, the covariance is its square over 4.
    """
    torch.manual_seed(0)
    net = certify.exact_model(gpt(H=1, d=2, T=2, L=1))
    net.cos.fill_(1), net.sin.fill_(0)
    net.blocks[0].attn.qkv.weight.copy_(torch.tensor([[[0, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 0]]]))
    norms = certify.block_norms(net, constrain.layer_norms(net))
    for a in torch.rand(50).double() + 1:
        for apart in torch.logspace(-15, -7, 9).tolist():
            X = torch.stack((a, a * (1 + apart)))[None, :, None] * torch.tensor([1.0, 0.0])
            at, (low, high) = certify.facts_at(net, norms, X)[0], map(Fraction, X[0, :, 0].tolist())
            assert at.k[0, 0, 1].min().item() >= (high - low) / 2
            assert at.cov[0, 0, 1].item() >= (high - low) ** 2 / 4


def test_heads_that_cancel_move_what_they_move():
    """W_o^2 = -W_o^1 and W_v^2 = 3 W_v^1, which sees two tokens back by 1e-9 more than a third."""
    torch.manual_seed(0)
    net = certify.exact_model(gpt(H=2, d=4, c=0.0, vocab=3, T=4, position_bias=True, attn_scale=1.0))
    W_v = 1e3 * torch.tensor([[0, 0.73, 0.41, 0], [0, -0.37, 0.89, 0]]).double()
    W_o = torch.tensor([[0, 0], [0, 0], [0.83, 0.29], [0.17, -0.61]]).double()
    attn, layers = net.blocks[0].attn, constrain.layer_norms(net)
    attn.qkv.weight.copy_(torch.cat((W_v, 3 * W_v))[None])
    attn.proj.weight.copy_(torch.cat((W_o, -W_o), dim=1))
    for share in torch.linspace(0.05, 0.25, 40).tolist():
        attn.bias.fill_(-1e4)[:, 0] = 0
        attn.bias[:, 2] = torch.tensor([3 * share * (1 + 1e-9), share]).double().logit()
        norms = certify.block_norms(net, layers)
        at = certify.facts_at(net, norms, net.wte(torch.zeros(1, 4, dtype=torch.long)))[0]
        one_map = (at.p[0, 0, 3, 1] - 3 * at.p[0, 1, 3, 1]) * W_o @ W_v
        apart = net.wte.weight[:, None] - net.wte.weight
        true = (apart @ one_map.mT).norm(dim=-1).amax(1)
        assert (certify.moves(at, net.wte.weight)[:, 3, 1] >= (1 - 1e-6) * true - 1e-12).all()


@of_text_models
def test_ties_have_no_radius_and_what_comes_later_no_say(options):
    net, X, layers, norms = at_a_text(options)
    facts, small = certify.facts_at(net, norms, X), torch.full((12, 10), 1e-5).double()
    unknown = small.clone()
    unknown[:, -1] = math.inf
    known, other = (certify.certified_under(net, facts, delta, torch.ones(120).bool()).view(12, 10)
                    for delta in (small, unknown))
    assert known.any() and not other[:, -1].any()
    assert not options.get("c", 1.0) or torch.equal(known[:, :-1], other[:, :-1])
    net.head.weight[5:10] = net.head.weight[:5]
    constant, local, top = certify.local_radii(net, norms, X)
    tied = top < 10
    assert tied.any() and (constant[tied] == -math.inf).all() and (local[tied] == -math.inf).all()


def below(change, bound):
    """Whether numbers, or the norms of vectors, are within a bound, but for rounding."""
    found = change.norm(dim=-1) if change.ndim > bound.ndim else change.abs()
    return (found <= bound * (1 + 1e-9) + 1e-12).all()


@of_text_models
def test_no_change_exceeds_a_bound_at_a_text(options):
    """Each bound of the proof by itself, and all together, for random changes of the embeddings."""
    net, X, _, norms = at_a_text(options)
    tables, g, n = (net.cos[:10], net.sin[:10]), torch.randn(120, 16).double(), torch.arange(120)
    for r in (1e-3, 0.03, 0.3):
        facts, changed = (certify.facts_at(net, norms, x) for x in (X, X + r * torch.randn_like(X).sign()))
        path = []
        for at, moved in zip(facts, changed):
            attn, alpha, mlp, ball = at.block.attn, at.block.alpha, at.block.mlp, at.block.ball
            dx, dmid = moved.x - at.x, moved.mid - at.mid
            delta = dx.norm(dim=-1)
            known, beyond = certify.attention_change(at, delta)
            path.append((at, delta, known, beyond))
            assert below(dmid, known.mid)
            here, G = (torch.tensor([3, 11, 4]), slice(8)), torch.randn(3, 8, 16).double()
            product = lambda g, x: (g * x[here]).sum((1, 2))  # of texts whose ends are cut off
            h, rest = certify.through_attention(net, at, G, here, beyond)
            assert below(product(G, dmid) - product(h, dx), torch.as_tensor(rest))
            (qk, v, _), (qk_, v_, _) = (attn.heads(x, *tables) for x in (at.x, moved.x))
            if qk:
                (q, k), (q_, k_) = qk, qk_
                by_q, by_k, cross = certify.score_change(at, delta)
                dq, dk = q_ - q, k_ - k
                assert below(attn.scale * (dq @ k.mT - (dq * (at.p @ k)).sum(-1)[..., None]).tril(), by_q)
                assert below((attn.scale * q @ dk.mT).tril(), by_k)
                assert below((attn.scale * dq @ dk.mT).tril(), cross)
                e = by_q + by_k + cross
                most, off = certify.probability_ratio(at, e)
                any_scores = at.p.log() + (2 * torch.rand_like(e) - 1) * e
                for p in (moved.p, any_scores.softmax(dim=-1)):
                    assert below(p, at.p * most) and below(p - at.p, at.p * off)
                    whole, part = certify.value_input(at, most, off, delta)
                    assert below(p @ dx[:, None], whole) and below((p - at.p) @ dx[:, None], part)
                whole, part = certify.score_output(at, e, by_k, cross, off, delta)
                assert below((moved.p - at.p) @ v, whole)
                linear = attn.scale * (dq @ k.mT + q @ dk.mT)
                linear = at.p * (linear - (at.p * linear).sum(-1, keepdim=True))
                assert below((moved.p - at.p - linear) @ v, part)
            half = lambda x: (1 - alpha) * x + alpha * mlp(x)
            y, dy = at.out, moved.out - at.out
            assert torch.equal(half(at.mid), y) and below(dy, at.layer.mlp_gain * dmid.norm(dim=-1))
            if not mlp.mid:
                V = at.half[2]
                assert ((dmid @ V.T).abs() <= known.rows * (1 + 1e-9) + 1e-12).all()
            if at is not facts[-1]:
                assert below(dy, certify.mlp_change(at, dmid.norm(dim=-1)))
                near = dmid * (at.near / dmid.norm(dim=-1) * torch.rand_like(at.near))[..., None]
                assert below(half(at.mid + near) - y, at.gain * near.norm(dim=-1))
                assert (at.gain <= at.layer.mlp_gain).all()
            if ball is not None:
                size, projected = dy.norm(dim=-1), onto_ball(moved.out, ball) - onto_ball(y, ball)
                assert below(projected, certify.ball_change(at, size))
                h, rest = certify.through_ball(at, G, here, size)
                assert below(product(G, projected) - product(h, dy), rest)
            if not mlp.mid:
                here, all_dy, all_dmid = (n // 10, n % 10), dy.flatten(0, 1), dmid.flatten(0, 1)
                h, rest = certify.lead_gradient(at, g, known, here)
                assert below((g * all_dy).sum(1) - (h * all_dmid).sum(1), rest)
                h, rest = certify.lead_derivative(at, g, here), certify.lead_rest(at, g, known, here)
                assert below(((h * all_dmid).sum(1) - (g * all_dy).sum(1)).clamp_min(0), rest)
            found = (g.view(12, 10, 16) * dmid).sum(-1).flatten()
            assert mlp.mid or below(found, certify.traced_back(net, path, g, n))


@pytest.mark.parametrize("name", ("gelu alone", "maxmin", "relu", "ball"))
def test_the_rest_of_a_lead_is_nearly_reached(name):
    """By changes that take turns with the weights of the rows that they move."""
    net, X, _, norms = at_a_text(TEXT_MODELS[name])
    at, n = certify.facts_at(net, norms, X)[-1], torch.arange(120)
    here, w, (_, U, V, f) = (n // 10, n % 10), torch.randn(120, 16).double(), at.half
    known, _ = certify.attention_change(at, torch.full((12, 10), 0.02).double())
    u, size, columns = w @ U, (at.mid[here] @ V.T).abs(), at.widths.tolist()
    jump = (f.slope[1] - f.slope[0]) * f.kink * (u < 0) * u.abs()
    parts = at.parts * known.moves[here].repeat_interleave(at.widths, dim=1)[:, None]  # (120, hidden, 3 * 16)
    reached, bound = torch.zeros(120).double(), certify.lead_rest(at, w, known, here)
    for share in (0.3, 0.5, 0.7, 0.9):  # of a kink's distance, from which on it counts
        moved = torch.randn_like(u)
        for _ in range(30):
            weights = u.abs() * f.curvature * moved + jump * moved.sign() * (moved.abs() > share * size)
            pulled = (weights[:, None] @ parts)[:, 0].split(columns, dim=1)
            y = torch.cat([part / part.norm(dim=1, keepdim=True).clamp_min(1e-300) for part in pulled], dim=1)
            moved = (parts @ y[:, :, None])[:, :, 0]
        rest = u.abs() * f.curvature / 2 * moved.square() + jump * (moved.abs() - size).clamp_min(0)
        reached = reached.maximum(rest.sum(1))
    assert below(reached, bound) and (reached / bound)[bound > 0].quantile(0.9) > 0.85


@of_text_models
def test_a_small_change_in_the_worst_direction_is_what_a_bound_says(options):
    """To first order traced_back and near_gain are reached: by each embedding moved along the gradient, and
    by the top singular vector of an MLP half's derivative, over which the slopes nearby add a few per cent.
    """
    net, X, _, norms = at_a_text(options)
    g, n, path = torch.randn(120, 16).double(), torch.arange(120), []
    delta, x = 1e-8 * (0.1 + torch.rand(12, 10).double()), X.detach().requires_grad_()
    embeddings, moved = x, delta
    for at in certify.facts_at(net, norms, X):
        block, a = at.block, at.block.alpha
        path.append((at, moved, *certify.attention_change(at, moved)))
        mid = (1 - a) * x + a * block.attn(x, net.cos[:10], net.sin[:10])
        for i in range(0, 120, 7) if at.half or len(path) == 1 else ():
            b, t = divmod(i, 10)
            bound = certify.traced_back(net, path, g[i:i + 1], n[i:i + 1])
            step, = torch.autograd.grad(mid[b, t] @ g[i], embeddings, retain_graph=True)
            reached = (step.norm(dim=-1) * delta).sum()
            assert 0.999 * bound <= reached <= bound * (1 + 1e-6)  # the function has kinks
        if at.gain is not None:
            moved = certify.ball_change(at, certify.mlp_change(at, path[-1][2].mid))
            x = (1 - a) * mid + a * block.mlp(mid)
            x = x if block.ball is None else onto_ball(x, block.ball)
        if at.gain is not None and at.half:
            J = torch.func.vmap(torch.func.jacrev(lambda y: (1 - a) * y + a * block.mlp(y)))
            sharp = constrain.sigma(J(at.mid.flatten(0, 1)).detach()).view(at.gain.shape)
            assert below(sharp, at.gain) and (at.gain / sharp).median() < 1.2


def test_whatever_is_not_linear_counts(monkeypatch):
    """Of each part of each block that traced_back passes; and the least over blocks is taken."""
    net, X, _, norms = at_a_text(TEXT_MODELS["ball"])
    delta, g, n, path = torch.full((12, 10), 0.01).double(), torch.randn(3, 16).double(), [39, 99, 119], []
    for at in certify.facts_at(net, norms, X):
        path.append([at, delta, *certify.attention_change(at, delta)])
    bound = lambda: certify.traced_back(net, path, g, torch.tensor(n))
    least = bound()
    for block in path[1:]:
        block[1] = math.inf * delta
    whole = bound()
    assert (least <= whole).all() and (least < whole).any()  # at these deltas, which do not grow
    for name, times in ("through_ball", 2), ("lead_gradient", 2 * 10), ("through_attention", 3):
        f = getattr(certify, name)
        with monkeypatch.context() as patch:
            patch.setattr(certify, name, lambda *args: (f(*args)[0], f(*args)[1] + 1.0))
            assert torch.allclose(bound(), whole + times)


def test_what_is_not_linear_in_a_ball_is_bounded_and_reached():
    """Outside by a step of which 2/3 of the square lie across, where it crosses by one straight out."""
    axis, across = torch.eye(6, dtype=torch.float64)[:2]
    for size, step, share in ((3.0, 0.01 * (axis / math.sqrt(3) + across * math.sqrt(2 / 3)), 0.97),
                              (1.0, 0.2 * axis, 1.0), (0.5, 0.2 * axis, 0.0)):
        y, f = math.sqrt(6) * size * axis, partial(onto_ball, radius=1.0)
        at = SimpleNamespace(c=SimpleNamespace(ball=1.0), out=y.expand(1, 1, 6))
        h, rest = certify.through_ball(at, torch.eye(6).double()[:, None], ([0] * 6, slice(1)),
                                       step.norm().expand(1, 1))
        left = (f(y + step) - f(y) - h[:, 0] @ step).norm()  # of all functions of norm 1 the most
        assert share * rest[0] <= left * (1 + 1e-9) and left <= rest[0] * (1 + 1e-9) + 1e-15


@of_text_models
def test_no_change_exceeds_a_bound_of_the_last_mlp(options):
    """The slopes and the change of a lead at random points within delta, and the prediction there."""
    net, X, _, norms = at_a_text(options)
    at, W = certify.facts_at(net, norms, X)[-1], net.head.weight
    x, mlp, alpha, asked = at.mid.flatten(0, 1), at.block.mlp, at.block.alpha, torch.arange(120) % 10 > 0
    half = lambda x: (1 - alpha) * x + alpha * mlp(x)
    for r in (1e-3, 0.1, 1.0):
        delta = r * torch.rand(len(x), 1).double()
        near = certify.near_mid(at, delta.view(12, 10))
        held = certify.leads_hold(at, W, near, asked)
        assert (held.any() or r > 1e-3) and not held[~asked].any()
        w = W[torch.randint(11, (len(x), ))] - W[torch.randint(11, (len(x), ))]
        for _ in range(10):
            step = torch.randn_like(x)
            step = delta * torch.rand_like(delta) * step / step.norm(dim=1, keepdim=True)
            point = x + step
            assert torch.equal((half(point) @ W.T).argmax(1)[held], (half(x) @ W.T).argmax(1)[held])
            if mlp.mid:
                continue
            A, U, V, f = at.half
            assert torch.allclose(half(x), x @ A.T + f.f(x @ V.T) @ U.T)
            z, dz = x @ V.T, step @ V.T
            middle, off = certify.slopes(f, z, certify.derivative(f, z), V.norm(dim=1) * delta)
            assert below((f.f(z + dz) - f.f(z) - middle * dz).flatten(), (off * dz.abs()).flatten())
            g, off = certify.lead_gradient(at, w, near, (torch.arange(120) // 10, torch.arange(120) % 10))
            assert below(((half(point) - half(x)) * w - g * step).sum(1), off)


@pytest.mark.parametrize("options", (
    dict(c=0.0, position_bias=True, per_head=True, head_gain=True, alpha=1.0, activation="maxmin"),
    dict(c=0.0, position_bias=True, activation="relu"), dict(c=0.1, L=2, position_bias=True, ball=1.0),
    dict(c=0.1, alpha=0.9, position_bias=True)))
def test_the_last_tokens_that_decide_a_prediction(options):
    """No other text before them alters it, random or an attack's, which alters what is not proved."""
    torch.manual_seed(0)
    net = constrain.exact_model(random_weights(gpt(d=16, T=24, vocab=7, **options), 0.6))
    for W in (net.head.weight, net.wte.weight):
        W.copy_(torch.randn(W.shape))
    for block in net.blocks:
        block.attn.bias.copy_(12 * F.one_hot(torch.tensor([0, 1, 2, 4]), 24))  # so that 4 do not suffice
        if block.attn.gain is not None:
            block.attn.gain.copy_(torch.tensor([0.1, 0.3, 1.4, 1.4]))
    ids = torch.randint(7, (16, 24))
    sizes = certify.deciding(net, constrain.layer_norms(net), ids)
    assert sizes.shape == (16, 8 if options["c"] == 0 else 1) and sizes.isfinite().any()
    at_once, n, top = sizes.shape[1] > 1, sizes.shape[1], net(ids)[0].argmax(-1)
    if at_once:  # what another token at s moves at t is as far as the farthest does
        norms = certify.block_norms(net, constrain.layer_norms(net))
        at, = certify.facts_at(net, norms, net.wte(ids[:1]))
        table, f = certify.moves(at, net.wte.weight), partial(at.block.attn, cos=net.cos, sin=net.sin)
        for s in (0, 9, 23):
            others = at.x.repeat(7, 1, 1)
            others[:, s] = net.wte.weight
            farthest = (f(others) - f(at.x)).norm(dim=-1).amax(dim=0)
            assert torch.allclose(farthest[s:], table[ids[0, s], s:, s]) and farthest[s] > 0
    for D in (1, 2, 4, 8, 16):
        for t in range(24 - n, 24):
            proved = sizes[:, t - 24] <= D
            for _ in range(5):
                other = ids.clone()
                other[:, :t - D + 1] = torch.randint(7, (16, t - D + 1))
                same = net(other)[0][:, t].argmax(-1) == top[:, t]
                assert same[proved].all() and (at_once or t == 23)
        assert not (certify.altered(net, ids, D) & (sizes[:, -1] <= D)).any()
    assert certify.altered(net, ids, 4).any() or "alpha" not in options


@pytest.mark.parametrize("name, wrong", (
    (None, None), ("attack", lambda *args, **_: 1e9),
    ("log10_radii", lambda net, bears, layers: torch.full_like(bears, 1.0)),  # all is said to be certified
    ("attack_radii", lambda net, X: torch.full((len(X), ), -20.0)),
    ("deciding", lambda net, layers, ids: torch.zeros(len(ids), 1))))
def test_certify_cries_when_an_attack_is_above_a_certificate(data, monkeypatch, capsys, name, wrong):
    """In capitals, null in JSON, exit code 1."""
    train.train(TINY)
    if name:
        monkeypatch.setattr(certify, name, wrong)
    lines, result = read_report(monkeypatch, capsys, 1 if name else None, "--deciding")
    assert any(line.isupper() and "ATTACK" in line for line in lines) == (name is not None)
    assert ("certified" in "".join(lines)) == (name is None) == (not result["alarms"])
    assert {result[what] is None for what in certify.CERTIFIED} == {name is not None}


def test_reports_of_models_that_predict_nothing(data, monkeypatch, capsys):
    """No right prediction, a head of zeros, one character alone: numbers or null, never a traceback."""
    def with_head(value):
        ckpt = torch.load("out/ckpt.pt", weights_only=True)
        ckpt["model"]["head.weight"][:] = value
        train.save("out/ckpt.pt", ckpt)

    once = TINY | dict(max_steps=1, eval_interval=1)
    train.train(once)
    with_head(0)
    _, result = read_report(monkeypatch, capsys)
    assert result["log10_certified"] is result["log10_attack"] is result["log10_median_radius"] is None
    assert set(result["certified_accuracy"].values()) == {0}
    with monkeypatch.context() as patch:
        wrong = lambda net, tokens: (torch.ones(len(tokens) - 1).double(), torch.arange(len(tokens) - 1) < 0)
        patch.setattr(certify, "margins", wrong)
        _, result = read_report(patch, capsys)
    assert result["val_acc"] == 0 and result["log10_median_radius"] is None
    prepare.write_dataset(["a" * 1000], "data/shakespeare", "test")
    train.train(once)
    assert log_lines()[-1]["val_acc"] == 1
    _, result = read_report(monkeypatch, capsys)
    assert result["val_acc"] == 1 and max(result["certified_accuracy"].values()) == 1
    with_head(math.inf)
    for script in (certify, constrain, model):
        one_line(run_main(script, monkeypatch, "out/ckpt.pt"), "out/ckpt.pt", "not finite")


# --- gpu.py -------------------------------------------------------------------------------------------------

def test_rehearsal_of_the_gpu(data, monkeypatch):
    """results/gpu.py, small and on the CPU: every job that has its data ends in a line, a failure too."""
    monkeypatch.setattr(gpu, "ROOT", data)
    monkeypatch.setattr(gpu, "OUT", data / "out/gpu")
    for path in (*HERE.glob("*.py"), HERE / "results"):
        Path(path.name).symlink_to(path)
    Path("data/books").symlink_to("shakespeare")

    def records(*jobs):
        args = argparse.Namespace(jobs=jobs, tiny=True, tokens=1e8, minutes=10)
        gpu.main(args)
        return parts.read(args.records)[-len(jobs):]

    profile, one_graph, baseline, default = records("profile", "bench-one-graph", "baseline", "default")
    assert 0.2 < sum(kernel["share"] for kernel in profile["kernels"]) < 1 + 1e-6
    assert one_graph["tokens_per_second"] > 0 and one_graph["step_over_floor"] > 1
    assert 0 < one_graph["matmul_share"] < 1 and one_graph["optimizer_share"] < 1
    assert baseline["trace"]["step"] == default["trace"]["step"] == [2, 4]
    log = Path("out/gpu/baseline/log.jsonl")
    log.write_text("".join(log.read_text().splitlines(True)[:-1]))  # as if it had been stopped
    assert records("baseline")[0]["trace"] == baseline["trace"]
    assert [line["step"] for line in parts.read_lines(log) if "options" in line] == [0, 4]
    Path("data/books").unlink()
    assert "no data/books" in records("w1")[0]["error"]


# --- cifar.py -----------------------------------------------------------------------------------------------

def patterns(n, seed=0):
    """n images (n, 3072) of ten classes, a pattern for each and noise, and their labels (n,)."""
    shapes, rng = np.random.default_rng(0).integers(120, 136, (10, 3072)), np.random.default_rng(seed)
    labels = rng.integers(10, size=n)
    return (shapes[labels] + rng.integers(-80, 80, (n, 3072))).astype(np.uint8), labels


@pytest.fixture
def images(server, here, monkeypatch):
    """A server of an archive in CIFAR-10's format, of 1,200 images."""
    with tarfile.open("cifar.tar.gz", "w:gz") as tar:
        for seed, name in enumerate(sum(cifar.BATCHES.values(), [])):
            pixels, labels = patterns(200, seed)
            rows = np.hstack((labels[:, None].astype(np.uint8), pixels))
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = rows.size
            tar.addfile(info, io.BytesIO(rows.tobytes()))
    server.files["/cifar.tar.gz"] = body = Path("cifar.tar.gz").read_bytes()
    monkeypatch.setattr(cifar, "URL", server.url + "/cifar.tar.gz")
    monkeypatch.setattr(cifar, "SHA256", hashlib.sha256(body).hexdigest())
    return server


def mlp(n_in, width, n_out, seed=0, **options):
    torch.manual_seed(seed)
    config = cifar.Config(width=width, **options)
    return cifar.MLP(n_in, n_out, config), config


def test_images_are_those_of_the_archive_or_one_line(images, monkeypatch):
    run_cifar, path = partial(run_main, cifar, monkeypatch), Path("data/cifar10/images.npz")
    one_line(run_cifar("train"), "python results/cifar.py prepare")
    assert run_cifar("prepare") is None
    for (split, names), seed in zip(cifar.BATCHES.items(), (0, 5)):
        pixels, labels = cifar.read_images()[split]
        assert pixels.shape == (200 * len(names), 3072) and pixels.dtype == np.uint8
        assert all(map(np.array_equal, (pixels[:200], labels[:200]), patterns(200, seed)))
    whole = path.read_bytes()
    for damaged in (b"", whole[:len(whole) // 2], whole[:10 ** 6] + b"?!" + whole[10 ** 6 + 2:]):
        path.write_bytes(damaged)
        one_line(run_cifar("train"), "damaged", "python results/cifar.py prepare")
    monkeypatch.setattr(np, "load", Mock(side_effect=MemoryError("Unable to allocate 150 MiB")))
    one_line(run_cifar("train"), "not enough memory")


def test_cifar10(images, monkeypatch, capsys):
    run_cifar = partial(run_main, cifar, monkeypatch)
    assert run_cifar("prepare") is None
    short = ["train", "--batch_size=100", "--max_steps=70", "--width=64", "--dtype=float32"]

    def log(name, *argv):
        assert run_cifar(*short, f"--out_dir={name}", *argv) is None
        line = torch.load(f"{name}/model.pt", weights_only=True)["log"][-1]
        assert line["norm_over_cap"] <= 1.001
        assert line["log10_attack"] <= line["log10_certified"] + 1e-6
        for eps in cifar.EPSILONS:
            assert line[f"certified_acc_{eps}"] <= line[f"attacked_acc_{eps}"] <= line["val_acc"]
        return line

    plain, tight = log("plain"), log("tight", "--preset=cifar10-tight", "--logit_scale=100")
    log("adamw", "--optimizer=adamw", "--method=hard_cap")
    assert min(plain["val_acc"], tight["val_acc"]) > 0.8
    assert 0 < plain["certified_acc_36"] and plain["attacked_acc_255"] < plain["val_acc"]
    assert tight["log10_certified"] == pytest.approx(2, abs=1e-4) and tight["worst_loss"] > tight["val_loss"]
    assert tight["certified_acc_108"] > plain["certified_acc_108"]
    assert "certified_acc_108" in capsys.readouterr().out
    for option, said in (("--lr=nan", "nan"), ("--x=1", "--x"), ("--activation=maxmin --width=5", "even"),
                         ("--lr=1e20 --method=none", "loss is"), ("--lr=20", "no soft cap"),
                         ("--optimizer=adamw --weight_decay=1e3", "weight_decay")):
        one_line(run_cifar(*short, *option.split()), said)
    monkeypatch.setattr(cifar, "largest_gain", lambda model: 1e9)
    one_line(run_cifar(*short, "--max_steps=1"), "AN ATTACK IS ABOVE THE CERTIFICATE")
    line = torch.load("out/cifar10/model.pt", weights_only=True)["log"][-1]
    assert line["log10_certified"] is line["certified_acc_36"] is None


def test_the_sweep_on_images_repeats_no_run(images, monkeypatch):
    """A sweep finds all its runs in the records; and a run that they lack is made like them."""
    done = cifar.read_lines(cifar.RECORDS)
    shutil.copy(cifar.RECORDS, "some.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "RECORDS", Path("some.jsonl"))
        patch.setattr(cifar, "train", None)
        assert run_main(cifar, patch, "sweep") is None
    one_line(run_main(cifar, monkeypatch, "sweep", "x"), "cifar-grid")
    assert run_main(cifar, monkeypatch, "prepare") is None
    monkeypatch.setattr(cifar, "RECORDS", Path("new.jsonl"))
    few = {"preset": "cifar10", "width": 16, "max_steps": 2, "eval_interval": 1, "dtype": "float32"}
    record = cifar.run("cifar-pairs", few)
    assert cifar.read_lines(Path("new.jsonl")) == [json.loads(json.dumps(record))]
    assert {*record} >= {*next(r for r in done if r["part"] == "cifar-pairs")} - {"device"}
    assert "loss is" in cifar.run("cifar", few | {"lr": 1e20, "method": "none"})["error"]


def test_no_attack_exceeds_the_certificate_of_the_mlp():
    for seed in range(6):
        net, config = mlp(20, 16, 5, seed, activation=("relu", "maxmin")[seed % 2])
        for W in net.weights:
            W.data *= 10 ** random.Random(seed).uniform(-0.5, 0.5)
        certified = math.log10(math.prod(rms_norm(W).item() for W in net.weights))
        assert certified - 1.5 < math.log10(cifar.largest_gain(net)) <= certified
    for W in net.weights:  # where the bound is reached: all units on
        W.data = 2 * math.sqrt(W.shape[0] / W.shape[1]) * torch.eye(*W.shape)
    assert 0.99 * 8 * math.sqrt(20 / 16 * 16 / 5) / 2 < cifar.largest_gain(net) <= 8 * (1 + 1e-6)


def test_certified_is_what_no_change_alters():
    """A linear net: up to the distance to the nearest decision boundary, to which the attack comes."""
    net, config = mlp(8, 8, 3)
    for W in net.weights[:-1]:
        W.data = torch.eye(8)
    x = torch.rand(50, 8) + 1  # ReLU does nothing there
    weights = cifar.checked_weights(net, config)
    z = cifar.network(weights, x.double(), config)
    y, W = z.argmax(dim=1), weights[-1]
    at = lambda eps, y=y, z=z, weights=weights: cifar.certified(weights, z, y, config, eps)
    to_others = (z.gather(1, y[:, None]) - z) / (W[y][:, None] - W).norm(dim=-1)  # NaN to its own class
    for i, r in enumerate(to_others.nan_to_num(math.inf).amin(dim=1).tolist()):
        assert at(0.999 * r)[i] and not at(1.001 * r)[i]
        assert cifar.pgd(net, x[i:i + 1], y[i:i + 1], 0.99 * r).all()
        assert not cifar.pgd(net, x[i:i + 1], y[i:i + 1], 1.2 * r + 0.01).any()
    assert not at(0.0, (y + 1) % 3).any() and not at(math.nan).any() and not at(0.0, z=z * math.nan).any()
    assert not at(0.0, z=0 * z, weights=[0 * W for W in weights]).any()  # all logits are equal


MLP_EDITS = {
    "5 * relu": lambda net, _: setattr(net, "activation", lambda z: 5 * F.relu(z)),
    "layer norm": lambda net, _: net.register_forward_pre_hook(lambda net, x: F.layer_norm(*x, (12, ))),
    "bias": lambda net, _: net.register_forward_hook(lambda net, x, y: y + 1),
    "unused": lambda net, _: net.register_parameter("b", torch.nn.Parameter(torch.zeros(3))),
    "scale": lambda net, _: setattr(net, "logit_scale", 4.0),
    "no proof": lambda _, config: setattr(config, "activation", "gelu"),
    "nan": lambda net, _: net.weights[0].data[0, 0].fill_(math.nan)}


@pytest.mark.parametrize("edit", MLP_EDITS)
def test_an_edited_mlp_has_no_certificate(edit):
    net, config = mlp(12, 8, 3, logit_scale=2.0)
    assert len(cifar.checked_weights(net, config)) == 3
    MLP_EDITS[edit](net, config)
    with pytest.raises(UserError, match="not finite" if edit == "nan" else "something else than `network`"):
        cifar.checked_weights(net, config)


def test_cifar_needs_no_float64(here):
    """On a device without it, as Apple's GPUs are."""
    with GPU():
        for options in {}, dict(optimizer="adamw", lr=1e-3), dict(activation="maxmin", radius=0.1):
            config = cifar.Config(width=8, max_steps=2, batch_size=4, w_max=1.0, dtype="float32", **options)
            net, _ = cifar.train(config, dict.fromkeys(cifar.BATCHES, patterns(60)), torch.device("meta"))
            assert net.weights[0].device.type == "meta"


# --- Sweeps, records, tables and figures --------------------------------------------------------------------

def test_json_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    assert parts.read_lines(path) == []
    parts.append_line(path, {"a": math.nan, "b": [1, -math.inf, {"c": (2.5, None)}]})
    assert path.read_text() == '{"a": null, "b": [1, null, {"c": [2.5, null]}]}\n'
    for torn in (b'{"a": 1, "b', b'\x80\xff', b'{"a": 2}'):  # the last one lacks its line's end alone
        path.write_bytes(b'{"a": 0}\n[1]\n\n' + torn)
        parts.append_line(path, {"a": 3})
        parts.append_line(path, {"a": 4})
        whole = [{"a": 2}] if torn == b'{"a": 2}' else []
        assert parts.read_lines(path) == [{"a": 0}, *whole, {"a": 3}, {"a": 4}]


@pytest.mark.parametrize("name", parts.PARTS)
def test_a_sweep_of_what_is_recorded_makes_no_run(name):
    """Every part asks for what is in the records, by the choices from them; and a part's records are what it
    asks for, but for some learning rates.
    """
    part, asked = parts.PARTS[name], []
    records = parts.current(parts.RESULTS / f"{part.records}.jsonl")

    def run(options):
        found = [record for record in records if record["options"] == part.complete(options)]
        assert found or name in ("final", "short", "radius"), options
        asked.append(found[0] if found else {"error": "it is not there", "options": options})
        return asked[-1]

    for job in part.jobs():
        part.search(run, job)
    done = parts.of_part(name)
    share = 0.2 if name == "final" else 0.9
    assert sum(record in asked for record in done) > share * len(done)


def test_a_sweep_runs_each_run_once_and_goes_on(data, monkeypatch):
    for path in HERE.glob("*.py"):
        Path(path.name).symlink_to(path)
    for module, name in ((sweep, "ROOT"), (sweep, "RESULTS"), (sweep, "RUNS"), (measure, "ROOT")):
        monkeypatch.setattr(module, name, data)
    monkeypatch.setattr(measure, "attack", partial(certify.attack, steps=9))
    options = {**TINY, "n_layer": 2, "eval_interval": 1, "max_steps": 3, "w_max": 2.0, "lr": 0.1}
    del options["out_dir"]
    done, records = sweep.run("final", options, 1), data / "shakespeare.jsonl"
    net, ckpt = model.load_checkpoint(done["config"]["out_dir"] + "/ckpt.pt")
    scores = train.evaluate(net, prepare.open_data("data/shakespeare", like=ckpt["meta"])[2])
    assert {name: done[name] for name in scores} == pytest.approx(scores)
    assert done["trace"]["step"] == [1, 2, 3] and len(done["log10_radii"]) == 41 and "alarm" not in done
    assert done["log10_attack"] <= done["log10_certified"] == pytest.approx(certified(net))
    assert done["log10_certified_ball"] < done["log10_certified"] and done["largest_norm"] < done["ball"]
    hot = sweep.run("grid", options | {"method": "none", "lr": 1e30}, 1)
    assert "loss is" in hot["error"]
    monkeypatch.setattr(sweep, "train", None)
    assert sweep.run("final", options, 1) == done and parts.read(records) == [done, hot]
    records.unlink()  # as if stopped while it was measured: it is not trained again
    monkeypatch.setattr(sweep, "measurements", lambda *_: {"log10_attack": 99.0})
    for _ in range(2):  # an attack above the certificate is an alarm, at once and when it is found again
        with pytest.raises(UserError, match="AN ATTACK, 10.99.0000, IS ABOVE ITS CERTIFICATE"):
            sweep.run("grid", options, 1)
    alarm, = parts.read(records)
    assert alarm["trace"] == done["trace"] and alarm["log10_certified"] == math.inf


CHILD = """import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: open("ended", "w").close() or sys.exit())
open("begun", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("name", ("SIGTERM", "SIGINT"))
def test_a_sweep_that_is_ended_ends_its_children(tmp_path, name):
    (tmp_path / "train.py").write_text(CHILD)
    code = (f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE / 'results')!r}]; import parts, sweep; "
            "sweep.ROOT = sweep.RUNS = sweep.RESULTS = sweep.Path('.').resolve(); "
            "sweep.PARTS = {'p': parts.Part(lambda: [{}, {'seed': 1}], records='books')}; sweep.main()")
    process = start(tmp_path, sys.executable, "-c", code, "--jobs=1")
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and printed == "sweep.py: stopped; the same command goes on\n"
    assert (tmp_path / "ended").exists() and not (tmp_path / "books.jsonl").exists()


def test_a_failed_job_is_said_at_once_and_counted(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text("raise SystemExit('train.py: boom')\n")
    for name in ("ROOT", "RUNS", "RESULTS"):
        monkeypatch.setattr(sweep, name, tmp_path)
    part = parts.Part(lambda: [{}, {"seed": 1}, {"w_max": -1.0}], records="books")
    monkeypatch.setattr(sweep, "PARTS", {"p": part})
    one_line(run_main(sweep, monkeypatch, "grids"), "the parts are p, not grids")
    one_line(run_main(sweep, monkeypatch), "3 jobs failed", "as said above")
    said = capsys.readouterr().out
    assert said.count("p: FAILED: ") == said.count("\n") == 3
    assert said.count("failed: train.py: boom (see ") == 2 and said.count("w_max=-1.0 must be positive") == 1


@pytest.mark.parametrize("draw", plot.FIGURES, ids=lambda draw: draw.__name__)
def test_figures_can_be_drawn(draw):
    """An extra for those who have matplotlib."""
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot
    draw(plot.load(), pyplot).draw_without_rendering()
    assert (plot.RESULTS / f"{draw.__name__}.png").exists()


def test_tables_in_the_results_come_from_the_records():
    """Every table that plot.py makes stands in a text as it is, and between markers stands nothing else."""
    made, texts = plot.all_tables(plot.load()), [path.read_text() for path in plot.TEXTS]
    assert len(made) > 30 and [plot.fill(text, made) for text in texts] == texts, "run python results/plot.py"
    for title, table in made.items():
        assert table in "".join(texts), f"{title} is in no text: run python results/plot.py"


@pytest.mark.parametrize("module, argv, names", (
    (certify, "out/ckpt.pt", "steps"), (plot, "", "tables"), (sweep, "", "jobs"),
    (bench, "step", "batch_size lr preset"), (bench, "", "methods")))
def test_bad_values_are_one_line(data, monkeypatch, module, argv, names):
    refuses_bad_values(monkeypatch, module, argv, names)
