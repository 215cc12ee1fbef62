"""A training step here beside transformers + PEFT (+ bitsandbytes for QLoRA): the same weights, the same tokens, in turns.

    python benchmarks/step.py --methods lora qlora full [--preset 125m] [--device cuda] [--sequences 2] [--length 512]
    python benchmarks/step.py --data no_robots_test.jsonl --tokenizer tokenizer.model --length 2048 --sequences 4

Each contestant is a process of its own that waits for its turn, so nobody's memory or threads are in another's way:
  ours      train.py's own build and step, on a row of whole documents
  compiled  the same with --compile True
  theirs    what the libraries' documentation shows, on a batch padded to its longest document
  packed    theirs on our rows, with positions that restart at each document: what TRL's packing hands to the model
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
from turns import Contestant, answer, weights  # noqa: E402

from data import PackedBatches, Tokenizer, encode_documents, load_template, read_dialogs  # noqa: E402
from generate import DTYPES  # noqa: E402
from helping.flags import parse_flags  # noqa: E402
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


def our_step(options):
    """train.py's own build and step. Returns step(turn) -> (mean loss, real tokens)."""
    from train import TrainConfig, Workers, build, make_optimizer, precision, training_step

    device = torch.device(options.device)
    settings = {"model": options.folder, "method": options.method, "dtype": options.dtype, "learning_rate": 1e-4}
    settings |= {"quantize": "nf4" if options.method == "qlora" else "none", "compile": options.who == "compiled"}
    config = TrainConfig(**settings | parse_flags(TrainConfig, "", shlex.split(options.ours)))
    model = build(config, device)
    model.train()
    optimizer, (scaler, autocast) = make_optimizer(config, model), precision(config, device)
    rows, workers = rows_of(options), Workers(device)

    def step(turn):
        row = rows.batch(0, turn % len(rows))
        real = sum(len(rows.documents[i][0]) for i in rows.documents_in(0, turn % len(rows)))
        return training_step(config, model, optimizer, scaler, [row], 1e-4, workers, autocast)[0], real

    return step


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
    rows = rows_of(options)
    shuffled = torch.randperm(len(rows.documents), generator=torch.Generator().manual_seed(0)).tolist()

    def batch(turn):
        if options.who == "packed":  # our row, each document's labels with its first token's out: nothing predicts it
            documents = [rows.documents[i] for i in rows.documents_in(0, turn % len(rows))]
            ids = torch.cat([torch.tensor(tokens) for tokens, _ in documents])[None]
            labels = torch.cat([torch.tensor([-100, *labels[1:]]) for _, labels in documents])[None]
            positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in documents])[None]
            return {"input_ids": ids, "labels": labels, "position_ids": positions}, ids.numel()
        first = turn * options.sequences % (len(shuffled) - options.sequences + 1)
        documents = [rows.documents[i] for i in shuffled[first : first + options.sequences]]
        longest = max(len(tokens) for tokens, _ in documents)
        ids, labels, mask = (torch.full((len(documents), longest), fill) for fill in (0, -100, 0))
        for i, (tokens, wanted) in enumerate(documents):
            ids[i, : len(tokens)], labels[i, : len(tokens)] = torch.tensor(tokens), torch.tensor(wanted)
            mask[i, : len(tokens)] = 1
        padded = {} if mask.all() else {"attention_mask": mask}
        return {"input_ids": ids, "labels": labels, **padded}, int(mask.sum())

    def step(turn):
        inputs, real = batch(turn)
        with torch.autocast(options.device, dtype, enabled=options.method == "full" and dtype != torch.float32):
            # With a cache, their default, transformers' attention would cross the borders of packed documents.
            loss = model(**{name: x.to(device) for name, x in inputs.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), real

    return step


def contestant(options) -> None:
    """Say that it is ready, then answer every line on stdin with a turn: its steps as {"seconds", "loss", "tokens"}; at its end
    say the peak."""
    step = (our_step if options.who in ("ours", "compiled") else their_step)(options)
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
    for method in options.methods:
        people = [Contestant(who, ["--folder", options.folder, "--method", method, "--who", who]) for who in options.contestants]
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


def main():
    parser = argparse.ArgumentParser(description="A training step here and with transformers + PEFT, in turns.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="125m")
    parser.add_argument("--methods", nargs="+", choices=("lora", "qlora", "full"), default=["lora", "qlora"])
    names = ("ours", "compiled", "theirs", "packed")
    parser.add_argument(
        "--contestants", nargs="+", choices=names, default=["ours", "theirs"], help="the first against the others"
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
