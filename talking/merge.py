"""What `generate.py --merge` and `--save` write: a folder that is a whole model, for whoever has no adapters.

An adapter is W + (alpha / r) B A kept in two parts; merging does the sum once and forgets the parts. Asked the same, the merged
model gives the same logits but for rounding, and how much that was is measured and said."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError

from data import DataError
from generate import GenerateConfig
from lora import merge_lora
from model import save_hf
from talking.voices import Voice
from weights.chat import write_chat_template


@torch.inference_mode()
def merge(voices: list[Voice], config: GenerateConfig) -> None:
    """--merge: merge the adapter, write a Hugging Face model and the tokenizer into a new folder, say the largest change of a
    logit.

    A quantised model is turned back and saved in bf16, so the change is bf16's rounding; others keep the format they were
    loaded in (--dtype; auto is the one of the base's files, but fp32 for a small model on a CPU; for --save too)."""
    model = voices[-1].model
    quantised = any(hasattr(module, "dequantized") for module in model.modules())
    tokens = torch.arange(3, min(35, model.config.vocab_size), device=model.norm.weight.device)  # any; a CPU is slow in fp16
    before = model(tokens).float()
    merge_lora(model)
    if quantised:
        model.to(torch.bfloat16)
    difference = (model(tokens).float() - before).abs().max().item()
    if not math.isfinite(difference):
        dtype = str(model.norm.weight.dtype)[6:]
        raise DataError(f"in {dtype} the merged model's logits are not finite, and nothing was saved: name another --dtype")
    save_folder(voices[-1], Path(config.merge))
    print(f"saved in {config.merge}; merging changed no logit by more than {difference:.2g}")


def save(voices: list[Voice], config: GenerateConfig) -> None:
    """--save: write the model as it was loaded."""
    save_folder(voices[-1], Path(config.save))
    print(f"saved in {config.save}")


def save_folder(voice: Voice, folder: Path) -> None:
    """Write a Hugging Face model and its tokenizer into a new folder, which gets its name when it is whole. If that fails
    nothing is left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as beside:
        temporary = Path(beside) / folder.name  # a folder as any other: the one around it is its owner's alone
        try:
            save_hf(voice.model, temporary)
            voice.tokenizer.save(temporary, voice.model.config.max_seq_len)
            write_chat_template(temporary, voice.template)
            temporary.rename(folder)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder} could not be written, and nothing is left of it: {error}") from None
