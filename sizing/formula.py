"""The closed form: what a run needs, as arithmetic to be checked by hand.

It is the same sum as memory.py's count, written down before: each term in letters (T tokens, C width, ...; `letters` has them),
each letter a number that config.json or a flag gives. A term of several moments, such as the loss's, is the largest of them, and
the peak is the largest of the moments at which it can be. Tests hold every term to the count within 1 %; settings in which one is
further off, though not the peak, are in benchmarks/RESULTS.md.
"""

import re

from sizing.gpu import GPU


def linears(s) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linears of a block."""
    c, f, kv = s.dim, s.hidden_dim, s.n_kv_heads * s.dim // s.n_heads
    return {"wq": (c, c), "wk": (kv, c), "wv": (kv, c), "wo": (c, c), "w1": (f, c), "w2": (c, f), "w3": (f, c)}


def outer(s) -> dict[str, tuple[int, int]]:
    return {"tok_embeddings": (s.dim, s.vocab_size), "output": (s.vocab_size, s.dim)}


def trained(s, flags) -> set[str]:
    """The matrices that are trained, or have adapters that are."""
    if flags.method == "full":
        return {*linears(s), *outer(s)}
    named = {*flags.lora_targets} & {*linears(s), *outer(s)}
    return named | {*linears(s)} if "all-linear" in flags.lora_targets else named


def letters(sizes, flags, nproc: int = 1) -> dict:
    """What the formula's arithmetic is written in. T tokens in a row, n of them in a chunk of the loss; C dim, F hidden_dim,
    V vocabulary, H heads, K width of all keys, L layers, r LoRA's rank; W numbers in a block's linears, E in all else, N trained.
    Bytes of a number: b in the computation, g in a gradient, s between the blocks and in weights that are not packed.
    Sharded over P GPUs: this one's share of N is M, in whole rows; gathered, a block is G bytes and what is in no block R; to be
    reduced, a block's gradients are B."""
    C, V, L, r, inside = sizes.dim, sizes.vocab_size, sizes.n_layers, flags.lora_rank, linears(sizes)
    T, full, half = flags.per_device_train_batch_size * flags.model_max_length, flags.method == "full", flags.dtype != "fp32"
    W, E = sum(out * inn for out, inn in inside.values()), (2 * V + 2 * L + 1) * C
    each = {name: (L if name in inside else 1) * sum(shape) for name, shape in (inside | outer(sizes)).items()}
    N = L * W + E if full else r * sum(each[name] for name in trained(sizes, flags))
    known = {"T": T, "n": min(T, 256), "C": C, "F": sizes.hidden_dim, "V": V, "H": sizes.n_heads, "K": inside["wk"][0], "L": L}
    small = half and full and (flags.pure_bf16 or flags.fsdp)  # 16 bits in the computation, whatever is kept
    known |= {"r": r, "W": W, "E": E, "N": N, "b": 2 if half else 4, "g": 2 if small else 4}
    known["s"] = 2 if half and (small or not full) else 4
    if flags.fsdp:  # row by row; where there are fewer rows than GPUs, nothing fills up the rest
        nproc = flags.hsdp or nproc  # GPUs that share a copy
        rows = {x: -(-r // nproc) * inn + -(-out // nproc) * r for x, (out, inn) in (inside | outer(sizes)).items()}
        block, rest = (sum(rows[x] for x in trained(sizes, flags) & set(among)) for among in (inside, outer(sizes)))
        gathered = round(eval(PACKED[flags.quantize], {}, known)) // L + 2 * C * known["s"]
        known |= {
            "P": nproc,
            "M": -(-N // nproc) if full else L * block + rest,
            "G": gathered + (0 if full else block * nproc * 4),
        }
        known["R"] = (2 * V + 1) * C * known["s"] + (0 if full else rest * nproc * 4)
        known["B"] = 4 * (W + 2 * C if full else block * nproc)
    return known


PACKED = {  # NF4: 4 bits, 8 a block of 64, 32 a block of 2^14. int8: 4 bytes a row.
    "none": "L * W * s",
    "nf4": "L * W * (4 + 8 / 64 + 32 / 16384) / 8",
    "int8": "L * W * (1 + 4 / C)",
}

# Names of terms in the text of later ones.
FIRST = "activations_first_layer"
BUT_LAST = f"{FIRST} + activations_middle_layers"
ALL_LAYERS = f"{BUT_LAST} + activations_last_layer"
BACKWARD = " + a_block_backward + T * C * s"


class Run:
    """What the arithmetic asks of a run: its letters (`known`; each term joins them) and what its flags come to."""

    def __init__(self, sizes, flags, gpu: GPU | None, nproc: int):
        self.flags, self.gpu, self.dim, self.known = flags, gpu, sizes.dim, letters(sizes, flags, nproc)
        self.inside, self.shapes, self.moved = linears(sizes), linears(sizes) | outer(sizes), trained(sizes, flags)
        self.full = flags.method == "full"
        self.again = flags.gradient_checkpointing  # forward is computed again
        self.half = flags.dtype != "fp32"  # computed in 16 bits,
        self.masters = self.full and self.half and not (flags.pure_bf16 or flags.fsdp)  # of fp32 weights, cast by autocast
        self.number = 2 if flags.pure_bf16 else 4  # bytes of what is trained
        self.packed = flags.quantize != "none"
        self.head_only = self.moved == {"output"}  # no block has a backward
        # On a CPU fusing/attention.py attends in blocks; on a GPU a kernel to all documents at once, or to one by one.
        self.in_blocks = not gpu and flags.dtype == "bf16" and flags.attention == "sdpa" and self.known["T"] <= 2048
        self.varlen = bool(gpu) and self.half and gpu.varlen
        # With dropout every adapter has an input of its own, and a mask of what was zeroed in it; without, it multiplies with
        # what is there anyway.
        self.dropped = flags.lora_dropout > 0 and not self.full
        self.mask = 1 if gpu else self.known["b"]  # bytes a number
        self.plain = set() if self.dropped else self.moved
        # Gradients.
        self.within = flags.optimizer_in_backward  # one at a time
        self.buckets = nproc > 1 and not flags.fsdp  # DDP's: they are the gradients, and stay
        self.added = flags.gradient_accumulation_steps > 1  # to those of earlier rows, which are not yet in DDP's buckets
        self.stay = flags.fsdp or not (self.within or self.buckets or self.added)  # to the end of their block
        self.hybrid = 0 < flags.hsdp < nproc  # sums over the copies stay in fp32 to backward's end
        # This GPU's part of a block, when its weights are not what is gathered: FSDP rounds it, or brings it from the host.
        self.passing = flags.fsdp and (flags.cpu_offload or (self.full and self.half and self.number == 4))


def formula(sizes, flags, gpu: GPU | None = None, nproc: int = 1) -> dict[str, tuple[str, int]]:
    """The run as arithmetic: name -> (expression, bytes). sizes: the model's; flags: train.py's, with --dtype decided.

    Each term is written once, in `letters` and the names of earlier terms, and Python computes what is printed. Where several
    moments compete, the largest is the term."""
    run, terms = Run(sizes, flags, gpu, nproc), {}

    def term(name: str, *moments: str) -> None:
        size, text = max((round(eval(text, {}, run.known)), text) for text in moments)
        run.known[re.sub(",|'s", "", name).replace(" ", "_")] = size
        terms[name] = text.replace("_", " ").replace("*", "x"), size

    for name, moments in between_steps(run).items():
        term(name, *moments)
    if flags.fsdp:
        for name, moments in sent(run).items():
            term(name, *moments)
    term("activations, first layer", first_layer(run))
    term("activations, last layer", later_layer(run) if sizes.n_layers > 1 else "0")
    term("activations, middle layers", f"{max(0, sizes.n_layers - 2)} * activations_last_layer")
    term("logits and loss", *loss(run))
    term("a block's backward", *block_backward(run))
    if flags.cpu_offload:
        # The most of a step; of a save, where a whole matrix is put together of what came.
        widest = max(max(run.shapes[x]) for x in run.moved)
        matrix = f"2 * V * C * {run.number}" if run.full else f"2 * r * {widest} * 4"
        stay = "weights + adapters + optimizer_state"
        term("in the host's memory", f"{stay} + gradients", f"{stay} + {matrix}")
        run.known |= {name.replace(" ", "_"): 0 for name in KEPT}
    term("allocated peak", *peak(run))
    if flags.cpu_offload:
        terms = {name: term for name, term in terms.items() if name not in KEPT}
    return {name: term for name, term in terms.items() if term[1] or name != "cuBLAS workspace"}


def between_steps(run) -> dict[str, list[str]]:
    """What stays from the first step on; of it, sharded, a part."""
    flags, full = run.flags, run.full
    mine, part = ("M", " / P") if flags.fsdp else ("N", "")
    whole = f"{mine} * {run.number}" if flags.fsdp else "2 * N * g" if run.buckets and run.added else "N * g"
    # One of a time: a matrix's, both of the head's adapter; in shards a block's, or those of what is in no block.
    if flags.fsdp:
        one = [f"B / P * {run.number} / 4", f"(M - L * B / P / 4) * {run.number}"]
    elif full:
        one = ["V * C * g", "F * C * g"]
    else:
        one = [f"r * {max(max(run.shapes[x]) + (x == 'output') * run.dim for x in run.moved)} * 4"]
    return {
        "weights": [f"M * {run.number}" if full and flags.fsdp else f"({PACKED[flags.quantize]} + E * s){part}"],
        "adapters": ["0" if full else f"{mine} * 4"],
        # Sums over the copies that are not rounded are the gradients.
        "gradients": one if run.within and not (run.hybrid and run.number == 4) else [whole],
        "optimizer state": [f"{mine} * 2 * (1 + 4 / 256)" if flags.optim == "adamw_8bit" else f"{mine} * 8"],
        "cuBLAS workspace": [f"2 * {run.gpu.workspace if run.gpu else 0}"],
    }


def sent(run) -> dict[str, list[str]]:
    """What FSDP holds for the network. In forward a block, its buffer and the last one's; at the beginning the rest and its
    buffer, too. In backward a block's gradients; or the head's adapter's, at the end of the first block's backward."""
    outside = not run.full and "tok_embeddings" not in run.moved
    return {
        "gathered weights": ["3 * G + R", "2 * G + 2 * R"],
        "gradients to reduce": ["B", *["R - (2 * V + 1) * C * s"] * outside],
    }


def block(run) -> str:
    """What a block keeps for backward: of its norms the inputs and what uses their results (on a CPU the inputs in fp32, and what
    a trained weight is multiplied with), attention's, gate and up, what adapters multiply with."""
    used = bool(run.plain & {"wq", "wk", "wv"}) + bool(run.plain & {"w1", "w3"})  # of the two norms' results
    if run.gpu:  # with masters inputs, and 5 bf16 copies of the results
        norms = "18" if run.masters else f"(2 * s + {2 if run.full else used} * b)"
    else:
        norms = "26" if run.masters else "(16 + 2 * b)" if run.full else f"(8 + {used} * b)"
    text = f"T * C * {norms} + {attention(run)} + T * F * {2 + ('w2' in run.plain)} * b"
    adapted = run.moved & run.inside.keys()
    if not run.full and adapted:
        text += f" + T * r * {len(adapted)} * b" + f" + r * {sum(sum(run.inside[x]) for x in adapted)} * 2" * run.half
        if run.dropped:
            text += f" + T * {sum(run.inside[x][1] for x in adapted)} * {run.known['b'] + run.mask}"
    return text


def attention(run) -> str:
    """What attention keeps: q, k, v, and the result, once more where an adapter multiplies with it."""
    results = 1 + ("wo" in run.plain)
    if run.flags.attention == "textbook":  # softmax in fp32, and in 16 bits; the mask
        return f"T * {2 + results} * C * b + H * T * T * {6 if run.half else 4} + T * T"
    if run.in_blocks:  # by fusing/attention.py, which computes the result again
        return f"T * ({results} * C + 2 * K) * b"
    # PyTorch's kernels keep the result in any case, and one fp32 number a row. Documents that are attended to one after the other
    # are joined to a result of their own. On a GPU k and v are repeated for every query head.
    mine = 2 if run.varlen else 1 + results  # q, and results
    return f"T * {2 + mine} * C * b + T * H * 4" if run.gpu else f"T * ({mine} * C + 2 * K) * b + T * H * 4"


def copies(run, numbers: str = "W") -> str:
    """Autocast's 16-bit copies of so many weights."""
    return f" + {numbers} * 2" * run.masters


def later_layer(run) -> str:
    if run.head_only:
        return "0"
    return "T * C * s" if run.again else block(run) + copies(run)  # with checkpointing only the block's input


def first_layer(run) -> str:
    """As any layer; but if what comes into it was made by nothing that is trained, it needs no gradient, nor does what is
    computed of it before the first adapter: what would serve such gradients alone is not kept."""
    moved = run.moved
    if run.again or run.head_only or run.full or "tok_embeddings" in moved:
        return later_layer(run)
    norm_input = f" - T * C * {run.known['s'] if run.gpu else 4}"
    reads, less = moved & {"wq", "wk", "wv"}, norm_input
    if not reads:  # nor does what attention makes, but for wo's input
        reads, less = moved & {"wo"}, f"{less} - ({attention(run)})" + " + T * C * b" * ("wo" in run.plain)
        if not reads:  # nor the second norm's input
            reads, less = moved & {"w1", "w3"}, less + norm_input
            if not reads:  # nor what is multiplied by silu(gate)
                reads, less = moved & {"w2"}, f"{less} - 2 * T * F * b"
    elif run.flags.attention == "textbook":  # q is for k's gradient, k for q's, v and softmax in fp32 for theirs, in 16 for v's
        scored = reads & {"wq", "wk"}
        less += f" - T * C * {2 - len(scored) + (not scored)} * b"
        less += f" - T * T - H * T * T * {4 * run.half}" * (not scored) + " - H * T * T * 2" * (run.half and "wv" not in reads)
    served = sum(run.inside[x][1] for x in reads)  # width of inputs: A serves their gradient only, and so does the mask
    return block(run) + less + f" - r * {served} * 2" * run.half + f" - T * {served} * {run.mask}" * run.dropped


def head_gradient(run) -> str:
    return " + V * C * g" if run.full else " + r * (V + C) * 4" * ("output" in run.moved)  # or those of its adapter


def norm_backward(run) -> str:
    """On a CPU: five tensors in fp32, and what comes if in 16 bits."""
    return f"T * C * {20 if run.known['s'] == 4 else 22}"


def loss(run) -> list[str]:
    """The turn from forward to backward: the last norm's result, that where there is a label, its gradient; then the logits of n
    positions at a time, their logarithms of probabilities, which become their gradient, and the head's."""
    full, half, gpu, with_head = run.full, run.half, run.gpu, "output" in run.moved
    several = run.known["T"] > run.known["n"]  # chunks; the first one's gradients are the sum's beginning
    # On a CPU its norm's input in fp32 instead of 16 bits, too, and what a trained weight is multiplied with.
    norm = "" if gpu else f" + T * C * {(2 if run.known['s'] == 2 else 0) + 4 * full}"
    held = f"{3 - run.head_only} * T * C * s{norm}"
    if with_head and not full:  # its adapter's gradient, and its 16 bits or the next chunk's gradient
        held += f" + r * (V + C) * {(2 if half else 4) + 4 * several}"
        held += f" + n * C * {run.mask + run.known['b'] * half}" * run.dropped
    if run.masters:
        moments = [f"8 * n * V + {6 + 4 * several} * V * C + n * C * 8"]
    elif half:  # in an adapter's gradient, which is rounded to 16 bits and not yet added: no more than two of n x V
        moments = ["10 * n * V"] + ["8 * n * V + r * V * 4"] * with_head
    else:  # with an adapter: its part, the head's, their sum
        moments = [f"8 * n * V + {3 if with_head else 1} * n * C * s"]
    if full and not run.masters:
        moments += [f"8 * n * V + {1 + several} * V * C * g + n * C * b"]
    moments = [f"{text} + {held}" for text in moments]
    if not gpu:
        moments.append(norm_backward(run) + head_gradient(run) * (not (run.within or run.buckets)))
    if full and run.within and not run.flags.fsdp:  # the head is stepped
        moments.append(f"V * C * g + T * C * s{norm}")
    if run.passing:  # the last block's, for backward
        moments.append("G / P + T * C * s" + " + V * C * g" * full)
    return moments


def block_backward(run) -> list[str]:
    """The last block's backward, on top of what is there when it begins; with checkpointing, that is but the block's input. (Its
    result is no longer: the loss is done.)"""
    if run.head_only:
        return ["0"]
    kept = f"{block(run)}{copies(run)}{' - T * C * s' * bool(run.gpu or run.known['s'] == 4)}"
    rises, left = feed_forward_backward(run), later_backward(run)
    if run.passing:  # the next one's
        (left if run.again else rises).append("G / P")
    if run.again:
        return [f"{kept} + {text}" for text in rises] + left
    return rises + [f"{text} - ({kept})" for text in left]


def sign(run) -> str:
    """What a gradient that is made does to the sum: it stays; or it goes at once, and with DDP takes along what earlier rows had
    added up ("": none of these)."""
    return " + " if run.stay else " - " * (run.buckets and run.added)


def feed_forward_backward(run) -> list[str]:
    """While a block's last linears are at work, on top of what the block kept: gradients of the feed-forward layer's width, and a
    weight's gradient or a weight turned back."""
    masters, plus = run.masters, sign(run)
    if run.full:
        rises = ["2 * T * F * b" + f"{plus}C * F * g" * bool(plus) + " - C * F * 2" * masters]
        if not run.stay:
            rises += ["T * F * b + C * F * b" + " + T * C * b" * masters, "C * F * 4" if masters else "0"]
        return rises
    rises = ["3 * T * F * b"]
    if "w2" in run.moved:  # of its adapter A's gradient is not yet fp32, and B's 16 bits are no longer needed
        rises = ["2 * T * F * b + r * F * b" + f"{plus}r * C * 4" * bool(plus) + " - r * C * 2" * run.half]
    if run.packed:
        back = "T * F * b + C * F * b"
        # If forward is computed again, but w2 keeps nothing, it ends with w3, when w2's part in backward is done.
        forth = w2_forward(run) if "w2" in run.moved else f"{back} + T * C * {norm_results(run)} * b"
        rises += [back] + [forth] * run.again
    return rises


def norm_results(run) -> int:
    """Tensors of the second norm that no adapter keeps, while the packed weights behind it are at work: its result; on a CPU its
    input in 16 bits."""
    return (not run.plain & {"w1", "w3"}) + (run.half and not run.gpu)


def w2_forward(run) -> str:
    """w2 at work in forward, when it is packed: its weight, its result, and what is there of the norm."""
    return f"C * F * b + T * C * {1 + norm_results(run)} * b" + " + T * F * b" * ("w2" not in run.plain)


def later_backward(run) -> list[str]:
    """Later in a block's backward: the feed-forward layer's tensors are gone, and gradients are there. Each of these is all that
    is then in memory of the block."""
    masters, plus, late = run.masters, sign(run), run.moved & {"wq", "wk", "wv"}
    now, then = (sum(sum(run.inside[x]) for x in names) for names in (run.moved & run.inside.keys() - late, late))  # widths
    if run.full:
        others = f"{plus}(W - C * C - 2 * C * K) * g" * bool(plus)
    else:
        others = f"{plus}r * {now} * 4" * bool(plus) + f" + r * {then} * 2 + T * r * {len(late)} * b" * run.half
    left = [work + others for work in attention_backward(run)]
    if run.flags.attention == "textbook" and run.again:
        left.append(scores(run))
    if masters and run.stay:  # Before, attention is whole; w1, w2, w3 have gradients, the last still in 16 bits, too; the second
        between = f"T * C * {first_norm(run) + 8}"  # norm has its input, and its result's gradient.
        left.append(f"3 * C * F * 4 + C * F * 2 + (W - 3 * C * F) * 2 + {attention(run)} + {between}")
    elif run.full and run.gpu and run.stay:  # Before, attention is whole; w1, w2, w3 have gradients, and gate's is still there.
        left.append(f"3 * C * F * g + {attention(run)} + T * F * b + T * C * (s + 4 * b)")
    elif run.full and not run.gpu:  # the second norm's backward, where the first still has its tensors and both their inputs
        left.append(f"{'3 * C * F * g + ' * run.stay}{attention(run)} + {norm_backward(run)} + T * C * (8 + 2 * b)")
    if run.full and run.stay:  # At last all have theirs, wq's made of q's and of the norm's result, whose own is a sum of three.
        left.append("W * 4 + C * C * 2 + T * C * 4" if masters else "W * g + T * C * 4 * b")
        left += [f"W * g + {norm_backward(run)}"] * (not run.gpu)
    return left


def first_norm(run) -> int:
    """Bytes a number that are there of the first norm while attention is at work (as in `block`)."""
    b, late = run.known["b"], run.moved & {"wq", "wk", "wv"}
    here = (6 if run.masters else b * bool(late)) + (0 if run.gpu else 4 * (run.half + run.full))
    return here + ((b + run.mask) * len(late) - b * bool(late)) * run.dropped


def scores(run) -> str:
    """Textbook attention at work in forward: softmax's input in 16 bits and in fp32, its result; of masters the norm's copies."""
    return f"H * T * T * {10 if run.half else 8} + T * T + T * C * {4 * run.known['b'] + 14 * run.masters}"


def attention_backward(run) -> list[str]:
    """Attention at work in backward: the result of the first norm, 16-bit copies of wq, wk, wv, and its own."""
    b, here, cast = run.known["b"], first_norm(run), copies(run, "(C * C + 2 * C * K)")
    if run.flags.attention == "textbook":  # softmax, its gradient and the scores', in fp32; q, k and the gradient of v
        return [f"H * T * T * 12 + T * T + T * C * {3 * b + here}{cast}"]
    if run.gpu:  # its kernels sum q's gradient in fp32; q, k, v, the result and their gradients
        return [f"(T{' + 128' * run.varlen}) * (C + H) * 4 + T * C * {8 * b + here}{cast}"]
    if run.in_blocks:  # of 128 queries' scores three tensors in fp32; heads first q, k and v, which autograd has as they were,
        # too; the result's gradient and a copy; in fp32 k and three gradients
        saved = "" if run.again else " + T * (C + 2 * K) * 2"
        return [f"H * {min(128, run.known['T'])} * T * 12 + T * 26 * C{saved} + T * C * {here - 4 * run.masters}{cast}"]
    return []


def peak(run) -> list[str]:
    """The moments at which the peak can be: the loss, the last block's backward, the first's, the optimizer."""
    flags, known, buckets, added = run.flags, run.known, run.buckets, run.added
    always = "".join(f"{x} + " for x in ("weights", "adapters", "optimizer_state", "cuBLAS_workspace") if known[x])
    stays = always + "gradients + " * buckets
    earlier = " + gradients" * (added and not (buckets or flags.cpu_offload))  # of the rows before
    moments = (peak_in_shards if flags.fsdp else peak_on_one)(run, always, stays, earlier)
    if not (run.full or run.again) and run.packed:  # the last block, forward
        moments.append(f"{stays}{ALL_LAYERS} + T * C * s + {w2_forward(run)}{earlier}" + " + 2 * G + R" * flags.fsdp)
    return moments


def peak_in_shards(run, always: str, stays: str, earlier: str) -> list[str]:
    """In backward the block at work and the next one are whole, and the gradients of the last are on their way."""
    number, heads = run.number, head_gradient(run)
    each = 0 if run.flags.cpu_offload or run.within or earlier else number  # bytes a number of what a block leaves
    each += 4 * (run.hybrid and (number == 2 or (each == 0 and not run.flags.cpu_offload)))
    one, most, all_ = (f" + {count}B / P * {each} / 4" * bool(each) for count in ("", "(L - 2) * ", "L * "))
    moments = [
        f"{stays}2 * G + 2 * R + T * C * s{earlier}",  # the first block; the last
        f"{stays}{BUT_LAST} + T * C * s + 3 * G + R{earlier}",
        f"{stays}{ALL_LAYERS}{earlier} + logits_and_loss + T * C * s + G + R",
        f"{stays}{ALL_LAYERS}{earlier}{heads}{BACKWARD} + 2 * G + R",
        f"{stays}{BUT_LAST} + B + 2 * G + R{earlier}{one}{heads}{BACKWARD}",
        f"{stays}2 * {FIRST} + B + 2 * G + R{earlier}{most}{heads}{BACKWARD}",
    ]
    # At last what is in no block: copied to be reduced in fp32; reduced, and rounded to what is kept, the head's still there.
    if run.full:
        blocks = stays + (earlier + all_)[3:] + " + " * bool(earlier or all_) + "2 * V * C * "
        moments += [f"{blocks}(4 + g)", f"{blocks}(4 + {4 if number == 4 else 4 + number} / P) + V * C * g"]
    return moments


def peak_on_one(run, always: str, stays: str, earlier: str) -> list[str]:
    """On one GPU, or on each of DDP's."""
    full, added, buckets, within = run.full, run.added, run.buckets, run.within
    head = earlier or head_gradient(run) * (not within)  # or those of the rows before
    if buckets:  # which has its place, and with it goes that of the rows before
        head = " - V * C * g" * (full and added)
    moments = [
        f"{stays}{ALL_LAYERS} + T * C * s{earlier} + logits_and_loss",
        f"{stays}{ALL_LAYERS}{head}{BACKWARD}",
        always + ("N * g" if buckets else "gradients"),
    ]
    if run.flags.attention == "textbook":  # the last block, forward
        moments.append(f"{stays}{BUT_LAST} + T * C * s + {scores(run)}{earlier}")
    # A row before the last: from the second on all gradients are there; the first has made them, but for what follows, when its
    # first block is at work.
    if full and buckets and added and run.gpu and run.half:
        [work] = attention_backward(run)
        before = f"{stays}T * C * s + {work}"
        if run.flags.gradient_accumulation_steps > 2:
            moments.append(f"{before} + {ALL_LAYERS if run.again else BUT_LAST}")
        moments.append(f"{before}{f' + {FIRST}' * run.again} - (V * C + C * C + 2 * C * K) * g")
    if full and within:
        moments.append(f"{stays}gradients + T * C * s")
    elif not (within or (buckets and added)):
        last = "(W + V * C) * g" if full else f"r * {sum(sum(run.shapes[x]) for x in run.moved - {'output'})} * 4"
        moments.append(f"{stays}{'0' if buckets else f'gradients - {last}'} + {FIRST}{BACKWARD}")
        moments.append(stays + "gradients + " * (not buckets) + "T * C * s" + " + V * C * g" * (full and (added or buckets)))
    return moments


SENT = ("gathered weights", "gradients to reduce")  # what FSDP holds for the network, asked for before its layer's turn
KEPT = ("weights", "adapters", "gradients", "optimizer state")  # from step to step; with CPU offload in the host's memory


def simulated(line, n_layers: int) -> dict[str, int]:
    """The same terms in memory.py's Timeline, as they were counted in the second step, with accumulation in its last
    row. (A GPU's allocator counts no kinds.)"""
    phases = {phase.name: phase for phase in line.phases if phase.part == "second step"}
    top, last = line.highest.peak, n_layers - 1
    terms = {kind: top[kind] for kind in ("cuBLAS workspace",) if top[kind]}
    if line.host:
        terms["in the host's memory"] = line.host
    elif "weights" in top:
        terms |= {kind: top[kind] for kind in ("weights", "adapters")}
        moment = "end" if "optimizer" in phases else "most"  # within backward no phase ends with one
        terms["gradients"] = max(getattr(phase, moment)["gradients"] for phase in phases.values())
        terms["optimizer state"] = phases["between steps"].end["optimizer state"]
    for kind in SENT:
        if most := max(phase.most[kind] for phase in phases.values() if phase.layer is not None):
            terms[kind] = most
    return terms | {
        "activations, first layer": phases["forward 0"].kept,
        "activations, last layer": phases[f"forward {last}"].kept if last else 0,
        "activations, middle layers": sum(phases[f"forward {i}"].kept for i in range(1, last)),
        "logits and loss": phases["loss"].rise,
        "a block's backward": phases[f"backward {last}"].rise if f"backward {last}" in phases else 0,
        "allocated peak": line.peak - line.tails,
    }
