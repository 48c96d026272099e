"""
Train a Lipschitz-bounded transformer: Muon or AdamW, and a weight constraint after every step.

    python train.py      # Shakespeare, Muon, soft cap: 55 % accuracy in 3 to 4 minutes on 2 CPU cores (EPYC, bf16)

    python train.py --method=hard_cap --optimizer=adamw --w_max=2        # any option that python train.py --help lists
    python train.py --resume                                             # go on from out_dir/ckpt.pt
    python train.py --preset=tight                                       # small certified bound, see README.md
    python train.py --preset=fineweb                                     # the 145 M model (prepare.py fineweb first)
    torchrun --standalone --nproc_per_node=8 train.py --preset=fineweb   # on 8 GPUs

Writes out_dir/ckpt.pt every few minutes and at each evaluation, which is a line of out_dir/log.jsonl; those of an earlier
run there are kept once, as ckpt.old.pt and log.old.jsonl. Ctrl-C and SIGTERM save and exit.
"""
import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import sys
import sysconfig
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import prepare
from constrain import (METHODS, PROMISE_W_MAX, after_step, certified_radii, lipschitz_bound, matrices, pgd, rms_norm,
                       svd_cap)
from model import GPT, MLP, GPTConfig, MLPConfig, load_checkpoint, onto_ball, sample
from optim import UPDATE_NORM, Muon, has_bf16, keep_memory, map_by_shape
from prepare import Parser, Tokenizer, UserError, data_folder, locked, one_line_errors, open_data, option, say, to_json

SAVE_SECONDS = 180  # between checkpoints, if evaluations are farther apart


# ------------------------------------------------------------------------------------------------------------
# Options

@dataclass
class Config(GPTConfig):
    """The options of a run: the model's, which are in model.py, and these."""
    preset: str | None = option(None, "a row of PRESETS, whose options hold unless given too")
    # what to train on, and where to
    out_dir: str = option("out/shakespeare", "checkpoint and log go here")
    dataset: str = option("shakespeare", "a folder of data/, made by prepare.py")
    # constraint
    method: str = option("soft_cap", "the weight constraint", choices=METHODS)
    w_max: float = option(6.0, "largest RMS->RMS norm of a matrix", 1e-9, 1e9)
    w_max_mlp: float | None = option(None, "of the MLPs' matrices, if another; their learning rate is larger by as much", 1e-9, 1e9)
    # optimizer
    optimizer: str = option("muon", "muon or adamw", choices=("muon", "adamw"))
    lr: float | None = option(None, "peak learning rate, falls linearly to 0; by default 0.1 for muon, 0.002 for adamw", 1e-30, 1e30)
    embedding: str = option("dual", "with muon, the embedding table's optimizer: dual (rows of norm 1, see optim.py) or adam",
                            choices=("dual", "adam"))
    embedding_lr: float = option(0.3, "learning rate of the embedding table, as a multiple of lr", 1e-9, 1e6)
    weight_decay: float = option(0.0, "a step decays weights, or with spectral_weight_decay their largest singular value, by "
                                 "lr * weight_decay", 0, 1e30)
    momentum: float = option(0.9, "Muon's, or AdamW's beta1", 0, 0.999999)
    momentum_warmup: int = option(0, "steps over which Muon's momentum rises from 0.85", 0, 10 ** 12)
    batch_size: int = option(16, "sequences per step", 1, 10 ** 7)
    accumulate: int = option(1, "parts of a batch that go through the model one after the other, for less memory", 1, 10 ** 9)
    max_steps: int = option(750, "optimizer steps", 1, 10 ** 12)
    cooldown: float = option(1.0, "share of the steps, at the end, over which the learning rate falls linearly to 0", 1e-9, 1)
    eval_interval: int = option(750, "steps between evaluations", 1, 10 ** 12)
    eval_tokens: int | None = option(None, "of the validation split to evaluate on, from its beginning; by default all", 2, 10 ** 15)
    # machine
    seed: int = option(0, "of initialization, batches and the sample of text", 0, 2 ** 63 - 1)
    device: str | None = option(None, "cpu, cuda, cuda:1, mps, ...; by default cuda where there is one, else cpu")
    dtype: str | None = option(None, "bfloat16 or float32 products; by default bfloat16 where the hardware has it",
                               choices=("bfloat16", "float32"))
    compile: bool | None = option(None, "use torch.compile; by default where that works")
    resume: bool = option(False, "go on from out_dir/ckpt.pt, with its options but for those given")


# The paper's 145 M model on FineWeb10B: w_max 1 has the bound of about 10, w_max 16 matches NanoGPT's accuracy.
FINEWEB = dict(out_dir="out/fineweb", dataset="fineweb", n_layer=12, n_head=6, n_embd=768, block_size=1024, w_max=16.0,
               embedding="adam", embedding_lr=0.1, momentum=0.95, momentum_warmup=300, batch_size=512, accumulate=16,
               max_steps=1770, cooldown=0.4, eval_interval=125, eval_tokens=10_485_760)
# and its MLP on CIFAR-10, 50 epochs. Options of the transformer do not matter there.
CIFAR10 = dict(out_dir="out/cifar10", dataset="cifar10", w_max=6.0, batch_size=512, max_steps=4900, eval_interval=980)
# A transformer that is cheap to certify: heads look at fixed distances, all maps keep the norm, the bound is logit_scale.
TIGHT = dict(out_dir="out/tight", n_layer=1, n_head=8, n_embd=512, softmax_scale=0.0, logit_scale=8.0, position_bias=True,
             per_head=True, attn_scale=1.0, alpha=1.0, activation="maxmin", mlp_layers=4, mlp_ratio=1, method="stiefel",
             w_max=1.0, lr=0.025, max_steps=1200, eval_interval=1200)
# With room for content: two layers of the paper's kind, and a ball that keeps activations small. The bound is about 7e3.
TIGHT_CONTENT = dict(out_dir="out/tight-content", n_layer=2, n_head=8, n_embd=256, position_bias=True, per_head=True,
                     activation="maxmin", ball=1.0, w_max=3.5, max_steps=800, eval_interval=800)
PRESETS = {"cifar10": CIFAR10, "tight": TIGHT, "tight-content": TIGHT_CONTENT, "fineweb": FINEWEB,
           **{f"fineweb-w{w}": FINEWEB | dict(w_max=float(w), out_dir=f"out/fineweb-w{w}") for w in (1, 4, 16)}}


def parse(argv):
    """Command line -> {name: value} of the options given."""
    def boolean(text):
        if text.lower() not in ("true", "false", "1", "0"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text.lower() in ("true", "1")

    parser = Parser(prog=os.path.basename(sys.argv[0]), description=__doc__.strip().split("\n")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        if not field.metadata:  # vocab_size, which the data decide
            continue
        kind = field.type if isinstance(field.type, type) else field.type.__args__[0]  # of `float | None`: float
        help, choices = field.metadata["help"], PRESETS if field.name == "preset" else field.metadata["choices"]
        if choices and field.name not in ("optimizer", "activation", "embedding", "dtype"):  # their help says them
            help += ": " + ", ".join(choices)
        help += "" if field.default is None else f" [{field.default}]"
        if kind is bool:
            parser.add_argument(f"--{field.name}", type=boolean, nargs="?", const=True, metavar="BOOL", help=help)
        else:
            parser.add_argument(f"--{field.name}", type=kind, choices=choices, metavar=kind.__name__.upper(), help=help)
    return vars(parser.parse_args(argv))


def configure(options):
    """The Config with these options, or UserError."""
    try:
        return Config(**options)
    except ValueError as e:
        raise UserError(f"--{e}")


def resume(config, given):
    """
    (config, checkpoint) to go on from config.out_dir with: the checkpoint's options, but for those named in `given`, which
    take effect or are refused. Another preset than the checkpoint's gives all of its options.
    """
    path = Path(config.out_dir) / "ckpt.pt"
    model, ckpt = load_checkpoint(path)
    known = {field.name for field in dataclasses.fields(Config)}
    options = {name: value for name, value in ckpt["config"].items() if name in known}
    names = {*given, *(PRESETS[config.preset] if config.preset not in (None, options.get("preset")) else ())}
    fixed = {"optimizer", "embedding", "seed", *(asdict(model.config) if isinstance(model, GPT) else ())}
    for name in sorted(names):
        value, before = getattr(config, name), options.get(name)
        if name in fixed and value != before:
            of = "" if name in given else f" of --preset={config.preset}"
            raise UserError(f"{path} has {name}={before}, so it cannot go on with --{name}={value}{of}")
        options[name] = value
    if ckpt["step"] > options["max_steps"]:
        raise UserError(f"{path} is at step {ckpt['step']}, past --max_steps={options['max_steps']}")
    return configure(options | {"out_dir": config.out_dir, "resume": True}), ckpt


def settle(config, device):
    """Fill in, and check, what options leave to the optimizer, the machine and each other."""
    config.lr = config.lr or (0.1 if config.optimizer == "muon" else 0.002)
    config.dtype = config.dtype or ("bfloat16" if has_bf16(device) else "float32")
    if config.batch_size % (config.accumulate * world()):
        raise UserError(f"--batch_size={config.batch_size} must be a multiple of --accumulate={config.accumulate} times the "
                        f"number of processes, {world()}")
    most = 2 if config.method == "spectral_weight_decay" else 1  # by more than that a step would turn weights round, and grow
    if not config.lr * config.weight_decay < most:
        raise UserError(f"--weight_decay={config.weight_decay:g} times the learning rate, {config.lr:g}, must be below {most}")
    try:
        constraint(config, config.lr)(torch.zeros(1, 1))
    except ValueError as e:
        raise UserError(str(e))


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


# ------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------
# Data: one class for text and one for images, with the same members

def load_data(config, device, like=None):
    """The data of a run, opened. Shakespeare is fetched when missing. `like` is the meta of a checkpoint, see open_data."""
    folder = data_folder(config.dataset, "--dataset")
    if config.dataset == "shakespeare" and rank() == 0 and not (folder / "meta.json").exists():
        prepare.shakespeare()
    if dist.is_initialized():
        dist.barrier()
    meta, train, val = open_data(folder, like)
    kind = Images if "images" in meta else Text
    if config.preset and (kind is Images) != (config.preset == "cifar10"):
        raise UserError(f"--preset={config.preset} does not fit {folder}, which holds {kind.__name__.lower()}")
    return kind(config, device, meta, train, val)


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """(a random offset, the windows or images 0 .. n - 1 in random order) of an epoch."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(1 << 32)), rng.permutation(n)


def places(config, step, n):
    """
    This process's part of a step's batch: (the epoch's offset, which one of the n windows or images). An epoch takes each
    once. All depends on (seed, step) alone, so that a resumed run sees the same.
    """
    for i in range(step * config.batch_size + rank(), (step + 1) * config.batch_size, world()):
        epoch, k = divmod(i, n)
        offset, order = epoch_order(config.seed, epoch, n)
        yield offset, int(order[k])


class Text:
    """Shards of tokens; the model is a GPT."""
    unit = "tokens"

    def __init__(self, config, device, meta, train, val):
        T, folder = config.block_size, f"data/{config.dataset}"
        for name, shards in (("training", train), ("validation", val)):
            shortest = min(map(len, shards), default=0)
            if shortest < T + 1:
                raise UserError(f"the {name} split of {folder} has {shortest} tokens, but block_size {T} needs {T + 1}; "
                                "use a longer text or a smaller --block_size")
        self.config, self.device, self.meta, self.shards = config, device, meta, train
        self.val = val[0][:config.eval_tokens]
        if len(self.val) < T + 1:
            raise UserError(f"--eval_tokens={config.eval_tokens} must be at least {T + 1}, one more than block_size")
        self.counts = [max(1, (len(shard) - T) // T) for shard in train]  # windows of each shard
        self.ends = np.cumsum(self.counts)

    def model(self):
        vocab_size = self.meta["vocab_size"]
        if self.meta["tokenizer"] == "gpt2":
            vocab_size = -(-vocab_size // 128) * 128  # 50,257 tokens become 50,304, a better size for products
        return new_gpt(self.config, vocab_size, self.device)

    def batch(self, step):
        """Inputs and targets (batch_size, T), int64. Where windows begin differs from epoch to epoch."""
        T, rows = self.config.block_size, []
        for offset, window in places(self.config, step, int(self.ends[-1])):
            which = int(np.searchsorted(self.ends, window, side="right"))
            shard, count = self.shards[which], self.counts[which]
            start = offset % (len(shard) - count * T) % T + (window - int(self.ends[which]) + count) * T
            rows.append(shard[start:start + T + 1])
        rows = np.stack(rows)
        if rows.max() >= self.meta["vocab_size"]:
            raise UserError(f"data/{self.config.dataset} has token {rows.max()}, past its vocabulary of "
                            f"{self.meta['vocab_size']:,}; prepare it again")
        return shifted(rows, self.device)

    def evaluate(self, model, amp):
        few = 20 * 64
        if self.config.eval_tokens:
            few = min(few, -(-self.config.eval_tokens // self.config.block_size))
        with amp:
            return evaluate(model, self.val, self.device, few)

    def words(self, line):
        return f"paper protocol {line['paper_protocol_acc']:.2%}"

    def sample(self, model):
        return sample(model, Tokenizer(self.meta)).strip()


class Images:
    """Images and labels; the model is an MLP."""
    unit = "images"

    def __init__(self, config, device, meta, train, val):
        self.config, self.device, self.meta, self.train, self.val = config, device, meta, train, val

    def model(self):
        return MLP(MLPConfig(n_in=self.meta["images"], n_out=self.meta["classes"])).to(self.device)

    def batch(self, step):
        """Inputs (batch_size, pixels) and labels (batch_size,)."""
        rows = [image for _, image in places(self.config, step, len(self.train[0]))]
        return image_inputs(self.train, np.array(rows), self.device)

    def evaluate(self, model, amp):
        return evaluate_images(model, self.val, self.device)

    def words(self, line):
        names = [f"{eps * 255:.0f}" for eps in EPSILONS]
        at = [f"{line[f'certified_acc_{name}']:.2%} to {line[f'attacked_acc_{name}']:.2%}" for name in names]
        return f"L2 {', '.join(names)}/255: {', '.join(at)}"

    def sample(self, model):
        return ""


def windows(tokens, starts, length, device):
    """Inputs and targets (len(starts), length), int64: the tokens at [s, s + length) and one later, for every start s."""
    return shifted(np.stack([tokens[s:s + length + 1] for s in starts]), device)


def shifted(rows, device):
    """Rows (B, T + 1) of tokens -> inputs and targets (B, T), int64."""
    rows = torch.from_numpy(rows.astype(np.int64)).to(device)
    return rows[:, :-1], rows[:, 1:]


IMAGE_SCALE = 4.0  # makes the RMS norm of an image about 1
EPSILONS = (36 / 255, 72 / 255, 108 / 255, 255 / 255)


def image_inputs(data, rows, device):
    """Inputs (len(rows), pixels), IMAGE_SCALE (p - 1/2) for pixels p in [0, 1], and labels (len(rows),)."""
    images, labels = (torch.from_numpy(array[rows]).to(device) for array in data)
    return IMAGE_SCALE * (images.float() / 255 - 0.5), labels


# ------------------------------------------------------------------------------------------------------------
# Model, optimizers and the constraint

def new_gpt(config, vocab_size, device):
    """A GPT with config's options on a device. What that could not hold is refused before it is built."""
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)}
    gpt = GPTConfig(**sizes | {"vocab_size": vocab_size})
    tokens = config.batch_size * config.block_size // (config.accumulate * world())
    needed = 4 * (3 * gpt.n_params + tokens * (vocab_size + 6 * config.n_layer * config.n_embd))  # at the very least
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > memory:
        raise UserError(f"{gpt.n_params / 1e6:,.0f} M parameters and {tokens:,} tokens at a time take {needed / 1e9:,.0f} GB or "
                        f"more, {device} has {memory / 1e9:,.0f}; lower --n_embd, --n_layer or --batch_size, or raise --accumulate")
    return GPT(gpt).to(device)


def relative_caps(model, config):
    """{matrix: its cap over w_max}. Learning rates scale alike, so that w_max, lr and weight_decay hold for W over that."""
    mlp = (config.w_max_mlp or config.w_max) / config.w_max
    return {W: mlp if ".mlp." in name else 1.0 for name, W in matrices(model).items()}


def project(model, config, above):
    """Where the method promises a cap, cap the norms of the matrices that are more than `above` times it."""
    if config.method in PROMISE_W_MAX:
        for W, cap in relative_caps(model, config).items():
            if rms_norm(W).max() > above * config.w_max * cap:
                W.data = svd_cap(W.data, config.w_max * cap)


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


def constraint(config, lr):
    """What a step with learning rate lr asks of matrices W (..., m, n), as a function of W."""
    update_norm = lr * UPDATE_NORM if config.optimizer == "muon" else math.inf
    return after_step(config.method, config.w_max, lr, lr * config.weight_decay, update_norm, getattr(torch, config.dtype))


@torch.no_grad()
def constrain(model, config, lr):
    """Constrain all matrices after a step with learning rate lr; rows of the embedding get RMS norm <= 1."""
    owner, caps = owners(model), relative_caps(model, config)
    weights = [W for W in matrices(model).values() if owner[W] == rank()]
    scaled = [W if caps[W] == 1 else W / caps[W] for W in weights]  # every method maps c W to c times what it maps W to
    for W, new in zip(weights, map_by_shape(constraint(config, lr), scaled)):
        W.copy_(new if caps[W] == 1 else new * caps[W])
    if dist.is_initialized():
        for W in owner:
            dist.broadcast(W, owner[W])
    if isinstance(model, GPT):
        model.wte.weight.copy_(onto_ball(model.wte.weight, 1.0))


def has_compiler(device):
    """Whether there is what torch.compile needs: Triton on a GPU, a C++ compiler and Python's headers on a CPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton
        return has_triton()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return device.type == "cpu" and headers.exists() and shutil.which(os.environ.get("CXX", "g++")) is not None


def compile_blocks(model, config, batch, amp):
    """
    Compile the blocks one by one: they are alike, so that only the first takes time. A first batch shows whether the
    compiler works; without one the run goes on as it is, unless --compile asked for it.
    """
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
    x, y = (part.chunk(config.accumulate)[0] for part in batch)
    try:
        with amp:
            loss = model(x, y)[1]
        loss.backward()
    except Exception as e:  # of many kinds, from several layers down
        what = f"torch.compile does not work here ({type(e).__name__})"
        if config.compile:
            raise UserError(f"{what}; go on with --compile=False")
        for block in model.blocks:
            del block.forward
        say(f"{what}; going on without it")
    model.zero_grad()


# ------------------------------------------------------------------------------------------------------------
# Evaluation

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
        radii = certified_radii(model, x, y) / IMAGE_SCALE
        robust = [radii > eps for eps in EPSILONS] + [pgd(model, x, y, IMAGE_SCALE * eps) for eps in EPSILONS]
        right = [logits.argmax(dim=1) == y, *robust]
        total += torch.tensor([loss.item() * len(y), len(y), *(r.sum().item() for r in right)], dtype=torch.float64)
    loss, count, correct, *robust = summed(total).tolist()
    names = [f"{kind}_acc_{eps * 255:.0f}" for kind in ("certified", "attacked") for eps in EPSILONS]
    return {"val_loss": loss / count, "val_acc": correct / count, **{name: n / count for name, n in zip(names, robust)}}


def bounds(model, config):
    """The Lipschitz bounds of the model, and its largest norm over its cap."""
    norms = torch.cat([rms_norm(W).flatten() / cap for W, cap in relative_caps(model, config).items()])
    return {"log10_paper": lipschitz_bound(model, "paper"), "log10_certified": lipschitz_bound(model, "certified"),
            "norm_over_cap": norms.max().item() / config.w_max}


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


def describe(line, data):
    """A line of the log in words."""
    paper = "" if line["log10_paper"] is None else f"{line['log10_paper']:.2f} paper, "
    return (f"step {line['step']}: train loss {line['train_loss']:.4f}, val loss {line['val_loss']:.4f}, "
            f"accuracy {line['val_acc']:.2%} ({data.words(line)}), log10 bound {line['log10_certified']:.2f} certified, {paper}"
            f"norm/cap {line['norm_over_cap']:.4f}, activations {line['act_max']:.1f} max, {line['act_rms']:.2f} RMS, "
            f"{line['tokens_per_second']:,.0f} {data.unit}/s")


# ------------------------------------------------------------------------------------------------------------
# A run's folder: checkpoint, log and lock; and its end

@contextmanager
def only_run_in(out):
    """The folder out for one run at a time: a second one is told who has it. The lock ends with the process."""
    out = Path(out)
    holder = out / "running"
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out, wait=False):
            holder.write_text(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except BlockingIOError:
        who = holder.read_text() if holder.exists() else "another process"
        raise UserError(f"{out} is in use by {who}; wait for it, or choose another --out_dir")
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()  # if nothing has been written to it


def keep_old(out):
    """Rename the checkpoint and the log of an earlier run."""
    for path in (out / "ckpt.pt", out / "log.jsonl"):
        if path.exists():
            os.replace(path, path.with_stem(path.stem + ".old"))


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


def get_state(model, optimizers):
    """
    What a checkpoint keeps of weights and optimizers: of the latter what they have learned, by the parameters' names. Learning
    rates and the like are the options', which may change when a run goes on.
    """
    names = {p: name for name, p in model.named_parameters()}
    return {"model": model.state_dict(), "rng": torch.get_rng_state(),
            "optimizers": [{names[p]: state for p, state in optimizer.state.items()} for optimizer in optimizers]}


def set_state(model, optimizers, ckpt):
    """Take back what get_state kept."""
    names = {p: name for name, p in model.named_parameters()}
    model.load_state_dict(ckpt["model"])
    for optimizer, states in zip(optimizers, ckpt["optimizers"], strict=True):
        if "param_groups" in states:
            raise UserError("the checkpoint is of an older version of train.py, which this one cannot go on from")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        learned = {i: states[names[p]] for i, p in enumerate(params) if names[p] in states}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": learned})
    torch.set_rng_state(ckpt["rng"])


def trim_log(path, step):
    """Take off the log what an interrupted run wrote after its last checkpoint, as it comes again, and a line cut off."""
    def logged_step(line):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return math.inf

    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        path.with_suffix(".part").write_text("".join(line for line in lines if logged_step(line) <= step))
        os.replace(path.with_suffix(".part"), path)


class StopRequest:
    """
    Becomes true by Ctrl-C or what schedulers and closed terminals send, so that the run ends after its step. A second Ctrl-C
    does not wait, but for that of torchrun, which repeats the first.
    """
    def __init__(self):
        self.since = None

    def __bool__(self):
        return self.since is not None

    def __enter__(self):
        wanted = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        self.old = {s: signal.signal(s, self.ask) for s in wanted
                    if s and (s != wanted[2] or signal.getsignal(s) != signal.SIG_IGN)}  # nohup ignores the last
        return self

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def ask(self, s, _):
        if s == signal.SIGINT and self.since is not None and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        self.since = self.since or time.monotonic()


# ------------------------------------------------------------------------------------------------------------
# Training

def gradients(model, x, y, config, amp, stop_request):
    """The mean gradient of a batch, in p.grad, over all processes; returns its loss and whether any was asked to stop."""
    state = torch.zeros(2, dtype=torch.float64)
    for x_part, y_part in zip(x.chunk(config.accumulate), y.chunk(config.accumulate)):
        with amp:
            loss = model(x_part, y_part)[1] / config.accumulate
        loss.backward()
        state[0] += loss.item() / world()
    state[1] = bool(stop_request)
    loss, stopping = summed(state).tolist()
    if world() > 1:
        for p in model.parameters():
            summed(p.grad).div_(world())
    return loss, bool(stopping)


def train(config, given=()):
    """One run, from scratch or resumed; `given` names the options from the command line, which win over a checkpoint's."""
    out, ckpt = Path(config.out_dir), None
    if config.resume:
        config, ckpt = resume(config, given)
    options = asdict(config)  # as asked: what depends on the machine is for the next one to settle
    device = find_device(config)
    settle(config, device)
    dtype = getattr(torch, config.dtype)
    amp = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    data = load_data(config, device, ckpt and ckpt["meta"])
    torch.manual_seed(config.seed)
    model = data.model()
    project(model, config, above=0)
    optimizers = make_optimizers(model, config, dtype)
    step, seconds, loss_sum, loss_count = 0, 0.0, 0.0, 0
    if ckpt:
        set_state(model, optimizers, ckpt)
        project(model, config, above=1 + 1e-3)
        step, seconds, loss_sum, loss_count = (ckpt[key] for key in ("step", "seconds", "loss_sum", "loss_count"))

    compiled = isinstance(model, GPT) and (has_compiler(device) if config.compile is None else config.compile)
    if rank() == 0:
        say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config.optimizer} and {config.method}, "
            f"w_max {config.w_max:g}, on {f'{world()} times ' if world() > 1 else ''}{device} in {config.dtype}"
            f"{', compiled' if compiled else ''}" + (f"; resumed at step {step}" if ckpt else ""))
    if compiled and step < config.max_steps:
        compile_blocks(model, config, data.batch(step), amp)
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        trim_log(out / "log.jsonl", step) if ckpt else keep_old(out)

    started, saved_step, saved_at = time.perf_counter() - seconds, step, time.perf_counter()
    timed_steps, timed_seconds = 0, 0.0

    def checkpoint():
        nonlocal saved_step, saved_at
        saved_step, saved_at = step, time.perf_counter()
        if rank() == 0:
            save(out / "ckpt.pt", {**get_state(model, optimizers), "model_config": asdict(model.config), "config": options,
                                   "meta": data.meta, "step": step, "seconds": time.perf_counter() - started,
                                   "loss_sum": loss_sum, "loss_count": loss_count})

    def diverged(what):
        return UserError(f"{what} at step {step}, learning rate {lr:.4g}; lower --lr or --w_max (the last checkpoint, of "
                         f"step {saved_step}, is {out / 'ckpt.pt'})")

    if not ckpt:
        checkpoint()  # so that there is something to resume from at any moment
    bar = tqdm(total=config.max_steps, initial=step, unit="step", dynamic_ncols=True, leave=False, disable=True if rank() else None)
    with bar, StopRequest() as stop_request:
        while step < config.max_steps:
            tick = time.perf_counter()
            lr = set_schedule(optimizers, step, config)
            x, y = data.batch(step)
            loss, stopping = gradients(model, x, y, config, amp, stop_request)
            if not math.isfinite(loss):
                raise diverged(f"the loss is {loss}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            constrain(model, config, lr)

            step, loss_sum, loss_count = step + 1, loss_sum + loss, loss_count + 1
            timed_steps, timed_seconds = timed_steps + 1, timed_seconds + time.perf_counter() - tick
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

            if step % config.eval_interval == 0 or step == config.max_steps:
                with torch.compiler.set_stance("force_eager"):
                    with amp:
                        acts = activations(model, x.chunk(config.accumulate)[-1])
                    scores = data.evaluate(model, amp)
                if not math.isfinite(scores["val_loss"]):
                    raise diverged(f"the validation loss is {scores['val_loss']}")
                if rank() == 0:
                    line = {"step": step, "train_loss": loss_sum / loss_count, **scores, **bounds(model, config), **acts,
                            "tokens_per_second": timed_steps * config.batch_size * y[0].numel() / timed_seconds,
                            "seconds": time.perf_counter() - started}
                    with open(out / "log.jsonl", "a") as f:
                        f.write(to_json(line) + "\n")
                loss_sum, loss_count, timed_steps, timed_seconds = 0.0, 0, 0, 0.0
                checkpoint()
                if rank() == 0:
                    say(describe(line, data))
            elif stopping or time.perf_counter() - saved_at > SAVE_SECONDS:
                checkpoint()
            if stopping and step < config.max_steps:
                if rank() == 0:
                    say(f"stopped at step {step} and saved {out / 'ckpt.pt'}; go on with --resume --out_dir={config.out_dir}")
                return

    with torch.compiler.set_stance("force_eager"):
        if rank() == 0 and (text := data.sample(model)):
            say(text)


def main():
    given = parse(sys.argv[1:])
    if "LOCAL_RANK" in os.environ:  # under torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with one_line_errors("train.py", "interrupted; go on from the last checkpoint with --resume"):
            config = configure(PRESETS.get(given.get("preset"), {}) | given)
            with only_run_in(config.out_dir) if rank() == 0 else nullcontext():
                train(config, given)
            if dist.is_initialized():
                dist.destroy_process_group()
    except RuntimeError as e:
        if "memory" in str(e):
            sys.exit("train.py: not enough memory; lower --batch_size, or raise --accumulate")
        if not dist.is_initialized():
            raise
        sys.exit(f"train.py: process {rank()} stopped: {str(e).splitlines()[0]}")  # often because another one did


if __name__ == "__main__":
    main()
