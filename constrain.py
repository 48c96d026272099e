"""Weight constraints, and the Lipschitz bound that they give to the network.

    python constrain.py out/shakespeare/ckpt.pt     # norms and bounds, layer by layer

In a training loop of your own, under torch.no_grad(), once W.copy_(project(W, w_max)) and after every step of
optim.py's Muon, with that step's learning rate (after other optimizers' steps hard_cap(W, Step(w_max))):

    W.copy_(soft_cap(W, Step(w_max, lr)))

Paper: Newhouse et al., Training Transformers with Enforced Lipschitz Constants (arXiv 2507.13338). Norms of
matrices are RMS->RMS operator norms throughout: an (m, n) matrix, m outputs and n inputs, has the norm
sqrt(n/m) * sigma_max. What is exact, norms and bounds, is computed in float64 on the CPU, as not every GPU
has float64.
"""
import copy
import math
from collections import namedtuple
from decimal import MAX_EMAX, Decimal, getcontext
from functools import cache
from typing import Callable, NamedTuple

import torch

from model import GPTConfig, load_checkpoint, rotary_tables
from optim import POLAR, UPDATE_NORM, of_size_1, orthogonalize, polar_steps, top_singular
from prepare import Parser, lacks_memory, one_line_errors, say


# --- Norms --------------------------------------------------------------------------------------------------

def rms_unit(W):
    """sqrt(m/n): the largest singular value of an (m, n) matrix of RMS->RMS norm 1."""
    return math.sqrt(W.shape[-2] / W.shape[-1])


def exact(W):
    """W in float64 on the CPU, without a gradient."""
    return W.detach().cpu().double()


def sigma(W):
    """Largest singular values of float64 (..., m, n): (...), NaN if they are not finite. The root of the
    largest eigenvalue of the smaller Gram matrix is as exact as an SVD, to 1e-13 here, and ten times faster.
    """
    gram = W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W
    squares = torch.linalg.eigvalsh(gram.nan_to_num(0, 0, 0))[..., -1]
    return torch.where(gram.isfinite().all(dim=(-2, -1)), squares.clamp_min(0).sqrt(), math.nan)


def rms_norm(W):
    """RMS->RMS operator norms of (..., m, n), exactly (in float64), as a float64 tensor (...)."""
    return sigma(exact(W)) / rms_unit(W)


def matrices(model):
    """{name: weight (..., m, n)} of what is constrained: all but the embedding table and position biases."""
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters()
            if p.ndim >= 2 and not name.endswith(("wte.weight", "bias"))}


# --- Constraints --------------------------------------------------------------------------------------------
# Each maps a batch (..., m, n) to a new one; train.py calls it after every optimizer step. To add one, write
# a function under @constraint().

# Muon's iteration made exact: its second step, which lifts small singular values by 3.96 and keeps the others
# in their interval, three more times; and a step of Newton-Schulz, which takes [0.991, 0.993] to within 2e-6
# of 1, from below.
EXACT_POLAR = POLAR[:1] + POLAR[1:2] * 4 + POLAR[2:] + ((15 / 8, -10 / 8, 3 / 8),)

# The polynomial of degree 5 nearest to psi(y) = 1 / (y + 1 + sqrt(y + 1)) on [0, 3], its error weighed by
# what it does to a singular value in hard_cap, y sqrt(y + 1): that is at most 7e-4.
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
    """Registers f(W, step), a map of matrices (..., m, n). `holds` is when it leaves all norms at most at
    w_max: "always", after "bounded" steps, as Muon's are and AdamW's are not, or "never".
    """
    def register(f):
        METHODS[f.__name__], HOLDS[f.__name__] = f, holds
        return f
    return register


def holds_w_max(method, update_norm):
    """Whether a method leaves norms of at most w_max after steps of norm <= update_norm."""
    return HOLDS[method] == "always" or (HOLDS[method] == "bounded" and math.isfinite(update_norm))


def project(W, w_max):
    """W (..., m, n), whatever its norms, with those above w_max (1 + 1e-3) capped by an SVD: for weights from
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


@constraint(holds="always")
def spectral_sphere(W, step):
    """W w_max / |W|, up as well as down, but zeros (Xie et al. 2026, arXiv 2601.08393: their MuonSphere or,
    with train.py --tangent, their spectral sphere optimizer, see optim.sphere_tangent).
    """
    sigma, _, _ = top_singular(W, step.dtype)
    return W / sigma.clamp_min(torch.finfo(W.dtype).tiny) * (step.w_max * rms_unit(W))


@constraint()
def hyperball(W, step):
    """W R / |W|_F with R = w_max sqrt(m/n) sqrt(min(m, n)), the Frobenius norm if all singular values were
    w_max (Wen et al. 2026, arXiv 2606.16899, where R is the first weight's). It caps no singular value: norms
    may be up to sqrt(min(m, n)) w_max. Their update, of fixed size too: --tangent, see optim.relative_size.
    """
    return of_size_1(W) * (step.w_max * rms_unit(W) * math.sqrt(min(W.shape[-2:])))


@constraint()
def spectral_hammer(W, step):
    """W - max(0, sigma_1 - w_max) u_1 v_1^T: only the largest sigma is set to w_max (paper, section 3),
    unlike the paper's never upwards. No promise of w_max: a step may lift several over it, and this takes
    back one.
    """
    sigma, u, v = top_singular(W, step.dtype)
    return W - (sigma - step.w_max * rms_unit(W)).clamp_min(0) * u @ v.mT


@constraint(holds="always")
def stiefel(W, step):
    """w_max U V^T: every singular value of W = U S V^T set to w_max, to 1e-5, but for those below 1e-4 |W|_F,
    which grow: the Stiefel manifold (paper, section 3). Three steps of Newton-Schulz near it, as after a step
    of the optimizer, farther off Muon's iteration (results/certificate.md, Hard cap and Stiefel).
    """
    scale, tall = step.w_max * rms_unit(W), W.shape[-2] > W.shape[-1]
    X = (W.mT if tall else W) / scale
    I = torch.eye(X.shape[-2], device=W.device)
    for i, products in enumerate((step.dtype, step.dtype, torch.float32)):
        X_ = X.to(products)
        E = (X_ @ X_.mT - I).to(step.dtype)  # I is float32, and E small
        E2 = E @ E
        if i == 0 and not ((E2 @ E2).float().norm(dim=(-2, -1)) <= 0.5 ** 4).all():  # at least |E|
            return scale * orthogonalize(W, EXACT_POLAR)
        X = X + ((3 / 8 * E2 - E / 2) @ X.to(step.dtype)).float()
    return scale * (X.mT if tall else X)


@constraint(holds="bounded")
def soft_cap(W, step):
    """sigma -> p(q(sigma)) with q(x) = x - alpha x^3 and p(x) = x + alpha x^3, on RMS->RMS singular values
    (the paper, section 3), and the alpha that takes back a step of Muon: W - W B^2 (3 I - 3 B + B^2), B = X^T
    X, X = sqrt(alpha) W / rms_unit(W), on the smaller side (results/certificate.md, Soft cap). Holds to 1e-3
    for W that had norm <= w_max before the step; norms far above grow, and need `project` first. After
    AdamW's steps, which have no fixed norm, it promises nothing. Only the correction of W is in bfloat16.
    """
    update_norm = step.update_norm if math.isfinite(step.update_norm) else step.lr * UPDATE_NORM
    alpha = soft_cap_coupling(step.w_max, step.decay, update_norm)
    W_ = W.to(step.dtype if step.small else torch.float32)
    X = W_ * (math.sqrt(alpha) / rms_unit(W))
    tall = X.shape[-2] >= X.shape[-1]
    B = X.mT @ X if tall else X @ X.mT
    C = B @ B
    D = C @ (C - 3 * B + 3 * torch.eye(B.shape[-1], dtype=B.dtype, device=B.device))
    return W - (W_ @ D if tall else D @ W_)


def soft_cap_coupling(w_max, weight_decay, update_norm):
    """The smallest alpha with which soft_cap brings all singular values in [0, k] to at most w_max, where k =
    w_max |1 - weight_decay| + update_norm is the largest after an optimizer step of that decay, lr times the
    optimizer's, and that norm, lr times UPDATE_NORM for Muon. ValueError for k > 2.613 w_max, where there is
    none (results/certificate.md, Soft cap).
    """
    k = w_max * abs(1 - weight_decay) + update_norm
    if k <= w_max:
        return 0.0
    low, high = 0.0, (62 / 81) ** 2 / (3 * w_max ** 2)
    k_largest = 2 / math.sqrt(3 * high)
    if k > k_largest:
        lr = update_norm / UPDATE_NORM
        largest = lr * (k_largest - w_max) / (k - w_max)
        raise ValueError(f"no soft cap holds w_max={w_max:g} at lr={lr:g}; the largest lr that it can hold "
                         f"is {largest:.4g}")
    for _ in range(100):
        alpha = (low + high) / 2
        x = min(k, 1 / math.sqrt(3 * alpha))  # which of [0, k] has the largest image
        q = x - alpha * x ** 3
        low, high = (alpha, high) if q + alpha * q ** 3 > w_max else (low, alpha)
    return high


@constraint(holds="always")
def hard_cap(W, step):
    """sigma -> min(sigma, w_max) from a matrix sign (the paper, section 3; Cesista 2025), to within 1 % of
    w_max, and not above it: W - max(Y, 0) psi(Y) W for Y = X X^T - I (results/certificate.md, Hard cap and
    Stiefel). A batch with norms near 2 w_max goes through the SVD, or from 1.5 w_max on if many singular
    values are as large.
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
    positive = torch.baddbmm(Y, Y, sign, beta=0.5, alpha=0.5)  # max(Y, 0) = Y (I + sign Y) / 2
    a, b, c, d, e, f = PSI
    psi = a * I + b * Y + Y2 @ (c * I + d * Y + Y2 @ (e * I + f * Y))
    D = (positive @ psi).reshape(*W.shape[:-2], *I.shape)
    W_ = W.to(dtype)
    return W - (W_ @ D if tall else D @ W_)


@constraint(holds="always")
def svd_cap(W, step):
    """sigma -> min(sigma, w_max) by an SVD, in float32 or W's own precision: the reference for hard_cap. A
    matrix that is not finite becomes NaN.
    """
    finite = W.isfinite().all(dim=(-2, -1), keepdim=True)
    wide = W.nan_to_num(0, 0, 0).to(torch.promote_types(W.dtype, torch.float32))  # else the SVD raises
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    return torch.where(finite, U * S.clamp_max(step.w_max * rms_unit(W))[..., None, :] @ Vh, math.nan)


# --- What is proved: the function that the certificate is about, and whether a model computes it ------------

ROUNDING = 1e-6  # the share by which every certificate is larger, for what float64 rounds
EPS = 2.0 ** -52  # of float64: n of these, of the factors' norms, for an inner product of n that may cancel


class Activation(NamedTuple):
    """f, which sorts the pairs (z_i, z_{i + n/2}) of z (n,), of norm 1 as slopes in (0, 1) are, or works on
    each entry z by itself with f'(z) in `slope`, f(z) / z in `ratio` and |f''| <= curvature, but for a kink
    at 0, where f' rises.
    """
    f: Callable
    sorts_pairs: bool = False
    slope: tuple = (0, 1)
    ratio: tuple = (0, 1)
    curvature: float = 0.0
    kink: bool = False


# Of which activations something is proved, written anew: an edit in model.py leaves these as they are. GELU'
# is largest at sqrt(2), GELU'(-z) = 1 - GELU'(z), and GELU'' is largest at 0, where it is 2 phi(0)
STEEPEST = 0.5 * (1 + math.erf(1)) + math.exp(-1) / math.sqrt(math.pi)
PROVED = {"gelu": Activation(lambda z: z * torch.special.ndtr(z) / STEEPEST, slope=(1 / STEEPEST - 1, 1),
                             ratio=(0, 1 / STEEPEST), curvature=2 / math.sqrt(2 * math.pi) / STEEPEST),
          "maxmin": Activation(lambda z: z.unflatten(-1, (2, -1)).sort(-2, descending=True)[0].flatten(-2),
                               sorts_pairs=True),
          "relu": Activation(lambda z: z.clamp_min(0), kink=True)}
SIZE = Activation(torch.abs, slope=(-1, 1), ratio=(-1, 1), kink=True)  # sorting in other terms, see mlp_half


def proved_function(config, weights, x):
    """The function that all proofs are about: embeddings x (T, n_embd) -> logits (T, vocab_size), in float64,
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
        v = v * W("attn.gain")[:, None, None] if c.head_gain else v
        heads = (p @ v).transpose(0, 1).flatten(1)                              # (T, d)
        x = (1 - alpha) * x + alpha * c.attn_scale * heads @ W("attn.proj.weight").T
        h = x
        for name in ("fc", *(f"mid.{j}" for j in range(c.mlp_layers - 2))):
            h = PROVED[c.activation].f(h @ W(f"mlp.{name}.weight").T)
        x = (1 - alpha) * x + alpha * h @ W("mlp.proj.weight").T
        if c.ball is not None:
            x = x / (x.square().mean(dim=-1, keepdim=True).sqrt() / c.ball).clamp_min(1)
    return c.logit_scale * x @ weights.pop("head.weight").double().T


def refused(model):
    """None, or the line that says why a model gets no certificate: its weights are not finite, nothing is
    proved of its activation, or it computes something else than proved_function or has parameters beside.
    Compared are logits of a float64 copy on the CPU: what shows elsewhere alone, on a GPU, in other types, in
    training, goes unseen; so does what shows past T tokens, if block_size is more, which with 6 heads is past
    1,100, with 200 million parameters past 1,000. Zeros, as many matrices begin with, become random, so that
    nothing hides behind them; large weights are scaled down, as rounding decides what saturated attention
    looks at, and a large ball too, so that embeddings leave it.
    """
    try:
        net = exact_model(model)
        c, g = net.config, torch.Generator().manual_seed(0)
        if not finite(net):
            return "no certificate: there are weights that are not finite"
        if c.activation not in PROVED:
            return f"no certificate: nothing is proved of {c.activation}, see PROVED in constrain.py"
        weights = dict(net.named_parameters(remove_duplicate=False))
        for W in weights.values():
            root = math.sqrt((1, *W.shape)[-1])
            W.add_(torch.empty_like(W).uniform_(-1, 1, generator=g).div_(root) * (W == 0))
            W.div_((W.square().mean().sqrt() * root / 3).clamp_min(1))  # norms of some 3
        parameters = sum(W.numel() for W in weights.values())
        T = int(min(c.block_size, max(8, 2e11 / parameters), math.sqrt(2 ** 23 / c.n_head)))
        ids = torch.randint(c.vocab_size, (1, T), generator=g)
        others = torch.randn(3, T, c.n_embd, generator=g, dtype=torch.float64)
        others *= torch.tensor([10.0, 1.0, 1e-3])[:, None, None]
        if c.ball:
            shrink = min(1.0, 1 / c.ball)
            for has_ball in (c, *net.blocks):
                has_ball.ball *= shrink
        found = *net(ids)[0], *net(ids, ids)[0], *net.forward_embeddings(others)     # each (T, vocab_size)
        embeddings = weights.pop("wte.weight")[ids[0]], *others
        expected = [proved_function(c, unused := dict(weights), x) for x in embeddings]
        expected = expected[:1] + expected  # tokens without targets and with them
        off = torch.stack([(y - z).abs().max() / z.abs().max() for y, z in zip(found, expected)]).max().item()
        if not unused and off < 1e-9:  # so NaN is refused too
            return None
        why = f"{min(unused)} is not used there" if unused else f"logits differ by {off:.1g} of the largest"
    except Exception as e:  # an edit may break the comparison anywhere
        if lacks_memory(e):
            raise
        why = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
    return (f"no certificate: the model computes something else than constrain.proved_function ({why}); take "
            "the edit back, or make it in constrain.proved_function too and prove its bound there")


@torch.inference_mode(False)  # what is made within it cannot be attacked
def exact_model(model):
    """A copy in float64 on the CPU, without gradients, of a model that may be compiled."""
    net = copy.deepcopy(getattr(model, "_orig_mod", model)).cpu().double().eval().requires_grad_(False)
    tables = rotary_tables(net.config.block_size, net.config.n_embd // net.config.n_head)
    for name, table in zip(("cos", "sin"), tables):  # not those of float32, if they are the same but for that
        if (getattr(net, name, table) - table).abs().max() < 1e-6:
            setattr(net, name, table)
    return net


def finite(module):
    """Whether all weights are finite. A module with others has no bound."""
    return all(x.isfinite() for p in module.parameters() for x in torch.aminmax(p))


# --- Lipschitz bounds ---------------------------------------------------------------------------------------
# In decimals, as K of a large model exceeds the largest float. Proofs: results/certificate.md

getcontext().Emax = MAX_EMAX  # a deep one's exceeds 10^999,999 too


def lipschitz_bounds(model, layers=None):
    """{kind: log10 of a Lipschitz bound} of a GPT, from embeddings to logits, both in the largest RMS norm
    over tokens: `certified` (see certificate), infinite if the model is `refused`, and the authors' formula,
    `paper` and `published` (see paper_bounds), or None. `layers` saves computing layer_norms again.
    """
    if refused(model):
        return {"certified": math.inf, "paper": None, "published": None}
    return {"certified": certificate(model, layers)[0]} | paper_bounds(model)


def certificate(model, layers=None):
    """(log10 of the certified bound, its parts layer by layer) of a GPT that is not `refused`: K with max_t
    |dlogits_t|_rms <= K max_t |dx_t|_rms for embeddings x of RMS norm <= the table's largest row's.
    """
    body, parts = body_bound(layers or layer_norms(model), embedding_norm(model))
    head = log10(model.config.logit_scale * rms_norm(model.head.weight).item())
    return body + head, [{name: log10(x) for name, x in part.items()} for part in parts]


def body_bound(layers, R):
    """(log10 K, parts): the certificate but for the output matrix, for embeddings of RMS norm <= R. The
    blocks' gains multiply, each on the ball that its input stays in; proof: results/certificate.md, Blocks.
    """
    if not all(map(math.isfinite, (R, *(norm for layer in layers for norm in layer[:-1])))):
        return math.inf, []
    K, R, parts = Decimal(1 + ROUNDING), Decimal(R), []
    for layer in layers:
        alpha, A_V, A_QK, mlp_gain, score_gain, mlp_growth, ball = map(Decimal, layer)
        residual, score = 1 - alpha + alpha * A_V, A_QK * R ** 2
        gain = residual * mlp_gain + alpha * score * score_gain
        parts.append({"R": R, "value": A_V, "score": score, "mlp": mlp_gain, "gain": gain})
        K, R = K * gain, min(residual * mlp_growth * R, ball)
    return log10(K), parts


# What a block's bound needs of its weights, whatever the ball; see body_bound
LayerNorms = namedtuple("LayerNorms", "alpha A_V A_QK mlp_gain score_gain mlp_growth ball")


def layer_norms(model):
    """[LayerNorms] of the blocks, all infinite where a weight is not finite."""
    c = model.config
    norms = lambda block: (*attention_norms(block.attn, c), *mlp_norms(block, c))
    return [LayerNorms(c.alpha, *(norms(block) if finite(block) else 5 * (math.inf, )), c.ball or math.inf)
            for block in model.blocks]


def attention_norms(attn, c):
    """(A_V, A_QK) of one attention layer: with tokens of RMS norm <= R its output has RMS norm <= A_V R, and
    its derivative has norm <= A_V + A_QK R^2, both in the largest RMS norm over tokens. Formulas and proof:
    results/certificate.md, Attention; W^h are the rows of W_q, W_k, W_v and the columns of W_o of head h.
    """
    H = c.n_head
    (*Wqk, Wv), Wo, Wo_h = head_weights(attn, H)
    _, v, OV, beside = value_norms(Wo_h, Wv)
    A_V = min(sigma(Wo) * v.norm(), OV.sum(), math.sqrt(H) * beside).item()
    if not Wqk:
        return c.attn_scale * A_V, 0.0
    Wq, Wk = Wqk
    k = sigma(Wk)
    t = (k / v.clamp_min(1e-300)).clamp(1e-9, 1e9).sqrt()[:, None, None]   # sqrt of the proof's; any is valid
    gamma = torch.minimum(sigma(torch.cat((t * Wv, Wk / t), dim=1)) ** 2 / 2, v * k)
    scores = [sigma((g[:, None, None] * Wq).flatten(0, 1)) for g in (gamma, v * k)]
    A_QK = c.attn_scale * c.softmax_scale * H * sigma(Wo) * sum(scores)  # d / d_head = H
    return c.attn_scale * A_V, A_QK.item()


def value_norms(Wo_h, Wv):
    """sigma of the heads' W_o^h, W_v^h and W_o^h W_v^h, each (H,), and of these products side by side; the
    products' with what rounding may take off where they cancel.
    """
    o, v = sigma(Wo_h), sigma(Wv)
    OV = Wo_h @ torch.linalg.qr(Wv.mT, mode="r").R.mT           # (H, d, d_head): W_o^h L_h, W_v^h = L_h Q_h
    off = Wv[0].numel() * EPS * o * v
    return o, v, sigma(OV) + off, sigma(OV.transpose(0, 1).flatten(1)) + off.norm()


def head_weights(attn, H):
    """([W_q, W_k, W_v] or, if scores are free of content, [W_v], of all heads: each (H, d_head, d); W_o (d,
    d); W_o by heads, (H, d, d_head)), exactly. W_v has the heads' gains in it.
    """
    Wo = exact(attn.proj.weight)
    d = len(Wo)
    *Wqk, Wv = exact(attn.qkv.weight).view(-1, H, d // H, d)
    Wv = Wv if attn.gain is None else Wv * exact(attn.gain)[:, None, None]
    return (*Wqk, Wv), Wo, Wo.view(d, H, d // H).transpose(0, 1)


def mlp_norms(block, c):
    """(gain, score gain, growth) of x -> (1 - alpha) x + alpha mlp(x), whose derivative is J: bounds on |J|,
    on |J W_o| over |W_o| for attention's output matrix W_o, and on the norm of its output over its input's.
    The layers' norms multiply; with two layers J is A + U E V with a diagonal E, |E| <= 1, see
    uncertain_norm. Formulas, with these names, and proof: results/certificate.md, MLP halves.
    """
    mlp, alpha, activation, Wo = block.mlp, c.alpha, PROVED[c.activation], exact(block.attn.proj.weight)
    layers = (mlp.fc, *mlp.mid, mlp.proj)
    product = math.prod(rms_norm(layer.weight).item() for layer in layers)
    largest = lambda interval: max(map(abs, interval)) ** (len(layers) - 1)
    gain, growth = (1 - alpha + alpha * product * largest(f) for f in (activation.slope, activation.ratio))
    if mlp.mid or len(Wo) > 512:  # beyond, it takes long
        return gain, gain, growth
    A, U, V, f = mlp_half(block.mlp, alpha, activation)
    of = lambda low, high: (A + (high + low) / 2 * U @ V, (high - low) / 2 * U, V)
    K, F, V = of(*f.slope)
    gain = min(gain, uncertain_norm(K, F, V))
    off = Wo.numel() * EPS * (sigma(K) + sigma(F) * sigma(V)).item()  # as in value_norms
    score_gain = min(gain, uncertain_norm(K @ Wo, F, V @ Wo) / max(sigma(Wo).item(), 1e-300) + off)
    return gain, score_gain, min(growth, uncertain_norm(*of(*f.ratio)))


def mlp_half(mlp, alpha, activation):
    """(A, U, V, f) with (1 - alpha) x + alpha mlp(x) = A x + U f(V x), f entry by entry, for an MLP of two
    layers. Of a sorted pair the entries are (z_1 + z_2) / 2 +- |z_1 - z_2| / 2, so that f is the size.
    """
    U, V = alpha * exact(mlp.proj.weight), exact(mlp.fc.weight)
    A = (1 - alpha) * torch.eye(len(U), dtype=torch.float64)
    if not activation.sorts_pairs:
        return A, U, V, activation
    (U_1, U_2), (V_1, V_2) = U.chunk(2, dim=1), V.chunk(2)
    return A + (U_1 + U_2) @ (V_1 + V_2) / 2, (U_1 - U_2) / 2, V_1 - V_2, SIZE


def uncertain_norm(A, U, V):
    """An upper bound on sigma(A + U E V) over all diagonal E, |E| <= 1: the smallest found, over l >
    sigma(U)^2, of sqrt(l lambda_max(A^T (l I - U U^T)^-1 A + V^T V)), or sigma(A) + sigma(U) sigma(V) if that
    is less; proof: results/certificate.md, Uncertain norm.
    """
    s, Q = torch.linalg.eigh(U @ U.mT)
    QA, gram = Q.mT @ A, V.mT @ V

    @cache
    def bound(t):
        l = s[-1].clamp_min(1e-30) * (1 + math.exp(t))
        squared = l * torch.linalg.eigvalsh(QA.mT @ (QA / (l - s)[:, None]) + gram)[-1]
        return squared.clamp_min(0).sqrt().item()

    t = 0.0
    for step in (3.5, 2.0, 1.0, 0.5):
        t = min((t - step, t, t + step), key=bound)
    return min((sigma(A) + sigma(U) * sigma(V)).item(), bound(t))


def embedding_norm(model):
    """The largest RMS norm of a row of the embedding table."""
    return exact(model.wte.weight).square().mean(dim=1).max().sqrt().item()


def log10(x):
    """log10 of a norm, for NaN inf: what is unknown bounds nothing."""
    return float(Decimal(x).log10()) if x >= 0 else math.inf


def paper_bounds(model):
    """{kind: log10 of the authors' bound} (calculate_lipschitz_constant in their code, commit 158692e), None
    for a model with options that theirs do not have. `published` is their formula to the letter: it leaves
    out logit_scale, and alpha is 1/(2 n_layer) whatever the model's is. `paper` counts both. Neither is an
    upper bound: see README.md, The bounds. position_bias, which theirs lack, changes nothing.
    """
    config = model.config
    theirs = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "softmax_scale", "logit_scale",
              "position_bias", "alpha", "zero_head")
    if not config.softmax_scale or config != GPTConfig(**{name: getattr(config, name) for name in theirs}):
        return {"paper": None, "published": None}
    norms = lambda *layers: [Decimal(x) for W in layers for x in rms_norm(W.weight).view(-1).tolist()]
    blocks = [norms(block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj) for block in model.blocks]
    ends = norms(model.head)[0] * Decimal(embedding_norm(model))
    c, slope = Decimal(config.softmax_scale), Decimal(STEEPEST)

    def formula(alpha, scale):
        alpha, K, R = Decimal(alpha), Decimal(scale) * ends, Decimal(1)
        for q, k, v, w, i, o in blocks:
            L_att, L_mlp = c / 3 * w * (v + 2 * v * R ** 2 * q * k), i * o / slope
            K *= (1 - alpha + alpha * L_att) * (1 - alpha + alpha * L_mlp)
            R *= (1 - alpha + alpha / 3 * w * v) * (1 - alpha + alpha * L_mlp)
        return log10(K)

    return {"paper": formula(config.alpha, config.logit_scale),
            "published": formula(1 / (2 * config.n_layer), 1.0)}


# --- What training for a radius needs -----------------------------------------------------------------------

RADII = (0.01, 0.03, 0.1)  # of changes of the embeddings, at which certified accuracies are given


def logit_reach(model, r, layers=None):
    """logit_scale sqrt(d) K r, with K of body_bound on the ball that has grown by r: a change of the
    embeddings of RMS norm r moves the difference of logits i and j by at most |w_i - w_j|_2 times that, where
    w_i are the output matrix's rows; proof: results/certificate.md, Predictions. `layers` saves layer_norms.
    """
    log10_K, _ = body_bound(layers or layer_norms(model), embedding_norm(model) + r)
    K = 10 ** log10_K if log10_K < 300 else math.inf
    return model.config.logit_scale * math.sqrt(model.config.n_embd) * r * K


def worst_case(logits, y, W, reach):
    """Logits (N, V) with reach |w_j - w_y| added to each but that of the label y (N,), for rows w_j of W (V,
    d). With `reach` = logit_reach(model, r) their cross entropy bounds that under every change of norm r, and
    where y is still the largest none alters the prediction; proof: results/certificate.md, Predictions. That
    is a claim about logits in float64: those of a shorter type are off by more than many predictions lead.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide + reach * rows_apart(W, y).scatter(1, y[:, None], 0.0)


def rows_apart(W, i):
    """L2 distances of the rows i (N,) of W (V, d), each computed once, to all rows: (N, V)."""
    rows, where = i.unique(return_inverse=True)
    return distances(W[rows], W)[where]


def distances(A, B):
    """L2 distances of rows (..., m, d) and (..., n, d): (..., m, n). In float64, for certificates, by matrix
    products, rounded up by the most that these can be off, d eps / 2 of a sum of d products. In float32,
    where they would leave no digits of small distances, by differences.
    """
    if A.dtype != torch.float64:
        return torch.cdist(A, B, compute_mode="donot_use_mm_for_euclid_dist")
    a, b = A.square().sum(-1)[..., :, None], B.square().sum(-1)[..., None, :]
    margin = (A.shape[-1] + 8) * EPS * (a + b)
    return (a + b - 2 * A @ B.mT + margin).clamp_min(0).sqrt()


def lead(logits, y):
    """By how much the logit of the label y (...) is larger than all others of logits (..., V): (...)."""
    y = y[..., None]
    return (logits.gather(-1, y) - logits.scatter(-1, y, -math.inf).amax(dim=-1, keepdim=True)).squeeze(-1)


# --- Command line: the norms and the bounds -----------------------------------------------------------------

def norm_lines(model):
    """A line for every matrix with its shape and the largest norm of a stack."""
    for name, W in matrices(model).items():
        yield f"{name:<20} {' x '.join(map(str, W.shape)):<16} {rms_norm(W).max().item():8.4f}"
    yield f"{'wte':<20} {'largest row':<16} {embedding_norm(model):8.4f}"


def bound_lines(bound, parts, paper, published):
    """The lines of a certificate, its parts and both readings of the authors' formula, or None."""
    yield "log10 of what a layer contributes, R the norm of its input:"
    for i, part in enumerate(parts):
        yield f"layer {i:<2} " + ", ".join(f"{name} {x:.4f}" for name, x in part.items())
    yield f"log10 of the Lipschitz constant, embeddings -> logits: certified {bound:.4f}"
    if paper is not None:
        yield f"the authors' formula {paper:.4f}, to the letter {published:.4f} (no upper bound in general)"


def main():
    parser = Parser(description="Norms and Lipschitz bounds of a checkpoint.")
    parser.add_argument("ckpt", help="checkpoint written by train.py")
    path = parser.parse_args().ckpt
    with one_line_errors("constrain.py"):
        model, ckpt = load_checkpoint(path)
        options, why = ckpt["config"], ckpt.get("refused") or refused(model)
        say(f"{path} at step {ckpt['step']}, {options['method']}, w_max {options['w_max']:g}, logit_scale "
            f"{model.config.logit_scale:g}. RMS->RMS norms:")
        say("\n".join(norm_lines(model)))
        say(why or "\n".join(bound_lines(*certificate(model), **paper_bounds(model))))


if __name__ == "__main__":
    main()
