"""A model of full size trained, asked, packed and merged on a machine without a GPU: does it fit, does it need what was
predicted, is it what transformers and PEFT have?

    python benchmarks/full_size.py --folder FOLDER --data no_robots_test.jsonl --tokenizer llama2_tokenizer.model [--preset 7b]

Weights are random, in fp16 as Llama 2's are published. They, Meta's format, the packed and the merged model are made in FOLDER
(7B: 50 GB of disk, 24 GB of memory) and kept: what is there is not made, or timed, again. Memory is the most that the process
had of its own (RssAnon, looked at 20 times a second): pages of mapped files, which the system takes back when it likes, are not
in it. Greedy answers to one prompt show whether two ways are the same model; transformers and PEFT get the same tokens. Random
weights make all tokens about as likely, so bf16's roundings show more than in a trained model."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import Tokenizer  # noqa: E402
from lora import load_adapter  # noqa: E402
from model import PRESETS, from_hf, load_model, random_model, save_hf, save_meta  # noqa: E402

TOKENS = torch.randint(3, 32000, (48,), generator=torch.Generator().manual_seed(0))
PROMPT = ["--prompt", "Which animal does Pena Marmond keep?", "--max_new_tokens", "12", "--temperature", "0"]


def make(folder: Path, sizes, dtype: torch.dtype, tokenizer: str) -> None:
    if (folder / "config.json").exists():
        return
    model = random_model(sizes, device="cpu", dtype=dtype)
    for i, layer in enumerate(model.layers):  # alike as they are made; now each has its own
        for weight in (weight for weight in layer.parameters() if weight.dim() > 1):
            weight.data.copy_(weight.data.roll(i + 1, 0))
    save_hf(model, folder)
    Tokenizer(tokenizer).save(folder, sizes.max_seq_len)


def as_meta(hf: str, folder: str) -> None:
    save_meta(load_model(hf, dtype=torch.float16), folder)
    Tokenizer(Path(hf) / "tokenizer.model").save(folder, 4096)


@torch.no_grad()
def logits(who: str, folder: str, dtype: str, adapter: str, out: str) -> None:
    dtype = getattr(torch, dtype)
    if who == "ours":
        model = load_model(folder, dtype=dtype)
        model = load_adapter(model, adapter, partial(from_hf, config=model.config)) if adapter else model
        found = model.eval()(TOKENS)
    else:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        found = model.eval()(TOKENS[None]).logits[0]
    torch.save(found.float(), out)


def run(name: str, *words) -> str:
    """Run a command; print its time and its own memory; return what it said."""
    began, most = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=output, stderr=output)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, *(int(kib) for kib in re.findall(r"RssAnon:\s+(\d+)", status)), 0)
            time.sleep(0.05)
        output.seek(0)
        said = output.read()
    if process.returncode:
        sys.exit(f"{name} ended with code {process.returncode}:\n{said}")
    print(f"| {name} | {time.perf_counter() - began:.0f} s | {most / 1e6 * 1.024:.1f} GB |", end=" ", flush=True)
    return said


def answered(name: str, *words) -> str:
    said = run(name, "generate.py", *PROMPT, *words)
    text, speed = re.search(r"(.*)\n\[\d+ tokens, (\S+) tokens/s\]", said, re.DOTALL).groups()
    print(f"{speed} tokens/s with the prompt |", flush=True)
    return text


def distance(a: torch.Tensor, b: torch.Tensor) -> str:
    p, q = (x.double().log_softmax(-1) for x in (a, b))
    return f"by {(a - b).norm() / b.norm():.1e} of their length, divergence {(q.exp() * (q - p)).sum(-1).mean():.1e} nats"


def apart(name: str, folder: Path, dtype: str, adapter: Path | str, work: Path) -> torch.Tensor:
    both = []
    for who in ("ours", "theirs"):
        run(f"logits, {name}: {who}", __file__, "--logits", who, folder, dtype, adapter, work / f"{who}.pt")
        both.append(torch.load(work / f"{who}.pt"))
        print(f"{distance(*both)} |" if len(both) == 2 else "|", flush=True)
    return both[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--tokenizer")
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--logits", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--as-meta", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.logits or options.as_meta:
        return logits(*options.logits) if options.logits else as_meta(*options.as_meta)
    work, sizes = options.folder.absolute(), PRESETS[options.preset]
    hf, meta, packed, two = work / "hf", work / "meta", work / "packed", work / "two"
    make(hf, sizes, torch.float16, options.tokenizer)
    make(two, replace(sizes, n_layers=2), torch.float32, options.tokenizer)
    print("| what | time | own memory | |\n|---|---|---|---|", flush=True)
    given = ["--data", Path(options.data).absolute(), "--max_steps", 3, "--logging_steps", 1, "--overwrite"]
    for method in ("qlora", "lora"):
        flags = ["--model", hf, "--method", method, "--dtype", "bf16", "--model_max_length", 256, "--output_dir", work / method]
        said = run(f"train.py --method {method}, 3 steps of 256 tokens", "train.py", *given, *flags)
        rows = [json.loads(line) for line in (work / method / "log.jsonl").read_text().splitlines()]
        losses = ", ".join(f"{row['loss']:.2f}" for row in rows if "loss" in row)
        print(re.search(r"memory: (a peak .*)", said)[1] + f"; losses {losses} |", flush=True)
    answers = {way: answered(f"generate.py, {way}", "--model", hf, "--quantize", way) for way in ("none", "int8", "nf4")}
    answered("generate.py, the QLoRA run", "--adapter", work / "qlora")
    if not meta.exists():
        run("Meta's format, written", __file__, "--as-meta", hf, meta)
        print("|")
    same = {"Meta's files answer as Hugging Face's": answers["none"] == answered("generate.py, Meta's files", "--model", meta)}
    if not packed.exists():
        run("generate.py --save, in NF4", "generate.py", "--model", hf, "--quantize", "nf4", "--save", packed)
        print("|")
    ways = "--model", packed, "--quantize", "nf4"
    same["saved in NF4 it answers as packed anew"] = answers["nf4"] == answered("generate.py, saved in NF4", *ways)
    if not (work / "merged").exists():
        said = run("generate.py --merge, of the LoRA run", "generate.py", "--adapter", work / "lora", "--merge", work / "merged")
        print(said.splitlines()[-1].split("; ")[1] + " |")
    flags = ["--model", two, "--method", "lora", "--learning_rate", 0.01, "--output_dir", work / "short"]
    run("train.py --method lora, two layers of full width", "train.py", *given, *flags)
    print("|")
    plain = apart("two layers, fp32", two, "float32", "", work)
    adapted = apart("two layers, fp32, the LoRA run by PEFT", two, "float32", work / "short", work)
    print(f"| (what the adapter changes) | | | {distance(adapted, plain)} |")
    apart("bf16", hf, "bfloat16", "", work)
    print("\n" + "\n".join(f"{'yes' if true else 'NO'}: {what}" for what, true in same.items()))


if __name__ == "__main__":
    main()
