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


def formula(sizes, flags, gpu: GPU | None = None, nproc: int = 1) -> dict[str, tuple[str, int]]:
    """The run as arithmetic: name -> (expression, bytes). sizes: the model's; flags: train.py's, with --dtype decided.

    Each term is written once, in `letters` and the names of earlier terms, and Python computes what is printed. Where several
    moments compete, the largest is the term."""
    full, again, half = flags.method == "full", flags.gradient_checkpointing, flags.dtype != "fp32"
    within = flags.optimizer_in_backward  # one gradient at a time
    masters = full and half and not (flags.pure_bf16 or flags.fsdp)  # fp32 weights, cast by autocast where they are used
    moved, inside, known = trained(sizes, flags), linears(sizes), letters(sizes, flags, nproc)
    L, b, s, shapes = known["L"], known["b"], known["s"], inside | outer(sizes)
    in_blocks = not gpu and flags.dtype == "bf16" and flags.attention == "sdpa" and known["T"] <= 2048  # by fusing/attention.py
    terms, kept_in = {}, 2 if flags.pure_bf16 else 4  # bytes

    def term(name: str, *moments: str) -> None:
        size, text = max((round(eval(text, {}, known)), text) for text in moments)
        known[re.sub(",|'s", "", name).replace(" ", "_")] = size
        terms[name] = text.replace("_", " ").replace("*", "x"), size

    # What stays from the first step on; of it, sharded, a part. DDP's buckets are the gradients, and stay.
    mine, part, buckets = ("M", " / P", False) if flags.fsdp else ("N", "", nproc > 1)
    term("weights", f"({PACKED[flags.quantize]} + E * s){part}" if not (full and flags.fsdp) else f"M * {kept_in}")
    term("adapters", "0" if full else f"{mine} * 4")
    added = flags.gradient_accumulation_steps > 1  # to the gradients of earlier rows, which are not yet in DDP's buckets
    # One of a time: a matrix's, both of the head's adapter; in shards a block's, or those of what is in no block.
    if flags.fsdp:
        one = [f"B / P * {kept_in} / 4", f"(M - L * B / P / 4) * {kept_in}"]
    elif full:
        one = ["V * C * g", "F * C * g"]
    else:
        one = [f"r * {max(max(shapes[x]) + (x == 'output') * sizes.dim for x in moved)} * 4"]
    every = f"{mine} * {kept_in}" if flags.fsdp else "2 * N * g" if buckets and added else "N * g"
    hybrid = 0 < flags.hsdp < nproc  # sums over the copies stay in fp32 to backward's end; if not rounded they are the gradients
    term("gradients", *(one if within and not (hybrid and kept_in == 4) else [every]))
    term("optimizer state", f"{mine} * 2 * (1 + 4 / 256)" if flags.optim == "adamw_8bit" else f"{mine} * 8")
    term("cuBLAS workspace", f"2 * {gpu.workspace if gpu else 0}")
    if flags.fsdp:  # in forward a block, its buffer and the last one's; at the beginning the rest and its buffer, too
        term("gathered weights", "3 * G + R", "2 * G + 2 * R")
        outside = not full and "tok_embeddings" not in moved  # the head's adapter, at the end of the first block's backward
        term("gradients to reduce", "B", *["R - (2 * V + 1) * C * s"] * outside)

    # What a block keeps. Its norms: their inputs and what uses their results; on a CPU the inputs in fp32, and what a trained
    # weight is multiplied with.
    # With dropout every adapter has an input of its own, and a mask of what was zeroed in it.
    dropped, mask = flags.lora_dropout > 0 and not full, 1 if gpu else b  # bytes a number
    plain = set() if dropped else moved  # whose adapters multiply with what is there anyway
    used = bool(plain & {"wq", "wk", "wv"}) + bool(plain & {"w1", "w3"})  # of the two norms' results
    if gpu:
        norms = "18" if masters else f"(2 * s + {2 if full else used} * b)"  # 18: inputs, and 5 bf16 copies of the results
    else:
        norms = "26" if masters else "(16 + 2 * b)" if full else f"(8 + {used} * b)"
    attention = f"T * ({1 + ('wo' in plain)} * C + 2 * K) * b"  # q, k, v, the result where it is multiplied with
    if not in_blocks:  # PyTorch's kernel keeps it in any case, and one fp32 number a row
        attention = f"T * ({2 + ('wo' in plain)} * C + 2 * K) * b + T * H * 4"
    if flags.attention == "textbook":  # softmax in fp32, and in 16 bits; the mask
        # Forward, at work: softmax's input in 16 bits and in fp32, its result; with masters the norm's copies are there.
        scores = f"H * T * T * {10 if half else 8} + T * T + T * C * {4 * b + 14 * masters}"
        attention = f"T * {3 + ('wo' in plain)} * C * b + H * T * T * {6 if half else 4} + T * T"
    elif gpu and half:  # k and v are repeated for every query head
        attention = "T * 4 * C * b + T * H * 4"
    block = f"T * C * {norms} + {attention} + T * F * {2 + ('w2' in plain)} * b"
    if not full and (adapted := moved & inside.keys()):
        block += f" + T * r * {len(adapted)} * b" + f" + r * {sum(sum(inside[x]) for x in adapted)} * 2" * half
        if dropped:
            block += f" + T * {sum(inside[x][1] for x in adapted)} * {b + mask}"
    copies = " + W * 2" * masters  # of the weights, by autocast
    head_only = moved == {"output"}  # no block has a backward
    kept = "0" if head_only else "T * C * s" if again else block + copies  # with checkpointing only the block's input
    made_by_nothing_trained = not (again or head_only or full or "tok_embeddings" in moved)  # such an input needs no gradient
    reads, of_none = moved & {"wq", "wk", "wv"}, f" - T * C * {s if gpu else 4}"
    if not reads:  # nor does what attention makes, but for wo's input
        reads, of_none = moved & {"wo"}, f"{of_none} - ({attention})" + " + T * C * b" * ("wo" in plain)
        if not reads:  # nor the second norm's input
            reads, of_none = moved & {"w1", "w3"}, f"{of_none} - T * C * {s if gpu else 4}"
            if not reads:  # nor what is multiplied by silu(gate)
                reads, of_none = moved & {"w2"}, f"{of_none} - 2 * T * F * b"
    elif flags.attention == "textbook":  # q is for k's gradient, k for q's, v and softmax in fp32 for theirs, in 16 bits for v's
        scored = reads & {"wq", "wk"}
        of_none += f" - T * C * {2 - len(scored) + (not scored)} * b"
        of_none += f" - T * T - H * T * T * {4 * half}" * (not scored) + " - H * T * T * 2" * (half and "wv" not in reads)
    served = sum(inside[x][1] for x in reads)  # width of inputs
    of_none += f" - r * {served} * 2" * half + f" - T * {served} * {mask}" * dropped  # A serves that only, and so does the mask
    term("activations, first layer", kept + of_none * made_by_nothing_trained)
    term("activations, last layer", kept if L > 1 else "0")
    term("activations, middle layers", f"{max(0, L - 2)} * activations_last_layer")

    # The turn: the last norm's result, that where there is a label, its gradient; then the logits of n positions at a time, their
    # logarithms of probabilities, which become their gradient, and the head's.
    several = known["T"] > known["n"]  # chunks; the first one's gradients are the sum's beginning
    kept = "" if gpu else f" + T * C * {(2 if s == 2 else 0) + 4 * full}"
    # On a CPU its norm's input in fp32 instead of 16 bits, too, and what a trained weight is multiplied with.
    held = f"{3 - head_only} * T * C * s{kept}"
    if "output" in moved and not full:  # its adapter's gradient, and its 16 bits or the next chunk's gradient
        held += f" + r * (V + C) * {(2 if half else 4) + 4 * several}" + f" + n * C * {mask + b * half}" * dropped
    moments = [f"8 * n * V + {3 if 'output' in moved else 1} * n * C * s"]  # with an adapter: its part, the head's, their sum
    if half:  # in an adapter's gradient, which is rounded to 16 bits and not yet added: no more than two of n x V
        moments = ["10 * n * V"] + ["8 * n * V + r * V * 4"] * ("output" in moved)
    if masters:
        moments = [f"8 * n * V + {6 + 4 * several} * V * C + n * C * 8"]
    elif full:
        moments += [f"8 * n * V + {1 + several} * V * C * g + n * C * b"]
    moments = [f"{text} + {held}" for text in moments]
    apart = f"T * C * {20 if s == 4 else 22}"  # a CPU's norm, backward: five tensors in fp32, and what comes if in 16 bits
    heads = " + V * C * g" if full else " + r * (V + C) * 4" * ("output" in moved)  # gradients, or those of its adapter
    moments += [apart + heads * (not (within or buckets))] * (not gpu)
    if full and within and not flags.fsdp:  # the head is stepped
        moments.append(f"V * C * g + T * C * s{kept}")
    # This GPU's part of a block, when its weights are not what is gathered: FSDP rounds it, or brings it from the host.
    passing = flags.fsdp and (flags.cpu_offload or (full and half and kept_in == 4))
    if passing:  # the last block's, for backward
        moments.append("G / P + T * C * s" + " + V * C * g" * full)
    term("logits and loss", *moments)

    # A block's backward. While its last linears are at work, on top of what the block kept (`rises`): gradients of the
    # feed-forward layer's width, and a weight's gradient or a weight turned back.
    stay = flags.fsdp or not (buckets or within or added)  # gradients, to the block's end; else each goes at once,
    sign = " + " if stay else " - " * (buckets and added)  # and with DDP takes along what earlier rows had added up
    if full:
        rises = ["2 * T * F * b" + f"{sign}C * F * g" * bool(sign) + " - C * F * 2" * masters]
        if not stay:
            rises += ["T * F * b + C * F * b" + " + T * C * b" * masters, "C * F * 4" if masters else "0"]
    else:
        rises = ["3 * T * F * b"]
        if "w2" in moved:  # of its adapter A's gradient is not yet fp32, and B's 16 bits are no longer needed
            rises = ["2 * T * F * b + r * F * b" + f"{sign}r * C * 4" * bool(sign) + " - r * C * 2" * half]
        if flags.quantize != "none":
            # w2 at work in forward: its weight; its result, and of the norm what no adapter keeps: its result, on a CPU its input
            # in 16 bits. If forward is computed again, but w2 keeps nothing, it ends with w3, when w2's part in backward is done.
            norm = (not plain & {"w1", "w3"}) + (half and not gpu)
            forth = f"C * F * b + T * C * {1 + norm} * b" + " + T * F * b" * ("w2" not in plain)
            back = "T * F * b + C * F * b"
            rises += [back] + [forth if "w2" in moved else f"{back} + T * C * {norm} * b"] * again
    # Later the feed-forward layer's tensors are gone, and gradients are there: `left` is all that is then in memory of the block.
    # While attention is at work: the result of the first norm, gradients of what is behind, 16-bit copies of wq, wk, wv.
    late, left = moved & {"wq", "wk", "wv"}, []
    here = (6 if masters else b * bool(full or late)) + (0 if gpu else 4 * (half + full))  # bytes a number, as in `norms`
    here += ((b + mask) * len(late) - b * bool(late)) * dropped
    now, then = (sum(sum(inside[x]) for x in names) for names in (moved & inside.keys() - late, late))  # width of adapters
    if full:
        others = f"{sign}(W - C * C - 2 * C * K) * g" * bool(sign)
    else:
        others = f"{sign}r * {now} * 4" * bool(sign) + f" + r * {then} * 2 + T * r * {len(late)} * b" * half
    late_copies = " + (C * C + 2 * C * K) * 2" * masters
    if flags.attention == "textbook":  # softmax, its gradient and the scores', in fp32; q, k and the gradient of v
        work = f"H * T * T * 12 + T * T + T * C * {3 * b + here}{late_copies}"
        left += [work + others] + [scores] * again
    elif gpu and half:  # flash attention's backward sums q's gradient in fp32; q, k, v, the result and their gradients
        work = f"(T + 128) * (C + H) * 4 + T * C * {8 * b + here}{late_copies}"
        left.append(work + others)
    elif in_blocks:  # of 128 queries' scores three tensors in fp32; heads first q, k and v, which autograd has as they were, too;
        # the result's gradient and a copy; in fp32 k and three gradients
        saved = "" if again else " + T * (C + 2 * K) * 2"
        work = f"H * {min(128, known['T'])} * T * 12 + T * 26 * C{saved} + T * C * {here - 4 * masters}{late_copies}"
        left.append(work + others)
    if masters and stay:  # Before, attention is whole; w1, w2, w3 have gradients, the last still in 16 bits, too; the second norm
        between = f"T * C * {here + 8}"  # has its input, and its result's gradient.
        left.append(f"3 * C * F * 4 + C * F * 2 + (W - 3 * C * F) * 2 + {attention} + {between}")
    elif full and not gpu:  # the second norm's backward, where the first still has its tensors and both their inputs
        left.append(f"{'3 * C * F * g + ' * stay}{attention} + {apart} + T * C * (8 + 2 * b)")
    if full and stay:  # At last all have theirs, wq's made of q's and of the norm's result, whose own is a sum of three.
        left.append("W * 4 + C * C * 2 + T * C * 4" if masters else "W * g + T * C * 4 * b")
        left += [f"W * g + {apart}"] * (not gpu)
    if passing:  # the next one's
        (left if again else rises).append("G / P")
    kept = f"{block}{copies}{' - T * C * s' * bool(gpu or s == 4)}"  # but for its result, which the loss is done with
    if head_only:
        term("a block's backward", "0")
    elif again:  # the block once more
        term("a block's backward", *(f"{kept} + {text}" for text in rises), *left)
    else:
        term("a block's backward", *rises, *(f"{text} - ({kept})" for text in left))

    # The peak: the highest of the moments at which it can be: the loss, the last block's backward, the first's, the optimizer.
    if flags.cpu_offload:
        saved = [f"weights + optimizer_state + 2 * V * C * {kept_in}"] * full  # a whole matrix, put together of what came
        term("in the host's memory", "weights + adapters + gradients + optimizer_state", *saved)
        known |= dict.fromkeys(("weights", "adapters", "gradients", "optimizer_state"), 0)
    always = "".join(f"{x} + " for x in ("weights", "adapters", "optimizer_state", "cuBLAS_workspace") if known[x])
    stays = always + "gradients + " * buckets
    first, activations = "activations_first_layer", "activations_first_layer + activations_middle_layers + activations_last_layer"
    earlier = " + gradients" * (added and not (buckets or flags.cpu_offload))  # of the rows before
    backward = " + a_block_backward + T * C * s"
    if flags.fsdp:  # in backward the block at work and the next one are whole, and the gradients of the last are on their way
        each = 0 if flags.cpu_offload or within or earlier else kept_in  # bytes a number of what a block leaves
        each += 4 * (hybrid and (kept_in == 2 or (each == 0 and not flags.cpu_offload)))
        one, most, all_ = (f" + {count}B / P * {each} / 4" * bool(each) for count in ("", "(L - 2) * ", "L * "))
        moments = [
            stays + "2 * G + 2 * R + T * C * s" + earlier,  # the first block; the last
            stays + f"{first} + activations_middle_layers + T * C * s + 3 * G + R" + earlier,
            stays + activations + earlier + " + logits_and_loss + T * C * s + G + R",
            stays + activations + earlier + heads + backward + " + 2 * G + R",
            stays + f"{first} + activations_middle_layers + B + 2 * G + R" + earlier + one + heads + backward,
            stays + f"2 * {first} + B + 2 * G + R" + earlier + most + heads + backward,
        ]
        # At last what is in no block: copied to be reduced in fp32; reduced, and rounded to what is kept, the head's still there.
        blocks = stays + (earlier + all_)[3:] + " + " * bool(earlier or all_) + "2 * V * C * "
        moments += [f"{blocks}(4 + g)", f"{blocks}(4 + {4 if kept_in == 4 else 4 + kept_in} / P) + V * C * g"] * full
    else:
        head = earlier or heads * (not within)  # or those of the rows before
        if buckets:  # which has its place, and with it goes that of the rows before
            head = " - V * C * g" * (full and added)
        moments = [
            stays + activations + " + T * C * s" + earlier + " + logits_and_loss",
            stays + activations + head + backward,
            always + ("N * g" if buckets else "gradients"),
        ]
        if flags.attention == "textbook":  # the last block, forward
            moments.append(f"{stays}{first} + activations_middle_layers + T * C * s + {scores}{earlier}")
        # A row before the last: from the second on all gradients are there; the first has made them, but for what follows, when
        # its first block is at work.
        if full and buckets and added and gpu and half:
            before = f"{stays}T * C * s + {work}"
            if flags.gradient_accumulation_steps > 2:
                moments.append(f"{before} + {activations if again else f'{first} + activations_middle_layers'}")
            moments.append(f"{before}{f' + {first}' * again} - (V * C + C * C + 2 * C * K) * g")
        if full and within:
            moments.append(stays + "gradients + T * C * s")
        elif not (within or (buckets and added)):
            last = "(W + V * C) * g" if full else f"r * {sum(sum(shapes[x]) for x in moved - {'output'})} * 4"
            made = "0" if buckets else f"gradients - {last}"
            moments.append(stays + f"{made} + {first}" + backward)
            moments.append(stays + "gradients + " * (not buckets) + "T * C * s" + " + V * C * g" * (full and (added or buckets)))
    if not (full or again) and flags.quantize != "none":  # the last block, forward
        moments.append(f"{stays}{activations} + T * C * s + {forth}{earlier}" + " + 2 * G + R" * flags.fsdp)
    term("allocated peak", *moments)
    if flags.cpu_offload:
        terms = {name: term for name, term in terms.items() if name not in KEPT}
    return {name: term for name, term in terms.items() if term[1] or name != "cuBLAS workspace"}


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
