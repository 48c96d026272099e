"""
The runs behind results/README.md, each one train.py and one line of results/shakespeare.jsonl; of tight.jsonl, cifar.jsonl or
books.jsonl those of the tight presets, of images, and of a text a hundred times as long.

    python prepare.py shakespeare --source tinyshakespeare.txt    # the canonical text; the parts cifar* and books need their own
    python results/sweep.py                                       # all parts in turn, see PARTS
    python results/sweep.py grid --jobs=2                         # one part, two runs at a time

Finished runs are skipped, and a run that was stopped goes on from its checkpoint in out/sweep: Ctrl-C and start again as
often as you like. Every part takes its choices from the lines of those before it.
"""
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from hashlib import sha256
from pathlib import Path
from statistics import mean

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))

from constrain import at_radii, attack, certificate, layer_norms, log10, log10_radii, margins, pgd
from model import load_checkpoint
from optim import has_bf16, keep_memory
from prepare import Parser, UserError, number, one_line_errors, open_data, say, to_json
from train import configure, evaluate, image_inputs

RECORDS, TIGHT, CIFAR, BOOKS = (RESULTS / f"{name}.jsonl" for name in ("shakespeare", "tight", "cifar", "books"))
RUNS = ROOT / "out" / "sweep"
CANONICAL = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # sha256 of the text

METHODS = ("soft_cap", "hard_cap", "svd_cap", "spectral_normalize", "stiefel", "spectral_hammer", "spectral_weight_decay", "none")
OPTIMIZERS = ("muon", "adamw")

# The strengths of a method, weakest bound first: w_max, or with the two decays weight_decay, which counts in units of 1/lr
CAPS = [1.0, 1.4, 2.0, 3.0, 5.0]
DECAYS = {("none", "muon"): [1.0, 0.5, 0.25, 0.12, 0.06, 0.0], ("none", "adamw"): [128.0, 64.0, 32.0, 16.0, 8.0, 0.0],
          ("spectral_weight_decay", "muon"): [7.0, 4.0, 2.0, 1.0, 0.5],
          ("spectral_weight_decay", "adamw"): [480.0, 240.0, 120.0, 60.0, 30.0]}
PAPER = {"n_layer": 3, "n_head": 4, "n_embd": 256, "softmax_scale": 1.0, "logit_scale": 1.0,
         "position_bias": False}  # its Shakespeare model
FIRST_LR = {"muon": 0.12, "adamw": 0.008}
LR_STEPS, STEPS, FINAL_STEPS = 100, 200, 400
BOUNDS = ("log10_certified", "log10_paper")
LIMITS = (2, 10, 100, 1e4, 1e8)
ASKED = [(BOUNDS[1], 2), *((BOUNDS[0], limit) for limit in LIMITS)]  # what the headline is about: most accuracy under these
GAIN = 0.0065  # a larger bound has to buy so much accuracy: the default's three seeds differ by as much
# Parts whose log is all that is wanted, whose measurements are thorough, and that say what a ball would bring
LOGGED = ("lr", "short", "long", "smoke", "wikitext")
THOROUGH = ("final", "equal", "tight", "robust", "longest", "books", "tokens")
BALL = ("final", "equal", "longest", "ball")

# The same on images, with the settings of the paper's notebook but for a quarter of its steps
IMAGE_CAPS = [1.0, 2.0, 4.0, 8.0]
IMAGE_DECAYS = {("none", "muon"): [1.0, 0.4, 0.15, 0.0], ("none", "adamw"): [100.0, 30.0, 10.0, 0.0],
                ("spectral_weight_decay", "muon"): [4.0, 2.0, 1.0, 0.5],
                ("spectral_weight_decay", "adamw"): [300.0, 100.0, 30.0, 10.0]}
IMAGE_LR, IMAGE_STEPS = {"muon": 0.2, "adamw": 0.0013}, 500
EQUAL = 0.005  # accuracies so near count as the same


def pairs():
    return [(method, optimizer) for method in METHODS for optimizer in OPTIMIZERS]


def strengths(method, optimizer, decays=DECAYS, caps=CAPS):
    """[options of train.py] for every strength of a method, weakest bound last."""
    if (method, optimizer) in decays:
        return [{"weight_decay": decay} for decay in decays[method, optimizer]]
    return [{"w_max": w_max} for w_max in caps]


image_strengths = partial(strengths, decays=IMAGE_DECAYS, caps=IMAGE_CAPS)


# ----------------------------------------------------------------------------------------------------------------------
# One run

def read(path=None):
    """All records so far of a file, by default RECORDS."""
    path = path or RECORDS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); mend or remove the line")


lock = threading.Lock()  # of the files and the screen


def version():
    """The commit of the code, "-dirty" if it has been changed since, "" where there is no git."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return ""
    git = lambda *args: subprocess.run(["git", *args, "--", "*.py"], cwd=ROOT, capture_output=True, text=True)
    return git("log", "-1", "--format=%h").stdout.strip() + ("-dirty" if git("diff", "--quiet", "HEAD").returncode else "")


def complete(part, options):
    """(file of its record, all options with which train.py is called) for a run of a part."""
    steps = options.get("max_steps", STEPS)
    evaluated = {"max_steps": steps, "eval_interval": steps // (20 if part == "longest" else 10), "eval_tokens": 4096}
    path, common = RECORDS, PAPER | evaluated
    if part.startswith("cifar"):
        path, common = CIFAR, {}
    elif part in BOOKS_PARTS:
        path, common = BOOKS, BOOKS_PARTS[part]
    elif part in ("tight", "ablation", "radius", "robust"):
        path, common = TIGHT, {"preset": "tight"} | evaluated | ({"eval_tokens": 32769} if part == "radius" else {})
    return path, {"seed": 0} | common | options


def run(part, options, threads):
    """
    The record of train.py with options, from the part's file if it is there, else by running it. It has an "error" if the
    run diverged.
    """
    path, options = complete(part, options)
    with lock:
        for record in read(path):
            if record["options"] == options:
                return record
    args = [f"--{name}={value}" for name, value in options.items()]
    out = RUNS / sha256(" ".join(args).encode()).hexdigest()[:12]
    step, last, code = 0, configure(options).max_steps, 0
    if (out / "ckpt.pt").exists():
        args.append("--resume")
        step = load_checkpoint(out / "ckpt.pt")[1]["step"]
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if step < last:  # else it was stopped while it was measured
        with open(out / "output.txt", "a") as output:
            code = subprocess.run([sys.executable, "train.py", *args, f"--out_dir={out}"], cwd=ROOT, env=environment,
                                  stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT).returncode
    said = (out / "output.txt").read_text().strip().split("\n")[-1]
    record = {"part": part, "options": options, "commit": version()}
    if torch.cuda.is_available():
        record["device"] = torch.cuda.get_device_name()
    if code and "loss is" in said:
        record["error"] = said
    elif code:
        raise UserError(f"train.py {' '.join(args)} failed: {said} (see {out / 'output.txt'})")
    else:
        log = read(out / "log.jsonl")
        if not log or log[-1]["step"] < last:
            raise KeyboardInterrupt  # train.py saved and stopped
        record |= {name: log[-1][name] for name in ("log10_paper", "log10_certified", "act_max", "act_rms", "seconds")}
        traced = ("step", "train_loss", "norm_over_cap") + ("val_acc", ) * part.startswith("long")
        traced += ("val_acc", "val_loss", "act_max_layers", "act_rms_layers") * (path is BOOKS)
        record["trace"] = {name: [line[name] for line in log] for name in traced}
        if part == "radius" or path is CIFAR:
            named = ("val_", "worst", "certified", "attacked")
            record |= {name: value for name, value in log[-1].items() if name.startswith(named)}
            if part == "cifar-pairs":
                record["attacked"] = attack_curve(out / "ckpt.pt")
        elif part not in LOGGED:
            record |= measurements(out / "ckpt.pt", part in THOROUGH, part in BALL)
    with lock:
        path.with_suffix(".part").write_text("".join(to_json(r) + "\n" for r in read(path) + [record]))
        os.replace(path.with_suffix(".part"), path)
        say(f"{part}: {' '.join(args)}: " + (record.get("error") or
              f"training loss {record['trace']['train_loss'][-1]:.4f}, "
              + (f"accuracy {record['val_acc']:.2%}, " if "val_acc" in record else "") +
              f"log10 certified {record['log10_certified']:.2f}, {record['seconds']:.0f} s"))
    return record


class Float8(torch.overrides.TorchFunctionMode):
    """Rounds the result of every operation to float8_e4m3fn, whose largest number is 448. -inf, attention's mask, stays."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        if not isinstance(y, torch.Tensor) or not y.is_floating_point():
            return y
        return torch.where(y == -math.inf, y, y.clamp(-448, 448).to(torch.float8_e4m3fn).to(y.dtype))


class InFloat8(torch.nn.Module):
    """A GPT whose weights and activations, all but the logits, are rounded to float8_e4m3fn."""
    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.head = model, model.config, model.head
        for p in model.parameters():
            p.data = p.data.to(torch.float8_e4m3fn).float()
        model.head = torch.nn.Identity()

    def forward(self, x, y):
        with Float8():
            h, _ = self.model(x)
        logits = self.head(h)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


@torch.inference_mode()
def largest_norm(model, tokens):
    """The largest RMS norm of a token's vector after any block, on a text (N,)."""
    T, largest = model.config.block_size, []
    measure = lambda block, args, y: largest.append(y.square().mean(dim=-1).max().sqrt().item())
    hooks = [block.register_forward_hook(measure) for block in model.blocks]
    tokens = torch.from_numpy(tokens.astype(np.int64))
    for windows in tokens[:len(tokens) // T * T].view(-1, T).split(16):
        model(windows)
    model(tokens[None, -T:])  # what the whole windows leave out
    for hook in hooks:
        hook.remove()
    return max(largest)


def with_ball(model, train, val):
    """
    What a ball around the outputs of a model's blocks makes of its certificate, if its radius is 1 % above all norms in 2^18
    training tokens; and the largest norm in the validation text. If that is smaller, the function there is the same.
    """
    ball = 1.01 * largest_norm(model, train[:2 ** 18])
    layers = [(*layer[:-1], ball) for layer in layer_norms(model)]
    return {"ball": ball, "largest_norm": largest_norm(model, val),
            "log10_certified_ball": certificate(model, layers=layers)[0]}


def measurements(path, thorough, ball):
    """
    What train.py's log does not have of a checkpoint: scores on the whole validation split, or 2^17 tokens of it, 2^15 of GPT-2's
    (train.py's are on eval_tokens), an attack, and the accuracy that float8 costs. If thorough, that on as many tokens too, 5,337
    of GPT-2's, and certified radii; with ball what one would do to the certificate.
    """
    model, ckpt = load_checkpoint(path)
    model.requires_grad_(False)
    folder = ROOT / "data" / ckpt["config"]["dataset"]
    cpu, (_, train, (text,)) = torch.device("cpu"), open_data(folder, like=ckpt["meta"])
    large = model.config.vocab_size > 10_000  # GPT-2's, where all takes long
    text = text[:2 ** 15 if large else 2 ** 17]
    tokens = torch.from_numpy(text.astype(np.int64))
    dtype = ckpt["config"]["dtype"] or ("bfloat16" if has_bf16(cpu) else "float32")
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        result = evaluate(model, text, cpu, 1 if large else 20 * 64)
    few = {} if thorough and not large else {"restarts": 4, "steps": 30}
    result["log10_attack"] = log10(attack(model, tokens=tokens, **few))
    some = text[:min(2 ** 17 if thorough else 2 ** 14, 2 ** 28 // model.config.vocab_size) + 1]
    bears, right = margins(model, tokens[:len(some)])
    if thorough:
        radii = log10_radii(model, bears, layer_norms(model))
        result["radii"] = at_radii(model, tokens[:len(some)], right, radii)
        radii = radii[right].double()
        # 41 quantiles of the right predictions' radii: at 10 ** (the i-th) certified accuracy is val_acc (1 - i / 40)
        result["log10_radii"] = torch.quantile(radii, torch.linspace(0, 1, 41, dtype=torch.float64)).tolist()
    if ball:
        result |= with_ball(model, train[0], text)
    result["float8_lost"] = right.double().mean().item() - evaluate(InFloat8(model), some, cpu, 1)["val_acc"]
    return result | {"config": ckpt["config"]}


def attack_curve(path):
    """{epsilon: accuracy that the attack leaves of the first 1,000 test images} of a checkpoint, epsilon in 255ths."""
    model, ckpt = load_checkpoint(path)
    _, _, val = open_data(ROOT / "data" / "cifar10", like=ckpt["meta"])
    x, y = image_inputs(val, np.arange(1000), "cpu")
    return {eps: pgd(model, x, y, eps / 255).double().mean().item() for eps in (0, 9, 18, 27, 36, 54, 72, 90, 108, 144, 180, 255)}


# ----------------------------------------------------------------------------------------------------------------------
# The parts

def bracket(lr, run_at):
    """Run at learning rates around lr, twice as large each, until the one with the smallest training loss is not at an end."""
    loss = lambda i: tuning_loss(run_at(lr * 2.0 ** i))
    losses = {i: loss(i) for i in (-1, 0, 1)}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)):
        i = best + (1 if best == max(losses) else -1)
        losses[i] = loss(i)


def tune(pair, threads):
    """Learning rates for a (method, optimizer) at the middle strength."""
    method, optimizer = pair
    options = {"method": method, "optimizer": optimizer, **strengths(method, optimizer)[2]}
    bracket(FIRST_LR[optimizer], lambda lr: run("lr", options | {"lr": lr, "max_steps": LR_STEPS}, threads))


def tuning_loss(record):
    """The mean training loss of the last 20 steps, on windows that no step before has seen."""
    return math.inf if "error" in record else sum(record["trace"]["train_loss"][-2:]) / 2


def chosen_lr(pair, records, part="lr"):
    """The best learning rate of a pair, from the records of tune; None if that has not been completed."""
    losses = {r["options"]["lr"]: tuning_loss(r) for r in records
              if r["part"] == part and (r["options"]["method"], r["options"]["optimizer"]) == pair}
    best = min(losses, key=losses.get, default=None)
    return None if not losses or best in (min(losses), max(losses)) else best


def lr_of(pair, path=None, part="lr"):
    lr = chosen_lr(pair, read(path), part)
    if lr is None:
        raise UserError(f"no learning rate has been chosen for {' and '.join(pair)}; first run python results/sweep.py {part}")
    return lr


def at_strengths(values, lr, run_at):
    """Run a method at each of its strengths."""
    for strength in values:
        if strength == {"weight_decay": 0.0}:  # unconstrained; the learning rate was tuned with decay, so that it says little
            bracket(lr, lambda lr: run_at(strength, lr))
        else:
            run_at(strength, lr)


def grid(pair, threads):
    options = {"method": pair[0], "optimizer": pair[1]}
    at_strengths(strengths(*pair), lr_of(pair), lambda strength, lr: run("grid", options | strength | {"lr": lr}, threads))


ONE, TWO = {"n_layer": 1, "n_embd": 400}, {"n_layer": 2, "n_embd": 288}  # about 2 M parameters; the grid has three layers
# Values of SEARCHED. One layer makes the certificate small, which leaves room for large scales; the logit scales are such that
# the bound comes out just below one of LIMITS.
SEARCHED = ("n_head", "w_max", "softmax_scale", "logit_scale", "w_max_mlp")
HEADLINE = ((ONE, 1, 1.0, 1.0, 1.0), (ONE, 1, 1.2, 1.0, 1.0), (ONE, 1, 1.5, 1.0, 1.0), (ONE, 1, 2.0, 1.0, 1.0),
            (ONE, 1, 1.0, 16.0, 0.33), (ONE, 1, 1.0, 64.0, 0.09), (ONE, 4, 1.0, 4.0, 0.55), (ONE, 4, 1.0, 16.0, 0.16),
            (ONE, 1, 1.0, 16.0, 1.6), (ONE, 4, 1.0, 4.0, 2.7), (ONE, 4, 1.0, 16.0, 0.8), (ONE, 4, 1.0, 64.0, 0.22),
            (ONE, 1, 1.5, 16.0, 1.5), (ONE, 4, 1.0, 16.0, 8.0), (ONE, 4, 1.0, 64.0, 2.2), (ONE, 4, 1.5, 16.0, 0.7),
            (ONE, 4, 2.0, 4.0, 0.45), (ONE, 4, 2.0, 16.0, 11.0), (ONE, 4, 3.0, 4.0, 3.0), (ONE, 4, 3.0, 16.0, 0.75),
            (ONE, 4, 4.0, 1.0, 1.6), (TWO, 1, 2.0, 4.0, 5.0),
            (ONE, 4, 8.0, 4.0, 30.0), (TWO, 4, 3.0, 4.0, 16.0), (TWO, 4, 4.0, 1.0, 1.5), (ONE, 4, 5.0, 4.0, 400.0),
            (ONE, 1, 2.0, 1.0, 0.32), (ONE, 4, 1.0, 4.0, 1.6), (ONE, 4, 1.0, 16.0, 5.5), (ONE, 4, 2.0, 4.0, 0.29),
            (ONE, 4, 3.0, 4.0, 0.08), (TWO, 4, 5.0, 1.0, 0.5), (ONE, 4, 2.0, 1.0, 0.8), (ONE, 4, 5.0, 1.0, 0.8),
            (ONE, 4, 3.0, 1.0, 12.0), (ONE, 4, 1.0, 16.0, 2.7, 2.0), (ONE, 4, 2.0, 16.0, 3.0, 4.0))


def headline(point, threads):
    shape, *values = point
    run("headline", {"method": "soft_cap", "optimizer": "muon", "lr": lr_of(("soft_cap", "muon")), **shape,
                     **dict(zip(SEARCHED, values))}, threads)


def frontier(records, bound):
    """The records whose accuracy is GAIN above that of all with a smaller bound, one of BOUNDS; weakest bound last."""
    best, found = -GAIN, []
    for record in sorted(records, key=lambda r: (r[bound], -r["val_acc"])):
        if record["val_acc"] >= best + GAIN:
            best = record["val_acc"]
            found.append(record)
    return found


def best_under(records, bound, limit):
    """The record of the largest accuracy with a bound of at most limit, or None if there is none."""
    return max((r for r in records if r[bound] <= math.log10(limit)), key=lambda r: r["val_acc"], default=None)


def searched(records, *parts):
    """The first seed's runs that did not diverge of the grid and the headline, or one of them, all of STEPS steps."""
    return [r for r in records if r["part"] in (parts or ("grid", "headline")) and "val_acc" in r]


def same_but_seed(records, options):
    return [r for r in records if r["options"] | {"seed": 0} == options | {"seed": 0} and "val_acc" in r]


def best_final(finals, bound, limit):
    """Of the final runs, lists of seeds, those with the best mean accuracy whose bounds are all at most limit, or None."""
    under = [runs for runs in finals if max(r[bound] for r in runs) <= math.log10(limit)]
    return max(under, key=lambda runs: mean(r["val_acc"] for r in runs), default=None)


def finals(records, part="final"):
    """The final runs of the paper's architecture, lists of seeds."""
    return [runs for r in records if r["part"] == part and r["options"]["seed"] == 0
            if len(runs := same_but_seed(records, r["options"])) > 1]  # at the other learning rate there is one seed


def frontier_seeds():
    """Two more seeds for every point on the frontier of either bound."""
    points = {str(r["options"]): r["options"] for bound in BOUNDS for r in frontier(searched(read()), bound)}
    return [point | {"seed": seed} for point in points.values() for seed in (1, 2)]


def finalists():
    """
    What is best under each bound that is asked for. Every bound is proportional to logit_scale; so runs whose bound is up to 1.5
    times too large take part, and who is not 5 % below, 15 % with two layers, as seeds differ, gets a smaller logit_scale.
    """
    runs, found = searched(read()), []
    for bound, limit in ASKED:
        if best := best_under(runs, bound, 1.5 * limit):
            options = best["options"]
            shrink = min(1.0, (1.05 - 0.1 * options["n_layer"]) * limit / 10 ** best[bound])
            options = options | {"logit_scale": float(f"{options['logit_scale'] * shrink:.2g}")}
            found += [options] if options not in found else []
    return found


def final(options, threads, part="final", steps=FINAL_STEPS):
    """A longer run at two learning rates, and two more seeds of that with the smaller training loss."""
    options = options | {"max_steps": steps, "eval_interval": steps // 10, "seed": 0}
    tried = [run(part, options | {"lr": options["lr"] * factor}, threads) for factor in (1.0, 0.5)]
    for seed in (1, 2):
        run(part, min(tried, key=tuning_loss)["options"] | {"seed": seed}, threads)


def headline_options():
    """The options of the best final for each bound that is asked for, to run as long as the tight preset."""
    candidates = finals(read())
    return [runs[0]["options"] for asked in ASKED if (runs := best_final(candidates, *asked))]


# The paper's headline: its shape with a published bound, without the scale, of at most 2 (at w_max 1.19 it is 1.86 if all norms
# are at their cap). `short` chooses one value after the other for each method and number of heads; `long` wants a GPU.
KINDS = [(method, n_head) for method in ("soft_cap", "spectral_normalize") for n_head in (4, 16, 32, 64)]
SHORT = {"batch_size": 32, "max_steps": 400, "compile": False, "lr": 0.12, "w_max": 1.19}
CHOICES = {"logit_scale": (4.0, 8.0, 32.0, 128.0), "lr": (0.12, 0.06)}
LONG, LONGEST = {"batch_size": 512, "max_steps": 500}, {"batch_size": 64, "max_steps": 4000}  # 65 million characters both


def unscaled(record):
    """log10 of the published formula without logit_scale, which the authors' code does not count."""
    return record["log10_paper"] - math.log10(record["options"]["logit_scale"])


def headline_loss(record):
    """The loss by which runs for the paper's headline are compared: infinite at a bound above its 2."""
    return math.inf if "error" in record or unscaled(record) > math.log10(2) else tuning_loss(record)


def short(kind, threads):
    options = SHORT | {"method": kind[0], "n_head": kind[1]}
    for name, values in CHOICES.items():
        tried = [run("short", options | {name: value}, threads) for value in values]
        options |= {name: min(tried, key=headline_loss)["options"][name]}


def best_of(part, *names):
    """For each value of the named options, or over all, the run of a part with the smallest loss; best first."""
    best = {}
    for record in sorted((r for r in read() if r["part"] == part), key=headline_loss):
        best.setdefault(tuple(record["options"][name] for name in names), record)
    return list(best.values())


def long_runs():
    """The best two methods and numbers of heads with 65 million characters, at two learning rates."""
    chosen = [{name: r["options"][name] for name in ("method", "n_head", "w_max", *CHOICES)}
              for r in best_of("short", "method", "n_head")[:2]]
    return [LONG | options | {"lr": options["lr"] * factor} for options in chosen for factor in (1.0, 0.5)]


def longest_runs():
    """The best two with as many characters in eight times as many steps."""
    return [options | LONGEST for options in long_runs()[::2]]


# The preset at several bounds: with all norms 1 the certified bound is logit_scale. Smaller ones want a larger learning rate.
# And the one that looks at content.
CONTENT = {"preset": "tight-content"}
STEEP = CONTENT | {"softmax_scale": 1.0}  # as it was when its ablation was made
LEVELS = ({"logit_scale": 7.99, "lr": 0.025}, {"logit_scale": 1.99, "lr": 0.05}, {"logit_scale": 29.0, "lr": 0.025},
          CONTENT)
TIGHT_STEPS, ABLATION_STEPS = 1200, 200
TIGHT_RUNS = [{"max_steps": TIGHT_STEPS} | level | {"seed": seed} for level in LEVELS for seed in (0, 1, 2)]

# The ball around a model of the paper's own shape, that of the grid with soft cap and Muon at w_max 2: its checkpoint is needed
def ball_runs():
    pair = "soft_cap", "muon"
    return [{"method": pair[0], "optimizer": pair[1], **strength, "lr": lr_of(pair), "eval_interval": STEPS // 2}
            for strength in strengths(*pair)[2:3]]


# The preset trained for a radius: each a change of the first, accuracies on the first 32,768 characters of validation text
RADIUS_RUNS = [{"max_steps": TIGHT_STEPS, "lr": 0.025, "radius": 0.1, "logit_scale": 8.0} | change for change in (
    *({"radius": radius, "logit_scale": scale} for radius in (0.03, 0.06, 0.1, 0.2) for scale in (4.0, 8.0, 16.0, 32.0)),
    {"radius": 0.0, "logit_scale": 2.0, "lr": 0.05}, {"radius": 0.0}, {"lr": 0.0125}, {"lr": 0.05}, {"radius": 0.2, "lr": 0.0125},
    {"radius": 0.2, "lr": 0.05}, {"mlp_layers": 6},
    {"n_embd": 768}, {"n_head": 16}, {"mlp_layers": 3}, {"cooldown": 0.5}, {"batch_size": 32})]


# The best of those, with six layers in the MLP, which brought half a point in runs of 400 steps
ROBUST = {"max_steps": TIGHT_STEPS, "lr": 0.025, "mlp_layers": 6}
ROBUST_RUNS = [ROBUST | {"radius": 0.06, "logit_scale": 4.0, "seed": 0}] + [
    ROBUST | level | {"seed": seed} for seed in (0, 1, 2)
    for level in ({"radius": 0.06, "logit_scale": 3.5, "max_steps": 1600}, {"radius": 0.2, "logit_scale": 8.0})]
# and one that looks at content: one layer, as a second multiplies the bound by ten
ROBUST_CONTENT = CONTENT | {"n_layer": 1, "softmax_scale": 0.1, "w_max": 3.2, "radius": 0.001}
ROBUST_RUNS += [ROBUST_CONTENT | {"max_steps": steps, "seed": seed} for steps in (TIGHT_STEPS, 1600) for seed in (0, 1, 2)]


# From the paper's architecture to the preset, one change after the other, and the preset with one thing taken back
CHANGES = ({"n_layer": 3, "n_head": 4, "n_embd": 256, "softmax_scale": 1.0, "position_bias": False, "per_head": False,
            "attn_scale": 1 / 3, "alpha": 1 / 6, "activation": "gelu", "mlp_layers": 2, "mlp_ratio": 4, "method": "soft_cap",
            "lr": 0.05},
           {"position_bias": True}, {"activation": "maxmin"}, {"softmax_scale": 0.0, "attn_scale": 0.5},
           {"n_layer": 1, "n_embd": 512, "n_head": 8, "attn_scale": 8 ** -0.5, "alpha": 0.5}, {"alpha": 1.0},
           {"mlp_layers": 4, "mlp_ratio": 1}, {"per_head": True, "attn_scale": 1.0}, {"method": "stiefel", "lr": 0.025})
BACK = ({"activation": "gelu"}, {"alpha": 0.5}, {"per_head": False, "attn_scale": 8 ** -0.5}, {"method": "soft_cap"},
        {"method": "hard_cap"}, {"method": "spectral_normalize"}, {"softmax_scale": 0.25}, {"mlp_layers": 2}, {"mlp_layers": 6},
        {"n_head": 4}, {"n_head": 16}, {"n_layer": 2, "mlp_layers": 2}, {"optimizer": "adamw", "lr": 0.002})
# Each alone on the paper's architecture, and each taken back from the preset that looks at content
ALONE = ({"activation": "maxmin"}, {"per_head": True, "attn_scale": 1.0}, {"attn_scale": 0.5}, {"alpha": 1.0},
         {"n_layer": 1, "n_embd": 400}, {"mlp_layers": 4, "mlp_ratio": 1}, {"method": "stiefel"}, {"w_max_mlp": 2.0}, {"w_max": 2.0},
         {"w_max": 2.0, "ball": 1.0})
CONTENT_BACK = ({"ball": 1e6}, {"per_head": False}, {"position_bias": False}, {"activation": "gelu"}, {"n_layer": 1},
                {"softmax_scale": 0.25}, {"w_max": 2.5})
ABLATIONS = [("the paper's architecture", {}, CHANGES[0]),  # (from what, what changes, all options)
             *(("+", CHANGES[i], reduce(dict.__or__, CHANGES[:i + 1])) for i in range(1, len(CHANGES))),
             *(("tight, but", change, change) for change in BACK),
             *(("the paper's, but", change, CHANGES[0] | change) for change in ALONE),
             ("content at softmax_scale 1", {}, STEEP), *(("that, but", change, STEEP | change) for change in CONTENT_BACK)]
ABLATION_RUNS = [{"max_steps": ABLATION_STEPS} | options for _, _, options in ABLATIONS]


# CIFAR-10: the paper's run with Muon, with AdamW as long and with its own 4,900 steps, and the network built for its certificate
ADAMW = {"optimizer": "adamw", "method": "none", "lr": 0.0013, "weight_decay": 0.08}
CIFAR_RUNS = [{"preset": preset, **options, "seed": seed} for seed in (0, 1, 2) for preset, options in (
    ("cifar10", {}), ("cifar10", ADAMW), ("cifar10", ADAMW | {"max_steps": 4900, "eval_interval": 980}), ("cifar10-tight", {}))]


# The same models on a hundred times the text, by character, one pass: 10 and 42 of 106 million characters, ten and forty times
# Shakespeare. Needs data/books-char, prepared by prepare.py from any long text; the longer runs want a GPU. Those that are not there
# for comparison alone have three seeds.
BOOKS_STEPS = 2560, 10_240
BOOKS_RUNS = [{"max_steps": steps, "eval_interval": steps // 10, **options} for steps in BOOKS_STEPS for options in (
    *({"position_bias": False} | change for change in ({"method": "none"}, {}, {"w_max": 2.0})),
    {"preset": "tight"}, {"preset": "tight-radius"}, CONTENT)]
BOOKS_RUNS += [run | {"seed": seed} for run in BOOKS_RUNS for seed in (1, 2)
               if run["max_steps"] == max(BOOKS_STEPS) and not {"method", "w_max"} & set(run)]

# The 145 M presets narrowed, on GPT-2 tokens of the same text (data/books): are they stable?
NARROW = {"dataset": "books", "n_layer": 4, "n_head": 2, "n_embd": 256, "block_size": 256, "batch_size": 8, "accumulate": 1,
          "momentum_warmup": 40, "max_steps": 120, "eval_interval": 30, "eval_tokens": 4097}
SMOKE_RUNS = [{"preset": f"fineweb-w{w}"} for w in (1, 4, 8, 16)]

# What made the first such run unstable, on half a million tokens of WikiText-2 (data/wikitext2)? Its learning rate was 0.13 for all
# matrices, the head too, and its scores were not scaled down at w_max 16
WIKITEXT = NARROW | {"dataset": "wikitext2", "batch_size": 16, "momentum_warmup": 50, "max_steps": 250, "eval_interval": 25}
FIRST = {"preset": "fineweb-w16", "method": "soft_cap", "zero_head": False, "lr_floor": 0.0, "embedding_lr": 0.1,
         "softmax_scale": 1.0, "lr": 0.13, "head_lr": 1.0}
WIKITEXT_RUNS = [FIRST, FIRST | {"softmax_scale": 128 ** 0.5 / 256}, FIRST | {"head_lr": 0.1},
                 FIRST | {"lr": 0.05, "embedding_lr": 0.26}]

# and longer, on a GPU, beside none of the constraints, and a model built for its certificate: one layer whose scores are of distance
# alone. 16 of the 25 million tokens.
LONGER = NARROW | {"batch_size": 32, "max_steps": 2000, "momentum_warmup": 300, "eval_interval": 200, "eval_tokens": 2 ** 15 + 1}
TOKENS_RUNS = [{"preset": "tight", "n_layer": 1, "n_head": 8, "logit_scale": 10.0, "embedding": "adam", "embedding_lr": 4.0},
               {"preset": "fineweb-w1"}, {"preset": "fineweb-w8"}, {"preset": "fineweb-w16"},
               {"preset": "fineweb-w16", "method": "none"}, {"preset": "fineweb-w4"}]

BOOKS_PARTS = {"smoke": NARROW, "wikitext": WIKITEXT, "tokens": LONGER,  # what all runs of a part have
               "books": {"dataset": "books-char", "eval_tokens": 2 ** 15 + 1}}


def images(pair, strength, lr, steps, every):
    method, optimizer = pair
    return {"preset": "cifar10", "method": method, "optimizer": optimizer, **strength, "lr": lr, "max_steps": steps,
            "eval_interval": every}


def image_tune(pair, threads):
    """Learning rates on images at the second strength."""
    strength = image_strengths(*pair)[1]
    bracket(IMAGE_LR[pair[1]], lambda lr: run("cifar-lr", images(pair, strength, lr, 200, 50) | {"attack_images": 16}, threads))


def image_grid(pair, threads):
    options = partial(images, pair, steps=IMAGE_STEPS, every=IMAGE_STEPS // 2)
    at_strengths(image_strengths(*pair), lr_of(pair, CIFAR, "cifar-lr"),
                 lambda strength, lr: run("cifar-grid", options(strength, lr), threads))


def image_pairs():
    """
    For both optimizers the unconstrained run with the smallest training loss, and the constrained one of about its accuracy or
    more whose bound is the smallest: [their options] with three seeds that had no part in the choice.
    """
    grid, found = [r for r in read(CIFAR) if r["part"] == "cifar-grid" and "val_acc" in r], []
    for optimizer in OPTIMIZERS:
        free = lambda r: r["options"].get("weight_decay") == 0 and r["options"]["optimizer"] == optimizer
        base = min(filter(free, grid), key=tuning_loss)
        as_good = [r for r in grid if r["options"].get("weight_decay") != 0 and r["val_acc"] >= base["val_acc"] - EQUAL]
        found += [base, min(as_good, key=lambda r: r["log10_certified"])]
    return [r["options"] | {"seed": seed} for seed in (1, 2, 3) for r in found]


# For each part, what lists its jobs, once the parts before it are done, and what does one with so many threads
PARTS = {"lr": (pairs, tune), "grid": (pairs, grid), "headline": (lambda: HEADLINE, headline),
         "seeds": (frontier_seeds, partial(run, "seeds")), "final": (finalists, final),
         "equal": (headline_options, partial(final, part="equal", steps=TIGHT_STEPS)),
         "short": (lambda: KINDS, short), "long": (long_runs, partial(run, "long")),
         "longest": (longest_runs, partial(run, "longest")),
         "ball": (ball_runs, partial(run, "ball")),
         "tight": (lambda: TIGHT_RUNS, partial(run, "tight")), "radius": (lambda: RADIUS_RUNS, partial(run, "radius")),
         "robust": (lambda: ROBUST_RUNS, partial(run, "robust")),
         "ablation": (lambda: ABLATION_RUNS, partial(run, "ablation")), "cifar": (lambda: CIFAR_RUNS, partial(run, "cifar")),
         "books": (lambda: BOOKS_RUNS, partial(run, "books")), "smoke": (lambda: SMOKE_RUNS, partial(run, "smoke")),
         "wikitext": (lambda: WIKITEXT_RUNS, partial(run, "wikitext")),
         "tokens": (lambda: TOKENS_RUNS, partial(run, "tokens")),
         "cifar-lr": (pairs, image_tune), "cifar-grid": (pairs, image_grid), "cifar-pairs": (image_pairs, partial(run, "cifar-pairs"))}


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--jobs", type=number(int, 1, 1000), default=2, help="runs at a time, which share the machine's cores")
    args = parser.parse_args()
    threads = max(1, os.cpu_count() // args.jobs)
    torch.set_num_threads(threads)
    keep_memory()
    pool = ThreadPoolExecutor(args.jobs)
    try:
        with one_line_errors("sweep.py", "stopped; the same command goes on"):
            if not set(args.parts) <= set(PARTS):
                raise UserError(f"the parts are {', '.join(PARTS)}, not {' '.join(args.parts)}")
            folder = ROOT / "data" / "shakespeare"
            needed = any(complete(part, {})[0] in (RECORDS, TIGHT) for part in args.parts)
            if needed and (not folder.exists() or open_data(folder)[0].get("sha256") != CANONICAL):
                raise UserError(f"{folder} is not the canonical text; python prepare.py shakespeare --source its PATH_OR_URL")
            for part in args.parts:
                jobs, f = PARTS[part]
                list(pool.map(lambda job: f(job, threads), jobs()))
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
