"""Will it fit, and if not, what would: by the closed form, which answers in a millisecond where a simulation takes seconds."""

from dataclasses import asdict, replace

from sizing.formula import formula
from sizing.gpu import GPU


def needed(s, flags, gpu: GPU, nproc: int = 1) -> int:
    """Bytes by the formula: the allocated peak and the context."""
    return formula(s, flags, gpu, nproc)["allocated peak"][1] + gpu.context


def cheaper(flags, nproc: int = 1) -> list[tuple[str, dict]]:
    """Changes that save memory, the cheapest first: (what it is and costs, the flags it changes)."""
    full, batch, length = flags.method == "full", flags.per_device_train_batch_size, flags.model_max_length
    pure, qlora = {"optim": "adamw_8bit", "pure_bf16": True}, {"method": "qlora", "quantize": "nf4"}
    lora = {"method": "lora", "pure_bf16": False, "optim": "adamw", "optimizer_in_backward": False}
    within = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    fewer = {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": flags.gradient_accumulation_steps * 2}
    alone, one = not flags.optimizer_in_backward, batch == flags.gradient_accumulation_steps == 1
    one = full and alone and one and flags.dtype != "fp16" and (flags.fsdp or nproc == 1)
    halved = f"--per_device_train_batch_size {batch // 2} and twice the accumulation, the same steps"
    ways = [
        (nproc > 1 and not flags.fsdp, f"--fsdp True, in shards over the {nproc} GPUs", {"fsdp": True}),
        (not flags.gradient_checkpointing, "--gradient_checkpointing, a third more time", {"gradient_checkpointing": True}),
        (full and flags.optim == "adamw", "--optim adamw_8bit, the same losses within 1 %", {"optim": "adamw_8bit"}),
        (full and not flags.pure_bf16 and flags.dtype == "bf16", "--pure_bf16 --optim adamw_8bit, no fp32 weights", pure),
        (one, "--optimizer_in_backward --max_grad_norm 0, one gradient at a time, never clipped", within),
        (flags.method == "lora" and flags.quantize != "nf4", "--method qlora, 4-bit weights, a little slower", qlora),
        (
            flags.fsdp and not flags.cpu_offload,
            "--cpu_offload True, what stays waits in the host's memory",
            {"cpu_offload": True},
        ),
        (batch > 1 and alone, halved, fewer),
        (batch == 1 and length > 256, f"--model_max_length {length // 2}, cutting documents", {"model_max_length": length // 2}),
        (full, "--method lora, other weights stay as they are", lora),
        (full, "--method qlora", lora | qlora),
    ]
    return [(change, new) for useful, change, new in ways if useful]


def sharded(flags, **more):
    """The same in shards."""
    return replace(flags, fsdp=True, **more)


def advice(sizes, flags, gpu: GPU, nproc: int) -> list[dict]:
    """Each change by itself; if none is enough, one after the other together; then more GPUs. [{change, bytes, fits}]

    Who trains every weight is told of adapters, but all else comes before them."""
    found, full = [], flags.method == "full"

    def fits(change, flags, nproc=nproc):
        size = needed(sizes, flags, gpu, nproc)
        found.append({"change": change, "bytes": size, "fits": size <= gpu.memory})
        return size <= gpu.memory

    alone = [fits(change, replace(flags, **new)) and not (full and "method" in new) for change, new in cheaper(flags, nproc)]
    if any(alone):
        return found
    for method in ("the same", "another") if full else ("another",):
        tried, count = flags, 0
        while ways := [new for _, new in cheaper(tried, nproc) if method == "another" or "method" not in new]:
            if len(ways) == 1 and tried.model_max_length <= 512:
                break
            tried, count = replace(tried, **ways[0]), count + 1
            words = [f"--{name} {value}" for name, value in asdict(tried).items() if value != getattr(flags, name)]
            if count > 1 and fits(" ".join(words), tried):
                return found
        for count in sorted({nproc, 2, 4, 8, 16} - {*range(nproc), 1}):
            for more in ({}, {"cpu_offload": True}):
                words = f"the same, sharded over {count} GPUs: --nproc {count} --fsdp" + " --cpu_offload" * bool(more)
                if fits(words, sharded(tried, **more), count):
                    return found
    return found


def listed(ways: list[dict]) -> str:
    return "".join(f"\n  {way['bytes'] / 1e9:>8.2f} GB  {'fits' if way['fits'] else 'no':5} {way['change']}" for way in ways)


def explain_out_of_memory(sizes, flags, gpu: GPU | None, nproc: int, peak: int | None = None, in_use: int | None = None) -> str:
    """What to say when memory ran out, or will: bytes in use, the peak predicted (None: by the formula), what helps."""
    terms = {name: size for name, (_, size) in formula(sizes, flags, gpu, nproc).items()}
    gpu, peak = gpu or GPU("this machine", 0), peak or terms["allocated peak"]
    largest = sorted(terms.keys() - {"allocated peak"}, key=terms.get, reverse=True)[:4]
    used = "" if in_use is None else f"out of memory: {in_use / 1e9:.2f} of {gpu.memory / 1e9:.2f} GB were in use, "
    most = ", ".join(f"{name} {terms[name] / 1e9:.2f}" for name in largest)
    return f"{used}a peak of {peak / 1e9:.2f} GB was predicted, most of it {most}" + listed(advice(sizes, flags, gpu, nproc))
