"""
What wants a GPU, on a machine that has one and nothing else, in order of worth:

    python results/gpu.py                              # 25 minutes; needs data/shakespeare and data/books
    python results/gpu.py bench w1 w16 --minutes=3     # these jobs alone, the 145 M models for 3 minutes each
    python results/gpu.py --tiny                       # a rehearsal, small enough for a CPU

Each job ends in a line of results/gpu.jsonl, so that a stop loses no more than the job it was at. A job that
fails, or whose data are not there, says so in its line, and the next one begins. data/books are those of
python prepare.py text books.txt --name books --tokenizer gpt2, of any long text.
"""
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))

from parts import append_line, read_lines
from prepare import Parser, UserError, commit, number, one_line_errors, say, to_json

OUT = ROOT / "out" / "gpu"
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "accumulate": 1,
        "max_steps": 4, "eval_interval": 2, "eval_tokens": 500, "compile": False}


class Failed(Exception):
    """A job has come to nothing, for the reason given."""


def run(name, seconds, *command):
    """
    The output of a Python script, which goes to out/gpu/NAME.txt too. After so many seconds it is asked to
    end as Ctrl-C would ask, upon which train.py saves; Failed if it ends otherwise than well.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.txt"
    with open(path, "w") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT)
        for patience, end in ((seconds, signal.SIGINT), (60, signal.SIGKILL)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
            process.send_signal(end)
        code = process.wait()
    text = path.read_text(errors="replace")
    if code:
        raise Failed(f"exit code {code}: {text.strip().splitlines()[-1] if text.strip() else 'no output'}")
    return text


def train(name, seconds, tiny, **options):
    """Options and log of a run of train.py: its last line, and of some numbers what they were all along."""
    options |= {name: value for name, value in TINY.items() if tiny}
    out = OUT / name
    if options.get("dataset", "shakespeare") == "books" and not (ROOT / "data" / "books").exists():
        raise Failed("there is no data/books")
    given = [f"--{key}={value}" for key, value in options.items()]
    run(name, seconds, "train.py", f"--out_dir={out}", *given)
    log = [line for line in read_lines(out / "log.jsonl") if "val_loss" in line]
    if not log:
        raise Failed(f"stopped after {seconds} s, before its first evaluation")
    traced = ("step", "train_loss", "val_loss", "val_acc", "log10_certified", "act_max", "act_rms", "seconds")
    return {"options": options, **log[-1], "trace": {key: [line[key] for line in log] for key in traced}}


# ------------------------------------------------------------------------------------------------------------
# The jobs

def tests(tiny, minutes):
    """The tests that a GPU is for."""
    names = "test_options" if tiny else "test_gpu"
    text = run("tests", 600, "-m", "pytest", "-q", "test_lip.py", "-k", names, "-p", "no:cacheprovider")
    return {"tests": text.strip().splitlines()[-1]}


def bench(tiny, minutes):
    """A step of the 145 M model, with the largest batch that fits."""
    sizes = [f"--{name}={value}" for name, value in TINY.items() if tiny and name != "batch_size"]
    for batch in (64, 32, 16, 8, 4):
        try:
            text = run("bench", 240, "results/bench.py", "step", "--preset=fineweb-w16", "--accumulate=1",
                       f"--batch_size={batch}", *sizes)
        except Failed as e:
            if "memory" not in str(e) and "GB or more" not in str(e):
                raise
        else:
            return {"batch_size": batch, **json.loads(text.strip().splitlines()[-1])}
    raise Failed("no batch fits into the memory")


def fineweb(w_max):
    """A job: the 145 M model on books for some minutes, at the rate that bench has found."""
    def job(tiny, minutes):
        found = [r for r in read_lines(record_path(tiny)) if r["job"] == "bench" and "error" not in r]
        if not found:
            raise Failed("bench, which says how large a batch fits and how many steps, is missing")
        batch, rate = found[-1]["batch_size"], found[-1]["tokens_per_second"]
        steps = max(4, int(50 * minutes * rate / (1024 * batch)))  # the rest is compilation and evaluations
        options = {"preset": f"fineweb-w{w_max}", "dataset": "books", "batch_size": batch, "accumulate": 1,
                   "max_steps": steps, "eval_interval": max(1, steps // 4), "eval_tokens": 262_144}
        return train(f"w{w_max}", 120 + 60 * minutes, tiny, **options)
    return job


def headline(n_head):
    """A job: the paper's shape with 65 million characters under a published bound of 2 without the scale."""
    options = {"n_layer": 3, "n_head": n_head, "position_bias": False, "w_max": 1.19, "logit_scale": 8.0,
               "lr": 0.06, "batch_size": 64, "max_steps": 4000, "eval_interval": 250}
    return lambda tiny, minutes: train(f"headline-{n_head}", 300, tiny, **options)


JOBS = {"tests": tests, "bench": bench,
        "default": lambda tiny, minutes: train("default", 240, tiny),
        "tight": lambda tiny, minutes: train("tight", 240, tiny, preset="tight"),
        "w1": fineweb(1), "w16": fineweb(16), "headline-32": headline(32), "headline-64": headline(64)}


def record_path(tiny):
    return OUT / "tiny.jsonl" if tiny else RESULTS / "gpu.jsonl"


def main(args):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise UserError("there is no GPU here; --tiny rehearses on the CPU")
    if not set(args.jobs) <= set(JOBS):
        raise UserError(f"the jobs are {', '.join(JOBS)}, not {' '.join(args.jobs)}")
    OUT.mkdir(parents=True, exist_ok=True)
    for name in args.jobs:
        start = time.perf_counter()
        try:
            result = JOBS[name](args.tiny, args.minutes)
        except Failed as e:
            result = {"error": str(e)}
        record = {"job": name, "device": device, "torch": torch.__version__, "commit": commit(),
                  "job_seconds": time.perf_counter() - start, **result}
        append_line(record_path(args.tiny), record)
        say(to_json({key: value for key, value in record.items() if key not in ("trace", "options")}))


if __name__ == "__main__":
    parser = Parser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("jobs", nargs="*", default=list(JOBS), help=", ".join(JOBS))
    parser.add_argument("--tiny", action="store_true",
                        help="small sizes, for a CPU; goes to out/gpu/tiny.jsonl")
    parser.add_argument("--minutes", type=number(float, 0.1, 1e4), default=3.0,
                        help="for each 145 M model [3]")
    args = parser.parse_args()
    with one_line_errors("gpu.py"):
        main(args)
