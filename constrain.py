"""
Weight constraints, and the Lipschitz bound that they give to the network.

    python constrain.py out/shakespeare/ckpt.pt     # norms and bounds, layer by layer

In a training loop of your own, under torch.no_grad(), once W.copy_(project(W, w_max)) and after every step of
Muon at learning rate lr (after other optimizers' steps hard_cap(W, Step(w_max))):

    W.copy_(soft_cap(W, Step(w_max, lr, update_norm=lr * UPDATE_NORM)))

Paper: Newhouse et al., Training Transformers with Enforced Lipschitz Constants (arXiv 2507.13338). Norms of
matrices are RMS->RMS operator norms throughout: an (m, n) matrix, m outputs and n inputs, has the norm
sqrt(n/m) * sigma_max. What is exact, norms and bounds, is computed in float64 on the CPU, as not every GPU
has float64. results/certify.py attacks the bound and certifies predictions.
"""
import copy
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch

from model import ACTIVATIONS, GELU_SLOPE, GPTConfig, load_checkpoint, rotary_tables
from optim import POLAR, UPDATE_NORM, orthogonalize, polar_steps
from prepare import Parser, one_line_errors, say

# ------------------------------------------------------------------------------------------------------------
# Norms

def rms_unit(W):
    """sqrt(m/n): the largest singular value of an (m, n) matrix of RMS->RMS norm 1."""
    return math.sqrt(W.shape[-2] / W.shape[-1])


def exact(W):
    """W in float64 on the CPU, without a gradient."""
    return W.detach().cpu().double()


@contextmanager
def one_thread():
    """
    Torch on one thread. Decompositions of matrices as small as these gain little from more, and on a busy
    machine each of the thousand times that the threads of one meet waits for the scheduler.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def sigma(W):
    """
    Largest singular values of float64 (..., m, n), as a tensor (...): the root of the largest eigenvalue of
    the smaller Gram matrix, ten times faster than an SVD and, for the largest one, as exact: to 1e-13 here.
    NaN for matrices that are not finite, at which LAPACK would raise an error.
    """
    W = W if W.shape[-2] <= W.shape[-1] else W.mT
    gram = W @ W.mT
    known = gram.isfinite().all(dim=-1).all(dim=-1)
    with one_thread():
        squares = torch.linalg.eigvalsh(torch.where(known[..., None, None], gram, 0.0))[..., -1]
    return torch.where(known, squares.clamp_min(0).sqrt(), math.nan)


def rms_norm(W):
    """RMS->RMS operator norms of (..., m, n), exactly (in float64), as a float64 tensor (...)."""
    return sigma(exact(W)) / rms_unit(W)


def matrices(model):
    """{name: weight (..., m, n)} of what is constrained: all but the embedding table and position biases."""
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters()
            if p.ndim >= 2 and not name.endswith(("wte.weight", "bias"))}


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


# ------------------------------------------------------------------------------------------------------------
# The constraints. Each maps a batch (..., m, n) to a new one; train.py calls it after every optimizer step.
# To add one, write a function under @constraint().

# Muon's iteration made exact: its second step, which lifts small singular values by 3.96 and keeps the others
# in their interval, three more times; and a step of Newton-Schulz, which takes [0.991, 0.993] to within 2e-6
# of 1, from below.
EXACT_POLAR = POLAR[:1] + POLAR[1:2] * 4 + POLAR[2:] + ((15 / 8, -10 / 8, 3 / 8),)

# The polynomial of degree 5 nearest to psi(y) = 1 / (y + 1 + sqrt(y + 1)) on [0, 3], its error weighed by
# what it does to a singular value in hard_cap, y sqrt(y + 1): that is at most 2.4e-4.
PSI = (0.494527, -0.331985, 0.187114, -0.070508, 0.014907, -0.001316)

METHODS, HOLDS = {}, {}  # name: constraint; name: after which steps it holds all norms at w_max


class Step(NamedTuple):
    """The optimizer step that a constraint comes after."""
    w_max: float                    # the largest norm that a matrix may have
    lr: float = 0.0                 # the step's learning rate
    decay: float = 0.0              # the share of W that it took off, lr * weight_decay
    update_norm: float = math.inf   # a bound on the norm of its update; AdamW's has none
    dtype: torch.dtype = torch.float32  # what inner products may have

    @property
    def small(self):
        """Whether a cap can take the step back in bfloat16."""
        return self.update_norm <= 0.03 * self.w_max


def constraint(holds="never"):
    """
    Registers f(W, step), a map of matrices (..., m, n). `holds` is when it leaves all norms at most at w_max:
    "always", after "bounded" steps, as Muon's are and AdamW's are not, or "never".
    """
    def register(f):
        METHODS[f.__name__], HOLDS[f.__name__] = f, holds
        return f
    return register


def holds_w_max(method, update_norm):
    """Whether a method leaves norms of at most w_max after steps of norm <= update_norm."""
    return HOLDS[method] == "always" or (HOLDS[method] == "bounded" and math.isfinite(update_norm))


def project(W, w_max):
    """
    W (..., m, n), whatever its norms, with those above w_max (1 + 1e-3) capped by an SVD: for weights from
    elsewhere, before the first step. The methods are for matrices that one step has taken out of their cap.
    """
    above = (rms_norm(W) > (1 + 1e-3) * w_max).to(W.device)
    return torch.where(above[..., None, None], svd_cap(W, Step(w_max)), W) if above.any() else W


@constraint()
def none(W, step):
    """No constraint; with the optimizer's weight_decay the paper's weight decay, W <- (1 - lr decay) W."""
    return W.clone()


@constraint()
def spectral_weight_decay(W, step):
    """W - decay sigma_1 u_1 v_1^T: weight decay of the largest singular value alone (paper, section 3)."""
    sigma, u, v = top_singular(W, step.dtype)
    return W - step.decay * sigma * u @ v.mT


@constraint(holds="always")
def spectral_normalize(W, step):
    """W min(1, w_max / |W|): the whole matrix scaled down (Miyato et al. 2018; the paper, section 3)."""
    sigma, _, _ = top_singular(W, step.dtype)
    return W * (step.w_max * rms_unit(W) / sigma.clamp_min(torch.finfo(W.dtype).tiny)).clamp_max(1)


@constraint()
def spectral_hammer(W, step):
    """
    W - max(0, sigma_1 - w_max) u_1 v_1^T: only the largest singular value is set to w_max (paper, section 3).

    Does not promise norm w_max: a step may lift several singular values over it, and this takes back one.
    Unlike the paper's it leaves a matrix alone whose norm is below w_max, so that it never inflates one.
    """
    sigma, u, v = top_singular(W, step.dtype)
    return W - (sigma - step.w_max * rms_unit(W)).clamp_min(0) * u @ v.mT


@constraint(holds="always")
def stiefel(W, step):
    """
    w_max U V^T: every singular value of W = U S V^T set to w_max, the Stiefel manifold (paper, section 3).

    After an optimizer step W is near it. With X = W / w_max and E = X X^T - I, whose norm is then at most
    1/2, three steps X <- X + (3/8 E^2 - 1/2 E) X of Newton-Schulz take every singular value to within 1e-5 of
    1: a step turns an error e into about 5/2 e^3. All products but the last E are in `dtype`: they are
    corrections. Farther off Muon's iteration does it.
    """
    scale = step.w_max * rms_unit(W)
    X = (W / scale).reshape(-1, *W.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    I = torch.eye(X.shape[-2], device=W.device)
    for i, products in enumerate((step.dtype, step.dtype, torch.float32)):
        X_ = X.to(products)
        E = (X_ @ X_.mT - I).to(step.dtype)  # I is float32, and E small
        E2 = E @ E
        if i == 0 and not ((E2 @ E2).float().norm(dim=(-2, -1)) <= 0.5 ** 4).all():  # at least |E|
            return scale * orthogonalize(W, EXACT_POLAR)
        X = X + ((3 / 8 * E2 - E / 2) @ X.to(step.dtype)).float()
    return scale * (X.mT if tall else X).reshape(W.shape)


@constraint(holds="bounded")
def soft_cap(W, step):
    """
    soft_cap_polynomial with the alpha that takes back a step of Muon (the paper, section 3). AdamW's steps
    have no fixed norm; after those it promises nothing. It is for W that had norm <= w_max before the step:
    far above its cap the polynomial makes norms larger, so matrices from elsewhere need `project` first.
    """
    alpha = soft_cap_coupling(step.w_max, step.decay, step.lr * UPDATE_NORM)
    return soft_cap_polynomial(W, alpha, step.dtype if step.small else torch.float32)


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


@constraint(holds="always")
def hard_cap(W, step):
    """
    sigma -> min(sigma, w_max) from a matrix sign (the paper, section 3; Cesista 2025), without an SVD.

    With w 0.6 % below w_max, X = W / w and Y = X X^T - I, of eigenvalues y = (sigma/w)^2 - 1, it is
    W - max(Y, 0) psi(Y) W: max(Y, 0) = Y (I + sign Y) / 2, where the sign comes from Muon's iteration, and
    psi(y) = 1 / (y + 1 + sqrt(y + 1)) from a polynomial on [0, 3]. The result is within 1 % of w_max of the
    exact one, and not above w_max: where the sign has not converged, near w, and everywhere for norms up to
    1.1 w_max in bfloat16, what is missing is less than w leaves room for. All products but the first and the
    last are on the smaller side. A batch with norms near 2 w_max or beyond goes through the SVD.
    """
    dtype = step.dtype if step.small else torch.float32
    w = step.w_max * rms_unit(W) * (1 - 6e-3)
    X = (W / w).to(dtype).reshape(-1, *W.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]
    I = torch.eye(min(X.shape[-2:]), dtype=dtype, device=W.device)
    Y = (X.mT @ X if tall else X @ X.mT) - I
    Y2 = Y @ Y
    size = (Y2 @ Y2).float().norm(dim=(-2, -1), keepdim=True) ** (1 / 4)  # from |y|_max to n^(1/8) times it
    if not (size <= 3).all():
        return svd_cap(W, step)
    # Muon's first step would take [-1, 1] to [-1.9, 1.9]. Without it y must be above 0.025 size to come out
    # at 0.991 to 0.993
    sign = polar_steps(Y * (1.8 / size.clamp_min(1e-3)).to(dtype), POLAR[1:]) / 0.992
    positive = torch.baddbmm(Y, Y, sign, beta=0.5, alpha=0.5)
    a, b, c, d, e, f = PSI
    psi = a * I + b * Y + Y2 @ (c * I + d * Y + Y2 @ (e * I + f * Y))
    D = (positive @ psi).reshape(*W.shape[:-2], *I.shape)
    W_ = W.to(dtype)
    return W - (W_ @ D if tall else D @ W_)


@constraint(holds="always")
def svd_cap(W, step):
    """sigma -> min(sigma, w_max) by an SVD in W's precision: the reference for hard_cap."""
    with one_thread():
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U * S.clamp_max(step.w_max * rms_unit(W))[..., None, :] @ Vh


# ------------------------------------------------------------------------------------------------------------
# What is proved: the function that the certificate is about, and whether a model computes it

ROUNDING = 1e-6  # the share by which every certificate is larger, for what float64 and RoPE's tables round


def proved_function(config, weights, x):
    """
    The function that all proofs are about: embeddings x (T, n_embd) -> logits (T, vocab_size), in float64,
    from the configuration and {name: weight}, of which it takes out what it uses.
    """
    c, (T, d) = config, x.shape
    H, d_head, alpha = c.n_head, d // c.n_head, c.alpha or 1 / (2 * c.n_layer)
    back = torch.arange(T)[:, None] - torch.arange(T)                           # (T, T): query t - key s
    frequencies = 10000.0 ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), frequencies)     # (T, d_head / 2), RoPE's
    turned = lambda y: torch.complex(*y.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    for i in range(c.n_layer):
        W = lambda name: weights.pop(f"blocks.{i}.{name}").double()
        *qk, v = (W("attn.qkv.weight").view(-1, d, d) @ x.mT).view(-1, H, d_head, T).mT  # (H, T, d_head) each
        scores = torch.zeros(H, T, T, dtype=torch.float64)
        if c.softmax_scale:
            q, k = map(turned, qk)
            scores = c.softmax_scale / d_head * (q @ k.mH).real
        if c.position_bias:
            scores = scores + W("attn.bias")[:, back.clamp_min(0)]
        p = scores.masked_fill(back < 0, -math.inf).softmax(dim=-1)
        heads = (p @ v).transpose(0, 1).flatten(1)                              # (T, d)
        x = (1 - alpha) * x + alpha * c.attn_scale * heads @ W("attn.proj.weight").T
        h = x
        for name in ("fc", *(f"mid.{j}" for j in range(c.mlp_layers - 2))):
            h = ACTIVATIONS[c.activation].f(h @ W(f"mlp.{name}.weight").T)
        x = (1 - alpha) * x + alpha * h @ W("mlp.proj.weight").T
        if c.ball is not None:
            x = x / (x.square().mean(dim=-1, keepdim=True).sqrt() / c.ball).clamp_min(1)
    return c.logit_scale * x @ weights.pop("head.weight").double().T


def refused(model):
    """
    None, or the line that says why a model gets no certificate: its weights are not finite, it computes
    something else than proved_function, it has parameters that this does not use, or its activation is not
    what ACTIVATIONS says.

    Compared are the logits of a float64 copy, of random tokens and of random embeddings of several sizes, in
    windows of block_size or, of large models, of fewer tokens: what only shows beyond goes unseen. Zeros, as
    many matrices begin with, are replaced by random numbers, so that nothing hides behind them; and large
    weights are scaled down, as rounding decides what saturated attention looks at.
    """
    mend = "take the edit back, or make it in constrain.proved_function too and prove its bound there"
    try:
        net = exact_model(model)
        if not finite(net):
            return "no certificate: there are weights that are not finite"
        c, g = net.config, torch.Generator().manual_seed(0)
        if wrong := misclaimed(ACTIVATIONS[c.activation]):
            return f"no certificate: {wrong} (activation {c.activation}, see ACTIVATIONS in model.py)"
        weights = dict(net.named_parameters(remove_duplicate=False))
        for W in weights.values():
            if not W.any():
                W.uniform_(-1, 1, generator=g).div_(math.sqrt(W.shape[-1]))
            W.div_((W.square().mean().sqrt() * math.sqrt(W.shape[-1]) / 3).clamp_min(1))  # norms of some 3
        size = sum(W.numel() for W in weights.values())
        T = min(c.block_size, max(8, 4 * 10 ** 9 // size))
        ids = torch.randint(c.vocab_size, (1, T), generator=g)
        table, x = weights.pop("wte.weight"), torch.randn(3, T, c.n_embd, generator=g, dtype=torch.float64)
        x *= embedding_norm(net) * torch.tensor([1.0, 0.1, 1e-3])[:, None, None]
        found = torch.cat((net(ids)[0], net.forward_embeddings(x)))
        for y, at in zip(found, (table[ids[0]], *x)):
            left = dict(weights)
            expected = proved_function(c, left, at)
            if left:
                return f"no certificate: constrain.proved_function does not use {min(left)}; {mend}"
            off = ((y - expected).abs().max() / expected.abs().max()).item()
            if not off < 1e-6:
                return ("no certificate: the model computes something else than constrain.proved_function, "
                        f"logits differ by {off:.1g} of the largest; {mend}")
    except Exception as e:  # an edit may break the comparison anywhere
        reason = (str(e).splitlines() or [""])[0]
        return (f"no certificate: the model is not the one of constrain.proved_function ({type(e).__name__}: "
                f"{reason}); {mend}")


def misclaimed(activation):
    """None, or which claim of an Activation is missing, or is false on a grid of points in [-1000, 1000]."""
    f, half = activation.f, torch.logspace(-6, 3, 10_000, dtype=torch.float64)
    z = torch.cat((-half.flip(0), half)).requires_grad_()
    if activation.sorts_pairs:
        shuffled = z.detach()[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]
        pairs = torch.stack(shuffled.chunk(2)).sort(dim=0, descending=True).values
        return None if torch.equal(f(shuffled), pairs.flatten()) else "it does not sort pairs"
    if activation.slope is None or activation.ratio is None:
        return "nothing is known of it that a proof could use"
    with torch.enable_grad():
        slope, = torch.autograd.grad(f(z).sum(), z)
    z = z.detach()
    if not torch.equal(f(z).flip(0), f(z.flip(0))):
        return "it does not work on each entry by itself"
    bends = slope.diff().abs() <= activation.curvature * z.diff() * (1 + 1e-6) + 1e-9
    bends |= (z[1:] > 0) & (z[:-1] < 0) & activation.kink
    for name, y, (low, high) in (("slope", slope, activation.slope), ("ratio", f(z) / z, activation.ratio)):
        if not (y >= low - 1e-9).all() or not (y <= high + 1e-9).all():
            return (f"its {name}, claimed to be from {low:.4g} to {high:.4g}, goes from {y.min():.4g} to "
                    f"{y.max():.4g}")
    return None if bends.all() else "its slope changes faster than its curvature allows"


@torch.inference_mode(False)  # what is made within it cannot be attacked
def exact_model(model):
    """A copy in float64 on the CPU, without gradients, of a model that may be compiled."""
    model = getattr(model, "_orig_mod", model)
    wide = lambda p: torch.nn.Parameter(p.detach().to("cpu", torch.float64, copy=True), requires_grad=False)
    net = copy.deepcopy(model, {id(p): wide(p) for p in model.parameters()}).cpu().double().eval()
    tables = rotary_tables(net.config.block_size, net.config.n_embd // net.config.n_head)
    for name, table in zip(("cos", "sin"), tables):  # not those of float32, if they are the same but for that
        if (getattr(net, name) - table).abs().max() < 1e-6:
            setattr(net, name, table)
    return net


def finite(module):
    """Whether all weights are finite. A module with others has no bound."""
    return all(x.isfinite() for p in module.parameters() for x in torch.aminmax(p))


def embedding_norm(model):
    """The largest RMS norm of a row of the embedding table."""
    table = exact(model.wte.weight)
    return torch.linalg.vector_norm(table, dim=1).max().item() / math.sqrt(table.shape[1])


# ------------------------------------------------------------------------------------------------------------
# The Lipschitz bound. All is in powers of ten, since K of a large model exceeds the largest float.

def log10(x):
    """log10 of a norm, for NaN inf: what is unknown bounds nothing."""
    return math.log10(x) if x > 0 else -math.inf if x == 0 else math.inf


def log10_add(a, b):
    """log10(10^a + 10^b), for powers that may be too large for a float."""
    return max(a, b) + math.log10(1 + 10 ** -abs(a - b)) if math.isfinite(max(a, b)) else max(a, b)


def log10_mix(alpha, log10_x):
    """log10((1 - alpha) + alpha x) from log10(x)."""
    return log10_add(log10(1 - alpha), math.log10(alpha) + log10_x)


def lipschitz_bound(model, kind):
    """
    log10 of a Lipschitz bound of a GPT, `paper` or `certified`, else ValueError; both are about
    forward_embeddings, from the largest RMS norm over tokens at the input to that at the logits.

    `certified` is an upper bound on the ball whose radius is the embedding table's largest row (see
    body_bound), and infinite for a model that is `refused`. `paper` is the formula of the authors' code,
    whose value can lie below the true constant, and None for a model not of their kind (see paper_bound).
    """
    if kind not in ("paper", "certified"):
        raise ValueError(f"kind is 'paper' or 'certified', not {kind!r}")
    return lipschitz_bounds(model)[kind]


def lipschitz_bounds(model, layers=None):
    """{"certified": log10, "paper": log10 or None}; `layers` saves computing layer_norms again."""
    if refused(model):
        return {"certified": math.inf, "paper": None}
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    return {"certified": certificate(model, layers)[0], "paper": paper_bound(model)}


def certificate(model, layers=None):
    """
    (log10 of the certified bound, its parts layer by layer) of a GPT that is not `refused`: K with max_t
    |dlogits_t|_rms <= K max_t |dx_t|_rms for embeddings x of RMS norm <= the table's largest row's. That is
    the bound of all blocks times the norm of the output matrix times logit_scale.
    """
    body, parts = body_bound(layers or layer_norms(model), embedding_norm(model))
    return body + log10(model.config.logit_scale * rms_norm(model.head.weight).item()), parts


def paper_bound(model):
    """
    log10 of the published bound (calculate_lipschitz_constant in the authors' code), times logit_scale; None
    for a model with options that theirs do not have.

    Not an upper bound: it takes the heads together, GELU / 1.1289 for 1/1.1289-Lipschitz, and lets
    softmax_scale multiply the value path as well. Their networks have no position_bias, which would change no
    factor of it.
    """
    config = model.config
    ours = ("per_head", "attn_scale", "alpha", "activation", "mlp_layers", "mlp_ratio", "ball")
    if not config.softmax_scale or any(getattr(config, name) != getattr(GPTConfig, name) for name in ours):
        return None
    alpha, log10_R = config.residual_weight, 0.0
    norm = lambda layer: log10(rms_norm(layer.weight).item())
    total = norm(model.head) + log10(config.logit_scale * embedding_norm(model))
    for block in model.blocks:
        q, k, v = map(log10, rms_norm(block.attn.qkv.weight).tolist())
        w, i, o = map(norm, (block.attn.proj, block.mlp.fc, block.mlp.proj))
        # L_att = c/3 w (v + 2 v R^2 q k) = c w v (1/3 + 2/3 R^2 q k)
        L_att = log10(config.softmax_scale) + w + v + log10_mix(2 / 3, 2 * log10_R + q + k)
        L_mlp = i + o - log10(GELU_SLOPE)
        total += log10_mix(alpha, L_att) + log10_mix(alpha, L_mlp)
        log10_R += log10_mix(alpha, w + v - log10(3)) + log10_mix(alpha, L_mlp)
    return total


class LayerNorms(NamedTuple):
    """What a block's bound needs of its weights, whatever the ball; see body_bound."""
    alpha: float
    A_V: float
    A_QK: float
    mlp_gain: float
    score_gain: float
    mlp_growth: float
    ball: float


def layer_norms(model):
    """[LayerNorms] of the blocks, all infinite where a weight is not finite."""
    c = model.config
    norms = lambda block: (*attention_norms(block.attn, c.softmax_scale),
                           *mlp_norms(block, ACTIVATIONS[c.activation]))
    return [LayerNorms(block.alpha, *(norms(block) if finite(block) else 5 * (math.inf, )),
                       block.ball or math.inf) for block in model.blocks]


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
    there on.
    """
    log10_R, total, parts = log10(R), math.log10(1 + ROUNDING), []
    for layer in layers:
        value, score = log10(layer.A_V), log10(layer.A_QK) + 2 * log10_R
        through_values = log10_mix(layer.alpha, value) + log10(layer.mlp_gain)
        through_scores = math.log10(layer.alpha) + score + log10(layer.score_gain)
        gain = log10_add(through_values, through_scores)
        parts.append({"R": log10_R, "value": value, "score": score, "mlp": log10(layer.mlp_gain),
                      "gain": gain})
        log10_R += log10_mix(layer.alpha, value) + log10(layer.mlp_growth)
        log10_R = min(log10_R, log10(layer.ball))
        total += gain
    return total, parts


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


def mlp_norms(block, activation):
    """
    (gain, score gain, growth) of x -> (1 - alpha) x + alpha mlp(x), whose derivative is J: |J|, |J W_o| over
    |W_o| for attention's output matrix W_o, and the norm of its output over its input's.

    Between two linear layers an activation has derivatives of norm <= its largest |slope|, and lengthens by
    at most its largest |ratio|; for one that sorts pairs both are 1. So all three are at most
    (1 - alpha) + alpha times the product of those and the layers' norms. With two layers they are less, as
    J = A + U E V with a diagonal E, |E| <= 1 (see uncertain_norm):

    - Entry by entry: J = (1 - alpha) I + alpha W_out D W_in with D diagonal and its entries, f'(z), in the
      interval of slopes [m - r, m + r], so D = m I + r E. The output is the same with f(z) / z in place of
      f'(z) and its interval of ratios.
    - Sorted pairs: D leaves each pair or swaps it. In the coordinates (z_1 + z_2) / sqrt(2) and (z_1 - z_2) /
      sqrt(2) it is 1 and +-1, and the output is the same.
    """
    mlp, alpha, Wo = block.mlp, block.alpha, exact(block.attn.proj.weight)
    layers = (mlp.fc, *mlp.mid, mlp.proj)
    product = math.prod(rms_norm(layer.weight).item() for layer in layers)
    slope, ratio = ((1, 1), (1, 1)) if activation.sorts_pairs else (activation.slope, activation.ratio)
    steepest, longest = (max(map(abs, interval)) ** (len(layers) - 1) for interval in (slope, ratio))
    gain, growth = (1 - alpha + alpha * product * factor for factor in (steepest, longest))
    if mlp.mid or len(Wo) > 512:  # beyond, it takes long
        return gain, gain, growth
    W_out, W_in = exact(mlp.proj.weight), exact(mlp.fc.weight)
    A = (1 - alpha) * torch.eye(len(Wo), dtype=torch.float64)
    if activation.sorts_pairs:
        (out_1, out_2), (in_1, in_2) = W_out.chunk(2, dim=1), W_in.chunk(2)
        A, U, V = A + alpha / 2 * (out_1 + out_2) @ (in_1 + in_2), alpha / 2 * (out_1 - out_2), in_1 - in_2
        grown = A, U, V
    else:
        of = lambda low, high: (A + alpha * (high + low) / 2 * W_out @ W_in,
                                alpha * (high - low) / 2 * W_out, W_in)
        (A, U, V), grown = of(*slope), of(*ratio)
    gain = min(gain, uncertain_norm(A, U, V))
    score_gain = min(gain, uncertain_norm(A @ Wo, U, V @ Wo) / max(sigma(Wo).item(), 1e-300))
    return gain, score_gain, min(growth, uncertain_norm(*grown))


def uncertain_norm(A, U, V):
    """
    An upper bound on sigma(A + U E V) over all diagonal E, |E| <= 1, by the S-procedure: for any l >
    sigma(U)^2 and w = E V x, |w| <= |V x|, so
      |A x + U w|^2 <= |A x + U w|^2 + l (|V x|^2 - |w|^2) <= x^T (l A^T (l I - U U^T)^-1 A + l V^T V) x,
    the last for the w that makes it largest. The best l is searched for; every one is valid, and so is
    sigma(A) + sigma(U) sigma(V). As l is at least (1 + e^-7) sigma(U)^2, what rounds in an eigenvalue counts
    1,100 times in l - s, which is 1e-10 for matrices as large as here.
    """
    triangle = (sigma(A) + sigma(U) * sigma(V)).item()
    s, Q = torch.linalg.eigh(U @ U.mT)
    A, gram = Q.mT @ A, V.mT @ V
    top = s[-1].clamp_min(1e-30)

    def bound(t):
        l = top * (1 + math.exp(t))
        squared = l * torch.linalg.eigvalsh(A.mT @ (A / (l - s)[:, None]) + gram)[-1]
        return squared.clamp_min(0).sqrt().item()

    low, high = -7.0, 7.0  # of t; a golden section
    points = {t: bound(t) for t in (high - 0.618 * (high - low), low + 0.618 * (high - low))}
    for _ in range(6):
        left, right = sorted(t for t in points if low < t < high)
        low, high = (low, right) if points[left] < points[right] else (left, high)
        new = high - 0.618 * (high - low) if points[left] < points[right] else low + 0.618 * (high - low)
        points[new] = bound(new)
    return min(triangle, *points.values())


# ------------------------------------------------------------------------------------------------------------
# What training for a radius needs

RADII = (0.01, 0.03, 0.1)  # of changes of the embeddings, at which certified accuracies are given


def logit_reach(model, r, layers=None):
    """
    What a change of the embeddings of RMS norm r can do to the difference of logits i and j, divided by
    |w_i - w_j|_2, where w_i are the output matrix's rows: logit_scale sqrt(d) K r, with K the bound of the
    body on the ball that has grown by r, and d the width. The head's input moves by |dh|_2 <= sqrt(d) K r,
    and |<w_i - w_j, dh>| <= |w_i - w_j|_2 |dh|_2.
    `layers` saves computing layer_norms again.
    """
    log10_K, _ = body_bound(layers or layer_norms(model), embedding_norm(model) + r)
    return model.config.logit_scale * math.sqrt(model.config.n_embd) * r * 10 ** min(log10_K, 300.0)


def worst_case(logits, y, W, reach):
    """
    Logits (N, V) with reach |w_j - w_y| added to each but that of the label y (N,), for rows w_j of W (V, d).

    Their cross entropy, log(1 + sum_j exp(z_j - z_y)), bounds that under every change of the input that
    `reach` = logit_reach(model, r) is for, as it grows with each z_j - z_y, and none of those grows by more.
    And where y is still the largest, no such change alters the prediction: a claim about logits in float64,
    as those of a shorter type are off by more than many predictions lead.
    """
    distance = rows_apart(W, y).scatter(1, y[:, None], 0.0)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide + reach * distance


def rows_apart(W, i):
    """L2 distances of the rows i (N,) of W (V, d), each computed once, to all rows: (N, V)."""
    rows, where = i.unique(return_inverse=True)
    return distances(W[rows], W)[where]


def distances(A, B):
    """
    L2 distances of rows (..., m, d) and (..., n, d): (..., m, n). In float64, for certificates, by matrix
    products, rounded up by the most that these can be off: a sum of d products by d eps / 2 of their size. In
    float32, which they would leave no digits of small distances, by differences.
    """
    if A.dtype != torch.float64:
        return torch.cdist(A, B, compute_mode="donot_use_mm_for_euclid_dist")
    a, b = A.square().sum(-1)[..., :, None], B.square().sum(-1)[..., None, :]
    margin = (A.shape[-1] + 8) * torch.finfo(A.dtype).eps * (a + b)
    return (a + b - 2 * A @ B.mT + margin).clamp_min(0).sqrt()


def lead(logits, y):
    """By how much the logit of the label y (...) is larger than all others of logits (..., V): (...)."""
    y = y[..., None]
    return (logits.gather(-1, y) - logits.scatter(-1, y, -math.inf).amax(dim=-1, keepdim=True)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------
# Command line: the norms and the bounds

def columns(name, *values):
    """A row of the table."""
    cells = (f"{value:8.4f}" if isinstance(value, float) else f"{value:>8}" for value in values)
    return f"{name:<14} " + " ".join(cells)


def norm_table(model):
    """Lines of the largest norm of each kind of matrix in each block."""
    kinds = ("W_q", "W_k", "W_v") if model.config.softmax_scale else ("W_v", )
    mids = ["W_mid"] * bool(model.blocks[0].mlp.mid)
    yield columns("RMS->RMS norms", *kinds, "W_o", "W_in", *mids, "W_out")
    largest = lambda *layers: [max(rms_norm(layer.weight).item() for layer in layers)] if layers else []
    for i, block in enumerate(model.blocks):
        qkv = rms_norm(block.attn.qkv.weight).view(len(kinds), -1).amax(dim=1).tolist()
        mlp = block.mlp
        yield columns(f"layer {i}", *qkv, *largest(block.attn.proj), *largest(mlp.fc), *largest(*mlp.mid),
                      *largest(mlp.proj))


def bound_table(model):
    """Lines of the certificate's parts and of both bounds, or of why there is none."""
    why = refused(model)
    return [why] if why else bound_lines(model, *certificate(model), paper_bound(model))


def bound_lines(model, bound, parts, paper):
    """The lines of a certificate, its parts and the published formula's value or None."""
    yield columns("log10 of", "R", "value", "score", "MLP", "gain") + "   (R: norm of the layer's input)"
    yield from (columns(f"layer {i}", *part.values()) for i, part in enumerate(parts))
    yield f"\nlog10 of the Lipschitz constant, embeddings -> logits: certified {bound:.4f}"
    if paper is not None:
        unscaled = paper - log10(model.config.logit_scale)  # the authors' networks are scaled too
        yield f"published formula {paper:.4f}, without logit_scale {unscaled:.4f} (no upper bound in general)"


def main():
    parser = Parser(description="Norms and Lipschitz bounds of a checkpoint.")
    parser.add_argument("ckpt", help="checkpoint written by train.py")
    args = parser.parse_args()
    with one_line_errors("constrain.py"):
        model, ckpt = load_checkpoint(args.ckpt)
        options = ckpt["config"]
        say(f"{args.ckpt} at step {ckpt['step']}, method {options['method']}, w_max {options['w_max']:g}\n")
        for line in norm_table(model):
            say(line)
        say(f"embedding {embedding_norm(model):.4f}, head {rms_norm(model.head.weight).item():.4f}, "
            f"logit_scale {model.config.logit_scale:g}\n")
        for line in [ckpt["refused"]] if ckpt.get("refused") else bound_table(model):
            say(line)


if __name__ == "__main__":
    main()
