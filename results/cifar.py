"""The paper's MLP on CIFAR-10 in one file: images, network, training, certificate, attack, and runs compared.

    cifar10         57.7 % of the test images right, 22.5 % certified against every change of L2 norm 36/255
    cifar10-tight   58.6 % right, 46.2 % certified: built and trained for its certificate
    (means of three seeds in cifar.jsonl, on copies decoded from JPEG; pixels in [0, 1])

    python results/cifar.py prepare                            # download the images to data/cifar10
    python results/cifar.py train --preset=cifar10-tight       # a few minutes, not resumed
    python results/cifar.py train --method=hard_cap --w_max=2  # any option of Config
    python results/cifar.py sweep                              # all runs of cifar.jsonl, or its parts

It shows how a loop of one's own uses optim.py and constrain.py.
"""
import argparse
import copy
import dataclasses
import math
import os
import sys
import tarfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]

from certify import ascend
from constrain import HOLDS, METHODS, Step, lead, log10, rms_norm, sigma, svd_cap, worst_case
from model import maxmin
from optim import UPDATE_NORM, Muon, has_bf16, keep_memory, map_by_shape
from parts import append_line, at_strengths, bracket, pairs, read_lines, strengths, tuning_loss
from prepare import (Parser, UserError, commit, download, lacks_memory, number, one_line_errors, option,
                     say)

# --- Options ------------------------------------------------------------------------------------------------
# The defaults are the settings of the paper's notebook. (Its first layer begins at zero, which trains with
# another derivative of ReLU at 0; ours is orthogonal.)

ACTIVATIONS = {"relu": F.relu, "maxmin": maxmin}


@dataclass
class Config:
    method: str = option("soft_cap", "the weight constraint", choices=METHODS)
    w_max: float = option(6.0, "largest RMS->RMS norm of a matrix", 1e-9, 1e9)
    optimizer: str = option("muon", "muon or adamw", choices=("muon", "adamw"))
    lr: float = option(0.2, "peak learning rate, which falls linearly; with adamw 0.002", 1e-30, 1e30)
    weight_decay: float = option(0.0, "a step decays weights, or with spectral_weight_decay their largest "
                                 "singular value, by lr * weight_decay", 0, 1e30)
    width: int = option(256, "of hidden layers", 1, 10 ** 6)
    layers: int = option(3, "linear layers", 2, 1000)
    activation: str = option("relu", "between them: relu or maxmin", choices=ACTIVATIONS)
    logit_scale: float = option(1.0, "factor of the logits", 1e-12, 1e12)
    radius: float = option(0.0, "train for the worst case of changes of this L2 norm", 0, 1e9)
    batch_size: int = option(512, "images per step", 1, 10 ** 7)
    max_steps: int = option(2000, "optimizer steps", 1, 10 ** 9)
    eval_interval: int = option(500, "steps between evaluations", 1, 10 ** 9)
    attack_images: int = option(1000, "test images to attack, the first ones", 1, 10 ** 9)
    seed: int = option(0, "of initialization and batches", 0, 2 ** 63 - 1)
    dtype: str = option(None, "of products: bfloat16, the default where the hardware has it, or float32",
                        choices=("bfloat16", "float32"))


class Diverged(UserError):
    """A run whose loss or weights are no longer finite."""


PRESETS = {"cifar10": {},
           # all maps keep the L2 norm, so that the bound is logit_scale
           "cifar10-tight": dict(width=512, layers=4, activation="maxmin", method="stiefel", w_max=1.0,
                                 logit_scale=40.0, radius=36 / 255, lr=0.05)}


def configure(options):
    """The Config with options, else those of the preset that they name, else the defaults."""
    options = dict(options)
    preset = PRESETS[options.pop("preset", "cifar10")]
    if options.get("optimizer") == "adamw":
        preset = preset | {"lr": 0.002}  # a preset's is Muon's, in other units
    config = Config(**preset | options)
    if config.activation == "maxmin" and config.width % 2:
        raise UserError(f"--width={config.width} must be even: maxmin sorts pairs")
    most = 2 if config.method == "spectral_weight_decay" else 1  # beyond, a step would turn weights round
    if not config.lr * config.weight_decay < most:
        raise UserError(f"--weight_decay={config.weight_decay:g} times the learning rate, {config.lr:g}, "
                        f"must be below {most}")
    return config


# --- Data: {"train" or "val": (images (N, 3072) uint8, labels (N,) int64)}, in one file ---------------------

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9dddda3db29a59bca1dd"
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
DATA = Path("data/cifar10")


def prepare():
    """Download CIFAR-10 and write it to DATA, if it is what it should be."""
    archive, arrays = DATA / "cifar-10-binary.tar.gz", {}
    DATA.mkdir(parents=True, exist_ok=True)
    with FileLock(DATA / ".lock"):
        download(URL, archive, sha256=SHA256)
        with tarfile.open(archive) as tar:
            for split, names in BATCHES.items():
                files = [tar.extractfile(f"cifar-10-batches-bin/{name}.bin") for name in names]
                rows = np.frombuffer(b"".join(file.read() for file in files), np.uint8).reshape(-1, 3073)
                arrays |= {f"{split}_images": rows[:, 1:], f"{split}_labels": rows[:, 0].astype(np.int64)}
        archive.unlink()
        write_images(DATA, arrays, URL)


def write_images(folder, arrays, source):
    """Write folder/images.npz: {train,val}_{images,labels} and where they are from, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "images.part", "wb") as f:
        np.savez(f, source=source, **arrays)
    os.replace(folder / "images.part", folder / "images.npz")
    say(f"{folder}: {len(arrays['train_images']):,} training and {len(arrays['val_images']):,} test images")


def read_images():
    """The data in DATA, or UserError."""
    try:
        with np.load(DATA / "images.npz") as file:
            return {split: (file[f"{split}_images"], file[f"{split}_labels"]) for split in BATCHES}
    except FileNotFoundError:
        raise UserError(f"{DATA} holds no images; get them with python results/cifar.py prepare")
    except Exception as e:  # numpy and zipfile raise all kinds
        if lacks_memory(e):
            raise
        raise UserError(f"{DATA}/images.npz is damaged ({e}); make it again with python results/cifar.py "
                        "prepare")


def inputs(split, rows, device="cpu"):
    """Images (B, 3072) of values in [0, 1] and labels (B,)."""
    images, labels = (torch.from_numpy(array[rows]).to(device) for array in split)
    return images.float() / 255, labels


def batches(n, config):
    """For each step, which of the n training images: an epoch takes each once, in random order."""
    order, epoch = np.empty(0, dtype=np.int64), 0
    for _ in range(config.max_steps):
        while len(order) < config.batch_size:
            rng = np.random.default_rng((config.seed, epoch))
            rng.integers(1 << 32)  # not used; keeps the batches of the records
            order, epoch = np.concatenate((order, rng.permutation(n))), epoch + 1
        yield order[:config.batch_size]
        order = order[config.batch_size:]


# --- Network ------------------------------------------------------------------------------------------------

class MLP(nn.Module):
    """Linear layers, each initialized to RMS->RMS norm 1 with all singular values equal."""
    def __init__(self, n_in, n_out, config):
        super().__init__()
        widths = [n_in, *[config.width] * (config.layers - 1), n_out]
        self.weights = nn.ParameterList(nn.init.orthogonal_(torch.empty(m, n), gain=math.sqrt(m / n))
                                        for n, m in zip(widths, widths[1:]))
        self.activation, self.logit_scale = ACTIVATIONS[config.activation], config.logit_scale

    def layers(self, x):
        """Images (B, n_in) -> what each layer gives: (B, width) before the activation; last (B, n_out)."""
        outputs = [F.linear(x, self.weights[0])]
        for W in self.weights[1:]:
            outputs.append(F.linear(self.activation(outputs[-1]), W))
        return outputs

    def forward(self, x):
        """Images (B, n_in) -> logits (B, n_out)."""
        return self.logit_scale * self.layers(x)[-1]


# --- Certificate --------------------------------------------------------------------------------------------
# It is about `network`, written a second time from the weights alone. No layer moves its output by more than
# its norm times the change of its input, and no activation by more than the change of its own.

MARGIN = 1e-6  # by which a claim has to hold, relative: more than rounding can move

GAIN_1 = {"relu": lambda z: z.clamp_min(0),
          "maxmin": lambda z: z.unflatten(1, (2, -1)).sort(dim=1, descending=True).values.flatten(1)}


def network(weights, x, config):
    """Images (B, n_in) -> logits (B, n_out), for matrices (m, n) in order: what the certificate is about."""
    for W in weights[:-1]:
        x = GAIN_1[config.activation](x @ W.T)
    return config.logit_scale * (x @ weights[-1].T)


def exact(model):
    """A copy in float64 on the CPU: what is exact is computed there, as not every GPU has float64."""
    return copy.deepcopy(model).cpu().double().requires_grad_(False)


def checked_weights(model, config):
    """The model's matrices in float64; UserError unless it computes what `network` does with them alone."""
    net = exact(model)
    weights = list(net.weights)
    if not all(W.isfinite().all() for W in weights):
        raise Diverged("there are weights that are not finite; lower --lr or --w_max")
    x = torch.randn(12, weights[0].shape[1], generator=torch.Generator().manual_seed(0)).double()
    x[:4], x[8:] = x[:4].sigmoid(), 100 * x[8:]  # like images, and far from it
    if config.activation in GAIN_1 and {*net.parameters()} == {*weights}:
        y, expected = net(x), network(weights, x, config)
        if y.shape == expected.shape and ((y - expected).norm(dim=1) <= 1e-9 * expected.norm(dim=1)).all():
            return weights
    raise UserError("MLP computes something else than `network`, or has other parameters, so that there is "
                    "no certificate; mend one or the other in results/cifar.py")


def logit_reach(weights, config, r):
    """What a change of L2 norm r at the input can do to the difference of logits i and j, over |w_i - w_j|_2
    for the rows w_i of the last matrix: logit_scale times r times the norms of the matrices before that.
    """
    return config.logit_scale * r * math.prod(sigma(W).item() for W in weights[:-1])


def certified(weights, z, y, config, eps):
    """For which logits z (N, n_out) no change of the input of L2 norm eps makes label y (N,) wrong: (N,)."""
    worst = worst_case(z, y, weights[-1], (1 + MARGIN) * logit_reach(weights, config, eps))
    return lead(worst, y) > MARGIN * z.abs().amax(dim=1)  # false for NaN


# --- Attack -------------------------------------------------------------------------------------------------

def pgd(model, x, y, eps, steps=20):
    """Which inputs x (B, n) with labels y (B,) stay right under projected gradient descent (Madry et al.
    2018) in the L2 ball of radius eps around each: (B,) of bool. The ball is not cut to valid pixels, as the
    certificate's is not.
    """
    norm = lambda v: v.norm(dim=1, keepdim=True).clamp_min(1e-30)
    delta, right = torch.zeros_like(x), torch.ones_like(y, dtype=torch.bool)
    for _ in range(steps + 1):  # looks at x itself and after every step
        delta.requires_grad_()
        logits = model(x + delta)
        right &= logits.argmax(dim=1) == y
        g, = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction="sum"), delta)
        delta = delta.detach() + 2.5 * eps / steps * (g / norm(g))
        delta = delta * (eps / norm(delta)).clamp_max(1)
    return right


def survives(model, split, n, eps):
    """Which of the first n images of a split stay right under the attack: (n,) of bool."""
    device = model.weights[0].device
    rows = [slice(i, min(i + 500, n)) for i in range(0, n, 500)]
    return torch.cat([pgd(model, *inputs(split, part, device), eps).cpu() for part in rows])


def largest_gain(model):
    """The largest RMS->RMS gain, images to logits, that gradient ascent finds: at most the certificate."""
    net, g = exact(model), torch.Generator().manual_seed(0)
    X = torch.randn(8, 1, net.weights[0].shape[1], generator=g, dtype=torch.float64)
    return ascend(lambda X: net(X.flatten(0, 1))[:, None], X, 1.0, steps=20)  # an image: a text of one token


# --- Evaluation ---------------------------------------------------------------------------------------------

EPSILONS = (36, 72, 108, 255)  # L2 norms in 255ths of a pixel's range


def evaluate(model, split, config):
    """Loss (nats) and accuracy on all images of a split; the accuracy that is certified, and what an attack
    leaves of the first ones; the Lipschitz bound above the largest gain found. If an attack is above what is
    certified, that is None.
    """
    weights, share = checked_weights(model, config), lambda which: which.double().mean().item()
    parts = [inputs(split, slice(i, i + 500)) for i in range(0, len(split[1]), 500)]
    z = torch.cat([network(weights, x.double(), config) for x, _ in parts])
    y = torch.cat([labels for _, labels in parts])
    norms = [rms_norm(W).item() for W in weights]
    scores = {"val_loss": F.cross_entropy(z, y).item(), "val_acc": share(z.argmax(dim=1) == y),
              "log10_attack": log10(largest_gain(model)), "norm_over_cap": max(norms) / config.w_max}

    claims = {"log10_certified": log10(config.logit_scale * math.prod(norms))}
    if config.radius:
        worst = worst_case(z, y, weights[-1], logit_reach(weights, config, config.radius))
        claims["worst_loss"] = F.cross_entropy(worst, y).item()
    alarm = not scores["log10_attack"] <= claims["log10_certified"] + MARGIN
    for eps in EPSILONS:
        safe = certified(weights, z, y, config, eps / 255)
        left = survives(model, split, min(config.attack_images, len(y)), eps / 255)
        claims[f"certified_acc_{eps}"], scores[f"attacked_acc_{eps}"] = share(safe), share(left)
        alarm |= (safe[:len(left)] & ~left).any().item()
    if alarm:
        say("ALARM: AN ATTACK IS ABOVE THE CERTIFICATE, WHICH IS WRONG")
        claims = dict.fromkeys(claims)
    return scores | claims


# --- Training -----------------------------------------------------------------------------------------------

def find_device():
    """The GPU if there is one, which CUDA_VISIBLE_DEVICES= hides, else the CPU."""
    keep_memory()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(config, data, device):
    """(model, log): a network, and a dict of numbers from every evaluation."""
    dtype = config.dtype or ("bfloat16" if has_bf16(device) else "float32")
    amp = torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    dtype, muon = getattr(torch, dtype), config.optimizer == "muon"

    def constraint(lr):
        """What a step with learning rate lr asks of matrices (..., m, n)."""
        update_norm = lr * UPDATE_NORM if muon else math.inf  # AdamW's steps have no fixed norm
        step = Step(config.w_max, lr, lr * config.weight_decay, update_norm, dtype)
        return lambda W: METHODS[config.method](W, step)

    try:
        constraint(config.lr)(torch.zeros(1, 1))
    except ValueError as e:
        raise UserError(str(e))

    images, labels = data["train"]
    torch.manual_seed(config.seed)
    model = MLP(images.shape[1], int(labels.max()) + 1, config).to(device)
    weights = list(model.weights)
    if HOLDS[config.method] != "never":  # it keeps norms that are below w_max there
        for W in weights:
            W.data = svd_cap(W.data, Step(config.w_max))
    checked_weights(model, config)

    decay = 0.0 if config.method == "spectral_weight_decay" else config.weight_decay  # it decays by itself
    if muon:
        optimizer = Muon(weights, momentum=0.9, nesterov=False, weight_decay=decay, dtype=dtype)
    else:
        optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=decay)

    log, losses, start, tick = [], [], time.perf_counter(), time.perf_counter()
    bar = tqdm(batches(len(labels), config), total=config.max_steps, unit="step", leave=False, disable=None)
    for step, rows in enumerate(bar, 1):
        x, y = inputs(data["train"], rows, device)
        lr = config.lr * (1 - (step - 1) / config.max_steps)
        optimizer.param_groups[0]["lr"] = lr
        with amp:
            logits = model(x)
        if config.radius:
            if step % 100 == 1:
                reach = logit_reach(exact(model).weights, config, config.radius)
            logits = worst_case(logits, y, weights[-1], reach)
        loss = F.cross_entropy(logits.float(), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise Diverged(f"the loss is {losses[-1]} at step {step}, learning rate {lr:.4g}; lower --lr or "
                           "--w_max")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for W, new in zip(weights, map_by_shape(constraint(lr), weights)):
                W.copy_(new)

        if step % config.eval_interval == 0 or step == config.max_steps:
            rate = len(losses) * config.batch_size / (time.perf_counter() - tick)
            with amp, torch.no_grad():
                hidden = [h.float() for h in model.layers(x)[:-1]]
            log.append({"step": step, "train_loss": sum(losses) / len(losses),
                        **evaluate(model, data["val"], config),
                        "act_max": max(h.abs().max().item() for h in hidden),
                        "act_rms": max(h.square().mean(dim=1).max().sqrt().item() for h in hidden),
                        "images_per_second": rate, "seconds": time.perf_counter() - start})
            say(", ".join(f"{name} {'none' if x is None else f'{x:.4g}'}" for name, x in log[-1].items()))
            losses, tick = [], time.perf_counter()
    return model, log


# --- The runs compared --------------------------------------------------------------------------------------
# Each is one line of results/cifar.jsonl, and is not repeated. Every part takes its choices from the lines of
# those before it.

RECORDS = RESULTS / "cifar.jsonl"
FIRST_LR = {"muon": 0.2, "adamw": 0.0013}  # to begin the search with
# The strengths of a method, weakest bound last: w_max or, with the two decays, weight_decay, in units of 1/lr
CAPS = [1.0, 2.0, 4.0, 8.0]
DECAYS = {("none", "muon"): [1.0, 0.4, 0.15, 0.0], ("none", "adamw"): [100.0, 30.0, 10.0, 0.0],
          ("spectral_weight_decay", "muon"): [4.0, 2.0, 1.0, 0.5],
          ("spectral_weight_decay", "adamw"): [300.0, 100.0, 30.0, 10.0]}
EQUAL = 0.005  # accuracies so near count as the same
ATTACKS = (0, 9, 18, 27, 36, 54, 72, 90, 108, 144, 180, 255)  # radii, in 255ths
# The presets, and the first with AdamW as long and with the paper's own 4,900 steps
ADAMW = {"preset": "cifar10", "optimizer": "adamw", "method": "none", "lr": 0.0013, "weight_decay": 0.08}
FULL = [options | {"seed": seed} for seed in (0, 1, 2) for options in (
    {"preset": "cifar10"}, ADAMW, ADAMW | {"max_steps": 4900, "eval_interval": 980},
    {"preset": "cifar10-tight"})]


def run(part, options):
    """The record of a run of a part: from RECORDS, or made. It has an "error" if the run diverged."""
    options = {"seed": 0} | options
    for record in read_lines(RECORDS):
        if record["options"] == options:
            return record
    say(f"{part}: {options}")
    data, device = read_images(), find_device()
    record = {"part": part, "options": options, "commit": commit()}
    if device.type == "cuda":
        record["device"] = torch.cuda.get_device_name()
    try:
        model, log = train(configure(options), data, device)
        refuse_alarm(log)
        traced = ("step", "train_loss", "norm_over_cap")
        record |= {name: value for name, value in log[-1].items() if name not in traced}
        record["log10_paper"] = record["log10_certified"]  # the published formula gives an MLP the same
        record["trace"] = {name: [line[name] for line in log] for name in traced}
        if part == "cifar-pairs":
            left = {eps: survives(model, data["val"], 1000, eps / 255) for eps in ATTACKS}
            record["attacked"] = {eps: which.double().mean().item() for eps, which in left.items()}
    except Diverged as e:
        record["error"] = str(e)
    append_line(RECORDS, record)
    return record


def tune(pair):
    """The best learning rate of a (method, optimizer), at the second strength."""
    options = {"preset": "cifar10", **strengths(*pair, CAPS, DECAYS)[1], "max_steps": 200,
               "eval_interval": 50, "attack_images": 16}
    return bracket(FIRST_LR[pair[1]], lambda lr: run("cifar-lr", options | {"lr": lr}))


def grid(pair):
    """A (method, optimizer) at all its strengths, at that learning rate; unconstrained at its own best."""
    common = {"preset": "cifar10", "max_steps": 500, "eval_interval": 250}
    at_strengths(lambda options: run("cifar-grid", common | options), strengths(*pair, CAPS, DECAYS),
                 tune(pair))


def equal_pairs():
    """For both optimizers the unconstrained run of the grid with the smallest training loss, and the
    constrained one of about its accuracy or more whose bound is the smallest: their options, with three seeds
    that had no part in the choice.
    """
    runs, found = [r for r in read_lines(RECORDS) if r["part"] == "cifar-grid" and "val_acc" in r], []
    free = [r for r in runs if r["options"].get("weight_decay") == 0]
    for optimizer in FIRST_LR:
        base = min((r for r in free if r["options"]["optimizer"] == optimizer), key=tuning_loss)
        as_good = [r for r in runs if r not in free and r["val_acc"] >= base["val_acc"] - EQUAL]
        found += [base["options"], min(as_good, key=lambda r: r["log10_certified"])["options"]]
    return [options | {"seed": seed} for seed in (1, 2, 3) for options in found]


PARTS = {"cifar": lambda: [run("cifar", options) for options in FULL],
         "cifar-lr": lambda: [tune(pair) for pair in pairs()],
         "cifar-grid": lambda: [grid(pair) for pair in pairs()],
         "cifar-pairs": lambda: [run("cifar-pairs", options) for options in equal_pairs()]}


# --- Command line -------------------------------------------------------------------------------------------

def refuse_alarm(log):
    if any(line["log10_certified"] is None for line in log):
        raise UserError("AN ATTACK IS ABOVE THE CERTIFICATE: no result is certified")


def parse(argv):
    """Command line -> Namespace, with the options of train that are given."""
    parser = Parser(description=__doc__.strip().split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="download the images")
    p = commands.add_parser("sweep", help="all runs of results/cifar.jsonl")
    p.add_argument("part", nargs="*", default=PARTS, help=f"{', '.join(PARTS)}; by default all")
    p = commands.add_parser("train", help="one run", argument_default=argparse.SUPPRESS)
    p.add_argument("--preset", choices=PRESETS, help="whose options hold unless given too [cifar10]")
    p.add_argument("--out_dir", type=Path, help="for weights and log [out/PRESET]")
    for field in dataclasses.fields(Config):
        help, low, high, choices = (field.metadata[key] for key in ("help", "low", "high", "choices"))
        help += "" if field.default is None else f" [{field.default}]"
        kind = str if choices else number(field.type, low, high)
        p.add_argument(f"--{field.name}", type=kind, choices=choices, help=help, metavar=field.type.__name__)
    return parser.parse_args(argv)


def main():
    given = vars(parse(sys.argv[1:]))
    with one_line_errors("cifar.py", "interrupted; the same command begins again what was not finished"):
        command = given.pop("command")
        if command == "prepare":
            prepare()
        elif command == "sweep":
            if unknown := {*given["part"]} - {*PARTS}:
                raise UserError(f"the parts are {', '.join(PARTS)}, not {', '.join(unknown)}")
            with FileLock(RECORDS.with_suffix(".part")):
                for part in given["part"]:
                    PARTS[part]()
        else:
            out = given.pop("out_dir", Path("out") / given.get("preset", "cifar10"))
            model, log = train(configure(given), read_images(), find_device())
            out.mkdir(parents=True, exist_ok=True)
            torch.save({"options": given, "weights": model.state_dict(), "log": log}, out / "model.pt.part")
            os.replace(out / "model.pt.part", out / "model.pt")
            refuse_alarm(log)


if __name__ == "__main__":
    main()
