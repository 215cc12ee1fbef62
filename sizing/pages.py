"""What memory.py prints: the breakdown and its picture, what a GPU can do with a model, the most that fits, and the starting
document's table beside this project's count."""

import argparse
import json
from bisect import bisect_right
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

import memory
import train
from helping.files import is_picture, writing
from helping.flags import parse_flags, with_tuples
from memory import Timeline, measure, predict
from model import PRESETS, read_config
from running.settings import check_processes
from sizing.advice import advice, listed, needed, sharded, spelled
from sizing.formula import formula, letters, linears, outer, simulated
from sizing.gpu import GPU, GPUS, find_gpu
from sizing.rehearsal import Rehearsal, copied
from weights.reading import is_in_4_bits

TOTALS = {"allocated peak": "allocated", "reserved": "reserved", "nvidia-smi": "nvidia_smi"}  # as printed, as in --json
GENERIC = GPU("a GPU", 0)  # for who names none


def own_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memory.py", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"memory.py: {message}\n")
    parser.add_argument("--gpu", help=f"{' '.join(GPUS)}, or a size such as 80GB")
    parser.add_argument("--nproc", type=int, default=1, help="processes of torchrun, one a GPU")
    parser.add_argument("--json", action="store_true", help="one object, in bytes")
    parser.add_argument("--plot", metavar="out.png", help="draw the timeline here, over what is there (matplotlib)")
    parser.add_argument("--solve", choices=["batch", "length", "gpus"], help="the largest, or the fewest, that fit --gpu")
    parser.add_argument("--measure", action="store_true", help="run it on this machine's GPU as well, with random weights")
    parser.add_argument("--reproduce", action="store_true", help="the starting document's table, and how it comes down")
    return parser


def answer(words: list[str]) -> None:
    """words: this program's own flags and train.py's. Raises ValueError with one sentence for a user's mistake."""
    parser = own_flags()
    mine, rest = parser.parse_known_args(words)
    if {"-h", "--help"} & set(rest):
        print(memory.__doc__, parser.format_help(), sep="\n")
    elif mine.reproduce:
        if len(words) > 1:
            raise ValueError("--reproduce is of a 7B at 2,048 tokens and takes no other flags")
        return reproduce()
    about = "What a training run will need: train.py's flags, and those above. But here --model is 7b if not given, and may be\n"
    about += f"{', '.join(PRESETS)} or a folder; without --method the answer is for all three."
    given = with_tuples(parse_flags(train.TrainConfig, about, rest))
    name = given.get("model", "7b")
    if name not in PRESETS and not Path(name).exists():
        raise ValueError(f"unknown model {name!r}: known are {', '.join(PRESETS)}, or a folder with weights")
    sizes, gpu, nproc = PRESETS.get(name) or read_config(name), None if mine.gpu is None else find_gpu(mine.gpu), mine.nproc
    on = None if given.get("device") == "cpu" else gpu or GENERIC
    length, window = given.get("model_max_length", train.TrainConfig.model_max_length), sizes.max_seq_len
    too_long = f"--model_max_length {length} is more than the {window} tokens the model was trained to read; for as many a row: "
    too_long += f"--per_device_train_batch_size {-(-length // window)} --model_max_length {window}"
    is_grid = "method" not in given and not mine.solve and not mine.measure and on
    lonely = given.get("fsdp") and nproc == 1 and mine.solve != "gpus"
    wants_bf16 = given.get("dtype") == "bf16" or given.get("pure_bf16")
    for wrong, sentence in (
        (not on and (gpu or nproc > 1), "--device cpu takes neither --gpu nor --nproc"),
        (lonely, "--fsdp shares the model out over several GPUs: --nproc says how many"),
        (mine.solve and not gpu, "--solve needs --gpu, the GPU to fill"),
        (mine.solve and (mine.json or mine.plot), "--solve answers in a line, without --json and --plot"),
        (mine.solve == "gpus" and given.get("hsdp"), "--solve gpus cuts a copy over all GPUs: leave out --hsdp"),
        (is_grid and mine.plot, "--plot draws one run: --method says which"),
        (not 1 <= nproc <= 2048, f"--nproc must be from 1 to 2048, not {nproc}"),
        (on and on.dtype == "fp16" and wants_bf16, f"{mine.gpu} has no bf16: --dtype fp16, its default here, or another GPU"),
        (mine.plot and not is_picture(mine.plot), f"--plot {mine.plot}: name a .png, .pdf or .svg in a folder that is there"),
        (mine.plot and not find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib"),
        (mine.measure and not torch.cuda.is_available(), "--measure: this machine has no CUDA device that PyTorch can use"),
        (length > window, too_long),
    ):
        if wrong:
            raise ValueError(sentence)

    def make(method, **more):
        packed = {"quantize": "nf4"} if method == "qlora" else {}
        usual = on.dtype if on else "bf16" if given.get("pure_bf16") else "fp32"
        dtype = given.get("dtype", "auto") if given.get("dtype", "auto") != "auto" else usual
        return train.TrainConfig(**packed | given | {"dtype": dtype, "method": method} | more)

    targets = {"all-linear", *linears(sizes), *outer(sizes)}
    if unknown := {*given.get("lora_targets", ())} - targets:
        raise ValueError(f"unknown LoRA target {', '.join(sorted(unknown))}: known are {', '.join(sorted(targets))}")
    in_4_bits = name not in PRESETS and is_in_4_bits(name)
    if is_grid:
        return grid(name, sizes, make, on, nproc, mine.json, ["qlora"] if in_4_bits else ["full", "lora", "qlora"])
    flags = make(given.get("method", "qlora" if in_4_bits else "lora"))
    if in_4_bits and flags.quantize != "nf4":
        raise ValueError(f"{name} is packed in 4 bits: --quantize nf4, or --method qlora, uses it so")
    if mine.solve:
        again = "with" if flags.gradient_checkpointing else "without"
        of = f"for {name}, {flags.method} in {flags.dtype}, {again} --gradient_checkpointing"
        return print(solve(mine.solve, sizes, flags, gpu, nproc), of, sep="; ")
    line = simulate(flags, sizes, on, nproc)
    real = measure(Rehearsal(flags, sizes, torch.device("cuda", 0)), torch.device("cuda", 0)) if mine.measure else None

    closed, counted = formula(sizes, flags, on, nproc), simulated(line, sizes.n_layers)
    measured = simulated(real, sizes.n_layers) | {"reserved": real.reserved} if real else {}
    added = gpu_terms(line, on) if on else {}
    arithmetic = {x: text for x, (text, _) in (added | closed).items()}
    order = [x for x in closed if x != "allocated peak"] + (list(added) or ["allocated peak"])
    counted |= {x: size for x, (_, size) in added.items()}
    by_hand = {x: size for x, (_, size) in closed.items()} | ({"CUDA context": on.context} if on else {})
    columns = {"formula": by_hand, "simulated": counted, "measured": measured}
    terms = {x: {key: column.get(x) for key, column in columns.items()} for x in order}
    layers, verdict, need = layer_rows(line), None, (line.reserved or line.peak) + (on.context if on else 0)
    if gpu:
        verdict = {"gpu": gpu.name, "capacity": gpu.memory, "needed": need, "fits": need <= gpu.memory}
        verdict["changes"] = [] if verdict["fits"] else advice(sizes, flags, gpu, nproc, confirmed)
    copy = {"host_copy": copied(flags, sizes, on, nproc)} if flags.async_save else {}
    if mine.json:
        unknown = dict.fromkeys(("formula", "simulated", "measured"))
        result = {"model": name, "method": flags.method, "flags": asdict(flags)} | copy
        result |= {"terms": {x: row for x, row in terms.items() if x not in TOTALS}, "per_layer": layers}
        result |= {"peak": {short: terms.get(x, unknown) for x, short in TOTALS.items()}}
        print(json.dumps(result | {"peak_phase": f"{line.highest.part}, {line.highest.name}", "verdict": verdict}))
    else:
        tokens, where = flags.per_device_train_batch_size * flags.model_max_length, on.name if on else "a CPU"
        upper = "; not compiled, which is an upper bound" * flags.compile
        print(f"{name}, {flags.method}, {tokens:,} tokens a row, {flags.dtype}, on {where}: every position supervised{upper}\n")
        show(letters(sizes, flags, nproc), terms, arithmetic, layers, line)
        if copy:
            print(f"\n{copy['host_copy'] / 1e9:.2f} GB more of the host's memory: the copy for --async_save")
        if verdict:
            fits, room = verdict["fits"], abs(gpu.memory - need) / 1e9
            narrow = " narrowly, as a context differs by 0.1 GB" * (room <= 0.1)
            says = ("fits" if fits else "does not fit") + narrow
            print(f"\nIt {says}: {gpu.name} has {gpu.memory / 1e9:.2f} GB, {room:.2f} ", end="")
            print("stay free." if fits else f"too few.{listed(verdict['changes'])}")
        elif on:
            held = holders(lambda gpu: line.reserved + gpu.context)
            print(f"\nGPUs that hold it: {held}; --gpu NAME says by how much, or what helps.")
    if mine.plot:
        plot(line, mine.plot, gpu, f"{name}, {flags.method}")


def simulate(flags, sizes, gpu: GPU | None, nproc: int = 1) -> Timeline:
    return predict(Rehearsal(flags, sizes, torch.device("cpu"), gpu, processes=nproc))


def confirmed(sizes, flags, gpu: GPU, nproc: int) -> int:
    """Bytes by the formula; where the segments of the allocator, which it leaves out, could decide, those of a simulation."""
    size = needed(sizes, flags, gpu, nproc)
    least = 0.5 if flags.cpu_offload else 0.75  # of what is reserved: what is brought and sent comes from segments of its own
    if least * gpu.memory < size <= gpu.memory:
        size = simulate(flags, sizes, gpu, nproc).reserved + gpu.context
    return size


def gpu_terms(line: Timeline, gpu: GPU) -> dict[str, tuple[str, int]]:
    """What the allocator and the driver add to `formula`: replayed, or usual."""
    return {
        "allocator's rounding": ("rests of up to 1 MiB", line.tails),
        "allocated peak": ("", line.peak),
        "reserved": ("segments of the allocator", line.reserved),
        "CUDA context": ("+- 0.1 GB", gpu.context),
        "nvidia-smi": ("reserved + CUDA context", line.reserved + gpu.context),
    }


def layer_rows(line: Timeline) -> list[dict]:
    """What each layer keeps in forward; what its backward needs on top, adds (mostly gradients) and frees. Second step, bytes."""
    rows, columns = {}, "layer forward_kept forward_peak backward_peak backward_added backward_freed".split()
    for phase in line.phases:
        if phase.part == "second step" and phase.layer is not None:
            row = rows.setdefault(phase.layer, dict.fromkeys(columns) | {"layer": phase.layer})
            if phase.name.startswith("forward"):
                row |= {"forward_kept": phase.kept, "forward_peak": phase.rise}
            else:
                freed = phase.start["activations"] - phase.end["activations"]
                # More than gradients is what FSDP holds for the next layer, or to backward's end. (At layer 0 the gradient
                # that came goes, and none takes its place.)
                added = max(phase.end["gradients"] - phase.start["gradients"], phase.kept + freed)
                row |= {"backward_peak": phase.rise, "backward_added": added, "backward_freed": freed}
    return [rows[i] for i in sorted(rows)]


def table(title: str, columns: list[str], rows, width: int = 38) -> None:
    """Print rows of (name, sizes in bytes or None or words, one for each column, a note) in GB."""
    print(f"{title:{width}}" + "".join(f"{column:>11}" for column in columns))
    for name, *cells, note in rows:
        texts = ["" if cell is None else cell if isinstance(cell, str) else f"{cell / 1e9:,.3f}" for cell in cells]
        print(f"{name:{width}}" + "".join(f"{text:>11}" for text in texts) + f"   {note}".rstrip())


def show(known: dict, terms: dict, arithmetic: dict, layers: list[dict], line: Timeline) -> None:
    """The breakdown, the layers (those like the one before are left out) and the timeline."""
    names = [name for name in ("formula", "simulated", "measured") if any(row[name] is not None for row in terms.values())]
    table("GB (10^9 bytes)", names, [(x, *map(row.get, names), arithmetic[x]) for x, row in terms.items()], 28)
    print("\n" + ", ".join(f"{letter} {value:,}" for letter, value in known.items()))
    totals = [f"{x} {terms[x]['simulated'] / 2**30:.2f} GiB" for x in TOTALS if x in terms]
    print(f"{', '.join(totals)}. The peak is in the {line.highest.part}, {line.highest.name}.\n")
    sizes = [list(row.values())[1:] for row in layers]
    rows = [(f"layer {i}", *row, "") for i, row in enumerate(sizes) if i in (0, len(sizes) - 1) or row != sizes[i - 1]]
    table("GB per layer", ["kept", "peak", "backward", "adds", "frees"], rows, 14)
    ends = [phase for phase in line.phases if phase.layer in (None, 0, len(layers) - 1) or phase is line.highest]
    peak = "<- the peak" + f", {line.peak / 1e9:.3f} with the allocator's rounding" * bool(line.tails)
    rows = [(f"{p.part}, {p.name}", *(x.total() for x in p.moments), peak if p is line.highest else "") for p in ends]
    table("\nGB over time", ["start", "peak", "end"], rows, 39)


def plot(line: Timeline, path: str, gpu: GPU | None, title: str) -> None:
    """A stacked area over the run's phases, and the GPU's memory as a line."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot

    moments = [moment for phase in line.phases for moment in phase.moments]
    kinds = list(dict.fromkeys(kind for moment in moments for kind in moment))
    _, axes = pyplot.subplots(figsize=(11, 5))
    axes.stackplot(range(len(moments)), [[moment[kind] / 1e9 for moment in moments] for kind in kinds], labels=kinds)
    parts = [phase.part for phase in line.phases]
    axes.set_xticks([3 * parts.index(part) for part in dict.fromkeys(parts)], dict.fromkeys(parts), ha="left")
    if gpu:
        axes.axhline((gpu.memory - gpu.context) / 1e9, color="red", label=f"{gpu.name}, less the CUDA context")
    axes.set(ylabel="GB allocated", title=title)
    axes.legend(loc="lower right", fontsize=8)
    with writing(path):
        pyplot.savefig(path, dpi=120)


def grid(name: str, sizes, make, gpu: GPU, nproc: int, as_json: bool, methods: list[str]) -> None:
    """Each method at 1k to 8k tokens with checkpointing, by the formula, and which GPUs hold each."""
    rows, best = [], {}
    for method in methods:
        check_processes(make(method), nproc)
        for tokens in (1024, 2048, 4096, 8192):
            batch = max(1, tokens // sizes.max_seq_len)
            row = {"per_device_train_batch_size": batch, "model_max_length": tokens // batch, "gradient_checkpointing": True}
            flags = make(method, **row)
            size, held = needed(sizes, flags, gpu, nproc), holders(lambda gpu, flags=flags: needed(sizes, flags, gpu, nproc))
            fits = size <= gpu.memory if gpu.memory else None
            row = {"method": method, "tokens": tokens, "batch": batch, "bytes": size, "fits": fits}
            rows.append(row | {"held_by": [] if held.startswith("none") else held.split()})
            if fits:
                best.setdefault(method, []).append(flags)
    if as_json:
        return print(json.dumps({"model": name, "grid": rows}))
    print("By the formula, with --gradient_checkpointing: the allocated peak and the CUDA context; the GPUs that hold it\n")
    lines = [(f"{row['method']:6}{row['tokens']:>5} tokens  ", row["bytes"], " ".join(row["held_by"]) or "none") for row in rows]
    table("GB (10^9 bytes)", ["needed"], lines, 20)
    print()
    if not gpu.memory:
        return print("--method shows one of them in full; --gpu NAME says what that GPU can do.")
    if best:
        most = [f"{x} to {y[-1].per_device_train_batch_size * y[-1].model_max_length} tokens" for x, y in best.items()]
        print(f"On {gpu.name} ({gpu.memory / 1e9:.2f} GB): {', '.join(most)}")
        tried = best.get("full", []) + best.get("qlora", []) + best.get("lora", [])  # lora's longest first
        begin = next((x for x in tried[::-1] if confirmed(sizes, x, gpu, nproc) <= gpu.memory), None)
        if begin:
            return print(f"To begin with: {command(begin, gpu, nproc)}")
        print("None leaves room for the allocator.")
    least = make("qlora", model_max_length=512, gradient_checkpointing=True)
    if not best:
        print(f"None fits whole on {gpu.name} ({gpu.memory / 1e9:.2f} GB): the least, qlora at 512 tokens, takes ", end="")
        print(f"{needed(sizes, least, gpu, nproc) / 1e9:.2f} GB.")
        print(f"  one GPU that holds it: {holders(lambda gpu: needed(sizes, least, gpu))}")
    print(f"  {within(sizes, make, gpu, nproc) if nproc > 1 else fewest(sizes, least, gpu)}")


def command(flags, gpu: GPU, nproc: int) -> str:
    """How train.py is called to do this."""
    packed = {"quantize": "nf4"} if flags.method == "qlora" else {}
    usual = train.TrainConfig(method=flags.method, model=flags.model, data=flags.data, dtype=gpu.dtype, **packed)
    start = f"torchrun --nproc_per_node {nproc}" if nproc > 1 else "python"
    return f"{start} train.py --method {flags.method} --model FOLDER --data RECORDS {spelled(flags, usual)}"


def holders(need) -> str:
    """The known GPUs whose memory is at least need(gpu) bytes."""
    return " ".join(gpu.name for gpu in GPUS.values() if need(gpu) <= gpu.memory) or "none of those known"


def within(sizes, make, gpu: GPU, nproc: int) -> str:
    """What so many GPUs can do with a model that no one of them holds: QLoRA in shards, at the longest length that fits."""
    for more in ({}, {"cpu_offload": True}):
        for length in (4096, 2048, 1024, 512):
            longest = {"model_max_length": min(length, sizes.max_seq_len), "gradient_checkpointing": True}
            flags = sharded(make("qlora", **longest), **more)
            if needed(sizes, flags, gpu, nproc) > gpu.memory:
                continue
            line = simulate(flags, sizes, gpu, nproc)
            if (need := line.reserved + gpu.context) <= gpu.memory:
                waits = f", and {nproc} x {line.host / 1e9:.2f} GB of the host's memory" * flags.cpu_offload
                size = f"{need / 1e9:.2f} of {gpu.memory / 1e9:.2f} GB each, simulated{waits}"
                tokens = f"{nproc} x {gpu.name} in shards, {flags.model_max_length:,} tokens a row"
                return f"{tokens}: {size}\n  {command(flags, gpu, nproc)}"
    least = make("qlora", model_max_length=512, gradient_checkpointing=True)
    return f"{nproc} x {gpu.name} do not hold it in shards either, nor with --cpu_offload; {fewest(sizes, least, gpu)}"


def filled(gpu: GPU, runs: list) -> tuple[int, int]:
    """How many of these runs, of which each needs more than the one before, fit the GPU, and the bytes that the last one needs:
    sought with the formula, which gives the next to simulate, until one is found that fits where the next does not.
    runs: (sizes, flags, processes)."""
    fit, no, beyond, size = 0, len(runs) + 1, 0, 0  # beyond: what the last simulation needed beyond the formula

    def arithmetic(run):
        return needed(run[0], run[1], gpu, run[2])

    while no - fit > 1:
        i = min(max(bisect_right(runs, gpu.memory - beyond, key=arithmetic), fit + 1), no - 1)
        need = closed = arithmetic(run := runs[i - 1])
        if closed <= 1.02 * gpu.memory:
            line = simulate(run[1], run[0], gpu, run[2])
            need = line.reserved + gpu.context
            beyond = need - closed
        if need <= gpu.memory:
            fit, size = i, need
        else:
            no = i
    return fit, size


def fewest(sizes, flags, gpu: GPU) -> str:
    """The fewest GPUs that hold it: one, or more in shards."""
    whole = replace(flags, fsdp=False, cpu_offload=False)
    shards = [(sizes, sharded(flags), count) for count in range(512, 1, -1)]
    for runs in [(sizes, whole, 1)], shards:
        fit, need = filled(gpu, runs)
        if fit:
            count = runs[fit - 1][2]
            how = f"{count} x {gpu.name}" + f", --nproc {count} --fsdp" * (count > 1)
            return f"{how}: {need / 1e9:.2f} of {gpu.memory / 1e9:.2f} GB each, simulated"
    return f"no number of {gpu.name} up to 512: what is not sharded, activations and loss, is too much; --solve length"


def solve(what: str, sizes, flags, gpu: GPU, nproc: int) -> str:
    """The largest batch or length, or the fewest GPUs, that fit."""
    if what == "gpus":
        return fewest(sizes, flags, gpu)
    name, values = "per_device_train_batch_size", range(1, 4097)
    if what == "length":
        name, values = "model_max_length", range(128, sizes.max_seq_len + 1, 128) or [sizes.max_seq_len]
    fit, need = filled(gpu, [(sizes, replace(flags, **{name: value}), nproc) for value in values])
    if not fit:
        return f"not even --{name} {values[0]} fits on {gpu.name}; without --solve this program says what would"
    found = f"--{name} {values[fit - 1]}"
    if fit < len(values):
        found += f" is the largest on {gpu.name}" + " in steps of 128" * (what == "length")
    else:
        found += f" fits on {gpu.name}, and is " + ("all that the model was trained to read" if what == "length" else "all tried")
    return f"{found}: {need / 1e9:.2f} of {gpu.memory / 1e9:.2f} GB, simulated"


def reproduce() -> None:
    """The starting document's sum (7B, 2,048 tokens, fp16, textbook attention) beside the count, and how it comes down."""

    class Document(Rehearsal):
        """16 bits throughout and AdamW straight on them, which train.py refuses to do: here it is only counted."""

        def build(self):
            model, _ = super().build()
            self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            return model, self.optimizer

    sizes, base = PRESETS["7b"], {"model_max_length": 2048, "dtype": "bf16", "device": "cpu"}
    pure, again = {"method": "full", "optim": "adamw_8bit", "pure_bf16": True}, {"gradient_checkpointing": True}
    flags = train.TrainConfig(**base | pure, attention="textbook")
    line = predict(Document(flags, sizes, torch.device("cpu"), GENERIC))
    closed, counted = {x: size for x, (_, size) in formula(sizes, flags, GENERIC).items()}, simulated(line, sizes.n_layers)
    first, other, layer = "activations, first layer", "activations, last layer", layer_rows(line)[1]
    moments, block = 2 * closed["weights"], 2 * sum(out * inn for out, inn in linears(sizes).values())
    stated = [
        ("weights", 13.5e9, closed["weights"], counted["weights"], "rounded; its norms, 0.0005, were never registered"),
        ("forward, first layer", 0.844e9, closed[first], counted[first], "theirs is what nvidia-smi rose by: segments"),
        ("forward, each other layer", 0.76e9, closed[other], counted[other], "likewise; its tensors are the next line"),
        ("  its tensors", 0.7172e9, closed[other], counted[other], "+ 0.537 for a softmax in fp32, + 0.004 for the mask,"),
        ("", None, None, None, "- 0.067 for copies that its rotation kept,"),
        ("", None, None, None, "- 0.067 for its norms' inputs in fp32,"),
        ("", None, None, None, "- 0.045 for silu(gate), which is made again"),
        ("backward, a layer adds", 1e9, block, layer["backward_added"], "only gradients stay; the rest was segments"),
        ("backward, a layer frees", None, closed[other], layer["backward_freed"], "not subtracted in its sum"),
        ("all gradients", None, closed["gradients"], counted["gradients"], "the embedding's and the head's too"),
        ("AdamW's two moments", None, moments, counted["weights"] * 2, "left out of its sum"),
        ("its sum / the peak", 69.904e9, None, counted["allocated peak"], "gradients come while activations go"),
    ]
    table("GB (10^9 bytes)", ["document", "formula", "simulated"], stated, 28)
    print("\nThe same fine-tuning step by step (2,048 tokens, allocated peak on a GPU, GB):\n")
    for text, peak in (
        ("the document: its sum", 69.904e9),
        ("... with the AdamW moments it left out", 69.904e9 + moments),
        ("here: 16 bits throughout, textbook attention, AdamW", line.peak),
        ("full, fp32 masters, flash attention: no T x T matrix", {"method": "full"}),
        ("+ pure bf16 and 8-bit AdamW: 2 + 2 + 2 bytes a weight, not 16", pure),
        ("+ gradient checkpointing: no less, the peak is where gradients are", pure | again),
        ("LoRA: no gradients and moments but the adapters'", {}),
        ("+ gradient checkpointing: a block's input kept, not its inside", again),
        ("QLoRA + gradient checkpointing: the weights in 4 bits", {"method": "qlora", "quantize": "nf4"} | again),
    ):
        if isinstance(peak, dict):
            peak = simulate(train.TrainConfig(**base | peak), sizes, GENERIC).peak
        print(f"{text:62}{peak / 1e9:>9.2f}")
