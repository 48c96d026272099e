"""What wants a GPU, on a machine that has one and nothing else, in order of worth:

    python results/gpu.py                               # 35 minutes; needs data/shakespeare and data/books
    python results/gpu.py profile bench w8 --minutes=9  # these jobs alone, and no longer than that
    python results/gpu.py --tiny                        # a rehearsal, small enough for a CPU

Each job ends in a line of results/gpu.jsonl, with an error if it fails, and the next begins. Training that
is cut off has saved, and the same command goes on with it; what out/gpu has finished is not run again. On
data/books (prepare.py text books.txt --name books --tokenizer gpt2, of any long text) are trained, on the
same batches, 145 M parameters: w8, w1, w8 without constraint (none), nanoGPT's architecture (baseline).
"""
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))

import bench
import model
import train
from parts import append_line, read_lines
from prepare import Parser, UserError, commit, number, one_line_errors, say, to_json

OUT = ROOT / "out" / "gpu"
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "accumulate": 1,
        "max_steps": 4, "eval_interval": 2, "eval_tokens": 500, "compile": False}


def run(name, seconds, *command, **environment):
    """The output of a Python script, which goes to out/gpu/NAME.txt too. After so many seconds it is asked to
    end as Ctrl-C would ask, upon which train.py saves; UserError if it ends otherwise than well.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.txt"
    with open(path, "w") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
        for patience, end in ((seconds, signal.SIGINT), (60, signal.SIGKILL)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
            process.send_signal(end)
        code = process.wait()
    text = path.read_text(errors="replace")
    if code:
        raise UserError(f"exit code {code}: {text.strip().splitlines()[-1] if text.strip() else 'no output'}")
    return text


# --- nanoGPT's architecture ---------------------------------------------------------------------------------
# As a baseline, with the settings of karpathy/nanoGPT for GPT-2: layer norm, GELU, no biases, one table for
# input and output, AdamW, gradients clipped, a learning rate that rises for 100 steps and falls as a cosine
# to a tenth. Positions are RoPE's, as in our transformer, instead of learned

class NanoBlock(model.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.norm_1, self.norm_2 = (nn.LayerNorm(config.n_embd, bias=False) for _ in range(2))

    def forward(self, x, cos, sin):
        x = x + self.attn(self.norm_1(x), cos, sin)
        return x + self.mlp(self.norm_2(x))


class NanoGPT(model.GPT):
    def __init__(self, config):
        super().__init__(config)
        self.norm, table = nn.LayerNorm(config.n_embd, bias=False), self._modules.pop("wte")
        table.weight, self.wte = self.head.weight, table  # behind head: a matrix, which decays
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer if ".proj." in name else 1))

    def forward_embeddings(self, x):
        for block in self.blocks:
            x = block(x, self.cos[:x.shape[1]], self.sin[:x.shape[1]])
        return self.head(self.norm(x))


def warmup_and_cosine(optimizers, step, config):
    falling = 0.1 + 0.9 * (1 + math.cos(math.pi * step / config.max_steps)) / 2
    for group in train.param_groups(optimizers):
        group["lr"] = lr = config.lr * min((step + 1) / 100, falling)
    return lr


def nanogpt(argv):
    """train.py with nanoGPT in place of our transformer; batches, evaluation and log are the same."""
    def clipped(net, *rest):
        found = gradients(net, *rest)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        return found

    gradients, train.gradients = train.gradients, clipped
    model.Block, model.GPT, train.GPT = NanoBlock, NanoGPT, NanoGPT
    model.ACTIVATIONS["whole_gelu"] = F.gelu
    train.set_schedule, train.constrain = warmup_and_cosine, lambda *_: None
    sys.argv[1:] = argv
    train.main()


# --- Where a step's time goes -------------------------------------------------------------------------------

def profiled(argv):
    """Ten of bench.py's steps: the twenty kernels, or on a CPU operations, that take most of their time."""
    def profile_step(step, device):
        bench.seconds = seconds
        step_ms, kind = 1e3 * bench.median(step, 10, device), "CUDA" if device.type == "cuda" else "CPU"
        with profile() as profiler:
            seconds(lambda: [step() for _ in range(10)], device)
        # calls and milliseconds of one step
        spent = "self_device_time_total" if kind == "CUDA" else "self_cpu_time_total"
        rows = [{"name": event.key[:60], "calls": event.count / 10, "ms": getattr(event, spent) / 1e4}
                for event in profiler.key_averages()
                if event.device_type.name == kind and not event.is_user_annotation]
        total, costliest = sum(row["ms"] for row in rows), sorted(rows, key=lambda row: -row["ms"])[:20]
        say(to_json({"step_ms": step_ms, "kernels_ms": total, "calls": sum(row["calls"] for row in rows),
                     "kernels": [row | {"share": row["ms"] / total} for row in costliest]}))
        sys.exit()

    seconds, bench.seconds = bench.seconds, profile_step  # which is called first with a step, after warm-up
    bench.step(argv)


def one_graph(argv):
    """bench.py's step with all of the forward pass compiled as one graph, head and loss with the blocks."""
    train.compile_blocks = lambda net, config, device: net.compile()
    bench.step(argv)


# --- The jobs: functions of name, options, and how many seconds there are -----------------------------------

def tests(name, args, seconds):
    """The tests that a GPU is for."""
    which = "test_options" if args.tiny else "test_gpu"
    text = run(name, seconds, "-m", "pytest", "-q", "test_lip.py", "-k", which, "-p", "no:cacheprovider")
    return {"tests": text.strip().splitlines()[-1]}


def a_step(*command, **environment):
    """A job: what a script finds of a step of the 145 M model, with the largest batch that fits."""
    def job(name, args, seconds):
        end, given = time.monotonic() + seconds, [*command, "--preset=fineweb-w16", "--accumulate=1"]
        if args.tiny:
            given += [f"--{key}={TINY[key]}" for key in TINY if key not in ("batch_size", "compile")]
            environment["TORCH_COMPILE_DISABLE"] = "1"
        for batch in (4, ) if args.tiny else (64, 32, 16, 8, 4):
            try:
                text = run(name, end - time.monotonic(), *given, f"--batch_size={batch}", **environment)
            except UserError as e:
                if "memory" not in str(e) and "GB or more" not in str(e):
                    raise
            else:
                return {"batch_size": batch, **json.loads(text.strip().splitlines()[-1])}
        raise UserError("no batch fits into the memory")
    return job


def on_books(args, share):
    """Options for a share of --tokens, 65,536 at a step in as few parts as fit, with eight evaluations."""
    fits = [r["batch_size"] for r in read_lines(args.records) if r["job"] == "bench" and "error" not in r]
    eighth = max(1, round(share * args.tokens / (8 * 65_536)))
    return {"dataset": "books", "batch_size": 64, "accumulate": 64 // fits[-1] if fits else 1,
            "max_steps": 8 * eighth, "eval_interval": eighth, "eval_tokens": 262_144}


def training(options, *script, share=0):
    """A job: options and log of a run of train.py, or of a script like it, on Shakespeare or for a share of
    --tokens on the books: the last evaluation, and its numbers all along. A run that was stopped goes on.
    """
    def job(name, args, seconds):
        given = options | (on_books(args, share) if share else {}) | (TINY if args.tiny else {})
        if share and not (ROOT / "data" / "books").exists():
            raise UserError("there is no data/books")
        read = lambda key: [line for line in read_lines(OUT / name / "log.jsonl") if key in line]
        begun = [line["options"] for line in read("options")[:1] if line["options"].items() >= given.items()]
        if not begun or begun[0]["max_steps"] not in [line["step"] for line in read("val_loss")]:
            command = [f"--{key}={value}" for key, value in given.items()] + ["--resume"] * len(begun)
            run(name, seconds, *(script or ["train.py"]), f"--out_dir={OUT / name}", *command)
        if not (log := read("val_loss")):
            raise UserError(f"stopped after {seconds:.0f} s, before an evaluation; the next call goes on")
        return {"options": given, **log[-1], "trace": {key: [line[key] for line in log] for key in log[-1]}}
    return job


STEP, W8 = ("results/bench.py", "step"), {"preset": "fineweb-w8"}
NANOGPT = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "softmax_scale": 8.0,  # 64^0.5
           "attn_scale": 1.0, "position_bias": False, "zero_head": True, "activation": "whole_gelu",
           "optimizer": "adamw", "lr": 6e-4, "weight_decay": 0.1, "method": "none", "w_max": 1.0}
HEADLINE = {"n_layer": 3, "position_bias": False, "w_max": 1.19, "logit_scale": 8.0, "lr": 0.06,
            "batch_size": 64, "max_steps": 4000, "eval_interval": 250}  # published: 2, but for the scale
JOBS = {
    "tests": tests, "profile": a_step("results/gpu.py", "profiled"),
    # switches of a step, each measured by itself: a command, with options or environment
    "bench": a_step(*STEP, "--compile=true"), "bench-one-graph": a_step("results/gpu.py", "one-graph"),
    "bench-tuned": a_step(*STEP, "--compile=true", TORCHINDUCTOR_MAX_AUTOTUNE="1",  # as the mode
                          TORCHINDUCTOR_COORDINATE_DESCENT_TUNING="1"),  # max-autotune-no-cudagraphs
    "bench-eager": a_step(*STEP, "--compile=false"),
    "w8": training(W8, share=1), "baseline": training(NANOGPT, "results/gpu.py", "nanogpt", share=1),
    "none": training(W8 | {"method": "none"}, share=1), "w1": training({"preset": "fineweb-w1"}, share=0.5),
    "default": training({}), "tight": training({"preset": "tight"}),
    **{f"headline-{n}": training(HEADLINE | {"n_head": n}) for n in (32, 64)}}


def main(args):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise UserError("there is no GPU here; --tiny rehearses on the CPU")
    if not set(args.jobs) <= set(JOBS):
        raise UserError(f"the jobs are {', '.join(JOBS)}, not {' '.join(args.jobs)}")
    OUT.mkdir(parents=True, exist_ok=True)
    args.records = OUT / "tiny.jsonl" if args.tiny else RESULTS / "gpu.jsonl"
    end = time.monotonic() + 60 * args.minutes
    for i, name in enumerate(args.jobs):
        start = time.monotonic()
        if start > end - 5:
            return say(f"no time is left for {', '.join(args.jobs[i:])}")
        try:
            result = JOBS[name](name, args, min(600, end - start))  # a call on a lent machine is as long
        except UserError as e:
            result = {"error": str(e)}
        record = {"job": name, "device": device, "torch": torch.__version__, "commit": commit(),
                  "job_seconds": time.monotonic() - start, **result}
        append_line(args.records, record)
        say(to_json({key: value for key, value in record.items() if key not in ("trace", "options")}))


if __name__ == "__main__":
    with one_line_errors("gpu.py"):
        children = {"nanogpt": nanogpt, "profiled": profiled, "one-graph": one_graph}  # processes of jobs
        if child := children.get(*sys.argv[1:2] or [None]):
            sys.exit(child(sys.argv[2:]))
        parser = Parser(description=__doc__.strip().split("\n")[0])
        add = parser.add_argument
        add("jobs", nargs="*", default=list(JOBS), help=", ".join(JOBS))
        add("--tiny", action="store_true", help="small sizes, for a CPU; goes to out/gpu/tiny.jsonl")
        add("--tokens", type=number(float, 1e6, 1e12), default=1e8,
            help="of the books for each model, half of it for w1 [1e8: four passes]")
        add("--minutes", type=number(float, 0.1, 1e4), default=60.0,
            help="after which the job that runs is stopped, to go on at the next call [60]")
        main(parser.parse_args())
