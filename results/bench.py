"""Where the time goes: of a training step, and of every constraint.

    python results/bench.py step --batch_size=64    # a step against its matrix products; options of train.py
    python results/bench.py methods                 # every constraint against an exact SVD: time and error
    python results/bench.py widths                  # how a step and the certificate grow with the width

These machines are noisy, so all is relative to something measured in the same run. What `step` prints last
is JSON; `widths` writes it to speed.jsonl.
"""
import json
import math
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import train
from constrain import METHODS, Step, lipschitz_bounds, matrices, rms_norm, soft_cap_coupling
from optim import UPDATE_NORM, has_bf16, keep_memory
from parts import RESULTS, append_line
from prepare import UserError, one_line_errors, say, to_json

SHAPES = ((12, 256, 256), (3, 1024, 256), (3, 256, 1024), (1, 65, 256),  # the 2 M model's
          (4, 768, 768), (1, 3072, 768), (1, 768, 3072))  # matrices of a layer of the 145 M model


def seconds(f, device=torch.device("cpu")):
    """How long a call of f takes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def median(f, repeats, device=torch.device("cpu")):
    return sorted(seconds(f, device) for _ in range(repeats))[repeats // 2]


def products(model, config, batch):
    """The bare matrix products of a step, as (batch, m, k, n) for m x k times k x n: three per matrix, y = x
    W^T and the gradients of x and W; and six for attention, of which causality leaves half: scores, outputs,
    and two gradients of each.
    """
    T, H, d_head, shapes = config.block_size, config.n_head, config.n_embd // config.n_head, []
    for W in matrices(model).values():
        m, n = W.flatten(0, -2).shape
        shapes += [(1, batch * T, n, m), (1, batch * T, m, n), (1, m, batch * T, n)]
    attention = 3 * [(batch * H, T, d_head, T // 2)] + 3 * [(batch * H, T, T // 2, d_head)]
    return shapes + config.n_layer * attention


def step(argv, grows=False):
    """(a) A training step, (b) the same without optimizer and constraint, in turns, and (c) its bare matrix
    products, one after the other, at the model's shapes and in its dtype; medians. And the share of the
    machine's best matmul rate that it reaches. With `grows` also what `widths` asks, which takes longer.
    """
    config = train.configure(train.parse(argv))
    if config.resume:
        raise UserError("a step is that of a fresh transformer; leave --resume out")
    device, dtype, amp = train.machine(config)
    batch, T = config.batch_size // config.accumulate, config.block_size
    vocab_size, padded = (50257, 50304) if str(config.preset).startswith("fineweb") else (65, 65)
    torch.manual_seed(config.seed)
    meta = {"vocab_size": padded, "tokenizer": "char"}
    model = train.new_model(config, SimpleNamespace(meta=meta), device)
    optimizers = train.make_optimizers(model, config, dtype)
    train.set_schedule(optimizers, 0, config)
    ids = torch.randint(vocab_size, (batch, T + 1), device=device)
    train.compile_blocks(model, config, device)

    def gradients():
        with amp:
            loss = model(ids[:, :-1], ids[:, 1:])[1]
        loss.item()
        loss.backward()

    def moves():
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        train.constrain(model, optimizers, config, dtype)

    def whole():
        gradients()
        moves()

    def without():
        gradients()
        model.zero_grad()

    def product(shape, repeats):
        b, m, k, n = shape
        x = torch.randn(b, m, k, device=device, dtype=dtype)
        y = torch.randn(b, k, n, device=device, dtype=dtype)
        return median(lambda: torch.bmm(x, y), repeats, device)

    times, start = [], time.perf_counter()
    while len(times) < 13 and (len(times) < 6 or time.perf_counter() - start < 60):
        times.append((seconds(whole, device), seconds(without, device)))
    a, b = (sorted(column)[len(column) // 2] for column in zip(*times[3:]))  # three to warm up
    shapes = products(model, config, batch)
    c = sum(shapes.count(shape) * product(shape, 11) for shape in set(shapes))
    flops = sum(2 * b * m * k * n for b, m, k, n in shapes)
    side = 8192 if device.type == "cuda" else 2048
    peak = max(2 * side ** 3 / product((1, side, side, side), 7), flops / c)
    result = {"step_over_floor": a / c, "optimizer_share": (a - b) / a, "tokens_per_second": batch * T / a,
              "matmul_share": flops / a / peak}
    if grows:
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else (
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        gradients()
        result |= {"seconds": a, "optimizer_seconds": seconds(moves, device), "peak_gb": memory / 1e9,
                   "certificate_seconds": seconds(lambda: lipschitz_bounds(model))}
    say(f"(a) step {1e3 * a:.1f} ms, (b) without optimizer and constraint {1e3 * b:.1f} ms, (c) its matrix "
        f"products {1e3 * c:.1f} ms\na/c {a / c:.2f}, (a-b)/a {(a - b) / a:.1%}, {batch * T / a:,.0f} "
        f"tokens/s, {result['matmul_share']:.1%} of the best matmul rate, {peak / 1e9:,.0f} GFLOP/s")
    say(to_json(result))


def images(s, w_max, alpha, decay):
    """{method: exact image of the RMS->RMS singular values s (..., r), largest first}. Others' errors are not
    measured.
    """
    top = torch.zeros_like(s)
    top[..., 0] = s[..., 0]
    q = s - alpha * s ** 3
    return {"soft_cap": q + alpha * q ** 3, "hard_cap": s.clamp_max(w_max), "svd_cap": s.clamp_max(w_max),
            "spectral_normalize": s * (w_max / s[..., :1]).clamp_max(1), "none": s,
            "spectral_sphere": s * (w_max / s[..., :1]),
            "hyperball": s * (w_max * s.shape[-1] ** 0.5 / s.norm(dim=-1, keepdim=True)),
            "spectral_hammer": s - (top - w_max).clamp_min(0), "stiefel": torch.full_like(s, w_max),
            "spectral_weight_decay": s - decay * top}


def methods(_):
    """Time of every method against the exact SVD and, for a batch, against a loop over its matrices; and its
    largest error against its exact target. Inner products are in bfloat16 where the hardware has it, as in
    train.py.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32
    w_max, lr, decay = 1.0, 0.03, 0.1  # the largest step after which caps round; a decay for what decays
    alpha = soft_cap_coupling(w_max, 0, lr * UPDATE_NORM)
    say(f"{'shape':>16} {'method':<22} {'ms':>8} {'x SVD':>7} {'x loop':>7} {'error / w_max':>14}    in "
        f"{dtype}")
    for shape in SHAPES:
        m, n = shape[-2:]
        U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        s = torch.linspace(1, 0.01, min(m, n), dtype=torch.float64).expand(shape[0], -1)
        s = (w_max + lr) * s  # after a step
        W, targets = (U * s[..., None, :] @ Vh * math.sqrt(m / n)).float(), images(s, w_max, alpha, decay)
        svd_ms = None
        for name in ("svd_cap", *(name for name in METHODS if name != "svd_cap")):
            spends = decay if name == "spectral_weight_decay" else 0.0
            step = Step(w_max, lr, spends, lr * UPDATE_NORM, dtype)
            method = lambda W: METHODS[name](W, step)
            method(W)
            ms = 1e3 * median(lambda: method(W), 5)
            svd_ms, loop, error = svd_ms or ms, "", "?"
            if shape[0] > 1:
                loop = f"{1e3 * median(lambda: [method(matrix) for matrix in W], 5) / ms:.1f}"
            if name in targets:
                exact = U * targets[name][..., None, :] @ Vh * math.sqrt(m / n)
                error = f"{(rms_norm(method(W).double() - exact) / w_max).max().item():.1e}"
            say(f"{str(shape):>16} {name:<22} {ms:8.2f} {svd_ms / ms:7.1f} {loop:>7} {error:>14}")


WIDTHS = 128, 256, 512, 1024  # at 2,048 20 GiB are not enough
WIDE = "--n_layer=12", "--position_bias=False", "--batch_size=4", "--compile=False"  # 1,024 tokens a step


def widths(_):
    """A step at each of WIDTHS, by a process of its own, as the peak of memory is a process's."""
    for width in WIDTHS:
        options = [*WIDE, f"--n_embd={width}"]
        done = subprocess.run([sys.executable, __file__, "grown", *options], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"width {width}: {done.stderr.strip()}")
        found = json.loads(done.stdout.strip().split("\n")[-1])
        command = f"python results/bench.py grown {' '.join(options)}"
        append_line(RESULTS / "speed.jsonl", {"what": "width", "width": width, "command": command} | found)
        say(f"{width}\n{done.stdout.strip()}")


def main():
    what = {"step": step, "grown": partial(step, grows=True), "methods": methods, "widths": widths}
    with one_line_errors("bench.py"):
        if sys.argv[1:2] not in [[name] for name in what] or (
                what[sys.argv[1]] in (methods, widths) and len(sys.argv) > 2):
            raise UserError(
                f"python results/bench.py {'|'.join(what)}; step and grown have options, those of train.py")
        keep_memory()
        what[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
