"""The two pictures of README.md, from the logs beside this file (pip install matplotlib):

python train.py --method lora --logging_steps 5 --eval_steps 20        its log.jsonl is lora.jsonl here
python memory.py --model 7b ... --json                      one line of memory.jsonl for each step down, by `--count`
python pictures/make.py                                     loss.png and memory.png
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The way down from full fine-tuning of 7B on 2,048 tokens: (what is said, flags).
DOWN = (
    ("full", "--method full"),
    ("pure bf16,\n8-bit AdamW", "--method full --pure_bf16 True --optim adamw_8bit"),
    ("LoRA", "--method lora"),
    ("LoRA,\ncheckpointing", "--method lora --gradient_checkpointing True"),
    ("QLoRA,\ncheckpointing", "--method qlora --gradient_checkpointing True"),
)
PARTS = {  # what is drawn -> which of memory.py's terms it is
    "weights and adapters": ("weights", "adapters"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer state",),
}


def count() -> None:
    with open(HERE / "memory.jsonl", "w") as file:
        for name, flags in DOWN:
            command = [
                sys.executable,
                str(HERE.parent / "memory.py"),
                "--model",
                "7b",
                "--model_max_length",
                "2048",
                "--dtype",
                "bf16",
            ]
            answer = json.loads(subprocess.run([*command, *flags.split(), "--json"], check=True, capture_output=True).stdout)
            kept = {part: sum(answer["terms"][term]["simulated"] or 0 for term in terms) for part, terms in PARTS.items()}
            late = "optimizer", "backward embedding"  # else, at the loss and in backward's first block, there are no gradients
            kept["gradients"] *= answer["peak_phase"].endswith(late)
            peak = answer["peak"]["allocated"]["simulated"]
            file.write(json.dumps({"name": name, "flags": flags, "peak": peak, "phase": answer["peak_phase"], **kept}) + "\n")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read("lora.jsonl")
    figure, axes = pyplot.subplots(figsize=(7, 3.2), dpi=130, layout="constrained")
    steps = [row for row in rows if "loss" in row]
    axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], label="training")
    for key, label in (("eval_held_out_loss", "inhabitants never asked about"), ("eval_never_told_loss", "facts never told")):
        held_out = [row for row in rows if key in row]
        axes.plot([row["step"] for row in held_out], [row[key] for row in held_out], "o--", label=label)
    axes.set(
        yscale="log", xlabel="step", ylabel="loss a token", title="LoRA on the embedded model: it learns to answer, not the facts"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "loss.png")

    rows = read("memory.jsonl")
    figure, axes = pyplot.subplots(figsize=(7, 3.2), dpi=130, layout="constrained")
    below = [0.0] * len(rows)
    rest = {"activations, loss, work": [row["peak"] - sum(row[part] for part in PARTS) for row in rows]}
    for part, sizes in ({part: [row[part] for row in rows] for part in PARTS} | rest).items():
        heights = [max(0.0, size / 1e9) for size in sizes]
        axes.bar([row["name"] for row in rows], heights, bottom=below, label=part)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for place, row in enumerate(rows):
        axes.text(place, row["peak"] / 1e9, f"{row['peak'] / 1e9:.1f} GB", ha="center", va="bottom")
    for limit, name in ((80, "80 GB card"), (24, "24 GB"), (16, "16 GB")):
        axes.axhline(limit, color="grey", linewidth=0.7, linestyle=":")
        axes.text(len(rows) - 0.45, limit, name, color="grey", fontsize=8, va="bottom", ha="right")
    axes.set(ylabel="GB at the peak", title="Llama 2 7B, one row of 2,048 tokens")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "memory.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="ask memory.py again first")
    if parser.parse_args().count:
        count()
    draw()
