"""Attack the certificate of a checkpoint, and certify its predictions.

    python results/certify.py out/shakespeare/ckpt.pt            # norms, bounds, an attack, certified radii
    python results/certify.py out/shakespeare/ckpt.pt --json     # the same for programs
    python results/certify.py out/tight/ckpt.pt --deciding       # and which last tokens decide a prediction

An attack from below and the certificate of constrain.py from above say where the Lipschitz constant is. An
attack above a certificate would be a fault of one of them: it is said in capitals, what was certified is
null in JSON, and the exit code is 1. All is in float64 on the CPU.
"""
import math
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from constrain import (EPS, PROVED, RADII, ROUNDING, body_bound, bound_lines, certificate, distances,
                       embedding_norm, exact_model, head_weights, layer_norms, lead, log10, matrices,
                       mlp_half, norm_lines, paper_bounds, refused, rms_norm, rows_apart, sigma, value_norms)
from model import later, load_checkpoint, onto_ball, rms, rotate, unit
from optim import keep_memory
from prepare import Parser, UserError, number, one_line_errors, open_data, say, to_json

# --- The attack on the Lipschitz constant -------------------------------------------------------------------

@torch.inference_mode(False)
@torch.enable_grad()
def ascend(f, X, R, steps=100):
    """The largest gain |df_T|_rms / max_t |dx_t|_rms, T the last token, found by gradient ascent over X and
    the direction dX.

    f maps (B, T, n) to (B, T, m), each of the B sequences by itself; X (B, T, n) are B starting points, which
    stay in the ball {|x_t|_rms <= R}. Given the direction u in which the output moves, the best dX is J^T u
    with every token scaled to norm 1, by duality; given dX, u is that of J dX. These two take turns, while X
    climbs u^T J(X) dX.
    """
    X, best = onto_ball(X.clone(), R).requires_grad_(), 0.0
    optimizer = torch.optim.Adam([X], maximize=True)
    with sdpa_kernel(SDPBackend.MATH):  # the one with second derivatives
        for step in range(steps + 1):
            optimizer.param_groups[0]["lr"] = 0.1 * R * (1 - step / (steps + 1))
            Y = f(X)[:, -1]  # (B, m): with causal attention it sees all tokens
            if step == 0:
                u = unit(torch.randn(Y.shape, generator=torch.Generator().manual_seed(0), dtype=X.dtype))
            v = torch.zeros_like(Y).requires_grad_()
            pulled, = torch.autograd.grad(Y, X, v, create_graph=True)  # J^T v, whose derivative by v is J
            for _ in range(5 if step == 0 else 1):
                dX = unit(torch.autograd.grad(Y, X, u, retain_graph=True)[0])
                dY, = torch.autograd.grad(pulled, v, dX, retain_graph=True)
                u = unit(dY)
            best = max(best, (rms(dY) / rms(dX).amax(dim=1).clamp_min(1e-30)).max().item())
            gain = (torch.autograd.grad(Y, X, u, create_graph=True)[0] * dX).sum(dim=(1, 2))  # u^T J dX
            height = gain.clamp_min(1e-30).log().sum() + 0 * X.sum()  # J of a linear map does not depend on X
            X.grad, = torch.autograd.grad(height, X)
            optimizer.step()
            X.data = onto_ball(X.data, R)
    return best


def attack(model, block_size=32, restarts=8, steps=100, tokens=None):
    """A lower bound on the Lipschitz constant that the certificate bounds from above: the largest gain that
    `ascend` finds on sequences of block_size tokens in the same ball, in float64. Half of the restarts begin
    at embeddings of text, cut from tokens (N,) or else of random ids, half at random points.
    """
    net, g = exact_model(model), torch.Generator().manual_seed(0)
    n, R = min(block_size, net.config.block_size), embedding_norm(net)
    ids = torch.randint(net.config.vocab_size, (restarts // 2, n), generator=g)
    if tokens is not None and len(tokens) > n:
        ids = tokens[torch.randint(len(tokens) - n, (restarts // 2, 1), generator=g) + torch.arange(n)]
    X = torch.randn(restarts, n, net.config.n_embd, generator=g, dtype=torch.float64)
    X = R * unit(X)
    X[:restarts // 2] = net.wte.weight[ids]
    return ascend(net.forward_embeddings, X, R, steps)


# --- Certified predictions, by the constant; and the attack on predictions ----------------------------------

def whole_windows(model, tokens, most=16):
    """Inputs (B, n) and targets (B n,) that predict every token of (N,) but the first once, in order: at most
    so many windows of block_size at a time, and at the end of the text a shorter one.
    """
    T = model.config.block_size
    n = (len(tokens) - 1) // T * T
    B = max(1, min(most, 2 ** 26 // (T * model.config.vocab_size)))
    edges = sorted({*range(0, n, B * T), n, len(tokens) - 1})
    for a, b in zip(edges, edges[1:]):
        yield tokens[a:b].view(-1, min(T, b - a)), tokens[a + 1:b + 1]


def spread(tokens, n, count):
    """So many windows of n tokens, from all over tokens (N,): (count, n)."""
    return torch.stack([tokens[i:i + n] for i in torch.linspace(0, len(tokens) - n, count).long()])


def clear_leads(z):
    """Of logits z (N, V) the largest one's label (N, 1), and by how much it is above all others (N, V), less
    what rounding may have added: a tie has no lead.
    """
    top = z.argmax(dim=-1, keepdim=True)
    return top, z.gather(1, top) - z - ROUNDING * z.abs().amax(dim=-1, keepdim=True)


@torch.no_grad()
def predictions(net, X):
    """What each prediction at embeddings X (B, T, d) can bear, and the prediction: (B T,) both.

    If the head's input h moves by |dh|_rms <= delta, the difference of logits i and j moves by at most
    logit_scale |w_i - w_j|_2 sqrt(d) delta, w_i being the head's rows; so a prediction i bears any delta up
    to min_j (z_i - z_j) / (logit_scale |w_i - w_j|_2 sqrt(d)).
    """
    W = net.head.weight
    top, leads = clear_leads(net.forward_embeddings(X).flatten(0, 1))
    leads = leads / rows_apart(W, top[:, 0]).clamp_min(1e-300)
    nearest = leads.scatter(1, top, math.inf).amin(dim=1)
    return nearest / (net.config.logit_scale * math.sqrt(W.shape[1])), top[:, 0]


def margins(model, tokens):
    """What each prediction of tokens (N,) can bear, and whether it is right, in float64: two tensors (N -
    1,), every token but the first predicted once in windows of block_size.
    """
    net, tokens = exact_model(model), tokens.cpu()
    found = [(*predictions(net, net.wte(x)), y) for x, y in whole_windows(net, tokens)]
    return torch.cat([bears for bears, _, _ in found]), torch.cat([top == y for _, top, y in found])


def log10_radii(model, bears, layers):
    """log10 of the certified radius of predictions that bear a change `bears` (N,) of the head's input: no
    change of the embeddings with max_t |dx_t|_rms below the radius alters them. The ball grows by the radius,
    and the bound K with it: the radius is the largest r with r K(R_0 + r) <= bears, K without the head; found
    on a grid of 1 %, rounded down.
    """
    R, bears = embedding_norm(model), torch.where(bears > 0, bears, 0.0)  # what is unknown bears nothing
    reached = lambda x: x + body_bound(layers, R + 10 ** x)[0]  # log10 of r K(R_0 + r) at r = 10^x
    K, wanted = body_bound(layers, R)[0], bears.clamp(1e-30, 1e30).log10()
    if not math.isfinite(K):
        return torch.where(bears > 0, -K, -math.inf)  # any change is borne, or none
    low, high = wanted.min().item() - K, wanted.max().item() - K  # r K(R_0) <= bears up to here
    while reached(low) > wanted.min():
        low -= 1
    grid = torch.arange(low, high + 0.0043, 0.0043, dtype=torch.float64)
    at_grid = torch.tensor([reached(x) for x in grid.tolist()], dtype=torch.float64)
    radii = grid[torch.searchsorted(at_grid, wanted, right=True) - 1]
    return torch.where(bears >= 1e-30, radii, -math.inf)  # a tie bears nothing


@torch.inference_mode(False)
@torch.enable_grad()
def stays_largest(model, X, y, radius, steps=20):
    """Which labels y (B, n) have the largest logits at the last n of embeddings X (B, T, d), and keep them
    under projected gradient ascent (Madry et al. 2018) on X, all tokens of a sequence changed at once, each
    within RMS norm `radius`, a float or (B, 1, 1): (B, n), bool. What climbs is the sum of z_j - z_y, j the
    largest wrong logit, over the labels not yet turned over.
    """
    y = y.clone()  # made in inference mode it could not be saved for a backward pass
    change, right = torch.zeros_like(X), torch.ones_like(y, dtype=torch.bool)
    for _ in range(steps + 1):  # looks at X itself and after every step
        change.requires_grad_()
        z = model.forward_embeddings(X + change)[:, -y.shape[1]:]  # (B, n, V)
        leads = lead(z, y)
        right &= leads > 0
        gradient, = torch.autograd.grad((leads * right).sum(), change)
        change = onto_ball(change.detach() - 2.5 * radius / steps * unit(gradient), radius)
    return right


def attacked(model, tokens, radius):
    """Which predictions of tokens (N,) are right and stay so under an attack: (N - 1,), bool."""
    windows = whole_windows(model, tokens)
    stay = [stays_largest(model, model.wte(x).detach(), y.view_as(x), radius) for x, y in windows]
    return torch.cat([right.flatten() for right in stay]).cpu()


def attack_radii(model, X, halvings=10):
    """log10 of radii within which an attack alters the last prediction at embeddings X (B, T, d), to within
    one of 2^halvings parts of [-9, 1], inf where none does: (B,). No certified radius can be larger.
    """
    top = model.forward_embeddings(X)[:, -1:].argmax(dim=-1)
    low, high = (torch.full((len(X), 1, 1), x, dtype=X.dtype) for x in (-9.0, 1.0))
    for _ in range(halvings):
        middle = (low + high) / 2
        stays = stays_largest(model, X, top, 10 ** middle, steps=10)[..., None]
        low, high = torch.where(stays, middle, low), torch.where(stays, high, middle)
    return torch.where(high < 1, high, math.inf)[:, 0, 0]


# --- Radii at one text --------------------------------------------------------------------------------------
# What its tokens' changes can do at the attention that is there. Token by token, delta (B, T) bounds the L2
# norm of the change of a token's vector; each function below is one bound of the proof. `at` is what facts_at
# says of a block at the text.

def local_radii(net, norms, X, y=None, last=None):
    """log10 of the certified radii of the predictions at embeddings X (B, T, d), by log10_radii and, for all
    or those of the labels y (B T,), or so many `last` ones, by bounds at this text, and the predictions,
    three tensors (B, T). The second is never smaller, and many times larger where attention looks at content.
    `net` is in float64, norms are its block_norms. A grid of 0.1 is searched upwards, each prediction until
    it is not certified.
    """
    bears, top = predictions(net, X)
    by_constant = log10_radii(net, bears, [norm["layer"] for norm in norms])
    radii, facts = by_constant.clone(), facts_at(net, norms, X)
    known = radii[radii.isfinite()]
    log10_r = max(known.min().item(), -8.0) if len(known) else 0.0  # below, sums cancel to what rounding left
    _, T, d = X.shape
    held = (torch.arange(T) >= T - (last or T)).repeat(len(X))
    if y is not None:
        held &= top == y
    while log10_r < 9 and held.any():
        held = certified_under(net, facts, 10 ** log10_r * math.sqrt(d), held)
        radii[held] = radii[held].clamp_min(log10_r)
        log10_r += 0.1
    return [found.view(X.shape[:2]) for found in (by_constant, radii, top)]


def block_norms(net, layers):
    """Of each block, with its layer_norms, what the bounds need of its weights: spectral norms, those of
    heads (H,); root_q, root_k and root_v (H, d_head, d_head), |root y| = |W^hT y|; and, if its MLP has two
    layers, mlp_half, with half(x) = A x + U f(V x), and parts (hidden, d + 2 H d_head): V times the maps by
    which mid depends on dx_t and, of each head, on the two sums of attention_change, of the first as W_v^h
    sees it; rows_of_parts (1 + 2 H, hidden) has the norms of their rows, and what rounding may take off.
    """
    c, root, found = net.config, lambda W: torch.linalg.qr(W.mT, mode="r").R, []
    for block, layer in zip(net.blocks, layers):
        (*Wqk, Wv), Wo, Wo_h = head_weights(block.attn, c.n_head)
        o, v, OV, beside = value_norms(Wo_h, Wv)
        norm = {"block": block, "c": c, "scale": c.softmax_scale * c.n_head / c.n_embd, "layer": layer,
                "half": None, "Wo": Wo, "root_v": root(Wv),
                "sigma_v": v, "sigma_o": sigma(Wo), "sigma_o_h": o, "sigma_ov_h": OV, "sigma_ov": beside}
        for name, W in zip("qk", Wqk):
            norm |= {f"sigma_{name}": sigma(W), f"root_{name}": root(W)}
        if not block.mlp.mid:
            A, U, V, f = mlp_half(block.mlp, c.alpha, PROVED[c.activation])
            VO = c.alpha * c.attn_scale * V @ Wo_h                        # (H, hidden, d_head)
            parts = (1 - c.alpha) * V, *VO @ norm["root_v"].mT, *VO
            off = V.numel() * EPS * c.alpha * c.attn_scale * o
            off = torch.cat((off.new_zeros(1), off * v, off))[:, None] * V.norm(dim=1)
            norm |= {"half": (A, U, V, f), "rows": V.norm(dim=1), "sigma_V": sigma(V), "sigma_U": sigma(U),
                     "parts": torch.cat(parts, dim=1), "widths": torch.tensor([p.shape[1] for p in parts]),
                     "rows_of_parts": torch.stack([part.norm(dim=1) for part in parts]) + off}
        found.append(norm)
    return found


@torch.no_grad()
def facts_at(net, norms, X):
    """What the bounds need of a text, embeddings X (B, T, d) in float64, whatever the radius: beside its
    block_norms for each block its input x, that with attention, mid, and that of the ball, out, (B, T, d),
    for all but the last near_gain, and for every head attention p (B, H, T, T) of queries t to keys s and,
    unless scores are free of content, with RoPE's rotations R: |W_k^T R_s^T q_t|, |W_q^T R_t^T (k_s - E_p
    k)|, |v_s - o_t| and sigma(Cov_p(v, k) R_t W_q), rounded up, as they may be of what cancels.
    """
    T, x, facts, alpha, ball = X.shape[1], X, [], net.config.alpha, net.config.ball
    cos, sin, seen = net.cos[:T], net.sin[:T], ~later(T, X.device)
    for block, norm in zip(net.blocks, norms):
        qk, v, bias = block.attn.heads(x, cos, sin)
        scores = norm["scale"] * qk[0] @ qk[1].mT if qk else torch.zeros(len(v), 1, T, T, dtype=x.dtype)
        p = (scores if bias is None else scores + bias).masked_fill(~seen, -math.inf).softmax(dim=-1)
        mid = (1 - alpha) * x + alpha * block.attn(x, cos, sin)
        at = SimpleNamespace(x=x, mid=mid, p=p, o=p @ v, **norm)
        if qk:
            (q, k), eye = qk, torch.eye(v.shape[-1], dtype=x.dtype)
            back = rotate(eye.expand(1, T, *eye.shape), cos, sin)[0]                 # R_t^T, of each t
            of_q, of_k = (root[:, None] @ back for root in (at.root_q, at.root_k))   # (H, T, d_head, d_head)
            mean_k, size = p @ k, x.norm(dim=-1).cummax(dim=1).values[:, None]       # (B, 1, T)
            off = (T + v.shape[-1] * x.shape[-1]) * EPS * (at.sigma_q * at.sigma_k)[:, None] * size
            at.q = through(of_k, q, 0 * q).mT + off[..., None]                       # off is (B, H, T)
            at.k = through(of_q, k, mean_k) + off[..., None]
            pairs = (v[..., :, None] * k[..., None, :]).flatten(-2)                  # (B, H, T, d_head^2)
            cov = p @ pairs - (at.o[..., :, None] * mean_k[..., None, :]).flatten(-2)
            at.cov = sigma(cov.unflatten(-1, eye.shape) @ of_q.mT) + off * at.sigma_v[:, None] * size
            at.apart = distances(at.o, v).masked_fill(~seen, 0.0)
        if at.half is not None:
            at.z = mid @ at.half[2].T                                                # (B, T, hidden)
            at.slope = derivative(at.half[3], at.z)
        at.near, at.gain = near_gain(at) if len(facts) < len(norms) - 1 else (None, None)
        facts.append(at)
        x = at.out = (1 - alpha) * mid + alpha * block.mlp(mid)
        x = x if ball is None else onto_ball(x, ball)
    return facts


def through(M, y, c):
    """|M_t (y_s - c_t)| of y and c (B, H, T, n) for matrices M (H, T, n, n): (B, H, T, T), head by head."""
    heads = zip(M, y.transpose(0, 1), c.transpose(0, 1))
    return torch.stack([((y[:, None] - c[:, :, None]) @ M.mT).norm(dim=-1) for M, y, c in heads], dim=1)


@torch.no_grad()
def certified_under(net, facts, delta, asked):
    """Which of the predictions asked for (B T,), at the text of facts_at, no change of each token's embedding
    by at most delta, (B, T) or one number for all, in L2 norm alters: (B T,).

    Block by block delta goes through the norms of attention, MLP half and ball. With MLPs of two layers the
    change of a lead is then traced back through the blocks as a linear function, for which these changes only
    bound what is not linear (traced_back). The last block's ball multiplies all logits of a token by one
    positive number, which changes no prediction, so it is left out there.
    """
    path, delta = [], delta * torch.ones_like(facts[0].x[..., 0])  # of each block its facts and what moves
    for at in facts:
        near, beyond = attention_change(at, delta)
        path.append((at, delta, near, beyond))
        delta = ball_change(at, mlp_change(at, near.mid)) if at is not facts[-1] else None
    return leads_hold(at, net.head.weight, near, asked, partial(traced_back, net, path))


NEAR = 0.02  # of a token's norm: a radius of 0.01 takes tight-content's tokens about so far


def near_gain(at):
    """Bounds (B, T), near and gain: |half(y) - half(mid)| <= gain |y - mid| while |y - mid| <= near. With the
    slopes there half(y) - half(mid) = (K + U E V) (y - mid), K = A + U middle V, |E| <= off; so sqrt(l)
    sigma([L^-1 K; off^1/2 V]) is a gain for any L L^T = l I - U off U^T (proof: results/certificate.md, MLP
    halves near a text). That of mlp_norms if it is smaller, d is large or the MLP has more layers.
    """
    near = NEAR * at.mid.norm(dim=-1)
    most = torch.full_like(near, at.layer.mlp_gain)
    if at.half is None or at.mid.shape[-1] > 512:
        return near, most
    (A, U, V, f), gains = at.half, []
    tokens = at.z.flatten(0, 1), at.slope.flatten(0, 1), at.rows * near.flatten()[:, None]
    for z, slope, reach in zip(*(part.split(16) for part in tokens)):
        middle, off = (part[:, None] for part in slopes(f, z, slope, reach))           # (16, 1, hidden)
        l = (at.layer.mlp_gain / 4 * at.sigma_U / at.sigma_V + at.sigma_U ** 2 * off.amax(-1))[..., None]
        L, _ = torch.linalg.cholesky_ex(l * torch.eye(len(A)) - (U * off) @ U.T)
        known = torch.linalg.solve_triangular(L, A + (U * middle) @ V, upper=False)
        gains.append(l[:, 0, 0].sqrt() * sigma(torch.cat((known, off.mT.sqrt() * V), dim=1)))
    gain = torch.cat(gains).view(near.shape)
    return near, torch.where(gain < most, gain, most)                                   # it may be NaN


def mlp_change(at, mid):
    """A bound (B, T) on the change of the MLP half's output, for changes mid (B, T) of its input."""
    return torch.where(mid <= at.near, at.gain, at.layer.mlp_gain) * mid


def ball_change(at, delta):
    """Behind the ball, if there is one, of L2 radius rho: delta or, where the token and all within delta of
    it are longer than m >= rho, delta rho / m, as the derivative is rho (I - x x^T / |x|^2) / |x|.
    """
    if at.c.ball is None:
        return delta
    rho = at.c.ball * math.sqrt(at.out.shape[-1])
    return delta * (rho / (at.out.norm(dim=-1) - delta).clamp_min(rho))


# How far mid moves at most: its L2 norm (B, T) and, for an MLP of two layers, its products with the rows of V
# (B, T, hidden), with the slopes of f so near, and the moves of lead_rest (B, T, 1 + 2 H)
Near = namedtuple("Near", "mid rows middle off moves")


def near_mid(at, mid, rows=math.inf, moves=None):
    """Near, for changes of at.mid by at most mid (B, T) and, if more is known, of V at.mid by rows."""
    if at.half is None:
        return Near(mid, None, None, None, None)
    rows = (mid[..., None] * at.rows).clamp_max(rows)
    return Near(mid, rows, *slopes(at.half[3], at.z, at.slope, rows), moves)


def attention_change(at, delta):
    """(Near, beyond), if each token of a block's input moves by at most delta (B, T). `beyond` bounds what is
    not of first order in both sums of a head, (B, T, H) each, and is empty if scores are free of content:

      o' - o = sum_s p'_s dv_s + sum_s (p' - p)_s (v_s - o), as the p'_s, and the p_s, sum to 1.

    The first sum is W_v times a vector of norm <= value_input, the second of norm <= score_output. Over
    heads, c_h of the first give at most each of sum_h sigma(W_o^h W_v^h) c_h, sigma([W_o^1 W_v^1 ...]) |c|
    and sigma(W_o) |sigma_v c|, and S_h of the second each of sum_h sigma(W_o^h) S_h and sigma(W_o) |S|. Times
    a row r of V they give at most sum_h |r W_o^h W_v^h| c_h and sum_h |r W_o^h| S_h.
    """
    across = lambda c: c.square().sum(1).sqrt()
    total = lambda sigma_h, c: (sigma_h[:, None] * c).sum(1)
    inputs, beyond = (at.p * delta[:, None, None, :]).sum(-1), ()                           # (B, H, T)
    outputs = 0 * inputs
    if hasattr(at, "q"):
        by_q, by_k, cross = score_change(at, delta)
        e = by_q + by_k + cross
        most, off = probability_ratio(at, e)
        inputs, beyond_inputs = value_input(at, most, off, delta)
        outputs, beyond_outputs = score_output(at, e, by_k, cross, off, delta)
        beyond = beyond_inputs.mT, beyond_outputs.mT
    of_scores = torch.minimum(total(at.sigma_o_h, outputs), at.sigma_o * across(outputs))
    of_values = torch.minimum(torch.minimum(total(at.sigma_ov_h, inputs), at.sigma_ov * across(inputs)),
                              at.sigma_o * across(at.sigma_v[:, None] * inputs))
    alpha, scale = at.c.alpha, at.c.attn_scale
    mid = (1 - alpha) * delta + alpha * scale * (of_values + of_scores)
    moves = torch.cat((delta[..., None], inputs.mT, outputs.mT), dim=-1)                 # (B, T, 1 + 2 H)
    rows = moves @ at.rows_of_parts if at.half is not None else math.inf                 # (B, T, hidden)
    return near_mid(at, mid, rows, moves), beyond


LARGEST = 300.0  # a change of a score by more says nothing; to twice as much no p may have become 0


def score_change(at, delta):
    """Bounds (B, H, T, T) on the parts b <dq_t, k_s - c>, b <q_t, dk_s> and b <dq_t, dk_s> of the change of
    the scores b <q_t, k_s>, b = softmax_scale / d_head, but for b <dq_t, c>, c = E_p k, which is the same for
    all keys and which softmax does not see (proof: results/certificate.md, At a text): b |W_q^T R_t^T (k_s -
    c)| delta_t, b |W_k^T R_s^T q_t| delta_s and b sigma_q delta_t sigma_k delta_s. 0 for keys that are not
    seen, infinite together from LARGEST on. The bias depends on positions alone.
    """
    delta_t, delta_s = delta[:, None, :, None], delta[:, None, None, :]
    sizes = at.k * delta_t, at.q * delta_s, (at.sigma_q * at.sigma_k)[:, None, None] * delta_t * delta_s
    by_q, by_k, cross = (at.scale * size.tril() for size in sizes)
    return by_q, by_k, torch.where(by_q + by_k + cross < LARGEST, cross, math.inf).tril()


def mean(at, f):
    """The mean of f (B, H, T, T) over keys under attention, infinite if f is: (B, H, T, 1)."""
    return (at.p * f).sum(-1, keepdim=True).nan_to_num(math.inf, math.inf)


def probability_ratio(at, e):
    """Bounds on p'_s / p_s and on its distance from 1, if scores change by at most e: p'_s = p_s exp(da_s) /
    E exp(da) lies between p_s exp(-e_s) / E exp(e) and p_s exp(e_s) / E exp(-e), E being the mean under p.
    """
    up, down = e.exp(), (-e).exp()
    most, least = up / mean(at, down), down / mean(at, up)
    return most, torch.maximum(most - 1, 1 - least)


def value_input(at, most, off, delta):
    """Bounds (B, H, T) on |sum_s p'_s dx_s|, the larger weights times delta_s, at most the largest; and on
    |sum_s (p' - p)_s dx_s|. `most` and `off` are those of probability_ratio.
    """
    weighed, moved = (mean(at, ratio * delta[:, None, None, :])[..., 0] for ratio in (most, off))
    return torch.minimum(weighed, delta.cummax(dim=1).values[:, None]), moved


def score_output(at, e, by_k, cross, off, delta):
    """A bound (B, H, T) on |sum_s (p' - p)_s (v_s - o)|, the least of three:
    - max_s |v_s - o|, as sum_s p_s (v_s - o) = 0 and so it is sum_s p'_s (v_s - o);
    - sum_s |p'_s - p_s| |v_s - o|, with `off` of probability_ratio;
    - with p'_s = p_s (1 + da_s - E da + rem_s) it is sum_s p_s (da_s + rem_s) (v_s - o): of da_s, b <dq, k_s>
      gives b Cov_p(v, k) dq, at most b sigma(Cov_p(v, k) R_t W_q) delta_t, the rest is at most by_k + cross;
      and |rem_s| <= exp(e_s) / (2 - E exp(e)) - 1 - e_s - E e while E exp(e) < 2, as the power series of
      exp(a_s) / (1 - E(exp(a) - 1)) without its terms of order 0 and 1 is, with plus for all signs and e for
      |a|, that of the right side; computed as a sum of what is not negative, as small ones would cancel.
    And one on what is not of first order, its part by cross and rem.
    """
    shares = mean(at, off * at.apart)[..., 0]
    grown = e.expm1()
    second = torch.where(e < 1e-3, e.square() / 2 * e.exp(), grown - e)      # exp(e) - 1 - e, from above
    grown = mean(at, grown)
    rest = (second + mean(at, second) + grown * (e + mean(at, e))) / (1 - grown)
    rest = torch.where(grown < 1, rest, math.inf)
    beyond = mean(at, (cross + rest) * at.apart)[..., 0]
    series = at.scale * at.cov * delta[:, None] + mean(at, by_k * at.apart)[..., 0] + beyond
    return torch.minimum(at.apart.amax(-1), torch.minimum(shares, series)), beyond


def leads_hold(at, W, near, asked, trace=None):
    """Where of the predictions asked for (B T,) the largest logit stays the largest wherever near it the last
    block's mid goes, for the head's rows w_j of W: (B T,). `trace` is traced_back, if embeddings move it.

    The lead over j is <w_i - w_j, out>, out = (1 - alpha) mid + alpha mlp(mid). It changes by at most |dmid|
    times |w_i - w_j| times the MLP half's gain; and for an MLP of two layers by less, see lead_gradient,
    traced_back and lead_rest. Rivals that the first of these settles are not looked at again.
    """
    mid, (top, leads) = near.mid.flatten()[:, None], clear_leads(at.out.flatten(0, 1) @ W.T)
    apart = rows_apart(W, top[:, 0])                                         # (N, V)
    enough = lambda lead, change: lead > (1 + ROUNDING) * change             # false for NaN
    held = enough(leads, at.layer.mlp_gain * apart * mid).scatter(1, top, True)
    if at.half is None:
        return asked & held.all(dim=1)
    nearest = (leads / apart.clamp_min(1e-300)).scatter(1, top, math.inf).argmin(dim=1, keepdim=True)
    first = torch.zeros_like(held).scatter(1, nearest, True) & ~held
    where = lambda n: (n // near.mid.shape[1], n % near.mid.shape[1])
    lost = ~asked                                                            # or to the nearest rival: enough
    for pairs in (*first.nonzero().split(256), *(~first & ~held).nonzero().split(256)):
        n, j = pairs[~lost[pairs[:, 0]]].unbind(1)                           # predictions, and rivals
        w = W[top[n, 0]] - W[j]
        g, off = lead_gradient(at, w, near, where(n))
        left = ~enough(leads[n, j], g.norm(dim=1) * mid[n, 0] + off)
        if trace and left.any():
            n, j, w = n[left], j[left], w[left]
            change = trace(lead_derivative(at, w, where(n)), n)
            left = enough(leads[n, j], change)                         # else the rest does not matter
            change[left] += lead_rest(at, w[left], near, where(n[left]))
            left = ~enough(leads[n, j], change)
        lost[n[left]] = True
    return ~lost


def times(a, b):
    """a b, and 0 where a is, also if b is infinite: of what has no weight nothing needs to be known."""
    return torch.where(a == 0, 0.0, a * b)


def lead_gradient(at, w, near, here):
    """g (..., d) and a bound (...) on |<w, half(x')> - <w, half(x)> - <g, x' - x>| for w (..., d), x the mid
    of tokens `here` and x' near it. With half(x) = A x + U f(V x) and the slopes of f there, g = A^T w + V^T
    middle U^T w, and the bound the smaller of sigma(V) |off U^T w| mid and sum_i off_i |U^T w|_i rows_i.
    """
    (A, U, V, _), (mid, rows, middle, off) = at.half, (known[here] for known in near[:4])
    u = w @ U
    off = off * u.abs()
    whole, by_rows = times(at.sigma_V * off.norm(dim=-1), mid), times(off, rows).sum(-1)
    return w @ A + (middle * u) @ V, torch.minimum(whole, by_rows)


def lead_derivative(at, w, here):
    """The derivative (N, d) of <w, half(x)> for w (N, d) at the mid x of tokens `here`."""
    A, U, V, _ = at.half
    return w @ A + (at.slope[here] * (w @ U)) @ V


def lead_rest(at, w, near, here):
    """For w (N, d) a bound (N,) on how far <w, half(x') - half(x)> is below <lead_derivative, x' - x> for x'
    near the mid x of tokens `here`, by an eigenvalue each.

    With u = U^T w, z = V x and a = |V (x' - x)| that is at most sum_i |u_i| curvature / 2 a_i^2 + jump_i (a_i
    - |z_i|)_+, where jump_i = |u_i| (high - low) if u_i < 0 and the kink is in reach, else 0, as a kink only
    bends upwards; and (a - |z|)_+ <= a^2 / (4 m) + m - |z| for all m >= |z|. As V (x' - x) is the sum of
    parts_k y_k, |y_k| <= moves_k, sum_i psi_i a_i^2 is at most sum_k t_k sigma([P_k / sqrt(t_k)])^2 for P_k =
    psi^1/2 parts_k moves_k and all t_k > 0: here the Frobenius norms of the P_k.
    """
    (_, U, _, f), size, reach, moves = at.half, at.z[here].abs(), near.rows[here], near.moves[here]
    u = w @ U
    m = torch.maximum(size, 0.15 * reach).clamp_min(1e-300)                  # 0.15 is about the best
    jump = f.kink * (f.slope[1] - f.slope[0]) * ((u < 0) & ~(reach <= size)) * u.abs()  # of NaN, too
    rest = (jump * (m - size)).sum(-1)
    psi = u.abs() * f.curvature / 2 + jump / (4 * m)                         # (N, hidden)
    t = (moves * (psi @ at.rows_of_parts.square().mT).sqrt()).clamp_min(1e-300)  # (N, 1 + 2 H)
    columns = (moves / t.sqrt()).repeat_interleave(at.widths, dim=1)
    for i, rows in enumerate(psi != 0):
        if rows.any():
            rest[i] += t[i].sum() * sigma(psi[i, rows].sqrt()[:, None] * at.parts[rows] * columns[i]) ** 2
    return rest


def traced_back(net, path, g, n):
    """A bound (N,) on |<g, mid' - mid>| of the last block for g (N, d), at tokens n (N,) of B T, with `path`
    as from certified_under, for MLPs of two layers. As a function of what moves, first the last block's
    input, then that of the one before, the product is sum_s <g_s, dx_s> and what is not linear: at most sum_s
    |g_s| delta_s and what the functions below add. The least over blocks; proof: results/certificate.md,
    Traced back.
    """
    T, bounds = path[0][0].x.shape[1], []
    for g, n in zip(g.split(16), n.split(16)):
        t, end = n % T, (n % T).max() + 1
        here, beyond = (n // T, slice(end)), 0.0                 # these texts, without what comes later
        traced = g.new_zeros(len(g), end, g.shape[1])
        traced[range(len(g)), t] = g
        bounds.append(torch.full((len(g), ), math.inf, dtype=g.dtype))
        for at, delta, near, of_heads in reversed(path):
            if at is not path[-1][0]:
                traced, of_ball = through_ball(at, traced, here, mlp_change(at, near.mid))
                traced, of_mlp = lead_gradient(at, traced, near, here)
                beyond = beyond + of_ball + of_mlp.sum(dim=1)
            traced, of_attention = through_attention(net, at, traced, here, of_heads)
            beyond = beyond + of_attention
            bound = times(traced.norm(dim=-1), delta[here]).sum(dim=1) + beyond
            bounds[-1] = torch.fmin(bounds[-1], bound)           # it may be NaN
    return torch.cat(bounds)


def through_attention(net, at, g, here, beyond):
    """For g (N, T, d) at the texts of `here` the h with sum_s <g_s, dmid_s> = sum_s <h_s, dx_s> to first
    order, and a bound (N,) on the rest: with u_h = alpha m W_o^hT g_s, |W_v^hT u_h| times what the first sum
    of a head of attention_change has beyond first order and |u_h| times that of the second, over all heads
    and tokens.
    """
    attn, alpha, T, rest = at.block.attn, at.c.alpha, g.shape[1], 0.0
    with torch.enable_grad():
        x = at.x[here].requires_grad_()
        pulled, = torch.autograd.grad(attn(x, net.cos[:T], net.sin[:T]), x, g)
    if beyond:
        u = alpha * at.c.attn_scale * (g @ at.Wo).unflatten(-1, (at.c.n_head, -1))        # (N, T, H, d_head)
        of_values = torch.einsum("nthi,hji->nthj", u, at.root_v).norm(dim=-1)
        inputs, outputs = (part[here] for part in beyond)
        rest = (times(of_values, inputs) + times(u.norm(dim=-1), outputs)).sum(dim=(1, 2))
    return (1 - alpha) * g + alpha * pulled, rest


def through_ball(at, g, here, delta):
    """The same for the ball, if outputs y of the MLP half move by at most delta (B, T). Outside of its radius
    rho it is rho y / |y|, with a second derivative of at most 2 rho / (sqrt(3) |y|^2), inside the identity.
    Where y may cross, dx = dy / 2 + r, |r| <= |dy| / 2, as for the projection onto any convex set.
    """
    if at.c.ball is None:
        return g, 0.0
    y, delta, rho = at.out[here], delta[here], at.c.ball * math.sqrt(g.shape[2])
    size = y.norm(dim=-1)
    shrink, axis = (rho / size)[..., None], y / size[..., None]
    outside, inside = size - delta >= rho, size + delta <= rho
    off = torch.where(outside, rho / math.sqrt(3) * (delta / (size - delta)) ** 2,
                      torch.where(inside, 0.0, delta / 2))
    across = shrink * (g - axis * (g * axis).sum(dim=-1, keepdim=True))
    pulled = torch.where(outside[..., None], across, torch.where(inside[..., None], g, g / 2))
    return pulled, times(g.norm(dim=-1), off).sum(dim=1)


def derivative(activation, z):
    """f'(z), entry by entry."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        return torch.autograd.grad(activation.f(at).sum(), at)[0]


def slopes(activation, z, slope, reach):
    """(middle, off) with |f(z') - f(z) - middle (z' - z)| <= off |z' - z| for all |z' - z| <= reach, entry by
    entry. The quotient is a mean of slopes between z and z': on this side of a kink they are on average
    within curvature / 2 times reach of f'(z), beyond it in f's interval of slopes; and beyond it is at most a
    share 1 - |z| / reach of the way.
    """
    low, high = activation.slope
    bend = activation.curvature / 2 * reach
    least, most = (slope - bend).clamp_min(low), (slope + bend).clamp_max(high)
    if activation.kink:
        beyond = (1 - z.abs() / reach).clamp_min(0)
        least, most = least + beyond * (low - least), most + beyond * (high - most)
    return (least + most) / 2, (most - least) / 2


# --- Which last tokens decide a prediction: whatever stands in the older ones' place, it is the same --------

DECIDING = (1, 2, 4, 8, 16, 32, 64, 128)


@torch.no_grad()
def deciding(net, layers, ids):
    """The smallest D of DECIDING for which no text in the place of all tokens but the last D alters a
    prediction at tokens ids (B, T), inf where none is proved: (B, n), of the last n predictions of each row,
    which see more than D tokens. `net` is in float64, layers are its layer_norms.

    A change of 0 on the last D tokens, and on an older one of the largest distance of its embedding to any
    other's, goes through the steps of certified_under, which prove the last prediction (n = 1). One layer of
    heads that are free of content proves all at once, see moves (n = T less the largest D).
    """
    T, norms, found = ids.shape[1], block_norms(net, layers), []
    position, sizes = torch.arange(T), [D for D in DECIDING if D < T]
    back = position[:, None] - position
    at_once = len(net.blocks) == 1 and not net.config.softmax_scale
    n = T - max(sizes) if at_once else 1
    table = moves(*facts_at(net, norms, net.wte(ids[:1])), net.wte.weight) if at_once else None
    for rows in ids.split(8):
        X, smallest = net.wte(rows), torch.full(rows.shape, math.inf, dtype=torch.float64)
        facts = facts_at(net, norms, X)
        if at_once:
            at = facts[0]
            moved = at.c.alpha * torch.stack([table[row, :, position].mT for row in rows])
        else:
            far = distances(X, net.wte.weight).amax(dim=-1)
        held = (position >= T - n).repeat(len(rows))
        for D in reversed(sizes):
            if at_once:
                near = near_mid(at, (moved * (back >= D)).sum(dim=-1))
                held = leads_hold(at, net.head.weight, near, held)
            else:
                held = certified_under(net, facts, far * (back[-1] >= D), held)
            smallest[held.view(rows.shape)] = D
        found.append(smallest[:, -n:])
    return torch.cat(found)


def moves(at, embeddings):
    """(V, T, T): how far another token in the place of token i at s moves attention's output at t, at most,
    if scores do not depend on tokens; the moves of all s add. It is the largest norm, over the embeddings
    e_j, (V, d) in all, of sum_h p_h,ts W_o^h W_v^h (e_j - e_i), with what rounding may take off where heads
    cancel.
    """
    p = at.p[0].permute(1, 2, 0)                                                # (T, T, H)
    (Wv, ), _, Wo_h = head_weights(at.block.attn, at.c.n_head)                  # with the heads' gains
    values, found = at.c.attn_scale * embeddings @ (Wo_h @ Wv).mT, []           # (H, V, d)
    for i in range(len(embeddings)):
        apart = values - values[:, i, None]
        gram = torch.einsum("hjd,gjd->hjg", apart, apart).flatten(1)            # (H, V H)
        squares = ((p @ gram).unflatten(-1, (-1, len(Wv))) * p[:, :, None]).sum(-1)  # (T, T, V)
        off = (apart.shape[-1] + 2 * len(Wv) + 8) * EPS * (p @ apart.norm(dim=-1)).square()
        found.append((squares + off).amax(dim=-1).clamp_min(0).sqrt())
    return torch.stack(found)


def altered(net, ids, D, restarts=2, rounds=4):
    """Which last predictions of tokens ids (B, T) an attack alters by other tokens in the place of all but
    the last D: (B,). It begins at those there or at random ones, and replaces all at once by those that the
    gradient of the lead says make it smallest.
    """
    g, y = torch.Generator().manual_seed(0), net(ids)[0][:, -1:].argmax(dim=-1)
    n, found = ids.shape[1] - D, torch.zeros(len(ids), dtype=torch.bool)
    for restart in range(restarts):
        new = ids.clone()
        if restart:
            new[:, :n] = torch.randint(net.config.vocab_size, (len(ids), n), generator=g)
        for _ in range(rounds):
            X = net.wte(new).detach().requires_grad_()
            leads = lead(net.forward_embeddings(X)[:, -1:], y)
            found |= leads[:, 0] <= 0
            gradient, = torch.autograd.grad(leads.sum(), X)
            new[:, :n] = (gradient[:, :n] @ net.wte.weight.T).argmin(dim=-1)
    return found


def decided(model, layers, text, attacked=24):
    """Of predictions of text (N,) the shares that are right and decided by the last D tokens, of all D; of
    the last predictions of `attacked` windows those decided and those that an attack does not alter; and the
    first windows' characters, with the D of each.
    """
    net, T = exact_model(model), model.config.block_size
    windows = text[:9000].unfold(0, T + 1, T // 2)[:32]                         # (B, T + 1)
    alone = spread(text, T + 1, attacked)[:, :-1]
    sizes, proved = deciding(net, layers, torch.cat((windows[:, :-1], alone))).split((len(windows), attacked))
    y, proved = windows[:, -sizes.shape[1]:], proved[:, -1]
    top = torch.cat([net(rows)[0].argmax(dim=-1) for rows in windows[:, :-1].split(8)])
    right = top[:, -y.shape[1]:] == y
    stays = {D: ~altered(net, alone, D) for D in DECIDING if D < T}
    return {"predictions": sizes.numel(), "right": share(right),
            "decided": {D: share(right & (sizes <= D)) for D in stays},
            "alone": {D: share(proved <= D) for D in stays},
            "attack": {D: share(stay) for D, stay in stays.items()},
            "broken": sum((~stay & (proved <= D)).sum().item() for D, stay in stays.items()),
            "characters": list(zip(*(x.flatten()[:1024].tolist() for x in (y, right, sizes))))}


# --- The report: every number once, in a dict; its text is made from that -----------------------------------

ATTACKED = 2048             # tokens, at once
LOCAL = 512                 # tokens, with radii at the text
AT_TEXT = 1e-4, 1e-3, 3e-3, 5e-3, 1e-2, 3e-2  # radii at which their accuracy is given
ALONE, CONTEXT = 24, 32     # predictions attacked one by one, each the last of so many tokens


def at_most(n, model):
    """n, or fewer predictions if the vocabulary is large."""
    return min(n, max(2, 2 ** 23 // model.config.vocab_size))


def share(which):
    """The share of true ones in a tensor of bool."""
    return which.double().mean().item()


def median(x):
    """The median of a tensor of log10, -inf for none."""
    return x.median().item() if len(x) else -math.inf


def at_radii(net, text, right, log10_radii):
    """{radius: accuracies} at each of RADII: certified on all of text (N,), and of its first ATTACKED tokens
    what is certified, what an attack leaves, the plain one, and how many certified ones the attack altered.
    """
    n, found = at_most(ATTACKED, net), {}
    for r in RADII:
        safe, left = right & (log10_radii > math.log10(r)), attacked(net, text[:n], r)
        few = safe[:n - 1]
        found[f"{r:g}"] = {"certified": share(safe), "certified_first": share(few),
                           "attack_first": share(left), "plain_first": share(right[:n - 1]),
                           "broken": (few & ~left).sum().item()}
    return found


def at_text(net, layers, text):
    """Of the first LOCAL tokens of text (N,) the radii by the constant and at the text, of right predictions;
    and of ALONE predictions all over the text both radii and one at which an attack succeeds. All as log10.
    """
    norms, names = block_norms(net, layers), ("constant", "local", "attack")
    windows = whole_windows(net, text[:at_most(LOCAL, net) + 1], 1)
    found = [(*local_radii(net, norms, net.wte(x), y), y) for x, y in windows]
    *both, top, y = (torch.cat([part.flatten() for part in parts]) for parts in zip(*found))
    right = top == y
    n, count = min(CONTEXT, net.config.block_size, len(text)), at_most(ALONE * CONTEXT, net) // CONTEXT
    X = net.wte(spread(text, n, max(1, count)))
    alone = [radii[:, -1] for radii in local_radii(net, norms, X, last=1)[:2]] + [attack_radii(net, X)]
    return {"log10_median": {name: median(radii[right]) for name, radii in zip(names, both)},
            "certified_accuracy": {f"{r:g}": [share(right & (radii > math.log10(r))) for radii in both]
                                   for r in AT_TEXT},
            "log10_median_alone": {name: median(radii) for name, radii in zip(names, alone)},
            "alone": [dict(zip(names, radii)) for radii in zip(*(radii.tolist() for radii in alone))]}


def all_at_text(net, layers, text, radii=(1e-3, 3e-3, 5e-3, 1e-2)):
    """{radius: share of all predictions of tokens (N,) that are right and certified at it by bounds at the
    text}, smallest radius first; what is lost at one is not asked again. Seconds for each window of 256.
    """
    norms, certified = block_norms(net, layers), torch.zeros(len(radii))
    for x, y in whole_windows(net, text, 1):
        facts = facts_at(net, norms, net.wte(x))
        held = (facts[-1].out @ net.head.weight.T).argmax(dim=-1).flatten() == y
        for i, r in enumerate(radii):
            held = certified_under(net, facts, r * math.sqrt(net.config.n_embd), held)
            certified[i] += held.sum()
    return dict(zip(map("{:g}".format, radii), (certified / (len(text) - 1)).tolist()))


@torch.inference_mode()
def rounding(model, net, text):
    """How far float32 and bfloat16 move a logit of the first LOCAL predictions of text (N,), at most, and the
    median lead of the largest logit: the bounds are about real numbers.
    """
    leads, off = [], {"float32": 0.0, "bfloat16": 0.0}
    for x, _ in whole_windows(net, text[:at_most(LOCAL, net) + 1]):
        z = net(x)[0]
        leads.append(lead(z, z.argmax(dim=-1)).flatten())
        for dtype in off:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                off[dtype] = max(off[dtype], (model(x)[0].double() - z).abs().max().item())
    return off | {"median_lead": median(torch.cat(leads))}


def certified_predictions(model, layers, text):
    """Accuracy on tokens (N,), plain, certified at radii around the median, and at RADII beside an attack;
    and the first 256 radii.
    """
    net = exact_model(model)
    bears, right = margins(net, text)
    radii = log10_radii(net, bears, layers)
    middle = median(radii[right])
    first = round(middle) - 2 if middle > -math.inf else -2                  # -inf: a tie has radius 0
    characters = zip(text[1:257].tolist(), right[:256].tolist(), radii[:256].tolist())
    return {"tokens": len(text), "val_acc": share(right), "log10_median_radius": middle,
            "certified_accuracy": {f"1e{x}": share(right & (radii > x)) for x in range(first, first + 4)},
            "radii": at_radii(net, text, right, radii), "local": at_text(net, layers, text),
            "rounding": rounding(model, net, text),
            "characters": [{"token": t, "right": r, "log10_radius": x} for t, r, x in characters]}


def alarms(result):
    """Lines about attacks that found more than a certificate allows, of a report or a sweep's record."""
    found, certified = result.get("log10_attack"), result["log10_certified"]
    if found is not None and certified is not None and not found <= certified:
        yield f"AN ATTACK, 10^{found:.4f}, IS ABOVE ITS CERTIFICATE, 10^{certified:.4f}"
    for r, accuracy in result.get("radii", {}).items():
        if accuracy.get("broken") or accuracy["attack_first"] < accuracy["certified_first"]:
            yield f"AN ATTACK ALTERED PREDICTIONS THAT WERE CERTIFIED AT A RADIUS OF {r}"
    if (result.get("deciding") or {}).get("broken"):
        yield "AN ATTACK ALTERED PREDICTIONS THAT THEIR LAST TOKENS WERE CERTIFIED TO DECIDE"
    for radii in result.get("local", {}).get("alone", ()):
        certified = max(radii["constant"], radii["local"])
        if not radii["attack"] >= certified:
            yield f"AN ATTACK AT 10^{radii['attack']:.2f} ALTERED WHAT WAS CERTIFIED AT 10^{certified:.2f}"


CERTIFIED = ("log10_certified", "log10_layers", "certified_accuracy", "radii", "local", "log10_median_radius",
             "characters", "deciding")  # what a report does not claim after an alarm


def report(model, ckpt, text, steps=100, last=False):
    """The dict of a GPT's norms, its bounds with their parts, an attack of so many steps and, on text (N,) or
    None, certified predictions, with `last` also what their last tokens decide. "refused" says why there is
    no certificate, "alarms" what broke it.
    """
    found = log10(attack(model, steps=steps, tokens=text))
    result = {"step": ckpt["step"], "method": ckpt["config"]["method"], "w_max": ckpt["config"]["w_max"],
              "norms": {name: rms_norm(W).flatten().tolist() for name, W in matrices(model).items()},
              "embedding": embedding_norm(model), "refused": ckpt.get("refused") or refused(model),
              "log10_layers": [], "log10_attack": found, "log10_certified": None, "log10_paper": None,
              "log10_published": None, "paper_broken": False}
    if not result["refused"]:
        layers, authors = layer_norms(model), paper_bounds(model)
        result["log10_certified"], result["log10_layers"] = certificate(model, layers)
        result |= {f"log10_{kind}": value for kind, value in authors.items()}
        result["paper_broken"] = authors["paper"] is not None and found > authors["paper"]
        if text is not None:
            result |= certified_predictions(model, layers, text)
            result["deciding"] = decided(model, layers, text) if last else None
    result["alarms"] = list(alarms(result))
    if result["alarms"]:
        result |= {name: None for name in CERTIFIED if name in result}
    return result


def words(model, result):
    """The lines of a report."""
    yield from norm_lines(model)
    if result["alarms"] or result["refused"]:
        yield from result["alarms"] or [result["refused"]]
    else:
        yield from bound_lines(*(result[f"log10_{name}"] for name in ("certified", "layers", "paper",
                                                                      "published")))
    yield f"attack {result['log10_attack']:.4f}" + ", above the authors' formula" * result["paper_broken"]
    if result.get("radii") is None:
        return
    yield f"\naccuracy on {result['tokens']:,} tokens of the validation split: {result['val_acc']:.2%}"
    if result["log10_median_radius"] > -math.inf:
        yield f"median certified radius of a right prediction: {10 ** result['log10_median_radius']:.1e}"
    at = ", ".join(f"{radius}: {share:.2%}" for radius, share in result["certified_accuracy"].items())
    yield f"certified accuracy at radius {at}"
    few, local_few = (min(at_most(n, model), result["tokens"]) for n in (ATTACKED, LOCAL))
    yield f"\naccuracy at radius  certified   of the first {few:,}: certified, attack, plain"
    for radius, accuracy in result["radii"].items():
        yield (f"{radius:>18}  {{certified:9.2%}}   {{certified_first:.2%}}, {{attack_first:.2%}}, "
               "{plain_first:.2%}").format(**accuracy)
    local = result["local"]
    medians = " -> ".join(f"{10 ** x:.1e}" for x in local["log10_median"].values())
    at = ", ".join(f"{r}: {a:.1%} -> {b:.1%}" for r, (a, b) in local["certified_accuracy"].items())
    yield f"\nradii of the first {local_few:,} by the constant -> at the text: median {medians}"
    yield f"certified accuracy at {at}"
    yield (f"medians of {len(local['alone'])} predictions attacked one by one: " +
           ", ".join(f"{name} {10 ** x:.1e}" for name, x in local["log10_median_alone"].items()))
    yield ("rounding moves a logit by up to {float32:.1e} in float32, {bfloat16:.1e} in bfloat16; the "
           "largest logit leads by {median_lead:.2f} in the median".format(**result["rounding"]))
    if deciding := result.get("deciding"):
        for name, words in (("decided", f"of {deciding['predictions']:,} predictions right and decided"),
                            ("alone", "of a sample, decided"), ("attack", "not altered by an attack")):
            yield f"by their last tokens, {words}: " + ", ".join(
                f"{D}: {x:.1%}" for D, x in deciding[name].items())


def validation_text(ckpt, vocab_size):
    """(tokens (N,) of the checkpoint's validation split, None) or (None, why there are none)."""
    try:
        _, _, val = open_data(Path("data") / ckpt["config"]["dataset"], like=ckpt["meta"])
    except UserError as e:
        return None, f"no predictions were certified, and the attack began at random tokens: {e}"
    n = max(4096, 2 ** 23 // vocab_size)  # all of Shakespeare's
    return torch.from_numpy(val[:n].astype(np.int64)), None


def main():
    parser = Parser(description="Attack and certify a checkpoint.")
    parser.add_argument("ckpt", help="checkpoint written by train.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=number(int, 0, 10 ** 9), default=100,
                        help="of the attack's gradient ascent [100]")
    parser.add_argument("--deciding", action="store_true", help="which last tokens decide predictions, too")
    args = parser.parse_args()
    keep_memory()
    with one_line_errors("certify.py"):
        model, ckpt = load_checkpoint(args.ckpt)
        if args.deciding and (model.config.vocab_size > 1000 or model.config.block_size == 1):
            raise UserError("--deciding is for models of characters that look at more than one; leave it out")
        text, without = validation_text(ckpt, model.config.vocab_size)
        result = {"checkpoint": args.ckpt, "without_text": without}
        result |= report(model, ckpt, text, args.steps, args.deciding)
        if args.json:
            say(to_json(result))
        else:
            say(f"{args.ckpt} at step {result['step']}, {result['method']}, w_max {result['w_max']:g}, "
                f"logit_scale {model.config.logit_scale:g}")
            for line in (*words(model, result), *filter(None, [without])):
                say(line)
        if result["alarms"]:
            sys.exit(1)


if __name__ == "__main__":
    main()
