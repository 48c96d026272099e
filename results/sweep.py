"""The runs behind results/README.md, each one train.py and one line of results/NAME.jsonl.

    python prepare.py shakespeare --source tinyshakespeare.txt    # the canonical text
    python results/sweep.py                                       # all parts in turn
    python results/sweep.py grid --jobs=2                         # one part, two runs at a time

Finished runs are skipped, and a run that was stopped goes on from its checkpoint in out/sweep: Ctrl-C and
start again as often as you like. parts.py says which runs there are, measure.py what is measured of one
beside its log; cifar.py is about images.
"""
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT), str(RESULTS)]  # so that this is found from anywhere, and as results.sweep too

from certify import alarms
from measure import measurements
from model import load_checkpoint
from optim import keep_memory
from parts import PARTS, append_line, current, read_lines
from prepare import Parser, UserError, commit, number, one_line_errors, open_data, say
from train import configure

RUNS = ROOT / "out" / "sweep"
CANONICAL = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # sha256 of the text


# --- One run ------------------------------------------------------------------------------------------------

lock = threading.Lock()  # of the files, the screen and the children
children, stopping = set(), threading.Event()


def train(out, args, threads):
    """The exit code of train.py, and its last line. When this program is asked to end, so is train.py."""
    with open(out / "output.txt", "a") as output:
        with lock:
            if stopping.is_set():
                raise KeyboardInterrupt
            child = subprocess.Popen([sys.executable, "train.py", *args], cwd=ROOT, stdin=subprocess.DEVNULL,
                                     stdout=output, stderr=subprocess.STDOUT,
                                     env=os.environ | {"OMP_NUM_THREADS": str(threads)})
            children.add(child)
        code = child.wait()
        with lock:
            children.remove(child)
    if stopping.is_set():
        raise KeyboardInterrupt
    return code, (out / "output.txt").read_text(errors="replace").strip().split("\n")[-1]


def run(part, options, threads):
    """The record of train.py with options, from the part's file if it is there, else by running it. It has an
    "error" if the run diverged. UserError if train.py fails, or an attack passes the certificate.
    """
    options, path = PARTS[part].complete(options), RESULTS / f"{PARTS[part].records}.jsonl"
    with lock:
        record = next((r for r in current(path) if r["options"] == options), None)
    if record is None:
        record = new_record(part, options, threads)
        with lock:
            append_line(path, record)
            say(f"{part}: {options}: " + (record.get("error") or
                f"training loss {record['trace']['train_loss'][-1]:.4f} after {record['seconds']:.0f} s"))
    if "alarm" in record:
        raise UserError(f"{record['alarm']}, by {options}")
    return record


def new_record(part, options, threads):
    """Train, or go on where that was stopped, and measure."""
    args = [f"--{name}={value}" for name, value in options.items()]
    out = RUNS / sha256(" ".join(args).encode()).hexdigest()[:12]
    path, last = out / "ckpt.pt", configure(options).max_steps
    record = {"part": part, "options": options, "commit": commit()}
    if torch.cuda.is_available():
        record["device"] = torch.cuda.get_device_name()
    out.mkdir(parents=True, exist_ok=True)
    found = load_checkpoint(path) if path.exists() else None
    if found is None or found[1]["step"] < last:  # else it was stopped while it was measured
        code, said = train(out, [*args, f"--out_dir={out}", *["--resume"] * (found is not None)], threads)
        if code and "loss is" in said:
            return record | {"error": said}
        if code:
            raise UserError(f"train.py {' '.join(args)} failed: {said} (see {out / 'output.txt'})")
        found = load_checkpoint(path)
        if found[1]["step"] < last:
            raise KeyboardInterrupt  # train.py saved and stopped
    log = [line for line in read_lines(out / "log.jsonl") if "val_loss" in line]
    copied = ("log10_paper", "log10_published", "log10_certified", "act_max", "act_rms", "seconds")
    traced = ("step", "train_loss", "norm_over_cap", "val_acc", "val_loss", "act_max_layers",
              "act_rms_layers")
    record |= {name: log[-1][name] for name in copied}
    record["trace"] = {name: [line[name] for line in log] for name in traced}
    measured = PARTS[part].measured
    if "scores" in measured:
        record |= {k: v for k, v in log[-1].items() if k.startswith(("val_", "worst", "certified"))}
    elif measured:
        record |= measurements(*found, measured)
    if passed := next(alarms(record), None):
        record |= {"alarm": passed, "log10_certified": None}
    return record


# --- The command line ---------------------------------------------------------------------------------------

@contextmanager
def stoppable(pool):
    """What ends this block early, a signal too, ends the children, upon which train.py saves."""
    def interrupt(*_):
        raise KeyboardInterrupt
    wanted = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # by nohup
        wanted.append(signal.SIGHUP)
    before = {s: signal.signal(s, interrupt) for s in wanted}
    try:
        yield
    except BaseException:
        with lock:
            stopping.set()
            for child in children:
                child.terminate()
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        pool.shutdown(cancel_futures=True)


def failed(part, threads, job):
    """Do a job; whether it failed, which is said at once."""
    try:
        PARTS[part].search(partial(run, part, threads=threads), job)
    except (UserError, OSError, RuntimeError) as e:
        with lock:
            say(f"{part}: FAILED: {e}")
        return True
    return False


def main():
    parser = Parser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--jobs", type=number(int, 1, 1000), default=2,
                        help="runs at a time, which share the machine's cores")
    args = parser.parse_args()
    with one_line_errors("sweep.py", "stopped; the same command goes on"):
        if not set(args.parts) <= set(PARTS):
            raise UserError(f"the parts are {', '.join(PARTS)}, not {' '.join(args.parts)}")
        folder = ROOT / "data" / "shakespeare"
        needed = any(PARTS[part].records != "books" for part in args.parts)
        if needed and (not folder.exists() or open_data(folder)[0].get("sha256") != CANONICAL):
            raise UserError(f"{folder} is not the canonical text; "
                            "python prepare.py shakespeare --source its PATH_OR_URL")
        threads = max(1, os.cpu_count() // args.jobs)
        torch.set_num_threads(threads)
        keep_memory()
        failures, pool = 0, ThreadPoolExecutor(args.jobs)
        with stoppable(pool):
            for part in args.parts:
                failures += sum(pool.map(partial(failed, part, threads), PARTS[part].jobs()))
        if failures:
            raise UserError(f"{failures} jobs failed, as said above; the same command tries them again")


if __name__ == "__main__":
    main()
