"""A training step here beside transformers + PEFT (+ bitsandbytes for QLoRA): the same weights, the same tokens, in turns.

    python benchmarks/step.py --methods lora qlora full [--preset 125m] [--device cuda] [--sequences 2] [--length 512]
    python benchmarks/step.py --data no_robots_test.jsonl --tokenizer tokenizer.model --length 2048 --sequences 4
    python benchmarks/step.py --contestants ours trl torchtune --python trl=venv/bin/python torchtune=other/bin/python

Each contestant is a process of its own that waits for its turn, so nobody's memory or threads are in another's way:
  ours      train.py's own build and step, on a row of whole documents
  compiled  the same with --compile True
  theirs    what the libraries' documentation shows, on a batch padded to its longest document
  packed    theirs on our rows, with positions that restart at each document: what TRL's packing hands to the model
  trl       TRL's SFTTrainer with packing=True, rows as long as ours; it takes entropy and accuracy of every step besides. The
            documents of a row do not see each other: other tokens in the first left the second's log-probabilities bit-identical
  unsloth   Unsloth's model in SFTTrainer as it changes it; on a CPU it switches packing off, so batches are padded as theirs are
  torchtune its model, packed rows and chunked loss as its recipe puts them together
The last three are not in requirements-extra.txt. `pip install trl` goes beside it; `unsloth` wants an older transformers and
`torchtune torchao==0.10.0` an older torchao, so --python names the Python of an environment that has one and requirements.txt.
A step is forward, backward, clipping and AdamW. Without --data a document is `length` random tokens, all supervised, a row holds
`sequences` of them, and the fastest step counts; with it the documents are the file's, and the sum of all steps counts after
the first. Only real tokens are counted, never padding. Utilisation is the FLOPs that a step needs, over what this device does in
one large matrix product: 2 a weight and token for forward, 2 for the gradient of its input, 2 for its own if it is trained, with
attention's 6 x layers x dim x length (half of its square, forward and twice in backward); what is computed again counts nothing.
Memory is the peak from the first step on: CUDA's allocator's, or on a CPU the process's, model and libraries included. A
contestant that ends early, as its library is not there or its memory too small, has its last words for a row."""

import argparse
import shlex
import sys
import time
from itertools import count
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import others  # noqa: E402
from turns import Contestant, answer, weights  # noqa: E402

from data import PackedBatches, Tokenizer, encode_documents, load_template, read_dialogs  # noqa: E402
from generate import DTYPES  # noqa: E402
from helping.flags import parse_flags  # noqa: E402
from helping.malloc import keep_freed_memory  # noqa: E402
from model import PRESETS, ModelConfig  # noqa: E402


def documents_of(options) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of each document; labels are tokens, or -100 where nothing is supervised."""
    if options.data:
        tokenizer = Tokenizer(options.tokenizer)
        dialogs = list(read_dialogs(options.data))
        return list(encode_documents(dialogs, tokenizer, load_template("llama2")[0], max_length=options.length)[0])
    tokens = torch.randint(3, 32000, (options.sequences, options.length), generator=torch.Generator().manual_seed(0)).tolist()
    return [(row, row) for row in tokens]


def rows_of(options) -> PackedBatches:
    documents = documents_of(options)
    return PackedBatches(documents, options.length * (1 if options.data else options.sequences), shuffle=bool(options.data))


def our_step(options, rows):
    """train.py's own build and step. Returns step(turn) -> (mean loss, real tokens)."""
    from train import TrainConfig, Workers, build, make_optimizer, precision, training_step

    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does
    settings = {"model": options.folder, "method": options.method, "dtype": options.dtype, "learning_rate": 1e-4}
    settings |= {"quantize": "nf4" if options.method == "qlora" else "none", "compile": options.who == "compiled"}
    config = TrainConfig(**settings | parse_flags(TrainConfig, "", shlex.split(options.ours)))
    model = build(config, device)
    model.train()
    optimizer, (scaler, autocast) = make_optimizer(config, model), precision(config, device)
    workers = Workers(device)

    def step(turn):
        row = rows.batch(0, turn % len(rows))
        real = sum(len(rows.documents[i][0]) for i in rows.documents_in(0, turn % len(rows)))
        return training_step(config, model, optimizer, scaler, [row], 1, 1e-4, workers, autocast)[0], real

    return step


CONTESTANTS = {  # their step, and what it needs beside requirements.txt
    "ours": (our_step, ""),
    "compiled": (our_step, ""),
    "theirs": (others.their_step, "transformers peft bitsandbytes"),
    "packed": (others.their_step, "transformers peft bitsandbytes"),
    "trl": (others.trl_step, "trl peft bitsandbytes"),
    "unsloth": (others.unsloth_step, "unsloth"),
    "torchtune": (others.torchtune_step, "torchtune torchao==0.10.0"),
}


def contestant(options) -> None:
    """Say that it is ready, then answer every line on stdin with a turn: its steps as {"seconds", "loss", "tokens"}; at its end
    say the peak."""
    make_step, needs = CONTESTANTS[options.who]
    try:
        step = make_step(options, rows_of(options))
    except ImportError as error:
        raise SystemExit(f"{options.who} does not run here ({error}): pip install {needs}") from None
    cuda, numbers = options.device == "cuda", count()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    answer({"ready": True})
    for _ in sys.stdin:
        turn = []
        for _ in range(options.steps):
            began = time.perf_counter()
            loss, tokens = step(next(numbers))  # reads the loss, so the GPU has finished
            turn.append({"seconds": time.perf_counter() - began, "loss": loss, "tokens": tokens})
        if cuda:  # the others need the room
            torch.cuda.empty_cache()
        answer(turn)
    status = Path("/proc/self/status").read_text() if not cuda else ""
    answer({"peak": torch.cuda.max_memory_allocated() if cuda else int(status.split("VmHWM:")[1].split()[0]) * 1024})


def matmul_rate(options) -> float:
    """FLOP/s of one large product in the steps' format: the most that a step could run at."""
    side = 8192 if options.device == "cuda" else 2048
    x = torch.randn(side, side, device=options.device).to(DTYPES[options.dtype])
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    del x
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return 2 * side**3 / min(seconds)


def flops_of_a_token(config: ModelConfig, method: str, length: float) -> float:
    linears = config.n_layers * config.dim * (2 * config.dim + 2 * config.n_kv_heads * config.head_dim + 3 * config.hidden_dim)
    weights = linears + config.vocab_size * config.dim
    return (6 if method == "full" else 4) * weights + 6 * config.n_layers * config.dim * length


def compare(options, began: float) -> None:
    """Run every method with every contestant, a turn each in turns, and print a row each, method by method."""
    sizes = [len(ids) for ids, _ in documents_of(options)]
    length, limit = sum(n * n for n in sizes) / sum(sizes), matmul_rate(options)  # of the document a token is in
    print("\n| method | | real tokens/s | utilisation | peak GB | first loss | ours is faster by | takes of their memory |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    pythons = dict(options.python)
    for method in options.methods:
        people = [
            Contestant(who, ["--folder", options.folder, "--method", method, "--who", who], pythons.get(who, sys.executable))
            for who in options.contestants
        ]
        for one in people:
            one.hear()
        turns = {one.name: [] for one in people}
        for _ in range(options.rounds):
            for one in people:
                turns[one.name].append(one.ask("a turn"))
            if time.monotonic() - began > options.seconds:
                break
        limit = max(limit, matmul_rate(options))  # as others may have been at work
        peaks, rates = {one.name: (one.leave() or {}).get("peak") for one in people}, {}
        for one in people:
            if one.failed:
                print(f"| {method} | {one.name} | failed: {one.failed} |", flush=True)
                continue
            said = turns[one.name]
            # What is made or allocated for the first time is not a step's time: on a GPU in every turn, as all is given back.
            steps = [step for turn in said for step in turn[1:]] or [step for turn in said[1:] or said for step in turn]
            steps = steps if options.data else [min(steps, key=lambda step: step["seconds"])]
            rate = rates[one.name] = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
            used = rate * flops_of_a_token(PRESETS[options.preset], method, length) / limit
            cells = [f"{rate:,.0f}", f"{used:.0%}", f"{peaks[one.name] / 1e9:.2f}", f"{said[0][0]['loss']:.4f}"]
            first = options.contestants[0]
            if one.name != first and first in rates:
                cells += [f"{rates[first] / rate:.2f}", f"{peaks[first] / peaks[one.name]:.2f}"]
            print(f"| {method} | {one.name} | " + " | ".join(cells + [""] * (6 - len(cells))) + " |", flush=True)
    print(f"\nUtilisation is of {limit / 1e12:.2f} TFLOP/s, one large product.")


def interpreter(text: str) -> tuple[str, str]:
    who, _, path = text.partition("=")
    if who not in CONTESTANTS or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text}: expected a contestant, = and its Python, as in trl=venv/bin/python")
    return who, path


def main():
    parser = argparse.ArgumentParser(description="A training step here and with transformers + PEFT, in turns.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="125m")
    parser.add_argument("--methods", nargs="+", choices=("lora", "qlora", "full"), default=["lora", "qlora"])
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=["ours", "theirs"], help="the first against the others"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--sequences", type=int, default=2, help="documents of a padded batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a document; with --data its limit, and a row's length")
    parser.add_argument("--data", help="a file of records instead of random tokens")
    parser.add_argument("--tokenizer", default=str(ROOT / "tiny" / "tokenizer.model"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, help="of a turn; of several, the first does not count [1, cuda: 4]")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further round after so many")
    parser.add_argument("--ours", default="", help="flags of train.py for ours, as in --ours='--gradient_checkpointing True'")
    parser.add_argument("--python", nargs="+", type=interpreter, default=[], metavar="WHO=PATH", help="of its own environment")
    parser.add_argument("--folder", help="weights of --preset that are there already, instead of random ones made first")
    for internal in ("--method", "--who"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    began, options = time.monotonic(), parser.parse_args()
    options.steps = options.steps or (4 if options.device == "cuda" else 1)
    if options.who:
        return contestant(options)
    with weights(options.preset, options.device, options.folder) as options.folder:
        work = f"{Path(options.data).name} at" if options.data else f"random tokens, {options.sequences} x"
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}, {options.preset}, {options.dtype}"
        )
        print(f"{work} {options.length}")
        compare(options, began)


if __name__ == "__main__":
    main()
