"""Decoding here beside transformers.generate: the same weights, the same prompts, in turns.

    python benchmarks/decode.py [--preset 125m|1b] [--device cuda] [--quantize none int8 nf4] [--batch 1 8] [--how eager compiled]

Each contestant is a process of its own that waits for its turn: nobody is in the way of another. A turn is an answer of
--new_tokens tokens to each of --batch prompts of 32 random tokens, greedy. Taken are the time to the first token and the median
of the other steps, of several turns the best, so that on a shared machine a disturbed turn does not count. GB/s: the bytes of
all weights but the embedding's, which a step reads once, times steps a second; beside it that of a plain bf16 product of one
row with matrices of w1's shape, 600 MB of them, so that none is in the cache. Compiled are ours as --compile does
and transformers with its static cache and torch.compile; what compiling took is printed with the rest.

    python benchmarks/decode.py --loading [--preset 1b]

times load_model instead, in turns with reading the file's bytes into fresh memory, after both were done once: a warm disk."""

import argparse
import math
import sys
import time
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from turns import Contestant, answer, weights  # noqa: E402

from helping.malloc import keep_freed_memory  # noqa: E402
from model import PRESETS, load_model  # noqa: E402


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(3, 32000, (batch, 32), generator=torch.Generator().manual_seed(0))


def ours(options, quantize: str, compiled: bool):
    """(a function of the batch size, bytes of weights a step reads)"""
    from generate import Sampling, compile_decoding, generate_batch
    from quant import QUANTIZERS
    from talking.cpu import order_for_cpu

    model = load_model(options.folder, device=options.device, dtype=torch.bfloat16, quantize=QUANTIZERS[quantize]).eval()
    read = sum(p.nbytes for name, p in model.named_parameters() if "tok_embeddings" not in name)
    (compile_decoding if compiled else order_for_cpu)(model)
    sampling = Sampling(max_new_tokens=options.new_tokens)

    def turn(batch, step):
        for index, _ in generate_batch(model, prompts(batch).tolist(), sampling):
            if index == 0:
                step()

    return torch.inference_mode()(turn), read  # as the program answers


def theirs(options, quantize: str, compiled: bool):
    """What the library's documentation shows; 4 bits with bitsandbytes; compiled with the static cache."""
    import transformers

    how = {"dtype": torch.bfloat16, "attn_implementation": "sdpa", "device_map": {"": options.device}}
    if quantize != "none":
        bits = {"load_in_8bit": True} if quantize == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        if quantize == "nf4":
            bits |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
        how["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, **how).eval()
    read = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
    if compiled:
        how["compile_config"] = transformers.CompileConfig(mode="reduce-overhead" if options.device == "cuda" else "default")
        how["compile_config"]._compile_all_devices = True
        how["cache_implementation"] = "static"

    def turn(batch, step):
        ids = prompts(batch).to(options.device)
        calls = count(-1)  # the first call brings the prompt
        streamer = SimpleNamespace(put=lambda tokens: step() if next(calls) >= 0 else None, end=lambda: None)
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **how)

    return turn, read


def product(options, *_):
    """The plain product: its steps are passes over the matrices."""
    config = PRESETS[options.preset]
    copies = max(1, 600_000_000 // (2 * config.dim * config.hidden_dim))
    matrices = [torch.randn(config.hidden_dim, config.dim, device=options.device).bfloat16() for _ in range(copies)]
    x = torch.randn(1, config.dim, device=options.device).bfloat16()

    def turn(batch, step):
        for _ in range(3):
            for weight in matrices:
                F.linear(x, weight)
            if options.device == "cuda":
                torch.cuda.synchronize()
            step()

    return torch.inference_mode()(turn), sum(weight.nbytes for weight in matrices)


def contestant(options) -> None:
    """Say the bytes of the weights, then answer every line on stdin, a batch size, with the seconds to the first token, of the
    median step after it, and of all."""
    kind, quantize, how = options.who.split(":")
    turn, read = {"ours": ours, "theirs": theirs, "product": product}[kind](options, quantize, how == "compiled")
    answer({"read": read})
    for line in sys.stdin:
        times = [time.perf_counter()]
        turn(int(line), lambda times=times: times.append(time.perf_counter()))
        first, *steps = [after - before for before, after in pairwise(times)]
        answer({"first": first, "step": median(steps), "all": times[-1] - times[0]})


def loading(options) -> None:
    """Seconds of load_model for each format of the weights, the best of --rounds turns, beside reading the file's bytes."""
    from quant import QUANTIZERS
    from talking.cpu import CPULinear

    (file,) = Path(options.folder).glob("*.safetensors")

    used = bytearray(file.stat().st_size)

    def read():
        return file.read_bytes()

    def read_again():
        with file.open("rb") as opened:
            assert opened.readinto(used) == len(used)

    def load(linear=None):
        return load_model(options.folder, device=options.device, dtype=torch.bfloat16, quantize=linear)

    if options.device == "cpu":
        keep_freed_memory()  # as generate.py does
    ways = {"reading the bytes": read, "reading them into memory in use": read_again, "bf16, plain rows": load}
    if CPULinear.helps(torch.device(options.device), torch.bfloat16):
        ways["bf16, in the CPU's order"] = lambda: load(CPULinear)
    ways |= {name: lambda linear=QUANTIZERS[name]: load(linear) for name in options.quantize if name != "none"}
    best = dict.fromkeys(ways, math.inf)
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                best[name] = min(best[name], time.perf_counter() - began)
    print(f"{file.stat().st_size / 1e9:.2f} GB\n\n| | s | of reading the bytes |\n|---|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.2f} | {seconds / best['reading the bytes']:.2f} |")


def compare(options, began: float) -> None:
    names = ["product::"]
    for quantize in options.quantize:
        for how in options.how:
            if quantize == "none" or how == "eager" or options.device == "cuda":
                names.append(f"ours:{quantize}:{how}")
            if quantize == "none" or (how == "eager" and (options.device == "cuda" or options.bitsandbytes)):
                names.append(f"theirs:{quantize}:{how}")
    people = [Contestant(name, ["--folder", options.folder, "--who", name]) for name in names]
    read = {one.name: (one.hear() or {}).get("read") for one in people}  # bytes of weights
    batches = {one.name: options.batch[:1] if one.name == "product::" else options.batch for one in people}
    cold, best = {}, {}

    def note(one, batch):
        if said := one.hear():
            before = best.get((one.name, batch), said)
            best[one.name, batch] = {what: min(before[what], said[what]) for what in said}
            cold.setdefault((one.name, batch), said["all"])

    together = options.device == "cuda"  # the first time, all compile at once; on a CPU they would be in each other's way
    for _ in range(options.rounds + 1):
        for batch in options.batch:
            asked = [one for one in people if batch in batches[one.name]]
            for one in asked:
                one.say(batch)
                if not together:
                    note(one, batch)
            for one in asked if together else ():
                note(one, batch)
        together = False
        if time.monotonic() - began > options.seconds:
            break
    for one in people:
        one.leave()

    plain = read["product::"] / best["product::", options.batch[0]]["step"] / 1e9
    print(f"plain bf16 product of one row: {plain:.1f} GB/s\n")
    print("| | batch | tokens/s | GB/s | of the product | to transformers, bf16 | first token, s | cold turn, s |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in options.batch:
        step = {one.name: best[one.name, batch]["step"] for one in people[1:] if (one.name, batch) in best}
        theirs = min((seconds for who, seconds in step.items() if who.startswith("theirs:none")), default=math.nan)
        for one in people[1:]:
            kind, quantize, how = one.name.split(":")
            name = f"{kind}, {'bf16' if quantize == 'none' else quantize}{', compiled' if how == 'compiled' else ''}"
            if one.name not in step:
                print(f"| {name} | {batch} | failed: {one.failed} |")
                continue
            seconds, speed = step[one.name], read[one.name] / step[one.name] / 1e9
            cells = [name, batch, f"{batch / seconds:.1f}", f"{speed:.1f}", f"{speed / plain:.0%}", f"{theirs / seconds:.2f}"]
            cells += [f"{best[one.name, batch]['first']:.2f}", f"{cold[one.name, batch]:.1f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Decoding here and with transformers.generate, in turns.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="125m")
    parser.add_argument("--quantize", nargs="+", choices=("none", "int8", "nf4"), default=["none"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each that count")
    parser.add_argument(
        "--how", nargs="+", choices=("eager", "compiled"), default=["eager"], help="with torch.compile or without"
    )
    parser.add_argument("--bitsandbytes", action="store_true", help="also transformers + bitsandbytes on a CPU")
    parser.add_argument("--loading", action="store_true", help="instead: how long loading takes")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further round after so many")
    parser.add_argument("--folder", help="weights of --preset that are there already, instead of random ones made first")
    parser.add_argument("--who", help=argparse.SUPPRESS)
    began, options = time.monotonic(), parser.parse_args()
    if options.who:
        return contestant(options)
    with weights(options.preset, options.device, options.folder) as options.folder:
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}, {options.preset}, bf16, "
            f"{options.new_tokens} tokens after 32"
        )
        loading(options) if options.loading else compare(options, began)


if __name__ == "__main__":
    main()
