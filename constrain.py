"""
Weight constraints, and the Lipschitz bound that they give to the network.

    python constrain.py out/shakespeare/ckpt.pt            # norms of every matrix, both bounds
    python constrain.py out/shakespeare/ckpt.pt --json     # the same for programs
    python constrain.py --bench                            # time and error of every method against an exact SVD

Paper: Newhouse et al., Training Transformers with Enforced Lipschitz Constants (arXiv 2507.13338). Norms of matrices are
RMS->RMS operator norms throughout: an (m, n) matrix, m outputs and n inputs, has the norm sqrt(n/m) * sigma_max.
Each method maps a batch (..., m, n) to a new one; train.py calls it after every optimizer step. To add a constraint,
write one such function and name it in METHODS.
"""
import argparse
import json
import math
import sys
import time

import torch

from model import GELU_SLOPE, GPT, load_checkpoint
from optim import POLAR, UPDATE_NORM, orthogonalize
from prepare import UserError

# Muon's iteration made exact: its second step, which lifts small singular values by 3.96 and keeps the others in their
# interval, three more times; and a step of Newton-Schulz, which takes [0.991, 0.993] to within 2e-6 of 1, from below.
EXACT_POLAR = POLAR[:1] + POLAR[1:2] * 4 + POLAR[2:] + ((15 / 8, -10 / 8, 3 / 8),)


# ----------------------------------------------------------------------------------------------------------------------
# The constraints

def rms_unit(W):
    """sqrt(m/n): the largest singular value of an (m, n) matrix of RMS->RMS norm 1."""
    return math.sqrt(W.shape[-2] / W.shape[-1])


def rms_norm(W):
    """RMS->RMS operator norms of (..., m, n), exactly (SVD in float64), as a float64 tensor (...)."""
    return torch.linalg.svdvals(W.detach().double())[..., 0] / rms_unit(W)


def top_singular(W, squarings=7, steps=16):
    """
    The largest singular triple of each matrix in (..., m, n): sigma (..., 1, 1), u (..., m, 1), v (..., n, 1).

    Power iteration on the Gram matrix A with A^128, which seven squarings make: 2,048 steps at the price of a few matrix
    products. Started from the largest column of A^128 it needs no memory and no random numbers. sigma = |W v| is below
    the true one, by less than 0.1 % however close the other singular values are.
    """
    scale = W.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    X = W / scale
    A = X.mT @ X if W.shape[-2] >= W.shape[-1] else X @ X.mT
    for _ in range(squarings):
        A = A / A.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
        A = A @ A
    column = A.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None].expand(*A.shape[:-1], 1)
    x = A.gather(-1, column)
    for _ in range(steps):
        x = x / x.norm(dim=-2, keepdim=True).clamp_min(1e-30)
        x = A @ x
    x = x / x.norm(dim=-2, keepdim=True).clamp_min(1e-30)
    y = X @ x if W.shape[-2] >= W.shape[-1] else X.mT @ x  # the singular vector on the other side, times sigma
    sigma = y.norm(dim=-2, keepdim=True)
    y = y / sigma.clamp_min(1e-30)
    u, v = (y, x) if W.shape[-2] >= W.shape[-1] else (x, y)
    return sigma * scale, u, v


def none(W, w_max=None):
    """No constraint. With Muon's or AdamW's weight_decay this is the paper's weight decay: W <- (1 - lr decay) W."""
    return W.clone()


def spectral_weight_decay(W, decay):
    """W - decay sigma_1 u_1 v_1^T: weight decay of the largest singular value alone (the paper, section 3)."""
    sigma, u, v = top_singular(W)
    return W - decay * sigma * u @ v.mT


def spectral_normalize(W, w_max):
    """W min(1, w_max / |W|): the whole matrix scaled down to norm w_max (Miyato et al. 2018; the paper, section 3)."""
    sigma, _, _ = top_singular(W)
    return W * (w_max * rms_unit(W) / sigma.clamp_min(torch.finfo(W.dtype).tiny)).clamp_max(1)


def spectral_hammer(W, w_max):
    """
    W - max(0, sigma_1 - w_max) u_1 v_1^T: only the largest singular value is set to w_max (the paper, section 3).

    Does not promise norm w_max: a step may lift several singular values over it, and this takes back one. Unlike the
    paper's it leaves a matrix alone whose norm is below w_max, so that it never inflates one.
    """
    sigma, u, v = top_singular(W)
    return W - (sigma - w_max * rms_unit(W)).clamp_min(0) * u @ v.mT


def stiefel(W, w_max):
    """w_max U V^T: every singular value of W = U S V^T set to w_max, the Stiefel manifold (the paper, section 3)."""
    return w_max * rms_unit(W) * orthogonalize(W, EXACT_POLAR)


def cubic(X, c):
    """sigma -> sigma + c sigma^3 on the singular values of X (..., m, n), multiplied on the small side."""
    return X + c * (X @ (X.mT @ X) if X.shape[-2] >= X.shape[-1] else (X @ X.mT) @ X)


def soft_cap(W, alpha):
    """
    sigma -> p(q(sigma)) with q(x) = x - alpha x^3 and p(x) = x + alpha x^3, on RMS->RMS singular values (the paper,
    section 3). Close to the identity for small sigma, with a largest image that soft_cap_coupling makes w_max.
    """
    r = rms_unit(W)
    return r * cubic(cubic(W / r, -alpha), alpha)


def soft_cap_coupling(w_max, weight_decay, update_norm):
    """
    The smallest alpha for which soft_cap brings a matrix of norm <= w_max back to norm <= w_max after an optimizer step.

    weight_decay is the decay of that step (lr times the optimizer's), update_norm the norm of its update (lr times
    UPDATE_NORM for Muon), so that the norm after it is at most k = w_max (1 - weight_decay) + update_norm. The published
    coupling (the paper, appendix) asks only that k itself lands on w_max; this one asks it of all of [0, k].

    With y = alpha sigma^2, q = sigma (1 - y) grows up to its turning point y = 1/3, and p grows always.
    - k <= w_max: alpha = 0.
    - Up to k = 1.3065 w_max the turning point lies outside [0, k], so k has the largest image, p(q(k)) = w_max. That
      falls as alpha rises from 0 to 1 / (3 k^2), so bisection finds its one root there.
    - Beyond, the turning point has it: q = 2 / (3 sqrt(3 alpha)) there and p(q) = (62/81) / sqrt(3 alpha) = w_max, which
      gives alpha = (62/81)^2 / (3 w_max^2) whatever k is. q is odd about its zero and falls below minus that value
      only for sigma > 2 / sqrt(3 alpha) = 2.613 w_max; no alpha can do for a larger k.
    """
    k = w_max * (1 - weight_decay) + update_norm
    if k <= w_max:
        return 0.0
    alpha = (62 / 81) ** 2 / (3 * w_max ** 2)
    k_largest = 2 / math.sqrt(3 * alpha)
    if k > k_largest:
        lr = update_norm / UPDATE_NORM
        largest = lr * (k_largest - w_max) / (k - w_max)
        raise ValueError(f"no soft cap holds w_max={w_max:g} at lr={lr:g}; the largest lr that it can hold is {largest:.4g}")
    if alpha * k ** 2 > 1 / 3:
        return alpha
    low, high = 0.0, 1 / (3 * k ** 2)
    for _ in range(100):
        alpha = (low + high) / 2
        q = k - alpha * k ** 3
        low, high = (alpha, high) if q + alpha * q ** 3 > w_max else (low, alpha)
    return high


def hard_cap(W, w_max):
    """
    sigma -> min(sigma, w_max) from polar factors (the paper, section 3; Cesista 2025), without an SVD.

    With X = W / w_max, O its polar factor and S = sign(X^T X - I), which is the polar factor of that symmetric matrix
    and -1 or +1 where sigma lies below or above w_max: X (1 - S)/2 + O (1 + S)/2. Where the iteration for O or S has
    not converged the two halves agree (near w_max) or O does not count (near 0), so the error stays below 1 % of w_max on
    singular values up to 3 w_max. A batch with much larger ones goes through the SVD.
    """
    X = W / (w_max * rms_unit(W))
    wide = X.shape[-2] < X.shape[-1]
    if wide:
        X = X.mT
    n = X.shape[-1]
    if (X.abs() > 1e4).any() or (X.square().sum(dim=(-2, -1)) > 16 * n).any():
        return svd_cap(W, w_max)
    O = orthogonalize(X, EXACT_POLAR)
    S = orthogonalize(X.mT @ X - torch.eye(n, dtype=X.dtype, device=X.device), EXACT_POLAR)
    Y = (X + O - (X - O) @ S) / 2
    return w_max * rms_unit(W) * (Y.mT if wide else Y)


def svd_cap(W, w_max):
    """sigma -> min(sigma, w_max) by an SVD in W's precision: the reference for hard_cap."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U * S.clamp_max(w_max * rms_unit(W))[..., None, :] @ Vh


METHODS = {f.__name__: f for f in (soft_cap, hard_cap, spectral_normalize, spectral_hammer, spectral_weight_decay,
                                   stiefel, svd_cap, none)}

# After each of these every matrix has norm <= w_max: soft_cap relies on Muon's update norm, the others project.
PROMISE_W_MAX = ("soft_cap", "hard_cap", "spectral_normalize", "stiefel", "svd_cap")


# ----------------------------------------------------------------------------------------------------------------------
# The Lipschitz bound

def lipschitz_bound(model, kind):
    """
    log10 of a Lipschitz bound of the model, a GPT or an MLP: `paper` or `certified`.

    Of a GPT it is about forward_embeddings, from the largest RMS norm over tokens at the input to that at the logits.
    `certified` is an upper bound on the ball whose radius is the embedding table's largest row (see certificate); `paper`
    is the formula of the authors' code, whose value can lie below the true constant (see paper_bound).
    """
    if kind not in ("paper", "certified"):
        raise ValueError(f"kind is 'paper' or 'certified', not {kind!r}")
    if not isinstance(model, GPT):  # an MLP: ReLU is 1-Lipschitz, so both are the product of the layers' norms
        return sum(log10(rms_norm(layer.weight).item()) for layer in model.layers)
    return paper_bound(model) if kind == "paper" else certificate(model)[0]


def log10(x):
    return math.log10(x) if x > 0 else -math.inf


def log10_mix(alpha, log10_x):
    """log10((1 - alpha) + alpha x) from log10(x), for an x that may be too large for a float."""
    a, b = math.log10(1 - alpha), math.log10(alpha) + log10_x
    return max(a, b) + math.log10(1 + 10 ** -abs(a - b))


def embedding_norm(model):
    """The largest RMS norm of a row of the embedding table."""
    return model.wte.weight.detach().double().square().mean(dim=1).max().sqrt().item()


def paper_bound(model):
    """
    log10 of the published bound (calculate_lipschitz_constant in the authors' code), times logit_scale.

    Not an upper bound: it takes the heads together, GELU / 1.1289 for 1/1.1289-Lipschitz, and lets softmax_scale
    multiply the value path as well.
    """
    config = model.config
    alpha, log10_R = 1 / (2 * config.n_layer), 0.0
    total = log10(config.logit_scale * rms_norm(model.head.weight).item() * embedding_norm(model))
    for block in model.blocks:
        q, k, v = (log10(norm) for norm in rms_norm(block.attn.qkv.weight).tolist())
        w, i, o = (log10(rms_norm(layer.weight).item()) for layer in (block.attn.proj, block.mlp.fc, block.mlp.proj))
        # L_att = c/3 w (v + 2 v R^2 q k) = c w v (1/3 + 2/3 R^2 q k)
        L_att = log10(config.softmax_scale) + w + v + log10_mix(2 / 3, 2 * log10_R + q + k)
        L_mlp = i + o - log10(GELU_SLOPE)
        total += log10_mix(alpha, L_att) + log10_mix(alpha, L_mlp)
        log10_R += log10_mix(alpha, w + v - log10(3)) + log10_mix(alpha, L_mlp)
    return total


def attention_bound(attn, softmax_scale):
    """
    (A_V, A_QK / R^2) of one attention layer: with all tokens of RMS norm <= R its output has RMS norm <= A_V R / 3 and
    its derivative the norm <= (A_V + A_QK) / 3, both in the largest RMS norm over tokens.

    Rows of W_q, W_k, W_v and columns of W_o that belong to head h are W^h. A change of the input moves the output through
    the values (score fixed) and through the scores (values fixed).

    Values. Head h returns W_v^h applied to a convex combination of tokens, another one for each head. So the output is
    at most, times the norm of the largest token or of its change:
      sigma(W_o) sqrt(sum_h sigma(W_v^h)^2)           since the heads' outputs stand below each other
      sum_h sigma(W_o^h W_v^h)                        triangle inequality
      sqrt(H) sigma([W_o^1 W_v^1 ... W_o^H W_v^H])    since H combinations below each other have norm sqrt(H)

    Scores. With p = softmax(a), dp_s = p_s (da_s - sum_r p_r da_r), so sum_s |dp_s| is the mean absolute deviation of da,
    at most half its range and so at most max_s |da_s|. The head's output moves by at most max_s |v_s| max_s |da_s|, where
      a_s = c <q, k_s> / d_head,    |k_s| <= sigma(W_k^h) R sqrt(d),    |v_s| <= sigma(W_v^h) R sqrt(d).
    Let g_h = sigma(W_v^h) sigma(W_k^h), x the query's token and dx its change. The part with dq is at most
    (c/d_head) |W_q^h dx| |k_s| |v_s| <= (c/d_head) R^2 d g_h |W_q^h dx|. In the part with dk the norm of dk_s is at most
    sigma(W_k^h) |dx_s|, which gives (c/d_head) R sqrt(d) g_h |W_q^h x| max_s |dx_s|. Over heads, sum_h g_h^2 |W_q^h y|^2 <=
    sigma(diag_h(g_h) W_q)^2 |y|^2 for the one y = dx, or y = x. Both parts together, through W_o:
      A_QK = 2 c (d/d_head) R^2 sigma(W_o) sigma(diag_h(g_h) W_q).
    RoPE turns q and k of each head by orthogonal matrices, which changes no norm. (q and k may not swap roles in the last
    step: the query is one token for all heads, while each head may look at a key of another token.)
    """
    H, dh = attn.n_head, attn.d_head
    Wq, Wk, Wv = attn.qkv.weight.detach().double().view(3, H, dh, H * dh)  # each (H, d_head, d)
    Wo = attn.proj.weight.detach().double()
    Wo_h = Wo.view(H * dh, H, dh).transpose(0, 1)                          # (H, d, d_head)
    sigma = lambda W: torch.linalg.svdvals(W)[..., 0]
    OV = Wo_h @ Wv                                                         # (H, d, d)
    A_V = min((sigma(Wo) * sigma(Wv).square().sum().sqrt()).item(),
              sigma(OV).sum().item(),
              (math.sqrt(H) * sigma(OV.transpose(0, 1).flatten(1))).item())
    g = sigma(Wv) * sigma(Wk)                                              # (H,)
    A_QK = 2 * softmax_scale * H * sigma(Wo) * sigma((g[:, None, None] * Wq).flatten(0, 1))  # d / d_head = H
    return A_V, A_QK.item()


def certificate(model):
    """
    (log10 of the certified bound, its parts layer by layer) of a GPT on embeddings of RMS norm <= R_0, where R_0 is the
    embedding table's largest row: K with max_t |dlogits_t|_rms <= K max_t |dx_t|_rms there.

    The ball is convex, so a bound on the derivative everywhere in it is a Lipschitz constant on it; and the chain rule
    multiplies the layers' bounds, each on the ball of radius R that its input stays in. x -> (1 - alpha) x + alpha f(x)
    has the gain (1 - alpha) + alpha |f'| and the radius (1 - alpha) R + alpha max |f|. For the MLP |f'| <= i o, since
    GELU / GELU_SLOPE is 1-Lipschitz, and |f| <= i o R / GELU_SLOPE, since |GELU(z)| <= |z|.

    Everything is a log10, since K of a large model exceeds the largest float.
    """
    alpha, log10_R = 1 / (2 * model.config.n_layer), log10(embedding_norm(model))
    total, parts = log10(model.config.logit_scale * rms_norm(model.head.weight).item()), []
    for block in model.blocks:
        A_V, A_QK = attention_bound(block.attn, model.config.softmax_scale)
        value, score = log10(A_V / 3), log10(A_QK / 3) + 2 * log10_R
        mlp = log10(rms_norm(block.mlp.fc.weight).item()) + log10(rms_norm(block.mlp.proj.weight).item())
        attention = max(value, score) + log10(1 + 10 ** -abs(value - score)) if A_V else -math.inf
        gain = log10_mix(alpha, attention) + log10_mix(alpha, mlp)
        parts.append({"R": log10_R, "value": value, "score": score, "mlp": mlp, "gain": gain})
        log10_R += log10_mix(alpha, value) + log10_mix(alpha, mlp - log10(GELU_SLOPE))
        total += gain
    return total, parts


# ----------------------------------------------------------------------------------------------------------------------

def matrices(model):
    """{name: weight (..., m, n)} of the constrained matrices of a GPT or an MLP: all parameters but the embedding table."""
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters() if name != "wte.weight"}


def report(path, as_json):
    """Norms of every matrix of a checkpoint, the parts of its certificate, and both bounds."""
    model, ckpt = load_checkpoint(path)
    norms = {name: rms_norm(W).flatten().tolist() for name, W in matrices(model).items()}
    certified, parts = certificate(model)
    paper = paper_bound(model)
    if as_json:
        print(json.dumps({"checkpoint": str(path), "step": ckpt["step"], "embedding": embedding_norm(model),
                          "norms": norms, "log10_layers": parts, "log10_paper": paper, "log10_certified": certified}))
        return
    print(f"{path} at step {ckpt['step']}, method {ckpt['config']['method']}, w_max {ckpt['config']['w_max']:g}\n")
    print(f"{'RMS->RMS norms':<14} {'W_q':>8} {'W_k':>8} {'W_v':>8} {'W_o':>8} {'W_in':>8} {'W_out':>8}")
    for i in range(len(model.blocks)):
        row = [norm for layer in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj") for norm in norms[f"blocks.{i}.{layer}"]]
        print(f"layer {i:<8} " + " ".join(f"{norm:8.4f}" for norm in row))
    print(f"embedding {embedding_norm(model):.4f}, head {norms['head'][0]:.4f}, logit_scale {model.config.logit_scale:g}\n")
    print(f"{'log10 of':<14} {'R':>8} {'value':>8} {'score':>8} {'MLP':>8} {'gain':>8}   (R: norm of the layer's input)")
    for i, part in enumerate(parts):
        print(f"layer {i:<8} " + " ".join(f"{x:8.4f}" for x in part.values()))
    print(f"\nlog10 Lipschitz bound, embeddings -> logits: certified {certified:.4f}   (published formula, "
          f"not an upper bound: {paper:.4f})")


BENCH_SHAPES = ((12, 256, 256), (3, 1024, 256), (3, 256, 1024), (1, 65, 256),  # the 2 M model's
                (4, 768, 768), (1, 3072, 768), (1, 768, 3072))                  # matrices of a layer of the 145 M model


def bench():
    """Time of every method against the exact SVD, and its largest error against its exact target."""
    torch.manual_seed(0)
    w_max, lr = 1.0, 0.1
    alpha = soft_cap_coupling(w_max, 0, lr * UPDATE_NORM)

    def target(name, s):  # the exact image of RMS->RMS singular values s (..., r), largest first
        top = torch.zeros_like(s)
        top[..., 0] = s[..., 0]
        q = s - alpha * s ** 3
        return {"soft_cap": q + alpha * q ** 3, "hard_cap": s.clamp_max(w_max), "svd_cap": s.clamp_max(w_max),
                "spectral_normalize": s * (w_max / s[..., :1]).clamp_max(1), "none": s,
                "spectral_hammer": s - (top - w_max).clamp_min(0), "stiefel": torch.full_like(s, w_max),
                "spectral_weight_decay": s - 0.1 * top}[name]

    strength = {"soft_cap": alpha, "spectral_weight_decay": 0.1}
    print(f"{'shape':>16} {'method':<22} {'ms':>8} {'x SVD':>7} {'error / w_max':>14}")
    for shape in BENCH_SHAPES:
        m, n = shape[-2:]
        U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        s = (w_max + lr) * torch.linspace(1, 0.01, min(m, n), dtype=torch.float64).expand(shape[0], -1)  # after a step of Muon
        W = (U * s[..., None, :] @ Vh * math.sqrt(m / n)).float()
        ms = {}
        for name in ("svd_cap", *(name for name in METHODS if name != "svd_cap")):
            f = lambda: METHODS[name](W, strength.get(name, w_max))
            result = f()
            start = time.perf_counter()
            for _ in range(3):
                f()
            ms[name] = 1e3 * (time.perf_counter() - start) / 3
            exact = U * target(name, s)[..., None, :] @ Vh * math.sqrt(m / n)
            error = (rms_norm(result.double() - exact) / w_max).max().item()
            print(f"{str(shape):>16} {name:<22} {ms[name]:8.2f} {ms['svd_cap'] / ms[name]:7.1f} {error:14.1e}")


def main():
    parser = argparse.ArgumentParser(description="Norms and Lipschitz bounds of a checkpoint, or a benchmark.")
    parser.add_argument("ckpt", nargs="?", help="checkpoint written by train.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--bench", action="store_true", help="time every method against the exact SVD")
    args = parser.parse_args()
    if args.bench:
        bench()
    elif args.ckpt:
        try:
            report(args.ckpt, args.json)
        except UserError as e:
            sys.exit(f"constrain.py: {e}")
    else:
        parser.error("name a checkpoint, or use --bench")


if __name__ == "__main__":
    main()
