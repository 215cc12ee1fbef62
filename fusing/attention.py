"""Attention on a CPU, a block of queries at a time: faster in bf16 than PyTorch's kernel, for short documents thrice.

This is FlashAttention ("FlashAttention", algorithms 1 and 4) with one of its two loops. A GPU has little fast memory, so that
keys, too, come in blocks, and a row's softmax is put together from parts. A CPU's cache holds all scores of 128 queries, so a
block of queries sees its whole row at once, and the softmax is the textbook's."""

import torch

QUERIES = 128  # of a block: 12 heads x 128 x 512 scores x 4 bytes = 3 MB
LONGEST = 2048  # document: in longer ones a block's scores outgrow the cache, and PyTorch's kernel is as fast, then faster


def helps(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether it is the faster way for q and k (heads, tokens, D)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[1] <= LONGEST


def attention_in_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of q (H, Tq, D), the last Tq of Tk tokens, over k and v (K, Tk, D) -> (H, Tq, D)."""
    with torch.autocast("cpu", enabled=False):  # which would round the scores to bf16
        return BlockwiseAttention.apply(q, k, v)


class BlockwiseAttention(torch.autograd.Function):
    """Keeps q, k and v for backward, which makes the probabilities P once more. With O = P V and S = Q K^T / sqrt(D):

    dV = P^T dO     dP = dO V^T     dS = P * (dP - rowsum(dP * P))     dQ = dS K / sqrt(D)     dK = dS^T Q / sqrt(D)

    Scores, probabilities and sums over blocks are fp32; all but the scores is multiplied in bf16. Not in fp16: once the loss is
    scaled up, dP would leave its range."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        out, q, (k, v) = torch.empty_like(q), q.contiguous(), spread(q, k, v)
        wide_k = k.float()
        for block, seen in blocks(q, k):
            p = probabilities(q[:, block], wide_k[:, seen])
            out[:, block] = torch.bmm(p.to(v.dtype), v[:, seen])
        return out

    @staticmethod
    def backward(ctx, by_out):
        q, k, v = ctx.saved_tensors
        heads, by_out, q, (k, v) = len(k), by_out.contiguous(), q.contiguous(), spread(q, k, v)
        wide_k, by_q, by_k, by_v = k.float(), *(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))

        def visit(block, seen):  # whose scores go when it ends, before the next ones come
            p = probabilities(q[:, block], wide_k[:, seen])
            by_v[:, seen] += torch.bmm(p.to(v.dtype).mT, by_out[:, block])
            by_p = torch.bmm(by_out[:, block], v[:, seen].mT).float()
            by_scores = by_p.sub_((by_p * p).sum(-1, keepdim=True)).mul_(p).to(k.dtype)
            by_q[:, block] = torch.bmm(by_scores, k[:, seen])
            by_k[:, seen] += torch.bmm(by_scores.mT, q[:, block])

        for block, seen in blocks(q, k):
            visit(block, seen)
        scale = q.shape[-1] ** -0.5
        by_k, by_v = (x.unflatten(0, (heads, -1)).sum(1) for x in (by_k.mul_(scale), by_v))  # of the queries that share a head
        return by_q.mul_(scale).to(q.dtype), by_k.to(k.dtype), by_v.to(v.dtype)


def spread(q, *shared):
    """Keys or values (K, T, D) once for each query head: (H, T, D)."""
    return [x.repeat_interleave(len(q) // len(x), dim=0) for x in shared]


def blocks(q, k):
    """Of each block of queries its place, and that of the keys it sees."""
    for start in range(0, q.shape[1], QUERIES):
        end = min(start + QUERIES, q.shape[1])
        yield slice(start, end), slice(end + k.shape[1] - q.shape[1])


def probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) of q (H, n, D), the last n of the m tokens in k (H, m, D), in fp32: (H, n, m)."""
    scores = torch.bmm(q.float() / q.shape[-1] ** 0.5, k.mT)
    n = q.shape[1]
    scores[:, :, -n:] += torch.full((n, n), float("-inf")).triu(1)  # none looks at a later one
    return torch.softmax(scores, dim=-1, out=scores)
