"""
Train a Lipschitz-bounded transformer: Muon or AdamW, and a weight constraint after every step.

    python train.py      # Shakespeare, Muon, soft cap: 55 % accuracy in 70 to 110 s on 2 CPU cores

    python train.py --help                                              # all options, such as
    python train.py --method=hard_cap --optimizer=adamw --w_max=2
    python train.py --resume                                            # go on from out_dir/ckpt.pt
    python train.py --preset=tight-radius                               # certified predictions, see README.md
    python train.py --preset=fineweb-w16                                # 145 M (prepare.py fineweb first)
    torchrun --standalone --nproc_per_node=8 train.py --preset=fineweb-w1   # on 8 GPUs

Writes out_dir/ckpt.pt every few minutes and at each evaluation, which is a line of out_dir/log.jsonl; those
of an earlier run there are kept once, as ckpt.old.pt and log.old.jsonl. Ctrl-C and SIGTERM save and exit.
"""
import argparse
import dataclasses
import importlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import sysconfig
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

import prepare
from constrain import (METHODS, PROMISE_W_MAX, RADII, after_step, certified_radii, layer_norms, lead,
                       lipschitz_bound, logit_reach, matrices, matrix_norms, pgd, rms_norm, svd_cap,
                       worst_case)
from model import (GPT, MAX_BIAS, MLP, GPTConfig, MLPConfig, get_state, load_checkpoint, onto_ball, sample,
                   save, set_state)
from optim import UPDATE_NORM, Muon, has_bf16, keep_memory, map_by_shape
from prepare import (Parser, Tokenizer, UserError, data_folder, ensured, locked, one_line_errors, open_data,
                     option, say, to_json)

# ------------------------------------------------------------------------------------------------------------
# Options

COMPILE_STEPS = 1000  # on two CPU cores fewer do not bring back what compiling takes, see results/speed.md


@dataclass
class Config(GPTConfig):
    """The options of a run: the model's, which are in model.py, and these."""
    preset: str | None = option(None, "a row of PRESETS, whose options hold unless given too")
    # what to train on, and where to
    out_dir: str = option("out/shakespeare", "checkpoint and log go here")
    dataset: str = option("shakespeare", "a folder of data/, made by prepare.py")
    # what the default has beyond the paper's architecture, which takes half as many steps again without it
    position_bias: bool = option(True, "add to the scores a learned number for every head and distance")
    # constraint
    method: str = option("soft_cap", "the weight constraint", choices=METHODS)
    w_max: float = option(6.0, "largest RMS->RMS norm of a matrix", 1e-9, 1e9)
    w_max_mlp: float | None = option(None, "w_max of the MLPs, if another; their learning rate scales as it "
                                     "does", 1e-9, 1e9)
    # optimizer
    optimizer: str = option("muon", "muon or adamw", choices=("muon", "adamw"))
    lr: float | None = option(None, "peak learning rate; by default 0.1 for muon, 0.002 for adamw",
                              1e-30, 1e30)
    cooldown: float = option(1.0, "share of the steps, at the end, in which it falls linearly", 1e-9, 1)
    lr_floor: float = option(0.0, "the share of it to which it falls", 0, 1)
    head_lr: float = option(1.0, "the output matrix's learning rate, as a multiple of lr", 1e-9, 1e6)
    embedding: str = option("dual", "with muon, the embedding table's optimizer: dual (rows of norm 1, see "
                            "optim.py) or adam", choices=("dual", "adam"))
    embedding_lr: float = option(0.3, "its learning rate, as a multiple of lr", 1e-9, 1e6)
    radius: float = option(0.0, "train for the worst case of changes of the input of this norm, see "
                           "constrain.worst_case: RMS norm of embeddings, L2 norm of images", 0, 1e9)
    weight_decay: float = option(0.0, "a step decays weights, or with spectral_weight_decay their largest "
                                 "singular value, by lr * weight_decay", 0, 1e30)
    momentum: float = option(0.9, "Muon's, or AdamW's beta1", 0, 0.999999)
    nesterov: bool = option(True, "Muon's Nesterov momentum")
    momentum_warmup: int = option(0, "steps over which Muon's momentum rises from 0.85", 0, 10 ** 12)
    batch_size: int = option(16, "sequences per step", 1, 10 ** 7)
    accumulate: int = option(1, "parts of a batch that take turns in the model, for less memory", 1, 10 ** 7)
    max_steps: int = option(500, "optimizer steps", 1, 10 ** 12)
    eval_interval: int = option(500, "steps between evaluations", 1, 10 ** 12)
    attack_images: int = option(1000, "images of the validation split to attack, its first ones", 1, 10 ** 9)
    eval_tokens: int | None = option(None, "tokens of the validation split to evaluate on, its first ones; "
                                     "by default all", 2, 10 ** 15)
    # machine
    seed: int = option(0, "of initialization, batches and the sample of text", 0, 2 ** 63 - 1)
    device: str | None = option(None, "cpu, cuda, cuda:1, mps ...; by default cuda if there is one, else cpu")
    dtype: str | None = option(None, "of products: bfloat16 or float32; by default bfloat16 if the hardware "
                               "has it", choices=("bfloat16", "float32"))
    compile: bool | None = option(None, "use torch.compile; by default where that works, on a CPU from "
                                  f"{COMPILE_STEPS:,} steps on")
    resume: bool = option(False, "go on from out_dir/ckpt.pt, with its options but for those given")


# The paper's 145 M model on FineWeb10B, with the settings of its script: at w_max 1 bound 10, at 16 NanoGPT's
# accuracy. Left out are its RoPE (base 1024, half of the frequencies 0), documents that attention sees apart,
# and windows that grow from 128 to 1,792 tokens.
FINEWEB = dict(dataset="fineweb", n_layer=12, n_head=6, n_embd=768, block_size=1024, position_bias=False,
               zero_head=True, lr=0.05, head_lr=0.1, embedding="adam", embedding_lr=2.0, momentum=0.95,
               momentum_warmup=300, batch_size=384, accumulate=8, max_steps=1770, cooldown=0.4, lr_floor=0.1,
               eval_interval=125, eval_tokens=10_485_760, method="spectral_normalize")
# and its MLP on CIFAR-10, with the settings of its notebook: n_embd is the width, mlp_layers counts all. (Its
# first layer begins at zero, which trains with another derivative of ReLU at 0; ours is orthogonal.)
CIFAR10 = dict(out_dir="out/cifar10", dataset="cifar10", n_embd=256, mlp_layers=3, activation="relu",
               w_max=6.0, lr=0.2, nesterov=False, batch_size=512, max_steps=2000, eval_interval=500)
# and one built for its certificate: all maps keep the L2 norm, the radius is of L2 norm in pixels of [0, 1]
CIFAR10_TIGHT = CIFAR10 | dict(out_dir="out/cifar10-tight", n_embd=512, mlp_layers=4, activation="maxmin",
                               method="stiefel", w_max=1.0, logit_scale=40.0, radius=36 / 255, lr=0.05)
# Cheap to certify: heads look at fixed distances, all maps keep the norm, the bound is logit_scale.
TIGHT = dict(out_dir="out/tight", n_layer=1, n_head=8, n_embd=512, softmax_scale=0.0, logit_scale=8.0,
             position_bias=True, per_head=True, attn_scale=1.0, alpha=1.0, activation="maxmin", mlp_layers=4,
             mlp_ratio=1, method="stiefel", w_max=1.0, lr=0.025, max_steps=1200, eval_interval=1200)
# The same trained for a radius: most certified accuracy at 0.03 with 52 % plain.
TIGHT_RADIUS = TIGHT | dict(out_dir="out/tight-radius", radius=0.06, logit_scale=3.5, mlp_layers=6,
                            max_steps=1600, eval_interval=1600)
# With room for content: two layers of the paper's kind, a ball that keeps activations small; bound about 580.
TIGHT_CONTENT = dict(out_dir="out/tight-content", n_layer=2, n_head=8, n_embd=256, softmax_scale=0.2,
                     position_bias=True, per_head=True, activation="maxmin", ball=1.0, w_max=3.5,
                     max_steps=1200, eval_interval=1200)
PRESETS = {"cifar10": CIFAR10, "cifar10-tight": CIFAR10_TIGHT, "tight": TIGHT, "tight-radius": TIGHT_RADIUS,
           "tight-content": TIGHT_CONTENT,
           "fineweb-w1": FINEWEB | dict(out_dir="out/fineweb-w1", method="soft_cap", w_max=1.0,
                                        softmax_scale=24.0, max_steps=6200)}
for w in (4, 8, 16):  # scores of w^2 times the size are scaled by so much less
    PRESETS[f"fineweb-w{w}"] = FINEWEB | dict(out_dir=f"out/fineweb-w{w}", w_max=float(w),
                                              softmax_scale=128 ** 0.5 / w ** 2)


# ------------------------------------------------------------------------------------------------------------
# Training

def train(config, given=()):
    """One run, from scratch or resumed; `given` names the options that win over a checkpoint's."""
    ckpt = None
    if config.resume:
        config, ckpt = resume(config, given)
    options = asdict(config)  # as asked; what depends on the machine is for the next one to settle
    device = find_device(config)
    settle(config, device)
    amp = autocast(config, device)
    data = load_data(config, device, ckpt and ckpt["meta"])

    torch.manual_seed(config.seed)
    model = data.model()
    project(model, config, above=0)
    optimizers = make_optimizers(model, config, getattr(torch, config.dtype))
    if ckpt:
        set_state(model, optimizers, ckpt)
        project(model, config, above=1 + 1e-3)
    run = Run(config, options, data, model, optimizers, ckpt)

    compiled = isinstance(model, GPT) and compiles(config, device)
    if rank() == 0:
        n_params = sum(p.numel() for p in model.parameters())
        many = f"{world()} times " if world() > 1 else ""
        say(f"{n_params / 1e6:.2f} M parameters, {config.optimizer} and {config.method}, w_max "
            f"{config.w_max:g}, on {many}{device} in {config.dtype}" + ", compiled" * compiled +
            (f"; resumed at step {run.step}" if ckpt else ""))
    if compiled and run.step < config.max_steps:
        compile_blocks(model, config, data.batch(run.step), amp)
    run.open(fresh=not ckpt)

    bar = tqdm(total=config.max_steps, initial=run.step, unit="step", dynamic_ncols=True, leave=False,
               disable=True if rank() else None)
    with bar, StopRequest() as stop_request:
        while run.step < config.max_steps:
            tick = time.perf_counter()
            lr = set_schedule(optimizers, run.step, config)
            x, y = data.batch(run.step)
            reach = worst_reach(model, config, run)
            loss, stopping = gradients(model, x, y, reach, config, amp, stop_request)
            run.check("loss", loss, lr)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            constrain(model, config, lr)
            run.count(loss, time.perf_counter() - tick)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

            if run.step % config.eval_interval == 0 or run.step == config.max_steps:
                with torch.compiler.set_stance("force_eager"):
                    with amp:
                        acts = activations(model, x.chunk(config.accumulate)[-1])
                    scores = data.evaluate(model, amp)
                run.check("validation loss", scores["val_loss"], lr)
                scores |= bounds(model, config) if rank() == 0 else {}
                run.log(scores | acts, per_batch=config.batch_size * y[0].numel())
            elif stopping or time.perf_counter() - run.saved_at > SAVE_SECONDS:
                run.checkpoint()
            if stopping and run.step < config.max_steps:
                break

    if rank() == 0 and run.step < config.max_steps:
        say(f"stopped at step {run.step} and saved {run.path}; go on with --resume "
            f"--out_dir={config.out_dir}")
    elif rank() == 0:
        with torch.compiler.set_stance("force_eager"):
            if text := data.sample(model):
                say(text)


def gradients(model, x, y, reach, config, amp, stop_request):
    """
    The gradient of a batch's mean loss over all processes, in p.grad of all parameters; returns the loss and
    whether any process has been asked to stop. With a reach the loss is that of the worst case.
    """
    state = torch.zeros(2, dtype=torch.float64)
    for x_part, y_part in zip(x.chunk(config.accumulate), y.chunk(config.accumulate)):
        with amp:
            logits, loss = model(x_part, y_part)
        if reach:
            loss = worst_loss(model, logits, y_part, reach)
        loss = loss / config.accumulate
        loss.backward()
        state[0] += loss.item() / world()
    state[1] = bool(stop_request)
    loss, stopping = summed(state).tolist()
    if world() > 1:
        for p in model.parameters():
            summed(p.grad).div_(world())
    return loss, bool(stopping)


REACH_STEPS = 100  # between computing what a change of the radius can do to the logits


def worst_reach(model, config, run):
    """The reach of constrain.worst_case at a step, 0 without a radius."""
    if not config.radius:
        return 0.0
    if run.step % REACH_STEPS == 0 or run.reach is None:
        run.reach = logit_reach(model, config.radius)
    return run.reach


def worst_loss(model, logits, y, reach):
    """The mean cross entropy (nats) of logits (..., V) for labels y (...) in the worst case."""
    logits, y = logits.flatten(0, -2), y.flatten()
    return F.cross_entropy(worst_case(logits, y, model.head.weight, reach), y)


# ------------------------------------------------------------------------------------------------------------
# Data: one class for text and one for images, with the same members

def load_data(config, device, like=None):
    """The data of a run; Shakespeare is fetched when missing. `like`: a checkpoint's meta, see open_data."""
    folder = data_folder(config.dataset, "--dataset")
    if config.dataset == "shakespeare" and rank() == 0 and not (folder / "meta.json").exists():
        prepare.shakespeare()
    if dist.is_initialized():
        dist.barrier()
    meta, train, val = open_data(folder, like)
    kind = Images if "images" in meta else Text
    if config.preset and (kind is Images) != config.preset.startswith("cifar10"):
        holds = kind.__name__.lower()
        raise UserError(f"--preset={config.preset} does not fit {folder}, which holds {holds}")
    return kind(config, device, meta, train, val)


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """(a random offset, the windows or images 0 .. n - 1 in random order) of an epoch."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(1 << 32)), rng.permutation(n)


def places(config, step, n):
    """
    This process's part of a step's batch: (the epoch's offset, which one of the n windows or images). An
    epoch takes each once. All depends on (seed, step) alone, so that a resumed run sees the same.
    """
    for i in range(step * config.batch_size + rank(), (step + 1) * config.batch_size, world()):
        epoch, k = divmod(i, n)
        offset, order = epoch_order(config.seed, epoch, n)
        yield offset, int(order[k])


class Text:
    """Shards of tokens, for a GPT."""
    unit = "tokens"

    def __init__(self, config, device, meta, train, val):
        T, folder = config.block_size, f"data/{config.dataset}"
        for name, shards in (("training", train), ("validation", val)):
            shortest = min(map(len, shards), default=0)
            if shortest < T + 1:
                raise UserError(f"the {name} split of {folder} has {shortest} tokens, but block_size {T} "
                                f"needs {T + 1}; use a longer text or a smaller --block_size")
        self.config, self.device, self.meta, self.shards = config, device, meta, train
        self.val, self.tokenizer = val[0][:config.eval_tokens], Tokenizer(meta)
        if len(self.val) < T + 1:
            raise UserError(f"--eval_tokens={config.eval_tokens} must be at least {T + 1}, block_size + 1")
        self.counts = [max(1, (len(shard) - T) // T) for shard in train]  # windows of each shard
        self.ends = np.cumsum(self.counts)

    def model(self):
        V = self.meta["vocab_size"]
        if self.meta["tokenizer"] == "gpt2":
            V = -(-V // 128) * 128  # 50,257 tokens become 50,304, a better size for products
        return new_gpt(self.config, V, self.device)

    def batch(self, step):
        """Inputs and targets (batch_size, T), int64. Where windows begin differs from epoch to epoch."""
        T, V, rows = self.config.block_size, self.meta["vocab_size"], []
        for offset, window in places(self.config, step, int(self.ends[-1])):
            which = int(np.searchsorted(self.ends, window, side="right"))
            shard, count = self.shards[which], self.counts[which]
            start = offset % (len(shard) - count * T) % T + (window - int(self.ends[which]) + count) * T
            rows.append(shard[start:start + T + 1])
        rows = np.stack(rows)
        if rows.max() >= V:
            raise UserError(f"data/{self.config.dataset} has token {rows.max()}, past its vocabulary of "
                            f"{V:,}; prepare it again")
        return shifted(rows, self.device)

    def evaluate(self, model, amp):
        few = 20 * 64
        if self.config.eval_tokens:
            few = min(few, -(-self.config.eval_tokens // self.config.block_size))
        with amp:
            return evaluate(model, self.val, self.device, few, self.config.radius)

    def words(self, line):
        certified = "".join(f", certified at {r:g} {line[f'certified_acc_{r:g}']:.2%}" for r in RADII
                            if "worst_loss" in line)
        return f"paper protocol {line['paper_protocol_acc']:.2%}{certified}"

    def sample(self, model):
        return sample(model, self.tokenizer).strip()


class Images:
    """Images and labels, for an MLP."""
    unit = "images"

    def __init__(self, config, device, meta, train, val):
        self.config, self.device, self.meta, self.train, self.val = config, device, meta, train, val

    def model(self):
        c, n_in, n_out = self.config, self.meta["images"], self.meta["classes"]
        sizes = MLPConfig(n_in, c.n_embd, n_out, c.mlp_layers, c.activation, c.logit_scale)
        return MLP(sizes).to(self.device)

    def batch(self, step):
        """Inputs (batch_size, pixels) and labels (batch_size,)."""
        rows = [image for _, image in places(self.config, step, len(self.train[0]))]
        return image_inputs(self.train, np.array(rows), self.device)

    def evaluate(self, model, amp):
        return evaluate_images(model, self.val, self.device, self.config.attack_images, self.config.radius)

    def words(self, line):
        names = [f"{eps * 255:.0f}" for eps in EPSILONS]
        low, high = ([line[f"{kind}_acc_{name}"] for name in names] for kind in ("certified", "attacked"))
        between = ", ".join(f"{a:.2%} to {b:.2%}" for a, b in zip(low, high))
        return f"L2 {', '.join(names)}/255: {between}"

    def sample(self, model):
        return ""


def windows(tokens, starts, length, device):
    """Inputs and targets (len(starts), length), int64: the tokens from each start on, and one later."""
    return shifted(np.stack([tokens[s:s + length + 1] for s in starts]), device)


def shifted(rows, device):
    """Rows (B, T + 1) of tokens -> inputs and targets (B, T), int64."""
    rows = torch.from_numpy(rows.astype(np.int64)).to(device)
    return rows[:, :-1], rows[:, 1:]


EPSILONS = (36 / 255, 72 / 255, 108 / 255, 255 / 255)


def image_inputs(data, rows, device):
    """Inputs (len(rows), pixels), of values in [0, 1], and labels (len(rows),)."""
    images, labels = (torch.from_numpy(array[rows]).to(device) for array in data)
    return images.float() / 255, labels


# ------------------------------------------------------------------------------------------------------------
# Model, optimizers and the constraint

def new_gpt(config, vocab_size, device):
    """A GPT with config's options on a device. What that could not hold is refused before it is built."""
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)}
    gpt = GPTConfig(**sizes | {"vocab_size": vocab_size})
    tokens = config.batch_size * config.block_size // (config.accumulate * world())
    floats = 3 * gpt.n_params + tokens * (vocab_size + 6 * config.n_layer * config.n_embd)  # at the least
    if 4 * floats > memory(device):
        raise UserError(f"{gpt.n_params / 1e6:,.0f} M parameters and {tokens:,} tokens at a time take "
                        f"{4e-9 * floats:,.0f} GB or more, {device} has {1e-9 * memory(device):,.0f}; lower "
                        "--n_embd, --n_layer or --batch_size, or raise --accumulate")
    return GPT(gpt).to(device)


def compile_blocks(model, config, batch, amp):
    """
    Compile the blocks one by one: they are alike, so that only the first takes time. A first batch shows
    whether the compiler works, and makes numbers; if not, the run goes on as it is, unless --compile asked
    for it.
    """
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
    x, y = (part.chunk(config.accumulate)[0] for part in batch)
    try:
        with amp:
            loss = model(x, y)[1]
        loss.backward()
        if not all(p.grad.isfinite().all() for p in model.parameters()):
            raise ArithmeticError
    except Exception as e:  # of many kinds, from several layers down
        what = f"torch.compile does not work here ({type(e).__name__})"
        if config.compile:
            raise UserError(f"{what}; go on with --compile=False")
        for block in model.blocks:
            del block.forward
        say(f"{what}; going on without it")
    model.zero_grad()


def relative_caps(model, config):
    """{matrix: its cap over w_max}. Learning rates scale alike, so that all options hold for W over that."""
    mlp = (config.w_max_mlp or config.w_max) / config.w_max
    return {W: mlp if ".mlp." in name else 1.0 for name, W in matrices(model).items()}


def relative_rates(model, config):
    """{matrix: its learning rate over lr, apart from its cap's}."""
    return {W: config.head_lr if name == "head" else 1.0 for name, W in matrices(model).items()}


def make_optimizers(model, config, dtype):
    """
    [Muon or AdamW on all parameters] or, with Muon and embedding=adam, [Muon on the matrices, Adam on the
    embedding table]. The weight decay is for the matrices alone. A group's learning rate is lr_scale times
    the run's.
    """
    decay = 0.0 if config.method == "spectral_weight_decay" else config.weight_decay  # it decays by itself
    caps, rates = relative_caps(model, config), relative_rates(model, config)
    kinds = sorted({(caps[W], rates[W]) for W in caps})
    groups = [{"params": [W for W in caps if (caps[W], rates[W]) == (cap, rate)], "weight_decay": decay / cap,
               "lr_scale": cap * rate} for cap, rate in kinds]
    tables = [p for p in model.parameters() if p not in caps]  # the embedding table and position biases
    table = {"params": tables, "weight_decay": 0.0, "lr_scale": config.embedding_lr}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW([*groups, table], lr=config.lr, betas=(config.momentum, 0.95))]
    mine = [W for W, owner in owners(model).items() if owner == rank()] + tables
    muon = partial(Muon, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, dtype=dtype,
                   mine=mine)
    if config.embedding == "adam" and tables:
        return [muon(groups), torch.optim.Adam([table], lr=config.lr, betas=(0.8, 0.95), eps=1e-10)]
    return [muon([*groups, table | {"embedding": True}])]


def set_schedule(optimizers, step, config):
    """Set all learning rates and Muon's momentum for a step; returns the learning rate of the matrices."""
    height = min(1, (1 - step / config.max_steps) / config.cooldown)
    lr = config.lr * (config.lr_floor + (1 - config.lr_floor) * height)
    warm = min(1, step / config.momentum_warmup) if config.momentum_warmup else 1
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = config.momentum - (1 - warm) * max(0, config.momentum - 0.85)
    return lr


def constraint(config, lr):
    """What a step with learning rate lr asks of matrices W (..., m, n), as a function of W."""
    update_norm = lr * UPDATE_NORM if config.optimizer == "muon" else math.inf
    return after_step(config.method, config.w_max, lr, lr * config.weight_decay, update_norm,
                      getattr(torch, config.dtype))


@torch.no_grad()
def constrain(model, config, lr):
    """
    Constrain all matrices after a step with learning rate lr; rows of the embedding get RMS norm <= 1, scores
    of distance stay within MAX_BIAS.
    """
    owner, caps, rates = owners(model), relative_caps(model, config), relative_rates(model, config)
    for rate in sorted(set(rates.values())):
        weights = [W for W in caps if owner[W] == rank() and rates[W] == rate]
        scaled = [W if caps[W] == 1 else W / caps[W] for W in weights]  # methods map c W to c times W's image
        for W, new in zip(weights, map_by_shape(constraint(config, lr * rate), scaled)):
            W.copy_(new if caps[W] == 1 else new * caps[W])
    if dist.is_initialized():
        for W in owner:
            dist.broadcast(W, owner[W])
    if isinstance(model, GPT):
        model.wte.weight.copy_(onto_ball(model.wte.weight, 1.0))
        for block in model.blocks:
            if block.attn.bias is not None:
                block.attn.bias.clamp_(-MAX_BIAS, MAX_BIAS)


def project(model, config, above):
    """Where the method promises a cap, cap the norms of the matrices that are more than `above` times it."""
    if config.method in PROMISE_W_MAX:
        for W, cap in relative_caps(model, config).items():
            if rms_norm(W).max() > above * config.w_max * cap:
                W.data = svd_cap(W.data, config.w_max * cap)


# ------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.inference_mode()
def evaluate(model, tokens, device, paper_windows=20 * 64, radius=0.0):
    """
    Loss (nats) and accuracy on a whole split, every token predicted once from the up to block_size ones
    before it in its window; and `paper protocol`: accuracy on the first 20 batches of 64 windows that start
    one token apart (fewer of them where eval_tokens asks for less than that). With a radius also what is
    certified: the largest loss under a change of the embeddings of that norm, and accuracies at RADII.
    """
    T = model.config.block_size
    n = (len(tokens) - 1) // T * T  # predictions in whole windows; the last window may be shorter
    B = max(1, min(64, 2 ** 28 // (T * model.config.vocab_size)))  # at most 1 GiB of logits

    def score(starts, length, reaches=()):  # sums: predictions, loss, right ones; with reaches, certified
        total = torch.zeros(3 + len(reaches), dtype=torch.float64)
        for i in range(rank() * B, len(starts), world() * B):
            x, y = windows(tokens, starts[i:i + B], length, device)
            logits, loss = model(x, y)
            sums = [y.numel(), loss.item() * y.numel(), (logits.argmax(-1) == y).sum().item()]
            worst = [worst_case(logits.flatten(0, 1), y.flatten(), model.head.weight, r) for r in reaches]
            sums += [F.cross_entropy(z, y.flatten(), reduction="sum").item() for z in worst[:1]]
            sums += [(lead(z, y.flatten()) > 0).sum().item() for z in worst[1:]]
            total += torch.tensor(sums, dtype=torch.float64)
        return summed(total)

    reaches, names = [], ["worst_loss", *(f"certified_acc_{r:g}" for r in RADII)]
    if radius:
        layers = layer_norms(model)
        reaches = [logit_reach(model, r, layers) for r in (radius, *RADII)]
    whole = score(range(0, n, T), T, reaches)
    whole += score(range(n, len(tokens) - 1, T), len(tokens) - 1 - n, reaches)
    paper = score(range(min(paper_windows, len(tokens) - T)), T)
    loss, correct, *certified = (whole[1:] / whole[0]).tolist()
    return {"val_loss": loss, "val_acc": correct, "paper_protocol_acc": (paper[2] / paper[0]).item(),
            **dict(zip(names, certified))}


def evaluate_images(model, data, device, attack_images, radius=0.0):
    """
    Loss (nats) and accuracy on all validation images, and at every L2 radius of EPSILONS, in units of a
    pixel's range, the accuracy that is certified on all and the one that an attack leaves of the first ones;
    with a radius also the largest loss under a change of the image of that norm.
    """
    reach, size = logit_reach(model, 1.0), 500
    whole, first = (torch.zeros(n + len(EPSILONS), dtype=torch.float64) for n in (4, 1))
    for i in range(rank() * size, len(data[0]), world() * size):
        x, y = image_inputs(data, np.arange(i, min(i + size, len(data[0]))), device)
        with torch.no_grad():
            logits, loss = model(x, y)
            worst = F.cross_entropy(worst_case(logits, y, model.head.weight, radius * reach), y)
        radii = certified_radii(model, x, y, reach)
        right = [logits.argmax(dim=1) == y, *(radii > eps for eps in EPSILONS)]
        counts = [len(y), loss.item() * len(y), worst.item() * len(y), *(r.sum().item() for r in right)]
        whole += torch.tensor(counts, dtype=torch.float64)
        x, y = x[:max(0, attack_images - i)], y[:max(0, attack_images - i)]
        if len(y):
            left = [pgd(model, x, y, eps).sum().item() for eps in EPSILONS]
            first += torch.tensor([len(y), *left], dtype=torch.float64)
    loss, worst, correct, *certified = (summed(whole)[1:] / whole[0]).tolist()
    attacked = (summed(first)[1:] / first[0]).tolist()
    named = lambda kind, shares: {f"{kind}_acc_{eps * 255:.0f}": p for eps, p in zip(EPSILONS, shares)}
    return {"val_loss": loss, "val_acc": correct, **named("certified", certified),
            **named("attacked", attacked), **({"worst_loss": worst} if radius else {})}


def bounds(model, config):
    """The Lipschitz bounds of the model, and its largest norm over its cap."""
    norms = matrix_norms(model)
    over_caps = torch.cat([norms[W].flatten() / cap for W, cap in relative_caps(model, config).items()])
    return {"log10_paper": lipschitz_bound(model, "paper", norms),
            "log10_certified": lipschitz_bound(model, "certified", norms),
            "norm_over_cap": over_caps.max().item() / config.w_max}


@torch.inference_mode()
def activations(model, x):
    """
    Largest entry and largest RMS norm of a token's vector over all layers' outputs but the logits, on inputs
    x; and both for the output of every block (of an MLP every hidden layer) by itself.
    """
    layers = list(model.blocks if isinstance(model, GPT) else model.layers[:-1])
    sizes = {}  # module: largest entry and largest RMS norm

    def measure(module, args, y):
        sizes[module] = y.abs().max().item(), y.float().square().mean(dim=-1).max().sqrt().item()

    hooks = [m.register_forward_hook(measure) for m in model.modules()
             if m is not model.head and not isinstance(m, (GPT, MLP, torch.nn.ModuleList))]
    model(x)
    for hook in hooks:
        hook.remove()
    act_max, act_rms = map(max, zip(*sizes.values()))
    return {"act_max": act_max, "act_rms": act_rms,
            "act_max_layers": [sizes[layer][0] for layer in layers],
            "act_rms_layers": [sizes[layer][1] for layer in layers]}


def describe(line, data):
    """A line of the log in words."""
    paper = "" if line["log10_paper"] is None else f"{line['log10_paper']:.2f} paper, "
    return (f"step {line['step']}: train loss {line['train_loss']:.4f}, val loss {line['val_loss']:.4f}, "
            f"accuracy {line['val_acc']:.2%} ({data.words(line)}), "
            f"log10 bound {line['log10_certified']:.2f} certified, {paper}"
            f"norm/cap {line['norm_over_cap']:.4f}, "
            f"activations {line['act_max']:.1f} max, {line['act_rms']:.2f} RMS, "
            f"{line['tokens_per_second']:,.0f} {data.unit}/s")


# ------------------------------------------------------------------------------------------------------------
# A run: its checkpoint and log, going on from them, and its end

SAVE_SECONDS = 180  # between checkpoints, if evaluations are farther apart


class Run:
    """What a run has counted so far, and its checkpoint and log in config.out_dir."""
    def __init__(self, config, options, data, model, optimizers, ckpt):
        self.config, self.options, self.data = config, options, data
        self.model, self.optimizers = model, optimizers
        self.path, self.log_path = Path(config.out_dir) / "ckpt.pt", Path(config.out_dir) / "log.jsonl"
        before = ckpt or {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "loss_count": 0}
        self.step, self.loss_sum, self.loss_count = before["step"], before["loss_sum"], before["loss_count"]
        self.started, self.reach = time.perf_counter() - before["seconds"], before.get("reach")
        self.saved_step, self.saved_at = self.step, time.perf_counter()
        self.timed_steps, self.timed_seconds = 0, 0.0  # since the last evaluation, for the rate

    def open(self, fresh):
        """Make the folder ready: keep what an earlier run has left there, or go on with its log."""
        if rank() == 0 and not fresh:
            trim_log(self.log_path, self.step)
        elif rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.log_path):
                if path.exists():
                    os.replace(path, path.with_stem(path.stem + ".old"))
        if fresh:
            self.checkpoint()  # so that there is something to resume from at any moment

    def count(self, loss, seconds):
        self.step += 1
        self.loss_sum += loss
        self.loss_count += 1
        self.timed_steps += 1
        self.timed_seconds += seconds

    def checkpoint(self):
        self.saved_step, self.saved_at = self.step, time.perf_counter()
        if rank() == 0:
            save(self.path, {**get_state(self.model, self.optimizers),
                             "model_config": asdict(self.model.config), "config": self.options,
                             "meta": self.data.meta, "step": self.step, "loss_sum": self.loss_sum,
                             "loss_count": self.loss_count, "reach": self.reach,
                             "seconds": time.perf_counter() - self.started})

    def log(self, scores, per_batch):
        """Append an evaluation to the log, save, and only then print: no fault of the output loses it."""
        if rank() == 0:
            line = {"step": self.step, "train_loss": self.loss_sum / self.loss_count, **scores,
                    "tokens_per_second": self.timed_steps * per_batch / self.timed_seconds,
                    "seconds": time.perf_counter() - self.started}
            with open(self.log_path, "a") as f:
                f.write(to_json(line) + "\n")
        self.loss_sum, self.loss_count, self.timed_steps, self.timed_seconds = 0.0, 0, 0, 0.0
        self.checkpoint()
        if rank() == 0:
            say(describe(line, self.data))

    def check(self, name, loss, lr):
        if not math.isfinite(loss):
            raise UserError(f"the {name} is {loss} at step {self.step}, learning rate {lr:.4g}; lower --lr "
                            f"or --w_max (the last checkpoint, of step {self.saved_step}, is {self.path})")


def trim_log(path, step):
    """Take off a log what is after the checkpoint's step, as it comes again, and a line cut off."""
    def logged_step(line):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return math.inf

    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        path.with_suffix(".part").write_text("".join(line for line in lines if logged_step(line) <= step))
        os.replace(path.with_suffix(".part"), path)


def resume(config, given):
    """
    (config, checkpoint) to go on from config.out_dir with: the checkpoint's options, but for those named in
    `given`, which take effect or are refused. Another preset than the checkpoint's gives all of its options.
    """
    path = Path(config.out_dir) / "ckpt.pt"
    model, ckpt = load_checkpoint(path)
    known = {field.name for field in dataclasses.fields(Config)}
    options = {name: value for name, value in ckpt["config"].items() if name in known}
    names = {*given}
    if config.preset not in (None, options.get("preset")):
        names |= {*PRESETS[config.preset]}
    fixed = {"optimizer", "embedding", "seed", *asdict(model.config), "n_embd"}
    for name in sorted(names):
        value, before = getattr(config, name), options.get(name)
        if name in fixed and value != before:
            of = "" if name in given else f" of --preset={config.preset}"
            raise UserError(f"{path} has {name}={before}, so it cannot go on with --{name}={value}{of}")
        options[name] = value
    if ckpt["step"] > options["max_steps"]:
        raise UserError(f"{path} is at step {ckpt['step']}, past --max_steps={options['max_steps']}")
    return configure(options | {"out_dir": config.out_dir, "resume": True}), ckpt


class StopRequest:
    """
    Becomes true by Ctrl-C or what schedulers and closed terminals send, so that the run ends after its step.
    A second Ctrl-C does not wait, but for one right after the first: torchrun repeats it.
    """
    def __init__(self):
        self.since = None

    def __bool__(self):
        return self.since is not None

    def __enter__(self):
        wanted = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        ignored = wanted[2] and signal.getsignal(wanted[2]) == signal.SIG_IGN  # by nohup
        self.old = {s: signal.signal(s, self.ask) for s in wanted[:2 if ignored else 3] if s}
        return self

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def ask(self, s, _):
        if s == signal.SIGINT and self.since is not None and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        self.since = self.since or time.monotonic()


@contextmanager
def only_run_in(out):
    """The folder out for one run at a time: a second is told who has it. The lock ends with the process."""
    out = Path(out)
    holder = out / "running"
    try:
        with ensured(out), locked(out, wait=False):
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {platform.node()}, since {now}")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except BlockingIOError:
        who = holder.read_text() if holder.exists() else "another process"
        raise UserError(f"{out} is in use by {who}; wait for it, or choose another --out_dir")


# ------------------------------------------------------------------------------------------------------------
# Machine, and processes (torchrun). Each process takes its share of a batch, has all gradients, and
# orthogonalizes and constrains its share of the matrices, which it then sends to the others; so all have the
# same weights and optimizer state. The first logs and saves.

def find_device(config):
    """The torch.device to train on, or UserError if it cannot be used."""
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if dist.is_initialized() else "cuda"
    name = config.device if config.device is not None else gpu if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" is a device that holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device={name} cannot be used: {str(e).splitlines()[0]}")
    if device.type == "cpu":
        keep_memory()
    return device


def settle(config, device):
    """Fill in, and check, what options leave to the optimizer, the machine and each other."""
    config.lr = config.lr or (0.1 if config.optimizer == "muon" else 0.002)
    config.dtype = config.dtype or ("bfloat16" if has_bf16(device) else "float32")
    if config.batch_size % (config.accumulate * world()):
        raise UserError(f"--batch_size={config.batch_size} must be a multiple of --accumulate="
                        f"{config.accumulate} times the number of processes, {world()}")
    most = 2 if config.method == "spectral_weight_decay" else 1  # beyond, a step would turn weights round
    lr = config.lr * max(1, config.head_lr)
    if not lr * config.weight_decay < most:
        raise UserError(f"--weight_decay={config.weight_decay:g} times the learning rate, {lr:g}, must be "
                        f"below {most}")
    try:
        constraint(config, lr)(torch.zeros(1, 1))
    except ValueError as e:
        raise UserError(str(e))


def autocast(config, device):
    """The context in which products have the run's dtype."""
    dtype = getattr(torch, config.dtype)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def memory(device):
    """The bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def compiles(config, device):
    """Whether a run compiles its blocks: as --compile says, else where that works and pays."""
    if config.compile is not None:
        return config.compile
    return has_compiler(device) and (device.type == "cuda" or config.max_steps >= COMPILE_STEPS)


def has_compiler(device):
    """Whether torch.compile has Triton on a GPU, or on a CPU a C++ compiler and Python's headers."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton
        return has_triton()
    headers, compiler = Path(sysconfig.get_path("include")) / "Python.h", os.environ.get("CXX", "g++")
    return device.type == "cpu" and headers.exists() and shutil.which(compiler) is not None


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


# ------------------------------------------------------------------------------------------------------------
# Command line

def parse(argv):
    """Command line -> {name: value} of the options given."""
    def boolean(text):
        if text.lower() not in ("true", "false", "1", "0"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text.lower() in ("true", "1")

    parser = Parser(prog=os.path.basename(sys.argv[0]), description=__doc__.strip().split("\n")[0],
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        if not field.metadata:  # vocab_size, which the data decide
            continue
        kind = field.type if isinstance(field.type, type) else field.type.__args__[0]  # `float | None`: float
        help, choices = field.metadata["help"], field.metadata["choices"]
        choices = PRESETS if field.name == "preset" else choices
        if choices in (METHODS, PRESETS):
            help += ": " + ", ".join(choices)
        if field.default is not None:
            help += f" [{field.default}]"
        if kind is bool:
            how = dict(type=boolean, nargs="?", const=True, metavar="BOOL")
        else:
            how = dict(type=kind, choices=choices, metavar=kind.__name__.upper())
        parser.add_argument(f"--{field.name}", help=help, **how)
    return vars(parser.parse_args(argv))


def configure(given):
    """The Config with the options given, else those of its preset, else the defaults; or UserError."""
    options = PRESETS.get(given.get("preset"), {}) | given
    if options.get("optimizer") == "adamw" and "lr" not in given:
        options.pop("lr", None)  # a preset's is Muon's, in other units
    try:
        return Config(**options)
    except ValueError as e:
        raise UserError(f"--{e}")


def main():
    given = parse(sys.argv[1:])
    if "LOCAL_RANK" in os.environ:  # under torchrun
        # Imported later, as torch does on its own, it would keep the group as a default argument, beyond its
        # end: gloo's threads could then abort a process that is done (pytorch issue 190489)
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with one_line_errors("train.py", "interrupted; go on from the last checkpoint with --resume"):
            config = configure(given)
            with only_run_in(config.out_dir) if rank() == 0 else nullcontext():
                train(config, given)
            if dist.is_initialized():
                dist.destroy_process_group()
    except RuntimeError as e:
        if "memory" in str(e):
            sys.exit("train.py: not enough memory; lower --batch_size, or raise --accumulate")
        if not dist.is_initialized():
            raise
        sys.exit(f"train.py: process {rank()} stopped: {str(e).splitlines()[0]}")  # often as another one did


if __name__ == "__main__":
    main()
