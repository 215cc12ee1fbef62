"""A training step here beside transformers + PEFT (+ bitsandbytes for QLoRA): the same weights, the same tokens, in turns.

    python benchmarks/step.py --methods lora qlora [--preset 125m] [--device cuda] [--sequences 2] [--length 512] [--dtype bf16]

Each contestant is a process of its own that waits for its turn, so nobody's memory or threads are in another's way. Theirs gets
padded-free batches (sequences, length), ours the same tokens as one stream. A step is forward, backward, clipping and AdamW;
the tokens are random, so every position but the last of a sequence is supervised. Printed: the fastest step, tokens/s, the peak
of memory from the first step on (CUDA: the allocator's; CPU: the process's, the model included), and both first losses."""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from generate import DTYPES  # noqa: E402
from model import PRESETS, Llama, save_hf  # noqa: E402


def random_tokens(options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 32000, (options.sequences, options.length), generator=generator)


def our_step(options):
    """train.py's own build and step."""
    from train import TrainConfig, Workers, build, make_optimizer, training_step

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    config = TrainConfig(
        model=options.folder,
        method=options.method,
        quantize="nf4" if options.method == "qlora" else "none",
        dtype=options.dtype,
        learning_rate=1e-4,
    )
    model = build(config, device)
    model.train()
    optimizer, scaler = make_optimizer(config, model), torch.amp.GradScaler(options.device, enabled=False)
    autocast = partial(torch.autocast, options.device, dtype, enabled=options.method == "full" and dtype != torch.float32)
    tokens = random_tokens(options)
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    borders = torch.arange(0, tokens.numel() + 1, options.length, dtype=torch.int32)
    batch = {"tokens": tokens.flatten(), "cu_seqlens": borders, "labels": labels.flatten()}
    workers = Workers(device)
    return lambda: training_step(config, model, optimizer, scaler, [batch], 1e-4, workers, autocast)[0]


def their_step(options):
    """What the libraries' documentation shows: a quantised or bf16 base, PEFT on all linears, fused AdamW, clipping at 1."""
    import peft
    import transformers

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    how = {"dtype": torch.float32 if options.method == "full" else dtype, "attn_implementation": "sdpa"}
    if options.method == "qlora":
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    how["device_map"] = {"": options.device}
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, **how)
    if options.method == "qlora":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if options.method != "full":
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = random_tokens(options).to(device)

    def step():
        with torch.autocast(options.device, dtype, enabled=options.method == "full" and dtype != torch.float32):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def contestant(options) -> None:
    """Say "ready", then answer every line on stdin with one step: {"seconds", "loss"}; at the end of stdin say the peak."""
    step = (our_step if options.who == "ours" else their_step)(options)
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()  # reads the loss, so the GPU has finished
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), flush=True)
    status = Path("/proc/self/status").read_text() if not cuda else ""
    peak = torch.cuda.max_memory_allocated() if cuda else int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"peak": peak}), flush=True)


def compare(options) -> None:
    """Run every method, ours and theirs, a step each in turns, and print a row a method."""
    common = [sys.executable, __file__, *sys.argv[1:], "--folder", options.folder]
    people = {
        (method, who): subprocess.Popen(
            [*common, "--method", method, "--who", who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for method in options.methods
        for who in ("ours", "theirs")
    }

    def heard(who):
        while line := people[who].stdout.readline():
            if line.startswith(("{", '"ready"')):  # libraries print on stdout as well
                return json.loads(line)
        raise SystemExit(f"{who} stopped; see above")

    for who in people:
        heard(who)
    best, first, peak = dict.fromkeys(people, math.inf), {}, {}
    for _ in range(options.rounds):
        for who, process in people.items():
            process.stdin.write("\n")
            process.stdin.flush()
            said = heard(who)
            best[who] = min(best[who], said["seconds"])
            first.setdefault(who, said["loss"])
    for who, process in people.items():
        process.stdin.close()
        peak[who] = heard(who)["peak"]
        process.wait()
    count = options.sequences * options.length
    for method in options.methods:
        ours, theirs = (method, "ours"), (method, "theirs")
        cells = [f"{best[who]:.3f} s, {count / best[who]:,.0f}" for who in (ours, theirs)] + [f"{best[theirs] / best[ours]:.2f}"]
        cells += [f"{peak[who] / 1e9:.2f}" for who in (ours, theirs)] + [f"{peak[ours] / peak[theirs]:.2f}"]
        print(f"| {method} | " + " | ".join(cells) + f" | {first[ours]:.4f}, {first[theirs]:.4f} |", flush=True)
    if {"lora", "qlora"} <= set(options.methods):
        ratio = best["qlora", "ours"] / best["lora", "ours"]
        print(f"\nOur QLoRA step takes {ratio:.2f} times our LoRA step.")


def main():
    parser = argparse.ArgumentParser(description="A training step here and with transformers + PEFT, in turns.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="125m")
    parser.add_argument("--methods", nargs="+", choices=("lora", "qlora", "full"), default=["lora", "qlora"])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, in turns")
    for internal in ("--folder", "--method", "--who"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.who:
        return contestant(options)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        torch.manual_seed(0)
        save_hf(Llama(PRESETS[options.preset]), folder, dtype=torch.bfloat16)
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}, {options.preset}, "
            f"{options.sequences} x {options.length} tokens, {options.dtype}\n"
        )
        print("| method | ours: step, tokens/s | theirs | speed | ours: peak GB | theirs | memory | first losses |")
        print("|---|---|---|---|---|---|---|---|")
        compare(options)


if __name__ == "__main__":
    main()
