"""The norm-free transformer whose weights constrain.py bounds.

    python model.py out/shakespeare/ckpt.pt --prompt "ROMEO:"     # write text with a trained model

There is no layer norm, no QK norm, no bias and no logit softcap. What keeps activations small is the
parametrization of Modula (Large et al., arXiv 2405.14813): every part is about 1-Lipschitz in the RMS norm
|v|_rms = |v|_2 / sqrt(dim v) when its matrices have RMS->RMS operator norm sqrt(n/m) * sigma_max = 1, for
(m, n) matrices of m outputs and n inputs. For other norms constrain.lipschitz_bounds has the constant of the
whole, proved for constrain.proved_function. An edit here that changes the function has to be proved and made
there too, or the model trains without a certificate.
"""
import math
import pickle
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from prepare import (Parser, Tokenizer, UserError, check_options, lacks_memory, number, one_line_errors,
                     option, say)

# --- Activations, and the projection onto a ball ------------------------------------------------------------

# GELU's largest slope, at sqrt(2): Phi(sqrt 2) + sqrt 2 * phi(sqrt 2) = 1.1289...
GELU_SLOPE = 0.5 * (1 + math.erf(1)) + math.exp(-1) / math.sqrt(math.pi)


def gelu(x):
    """GELU over its largest slope."""
    return F.gelu(x) / GELU_SLOPE


def maxmin(x):
    """Sorts the pairs (x_i, x_{i + n/2}) of x (..., n) (Anil et al., arXiv 1811.05381): a permutation."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=-1)


# One more trains at once; what a certificate may assume of it is said in constrain.PROVED
ACTIVATIONS = {"gelu": gelu, "maxmin": maxmin, "relu": F.relu}


def rms(x):
    """RMS norms of vectors (..., n): (..., 1)."""
    return x.square().mean(dim=-1, keepdim=True).sqrt()


def unit(x):
    """Vectors (..., n) scaled to RMS norm 1, zeros left."""
    return x / rms(x).clamp_min(1e-30)


def onto_ball(x, radius):
    """x (..., n), vectors whose RMS norm is above radius shortened to it: the nearest points in the ball."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    too_long = (x_wide.square().mean(dim=-1, keepdim=True) / radius ** 2).clamp_min(1).sqrt()  # 1 in the ball
    return x / too_long.to(x.dtype)


# --- The transformer ----------------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """The model's options, which are train.py's too; ValueError for values that no model can have."""
    vocab_size: int = 65
    block_size: int = option(256, "context length in tokens", 1, 10_000_000)
    n_layer: int = option(2, "blocks", 1, 10_000)
    n_head: int = option(4, "attention heads per block", 1, 10_000)
    n_embd: int = option(256, "width", 1, 1_000_000)
    softmax_scale: float = option(1.0, "attention scores are softmax_scale * <q, k> / d_head", 0, 1e9)
    logit_scale: float = option(1.0, "logits are logit_scale * head(x); the Lipschitz bounds include it",
                                1e-12, 1e12)
    # The paper's architecture has the values below; others are for small certificates (see the tight presets)
    position_bias: bool = option(False, "add to the scores a learned number for every head and distance")
    per_head: bool = option(False, "constrain W_q, W_k and W_v head by head: matrices (d_head, n_embd)")
    head_gain: bool = option(False, "learn how much each head counts, of the same sum of squares")
    attn_scale: float = option(1 / 3, "factor of attention's output", 1e-9, 1e9)
    alpha: float = option(None, "a block's weight against the residual's, by default 1/(2 n_layer); "
                          "1: no residual", 1e-9, 1)
    activation: str = option("gelu", "of the MLPs, a line of ACTIVATIONS", choices=ACTIVATIONS)
    mlp_layers: int = option(2, "linear layers of an MLP", 2, 1000)
    mlp_ratio: int = option(4, "width between them, over n_embd", 1, 1000)
    ball: float = option(None, "blocks project outputs onto the ball of this RMS norm", 1e-9, 1e9)
    zero_head: bool = option(False, "the output matrix begins at zero")

    def __post_init__(self):
        check_options(self)
        if self.alpha is None:  # such that the product of all gains stays bounded
            self.alpha = 1 / (2 * self.n_layer)
        if not self.softmax_scale and not self.position_bias:
            raise ValueError("softmax_scale=0 leaves attention nothing to go by; use position_bias")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of 2 * n_head = {2 * self.n_head}: "
                             "RoPE turns pairs of entries of each head")


class Linear(nn.Module):
    """y = W x for weight (m, n), initialized to RMS->RMS norm 1 with all singular values equal, or to zero.

    With stack=k the weight is (k, m, n): k matrices, applied in one product but constrained one by one.
    """
    def __init__(self, n_in, n_out, stack=None, zero=False):
        super().__init__()
        shape = (n_out, n_in) if stack is None else (stack, n_out, n_in)
        self.weight = nn.Parameter(torch.zeros(shape))
        if not zero:
            for W in self.weight.data.view(-1, n_out, n_in):
                nn.init.orthogonal_(W, gain=math.sqrt(n_out / n_in))

    def forward(self, x):
        return F.linear(x, self.weight.flatten(0, -2))  # (..., n) -> (..., m) or (..., k*m)


# Largest size of a score of distance: where softmax is saturated, no gradient could turn a head elsewhere. A
# head that looks one way with 12 has 0.2 % of its weight elsewhere; with 8, 8 %, which costs accuracy.
MAX_BIAS = 12.0


class Attention(nn.Module):
    """Causal attention with scores softmax_scale <q, k> / d_head, turned by RoPE, plus, with position_bias,
    bias[head, t - s], which costs the certificate nothing, as it does not depend on the input. At first head
    h looks, with a score of 8, first + h tokens back in the first layer, and twice, three times, ... as far
    in the next ones. At softmax_scale 0 there are no queries and keys.

    With per_head, a head's W_v (d_head, n_embd) of RMS->RMS norm 1 has singular values of 1/sqrt(n_head), so
    that all heads may read one subspace, and no number of them makes the value path's gain larger than 1.
    With head_gain a head's values are multiplied by a learned number, and train.py keeps the RMS of these at
    1 or below: what tells more about the next token moves the output by more, at no price in the bound.
    """
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.d_head = config.n_head, config.n_embd // config.n_head
        self.scale, self.out_scale = config.softmax_scale / self.d_head, config.attn_scale
        parts, size = (config.n_head, self.d_head) if config.per_head else (1, config.n_embd)
        self.qkv = Linear(config.n_embd, size, stack=parts * (3 if self.scale else 1))
        self.proj = Linear(config.n_embd, config.n_embd, zero=config.alpha < 1)
        self.gain = nn.Parameter(torch.ones(config.n_head)) if config.head_gain else None
        self.bias = None
        if config.position_bias:
            # without a residual, attention has to bring the token itself too
            first = int(config.alpha < 1)
            back = (first + torch.arange(config.n_head) * (layer + 1)).clamp_max(config.block_size - 1)
            self.bias = nn.Parameter(8.0 * F.one_hot(back, config.block_size))

    def heads(self, x, cos, sin):
        """([q, k] turned by RoPE, or [] without content; v), each (B, n_head, T, d_head), and the scores'
        bias: None or (n_head, T, T), whose entry (t, s) is self.bias[:, t - s] for s <= t, else -inf.
        """
        B, T, C = x.shape
        *qk, v = self.qkv(x).view(B, T, -1, self.n_head, self.d_head).unbind(2)  # each (B, T, n_head, d_head)
        v, bias = v.transpose(1, 2), None                                        # (B, n_head, T, d_head)
        if self.gain is not None:
            v = v * self.gain[:, None, None].to(v.dtype)
        if self.bias is not None:
            bias = F.pad(self.bias[:, :T].flip(1), (0, T - 1), value=-math.inf)
            bias = bias.unfold(1, T, 1).flip(1).to(v.dtype)
        return [rotate(t, cos, sin).transpose(1, 2) for t in qk], v, bias

    def forward(self, x, cos, sin):
        qk, v, bias = self.heads(x, cos, sin)
        y = attend(*qk, v, self.scale, bias) if qk else bias.softmax(dim=-1).to(v.dtype) @ v
        # Modula: a third, as the value, query and key paths have a gain of 1 each
        return self.out_scale * self.proj(y.transpose(1, 2).flatten(2))


def later(T, device):
    """(T, T), true where the key comes after the query: for the CPU and scores of content alone. Those of
    distance are masked in `heads`, and a GPU's kernel masks by itself.
    """
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


def attend(q, k, v, scale, bias):
    """Causal softmax(scale q k^T + bias) v of q, k, v (B, n_head, T, d_head), bias as from `heads`. On a CPU
    torch's kernel has a slow backward pass, so there the products are written out, in two halves: the first
    half of the queries sees the first half of the keys alone, a quarter of the work less.
    """
    T = q.shape[2]
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale)
    if bias is None:
        bias = q.new_zeros(T, T).masked_fill(later(T, q.device), -math.inf)
    q, halves = scale * q, []
    for start, end in ((0, T // 2), (T // 2, T)):
        scores = q[:, :, start:end] @ k[:, :, :end].mT + bias[..., start:end, :end]
        halves.append(scores.softmax(dim=-1) @ v[:, :, :end])
    return torch.cat(halves, dim=2)


def rotary_tables(block_size, d_head, base=10000.0):
    """cos and sin of RoPE's angles (Su et al., arXiv 2104.09864): float64 (block_size, 1, d_head/2) both."""
    freq = base ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float64), freq)[:, None]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + d_head/2}) of x (B, T, n_head, d_head) by angles: an orthogonal map. In the
    tables' float32: of bfloat16, torch 2.13's compiler made NaN on a CPU with AMX if d_head was 128 or more.
    """
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.mlp_ratio * config.n_embd
        self.fc = Linear(config.n_embd, width)
        self.mid = nn.ModuleList(Linear(width, width) for _ in range(config.mlp_layers - 2))
        self.proj = Linear(width, config.n_embd, zero=config.alpha < 1)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        for layer in (self.fc, *self.mid):
            x = self.activation(layer(x))
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.alpha, self.ball = config.alpha, config.ball
        self.attn = Attention(config, layer)
        self.mlp = FeedForward(config)

    def forward(self, x, cos, sin):
        x = torch.add((1 - self.alpha) * x, self.attn(x, cos, sin), alpha=self.alpha)
        x = torch.add((1 - self.alpha) * x, self.mlp(x), alpha=self.alpha)
        return x if self.ball is None else onto_ball(x, self.ball)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = Linear(config.n_embd, config.vocab_size, zero=config.zero_head)
        self.wte.weight.data = unit(self.wte.weight.data)
        cos, sin = rotary_tables(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)

    def forward(self, idx, targets=None, shift=None):
        """Ids (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), mean cross entropy in nats. A
        shift (B, T, n_embd) is added to the embeddings.
        """
        x, kind = self.wte(idx), idx.device.type
        if shift is not None:
            x = x + shift
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            if x.dtype == torch.float32:  # in which the blocks would add up; certificates are in float64
                x = x.to(torch.get_autocast_dtype(kind))
        logits = self.forward_embeddings(x)
        return logits, None if targets is None else self.loss(logits, targets)

    @staticmethod
    def loss(logits, targets):  # by itself, so that train.py can compile it
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def forward_embeddings(self, x):
        """Embeddings (B, T, n_embd) -> logits (B, T, vocab_size): the function that the bound is about."""
        T = x.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        cos, sin = self.cos[:T], self.sin[:T]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.config.logit_scale * x)  # GPT-2's logits are many more

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T), T at least 1, with max_new_tokens more; temperature 0 takes the likeliest token."""
        if idx.shape[1] == 0 or (top_k is not None and top_k < 1):
            raise ValueError("generate needs at least one token to go on from, and top_k=None or at least 1")
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1].float()  # (B, vocab_size)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature < 1e-6:  # divided by less than that, logits overflow
                next_idx = logits.argmax(dim=-1, keepdim=True)
            else:
                next_idx = torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1)
            idx = torch.cat((idx, next_idx), dim=1)
        return idx


# --- Checkpoints, text, and the command line ----------------------------------------------------------------

def load_checkpoint(path):
    """A checkpoint of train.py -> (model, checkpoint dict). Reads tensors and plain values only, no code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that damaged files seem to have
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**ckpt["model_config"])).eval()
        model.load_state_dict(ckpt["model"])
        ckpt["config"], ckpt["meta"], ckpt["step"]  # or KeyError
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; train one with python train.py, or say where it is")
    except Exception as e:  # torch.load and load_state_dict raise all kinds
        if lacks_memory(e):
            raise
        reason = " ".join(str(e).split())[:200]
        if isinstance(e, pickle.UnpicklingError):
            reason = "it holds more than tensors, or is damaged"
        raise UserError(f"{path} is not a checkpoint of this train.py ({type(e).__name__}: {reason})")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path} has weights that are not finite; nothing can be said of it")
    return model, ckpt


def sample(model, tokenizer, prompt=None, n_tokens=300, temperature=0.8, top_k=None):
    """A prompt and what the model writes after it; without one it begins a document, or a line."""
    ids = [tokenizer.start] if prompt is None else tokenizer.encode(prompt)
    ids = torch.tensor([ids]).to(model.wte.weight.device)
    ids = model.generate(ids, n_tokens, temperature, top_k)[0].cpu().tolist()
    return tokenizer.decode(ids if prompt is not None else ids[1:])


def main():
    parser = Parser(description="Write text with a trained model.")
    add = parser.add_argument
    add("ckpt", help="checkpoint written by train.py")
    add("--prompt", help="text to continue; without it, or at GPT-2's <|endoftext|>, a document begins")
    add("--tokens", type=number(int, 0, 10 ** 9), default=500, help="number of tokens to write [500]")
    add("--temperature", type=number(float, 0, 1e6), default=0.8, help="0 takes the likeliest token [0.8]")
    add("--top_k", type=number(int, 1, 10 ** 9), help="sample among the k likeliest tokens only")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0)
    args = parser.parse_args()
    with one_line_errors("model.py"):
        if args.prompt == "":
            raise UserError("the prompt is empty; leave --prompt out to begin anywhere")
        model, ckpt = load_checkpoint(args.ckpt)
        torch.manual_seed(args.seed)
        say(sample(model, Tokenizer(ckpt["meta"]), args.prompt, args.tokens, args.temperature, args.top_k))


if __name__ == "__main__":
    main()
