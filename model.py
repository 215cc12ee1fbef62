"""Llama 2, written out.

A decoder-only transformer maps T token ids to T predictions of the next token. Llama's block is

    h = x + attention(norm(x))          attention: every token looks back at the earlier ones
    y = h + feed_forward(norm(h))       feed_forward: every token thinks for itself

and a model is an embedding, n_layers blocks, a last norm and a head ("Llama 2", section 2.2). In numbers for 7B: dim 4096,
32 blocks of 4 x 4096 x 4096 (attention) + 3 x 4096 x 11008 (feed-forward) = 202 million weights each, plus two
32,000 x 4096 tables (embedding and head): 6.74 billion weights, 13.5 GB in 16 bits.
Reading one token costs about two FLOPs a weight.

Three choices keep this file short:
  * One stream. The model reads a single row of T tokens that holds whole documents end to end. `cu_seqlens`, their cumulative
    lengths, says where each begins; attention never crosses a border and positions restart there. So there is no padding and no
    batch axis.
  * Meta's names (tok_embeddings, attention.wq, feed_forward.w1, ...) are the names of the modules: Meta's files load as they are.
    `from_hf` and `to_hf` (weights/names.py) hold all that differs in Hugging Face's files.
  * What knows file formats stands in weights/ and comes in through the last lines: `load_model` and `read_config`
    (weights/reading.py), `save_hf` and `save_meta` (weights/writing.py).
"""

import warnings
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusing import attention as blockwise

warnings.filterwarnings("ignore", message=".*complex operators")  # torch.compile's, of two views of RoPE's table


class CheckpointError(ValueError):
    """A file of weights or its configuration is missing, broken, or not what the model needs."""


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Llama. The defaults are Llama 2 7B."""

    dim: int = 4096  # width of the residual stream
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # fewer than n_heads = grouped-query attention: several query heads share a key and a value head
    hidden_dim: int = 11008  # width inside the feed-forward layer
    vocab_size: int = 32000
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 4096  # the window the weights were trained with; nothing is allocated for it

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, field.type | int) or value <= 0:
                raise TypeError(f"{field.name} is {value!r}")
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise TypeError(
                f"dim {self.dim} must divide into n_heads {self.n_heads} heads of even size, "
                f"and n_heads into n_kv_heads {self.n_kv_heads} groups"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


PRESETS = {
    "125m": ModelConfig(dim=768, n_layers=12, n_heads=12, n_kv_heads=12, hidden_dim=2048),
    "1b": ModelConfig(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632),
    "7b": ModelConfig(),
    "13b": ModelConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824),
    "70b": ModelConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672),
}


# ---------------------------------------------------------------------------------------------------------------------
# The architecture. Shapes: T tokens in the stream, C = dim, F = hidden_dim, H query heads, K key/value heads of D numbers,
# V vocabulary.


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 within ("Root Mean Square Layer Normalization", equation 4).

    On a GPU PyTorch's fused kernel keeps for backward x, which is there anyway, and one number a token. Separate operations, of
    which its norm is made on a CPU, keep x in fp32: 7B, two norms x 2,048 tokens x 4,096 x 4 bytes = 67 MB a layer."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rope_table(positions: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The rotations of every position as complex numbers e^(i x angle), complex64 (T, 1, D/2): pair i turns by
    position x theta^(-2i/D) (RoFormer, section 3.2.2).

    Made afresh each forward pass (T x D/2 numbers, next to nothing), so there is no table to size, move or save."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None].float() * config.rope_theta**-exponents  # (T, D/2)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def apply_rope(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate each neighbouring pair of x (T, heads, D) by its position's angle (RoFormer, equation 34).

    A query at position m and a key at n then meet in a product that depends on m - n alone. A pair is one complex number and
    a rotation one product, in a third of the time of sines and cosines written out. Those are for torch.compile, which fuses
    them and cannot fuse complex numbers. The pairs are (0,1), (2,3), ... as in Meta's weights; Hugging Face pairs (0, D/2),
    (1, D/2+1), ... and stores its rows in another order to match."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (T, heads, D/2, 2)
    if torch.compiler.is_compiling():
        (a, b), cos, sin = pairs.unbind(-1), rotations.real, rotations.imag
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    return pairs.flatten(-2).to(x.dtype)


def textbook_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D) + mask) V ("Attention Is All You Need", equation 1), the reference for every faster way.

    q (H, Tq, D), k and v (H, Tk, D), mask (Tq, Tk) true where looking is allowed. Keeps H x Tq x Tk numbers for backward, in fp32
    what softmax made and in 16 bits what meets V: in 7B at 2,048 tokens 32 x 2048 x 2048 x (4 + 2) bytes = 0.8 GB a layer."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(dim=-1).to(q.dtype) @ v


def attention_over_documents(q, k, v, cu_seqlens: torch.Tensor, method: str) -> torch.Tensor:
    """Causal attention within each document of the stream. q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    if method == "varlen" or (method == "sdpa" and has_varlen(q)):
        # One fused kernel for all documents; T bounds their length without asking the GPU for the longest.
        from torch.nn.attention.varlen import varlen_attn

        if (group := q.shape[1] // k.shape[1]) > 1:  # for a group of one it would be a copy
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, len(q), len(q), window_size=(-1, 0))  # causal
    return attention_one_by_one(q, k, v, cu_seqlens, method)


@torch.compiler.disable  # as many turns as there are documents: not a shape to compile for
def attention_one_by_one(q, k, v, cu_seqlens, method: str) -> torch.Tensor:
    """The same where no kernel takes all documents at once: a loop over them."""
    lengths = [end - start for start, end in pairwise(cu_seqlens.tolist())]
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)  # of parts (heads, t, D)
    return torch.cat([attention_over_keys(*parts, method).transpose(0, 1) for parts in documents])


def has_varlen(x: torch.Tensor) -> bool:
    """Whether flash attention runs where and as x is: 16 bits, on a GPU since Ampere (not on a T4 or V100)."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def attention_over_keys(q, k, v, method: str) -> torch.Tensor:
    """Causal attention of q (H, Tq, D), the last Tq of Tk tokens, over k and v (K, Tk, D) -> (H, Tq, D)."""
    if method == "sdpa" and blockwise.helps(q, k):  # on a CPU in bf16 the fused kernel's equations, by hand, are faster than it
        return blockwise.attention_in_blocks(q, k, v)
    (heads, new, _), (kv_heads, seen, _), mask = q.shape, k.shape, None
    if method == "textbook" or new < seen:  # (Tq, Tk), true where each may look: at itself and before
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(diagonal=seen - new)
    # On a GPU kernels for fp32, or with a mask, know no shared heads ("one by one": memory.py's, as if on one).
    if heads != kv_heads and (method != "sdpa" or q.device.type != "cpu"):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
    if method == "textbook":
        return textbook_attention(q, k, v, mask)
    # PyTorch's fused kernel never writes the (Tq, Tk) scores to memory (FlashAttention, section 3.1). Its own causal mask
    # counts queries and keys from the beginning alike, which is right where all tokens are new.
    fused = partial(F.scaled_dot_product_attention, is_causal=mask is None, enable_gqa=heads != len(k))
    return fused(q[None], k[None], v[None], mask)[0]


class Attention(nn.Module):
    """Grouped-query attention ("GQA", section 2.2): H query heads, each group of H/K of them sharing one key and value head."""

    def __init__(self, config: ModelConfig, method: str):
        super().__init__()
        self.head_dim, self.method = config.head_dim, method
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x, rotations, cu_seqlens, cached=None) -> torch.Tensor:
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (T, H, D)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        q, k = apply_rope(q, rotations), apply_rope(k, rotations)
        attend = attention_over_documents if cached is None else cached
        out = attend(q, k, v, cu_seqlens, self.method)
        return self.wo(out.flatten(-2))  # (T, C)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps the two for backward and makes silu(gate) once more there: one cheap pass, instead of
    T x F numbers a layer (7B at 2,048 tokens: 45 MB in each of 32). With s = silu(gate), by the product rule:

    d up = d product * s        d gate = d product * up * s'(gate)"""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, by_product):
        gate, up = ctx.saved_tensors
        by_gate = by_product * up
        torch.ops.aten.silu_backward(by_gate, gate, grad_input=by_gate)  # times s'(gate), in place
        return by_gate, F.silu(gate).mul_(by_product)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x) ("GLU Variants Improve Transformer", section 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(SwiGLU.apply(self.w1(x), self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        self.attention = Attention(config, attention)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, rotations, cu_seqlens, cached=None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotations, cu_seqlens, cached)
        return x + self.feed_forward(self.ffn_norm(x))


class KVCache:
    """The keys and values of the tokens already read, so that each new token costs one pass of one token.

    Room for `sequences` of up to max_len tokens each, of any lengths. Two tensors (n_layers, sequences, K, max_len, D): 7B in
    16 bits needs 2 x 32 x 32 x 128 x 2 bytes = 0.5 MB a token. On a CPU they are fp32 whatever the weights are: fused attention
    of one token is several times as fast there as in bf16, and the cache small beside the weights.
    static: look at all the room, not only up to the longest sequence, so that no shape changes and torch.compile sees one."""

    def __init__(self, config: ModelConfig, max_len: int, device, dtype: torch.dtype, sequences: int = 1, static: bool = False):
        shape = (config.n_layers, sequences, config.n_kv_heads, max_len, config.head_dim)
        dtype = torch.float32 if torch.device(device).type == "cpu" else dtype
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.rows, self.static = torch.arange(sequences, device=device), static
        # Tokens looked at: a multiple of this. cuDNN, which PyTorch takes on an H100, plans some 30 ms for each new number.
        self.multiple = 1 if self.keys.device.type == "cpu" else 64
        if static:  # a CUDA graph may then write into them where they are
            for tensor in (self.keys, self.values, self.lengths, self.rows):
                torch._dynamo.mark_static_address(tensor)

    def drop(self, row: int) -> None:
        """Forget a sequence. The last one takes its place."""
        for part in (self.keys, self.values):
            part[:, row] = part[:, len(self.lengths) - 1]
        self.lengths[row] = self.lengths[-1]
        self.lengths = self.lengths[:-1]

    def visible(self) -> torch.Tensor:
        """(B, 1, 1, span), to be added to scores: 0 where the next token of each sequence may look, at itself and before, -inf
        elsewhere. Made once a step; a mask of true and false would be turned into these numbers by every layer."""
        room = self.keys.shape[3]
        span = room if self.static else min(room, -(-(int(self.lengths.max()) + 1) // self.multiple) * self.multiple)
        behind = torch.arange(span, device=self.lengths.device) <= self.lengths[:, None]
        return torch.where(behind, 0.0, float("-inf")).to(self.keys.dtype)[:, None, None]

    def attend(self, layer: int, visible: torch.Tensor | None, q, k, v, cu_seqlens, method: str) -> torch.Tensor:
        """Keep the keys and values (T, K, D) of new tokens; let their queries (T, H, D) look at their own sequence up to
        themselves. visible: given in decoding, where each sequence has one new token."""
        keys, values, dtype = self.keys[layer], self.values[layer], q.dtype
        if visible is not None:
            q, k, v = q.to(keys.dtype), k.to(keys.dtype), v.to(keys.dtype)
            rows, span = self.rows[: len(q)], visible.shape[-1]
            keys[rows, :, self.lengths], values[rows, :, self.lengths] = k, v
            q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, D): queries that share a key head are rows of one matrix
            k, v = keys[: len(q), :, :span], values[: len(q), :, :span]
            textbook = method == "textbook"
            out = textbook_attention(q, k, v, visible == 0) if textbook else F.scaled_dot_product_attention(q, k, v, visible)
            return out.flatten(1, 2).to(dtype)  # (B, H, D)
        out = []
        for row, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            held = int(self.lengths[row])
            total = held + end - start
            keys[row, :, held:total], values[row, :, held:total] = k[start:end].transpose(0, 1), v[start:end].transpose(0, 1)
            seen = keys[row, :, :total].to(dtype), values[row, :, :total].to(dtype)
            out.append(attention_over_keys(q[start:end].transpose(0, 1), *seen, method).transpose(0, 1))
        return torch.cat(out)


class Llama(nn.Module):
    """The whole model. New weights are drawn from N(0, 0.02^2); `load_model` replaces them by real ones.

    attention: "sdpa" (never all scores at once) or "textbook" (the three lines one can read, with the T x T matrix in memory)."""

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        if attention not in ("sdpa", "textbook"):
            raise CheckpointError(f"unknown attention {attention!r}: known are sdpa, textbook")
        self.config = config
        self.gradient_checkpointing = False
        self.computed_on = None  # the device, where it is not that of the weights: these may wait in the host's memory
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.computed_on or self.norm.weight.device

    def forward(self, tokens, cu_seqlens=None, labels=None, cache: KVCache | None = None) -> torch.Tensor:
        """One pass over a stream.

        tokens (T,) int64; cu_seqlens (documents + 1,) int32, the documents' borders from 0 to T (none given: one document);
        labels (T,) int64, the token to predict at each position, or -100 for none.
        Returns with labels the summed cross-entropy over the labelled positions (fp32 scalar), else the logits (T, V).
        With a cache document b continues the cache's sequence b, and only the logits (B, V) of their last tokens are computed."""
        positions = torch.arange(len(tokens), device=tokens.device)
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device)
        document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        positions = positions - cu_seqlens[document]  # counted from the border each token's document begins at
        visible = None
        if cache:
            positions = positions + cache.lengths[document]
            visible = cache.visible() if len(tokens) == len(cu_seqlens) - 1 else None
        rotations = rope_table(positions, self.config)

        x = self.tok_embeddings(tokens)  # (T, C)
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training and cache is None:
                # Keep only the block's input and compute the block, less its last product, again in backward: far less memory,
                # and a quarter more work, or with LoRA a half: frozen weights get no gradients, so backward is one forward.
                x = checkpoint(layer, x, rotations, cu_seqlens, use_reentrant=False)
            else:
                x = layer(x, rotations, cu_seqlens, partial(cache.attend, i, visible) if cache else None)
        if cache:
            cache.lengths += cu_seqlens.diff()
            x = x[cu_seqlens[1:] - 1]
        x = self.norm(x)
        return self.output(x) if labels is None else summed_loss(x, self.output, labels)


def summed_loss(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Cross-entropy summed over the labelled positions of hidden (T, C), as an fp32 scalar.

    The logits exist only where there is a label and only a chunk at a time: those of 8,192 tokens would be 1 GB in fp32, and
    their gradient as much."""
    supervised = labels != -100
    hidden, labels = hidden[supervised], labels[supervised]
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(hidden, labels, head, chunk, *_trained(head))
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, label in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total += F.cross_entropy(head(part).float(), label, reduction="sum")
    return total


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and its gradient in one visit to each chunk of logits.

    The loss is the last thing computed, so its gradient can be found at once, while a chunk's logits are there:
    d loss / d logits = softmax(logits) - onehot(label). Keeping that of the hidden states (T x C) instead of the logits
    (T x V), nothing is computed again in backward, which only scales by what comes from above."""

    @staticmethod
    def forward(ctx, hidden, labels, head, chunk, *weights):  # the head's weights, or autograd would ask for no gradient of them
        def visit(place, part, label):
            """A chunk's loss. Its gradients go where they are summed, and all else ends with the visit."""
            with torch.enable_grad():
                logits = head(part.requires_grad_())
            log_probs = logits.detach().float().log_softmax(-1)
            loss = -log_probs.gather(1, label[:, None]).sum()
            by_logits = log_probs.exp_()
            by_logits[torch.arange(len(label), device=label.device), label] -= 1
            by_part, *by_weights = torch.autograd.grad(logits, (part, *_trained(head)), by_logits.to(logits.dtype))
            place.copy_(by_part)
            for total, grad in zip(ctx.by_weights, by_weights, strict=False):
                total += grad
            ctx.by_weights = ctx.by_weights or by_weights  # the first chunk's are the sum's beginning
            return loss

        ctx.by_hidden, ctx.by_weights = torch.empty_like(hidden), []
        chunks = zip(*(x.split(chunk) for x in (ctx.by_hidden, hidden.detach(), labels)), strict=True)
        return sum((visit(*tensors) for tensors in chunks), hidden.new_zeros((), dtype=torch.float32))

    @staticmethod
    def backward(ctx, by_loss):
        by_hidden, *by_weights = (grad.mul_(by_loss) for grad in (ctx.by_hidden, *ctx.by_weights))
        del ctx.by_hidden, ctx.by_weights  # what is returned has no other reference, so that nobody needs a copy
        return by_hidden, None, None, None, *by_weights


# ---------------------------------------------------------------------------------------------------------------------
# Real weights. Last, as what is there needs what stands above.

from weights.names import from_hf, to_hf  # noqa: E402, F401
from weights.reading import load_model, open_checkpoint, random_model, read_config  # noqa: E402, F401
from weights.writing import save_hf, save_meta  # noqa: E402, F401
