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
Memory is the peak from the first step on: CUDA's allocator's, or on a CPU the process's, model and libraries included."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import chain, repeat
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import PackedBatches, Tokenizer, encode_documents, load_template, read_dialogs  # noqa: E402
from generate import DTYPES  # noqa: E402
from model import PRESETS, ModelConfig, random_model, save_hf  # noqa: E402


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
    config = TrainConfig(
        model=options.folder,
        method=options.method,
        quantize="nf4" if options.method == "qlora" else "none",
        dtype=options.dtype,
        compile=options.who == "compiled",
        learning_rate=1e-4,
    )
    model = build(config, device)
    model.train()
    optimizer, (scaler, autocast) = make_optimizer(config, model), precision(config, device)
    rows, workers = rows_of(options), Workers(device)

    def step(turn):
        row = rows.batch(0, turn % len(rows))
        real = sum(len(rows.documents[i][0]) for i in rows.documents_in(0, turn % len(rows)))
        return training_step(config, model, optimizer, scaler, [row], 1e-4, workers, autocast)[0], real

    return step


def their_model(options):
    """transformers' model, quantised, bf16, or fp32 where all of it trains; and PEFT's LoRA on all linears, None for full."""
    import peft
    import transformers

    dtype = DTYPES[options.dtype]
    how = {"dtype": torch.float32 if options.method == "full" else dtype, "attn_implementation": "sdpa"}
    if options.method == "qlora":
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    how["device_map"] = {"": options.device}
    adapters = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, **how)
    return model, adapters if options.method != "full" else None


def their_step(options):
    """What the libraries' documentation shows: a quantised or bf16 base, PEFT on all linears, fused AdamW, clipping at 1."""
    import peft

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    model, adapters = their_model(options)
    if options.method == "qlora":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if adapters:
        model = peft.get_peft_model(model, adapters)
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


def trl_step(options):
    """TRL's SFTTrainer as its documentation shows it, packing by its own rule: best fit, longest first."""
    model, adapters = their_model(options)
    return trainer_step(options, model, packing=True, peft_config=adapters)


def unsloth_step(options):
    """Unsloth's model in the SFTTrainer that it changes: it leaves out entropy and accuracy, and on a CPU packing."""
    from unsloth import FastLanguageModel  # before the libraries that it changes

    full, qlora, dtype = options.method == "full", options.method == "qlora", DTYPES[options.dtype]
    how = {"max_seq_length": options.length, "use_gradient_checkpointing": False}
    model, _ = FastLanguageModel.from_pretrained(
        options.folder, dtype=torch.float32 if full else dtype, load_in_4bit=qlora, full_finetuning=full, **how
    )
    if not full:
        linears = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, target_modules=linears, **how)
    return trainer_step(options, model, packing=options.device == "cuda")


def trainer_step(options, model, packing: bool, peft_config=None):
    """A step of SFTTrainer's own: its next batch, its training_step, clipping and AdamW as its train() does them."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    rows = rows_of(options)
    config = SFTConfig(
        output_dir=options.folder,
        packing=packing,
        max_length=rows.row_tokens if packing else options.length,
        per_device_train_batch_size=1 if packing else options.sequences,
        learning_rate=1e-4,
        bf16=options.dtype == "bf16",
        gradient_checkpointing=False,
        use_cpu=options.device == "cpu",
        report_to="none",
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows.documents]),
        processing_class=transformers.AutoTokenizer.from_pretrained(options.folder),
        peft_config=peft_config,
    )
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    batches = chain.from_iterable(repeat(trainer.get_train_dataloader()))  # an epoch after the other

    def step(turn):
        [inputs], supervised = trainer.get_batch_samples(batches, 1, config.device)
        real = int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())
        loss = trainer.training_step(model, inputs, supervised)
        trainer.accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        return loss.item(), real

    return step


def torchtune_step(options):
    """torchtune's parts as its recipe lora_finetune_single_device puts them together: its model with our weights, its packed
    rows, padded to our rows' length, its loss in 8 pieces. Its adapters and their AdamW are in bf16, as its recipe has them."""
    from torchtune.data import padded_collate_packed
    from torchtune.datasets import PackedDataset
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import scale_grads, set_default_dtype

    if options.method == "full":
        raise SystemExit("step.py: torchtune takes part in lora and qlora: its recipe for full trains in bf16 alone")
    device, config, rows = torch.device(options.device), PRESETS[options.preset], rows_of(options)
    with set_default_dtype(DTYPES[options.dtype]), device:
        model = lora_llama2(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=config.vocab_size,
            num_layers=config.n_layers,
            num_heads=config.n_heads,
            num_kv_heads=config.n_kv_heads,
            embed_dim=config.dim,
            max_seq_len=rows.row_tokens,
            intermediate_dim=config.hidden_dim,
            norm_eps=config.norm_eps,
            lora_rank=8,
            lora_alpha=16,
            quantize_base=options.method == "qlora",
        )
    weights = {name: x for file in Path(options.folder).glob("*.safetensors") for name, x in load_file(file).items()}
    left = model.load_state_dict(hf_to_tune(weights, config.n_heads, config.n_kv_heads, config.dim), strict=False)
    assert not left.unexpected_keys and all("lora_" in name for name in left.missing_keys)
    set_trainable_params(model, get_adapter_params(model))
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    documents = [{"tokens": [*tokens], "labels": [-100, *labels[1:]]} for tokens, labels in rows.documents]
    loader = torch.utils.data.DataLoader(
        PackedDataset(documents, max_seq_len=rows.row_tokens), shuffle=True, collate_fn=padded_collate_packed
    )
    batches = chain.from_iterable(repeat(loader))

    def step(turn):
        batch = {name: x.to(device) for name, x in next(batches).items()}
        labels = torch.hstack((batch.pop("labels")[:, 1:], torch.full((1, 1), -100, device=device)))
        supervised = (labels != -100).sum()
        loss = loss_of(model(**batch), labels) * supervised
        loss.backward()
        scale_grads(model, 1 / supervised)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return (loss / supervised).item(), int((batch["tokens"] != 0).sum())

    return step


CONTESTANTS = {  # their step, and what it needs beside requirements.txt
    "ours": (our_step, ""),
    "compiled": (our_step, ""),
    "theirs": (their_step, "transformers peft bitsandbytes"),
    "packed": (their_step, "transformers peft bitsandbytes"),
    "trl": (trl_step, "trl peft bitsandbytes"),
    "unsloth": (unsloth_step, "unsloth"),
    "torchtune": (torchtune_step, "torchtune torchao==0.10.0"),
}


def contestant(options) -> None:
    """Say "ready", then answer every line on stdin with one step: {"seconds", "loss", "tokens"}; at its end say the peak."""
    make_step, needs = CONTESTANTS[options.who]
    try:
        step = make_step(options)
    except ImportError as error:
        raise SystemExit(f"step.py: {options.who} does not run here ({error}): pip install {needs}") from None
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    print(json.dumps("ready"), flush=True)
    for turn, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        loss, tokens = step(turn)  # reads the loss, so the GPU has finished
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss, "tokens": tokens}), flush=True)
    status = Path("/proc/self/status").read_text() if not cuda else ""
    peak = torch.cuda.max_memory_allocated() if cuda else int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"peak": peak}), flush=True)


def matmul_rate(options) -> float:
    """FLOP/s of one large product in the steps' format: the most that a step could run at."""
    side = 8192 if options.device == "cuda" else 2048
    x = torch.randn(side, side, device=options.device).to(DTYPES[options.dtype])
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def flops_of_a_token(config: ModelConfig, method: str, length: float) -> float:
    linears = config.n_layers * config.dim * (2 * config.dim + 2 * config.n_kv_heads * config.head_dim + 3 * config.hidden_dim)
    weights = linears + config.vocab_size * config.dim
    return (6 if method == "full" else 4) * weights + 6 * config.n_layers * config.dim * length


def compare(options) -> None:
    """Run every method with every contestant, a step each in turns, and print a row each."""
    common, interpreters = [__file__, *sys.argv[1:], "--folder", options.folder], dict(options.python)
    people = {
        (method, who): subprocess.Popen(
            [interpreters.get(who, sys.executable), *common, "--method", method, "--who", who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for method in options.methods
        for who in options.contestants
    }

    def heard(who):
        while line := people[who].stdout.readline():
            if line.startswith(("{", '"ready"')):  # libraries print on stdout as well
                return json.loads(line)
        for process in people.values():
            process.kill()
        raise SystemExit(f"{who} stopped; see above")

    for who in people:
        heard(who)
    said, peak = {who: [] for who in people}, {}
    for _ in range(options.rounds):
        for who, process in people.items():
            process.stdin.write("\n")
            process.stdin.flush()
            said[who].append(heard(who))
    for who, process in people.items():
        process.stdin.close()
        peak[who] = heard(who)["peak"]
        process.wait()

    def rate(who):
        steps = said[who][1:] if options.data else [min(said[who], key=lambda step: step["seconds"])]
        return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)

    sizes = [len(ids) for ids, _ in documents_of(options)]
    length, limit = sum(n * n for n in sizes) / sum(sizes), matmul_rate(options)  # of the document a token is in
    print(f"one large product: {limit / 1e12:.2f} TFLOP/s\n")
    print("| method | | real tokens/s | utilisation | peak GB | first loss | ours is faster by | takes of their memory |")
    print("|---|---|---|---|---|---|---|---|")
    for method, who in people:
        key, ours = (method, who), (method, options.contestants[0])
        used = rate(key) * flops_of_a_token(PRESETS[options.preset], method, length) / limit
        cells = [f"{rate(key):,.0f}", f"{used:.0%}", f"{peak[key] / 1e9:.2f}", f"{said[key][0]['loss']:.4f}"]
        cells += ["", ""] if key == ours else [f"{rate(ours) / rate(key):.2f}", f"{peak[ours] / peak[key]:.2f}"]
        print(f"| {method} | {who} | " + " | ".join(cells) + " |", flush=True)


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
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, in turns")
    parser.add_argument("--python", nargs="+", type=interpreter, default=[], metavar="WHO=PATH", help="of its own environment")
    for internal in ("--folder", "--method", "--who"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.who:
        return contestant(options)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        torch.manual_seed(0)
        model = random_model(PRESETS[options.preset], device=options.device, dtype=torch.bfloat16)
        save_hf(model, folder, dtype=torch.bfloat16)
        Tokenizer(options.tokenizer).save(folder, options.length)  # SFTTrainer asks for one
        del model
        work = f"{Path(options.data).name} at" if options.data else f"random tokens, {options.sequences} x"
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}, {options.preset}, {options.dtype}"
        )
        print(f"{work} {options.length}")
        compare(options)


if __name__ == "__main__":
    main()
