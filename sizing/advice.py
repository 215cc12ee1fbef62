"""Will it fit, and if not, what would: by the closed form, which answers in a millisecond where a simulation takes seconds."""

from dataclasses import asdict, replace

from helping.files import free_memory
from sizing.formula import formula
from sizing.gpu import GPU


def needed(s, flags, gpu: GPU, nproc: int = 1) -> int:
    """Bytes by the formula: the allocated peak and the context."""
    return formula(s, flags, gpu, nproc)["allocated peak"][1] + gpu.context


def spelled(flags, usual) -> str:
    """The flags in which these settings are not the usual ones, as they are given to train.py and memory.py."""
    differ = ((name, value) for name, value in asdict(flags).items() if value != getattr(usual, name))
    return " ".join(f"--{name} {' '.join(value) if isinstance(value, tuple) else value}" for name, value in differ)


def cheaper(flags, nproc: int = 1, half: str = "bf16") -> list[tuple[str, dict]]:
    """Changes that save memory, the cheapest first: (what it is and costs, the flags it changes). half: 16 bits of the GPU."""
    full, batch, length = flags.method == "full", flags.per_device_train_batch_size, flags.model_max_length
    rows, alone = flags.gradient_accumulation_steps, not flags.optimizer_in_backward
    pure, qlora = {"optim": "adamw_8bit", "pure_bf16": True}, {"method": "qlora", "quantize": "nf4"}
    lora = {"method": "lora", "pure_bf16": False, "optim": "adamw", "optimizer_in_backward": False}
    lora["max_grad_norm"] = flags.max_grad_norm if alone else 1.0
    parts = next((n for n in range(2, batch + 1) if batch % n == 0), 1)  # as many rows as make the same step
    fewer = {"per_device_train_batch_size": batch // parts, "gradient_accumulation_steps": rows * parts}
    one = full and alone and batch == rows == 1 and flags.dtype != "fp16" and (flags.fsdp or nproc == 1)
    ways = [
        (flags.attention == "textbook", "no T x T matrix", {"attention": "sdpa"}),
        (flags.hsdp, f"in shards over all {nproc} GPUs", {"hsdp": 0}),
        (nproc > 1 and not flags.fsdp, f"in shards over the {nproc} GPUs", {"fsdp": True}),
        (flags.dtype == "fp32" and (alone or half == "bf16"), "computed in 16 bits", {"dtype": half}),
        (not flags.gradient_checkpointing, f"a {'quarter' if full else 'half'} more time", {"gradient_checkpointing": True}),
        (flags.lora_dropout and not full, "no dropout, of which every adapter keeps its own input", {"lora_dropout": 0.0}),
        (full and flags.optim == "adamw", "the same losses within 1 %", {"optim": "adamw_8bit"}),
        (full and not flags.pure_bf16 and flags.dtype == "bf16", "no fp32 weights", pure),
        (one, "one gradient at a time, never clipped", {"optimizer_in_backward": True, "max_grad_norm": 0.0}),
        (flags.method == "lora" and flags.quantize != "nf4", "4-bit weights, a little slower", qlora),
        (flags.fsdp and not flags.cpu_offload, "what stays waits in the host's memory", {"cpu_offload": True}),
        (batch > 1 and alone, "the same steps", fewer),
        (batch == 1 and length > 256, "cutting documents", {"model_max_length": length // 2}),
        (full, "other weights stay as they are", lora),
        (full, "and in 4 bits", lora | qlora),
    ]
    return [(f"{spelled(replace(flags, **new), flags)}, {cost}", new) for useful, cost, new in ways if useful]


def sharded(flags, **more):
    """The same in shards over all GPUs."""
    return replace(flags, fsdp=True, hsdp=0, **more)


def advice(sizes, flags, gpu: GPU, nproc: int, needed=needed) -> list[dict]:
    """Each change by itself; if none is enough, one after the other together; then more GPUs. [{change, bytes, fits}]

    Who trains every weight is told of adapters, but all else comes before them. needed: what says the bytes."""
    found, full, now = [], flags.method == "full", needed(sizes, flags, gpu, nproc)

    def fits(change, flags, nproc=nproc):
        size = needed(sizes, flags, gpu, nproc)
        if size < now:  # else it is no help
            found.append({"change": change, "bytes": size, "fits": size <= gpu.memory})
        return size <= gpu.memory

    ways = cheaper(flags, nproc, gpu.dtype)
    alone = [fits(change, replace(flags, **new)) and not (full and "method" in new) for change, new in ways]
    if any(alone):
        return found
    for method in ("the same", "another") if full else ("another",):
        tried, count = flags, 0
        while ways := [new for _, new in cheaper(tried, nproc, gpu.dtype) if method == "another" or "method" not in new]:
            if len(ways) == 1 and tried.model_max_length <= 512:
                break
            tried, count = replace(tried, **ways[0]), count + 1
            if count > 1 and fits(spelled(tried, flags), tried):
                return found
        for count in sorted({nproc, 2, 4, 8, 16} - {*range(nproc), 1}):
            for more in ({}, {"cpu_offload": True}):
                words = f"--nproc {count} {spelled(sharded(tried, **more), flags)}, sharded over {count} GPUs"
                if fits(words, sharded(tried, **more), count):
                    return found
    return found


def listed(ways: list[dict]) -> str:
    title = "What would help (estimates):" if any(way["fits"] for way in ways) else "None of this is enough:"
    rows = (f"\n  {way['bytes'] / 1e9:>8.2f} GB  {'fits' if way['fits'] else 'no':5} {way['change']}" for way in ways)
    return f" {title}{''.join(rows)}"


def explain_out_of_memory(sizes, flags, gpu: GPU | None, nproc: int, peak: int | None = None, in_use: int | None = None) -> str:
    """What to say when memory ran out, or will: bytes in use, the peak predicted (None: by the formula), what helps."""
    terms = {name: size for name, (_, size) in formula(sizes, flags, gpu, nproc).items()}
    gpu, peak = gpu or GPU("this machine", free_memory(), context=0), peak or terms["allocated peak"]
    largest = sorted(terms.keys() - {"allocated peak", "in the host's memory"}, key=terms.get, reverse=True)[:4]
    used = "" if in_use is None else f"out of memory: {in_use / 1e9:.2f} of {gpu.memory / 1e9:.2f} GB were in use, "
    most = ", ".join(f"{name} {terms[name] / 1e9:.2f}" for name in largest)
    return f"{used}a peak of {peak / 1e9:.2f} GB was predicted, most of it {most}." + listed(advice(sizes, flags, gpu, nproc))
