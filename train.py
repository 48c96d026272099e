"""
Train a Lipschitz-bounded transformer: Muon or AdamW, and a weight constraint after every step.

    python train.py                                                  # Shakespeare, Muon, soft cap
    python train.py --method=hard_cap --optimizer=adamw --w_max=2    # any option of Config below
    python train.py --bench --batch_size=64                          # time of a step against its matrix products
    python train.py --resume                                         # go on from out_dir/ckpt.pt
    python train.py --preset=tight                                   # small certified bound, see README.md
    python train.py --preset=fineweb                                 # the 145 M model (prepare.py fineweb first)
    torchrun --standalone --nproc_per_node=8 train.py --preset=fineweb   # on 8 GPUs
    python train.py --help                                           # all options

Writes out_dir/ckpt.pt and one line per evaluation to out_dir/log.jsonl; those of an earlier run there are kept once, as
ckpt.old.pt and log.old.jsonl. Ctrl-C saves and exits.
"""
import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import prepare
from constrain import (METHODS, PROMISE_W_MAX, TAKE_DTYPE, certified_radii, lipschitz_bound, matrices, pgd, rms_norm,
                       soft_cap_coupling, svd_cap)
from model import ACTIVATIONS, GPT, MLP, GPTConfig, MLPConfig, load_checkpoint, onto_ball
from optim import UPDATE_NORM, Muon, has_bf16, keep_memory, map_by_shape
from prepare import Tokenizer, UserError


@dataclass
class Config:
    preset: str | None = None         # a row of PRESETS, whose options hold unless given too
    # what to train on, and where to
    out_dir: str = "out/shakespeare"  # checkpoint and log go here
    dataset: str = "shakespeare"      # a folder of data/, made by prepare.py
    # model
    n_layer: int = 2                  # blocks
    n_head: int = 4                   # attention heads per block
    n_embd: int = 256                 # width
    block_size: int = 256             # context length in tokens
    softmax_scale: float = 1.0        # attention scores are softmax_scale * <q, k> / d_head
    logit_scale: float = 1.0          # logits are logit_scale * head(x); the Lipschitz bounds include it
    position_bias: bool = False       # add to the scores a learned number for every head and distance
    per_head: bool = False            # constrain W_q, W_k and W_v head by head
    attn_scale: float = 1 / 3         # factor of attention's output
    alpha: float | None = None        # a block's weight against the residual's, by default 1/(2 n_layer); 1: no residual
    activation: str = "gelu"          # gelu or maxmin
    mlp_layers: int = 2               # linear layers of an MLP
    mlp_ratio: int = 4                # width between them, over n_embd
    ball: float | None = None         # blocks project their outputs onto the ball of this RMS norm
    # constraint
    method: str = "soft_cap"          # soft_cap, hard_cap, spectral_normalize, spectral_hammer, spectral_weight_decay, stiefel, svd_cap or none
    w_max: float = 6.0                # largest RMS->RMS norm of a matrix
    w_max_mlp: float | None = None    # of the MLPs' matrices, if another than w_max; their learning rate is larger by as much
    # optimizer
    optimizer: str = "muon"           # muon or adamw
    lr: float | None = None           # peak learning rate, falls linearly to 0; by default 0.1 for muon, 0.002 for adamw
    embedding: str = "dual"           # with muon, the embedding table's optimizer: dual (rows of norm 1, see optim.py) or adam
    embedding_lr: float = 0.3         # learning rate of the embedding table, as a multiple of lr
    weight_decay: float = 0.0         # a step decays weights by lr * weight_decay; spectral_weight_decay: their largest singular value alone
    momentum: float = 0.9             # Muon's, or AdamW's beta1
    momentum_warmup: int = 0          # steps over which Muon's momentum rises from 0.85
    batch_size: int = 16              # sequences per step
    accumulate: int = 1               # parts of a batch that go through the model one after the other, for less memory
    max_steps: int = 750              # optimizer steps
    cooldown: float = 1.0             # share of the steps, at the end, over which the learning rate falls linearly to 0
    eval_interval: int = 750          # steps between evaluations; a checkpoint is saved at each
    eval_tokens: int | None = None    # of the validation split to evaluate on, from its beginning; by default all
    # machine
    seed: int = 0                     # of initialization, batches and the sample of text
    device: str | None = None         # cpu, cuda, cuda:1, mps, ...; by default cuda where there is one, else cpu
    dtype: str | None = None          # bfloat16 or float32 products; by default bfloat16 where the hardware has it
    compile: bool | None = None       # use torch.compile; by default where a compiler is found
    resume: bool = False              # go on from out_dir/ckpt.pt, with its options but for those given
    bench: bool = False               # do not train; measure where a step's time goes


# The paper's 145 M model on FineWeb10B: w_max 1 has the bound of about 10, w_max 16 matches NanoGPT's accuracy.
FINEWEB = dict(out_dir="out/fineweb", dataset="fineweb", n_layer=12, n_head=6, n_embd=768, block_size=1024, w_max=16.0,
               embedding="adam", embedding_lr=0.1, momentum=0.95, momentum_warmup=300, batch_size=512, accumulate=16,
               max_steps=1770, cooldown=0.4, eval_interval=125, eval_tokens=10_485_760)
# and its MLP on CIFAR-10, 50 epochs. Options of the transformer do not matter there.
CIFAR10 = dict(out_dir="out/cifar10", dataset="cifar10", w_max=6.0, batch_size=512, max_steps=4900, eval_interval=980)
# A transformer that is cheap to certify: heads look at fixed distances, all maps keep the norm, the bound is logit_scale.
TIGHT = dict(out_dir="out/tight", n_layer=1, n_head=8, n_embd=512, softmax_scale=0.0, logit_scale=8.0, position_bias=True,
             per_head=True, attn_scale=1.0, alpha=1.0, activation="maxmin", mlp_layers=4, mlp_ratio=1, method="stiefel", w_max=1.0,
             lr=0.025, max_steps=1200, eval_interval=1200)
# With room for content: two layers of the paper's kind, and a ball that keeps the activations small. The bound is about 7e3.
TIGHT_CONTENT = dict(out_dir="out/tight-content", n_layer=2, n_head=8, n_embd=256, position_bias=True, per_head=True,
                     activation="maxmin", ball=1.0, w_max=3.5, max_steps=800, eval_interval=800)
PRESETS = {"cifar10": CIFAR10, "tight": TIGHT, "tight-content": TIGHT_CONTENT, "fineweb": FINEWEB,
           **{f"fineweb-w{w}": FINEWEB | dict(w_max=float(w), out_dir=f"out/fineweb-w{w}") for w in (1, 4, 16)}}


IMAGE_SCALE = 4.0  # makes the RMS norm of an image about 1
EPSILONS = (36 / 255, 72 / 255, 108 / 255, 255 / 255)

# ----------------------------------------------------------------------------------------------------------------------
# Options

class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"train.py: {message} (see python train.py --help)")


def parse(argv):
    """Command line -> {name: value} of the options given."""
    def boolean(text):
        if text.lower() not in ("true", "false", "1", "0"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text.lower() in ("true", "1")

    comments = dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = Parser(description=__doc__.strip().split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        kind = field.type if isinstance(field.type, type) else field.type.__args__[0]  # of `float | None`: float
        help = comments[field.name] + ("" if field.default is None else f" [{field.default}]")
        choices = {"preset": PRESETS, "method": METHODS, "optimizer": ("muon", "adamw"), "embedding": ("dual", "adam"),
                   "activation": ACTIVATIONS, "dtype": ("bfloat16", "float32")}.get(field.name)
        if kind is bool:
            parser.add_argument(f"--{field.name}", type=boolean, nargs="?", const=True, metavar="BOOL", help=help)
        else:
            parser.add_argument(f"--{field.name}", type=kind, choices=choices, metavar=kind.__name__.upper(), help=help)
    return vars(parser.parse_args(argv))


def check(config):
    """Raise UserError for values that no run could use."""
    for name in ("n_layer", "n_head", "n_embd", "block_size", "w_max", "w_max_mlp", "batch_size", "max_steps", "eval_interval",
                 "logit_scale", "attn_scale", "mlp_ratio", "ball", "lr", "embedding_lr", "accumulate", "eval_tokens"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name}={value} must be positive and finite")
    if not 0 <= config.weight_decay < math.inf or not 0 <= config.momentum < 1 or config.seed < 0:
        raise UserError("--weight_decay and --seed must not be negative, --momentum must be in [0, 1)")
    if config.momentum_warmup < 0 or not 0 < config.cooldown <= 1:
        raise UserError("--momentum_warmup must not be negative, --cooldown must be in (0, 1]")
    if config.batch_size % (config.accumulate * world()):
        raise UserError(f"--batch_size={config.batch_size} must be a multiple of --accumulate={config.accumulate} times the "
                        f"number of processes, {world()}")


def has_compiler(device):
    """Whether torch.compile finds what it needs: Triton on a GPU, a C++ compiler and Python's headers on a CPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton
        return has_triton()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return device.type == "cpu" and headers.exists() and any(map(shutil.which, ("g++", "clang++")))


# ----------------------------------------------------------------------------------------------------------------------
# Processes (torchrun). Each takes its share of a batch, has all gradients, and orthogonalizes and constrains its share of
# the matrices, which it then sends to the others; so all have the same weights and optimizer state. The first logs and saves.

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
    """{matrix: rank of the process that orthogonalizes and constrains it}, the work about the same for all."""
    cost = lambda W: W.numel() * min(W.shape[-2:])
    load, owner = [0] * world(), {}
    for W in sorted(matrices(model).values(), key=cost, reverse=True):
        owner[W] = load.index(min(load))
        load[owner[W]] += cost(W)
    return owner


# ----------------------------------------------------------------------------------------------------------------------
# Data

def load_data(config):
    """
    (meta, training data, validation data) of data/dataset, memory-mapped: of text a list of arrays of uint16 tokens, the
    shards, and one array; of images twice [images (N, pixels) uint8, labels (N,)]. Shakespeare is fetched when missing.
    """
    folder = Path("data") / config.dataset
    if not (folder / "meta.json").exists():
        if config.dataset != "shakespeare":
            how = {"fineweb": "fineweb --shards 10", "cifar10": "cifar10"}
            how = how.get(config.dataset, f"text FILE... --name {config.dataset}")
            raise UserError(f"{folder} holds no data set; make it with python prepare.py {how}")
        if rank() == 0:
            prepare.shakespeare()
        if dist.is_initialized():
            dist.barrier()
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if config.preset and ("images" in meta) != (config.preset == "cifar10"):
            raise UserError(f"--preset={config.preset} does not fit {folder}, which holds "
                            f"{'images' if 'images' in meta else 'text'}")
        if "images" in meta:
            return meta, *([np.load(folder / f"{split}_{kind}.npy", mmap_mode="r") for kind in ("images", "labels")]
                           for split in ("train", "val"))
        Tokenizer(meta)
    except (ValueError, KeyError):
        raise UserError(f"{folder} is damaged; make the data set again with prepare.py")
    train, val = (prepare.open_split(folder, split, meta) for split in ("train", "val"))
    if max((tokens.max() for tokens in val), default=0) >= meta["vocab_size"]:
        raise UserError(f"the validation split of {folder} has tokens past its vocabulary of {meta['vocab_size']:,}; prepare it "
                        "again")
    for name, shards in (("training", train), ("validation", val)):
        shortest = min(map(len, shards), default=0)
        if shortest < config.block_size + 1:
            raise UserError(f"the {name} split of {folder} has {shortest} tokens, but block_size {config.block_size} needs "
                            f"{config.block_size + 1}; use a longer text or a smaller --block_size")
    return meta, train, val[0][:config.eval_tokens]


def windows(tokens, starts, length, device):
    """Inputs and targets (len(starts), length), int64: the tokens at [s, s + length) and one later, for every start s."""
    return shifted([tokens[s:s + length + 1] for s in starts], device)


def shifted(rows, device):
    """Rows of T + 1 tokens each -> inputs and targets (len(rows), T), int64."""
    rows = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
    return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """(a random offset, the windows 0 .. n - 1 in random order) of an epoch."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(1 << 32)), rng.permutation(n)


def get_batch(data, step, config, device):
    """
    Inputs and targets of a step, this process's part of batch_size. An epoch takes every window of every shard once, or every
    image, in random order; where windows begin differs from epoch to epoch. All depends on (seed, step) alone, so that a
    resumed run sees the same.
    """
    T, images, rows = config.block_size, data[0].ndim == 2, []
    counts = [len(data[0])] if images else [max(1, (len(shard) - T) // T) for shard in data]
    ends = np.cumsum(counts)
    for i in range(step * config.batch_size + rank(), (step + 1) * config.batch_size, world()):
        epoch, k = divmod(i, int(ends[-1]))
        offset, order = epoch_order(config.seed, epoch, int(ends[-1]))
        if images:
            rows.append(order[k])
            continue
        which = int(np.searchsorted(ends, order[k], side="right"))
        shard, count = data[which], counts[which]
        start = offset % (len(shard) - count * T) % T + int(order[k] - ends[which] + count) * T
        rows.append(shard[start:start + T + 1])
    if images:
        return image_inputs(data, np.array(rows), device)
    return shifted(rows, device)


def image_inputs(data, rows, device):
    """Inputs (len(rows), pixels), IMAGE_SCALE (p - 1/2) for pixels p in [0, 1], and labels (len(rows),)."""
    images, labels = (torch.from_numpy(array[rows]).to(device) for array in data)
    return IMAGE_SCALE * (images.float() / 255 - 0.5), labels


# ----------------------------------------------------------------------------------------------------------------------
# Training

def relative_caps(model, config):
    """{matrix: its cap over w_max}. Learning rates scale alike, so that w_max, lr and weight_decay hold for W over that."""
    mlp = (config.w_max_mlp or config.w_max) / config.w_max
    return {W: mlp if ".mlp." in name else 1.0 for name, W in matrices(model).items()}


def make_optimizers(model, config, dtype):
    """
    [Muon or AdamW on all parameters] or, with Muon and embedding=adam, [Muon on the matrices, Adam on the embedding table].
    The weight decay is for the matrices alone. A group's learning rate is lr_scale times that of the run.
    """
    decay = 0.0 if config.method == "spectral_weight_decay" else config.weight_decay  # there the method decays
    caps = relative_caps(model, config)
    groups = [{"params": [W for W in caps if caps[W] == cap], "weight_decay": decay / cap, "lr_scale": cap}
              for cap in sorted(set(caps.values()))]
    tables = [p for p in model.parameters() if p not in caps]  # the embedding table and position biases
    table = {"params": tables, "weight_decay": 0.0, "lr_scale": config.embedding_lr}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW([*groups, table], lr=config.lr, betas=(config.momentum, 0.95))]
    mine = [W for W, owner in owners(model).items() if owner == rank()] + tables
    muon = partial(Muon, lr=config.lr, momentum=config.momentum, dtype=dtype, mine=mine)
    if config.embedding == "adam" and tables:
        return [muon(groups), torch.optim.Adam([table], lr=config.lr, betas=(0.9, 0.95))]
    return [muon([*groups, table | {"embedding": True}])]


def set_schedule(optimizers, step, config):
    """Set every group's learning rate and Muon's momentum for a step; returns the learning rate of the matrices."""
    lr = config.lr * min(1, (1 - step / config.max_steps) / config.cooldown)
    warm = min(1, step / config.momentum_warmup) if config.momentum_warmup else 1
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = config.momentum - (1 - warm) * max(0, config.momentum - 0.85)
    return lr


@torch.no_grad()
def constrain(model, config, lr):
    """Apply the method to all matrices after a step with learning rate lr; rows of the embedding get RMS norm <= 1."""
    strength, method = config.w_max, METHODS[config.method]
    if config.method == "soft_cap":
        strength = soft_cap_coupling(config.w_max, lr * config.weight_decay, lr * UPDATE_NORM)
    elif config.method == "spectral_weight_decay":
        strength = lr * config.weight_decay
    if config.method in TAKE_DTYPE:
        small = config.optimizer == "muon" and lr * UPDATE_NORM <= 0.03 * config.w_max  # a step that bf16 can take back
        rounded = small or config.method not in ("soft_cap", "hard_cap")
        method = partial(method, dtype=getattr(torch, config.dtype) if rounded else torch.float32)
    owner, caps = owners(model), relative_caps(model, config)
    weights = [W for W in matrices(model).values() if owner[W] == rank()]
    scaled = [W if caps[W] == 1 else W / caps[W] for W in weights]  # every method maps c W to c times what it maps W to
    for W, new in zip(weights, map_by_shape(lambda W: method(W, strength), scaled)):
        W.copy_(new if caps[W] == 1 else new * caps[W])
    if dist.is_initialized():
        for W in owner:
            dist.broadcast(W, owner[W])
    if isinstance(model, GPT):
        model.wte.weight.copy_(onto_ball(model.wte.weight, 1.0))


@torch.inference_mode()
def evaluate(model, tokens, device, paper_windows=20 * 64):
    """
    Loss (nats) and accuracy on a whole split, every token predicted once from the up to block_size ones before it in its
    window; and `paper protocol`: accuracy on the first 20 batches of 64 windows that start one token apart (fewer of them
    where eval_tokens asks for less than that).
    """
    T = model.config.block_size
    n = (len(tokens) - 1) // T * T  # predictions in whole windows; the last window may be shorter
    B = max(1, min(64, 2 ** 28 // (T * model.config.vocab_size)))  # at most 1 GiB of logits

    def score(starts, length):  # sums over the windows: loss, correct predictions, predictions
        total = torch.zeros(3, dtype=torch.float64)
        for i in range(rank() * B, len(starts), world() * B):
            x, y = windows(tokens, starts[i:i + B], length, device)
            logits, loss = model(x, y)
            total += torch.tensor([loss.item() * y.numel(), (logits.argmax(-1) == y).sum().item(), y.numel()])
        return summed(total)

    loss, correct, count = (score(range(0, n, T), T) + score(range(n, len(tokens) - 1, T), len(tokens) - 1 - n)).tolist()
    paper = score(range(min(paper_windows, len(tokens) - T)), T)
    return {"val_loss": loss / count, "val_acc": correct / count, "paper_protocol_acc": (paper[1] / paper[2]).item()}


def evaluate_images(model, data, device):
    """
    Loss (nats) and accuracy on all validation images, and at every L2 radius of EPSILONS, in units of a pixel's range, the
    accuracy that is certified and the one that an attack leaves.
    """
    total = torch.zeros(3 + 2 * len(EPSILONS), dtype=torch.float64)
    for i in range(rank() * 1000, len(data[0]), world() * 1000):
        x, y = image_inputs(data, np.arange(i, min(i + 1000, len(data[0]))), device)
        with torch.no_grad():
            logits, loss = model(x, y)
        counts = [loss.item() * len(y), (logits.argmax(-1) == y).sum(), len(y)]
        radii = certified_radii(model, x, y) / IMAGE_SCALE
        counts += [(radii > eps).sum() for eps in EPSILONS] + [pgd(model, x, y, IMAGE_SCALE * eps).sum() for eps in EPSILONS]
        total += torch.tensor(counts, dtype=torch.float64)
    loss, correct, count, *robust = summed(total).tolist()
    names = [f"{kind}_acc_{eps * 255:.0f}" for kind in ("certified", "attacked") for eps in EPSILONS]
    return {"val_loss": loss / count, "val_acc": correct / count, **{name: n / count for name, n in zip(names, robust)}}


@torch.inference_mode()
def activations(model, x):
    """
    Largest entry and largest RMS norm of a token's vector over all layers' outputs but the logits, on inputs x; and both for
    the output of every block (of an MLP every hidden layer) by itself.
    """
    last = model.head if isinstance(model, GPT) else model.layers[-1]
    layers = list(model.blocks if isinstance(model, GPT) else model.layers[:-1])
    sizes = {}  # module: largest entry and largest RMS norm

    def measure(module, args, y):
        sizes[module] = y.abs().max().item(), y.float().square().mean(dim=-1).max().sqrt().item()

    hooks = [m.register_forward_hook(measure) for m in model.modules()
             if m is not last and not isinstance(m, (GPT, MLP, torch.nn.ModuleList))]
    model(x)
    for hook in hooks:
        hook.remove()
    act_max, act_rms = map(max, zip(*sizes.values()))
    return {"act_max": act_max, "act_rms": act_rms, "act_max_layers": [sizes[layer][0] for layer in layers],
            "act_rms_layers": [sizes[layer][1] for layer in layers]}


def save(path, checkpoint):
    """Write a checkpoint so that path is always a whole one: under another name first, then renamed."""
    tmp = path.with_name(path.name + ".part")
    try:
        with open(tmp, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f"cannot save {path} ({e}); the last checkpoint there is untouched")


def build(config, meta):
    """(model, optimizers, device, autocast context) of a run; settles what config leaves open."""
    if config.lr is None:
        config.lr = 0.1 if config.optimizer == "muon" else 0.002
    try:
        gpu = f"cuda:{os.environ['LOCAL_RANK']}" if dist.is_initialized() else "cuda"
        device = torch.device(config.device or (gpu if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={config.device} cannot be used: {str(e).splitlines()[0]}")
    if device.type == "cpu":
        keep_memory()
    config.dtype = config.dtype or ("bfloat16" if has_bf16(device) else "float32")
    config.compile = has_compiler(device) if config.compile is None else config.compile
    torch.manual_seed(config.seed)
    try:
        if "images" in meta:
            model = MLP(MLPConfig(n_in=meta["images"], n_out=meta["classes"])).to(device)
        else:  # GPT-2's 50,257 tokens become 50,304
            vocab_size = meta["vocab_size"] if meta["tokenizer"] == "char" else -(-meta["vocab_size"] // 128) * 128
            names = [f.name for f in dataclasses.fields(GPTConfig) if f.name != "vocab_size"]
            model = GPT(GPTConfig(vocab_size, **{name: getattr(config, name) for name in names})).to(device)
        if config.method == "soft_cap":
            soft_cap_coupling(config.w_max, config.lr * config.weight_decay, config.lr * UPDATE_NORM)
    except ValueError as e:
        raise UserError(str(e))
    if config.method in PROMISE_W_MAX:  # a cap below the initial norm, 1, holds from the start
        for W, cap in relative_caps(model, config).items():
            W.data = svd_cap(W.data, config.w_max * cap)
    dtype = getattr(torch, config.dtype)
    if rank() == 0:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config.optimizer} and {config.method}, "
              f"w_max {config.w_max:g}, on {f'{world()} times ' if world() > 1 else ''}{device} in {config.dtype}"
              f"{', compiled' if config.compile else ''}")
    if config.compile:
        for block in getattr(model, "blocks", []):  # one by one: they are alike, so that only the first takes time to compile
            block.compile()
    return (model, make_optimizers(model, config, dtype), device,
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32))


def bench(config):
    """
    Print where a step's time goes: (a) a training step, (b) the same without optimizer and constraint, and (c) its bare
    matrix products, one after the other, at the model's shapes and in its dtype; and the share of the machine's best
    matmul rate that the step reaches. The last line is JSON. Times are medians, (a) and (b) in turns.
    """
    check(config)
    meta = {"tokenizer": "gpt2", "vocab_size": 50257} if config.dataset == "fineweb" else {"tokenizer": "char", "vocab_size": 65}
    model, optimizers, device, amp = build(config, meta)
    dtype, B, T, H = getattr(torch, config.dtype), config.batch_size // config.accumulate, config.block_size, config.n_head
    ids = torch.randint(meta["vocab_size"], (B, T + 1), device=device)

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def seconds(f):
        wait()
        start = time.perf_counter()
        f()
        wait()
        return time.perf_counter() - start

    def gradients():
        with amp:
            loss = model(ids[:, :-1], ids[:, 1:])[1]
        loss.item()
        loss.backward()

    def step():
        gradients()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        constrain(model, config, config.lr)

    def without():
        gradients()
        model.zero_grad()

    # (batch, m, k, n): m x k times k x n. Three products per matrix, y = x W^T and the gradients of x and W; and six for
    # attention, of which causality leaves half: scores, outputs, and two gradients of each
    products, d_head = [], config.n_embd // H
    for W in matrices(model).values():
        m, n = W.flatten(0, -2).shape
        products += [(1, B * T, n, m), (1, B * T, m, n), (1, m, B * T, n)]
    products += config.n_layer * (3 * [(B * H, T, d_head, T // 2)] + 3 * [(B * H, T, T // 2, d_head)])
    flops = sum(2 * b * m * k * n for b, m, k, n in products)

    def best(shape, repeats):
        b, m, k, n = shape
        x, y = torch.randn(b, m, k, device=device, dtype=dtype), torch.randn(b, k, n, device=device, dtype=dtype)
        return sorted(seconds(lambda: torch.bmm(x, y)) for _ in range(repeats))[repeats // 2]

    for _ in range(3):
        step(), without()
    times = [(seconds(step), seconds(without)) for _ in range(10)]
    a, b = (sorted(column)[len(column) // 2] for column in zip(*times))
    c = sum(products.count(shape) * best(shape, 11) for shape in set(products))
    side = 8192 if device.type == "cuda" else 2048
    peak = max(2 * side ** 3 / best((1, side, side, side), 7), flops / c)
    result = {"step_over_floor": a / c, "optimizer_share": (a - b) / a, "tokens_per_second": B * T / a,
              "matmul_share": flops / a / peak}
    print(f"(a) step {1e3 * a:.1f} ms, (b) without optimizer and constraint {1e3 * b:.1f} ms, (c) its matrix products "
          f"{1e3 * c:.1f} ms\na/c {a / c:.2f}, (a-b)/a {(a - b) / a:.1%}, {B * T / a:,.0f} tokens/s, "
          f"{result['matmul_share']:.1%} of the best matmul rate, {peak / 1e9:,.0f} GFLOP/s")
    print(json.dumps(result))


def train(config, given=()):
    """One run, from scratch or resumed; `given` names the options from the command line, which win over a checkpoint's."""
    out = Path(config.out_dir)
    ckpt_path, log_path, ckpt = out / "ckpt.pt", out / "log.jsonl", None
    if config.resume:
        config, ckpt = resume(config, given, ckpt_path)
    check(config)
    meta, train_data, val_data = load_data(config)
    model, optimizers, device, amp = build(config, meta)

    step, seconds, loss_sum, loss_count = 0, 0.0, 0.0, 0
    out.mkdir(parents=True, exist_ok=True)
    if not ckpt and rank() == 0:
        for path in (ckpt_path, log_path):
            if path.exists():
                os.replace(path, path.with_stem(path.stem + ".old"))
    if ckpt:
        if ckpt["meta"] != meta:
            raise UserError(f"{ckpt_path} was trained on other data than data/{config.dataset} now holds; prepare that "
                            "again, or train from scratch")
        model.load_state_dict(ckpt["model"])
        for optimizer, state in zip(optimizers, ckpt["optimizers"]):
            optimizer.load_state_dict(state)
        torch.set_rng_state(ckpt["rng"])
        step, seconds, loss_sum, loss_count = (ckpt[key] for key in ("step", "seconds", "loss_sum", "loss_count"))
        if rank() == 0:
            print(f"resumed at step {step}")
        if log_path.exists() and rank() == 0:  # what an interrupted run logged after its last checkpoint comes again
            lines = [line for line in log_path.read_text().splitlines(keepends=True) if logged_step(line) <= step]
            log_path.with_suffix(".part").write_text("".join(lines))
            os.replace(log_path.with_suffix(".part"), log_path)

    interrupted = []

    def on_sigint(*_):  # finish the step; a second Ctrl-C does not wait
        interrupted.append(True)
        signal.signal(signal.SIGINT, old_handler)

    old_handler = signal.signal(signal.SIGINT, on_sigint)
    started, saved_step = time.perf_counter() - seconds, step

    def checkpoint():
        nonlocal saved_step
        saved_step = step
        if rank():
            return
        save(ckpt_path, {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                         "rng": torch.get_rng_state(), "model_config": asdict(model.config), "config": asdict(config),
                         "meta": meta, "step": step, "seconds": time.perf_counter() - started, "loss_sum": loss_sum,
                         "loss_count": loss_count})

    def stop(what):
        raise UserError(f"{what} at step {step}, learning rate {lr:.4g}; lower --lr or --w_max (the last checkpoint, of "
                        f"step {saved_step}, is {ckpt_path})")

    if not ckpt:
        checkpoint()  # so that there is something to resume from at any moment
    timed_steps, train_seconds = 0, 0.0
    bar = tqdm(total=config.max_steps, initial=step, unit="step", dynamic_ncols=True, leave=False,
               disable=True if rank() else None)
    try:
        while step < config.max_steps:
            tick = time.perf_counter()
            lr = set_schedule(optimizers, step, config)
            x, y = get_batch(train_data, step, config, device)
            if "images" not in meta and max(x.max(), y.max()) >= meta["vocab_size"]:
                raise UserError(f"data/{config.dataset} has token {max(x.max(), y.max())}, past its vocabulary of "
                                f"{meta['vocab_size']:,}; prepare it again (the last checkpoint is {ckpt_path})")
            state = torch.zeros(2, dtype=torch.float64)  # over all processes: the loss, and whether one was interrupted
            for x_part, y_part in zip(x.chunk(config.accumulate), y.chunk(config.accumulate)):
                with amp:
                    loss = model(x_part, y_part)[1] / config.accumulate
                loss.backward()
                state[0] += loss.item() / world()
            state[1] = len(interrupted)
            batch_loss, stopping = summed(state).tolist()
            if not math.isfinite(batch_loss):
                stop(f"the loss is {batch_loss}")
            if world() > 1:
                for p in model.parameters():
                    summed(p.grad).div_(world())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            constrain(model, config, lr)
            step, loss_sum, loss_count = step + 1, loss_sum + batch_loss, loss_count + 1
            timed_steps, train_seconds = timed_steps + 1, train_seconds + time.perf_counter() - tick
            bar.update()
            bar.set_postfix_str(f"loss {batch_loss:.3f}", refresh=False)

            if step % config.eval_interval == 0 or step == config.max_steps:
                with amp, torch.compiler.set_stance("force_eager"):
                    acts = activations(model, x_part)
                    if "images" not in meta:
                        few = min(20 * 64, -(-config.eval_tokens // config.block_size)) if config.eval_tokens else 20 * 64
                        scores = evaluate(model, val_data, device, few)
                if "images" in meta:
                    scores = evaluate_images(model, val_data, device)
                if not math.isfinite(scores["val_loss"]):
                    stop(f"the validation loss is {scores['val_loss']}")
                if rank() == 0:
                    norms = torch.cat([rms_norm(W).flatten() / cap for W, cap in relative_caps(model, config).items()])
                    line = {"step": step, "train_loss": loss_sum / loss_count, **scores,
                            "log10_paper": lipschitz_bound(model, "paper"),
                            "log10_certified": lipschitz_bound(model, "certified"),
                            "norm_over_cap": norms.max().item() / config.w_max, **acts,
                            "tokens_per_second": timed_steps * config.batch_size * y[0].numel() / train_seconds,
                            "seconds": time.perf_counter() - started}
                    bar.write(f"step {step}: train loss {line['train_loss']:.4f}, val loss {line['val_loss']:.4f}, "
                              f"accuracy {line['val_acc']:.2%} ({extra_scores(scores)}), "
                              f"log10 bound {line['log10_certified']:.2f} certified, " +
                              (f"{line['log10_paper']:.2f} paper, " if line["log10_paper"] is not None else "") +
                              f"norm/cap {line['norm_over_cap']:.4f}, activations {line['act_max']:.1f} max, "
                              f"{line['act_rms']:.2f} RMS, {line['tokens_per_second']:,.0f} "
                              f"{'images' if 'images' in meta else 'tokens'}/s")
                    with open(log_path, "a") as f:
                        f.write(json.dumps(line) + "\n")
                loss_sum, loss_count, timed_steps, train_seconds = 0.0, 0, 0, 0.0
                checkpoint()
            if stopping and step < config.max_steps:
                checkpoint()
                bar.close()
                if rank() == 0:
                    print(f"stopped at step {step} and saved {ckpt_path}; go on with --resume --out_dir={config.out_dir}")
                return
    finally:
        bar.close()
        signal.signal(signal.SIGINT, old_handler)

    if "images" in meta or rank():
        return
    prompt = torch.zeros((1, 1), dtype=torch.long, device=device)  # of `char`, token 0 is the first character, a newline
    with torch.compiler.set_stance("force_eager"):
        print(Tokenizer(meta).decode(model.generate(prompt, 300, temperature=0.8)[0].tolist()).strip())


def resume(config, given, path):
    """(config, checkpoint) to go on from path with: the checkpoint's options, but for those given."""
    _, ckpt = load_checkpoint(path)
    options = {**ckpt["config"], "resume": True}
    for name in given:
        if name in ckpt["model_config"] and getattr(config, name) != options[name]:
            raise UserError(f"{path} has {name}={options[name]}, so it cannot go on with --{name}={getattr(config, name)}")
        options[name] = getattr(config, name)
    return Config(**options), ckpt


def extra_scores(scores):
    """What an evaluation's line says in brackets after the accuracy."""
    if "paper_protocol_acc" in scores:
        return f"paper protocol {scores['paper_protocol_acc']:.2%}"
    names = [f"{eps * 255:.0f}" for eps in EPSILONS]
    at = [f"{scores[f'certified_acc_{name}']:.2%} to {scores[f'attacked_acc_{name}']:.2%}" for name in names]
    return f"L2 {', '.join(names)}/255: {', '.join(at)}"


def logged_step(line):
    """The step of a line of log.jsonl; infinity if it was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def main():
    given = parse(sys.argv[1:])
    if "LOCAL_RANK" in os.environ:  # under torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        config = Config(**PRESETS.get(given.get("preset"), {}) | given)
        bench(config) if config.bench else train(config, given)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as e:
        sys.exit(f"train.py: {e}")
    except RuntimeError as e:
        if not dist.is_initialized():
            raise
        sys.exit(f"train.py: process {rank()} stopped: {str(e).splitlines()[0]}")  # often because another one did
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; go on from the last checkpoint with --resume")


if __name__ == "__main__":
    main()
