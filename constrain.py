"""
Weight constraints, and the Lipschitz bound that they give to the network.

    python constrain.py out/shakespeare/ckpt.pt            # norms, bounds, an attack, certified predictions
    python constrain.py out/shakespeare/ckpt.pt --json     # the same for programs

Paper: Newhouse et al., Training Transformers with Enforced Lipschitz Constants (arXiv 2507.13338). Norms of
matrices are RMS->RMS operator norms throughout: an (m, n) matrix, m outputs and n inputs, has the norm
sqrt(n/m) * sigma_max. What is exact, norms, bounds and attacks, is computed in float64 on the CPU, as not
every GPU has float64.
"""
import copy
import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GELU_SLOPE, GPT, GPTConfig, gelu, later, load_checkpoint, maxmin, onto_ball
from optim import POLAR, UPDATE_NORM, keep_memory, orthogonalize, polar_steps
from prepare import Parser, number, one_line_errors, open_data, say, to_json

# Muon's iteration made exact: its second step, which lifts small singular values by 3.96 and keeps the others
# in their interval, three more times; and a step of Newton-Schulz, which takes [0.991, 0.993] to within 2e-6
# of 1, from below.
EXACT_POLAR = POLAR[:1] + POLAR[1:2] * 4 + POLAR[2:] + ((15 / 8, -10 / 8, 3 / 8),)

# The polynomial of degree 5 nearest to psi(y) = 1 / (y + 1 + sqrt(y + 1)) on [0, 3], its error weighed by
# what it does to a singular value in hard_cap, y sqrt(y + 1): that is at most 2.4e-4.
PSI = (0.494527, -0.331985, 0.187114, -0.070508, 0.014907, -0.001316)


# ------------------------------------------------------------------------------------------------------------
# The constraints. Each maps a batch (..., m, n) to a new one; train.py calls it after every optimizer step.
# To add one, write a function under @constraint. Beside W it may ask, by name, for what `after_step` lists.

METHODS = {}        # name: constraint
PROMISE_W_MAX = []  # the names of those after which every matrix has norm <= w_max


def constraint(f):
    METHODS[f.__name__] = f
    return f


def cap(f):
    """A constraint that promises norms of at most w_max."""
    PROMISE_W_MAX.append(f.__name__)
    return constraint(f)


def after_step(method, w_max, lr, decay, update_norm, dtype):
    """
    The constraint METHODS[method] of W alone, given what it asks for of: w_max; the step's learning rate lr;
    decay, the share of W that the step took off (lr * weight_decay); update_norm, a bound on the norm of its
    update, infinite with AdamW; and dtype, which inner products may have.
    """
    values = dict(w_max=w_max, lr=lr, decay=decay, update_norm=update_norm, dtype=dtype)
    asked = inspect.signature(METHODS[method]).parameters
    return partial(METHODS[method], **{name: values[name] for name in values if name in asked})


def rms_unit(W):
    """sqrt(m/n): the largest singular value of an (m, n) matrix of RMS->RMS norm 1."""
    return math.sqrt(W.shape[-2] / W.shape[-1])


def exact(W):
    """A copy in float64 on the CPU, without a gradient."""
    return W.detach().cpu().double()


def distances(A, B):
    """L2 distances of rows (..., m, d) and (..., n, d): (..., m, n). Not by products, which lose digits."""
    return torch.cdist(A, B, compute_mode="donot_use_mm_for_euclid_dist")


def rows_apart(W, i):
    """L2 distances of the rows i (N,) of W (V, d), each computed once, to all rows: (N, V)."""
    rows, where = i.unique(return_inverse=True)
    return distances(W[rows], W)[where]


def exact_model(model):
    return copy.deepcopy(model).cpu().double().requires_grad_(False)


@contextmanager
def one_thread():
    """
    Torch on one thread; gives the number that it had. Decompositions of matrices as small as these gain
    little from more, and on a busy machine each of the thousand times that the threads of one meet waits for
    the scheduler: seconds for the eigenvalues of a 256 x 256 matrix.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_threads)


def each(f, items):
    """[f(item) for item in items], each by itself on one thread, as many at a time as torch has threads."""
    with one_thread() as n_threads, ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(f, items))


def sigma(W):
    """
    Largest singular values of float64 (..., m, n), as a tensor (...): the root of the largest eigenvalue of
    the smaller Gram matrix, ten times faster than an SVD and, for the largest one, as exact: to 1e-14 here.

    What rounding could take off at the worst is added, so that no norm is too small: with k = min(m, n), l =
    max(m, n) and u half of eps, the Gram matrix is off by at most l u |W|_F^2 <= l u k sigma^2 (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.5), its eigenvalue by a small multiple of k u sigma^2
    more, for which 30 is ample, and the root by half of both.
    """
    W = W if W.shape[-2] <= W.shape[-1] else W.mT
    k, l = W.shape[-2:]
    gram = W.new_zeros(*W.shape[:-1], k)
    with one_thread():
        for i in range(0, k, 128):  # its lower half, which is all that eigvalsh looks at
            gram[..., i:i + 128, :i + 128] = W[..., i:i + 128, :] @ W[..., :i + 128, :].mT
        largest = torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()
    return largest * (1 + k * (l + 30) * torch.finfo(W.dtype).eps / 4)


def rms_norm(W):
    """RMS->RMS operator norms of (..., m, n), exactly (in float64), as a float64 tensor (...)."""
    return sigma(exact(W)) / rms_unit(W)


def matrix_norms(model):
    """{matrix: RMS->RMS norms} of all that is constrained, of each matrix of a stack one."""
    weights = list(matrices(model).values())
    return dict(zip(weights, each(rms_norm, weights)))


def matrices(model):
    """{name: weight (..., m, n)} of what is constrained: all but the embedding table and position biases."""
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters()
            if not name.endswith(("wte.weight", "bias"))}


def top_singular(W, dtype=torch.float32, squarings=9, steps=4):
    """
    The largest singular triple of each matrix (..., m, n): sigma (..., 1, 1), u (..., m, 1), v (..., n, 1).

    Power iteration on the Gram matrix A with A^512, which nine squarings make: 2,048 steps at the price of a
    few matrix products. Started from the largest column of A^512 it needs no memory and no random numbers.
    sigma = |W v| is below the true one, by less than 0.1 % however close the other singular values are.
    `dtype` is that of A^8 and on: bfloat16 changes the norm of A^4 by 0.2 % at most, and so what the
    iteration takes for sigma by 0.03 %.
    """
    scale = W.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    X = W / scale
    A = X.mT @ X if W.shape[-2] >= W.shape[-1] else X @ X.mT
    for i in range(squarings):
        if i % 2 == 0:
            A = A / A.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
        if i == 2:
            A = A.to(dtype)
        A = A @ A
    A = A.to(X.dtype)
    column = A.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None].expand(*A.shape[:-1], 1)
    x = A.gather(-1, column)
    for _ in range(steps):
        x = x / x.norm(dim=-2, keepdim=True).clamp_min(1e-30)
        x = A @ x
    x = x / x.norm(dim=-2, keepdim=True).clamp_min(1e-30)
    y = X @ x if W.shape[-2] >= W.shape[-1] else X.mT @ x  # the other singular vector, times sigma
    sigma = y.norm(dim=-2, keepdim=True)
    y = y / sigma.clamp_min(1e-30)
    u, v = (y, x) if W.shape[-2] >= W.shape[-1] else (x, y)
    return sigma * scale, u, v


@constraint
def none(W):
    """No constraint; with the optimizer's weight_decay the paper's weight decay, W <- (1 - lr decay) W."""
    return W.clone()


@constraint
def spectral_weight_decay(W, decay, dtype=torch.float32):
    """W - decay sigma_1 u_1 v_1^T: weight decay of the largest singular value alone (paper, section 3)."""
    sigma, u, v = top_singular(W, dtype)
    return W - decay * sigma * u @ v.mT


@cap
def spectral_normalize(W, w_max, dtype=torch.float32):
    """W min(1, w_max / |W|): the whole matrix scaled down (Miyato et al. 2018; the paper, section 3)."""
    sigma, _, _ = top_singular(W, dtype)
    return W * (w_max * rms_unit(W) / sigma.clamp_min(torch.finfo(W.dtype).tiny)).clamp_max(1)


@constraint
def spectral_hammer(W, w_max, dtype=torch.float32):
    """
    W - max(0, sigma_1 - w_max) u_1 v_1^T: only the largest singular value is set to w_max (paper, section 3).

    Does not promise norm w_max: a step may lift several singular values over it, and this takes back one.
    Unlike the paper's it leaves a matrix alone whose norm is below w_max, so that it never inflates one.
    """
    sigma, u, v = top_singular(W, dtype)
    return W - (sigma - w_max * rms_unit(W)).clamp_min(0) * u @ v.mT


@cap
def stiefel(W, w_max, dtype=torch.float32):
    """
    w_max U V^T: every singular value of W = U S V^T set to w_max, the Stiefel manifold (paper, section 3).

    After an optimizer step W is near it. With X = W / w_max and E = X X^T - I, whose norm is then at most
    1/2, three steps X <- X + (3/8 E^2 - 1/2 E) X of Newton-Schulz take every singular value to within 1e-5 of
    1: a step turns an error e into about 5/2 e^3. All products but the last E are in `dtype`: they are
    corrections. Farther off Muon's iteration does it.
    """
    X = (W / (w_max * rms_unit(W))).reshape(-1, *W.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    I = torch.eye(X.shape[-2], device=W.device)
    for step, products in enumerate((dtype, dtype, torch.float32)):
        X_ = X.to(products)
        E = (X_ @ X_.mT - I).to(dtype)  # I is float32, and E small
        E2 = E @ E
        if step == 0 and not ((E2 @ E2).float().norm(dim=(-2, -1)) <= 0.5 ** 4).all():  # at least |E|
            return w_max * rms_unit(W) * orthogonalize(W, EXACT_POLAR)
        X = X + ((3 / 8 * E2 - E / 2) @ X.to(dtype)).float()
    return w_max * rms_unit(W) * (X.mT if tall else X).reshape(W.shape)


@cap
def soft_cap(W, w_max, lr, decay=0.0, update_norm=0.0, dtype=torch.float32):
    """
    soft_cap_polynomial with the alpha that takes back a step of Muon (the paper, section 3). AdamW's steps
    have no fixed norm; after those it promises nothing.
    """
    alpha = soft_cap_coupling(w_max, decay, lr * UPDATE_NORM)
    return soft_cap_polynomial(W, alpha, dtype if small(update_norm, w_max) else torch.float32)


def small(update_norm, w_max):
    """Whether a step is one that a cap can take back in bfloat16."""
    return update_norm <= 0.03 * w_max


def soft_cap_polynomial(W, alpha, dtype=torch.float32):
    """
    sigma -> p(q(sigma)) with q(x) = x - alpha x^3 and p(x) = x + alpha x^3, on RMS->RMS singular values (the
    paper, section 3). Close to the identity for small sigma, with a largest image that soft_cap_coupling
    makes w_max.

    With y = alpha sigma^2 that is sigma (1 - y) (1 + y (1 - y)^2) = sigma (1 - y^2 (3 - 3y + y^2)), so in
    terms of the Gram matrix B of eigenvalues y it is W - W B^2 (3 I - 3 B + B^2): only a correction of W,
    which `dtype` may round. In bfloat16 it is off by up to 2.3 %, so a cap that moves singular values by up
    to 3 % holds to 1e-3.
    """
    W_ = W.to(dtype)
    X = W_ * (math.sqrt(alpha) / rms_unit(W))
    tall = X.shape[-2] >= X.shape[-1]
    B = X.mT @ X if tall else X @ X.mT
    C = B @ B
    D = C @ (C - 3 * B + 3 * torch.eye(B.shape[-1], dtype=dtype, device=B.device))
    return W - (W_ @ D if tall else D @ W_)


def soft_cap_coupling(w_max, weight_decay, update_norm):
    """
    The smallest alpha for which soft_cap brings a matrix of norm <= w_max back to norm <= w_max after an
    optimizer step.

    weight_decay is the decay of that step (lr times the optimizer's), update_norm the norm of its update (lr
    times UPDATE_NORM for Muon), so that the norm after it is at most k = w_max |1 - weight_decay| +
    update_norm. The published coupling (the paper, appendix) asks only that k itself lands on w_max; this one
    asks it of all of [0, k].

    With y = alpha sigma^2, q = sigma (1 - y) grows up to its turning point y = 1/3, and p grows always.
    - k <= w_max: alpha = 0.
    - Up to k = 1.3065 w_max the turning point lies outside [0, k], so k has the largest image: p(q(k)) =
      w_max. That falls as alpha rises from 0 to 1 / (3 k^2), so bisection finds its one root there.
    - Beyond, the turning point has it: q = 2 / (3 sqrt(3 alpha)) there and p(q) = (62/81) / sqrt(3 alpha) =
      w_max, which gives alpha = (62/81)^2 / (3 w_max^2) whatever k is. q is odd about its zero and falls
      below minus that value only for sigma > 2 / sqrt(3 alpha) = 2.613 w_max; no alpha can do for a larger k.
    """
    k = w_max * abs(1 - weight_decay) + update_norm
    if k <= w_max:
        return 0.0
    alpha = (62 / 81) ** 2 / (3 * w_max ** 2)
    k_largest = 2 / math.sqrt(3 * alpha)
    if k > k_largest:
        lr = update_norm / UPDATE_NORM
        largest = lr * (k_largest - w_max) / (k - w_max)
        raise ValueError(f"no soft cap holds w_max={w_max:g} at lr={lr:g}; the largest lr that it can hold "
                         f"is {largest:.4g}")
    if alpha * k ** 2 > 1 / 3:
        return alpha
    low, high = 0.0, 1 / (3 * k ** 2)
    for _ in range(100):
        alpha = (low + high) / 2
        q = k - alpha * k ** 3
        low, high = (alpha, high) if q + alpha * q ** 3 > w_max else (low, alpha)
    return high


@cap
def hard_cap(W, w_max, dtype=torch.float32, update_norm=0.0):
    """
    sigma -> min(sigma, w_max) from a matrix sign (the paper, section 3; Cesista 2025), without an SVD.

    With w 0.6 % below w_max, X = W / w and Y = X X^T - I, of eigenvalues y = (sigma/w)^2 - 1, it is
    W - max(Y, 0) psi(Y) W: max(Y, 0) = Y (I + sign Y) / 2, where the sign comes from Muon's iteration, and
    psi(y) = 1 / (y + 1 + sqrt(y + 1)) from a polynomial on [0, 3]. The result is within 1 % of w_max of the
    exact one, and not above w_max: where the sign has not converged, near w, and everywhere for norms up to
    1.1 w_max in bfloat16, what is missing is less than w leaves room for. All products but the first and the
    last are on the smaller side. A batch with norms near 2 w_max or beyond goes through the SVD.
    """
    dtype = dtype if small(update_norm, w_max) else torch.float32
    w = w_max * rms_unit(W) * (1 - 6e-3)
    X = (W / w).to(dtype).reshape(-1, *W.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]
    I = torch.eye(min(X.shape[-2:]), dtype=dtype, device=W.device)
    Y = (X.mT @ X if tall else X @ X.mT) - I
    Y2 = Y @ Y
    size = (Y2 @ Y2).float().norm(dim=(-2, -1), keepdim=True) ** (1 / 4)  # from |y|_max to n^(1/8) times it
    if not (size <= 3).all():
        return svd_cap(W, w_max)
    # Muon's first step would take [-1, 1] to [-1.9, 1.9]. Without it y must be above 0.025 size to come out
    # at 0.991 to 0.993
    sign = polar_steps(Y * (1.8 / size.clamp_min(1e-3)).to(dtype), POLAR[1:]) / 0.992
    positive = torch.baddbmm(Y, Y, sign, beta=0.5, alpha=0.5)
    a, b, c, d, e, f = PSI
    psi = a * I + b * Y + Y2 @ (c * I + d * Y + Y2 @ (e * I + f * Y))
    D = (positive @ psi).reshape(*W.shape[:-2], *I.shape)
    W_ = W.to(dtype)
    return W - (W_ @ D if tall else D @ W_)


@cap
def svd_cap(W, w_max):
    """sigma -> min(sigma, w_max) by an SVD in W's precision: the reference for hard_cap."""
    with one_thread():
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U * S.clamp_max(w_max * rms_unit(W))[..., None, :] @ Vh


# ------------------------------------------------------------------------------------------------------------
# The Lipschitz bound

def lipschitz_bound(model, kind, norms=None):
    """
    log10 of a Lipschitz bound of the model, a GPT or an MLP: `paper` or `certified`.

    Of a GPT it is about forward_embeddings, from the largest RMS norm over tokens at the input to that at the
    logits. `certified` is an upper bound on the ball whose radius is the embedding table's largest row (see
    body_bound); `paper` is the formula of the authors' code, whose value can lie below the true constant (see
    paper_bound), and None of a model that has options which they do not. `norms` saves computing
    matrix_norms again.
    """
    if kind not in ("paper", "certified"):
        raise ValueError(f"kind is 'paper' or 'certified', not {kind!r}")
    if not finite(model):
        return math.inf
    if isinstance(model, GPT) and kind == "certified":
        return certificate(model)[0]
    norms = norms or matrix_norms(model)
    if isinstance(model, GPT):
        return paper_bound(model, norms)
    # of an MLP both are the product of the layers' norms, as activations have gain 1
    return log10(model.config.logit_scale * math.prod(norm.item() for norm in norms.values()))


def log10(x):
    """log10 of a norm, for NaN inf: what is unknown bounds nothing."""
    return math.log10(x) if x > 0 else -math.inf if x == 0 else math.inf


def log10_add(a, b):
    """log10(10^a + 10^b), for powers that may be too large for a float."""
    return max(a, b) + math.log10(1 + 10 ** -abs(a - b)) if math.isfinite(max(a, b)) else max(a, b)


def finite(module):
    """Whether all weights are finite. A module with others has no bound."""
    return all(p.isfinite().all() for p in module.parameters())


def log10_mix(alpha, log10_x):
    """log10((1 - alpha) + alpha x) from log10(x)."""
    return log10_add(log10(1 - alpha), math.log10(alpha) + log10_x)


def embedding_norm(model):
    """The largest RMS norm of a row of the embedding table."""
    return exact(model.wte.weight).square().mean(dim=1).max().sqrt().item()


def paper_bound(model, norms):
    """
    log10 of the published bound (calculate_lipschitz_constant in the authors' code), times logit_scale, from
    the model's matrix_norms.

    Not an upper bound: it takes the heads together, GELU / 1.1289 for 1/1.1289-Lipschitz, and lets
    softmax_scale multiply the value path as well. Their networks have no position_bias, which would change no
    factor of it.
    """
    config = model.config
    ours = ("per_head", "attn_scale", "alpha", "activation", "mlp_layers", "mlp_ratio", "ball")
    if not config.softmax_scale or any(getattr(config, name) != getattr(GPTConfig, name) for name in ours):
        return None
    alpha, log10_R = config.residual_weight, 0.0
    total = log10(config.logit_scale * norms[model.head.weight].item() * embedding_norm(model))
    for block in model.blocks:
        q, k, v = (log10(norm) for norm in norms[block.attn.qkv.weight].tolist())
        layers = block.attn.proj, block.mlp.fc, block.mlp.proj
        w, i, o = (log10(norms[layer.weight].item()) for layer in layers)
        # L_att = c/3 w (v + 2 v R^2 q k) = c w v (1/3 + 2/3 R^2 q k)
        L_att = log10(config.softmax_scale) + w + v + log10_mix(2 / 3, 2 * log10_R + q + k)
        L_mlp = i + o - log10(GELU_SLOPE)
        total += log10_mix(alpha, L_att) + log10_mix(alpha, L_mlp)
        log10_R += log10_mix(alpha, w + v - log10(3)) + log10_mix(alpha, L_mlp)
    return total


def attention_norms(attn, softmax_scale):
    """
    (A_V, A_QK) of one attention layer: with tokens of RMS norm <= R its output has RMS norm <= A_V R, and its
    derivative has norm <= A_V + A_QK R^2, both in the largest RMS norm over tokens. Below, without
    attn_scale, which multiplies both.

    W^h are the rows of W_q, W_k, W_v and the columns of W_o that belong to head h; c is softmax_scale, d the
    width. A change dx of the input moves the output through the values (scores fixed) and the scores (values
    fixed).

    Values. Head h returns W_v^h applied to a convex combination of tokens, another one for each head. So the
    output is at most, times the norm of the largest token or of its change, each of
      sigma(W_o) sqrt(sum_h sigma(W_v^h)^2)           since the heads' outputs stand below each other
      sum_h sigma(W_o^h W_v^h)                        triangle inequality
      sqrt(H) sigma([W_o^1 W_v^1 ... W_o^H W_v^H])    since H combinations below each other have norm sqrt(H)

    Scores a_s = c/d_head <q, k_s> + b_s, where b_s depends on positions alone and RoPE turns q and k_s by
    orthogonal matrices; so da_s = c/d_head d<q, k_s>, and RoPE changes none of the norms below. Without
    content, c = 0, A_QK is 0. With p = softmax(a), dp_s = p_s (da_s - sum_r p_r da_r): a head's output moves
    by sum_s dp_s v_s = Cov_p(da, v).
    - By dq: da_s = c/d_head <dq, k_s>, so it moves by c/d_head Cov_p(v, k) dq. For unit u, w and any t > 0
        Cov_p(<u,v>, <w,k>) <= t/2 E<u,v>^2 + 1/(2t) E<w,k>^2 <= max_s (t |v_s|^2 + |k_s|^2 / t) / 2
                            <= gamma_h R^2 d with gamma_h = sigma([sqrt(t) W_v^h; W_k^h / sqrt(t)])^2 / 2:
      v_s and k_s are images of one token, which cannot lie along the top singular vectors of both matrices.
      We take t = sigma(W_k^h) / sigma(W_v^h), which gives gamma_h <= g_h.
    - By dk: |Cov_p(da, v)| <= sqrt(E da^2 E|v|^2) <= c/d_head |q| max_s |dk_s| max_s |v_s|
      <= c/d_head |W_q^h x| R sqrt(d) g_h max_s |dx_s|, with g_h = sigma(W_v^h) sigma(W_k^h) and x the query's
      token.
    Over heads, sum_h g_h^2 |W_q^h y|^2 <= sigma(diag_h(g_h) W_q)^2 |y|^2 with y = x, and so for gamma_h with
    y = dx. Through W_o, and with |x| <= R sqrt(d), both together move the output by at most R^2 A_QK |dx|,
      A_QK = c d/d_head sigma(W_o) (sigma(diag_h(gamma_h) W_q) + sigma(diag_h(g_h) W_q)).
    (q and k may not swap roles here: a query is one token for all heads, but each head may look at another
    key's token.)
    """
    H, dh = attn.n_head, attn.d_head
    *Wqk, Wv = exact(attn.qkv.weight).view(-1, H, dh, H * dh)  # each (H, d_head, d); W_q and W_k unless c = 0
    Wo = exact(attn.proj.weight)                                           # (d, d)
    Wo_h = Wo.view(H * dh, H, dh).transpose(0, 1)                          # (H, d, d_head)
    beside = lambda W: W.transpose(0, 1).flatten(1)                        # (H, m, n) -> (m, H n)
    v = sigma(Wv)                                                          # (H,)
    # orthonormal rows do not count: W_v^h = L_h Q_h, so sigma(W_o^h W_v^h) = sigma(W_o^h L_h), also of all
    # beside each other
    OV = Wo_h @ torch.linalg.qr(Wv.mT, mode="r").R.mT                      # (H, d, d_head): W_o^h L_h
    A_V = min(sigma(Wo) * v.square().sum().sqrt(), sigma(OV).sum(), math.sqrt(H) * sigma(beside(OV))).item()
    if not Wqk:
        return attn.out_scale * A_V, 0.0
    Wq, Wk = Wqk
    k = sigma(Wk)
    t = (k / v.clamp_min(1e-300)).clamp(1e-9, 1e9).sqrt()[:, None, None]   # sqrt of the proof's; any is valid
    gamma = torch.minimum(sigma(torch.cat((t * Wv, Wk / t), dim=1)) ** 2 / 2, v * k)
    scores = [sigma((g[:, None, None] * Wq).flatten(0, 1)) for g in (gamma, v * k)]
    A_QK = attn.out_scale * softmax_scale * H * sigma(Wo) * sum(scores)  # d / d_head = H
    return attn.out_scale * A_V, A_QK.item()


def mlp_norms(block):
    """
    (gain, score gain, growth) of x -> (1 - alpha) x + alpha mlp(x), whose derivative is J: |J|, |J W_o| over
    |W_o| for attention's output matrix W_o, and the norm of its output over its input's.

    All are at most (1 - alpha) + alpha times the product of the layers' norms, as the activations are
    1-Lipschitz and do not lengthen: maxmin sorts pairs, |GELU(z)| <= |z| and |GELU'(z)| <= GELU_SLOPE. With
    two layers they are less, as J = A + U E V with a diagonal E, |E| <= 1 (see uncertain_norm):

    - GELU: J = (1 - alpha) I + alpha W_out D W_in with D diagonal, its entries GELU'(z) / GELU_SLOPE. As
      GELU'(-z) = 1 - GELU'(z) has the largest value GELU_SLOPE, they lie in [1 / GELU_SLOPE - 1, 1] =
      [m - r, m + r], so D = m I + r E. The output is the same with GELU(z) / z, which lies in [0, 1], in
      place of GELU'(z): there m = r = 1 / (2 GELU_SLOPE). ReLU: both lie in [0, 1].
    - MaxMin: D leaves each pair or swaps it. In the coordinates (z_1 + z_2) / sqrt(2) and (z_1 - z_2) /
      sqrt(2) it is 1 and +-1, and the output is the same.
    """
    mlp, alpha, Wo = block.mlp, block.alpha, exact(block.attn.proj.weight)
    norms = [rms_norm(layer.weight).item() for layer in (mlp.fc, *mlp.mid, mlp.proj)]
    product = (1 - alpha) + alpha * math.prod(norms)
    if mlp.mid or len(Wo) > 512:  # beyond, it takes long
        return 3 * (product, )
    W_out, W_in, I = exact(mlp.proj.weight), exact(mlp.fc.weight), torch.eye(len(Wo), dtype=torch.float64)
    if mlp.activation is not maxmin:
        r, s = (1 - 1 / (2 * GELU_SLOPE), 1 / (2 * GELU_SLOPE)) if mlp.activation is gelu else (0.5, 0.5)
        of = lambda m, r: ((1 - alpha) * I + alpha * m * W_out @ W_in, alpha * r * W_out, W_in)
        (A, U, V), growing = of(1 - r, r), of(s, s)
    else:
        (out_1, out_2), (in_1, in_2) = W_out.chunk(2, dim=1), W_in.chunk(2)
        A = (1 - alpha) * I + alpha / 2 * (out_1 + out_2) @ (in_1 + in_2)
        U, V = alpha / 2 * (out_1 - out_2), in_1 - in_2
    gain = min(product, uncertain_norm(A, U, V))
    score_gain = min(gain, uncertain_norm(A @ Wo, U, V @ Wo) / max(sigma(Wo).item(), 1e-300))
    growth = gain if mlp.activation is maxmin else min(product, uncertain_norm(*growing))
    return gain, score_gain, growth


def uncertain_norm(A, U, V):
    """
    An upper bound on sigma(A + U E V) over all diagonal E, |E| <= 1, by the S-procedure: for any l >
    sigma(U)^2 and w = E V x, |w| <= |V x|, so
      |A x + U w|^2 <= |A x + U w|^2 + l (|V x|^2 - |w|^2) <= x^T (l A^T (l I - U U^T)^-1 A + l V^T V) x,
    the last for the w that makes it largest. The best l is searched for; every one is valid, and so is
    sigma(A) + sigma(U) sigma(V). As l is at least (1 + e^-7) sigma(U)^2, rounding, k u of an eigenvalue with
    k = 512 at most, counts 1,100 times in l - s, which is 1e-10.
    """
    rounding = 1e-9
    triangle = (sigma(A) + sigma(U) * sigma(V)).item()
    s, Q = torch.linalg.eigh(U @ U.mT)
    A, gram = Q.mT @ A, V.mT @ V
    top = s[-1].clamp_min(1e-30)

    def bound(t):
        l = top * (1 + math.exp(t))
        squared = l * torch.linalg.eigvalsh(A.mT @ (A / (l - s)[:, None]) + gram)[-1]
        return squared.clamp_min(0).sqrt().item() * (1 + rounding)

    low, high = -7.0, 7.0  # of t; a golden section
    points = {t: bound(t) for t in (high - 0.618 * (high - low), low + 0.618 * (high - low))}
    for _ in range(6):
        left, right = sorted(t for t in points if low < t < high)
        low, high = (low, right) if points[left] < points[right] else (left, high)
        new = high - 0.618 * (high - low) if points[left] < points[right] else low + 0.618 * (high - low)
        points[new] = bound(new)
    return min(triangle, *points.values())


def certificate(model, R=None, layers=None):
    """
    (log10 of the certified bound, its parts layer by layer) of a GPT on embeddings of RMS norm <= R, by
    default the embedding table's largest row: K with max_t |dlogits_t|_rms <= K max_t |dx_t|_rms there. That
    is the bound of all blocks times the norm of the output matrix times logit_scale. `layers` saves computing
    layer_norms again.
    """
    if not finite(model):
        return math.inf, []
    body, parts = body_bound(layers or layer_norms(model), embedding_norm(model) if R is None else R)
    return body + log10(model.config.logit_scale * rms_norm(model.head.weight).item()), parts


def body_bound(layers, R):
    """
    (log10 K, parts): the certificate but for the output matrix, for embeddings of RMS norm <= R.

    The ball is convex, so a bound on the derivative everywhere in it is a Lipschitz constant on it; and the
    chain rule multiplies the layers' bounds, each on the ball of radius R that its input stays in.
    x -> (1 - alpha) x + alpha f(x) has the gain (1 - alpha) + alpha |f'| and the radius
    (1 - alpha) R + alpha max |f|. A block, with J the derivative of its MLP half and W_o S that of attention
    through the scores, has |J ((1 - alpha) I + alpha V + alpha W_o S)| <= |J| ((1 - alpha) + alpha A_V) +
    alpha A_QK R^2 |J W_o| / |W_o|, as A_QK R^2 is a bound on |W_o| |S|.
    The projection onto a ball, as onto any convex set, has gain 1, and R is at most the ball's radius from
    there on. Everything is a log10, since K of a large model exceeds the largest float.
    """
    log10_R, total, parts = log10(R), 0.0, []
    for alpha, A_V, A_QK, mlp_gain, score_gain, mlp_growth, ball in layers:
        value, score = log10(A_V), log10(A_QK) + 2 * log10_R
        gain = log10_add(log10_mix(alpha, value) + log10(mlp_gain),
                         math.log10(alpha) + score + log10(score_gain))
        parts.append({"R": log10_R, "value": value, "score": score, "mlp": log10(mlp_gain), "gain": gain})
        log10_R = min(log10_R + log10_mix(alpha, value) + log10(mlp_growth), log10(ball))
        total += gain
    return total, parts


def layer_norms(model):
    """
    What certificate needs of each layer, whatever R: [(alpha, A_V, A_QK, MLP gain, its score gain, its
    growth, ball)], all norms infinite if a weight is not finite.
    """
    c = model.config.softmax_scale
    norms = lambda block: (*attention_norms(block.attn, c), *mlp_norms(block))
    found = each(lambda block: norms(block) if finite(block) else 5 * (math.inf, ), model.blocks)
    return [(block.alpha, *norms, block.ball or math.inf) for block, norms in zip(model.blocks, found)]


def logit_reach(model, r, layers=None):
    """
    What a change of norm r at the input can do to the difference of logits i and j, divided by |w_i - w_j|_2,
    where w_i are the output matrix's rows: for a GPT logit_scale sqrt(d) K r, where r is the largest RMS norm
    of a change over tokens, K the bound of the body on the ball that has grown by r, and d the width; for an
    MLP logit_scale K r, with L2 norms. As the head's input moves by |dh|_2 <= sqrt(d) K r, or K r, this is
    Cauchy-Schwarz: |<w_i - w_j, dh>| <= |w_i - w_j|_2 |dh|_2.
    """
    if not isinstance(model, GPT):
        norms = (sigma(exact(layer.weight)).item() for layer in model.layers[:-1])
        return model.config.logit_scale * r * math.prod(norms)
    log10_K, _ = body_bound(layers or layer_norms(model), embedding_norm(model) + r)
    return model.config.logit_scale * math.sqrt(model.config.n_embd) * r * 10 ** min(log10_K, 300.0)


def worst_case(logits, y, W, reach):
    """
    Logits (N, V) with reach |w_j - w_y| added to each but that of the label y (N,), for rows w_j of W (V, d).

    Their cross entropy, log(1 + sum_j exp(z_j - z_y)), bounds that under every change of the input that
    `reach` = logit_reach(model, r) is for, as it grows with each z_j - z_y, and none of those grows by more.
    And where y is still the largest, no such change alters the prediction.
    """
    distance = distances(W, W)[y] if len(W) < len(y) else torch.cdist(W[y], W)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide + reach * distance.scatter(1, y[:, None], 0.0)


def lead(logits, y):
    """By how much the logit of the label y (...) is larger than all others of logits (..., V): (...)."""
    y = y[..., None]
    return (logits.gather(-1, y) - logits.scatter(-1, y, -math.inf).amax(dim=-1, keepdim=True)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------
# The attack, and certified predictions

def rms(x):
    """RMS norms of vectors (..., n): (..., 1)."""
    return x.square().mean(dim=-1, keepdim=True).sqrt()


def unit(x):
    """Vectors (..., n) scaled to RMS norm 1, zeros left."""
    return x / rms(x).clamp_min(1e-30)


def ascend(f, X, R, steps=100):
    """
    The largest gain |df_T|_rms / max_t |dx_t|_rms, T the last token, found by gradient ascent over X and the
    direction dX.

    f maps (B, T, n) to (B, T, m), each of the B sequences by itself; X (B, T, n) are B starting points, which
    stay in the ball {|x_t|_rms <= R}. Given the direction u in which the output moves, the best dX is J^T u
    with every token scaled to norm 1, by duality; given dX, u is that of J dX. These two take turns, while X
    climbs u^T J(X) dX.
    """
    X, best = onto_ball(X, R).requires_grad_(), 0.0
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
    """
    A lower bound on the Lipschitz constant that `certified` bounds from above: the largest gain that `ascend`
    finds on sequences of block_size tokens in the same ball, in float64. Half of the restarts begin at
    embeddings of text, cut from tokens (N,) or else of random ids, half at random points.
    """
    net = exact_model(model)
    g = torch.Generator().manual_seed(0)
    if not isinstance(model, GPT):  # the MLP's bound is global; one image is a sequence of one token
        X = torch.randn(restarts, 1, model.config.n_in, generator=g, dtype=torch.float64)
        return ascend(lambda X: net(X.flatten(0, 1))[0][:, None], X, 1.0, steps)
    n, R = min(block_size, model.config.block_size), embedding_norm(model)
    ids = torch.randint(model.config.vocab_size, (restarts // 2, n), generator=g)
    if tokens is not None and len(tokens) > n:
        ids = tokens[torch.randint(len(tokens) - n, (restarts // 2, 1), generator=g) + torch.arange(n)]
    X = torch.randn(restarts, n, model.config.n_embd, generator=g, dtype=torch.float64)
    X = R * unit(X)
    X[:restarts // 2] = net.wte.weight[ids]
    return ascend(net.forward_embeddings, X, R, steps)


def pgd(model, x, y, eps, steps=20):
    """
    Which inputs x (B, n) with labels y (B,) stay right under projected gradient descent (Madry et al. 2018)
    in the L2 ball of radius eps around each: a tensor (B,) of bool. The ball is not cut to valid pixels, as
    the certificate's is not.
    """
    direction = lambda g: g / g.norm(dim=1, keepdim=True).clamp_min(1e-30)
    delta, right = torch.zeros_like(x), torch.ones_like(y, dtype=torch.bool)
    for _ in range(steps + 1):  # looks at x itself and after every step
        delta.requires_grad_()
        logits = model(x + delta)[0]
        right &= logits.argmax(dim=1) == y
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        gradient, = torch.autograd.grad(loss, delta)
        delta = delta.detach() + 2.5 * eps / steps * direction(gradient)
        delta = delta * (eps / delta.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    return right


def smallest_lead(W, z, y):
    """
    min_j (z_y - z_j) / |w_y - w_j|_2 over the labels j other than y (N,), of logits z (N, V) and rows w_j of
    W (V, d): (N,). It is negative where another logit is larger.
    """
    leads = (z.gather(1, y[:, None]) - z) / rows_apart(W, y).clamp_min(1e-30)
    return leads.scatter(1, y[:, None], math.inf).amin(dim=1)


@torch.no_grad()
def certified_radii(model, x, y, reach):
    """
    The L2 radius within which no change of an input x (B, n) alters the MLP's right prediction, 0 where it is
    wrong: (B,). `reach` is logit_reach(model, 1): a change of norm r moves the difference of logits i and j
    by at most r reach |w_i - w_j|, w_i being the last layer's rows.
    """
    leads = smallest_lead(model.head.weight, model(x)[0], y)
    return torch.where(leads > 0, leads / reach, 0.0)  # reach may be 0


RADII = (0.01, 0.03, 0.1)  # of changes of the embeddings, at which accuracies are given


def whole_windows(model, tokens, most=16):
    """
    Inputs (B, n) and targets (B n,) that predict every token of (N,) but the first once, in order: at most so
    many windows of block_size at a time, and at the end of the text a shorter one.
    """
    T = model.config.block_size
    n = (len(tokens) - 1) // T * T
    B = max(1, min(most, 2 ** 26 // (T * model.config.vocab_size)))
    edges = sorted({*range(0, n, B * T), n, len(tokens) - 1})
    for a, b in zip(edges, edges[1:]):
        yield tokens[a:b].view(-1, min(T, b - a)), tokens[a + 1:b + 1]


def stays_largest(model, X, y, radius, steps=20):
    """
    Which labels y (B, n) have the largest logits at the last n of embeddings X (B, T, d), and keep them under
    projected gradient ascent (Madry et al. 2018) on X, all tokens of a sequence changed at once, each within
    RMS norm `radius`, a float or (B, 1, 1): (B, n), bool. What climbs is the sum of z_j - z_y, j the largest
    wrong logit, over the labels not yet turned over.
    """
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
    """
    log10 of radii within which an attack alters the last prediction at embeddings X (B, T, d), to within one
    of 2^halvings parts of [-9, 1], inf where none does: (B,). No certified radius can be larger.
    """
    top = model.forward_embeddings(X)[:, -1:].argmax(dim=-1)
    low, high = (torch.full((len(X), 1, 1), x, dtype=X.dtype) for x in (-9.0, 1.0))
    for _ in range(halvings):
        middle = (low + high) / 2
        stays = stays_largest(model, X, top, 10 ** middle, steps=10)[..., None]
        low, high = torch.where(stays, middle, low), torch.where(stays, high, middle)
    return torch.where(high < 1, high, math.inf)[:, 0, 0]


@torch.no_grad()
def predictions(model, X):
    """
    What each prediction at embeddings X (B, T, d) can bear, and the prediction: (B T,) both.

    If the head's input h moves by |dh|_rms <= delta, the difference of logits i and j moves by at most
    logit_scale |w_i - w_j|_2 sqrt(d) delta, w_i being the head's rows; so a prediction i bears any delta up
    to min_j (z_i - z_j) / (logit_scale |w_i - w_j|_2 sqrt(d)).
    """
    W, z = model.head.weight, model.forward_embeddings(X).flatten(0, 1)  # (V, d), (B T, V)
    top = z.argmax(dim=-1)
    return smallest_lead(W, z, top) / (model.config.logit_scale * math.sqrt(W.shape[1])), top


def margins(model, tokens):
    """
    What each prediction of tokens (N,) can bear, and whether it is right, in float64: two tensors (N - 1,),
    every token but the first predicted once in windows of block_size.
    """
    net, tokens = exact_model(model), tokens.cpu()
    found = [(*predictions(net, net.wte(x)), y) for x, y in whole_windows(net, tokens)]
    return torch.cat([bears for bears, _, _ in found]), torch.cat([top == y for _, top, y in found])


def log10_radii(model, bears, layers):
    """
    log10 of the certified radius of predictions that bear a change `bears` (N,) of the head's input: no
    change of the embeddings with max_t |dx_t|_rms below the radius alters them. The ball grows by the radius,
    and the bound K with it: the radius is the largest r with r K(R_0 + r) <= bears, K without the head; found
    on a grid of 1 %, rounded down.
    """
    R = embedding_norm(model)
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


# ------------------------------------------------------------------------------------------------------------
# Local radii: the certificate at one text, by what its tokens' changes can do at the attention that is there

def local_radii(net, X, layers, norms):
    """
    log10 of the certified radii of the predictions at embeddings X (B, T, d), by log10_radii and by bounds at
    this text, two tensors (B, T): the second is never smaller, and many times larger where attention looks at
    content. `net` is in float64, layers are its layer_norms, norms its local_norms. All bounds below grow
    with the radius, so that what is certified at one is at all smaller ones; a grid of 0.1 is searched
    upwards.
    """
    by_constant = log10_radii(net, predictions(net, X)[0], layers)
    radii, facts = by_constant.clone(), facts_at(net, X)
    known = radii[radii.isfinite()]
    log10_r = known.median().item() - 0.5 if len(known) else 0.0
    while log10_r < 9 and (holding := certified_at(net, norms, facts, 10 ** log10_r)).any():
        radii[holding] = radii[holding].clamp_min(log10_r)
        log10_r += 0.1
    return by_constant.view(X.shape[:2]), radii.view(X.shape[:2])


def local_norms(net, layers):
    """What the bounds at a text need of each block whatever the text: spectral norms, by name."""
    return [block_norms(block, layer[3]) for block, layer in zip(net.blocks, layers)]


def block_norms(block, mlp_gain):
    attn, mlp = block.attn, block.mlp
    H, dh = attn.n_head, attn.d_head
    *Wqk, Wv = exact(attn.qkv.weight).view(-1, H, dh, H * dh)         # each (H, d_head, d)
    Wo = exact(attn.proj.weight)
    Wo_h = Wo.view(H * dh, H, dh).transpose(0, 1)                     # (H, d, d_head)
    OV = Wo_h @ Wv                                                    # (H, d, d)
    return {"q": sigma(Wqk[0]) if Wqk else None, "k": sigma(Wqk[1]) if Wqk else None, "v": sigma(Wv),
            "o": sigma(Wo), "o_h": sigma(Wo_h), "ov_h": sigma(OV),
            "ov": sigma(OV.transpose(0, 1).flatten(1)), "fc": sigma(exact(mlp.fc.weight)), "mlp": mlp_gain}


@torch.no_grad()
def facts_at(net, X):
    """
    What the bounds need of a text, embeddings X (B, T, d) in float64, whatever the radius: for each block its
    input x and that with attention, mid, (B, T, d), and for every head attention p (B, H, T, T) of queries t
    to keys s and, unless scores are free of content, |q_t|, |k_s|, |v_s - o_t| and |Cov_p(v, k)|_F.
    """
    T, x, facts = X.shape[1], X, []
    cos, sin, seen = net.cos[:T], net.sin[:T], ~later(T, X.device)
    for block in net.blocks:
        qk, v, bias = block.attn.heads(x, cos, sin)
        scores = block.attn.scale * qk[0] @ qk[1].mT if qk else torch.zeros(len(v), 1, T, T, dtype=x.dtype)
        p = (scores if bias is None else scores + bias).masked_fill(~seen, -math.inf).softmax(dim=-1)
        mid = (1 - block.alpha) * x + block.alpha * block.attn(x, cos, sin)
        fact = {"x": x, "mid": mid, "p": p, "seen": seen}
        if qk:
            q, k = qk
            o = p @ v
            pairs = (v[..., :, None] * k[..., None, :]).flatten(-2)               # (B, H, T, d_head^2)
            cov = p @ pairs - (o[..., :, None] * (p @ k)[..., None, :]).flatten(-2)
            apart = distances(o, v)
            fact |= {"q": q.norm(dim=-1)[..., :, None], "k": k.norm(dim=-1)[..., None, :], "apart": apart,
                     "cov": cov.norm(dim=-1), "farthest": apart.masked_fill(~seen, 0.0).amax(-1)}
        facts.append(fact)
        x = (1 - block.alpha) * mid + block.alpha * block.mlp(mid)
        x = x if block.ball is None else onto_ball(x, block.ball)
    return facts


@torch.no_grad()
def certified_at(net, norms, facts, r):
    """
    Which predictions no change of the embeddings by at most r in RMS norm, of all tokens at once, alters:
    (B T,), at the text of facts_at, with the norms of local_norms.

    Token by token, delta (B, T) bounds the L2 norm of what a token's vector can change by. Attention takes it
    to attention_change, the residual to (1 - alpha) delta + alpha times that, an MLP half to its global gain
    times delta. A ball of L2 radius rho leaves it; or, where the token and all within delta of it are longer
    than m >= rho, shrinks it by rho / m, as x rho / |x| has the derivative (I - x x^T / |x|^2) rho / |x|.
    Behind the last block it multiplies all logits of a token by one positive number, which changes no
    prediction, so it is left out there.
    """
    delta = torch.full(facts[0]["x"].shape[:2], r * math.sqrt(net.config.n_embd), dtype=torch.float64)
    for i, (block, norm, fact) in enumerate(zip(net.blocks, norms, facts)):
        change = attention_change(block.attn, norm, fact, delta)
        delta = (1 - block.alpha) * delta + block.alpha * change
        if i == len(norms) - 1:
            return leads_hold(block, norm, net.head.weight, fact["mid"].flatten(0, 1), delta.flatten())
        delta = norm["mlp"] * delta
        if block.ball is not None:
            y = (1 - block.alpha) * fact["mid"] + block.alpha * block.mlp(fact["mid"])
            rho = block.ball * math.sqrt(net.config.n_embd)
            delta = delta * (rho / (y.norm(dim=-1) - delta).clamp_min(rho))


def attention_change(attn, norm, fact, delta):
    """
    A bound (B, T) on the L2 norm of what the output of attention changes by at a text, if each token s of its
    input changes by at most delta_s (B, T) in L2 norm. For a query t and a head, b = softmax_scale / d_head:

      o' - o = sum_s p'_s dv_s + sum_s (p' - p)_s (v_s - o), as the p'_s, and the p_s, sum to 1.
    - Scores change by at most e_s = b (sigma_q delta_t |k_s| + |q_t| sigma_k delta_s + sigma_q sigma_k
      delta_t delta_s); RoPE and the bias, which depend on positions alone, change none of that.
    - p'_s = p_s exp(da_s) / E exp(da), where E is the mean under p, lies between p_s exp(-e_s) / E exp(e) and
      p_s exp(e_s) / E exp(-e). So the first sum is W_v times a vector of norm at most sum_s p'_s delta_s.
    - The second sum in three ways, of which the least counts. As sum_s p_s (v_s - o) = 0 it is sum_s p'_s
      (v_s - o), at most max_s |v_s - o|. It is at most sum_s |p'_s - p_s| |v_s - o|, by the interval above.
      And with p'_s = p_s (1 + da_s - E da + rem_s) it is sum_s p_s (da_s + rem_s) (v_s - o): of da_s, b <dq,
      k_s> gives b Cov_p(v, k) dq, at most b |Cov_p(v, k)|_F sigma_q delta_t, and the rest is at most
      b (|q_t| sigma_k delta_s + sigma_q sigma_k delta_t delta_s); and |rem_s| <= exp(e_s) / (2 - E exp(e))
      - 1 - e_s - E e while E exp(e) < 2, as the power series of exp(a_s) / (1 - E(exp(a) - 1)) without its
      terms of order 0 and 1 is, with plus for all signs and e for |a|, that of the right side.
    Over heads, changes c_h of the values' inputs give at most each of sum_h sigma(W_o^h W_v^h) c_h,
    sigma([W_o^1 W_v^1 ...]) |c| and sigma(W_o) |sigma_v c|, and changes S_h of their outputs at most each of
    sum_h sigma(W_o^h) S_h and sigma(W_o) |S|.
    """
    p, of = fact["p"], lambda name: norm[name][:, None, None]                 # (B, H, T, T); (H, 1, 1)
    d_t, d_s = delta[:, None, :, None], delta[:, None, None, :]
    inputs = (p * d_s).sum(-1)                                                # (B, H, T)
    score = torch.zeros_like(inputs)
    if "q" in fact:
        b, apart = attn.scale, fact["apart"]
        by_q = b * of("q") * d_t * fact["k"]
        by_k = b * of("k") * d_s * (fact["q"] + of("q") * d_t)
        e = (by_q + by_k).clamp_max(300.0)
        beyond = torch.where((fact["seen"] & (e == 300)).any(-1), math.inf, 0.0)  # only `farthest` is left
        up, down = e.exp(), (-e).exp()
        E = lambda f: (p * f).sum(-1, keepdim=True)
        most, least = up / E(down), down / E(up)                              # p'_s / p_s lies between them
        shares = E(torch.maximum(most - 1, 1 - least) * apart)[..., 0] + beyond
        rest = torch.where(E(up) < 2, up / (2 - E(up)) - 1 - e - E(e), 1e300)
        series = b * fact["cov"] * (of("q") * d_t)[..., 0] + E((by_k + rest) * apart)[..., 0] + beyond
        score = torch.minimum(torch.minimum(fact["farthest"], shares), series)
        inputs = torch.minimum(E(most * d_s)[..., 0] + beyond, delta.cummax(dim=1).values[:, None])
    across = lambda c: c.square().sum(1).sqrt()
    total = lambda name, c: (norm[name][:, None] * c).sum(1)
    value = torch.minimum(torch.minimum(total("ov_h", inputs), norm["ov"] * across(inputs)),
                          norm["o"] * across(norm["v"][:, None] * inputs))
    return attn.out_scale * (value + torch.minimum(total("o_h", score), norm["o"] * across(score)))


def leads_hold(block, norm, W, x, delta):
    """
    Where the largest logit stays the largest whatever the last block's MLP half is given within delta (N,) in
    L2 norm of x (N, d), for the head's rows w_j of W: (N,).

    The lead over j is l = <w_i - w_j, y>, y = (1 - alpha) x + alpha mlp(x). It changes by at most delta times
    the norm of its gradient, which is |w_i - w_j| times the MLP half's gain or less; and for an MLP of two
    layers, W_in and W_out, with u = W_out^T (w_i - w_j), it is (1 - alpha) (w_i - w_j) + alpha W_in^T D^T u,
    where D is the derivative of the activation somewhere within delta |row of W_in| of its input z:
    - GELU: D is diagonal, within 2 phi(0) / GELU_SLOPE times that distance of its value at z, since
      |GELU''| <= 2 phi(0), and in [1 / GELU_SLOPE - 1, 1].
    - ReLU: D is known where the input cannot change its sign, else in [0, 1].
    - MaxMin: for a pair whose difference cannot change its sign D is known; else D^T u lies on the
      segment between (u_1, u_2) and (u_2, u_1), at most |u_1 - u_2| / sqrt(2) from its middle.
    What is uncertain counts with its norm, times sigma(W_in).
    """
    alpha, mlp = block.alpha, block.mlp
    y = (1 - alpha) * x + alpha * mlp(x)
    z = y @ W.T
    top = z.argmax(dim=-1)
    lead = z.gather(1, top[:, None]) - z                                     # (N, V)
    apart = rows_apart(W, top)
    fails = lead <= norm["mlp"] * apart * delta[:, None]
    fails.scatter_(1, top[:, None], False)
    if mlp.mid:
        return ~fails.any(dim=1)
    rows = mlp.fc.weight                                                     # (hidden, d)
    nearest = (lead / apart.clamp_min(1e-300)).scatter(1, top[:, None], math.inf).argmin(dim=1)
    first = torch.zeros_like(fails).scatter_(1, nearest[:, None], True) & fails
    lost = torch.zeros_like(top, dtype=torch.bool)                           # to the nearest rival: enough
    for n, j in (part.unbind(1) for which in (first, fails & ~first) for part in which.nonzero().split(4096)):
        n, j = n[~lost[n]], j[~lost[n]]                                      # predictions, and rivals
        w, a = W[top[n]] - W[j], mlp.fc(x[n])
        u, reach = w @ mlp.proj.weight, delta[n, None]                       # (pairs, hidden), (pairs, 1)
        if mlp.activation is not maxmin:
            reach = rows.norm(dim=1) * reach                                 # of each input
            slope, off = torch.where(a.abs() > reach, (a > 0).double(), 0.5), 0.5 * (a.abs() <= reach)
            if mlp.activation is gelu:
                slope = (0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * normal_density(a)) / GELU_SLOPE
                off = 2 * normal_density(torch.zeros(())) / GELU_SLOPE * reach
                off = torch.minimum(off, torch.maximum(1 - slope, slope - (1 / GELU_SLOPE - 1)))
            middle, off = slope * u, (off * u).norm(dim=1)
        else:
            (a1, a2), (u1, u2), (r1, r2) = a.chunk(2, dim=1), u.chunk(2, dim=1), rows.chunk(2)
            sure = (a1 - a2).abs() > (r1 - r2).norm(dim=1) * reach
            m1, m2 = torch.where(a1 > a2, u1, u2), torch.where(a1 > a2, u2, u1)
            between = (u1 + u2) / 2
            middle = torch.cat((torch.where(sure, m1, between), torch.where(sure, m2, between)), dim=1)
            off = torch.where(sure, 0.0, u1 - u2).norm(dim=1) / math.sqrt(2)
        gradient = ((1 - alpha) * w + alpha * middle @ rows).norm(dim=1) + alpha * norm["fc"] * off
        lost[n[lead[n, j] <= gradient * delta[n]]] = True
    return ~lost


def normal_density(z):
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


# ------------------------------------------------------------------------------------------------------------
# Report, and the command line

ATTACKED = 2048             # tokens, at once
LOCAL = 512                 # tokens, with radii at the text
ALONE, CONTEXT = 24, 32     # predictions attacked one by one, each the last of so many tokens


def at_most(n, model):
    """n, or fewer predictions if the vocabulary is large."""
    return min(n, max(2, 2 ** 23 // model.config.vocab_size))


def report(path, steps):
    """(dict, text): a GPT's norms, its bounds with their parts, an attack, certified predictions."""
    model, ckpt = load_checkpoint(path)
    norms = matrix_norms(model)
    result = {"checkpoint": str(path), "step": ckpt["step"], "method": ckpt["config"]["method"],
              "w_max": ckpt["config"]["w_max"],
              "norms": {name: norms[W].flatten().tolist() for name, W in matrices(model).items()}}
    head = f"{path} at step {ckpt['step']}, method {result['method']}, w_max {result['w_max']:g}\n"
    if not isinstance(model, GPT):
        return report_mlp(model, result, head, steps)
    layers, R, text = layer_norms(model), embedding_norm(model), None
    folder = Path("data") / ckpt["config"]["dataset"]
    if (folder / "meta.json").exists():
        n = max(4096, 2 ** 23 // model.config.vocab_size)  # all of Shakespeare's validation split
        _, _, val = open_data(folder, like=ckpt["meta"])
        text = torch.from_numpy(val[0][:n].astype(np.int64))
    certified, parts = certificate(model, R, layers)
    found, paper = log10(attack(model, steps=steps, tokens=text)), lipschitz_bound(model, "paper", norms)
    broken = paper is not None and found > paper
    result |= {"embedding": R, "log10_layers": parts, "log10_attack": found, "log10_certified": certified,
               "log10_paper": paper, "paper_broken": broken}
    formula = "published formula: for other architectures"
    if paper is not None:  # the authors' networks are scaled too, but their formula does not count it
        unscaled = result["log10_paper_unscaled"] = paper - log10(model.config.logit_scale)
        formula = (f"published formula {paper:.4f}, without logit_scale {unscaled:.4f}, " +
                   ("broken by the attack" if broken else "not an upper bound in general"))
    lines = [head, *norm_lines(model, result["norms"]),
             f"embedding {R:.4f}, head {result['norms']['head'][0]:.4f}, logit_scale "
             f"{model.config.logit_scale:g}\n",
             columns("log10 of", "R", "value", "score", "MLP", "gain") + "   (R: norm of the layer's input)",
             *(columns(f"layer {i}", *part.values()) for i, part in enumerate(parts)),
             "\nlog10 of the Lipschitz constant, embeddings -> logits:",
             f"  attack {found:.4f} <= certified {certified:.4f}    ({formula})"]
    if text is None:
        lines.append(f"no data in {folder}, so the attack began at random tokens and no prediction was "
                     "certified")
        return result, "\n".join(lines)
    scores = certified_predictions(model, layers, text)
    lines.append(f"\naccuracy on {len(text):,} tokens of the validation split: {scores['val_acc']:.2%}")
    if scores["log10_median_radius"] is not None:
        radius = 10 ** scores["log10_median_radius"]
        lines[-1] += f"; median certified radius of a right prediction {radius:.1e}"
    at = ", ".join(f"{radius}: {share:.2%}" for radius, share in scores["certified_accuracy"].items())
    lines.append(f"certified accuracy at radius {at}")
    few = len(text[:at_most(ATTACKED, model)])
    lines.append(f"\naccuracy at radius  certified   of the first {few:,}: certified, attack, plain")
    for radius, accuracy in scores["radii"].items():
        first = ", ".join(f"{accuracy[f'{kind}_first']:.2%}" for kind in ("certified", "attack", "plain"))
        lines.append(f"{radius:>18}  {accuracy['certified']:9.2%}   {first}")
    local = scores["local"]
    medians = " -> ".join(f"{10 ** x:.1e}" for x in local["log10_median"].values())
    at = ", ".join(f"{r}: {a:.1%} -> {b:.1%}" for r, (a, b) in local["certified_accuracy"].items())
    few = len(text[:at_most(LOCAL, model)])
    lines.append(f"\nradii of the first {few:,} by the constant -> at the text: median {medians}; certified "
                 f"accuracy at {at}")
    lines.append(f"medians of {len(local['alone'])} predictions attacked one by one: " +
                 " <= ".join(f"{name} {10 ** x:.1e}" for name, x in local["log10_median_alone"].items()))
    lines.append("rounding moves a logit by up to {float32:.1e} in float32, {bfloat16:.1e} in bfloat16; the "
                 "largest logit leads by {median_lead:.2f} in the median".format(**scores["rounding"]))
    return result | scores, "\n".join(lines)


def columns(name, *values):
    """A row of a report's table."""
    cells = (f"{value:8.4f}" if isinstance(value, float) else f"{value:>8}" for value in values)
    return f"{name:<14} " + " ".join(cells)


def norm_lines(model, norms):
    """The table of a GPT's norms: of heads that are constrained one by one and middle layers the largest."""
    yield columns("RMS->RMS norms", "W_q", "W_k", "W_v", "W_o", "W_in", "W_mid", "W_out")
    for i, block in enumerate(model.blocks):
        of = lambda kind: norms[f"blocks.{i}.{kind}"]
        qkv = torch.tensor(of("attn.qkv")).view(3 if block.attn.scale else 1, -1).amax(dim=1).tolist()
        mid = [max(of(f"mlp.mid.{j}")[0] for j in range(len(block.mlp.mid)))] if block.mlp.mid else ["-"]
        yield columns(f"layer {i}", *["-"] * (3 - len(qkv)), *qkv, *of("attn.proj"), *of("mlp.fc"), *mid,
                      *of("mlp.proj"))


def share(which):
    """The share of true ones in a tensor of bool."""
    return which.double().mean().item()


def at_radii(model, text, right, log10_radii):
    """
    Accuracy at each of RADII, certified on all of text (N,); and on its first ATTACKED tokens what is
    certified, what an attack leaves, and the plain one: what holds at a radius lies between the first two.
    """
    n = at_most(ATTACKED, model)
    few, first = right[:n - 1], log10_radii[:n - 1]
    return {f"{r:g}": {"certified": share(right & (log10_radii > math.log10(r))),
                       "certified_first": share(few & (first > math.log10(r))),
                       "attack_first": share(attacked(model, text[:n], r)),
                       "plain_first": share(few)} for r in RADII}


def at_text(model, layers, text):
    """
    Of the first LOCAL tokens of text (N,) the radii by the constant and at the text, of right predictions;
    and of ALONE predictions all over the text both radii and one at which an attack succeeds. All as log10.
    """
    net, median = exact_model(model), lambda x: x.median().item()
    norms = local_norms(net, layers)
    found = [(*local_radii(net, net.wte(x), layers, norms), predictions(net, net.wte(x))[1] == y)
             for x, y in whole_windows(net, text[:at_most(LOCAL, net) + 1], 1)]
    by_constant, local, right = (torch.cat([part.flatten() for part in parts]) for parts in zip(*found))
    n, count = min(CONTEXT, net.config.block_size, len(text)), at_most(ALONE * CONTEXT, net) // CONTEXT
    starts = torch.linspace(0, len(text) - n, max(1, count)).long()
    X = net.wte(torch.stack([text[i:i + n] for i in starts]))
    alone = [radii[:, -1] for radii in local_radii(net, X, layers, norms)] + [attack_radii(net, X)]
    names = ("constant", "local", "attack")
    at = lambda x: [share(right & (radii > x)) for radii in (by_constant, local)]
    certified = {f"1e{x}": at(x) for x in range(-5, 0)}
    medians = [median(radii[right]) for radii in (by_constant, local)] if right.any() else [-math.inf] * 2
    return {"log10_median": dict(zip(names, medians)), "certified_accuracy": certified,
            "log10_median_alone": {name: median(radii) for name, radii in zip(names, alone)},
            "alone": [dict(zip(names, radii)) for radii in zip(*(radii.tolist() for radii in alone))]}


@torch.inference_mode()
def rounding(model, text):
    """
    How far float32 and bfloat16 move a logit of the first LOCAL predictions of text (N,), at most, and the
    median lead of the largest logit: the bounds are about real numbers.
    """
    leads, off = [], {"float32": 0.0, "bfloat16": 0.0}
    net = exact_model(model)
    for x, _ in whole_windows(net, text[:at_most(LOCAL, net) + 1]):
        z = net(x)[0]
        leads.append(lead(z, z.argmax(dim=-1)).flatten())
        for dtype in off:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                off[dtype] = max(off[dtype], (model(x)[0].double() - z).abs().max().item())
    return off | {"median_lead": torch.cat(leads).median().item()}


def certified_predictions(model, layers, text):
    """
    Accuracy on tokens (N,), plain, certified at radii around the median, and at RADII beside an attack; and
    the first 256 radii.
    """
    bears, right = margins(model, text)
    radii = log10_radii(model, bears, layers)
    median = radii[right].median().item() if right.any() else -math.inf  # -inf: a tie has radius 0
    middle = round(median) if median > -math.inf else 0
    certified = {f"1e{x}": share(right & (radii > x)) for x in range(middle - 2, middle + 2)}
    characters = zip(text[1:257].tolist(), right[:256].tolist(), radii[:256].tolist())
    return {"val_acc": share(right), "certified_accuracy": certified,
            "radii": at_radii(model, text, right, radii), "local": at_text(model, layers, text),
            "rounding": rounding(model, text),
            "log10_median_radius": median if median > -math.inf else None,
            "characters": [{"token": t, "right": r, "log10_radius": x} for t, r, x in characters]}


def report_mlp(model, result, head, steps):
    """Norms, bound and an attack for an MLP; its accuracy on perturbed images is in train.py's log."""
    found, certified = log10(attack(model, steps=steps)), lipschitz_bound(model, "certified")
    norms = ", ".join(f"{norm[0]:.4f}" for norm in result["norms"].values())
    text = (f"{head}RMS->RMS norms of the layers: {norms}\n"
            f"log10 of the Lipschitz constant, images -> logits: attack {found:.4f} <= certified "
            f"{certified:.4f}")
    return result | {"log10_attack": found, "log10_certified": certified}, text


def main():
    parser = Parser(description="Norms and Lipschitz bounds of a checkpoint.")
    parser.add_argument("ckpt", help="checkpoint written by train.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=number(int, 0, 10 ** 9), default=100,
                        help="of the attack's gradient ascent [100]")
    args = parser.parse_args()
    keep_memory()
    with one_line_errors("constrain.py"):
        result, text = report(args.ckpt, args.steps)
        say(to_json(result) if args.json else text)


if __name__ == "__main__":
    main()
