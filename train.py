"""Train a Lipschitz-bounded transformer: Muon or AdamW, and a weight constraint after every step.

    python train.py      # Shakespeare, Muon, soft cap: 55 % accuracy in 2 to 6 minutes on 2 CPU cores
    python train.py --help                                              # all options; examples: README.md
    python train.py --resume                                            # go on from out_dir/ckpt.pt
    torchrun --standalone --nproc_per_node=8 train.py --preset=fineweb-w1   # on 8 GPUs

Writes out_dir/ckpt.pt every few minutes and at each evaluation, and out_dir/log.jsonl as it goes; those of an
earlier run there are kept once, as ckpt.old.pt and log.old.jsonl. Ctrl-C and SIGTERM save and exit.
"""
import argparse
import importlib
import math
import os
import platform
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from constrain import (METHODS, RADII, Step, exact_model, holds_w_max, layer_norms, lead, lipschitz_bounds,
                       logit_reach, matrices, project, refused, rms_norm, svd_cap, worst_case)
from model import GPT, MAX_BIAS, GPTConfig, load_checkpoint, onto_ball, sample, unit
from optim import TANGENTS, UPDATE_NORM, Muon, has_bf16, keep_memory, map_by_shape
from prepare import (Parser, Tokenizer, UserError, alone, commit, one_line_errors, open_data, option, say,
                     shakespeare, to_json)

# --- Options ------------------------------------------------------------------------------------------------

OPTIMIZERS = {}  # name: function, see `optimizer`
PRESETS = {}     # name: options
COMPILE_STEPS = 1000  # on two CPU cores fewer do not bring back what compiling takes, see results/speed.md


@dataclass
class Config(GPTConfig):
    """The options of a run: the model's, which are in model.py, and these."""
    preset: str = option(None, "options that hold unless given too", choices=PRESETS)
    # what to train on, and where to
    out_dir: str = option("out/shakespeare", "checkpoint and log go here")
    dataset: str = option("shakespeare", "a folder of data/, made by prepare.py")
    init_from: str = option(None, "a checkpoint whose weights the run begins with")
    # what the default has beyond the paper's architecture, which takes half as many steps again without it
    position_bias: bool = option(True, "add to the scores a learned number for every head and distance")
    # constraint
    method: str = option("soft_cap", "the weight constraint", choices=METHODS)
    head_method: str = option(None, "the output matrix's constraint [method]", choices=METHODS)
    w_max: float = option(6.0, "largest RMS->RMS norm of a matrix", 1e-9, 1e9)
    w_max_mlp: float = option(None, "w_max of the MLPs, whose lr scales as it does", 1e-9, 1e9)
    # optimizer
    optimizer: str = option("muon", "the optimizer", choices=OPTIMIZERS)
    lr: float = option(None, "peak learning rate [muon 0.1, adamw 0.002]", 1e-30, 1e30)
    cooldown: float = option(1.0, "share of the steps, at the end, in which lr falls linearly", 1e-9, 1)
    lr_floor: float = option(0.0, "the share of lr to which it falls", 0, 1)
    head_lr: float = option(1.0, "the output matrix's learning rate, as a multiple of lr", 1e-9, 1e6)
    embedding: str = option("dual", "of the table, with muon: see optim.dual_rows", choices=("dual", "adam"))
    embedding_lr: float = option(0.3, "its learning rate, and that of all vectors, over lr", 1e-9, 1e6)
    radius: float = option(0.0, "train for the worst change of this RMS norm, see worst_case", 0, 1e9)
    gce: float = option(0.0, "to what q of the loss (1 - p^q) / q rises, p the label's probability", 0, 1)
    adversarial: float = option(0.0, "train on embeddings that an attack has moved by this RMS norm", 0, 1e9)
    weight_decay: float = option(0.0, "decay of W, or its largest sigma, by lr * weight_decay", 0, 1e30)
    momentum: float = option(0.9, "Muon's, or AdamW's beta1", 0, 0.999999)
    nesterov: bool = option(True, "Muon's Nesterov momentum")
    tangent: bool = option(False, "Muon's steps made for the method's manifold, see optim.TANGENTS")
    momentum_warmup: int = option(0, "steps over which Muon's momentum rises from 0.85", 0, 10 ** 12)
    batch_size: int = option(16, "sequences per step", 1, 10 ** 7)
    accumulate: int = option(1, "parts of a batch that take turns in the model, for less memory", 1, 10 ** 7)
    max_steps: int = option(500, "optimizer steps", 1, 10 ** 12)
    eval_interval: int = option(500, "steps between evaluations", 1, 10 ** 12)
    log_interval: int = option(10, "steps between lines of the log with loss and learning rate", 1, 10 ** 12)
    eval_tokens: int = option(None, "first tokens of the validation split to use [all]", 2, 10 ** 15)
    # machine
    seed: int = option(0, "of initialization, batches and the sample of text", 0, 2 ** 63 - 1)
    device: str = option(None, "cpu, cuda, cuda:1, mps ...; by default cuda if there is one, else cpu")
    dtype: str = option(None, "of products [bfloat16 if in hardware]", choices=("bfloat16", "float32"))
    compile: bool = option(None, f"torch.compile [on a CPU from {COMPILE_STEPS:,} steps on]")
    resume: bool = option(False, "go on from out_dir/ckpt.pt, with its options but for those given")


# The paper's 145 M model on FineWeb10B, with the settings of its script: at w_max 1 bound 10, at 16 NanoGPT's
# accuracy. Left out are its RoPE (base 1024, half of the frequencies 0), documents that attention sees apart,
# and windows that grow from 128 to 1,792 tokens.
FINEWEB = dict(dataset="fineweb", n_layer=12, n_head=6, n_embd=768, block_size=1024, position_bias=False,
               zero_head=True, lr=0.05, head_lr=0.1, embedding="adam", embedding_lr=2.0, momentum=0.95,
               momentum_warmup=300, batch_size=384, accumulate=8, max_steps=1770, cooldown=0.4, lr_floor=0.1,
               eval_interval=125, eval_tokens=10_485_760, method="spectral_normalize")
# Cheap to certify: heads look at fixed distances, all maps keep the norm, the bound is logit_scale.
TIGHT = dict(out_dir="out/tight", n_layer=1, n_head=8, n_embd=512, softmax_scale=0.0, logit_scale=8.0,
             position_bias=True, per_head=True, attn_scale=1.0, alpha=1.0, activation="maxmin", mlp_layers=4,
             mlp_ratio=1, method="stiefel", w_max=1.0, lr=0.025, max_steps=1200, eval_interval=1200)
# The same trained for a radius
TIGHT_RADIUS = TIGHT | dict(out_dir="out/tight-radius", radius=0.015, gce=0.7, mlp_layers=6, head_gain=True,
                            head_method="hard_cap", lr=0.05)
# With room for content: two layers of the paper's kind, a ball that keeps activations small; bound about 580.
TIGHT_CONTENT = dict(out_dir="out/tight-content", n_layer=2, n_head=8, n_embd=256, softmax_scale=0.2,
                     position_bias=True, per_head=True, activation="maxmin", ball=1.0, w_max=3.5,
                     max_steps=1200, eval_interval=1200)
PRESETS |= {"tight": TIGHT, "tight-radius": TIGHT_RADIUS, "tight-content": TIGHT_CONTENT,
            "fineweb-w1": FINEWEB | dict(out_dir="out/fineweb-w1", method="soft_cap", w_max=1.0,
                                         softmax_scale=24.0, max_steps=6200)}
for w in (4, 8, 16):  # scores of w^2 times the size are scaled by so much less
    PRESETS[f"fineweb-w{w}"] = FINEWEB | dict(out_dir=f"out/fineweb-w{w}", w_max=float(w),
                                              softmax_scale=128 ** 0.5 / w ** 2)


def configure(given, ckpt=None):
    """The Config of the options given, {name: value}, over those of the preset, over the defaults. Those of a
    checkpoint come between: all of them with --resume, its architecture with --init_from. UserError for what
    no run, or not the checkpoint's, can have.
    """
    options, resume = dict(PRESETS.get(given.get("preset"), {})), ckpt and given.get("resume")
    if unknown := {*given} - {f.name for f in fields(Config)}:
        raise UserError(f"there is no option {min(unknown)}")
    if resume:
        options = {f.name: ckpt["config"][f.name] for f in fields(Config) if f.name in ckpt["config"]}
        for name in ("preset", "init_from", "optimizer", "embedding", "seed", *asdict(GPTConfig())):
            if name in given and given[name] != options.get(name):
                raise UserError(f"{given['out_dir']}/ckpt.pt has {name}={options.get(name)}, so it cannot go "
                                f"on with --{name}={given[name]}")
    elif ckpt:
        options |= ckpt["model_config"]
    if "optimizer" in given and given["optimizer"] != options.get("optimizer", Config.optimizer):
        options.pop("lr", None)  # it is the other's, in other units
    try:
        config = Config(**options | given)
        config.lr = config.lr or OPTIMIZERS[config.optimizer].lr
        if config.tangent and (config.optimizer != "muon" or config.method not in TANGENTS):
            raise ValueError(f"tangent=True is for muon and {' or '.join(TANGENTS)}")
        head = config.head_method or config.method, config.lr * config.head_lr
        for method, lr in ((config.method, config.lr), head):
            decay, most = lr * config.weight_decay, 2 if method == "spectral_weight_decay" else 1
            if not decay < most:
                raise ValueError(f"weight_decay={config.weight_decay:g} times the learning rate, {lr:g}, "
                                 f"must be below {most}, or a step turns weights round")
            step = Step(config.w_max, lr, decay, lr * OPTIMIZERS[config.optimizer].update_norm)
            METHODS[method](torch.zeros(1, 1), step)
    except ValueError as e:
        raise UserError(f"--{e}" if "=" in str(e).partition(" ")[0] else e)
    if resume and ckpt["step"] > config.max_steps:
        raise UserError(f"{config.out_dir}/ckpt.pt is at step {ckpt['step']}, past --max_steps="
                        f"{config.max_steps}")
    if config.batch_size % (config.accumulate * world()):
        raise UserError(f"--batch_size={config.batch_size} must be a multiple of --accumulate="
                        f"{config.accumulate} times the number of processes, {world()}")
    return config


# --- Training -----------------------------------------------------------------------------------------------

def train(given):
    """One run, from scratch or resumed, with the options {name: value}."""
    given = {"out_dir": PRESETS.get(given.get("preset"), {}).get("out_dir", Config.out_dir)} | given
    out_dir = Path(given["out_dir"])
    start = out_dir / "ckpt.pt" if given.get("resume") else given.get("init_from")
    ckpt = load_checkpoint(start)[1] if start else None
    config = configure(given, ckpt)
    device, dtype, amp = machine(config)
    data = Text(config, device, ckpt["meta"] if config.resume else None)

    with alone(out_dir / ".lock", wait=False) if rank() == 0 else nullcontext():
        torch.manual_seed(config.seed)
        model = new_model(config, data, device, ckpt)
        optimizers = make_optimizers(model, config, dtype)
        compiled = compile_blocks(model, config, device)
        net = model if world() == 1 else DistributedDataParallel(model, [device] * (device.type == "cuda"))
        why = refused(model) if rank() == 0 else None
        if why and config.radius:
            raise UserError(f"--radius={config.radius:g} needs a certificate; {why}")
        run = Run(config, data, model, optimizers, why, ckpt if config.resume else None)
        if rank() == 0:
            processes = f"{world()} times " if world() > 1 else ""
            words = (f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters",
                     f"{config.optimizer} and {config.method}", f"w_max {config.w_max:g}",
                     f"on {processes}{device} in {str(dtype).removeprefix('torch.')}", compiled,
                     f"resumed at step {run.step}" * config.resume)
            say(", ".join(filter(None, words)))
            if why:
                say(why)

        bar = tqdm(total=config.max_steps, initial=run.step, unit="step", dynamic_ncols=True, leave=False,
                   disable=True if rank() else None)
        with bar, stop_requests() as asked_to_stop:
            while run.step < config.max_steps:
                tick = time.perf_counter()
                lr = set_schedule(optimizers, run.step, config)
                x, y = data.batch(run.step)                                  # (B, T) each
                if config.radius and (run.step % REACH_STEPS == 0 or run.reach is None):
                    run.reach = logit_reach(model, config.radius)
                q = config.gce * (run.step + 1) / config.max_steps
                loss, stopping = gradients(net, model, x, y, run.reach, q, config, amp, asked_to_stop)
                run.check("loss", loss, lr)
                if stopping or time.perf_counter() - run.saved_at > SAVE_SECONDS:
                    run.save()  # weights of which a finite loss is known
                if stopping:
                    break
                seen = watch(model) if (run.step + 1) % config.log_interval == 0 else None
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                constrain(model, optimizers, config, dtype)
                run.step += 1
                run.losses.append(loss)
                run.step_seconds.append(time.perf_counter() - tick)
                if seen is not None:
                    run.write({"step": run.step, "loss": loss, "lr": lr, **seen})
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

                if run.step % config.eval_interval == 0 or run.step == config.max_steps:
                    with torch.compiler.set_stance("force_eager"):
                        found = measure(model, data, x.chunk(config.accumulate)[-1], optimizers, config, amp)
                    run.check("validation loss", found["val_loss"], lr)
                    run.evaluated(found)

        if rank() == 0 and run.step < config.max_steps:
            say(f"stopped at step {run.step} and saved {run.path}; go on with --resume "
                f"--out_dir={config.out_dir}")
        elif rank() == 0 and config.resume and run.step == ckpt["step"]:
            say(f"{run.path} is at its last step; raise --max_steps")
        elif rank() == 0:
            with torch.compiler.set_stance("force_eager"):
                say(sample(model.eval(), data.tokenizer).strip())


def gradients(net, model, x, y, reach, q, config, amp, asked_to_stop):
    """The gradient of a batch's mean loss over all processes, in p.grad of all parameters; returns the loss
    and how many processes have been asked to stop. `net` is the model or, of several processes, one that
    sends gradients round with the last part's backward pass. With a reach the loss is that of the worst case.
    With q > 0 it is generalized cross entropy (Zhang and Sabuncu, arXiv 1805.07836), at most 1 / q: it gives
    up what cannot be predicted, but from the first step on also what can be learned.
    """
    mean_loss, parts = 0.0, config.accumulate
    for i, (x_part, y_part) in enumerate(zip(x.chunk(parts), y.chunk(parts))):
        with net.no_sync() if world() > 1 and i < parts - 1 else nullcontext():
            with amp:
                shift = attack(model, x_part, y_part, config.adversarial) if config.adversarial else None
                logits, loss = net(x_part, None if reach or q else y_part, shift)
            if reach or q:
                labels, z = y_part.flatten(), logits.flatten(0, 1)
                z = worst_case(z, labels, model.head.weight, reach) if reach else z.float()
                loss = F.cross_entropy(z, labels, reduction="none" if q else "mean")
                loss = (-torch.expm1(-q * loss) / q).mean() if q else loss
            loss = loss / parts
            loss.backward()
        mean_loss += loss.item() / world()
    return summed(torch.tensor([mean_loss, bool(asked_to_stop)], dtype=torch.float64)).tolist()


def attack(model, x, y, r):
    """Changes (B, T, n_embd) of RMS norm r of the embeddings of tokens x, along the gradient of the loss: a
    model that is trained on these has larger radii (Miyato et al., arXiv 1605.07725). In bfloat16 an r below
    0.003 drowns in rounding.
    """
    shift = torch.zeros(*x.shape, model.config.n_embd, device=x.device, requires_grad=True)
    _, loss = model(x, y, shift)
    gradient, = torch.autograd.grad(loss, shift)
    return r * unit(gradient)


def watch(model):
    """{name: number} to log every log_interval steps, when the step's gradients are there."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"grad_norm": torch.nn.utils.get_total_norm(gradients).item()}


# --- Batches ------------------------------------------------------------------------------------------------

@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """(a random offset, the windows 0 .. n - 1 in random order) of an epoch."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(1 << 32)), rng.permutation(n)


class Text:
    """The shards of tokens in data/NAME, and batches from them; Shakespeare is fetched when missing. `like`
    is the meta of a checkpoint, whose data they must be.
    """
    def __init__(self, config, device, like=None):
        folder, T = Path("data") / config.dataset, config.block_size
        if config.dataset == "shakespeare" and rank() == 0 and not (folder / "meta.json").exists():
            shakespeare()
        if dist.is_initialized():
            dist.barrier()
        self.meta, self.shards, val = open_data(folder, like)
        self.config, self.device, self.folder = config, device, folder
        self.val, self.tokenizer = val[:config.eval_tokens], Tokenizer(self.meta)
        if (least := min(map(len, (*self.shards, self.val)))) < T + 1:
            raise UserError(f"block_size {T} needs {T + 1} tokens in every shard of {folder} and to validate "
                            f"on, not {least}; use more text, more --eval_tokens or a smaller --block_size")
        self.counts = [max(1, (len(shard) - T) // T) for shard in self.shards]  # windows of each shard
        self.ends = np.cumsum(self.counts)

    def batch(self, step):
        """Inputs and targets (B, T), int64, of this process's share of a step's batch. An epoch takes every
        window once; where windows begin differs from epoch to epoch. All depends on (seed, step) alone, so
        that a resumed run sees the same.
        """
        c, T, n, rows = self.config, self.config.block_size, int(self.ends[-1]), []
        for i in range(step * c.batch_size + rank(), (step + 1) * c.batch_size, world()):
            offset, order = epoch_order(c.seed, i // n, n)
            window = int(order[i % n])
            which = int(np.searchsorted(self.ends, window, side="right"))
            shard, count = self.shards[which], self.counts[which]
            start = offset % (len(shard) - count * T) % T + (window - int(self.ends[which]) + count) * T
            rows.append(shard[start:start + T + 1])
        rows = np.stack(rows)
        if rows.max() >= self.meta["vocab_size"]:
            raise UserError(f"{self.folder} has token {rows.max()}, past its vocabulary of "
                            f"{self.meta['vocab_size']:,}; prepare it again")
        return shifted(rows, self.device)


def shifted(rows, device):
    """Rows (B, T + 1) of tokens -> inputs and targets (B, T), int64."""
    rows = torch.from_numpy(rows.astype(np.int64)).to(device)
    return rows[:, :-1], rows[:, 1:]


# --- Model, optimizers and the constraint -------------------------------------------------------------------

def new_model(config, data, device, ckpt=None):
    """A GPT with config's options, of the weights of a checkpoint if there is one, in their caps."""
    config.vocab_size = V = data.meta["vocab_size"]
    if data.meta["tokenizer"] == "gpt2":
        config.vocab_size = -(-V // 128) * 128  # 50,257 tokens become 50,304, a better size for products
    model = GPT(GPTConfig(**{name: getattr(config, name) for name in asdict(GPTConfig())})).to(device)
    if ckpt:
        if any(ckpt["meta"].get(key) != data.meta.get(key) for key in ("tokenizer", "vocabulary")):
            how = ("--tokenizer gpt2" if ckpt["meta"]["tokenizer"] == "gpt2" else
                   f"--vocabulary_of {ckpt['config']['dataset']}, as it was when that was trained")
            raise UserError(f"{config.init_from} has another vocabulary than {data.folder}; prepare that "
                            f"with {how}")
        try:
            model.load_state_dict(ckpt["model"])
        except RuntimeError as e:
            raise UserError(f"the weights of {config.init_from} have another shape than the options ask for "
                            f"({str(e).splitlines()[1].strip()})")
    # with --resume only what options have lowered is out of its cap, or what the method cannot hold
    steps = OPTIMIZERS[config.optimizer].update_norm if config.resume else 0.0
    cap = project if config.resume else lambda W, w_max: svd_cap(W, Step(w_max))
    for group in matrix_groups(model, config):
        for W in group["params"] if holds_w_max(group["method"], steps) else ():
            W.data = cap(W.data, group["w_max"])
    return model


def matrix_groups(model, config):
    """Parameter groups of matrices of one constraint, cap and learning rate, which in MLPs is as the cap."""
    groups = {}
    for name, W in matrices(model).items():
        cap = (config.w_max_mlp or config.w_max) / config.w_max if ".mlp." in name else 1.0
        rate = config.head_lr if name == "head" else 1.0
        method, decay = name == "head" and config.head_method or config.method, config.weight_decay / cap
        group = dict(params=[], method=method, w_max=config.w_max * cap, lr_scale=cap * rate, decay=decay,
                     weight_decay=0.0 if method == "spectral_weight_decay" else decay,
                     tangent=method if config.tangent and method in TANGENTS else None)
        groups.setdefault((cap, rate, method), group)["params"].append(W)
    return [groups[key] for key in sorted(groups)]


def make_optimizers(model, config, dtype):
    """The optimizers of OPTIMIZERS[config.optimizer]; the weight decay is for the matrices alone."""
    owner = owners(model)
    tables = [p for p in model.parameters() if p not in owner]  # see `optimizer`
    table = dict(params=tables, weight_decay=0.0, lr_scale=config.embedding_lr)
    mine = [W for W in owner if owner[W] == rank()] + tables
    optimizers = OPTIMIZERS[config.optimizer](matrix_groups(model, config), table, config, dtype, mine)
    moved = {p for group in param_groups(optimizers, "lr_scale") for p in group["params"]}
    if left := [name for name, p in model.named_parameters() if p not in moved]:
        raise UserError(f"--optimizer={config.optimizer} leaves out {', '.join(left)}, or its group's keys")
    return optimizers


def optimizer(lr, update_norm=math.inf):
    """Registers f(groups, table, config, dtype, mine): parameter groups of matrices and one of the embedding
    table and all else that `matrices` leaves out -> a list of torch optimizers. `mine` are the parameters
    that this process has to move. lr is the learning rate by default, update_norm the largest RMS->RMS norm
    of a step at rate 1.
    """
    def register(f):
        f.lr, f.update_norm = lr, update_norm
        OPTIMIZERS[f.__name__] = f
        return f
    return register


@optimizer(lr=0.1, update_norm=UPDATE_NORM)
def muon(groups, table, config, dtype, mine):
    """Muon on the matrices, and on the table too or, with --embedding=adam, Adam."""
    options = dict(lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, dtype=dtype, mine=mine)
    if config.embedding == "adam":
        return [Muon(groups, **options),
                torch.optim.Adam([table], lr=config.lr, betas=(0.8, 0.95), eps=1e-10)]
    return [Muon([*groups, table | {"embedding": True}], **options)]


@optimizer(lr=0.002)
def adamw(groups, table, config, dtype, mine):
    return [torch.optim.AdamW([*groups, table], lr=config.lr, betas=(config.momentum, 0.95))]


def set_schedule(optimizers, step, config):
    """Set all learning rates and Muon's momentum for a step; returns the learning rate of the matrices."""
    height = min(1, (1 - step / config.max_steps) / config.cooldown)
    lr = config.lr * (config.lr_floor + (1 - config.lr_floor) * height)
    warm = min(1, step / config.momentum_warmup) if config.momentum_warmup else 1
    for group in param_groups(optimizers):
        group["lr"] = lr * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = config.momentum - (1 - warm) * max(0, config.momentum - 0.85)
    return lr


def param_groups(optimizers, key="lr"):
    """All parameter groups that have a key."""
    return [group for optimizer in optimizers for group in optimizer.param_groups if key in group]


@torch.no_grad()
def constrain(model, optimizers, config, dtype):
    """Constrain all matrices after a step, table rows and head gains to RMS norm <= 1, biases to MAX_BIAS."""
    owner, update_norm = owners(model), OPTIMIZERS[config.optimizer].update_norm
    for group in param_groups(optimizers, "w_max"):
        weights, lr = [W for W in group["params"] if owner[W] == rank()], group["lr"]
        step = Step(group["w_max"], lr, lr * group["decay"], lr * update_norm, dtype)
        for W, new in zip(weights, map_by_shape(partial(METHODS[group["method"]], step=step), weights)):
            W.copy_(new)
    if dist.is_initialized():
        for W in owner:
            dist.broadcast(W, owner[W])
    model.wte.weight.copy_(onto_ball(model.wte.weight, 1.0))
    for block in model.blocks:
        if block.attn.bias is not None:
            block.attn.bias.clamp_(-MAX_BIAS, MAX_BIAS)
        if block.attn.gain is not None:
            block.attn.gain.copy_(onto_ball(block.attn.gain, 1.0))


# --- Evaluation ---------------------------------------------------------------------------------------------

def measure(model, data, x, optimizers, config, amp):
    """{name: number} of an evaluation: scores on the validation split, activations on inputs x and, in the
    first process alone, the bounds and the largest norm over its cap.
    """
    model.eval()
    layers = layer_norms(model) if config.radius else None
    with amp:
        found = evaluate(model, data.val, config.radius, config.eval_tokens, layers) | activations(model, x)
    if rank() == 0:
        found |= {f"log10_{kind}": bound for kind, bound in lipschitz_bounds(model, layers).items()}
        if found["log10_certified"] == math.inf:  # an edit may show late
            found = {name: x for name, x in found.items() if not name.startswith(("worst", "certified"))}
        found["norm_over_cap"] = max(rms_norm(W).max().item() / group["w_max"]
                                     for group in param_groups(optimizers, "w_max") for W in group["params"])
    model.train()
    return found


@torch.inference_mode()
def score(model, tokens, starts, length, reaches=()):
    """Sums over the windows of tokens (N,) that predict `length` tokens after each start: predictions, loss
    (nats), right ones; and, for each logit_reach at a radius in reaches, the largest loss under a change of
    that norm, and how many predictions are certified at it.
    """
    device, T = model.head.weight.device, model.config.block_size
    B = max(1, min(64, 2 ** 28 // (T * model.config.vocab_size)))  # at most 1 GiB of logits
    total = torch.zeros(3 + 2 * len(reaches), dtype=torch.float64)
    for i in range(rank() * B, len(starts), world() * B):
        x, y = shifted(np.stack([tokens[s:s + length + 1] for s in starts[i:i + B]]), device)
        logits, loss = model(x, y)
        sums = [y.numel(), loss.item() * y.numel(), (logits.argmax(-1) == y).sum().item()]
        for reach in reaches:
            y = y.flatten()
            worst = worst_case(logits.flatten(0, 1), y, model.head.weight, reach)
            sums += [F.cross_entropy(worst, y, reduction="sum").item(), (lead(worst, y) > 0).sum().item()]
        total += torch.tensor(sums, dtype=torch.float64)
    return summed(total)


def evaluate(model, tokens, radius=0.0, most=None, layers=None):
    """Loss (nats) and accuracy on a whole split, every token predicted once from the up to block_size ones
    before it in its window; and `paper protocol`: accuracy on the first 20 batches of 64 windows that start
    one token apart, fewer of them where that would be more tokens than `most`. With a radius also what is
    certified, in float64 on the CPU: the largest loss under a change of the embeddings of that norm, and
    accuracies at RADII; `layers` saves computing layer_norms.
    """
    T = model.config.block_size
    last = (len(tokens) - 1) // T * T  # the last window begins here, and may be shorter
    rest = len(tokens) - 1 - last
    whole = lambda net, *reaches: (score(net, tokens, range(0, last, T), T, reaches) +
                                   score(net, tokens, [last] * bool(rest), rest, reaches))
    first = min(20 * 64, len(tokens) - T, -(-most // T) if most else 20 * 64)
    paper, (count, loss, right) = score(model, tokens, range(first), T), whole(model)
    found = {"val_loss": (loss / count).item(), "val_acc": (right / count).item(),
             "paper_protocol_acc": (paper[2] / paper[0]).item()}
    if radius:
        sums = whole(exact_model(model), *(logit_reach(model, r, layers) for r in (radius, *RADII)))
        (worst, _), *at_radii = (sums[3:] / count).view(-1, 2).tolist()
        found["worst_loss"] = worst
        found |= {f"certified_acc_{r:g}": certified for r, (_, certified) in zip(RADII, at_radii)}
    return found


@torch.inference_mode()
def activations(model, x):
    """Largest entry and largest RMS norm of a token's vector over all layers' outputs but the logits, on
    inputs x; and both for the output of every block by itself.
    """
    sizes = {}  # module: largest entry and largest RMS norm

    def record(module, args, y):
        if module not in (model, model.head):
            sizes[module] = y.abs().max().item(), y.float().square().mean(dim=-1).max().sqrt().item()

    with torch.nn.modules.module.register_module_forward_hook(record):
        model(x)
    act_max, act_rms = map(max, zip(*sizes.values()))
    blocks_max, blocks_rms = map(list, zip(*(sizes[block] for block in model.blocks)))
    return dict(act_max=act_max, act_rms=act_rms, act_max_layers=blocks_max, act_rms_layers=blocks_rms)


# --- A run: its checkpoint and log, going on from them, and its end -----------------------------------------

SAVE_SECONDS = 180  # between checkpoints, if evaluations are farther apart
REACH_STEPS = 100   # between computing what a change of the radius can do to the logits


class Run:
    """What a run has counted so far, with its checkpoint and log in config.out_dir. The log is part of the
    checkpoint; log.jsonl has the same lines and those since, and is written anew when a run goes on, from
    `ckpt`. A new run keeps what an earlier one has left, if that has logged a step.
    """
    def __init__(self, config, data, model, optimizers, why_refused, ckpt):
        self.config, self.data, self.model, self.optimizers = config, data, model, optimizers
        self.path, self.log_path = Path(config.out_dir) / "ckpt.pt", Path(config.out_dir) / "log.jsonl"
        self.names = {p: name for name, p in model.named_parameters()}
        self.step, self.losses, self.reach, self.lines = 0, [], None, []  # these are saved
        self.step_seconds, self.refused, self.started = [], why_refused, time.perf_counter()
        if ckpt:
            self.go_on(ckpt)
        if rank() == 0 and not ckpt and not (self.log_path.exists() and
                                             self.log_path.read_bytes().count(b"\n") < 2):
            for path in filter(Path.exists, (self.path, self.log_path)):
                os.replace(path, path.with_stem(path.stem + ".old"))
        name = torch.cuda.get_device_name(data.device) if data.device.type == "cuda" else platform.machine()
        self.lines.append({"step": self.step, "options": asdict(config), "torch": str(torch.__version__),
                           "python": platform.python_version(), "commit": commit(), "device": name,
                           "processes": world()})
        if rank() == 0:
            self.log_path.write_text("".join(to_json(line) + "\n" for line in self.lines))
        self.saved_step, self.saved_at = self.step, time.perf_counter()
        if not ckpt:
            self.save()  # so that there is something to resume from at any moment

    def go_on(self, ckpt):
        """Take back what `save` wrote, but for the weights, which the model has."""
        if "lines" not in ckpt:
            raise UserError(f"{self.path} is of an older train.py, from which this one cannot go on")
        self.step, self.losses, self.lines = ckpt["step"], ckpt["losses"], ckpt["lines"]
        self.started -= ckpt["seconds"]
        moves_norms = "radius", "w_max", "w_max_mlp", "method", "head_method"
        if all(getattr(self.config, name) == ckpt["config"].get(name) for name in moves_norms):
            self.reach = ckpt["reach"]  # else it is computed anew
        for optimizer, states in zip(self.optimizers, ckpt["optimizers"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            learned = {i: states[self.names[p]] for i, p in enumerate(params) if self.names[p] in states}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": learned})
        torch.set_rng_state(ckpt["rng"])

    def write(self, line):
        """Append a line to the log."""
        self.lines.append(line)
        if rank() == 0:
            with open(self.log_path, "a") as f:
                f.write(to_json(line) + "\n")

    def save(self):
        """Write the checkpoint. Of the optimizers it has what they have learned, by the parameters' names:
        learning rates and the like are the options', which may change when a run goes on.
        """
        self.saved_step, self.saved_at = self.step, time.perf_counter()
        learned = [{self.names[p]: state for p, state in o.state.items()} for o in self.optimizers]
        if rank() == 0:
            save(self.path, {"model": self.model.state_dict(), "optimizers": learned, "step": self.step,
                             "rng": torch.get_rng_state(), "losses": self.losses, "reach": self.reach,
                             "lines": self.lines, "seconds": time.perf_counter() - self.started,
                             "config": asdict(self.config), "model_config": asdict(self.model.config),
                             "meta": self.data.meta,
                             "refused": self.refused})  # what is trained, not what loads it, decides

    def evaluated(self, found):
        """Log an evaluation, save, and only then print: no fault of the output loses it."""
        tokens = self.config.batch_size * self.config.block_size
        line = {"train_loss": mean(self.losses), **found,
                "tokens_per_second": tokens / median(self.step_seconds),
                "seconds": time.perf_counter() - self.started}
        self.write({"step": self.step, **line})
        self.losses, self.step_seconds = [], []
        self.save()
        if rank() == 0:
            numbers = [f"{name} {x:.5g}" for name, x in line.items() if isinstance(x, Real)]
            say(f"step {self.step}: {', '.join(numbers)}")

    def check(self, name, loss, lr):
        if not math.isfinite(loss):
            raise UserError(f"the {name} is {loss} at step {self.step}, learning rate {lr:.4g}; lower --lr "
                            f"or --w_max (the last checkpoint, of step {self.saved_step}, is {self.path})")


def save(path, checkpoint):
    """Write a checkpoint so that path is always a whole one: under another name first, then renamed."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot save {path} ({e}); nothing that was saved before is lost")


@contextmanager
def stop_requests():
    """A list that Ctrl-C, and what schedulers and closed terminals send, add to, so that the run ends before
    its next step. A second Ctrl-C does not wait, but for one right after the first: torchrun repeats it.
    """
    def ask(number, _):
        if number == signal.SIGINT and asked and time.monotonic() - asked[0] > 2:
            raise KeyboardInterrupt
        asked.append(time.monotonic())

    asked = []
    main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python allows none
    with ExitStack() as old_handlers:
        for name in ("SIGINT", "SIGTERM", "SIGHUP") if main_thread else ():
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                old_handlers.callback(signal.signal, number, signal.signal(number, ask))
        yield asked


# --- Machine and processes ----------------------------------------------------------------------------------
# With torchrun each process takes its share of a batch, has all gradients, and orthogonalizes and constrains
# its share of the matrices, which it then sends to the others; so all have the same weights and optimizer
# state. The first logs and saves.

def machine(config):
    """(torch.device, dtype of its products, context in which they have it) to train with, or UserError."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" is a device that holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device={name} cannot be used: {str(e).splitlines()[0]}")
    if device.type == "cpu":
        keep_memory()
    dtype = getattr(torch, config.dtype or ("bfloat16" if has_bf16(device) else "float32"))
    return device, dtype, nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def compile_blocks(model, config, device):
    """Compile the blocks, as --compile says or else where it pays, if that works; returns words about it. One
    by one only the first takes time, as they are alike. The loss too, but on a CPU, whose kernels are faster.
    """
    pays = device.type == "cuda" or (device.type == "cpu" and config.max_steps >= COMPILE_STEPS)
    if not (pays if config.compile is None else config.compile):
        return ""
    try:  # with a sum and its gradient
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: (x * x).sum())(x).backward()
    except Exception as e:  # of many kinds, from several layers down
        why = f"torch.compile does not work here ({type(e).__name__})"
        if config.compile:
            raise UserError(f"{why}; go on with --compile=False")
        return f"not compiled, as {why}"
    for block in model.blocks:
        block.compile()
    if device.type != "cpu":
        model.loss = torch.compile(model.loss)
    return "compiled"


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def summed(x):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def owners(model):
    """{matrix: rank of the process that orthogonalizes and constrains it}, the work about equal for all."""
    cost = lambda W: W.numel() * min(W.shape[-2:])
    load, owner = [0] * world(), {}
    for W in sorted(matrices(model).values(), key=cost, reverse=True):
        owner[W] = load.index(min(load))
        load[owner[W]] += cost(W)
    return owner


# --- Command line -------------------------------------------------------------------------------------------

def parse(argv):
    """Command line -> {name: value} of the options given."""
    boolean = {"true": True, "1": True, "false": False, "0": False}
    parser = Parser(prog=os.path.basename(sys.argv[0]), description=__doc__.strip().split("\n")[0],
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in (f for f in fields(Config) if f.metadata):  # all but vocab_size, which the data decide
        kind, help, choices = field.type, field.metadata["help"], field.metadata["choices"]
        if field.default is not None:
            help += f" [{field.default}]"
        how = dict(type=kind, choices=choices, metavar=None if choices else kind.__name__.upper())
        if kind is bool:
            how |= dict(type=lambda text: boolean.get(text.lower(), text), choices=(True, False), nargs="?",
                        const=True)
        parser.add_argument(f"--{field.name}", help=help, **how)
    return vars(parser.parse_args(argv))


def main():
    given = parse(sys.argv[1:])
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:  # under torchrun
        # Imported later, as torch does on its own, it would keep the group as a default argument, beyond its
        # end: gloo's threads could then abort a process that is done (pytorch issue 190489)
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with one_line_errors("train.py", "interrupted; with --resume it goes on from the last checkpoint",
                             "lower --batch_size, or raise --accumulate"):
            train(given)
            if dist.is_initialized():
                dist.destroy_process_group()
    except RuntimeError as e:
        if not dist.is_initialized():
            raise
        sys.exit(f"train.py: process {rank()} stopped: {str(e).splitlines()[0]}")  # often as another one did


if __name__ == "__main__":
    main()
