"""What sweep.py measures of a checkpoint beside train.py's log: scores on the whole validation split, an
attack, certified radii, what float8 costs, and what a ball around the blocks would bring.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT), str(RESULTS)]

from certify import all_at_text, at_radii, at_text, attack, log10_radii, margins
from constrain import certificate, exact_model, layer_norms, log10
from optim import has_bf16
from prepare import open_data
from train import evaluate


class Float8(torch.overrides.TorchFunctionMode):
    """Rounds every result to float8_e4m3fn, whose largest number is 448. -inf, attention's mask, stays."""
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
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


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


def with_ball(model, layers, train, val):
    """What a ball around the outputs of a model's blocks makes of its certificate, if its radius is 1 % above
    all norms in 2^18 training tokens; and the largest norm in the validation text. If that is smaller, the
    function there is the same.
    """
    ball = 1.01 * largest_norm(model, train[:2 ** 18])
    layers = [layer._replace(ball=ball) for layer in layers]
    return {"ball": ball, "largest_norm": largest_norm(model, val),
            "log10_certified_ball": certificate(model, layers)[0]}


def measurements(model, ckpt, names):
    """Scores on the whole validation split, or 2^17 tokens of it, 2^15 of GPT-2's (train.py's are on
    eval_tokens), an attack, and what accuracy float8 costs on 2^14 tokens. With "radii" float8 on 2^17
    tokens, 5,337 of GPT-2's, a larger attack, but for GPT-2's, and certified radii; with "local" those at the
    text too, with "all" as well those of all predictions; with "ball" what one would do to the certificate.
    """
    model.requires_grad_(False)
    _, train, text = open_data(ROOT / "data" / ckpt["config"]["dataset"], like=ckpt["meta"])
    layers = layer_norms(model) if set(names) > {"attack"} else None
    large, radii = model.config.vocab_size > 10_000, "radii" in names  # GPT-2's, where all takes long
    text = text[:2 ** 15 if large else 2 ** 17]
    tokens = torch.from_numpy(text.astype(np.int64))
    dtype = ckpt["config"]["dtype"] or ("bfloat16" if has_bf16(torch.device("cpu")) else "float32")
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        result = evaluate(model, text, most=1 if large else None)
    few = {} if radii and not large else {"restarts": 4, "steps": 30}
    result["log10_attack"] = log10(attack(model, tokens=tokens, **few))
    some = text[:min(2 ** 17 if radii else 2 ** 14, 2 ** 28 // model.config.vocab_size) + 1]
    bears, right = margins(model, tokens[:len(some)])
    if radii:
        found = log10_radii(model, bears, layers)
        result["radii"] = at_radii(model, tokens[:len(some)], right, found)
        # 41 quantiles of the right predictions' radii: at 10 ** (the i-th) val_acc (1 - i / 40) is certified
        quantiles = torch.linspace(0, 1, 41, dtype=torch.float64)
        result["log10_radii"] = torch.quantile(found[right].double(), quantiles).tolist()
    if "local" in names:
        net = exact_model(model)
        result["local"] = at_text(net, layers, tokens)
        if "all" in names:
            result["all_at_text"] = all_at_text(net, layers, tokens)
    if "ball" in names:
        result |= with_ball(model, layers, train[0], text)
    result["float8_lost"] = right.double().mean().item() - evaluate(InFloat8(model), some, most=1)["val_acc"]
    return result | {"config": ckpt["config"]}
