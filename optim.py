"""Muon: momentum whose update is orthogonalized, so that a step moves every matrix by the RMS->RMS norm lr.

A constraint can rely on that: after a step of norm at most lr a matrix of norm <= w_max has norm <= w_max +
lr, whatever the gradient was (constrain.soft_cap_coupling). Vectors and tables of them go to a group of their
own (`embedding`), or to torch.optim.AdamW.
This file imports nothing of ours, so that it can be copied.
"""
import ctypes
import math
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

# --- The machine --------------------------------------------------------------------------------------------

def has_bf16(device):
    """Whether the hardware multiplies bf16 matrices itself; emulated they are slower than float32's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type != "cpu" or not cpuinfo.exists():
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpuinfo.read_text().split())


def keep_memory():
    """Have glibc keep freed memory instead of returning it to the system, which would hand it back page by
    page and zeroed at the next step: a fifth of a step on a CPU. Other C libraries are left alone.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD of malloc.h: never shrink the heap
        mallopt(-4, 0)   # M_MMAP_MAX: take large blocks from it too


# --- Orthogonalization --------------------------------------------------------------------------------------

# Each row (a, b, c) is a step sigma -> a sigma + b sigma^3 + c sigma^5 on all singular values: the quintic
# nearest to 1 on the interval that the steps before left (Polar Express, Amsel et al., arXiv 2505.16932), the
# first [0.006, 1]. Intervals are taken 5 % longer, as bf16's rounding can push a singular value past the end,
# from where the next step would throw it far. The last row is scaled so that all together, in exact
# arithmetic, map [0.006, 1] into [0.991, 0.993] and [0, 1.03] into [0, 0.993].
POLAR = ((7.2050, -18.6075, 12.3746),
         (3.9627, -3.0957, 0.6228),
         (3.0419, -2.1084, 0.4083),
         (2.1309, -1.4217, 0.3414),
         (1.8242, -1.1581, 0.3266))

# No singular value of orthogonalize(G) exceeds this: 0.993 in exact arithmetic, and bf16 adds at most 0.0065
# (the worst that millions of random and structured matrices gave; float32 adds 1e-6).
UPDATE_NORM = 1.0


def orthogonalize(G, coefficients=POLAR, dtype=torch.float32):
    """The polar factor U V^T of G = U S V^T, (..., m, n) -> float32 (..., m, n), by matrix products alone.

    Singular values above 0.006 of the Frobenius norm come out within 1 % of 1, smaller ones between 0 and 1,
    none above UPDATE_NORM; zeros stay zeros. Entries may have any finite size. `dtype` (float32 or bfloat16)
    is that of the products.
    """
    X = of_size_1(G.detach().reshape(-1, *G.shape[-2:]).float()).to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    X = polar_steps(X.mT, coefficients).mT if tall else polar_steps(X, coefficients)  # on the small side
    return X.float().reshape(G.shape)


def of_size_1(X):
    """Matrices (..., m, n) over their Frobenius norms; zeros stay zero."""
    # the largest entry first, so that squares neither overflow nor vanish
    X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-38)
    return X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(1e-38)


def polar_steps(X, coefficients=POLAR):
    """The steps of orthogonalize on a batch X (k, m, n), m <= n, of spectral norm <= 1."""
    for a, b, c in coefficients:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)           # a X + b A X + c A^2 X
    return X


def dual_rows(G, max_inflation=16.0):
    """The update of an embedding table (V, n), a token's vector in each row: rows scaled to RMS norm 1.

    Steepest descent under the largest RMS norm of a row. A row with a gradient more than max_inflation times
    smaller than the largest row's (a token that hardly occurred) grows by that factor less, and zero rows
    stay zero.
    """
    G = G / G.abs().max().clamp_min(torch.finfo(G.dtype).tiny)
    rms = G.square().mean(dim=-1, keepdim=True).sqrt()
    return G / rms.clamp_min(rms.max() / max_inflation).clamp_min(1e-7)


def map_by_shape(fn, tensors, *more):
    """[fn(t, ...) for t, ... in zip(tensors, *more)], matrices (m, n) of one shape as one batch (k, m, n)."""
    results = [None] * len(tensors)
    for shape in dict.fromkeys(t.shape[-2:] for t in tensors):
        where = [i for i, t in enumerate(tensors) if t.shape[-2:] == shape]
        lists = [[ts[i].reshape(-1, *shape) for i in where] for ts in (tensors, *more)]
        found = fn(*map(torch.cat, lists)).split([len(batch) for batch in lists[0]])
        for i, result in zip(where, found):
            results[i] = result.view_as(tensors[i])
    return results


# --- Steps made for a manifold ------------------------------------------------------------------------------
# For when the constraint puts W back onto it: the steepest update that stays on it to first order or, on the
# hyperball, one of fixed size. M and W are batches (..., m, n), polar orthogonalizes. W = 0 does not hold an
# update back.

def top_singular(W, dtype=torch.float32, squarings=9, steps=4):
    """Largest singular triples of matrices (..., m, n): sigma (..., 1, 1), u (..., m, 1), v (..., n, 1).

    Power iteration on the Gram matrix A with A^512, which nine squarings make: 2,048 steps from the largest
    column of A^512, without memory or random numbers. sigma = |W v| is below the true one, by less than 0.1 %
    however close others are. `dtype` is that of A^8 and on: bfloat16 moves sigma by 0.03 % more.
    """
    scale = W.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    X = W / scale
    tall = W.shape[-2] >= W.shape[-1]
    A = X.mT @ X if tall else X @ X.mT
    for i in range(squarings):
        if i % 2 == 0:
            A = A / A.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
        if i == 2:
            A = A.to(dtype)
        A = A @ A
    A = A.to(X.dtype)
    column = A.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None].expand(*A.shape[:-1], 1)
    unit = lambda x: x / x.norm(dim=-2, keepdim=True).clamp_min(1e-30)
    x = unit(A.gather(-1, column))
    for _ in range(steps):
        x = unit(A @ x)
    y = X @ x if tall else X.mT @ x  # the other singular vector, times sigma
    u, v = (unit(y), x) if tall else (x, unit(y))
    return y.norm(dim=-2, keepdim=True) * scale, u, v


def sphere_tangent(M, W, polar, steps=8):
    """polar(M + x u v^T) with the x for which u^T update v = 0, u and v the largest singular pair of W, so
    that |W| stays as it is (Xie et al., arXiv 2601.08393). With c = u^T update v, f = c / sqrt(1 - c^2) grows
    with x, in a single row as x + u^T M v over the rest's size. Regula falsi, Illinois' rule: what one end
    has kept for two steps counts half.
    """
    _, u, v = top_singular(W)
    uv, rank = u @ v.mT, min(M.shape[-2:])
    M = math.sqrt(rank) * of_size_1(M)  # singular values of the order of 1
    high = f_high = torch.full_like(M[..., :1, :1], 2 * rank)  # from |x| = 2 |M|_nuclear on f has x's sign
    low, f_low, last = -high, -high, torch.zeros_like(high)
    for _ in range(steps):
        x = (low * f_high - high * f_low) / (f_high - f_low)
        update = polar(M + x * uv)
        c = (update * uv).sum(dim=(-2, -1), keepdim=True)
        f, above = c / (1 - c.square()).clamp_min(1e-3).sqrt(), c > 0
        f_low = torch.where(above, torch.where(last > 0, f_low / 2, f_low), f)
        f_high = torch.where(above, f, torch.where(last < 0, f_high / 2, f_high))
        low, high, last = torch.where(above, low, x), torch.where(above, x, high), f
    return update


def stiefel_tangent(M, W, polar, steps=10):
    """polar(M - X L) for X = W / |W| with orthonormal columns (rows if m < n) and the symmetric L for which
    X^T update is skew, so that all singular values stay as they are (Bernstein 2025, Modular manifolds,
    thinkingmachines.ai). L maximizes -|M - X L|_nuclear, a concave function whose gradient is the symmetric
    part of X^T update: gradient ascent from the L of the Frobenius norm, which is the solution if m = n.
    """
    if M.shape[-2] < M.shape[-1]:
        return stiefel_tangent(M.mT, W.mT, lambda A: polar(A.mT).mT, steps).mT
    symmetric = lambda A: (A + A.mT) / 2
    X, M = (math.sqrt(M.shape[-1]) * of_size_1(A) for A in (W, M))
    L = symmetric(X.mT @ M)
    for i in range(steps if M.shape[-2] > M.shape[-1] else 0):
        L = L + 0.2 * (1 - i / steps) * symmetric(X.mT @ polar(M - X @ L))
    return polar(M - X @ L)


def relative_size(M, W, polar):
    """polar(M) scaled to the Frobenius norm sqrt(min(m, n)), as if all singular values were 1: the step is
    then lr / w_max of W on the sphere of constrain.hyperball (Wen et al., arXiv 2606.16899). Of momentum with
    many small singular values Muon's own is down to half of it, and this exceeds UPDATE_NORM.
    """
    return math.sqrt(min(M.shape[-2:])) * of_size_1(polar(M))


TANGENTS = {"spectral_sphere": sphere_tangent, "stiefel": stiefel_tangent, "hyperball": relative_size}


# --- Muon ---------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) with lr in units of the RMS->RMS norm.

    Parameters are matrices (..., m, n), stacks of them counting as separate matrices; a step is
        M <- momentum M + (1 - momentum) G,   W <- (1 - lr weight_decay) W - lr sqrt(m/n) orthogonalize(M)
    with (1 - momentum) G + momentum M in place of M if nesterov: it moves W by RMS->RMS norm lr, or up to 1 %
    less. `tangent`, a name in TANGENTS, makes the update for a manifold. A group with embedding=True holds
    tables (V, n) or vectors instead; rows move by RMS norm lr (see dual_rows). With `mine`, a list of
    parameters, only those move: one process's share, while every process keeps the momentum of all.
    """
    mine = None  # of a copy

    def __init__(self, params, lr=0.1, momentum=0.95, nesterov=True, weight_decay=0.0, embedding=False,
                 coefficients=POLAR, dtype=torch.float32, mine=None, tangent=None):
        self.mine = None if mine is None else set(mine)
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                                      embedding=embedding, coefficients=coefficients, dtype=dtype,
                                      tangent=tangent))
        for group in self.param_groups:
            rate, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
            if not (0 <= rate < math.inf and 0 <= decay < math.inf and 0 <= momentum < 1):
                raise ValueError("Muon needs finite lr >= 0 and weight_decay >= 0, and 0 <= momentum < 1, "
                                 f"not {rate}, {decay} and {momentum}")
            for p in group["params"]:
                if p.ndim < 2 and not group["embedding"] or p.numel() == 0 or not p.is_floating_point():
                    raise ValueError("Muon is for real matrices (..., m, n), not for "
                                     f"{p.dtype} {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            momentum, params, updates = group["momentum"], [], []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                M = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                if self.mine is None or p in self.mine:
                    params.append(p)
                    updates.append(p.grad.lerp(M, momentum) if group["nesterov"] else M)
            polar = partial(orthogonalize, coefficients=group["coefficients"], dtype=group["dtype"])
            if group["embedding"]:
                updates = [dual_rows(u) for u in updates]
            elif group["tangent"]:
                updates = map_by_shape(partial(TANGENTS[group["tangent"]], polar=polar), updates, params)
            else:
                updates = map_by_shape(polar, updates)
            for p, u in zip(params, updates):
                norm_1 = 1 if group["embedding"] else math.sqrt(p.shape[-2] / p.shape[-1])  # of RMS->RMS norm
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(u, alpha=-group["lr"] * norm_1)
        return loss
