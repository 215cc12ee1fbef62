"""Who answers: a base model, or adapters on it, each asked as it was trained.

The folder of a run says in run.json which base it stands on, how that was quantised, and which prompt template was trained.
All that may be missing, moved or not fit together is refused here in a sentence."""

import copy
import json
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from data import DataError, Template, Tokenizer, load_template
from generate import DTYPES, TINY, GenerateConfig, compile_decoding, pick_device, pick_dtype
from helping.files import free_memory
from helping.malloc import keep_freed_memory
from lora import load_adapter
from model import Llama, ModelConfig, from_hf, load_model, open_checkpoint, read_config
from quant import QUANTIZERS
from talking.cpu import CPULinear, order_for_cpu, outgrows_cache


def _read_json(path: Path) -> dict:
    """What the file holds; nothing if there is no such file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{path} holds a {type(fields).__name__}, not named fields")
    return fields


def _trained_on(folder: Path):
    """The base that an adapter's own files name, as a path or as a name on Hugging Face's hub."""
    base = _read_json(folder / "run.json").get("base_model")
    return base or _read_json(folder / "adapter_config.json").get("base_model_name_or_path")


def _weights(sizes: ModelConfig, quantize: str, dtype: torch.dtype) -> float:
    """Bytes of a model of these sizes, as it is loaded."""
    with torch.device("meta"):  # shapes without storage
        model = Llama(sizes)
    whole, blocks = (sum(weight.numel() for weight in part.parameters()) for part in (model, model.layers))
    return blocks * {"int8": 1, "nf4": 4.127 / 8}.get(quantize, dtype.itemsize) + (whole - blocks) * dtype.itemsize


class Voice(NamedTuple):
    """Who answers: a model, and what it takes to ask it as it was trained."""

    name: str
    model: Llama
    tokenizer: Tokenizer
    template: Template


def load_voices(config: GenerateConfig) -> list[Voice]:
    """The models that the flags name, asked as their run.json says: the base, or its adapter, or the base and its adapters.

    The base's weights are read once and lie in memory once, however many adapters stand on them."""
    runs = [_find(config, Path(adapter)) for adapter in config.adapter] or [_find(config, None)]
    base, quantize, tokenizer, template = runs[0]
    for adapter, run in zip(config.adapter, runs, strict=False):
        if (run[0].resolve(), run[1]) != (base.resolve(), quantize):
            raise DataError(
                f"{config.adapter[0]} was trained on {base} ({quantize}), {adapter} on {run[0]} ({run[1]}): "
                "adapters are compared on one base, that --model and --quantize name"
            )
    device = pick_device(config.device)
    dtype, answering = pick_dtype(config.dtype, device), not (config.merge or config.save or config.compile)
    sizes = read_config(base)
    if config.dtype == "auto" and outgrows_cache(sizes):  # large
        if config.merge or config.save:  # as the files have it
            stored = open_checkpoint(base, sizes)["tok_embeddings.weight"]().dtype
            dtype = stored if stored in DTYPES.values() else dtype
        elif answering and CPULinear.helps(device, torch.bfloat16):
            dtype = torch.bfloat16
    order = CPULinear if answering and CPULinear.helps(device, dtype) else None  # as they are read, without a plain copy first
    if device.type == "cpu":
        if (needed := _weights(sizes, quantize, dtype)) > (free := free_memory()):
            least = f"--quantize nf4 --dtype bf16: {_weights(sizes, 'nf4', torch.bfloat16) / 1e9:.2f}"
            print(f"the weights take {needed / 1e9:.2f} GB, {free / 1e9:.2f} are free here ({least})", file=sys.stderr)
        keep_freed_memory()  # one weight is cast or quantised in what the one before it freed
    model = load_model(base, device=device, dtype=dtype, quantize=QUANTIZERS[quantize] or order).eval()
    if answering:
        order_for_cpu(model)  # the head, the norms
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    voices = [Voice(f"base ({base.name})" if config.adapter else base.name, model, tokenizer, template)]
    for adapter, (_, _, tokenizer, template) in zip(config.adapter, runs, strict=False):
        twin = copy.deepcopy(model, dict(shared))  # modules of its own, the same weights in them
        load_adapter(twin, adapter, partial(from_hf, config=model.config)).eval()
        voices.append(Voice(adapter, twin, tokenizer, template))
        named = _trained_on(Path(adapter))
        if isinstance(named, str) and Path(named).name not in (base.name, base.resolve().name):  # of the same sizes, by chance
            print(f"the adapter in {adapter} was trained on {named}: is {base} the same model?", file=sys.stderr)
    for voice in voices:
        if config.compile:
            compile_decoding(voice.model)
        if voice.tokenizer.vocab_size > model.config.vocab_size:
            pieces, known = voice.tokenizer.vocab_size, model.config.vocab_size
            raise DataError(f"the tokenizer has {pieces:,} tokens, the model in {base} knows {known:,}")
    return voices if config.compare or config.web or len(voices) > 2 else voices[-1:]


def _find(config: GenerateConfig, adapter: Path | None) -> tuple[Path, str, Tokenizer, Template]:
    """The folder of the base, its quantisation, tokenizer and template, as the flags or the run's own run.json say."""
    folder = adapter or Path(config.model or TINY)
    run, base = _read_json(folder / "run.json"), config.model
    whole, adapted = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    if run and not whole and not adapted:
        raise DataError(f"the run in {folder} is not finished: train.py --resume True --output_dir {folder} goes on with it")
    if adapter and not adapted:
        if whole:
            raise DataError(f"{folder} holds a whole model, not an adapter: pass it as --model")
        raise DataError(f"no adapter in {folder}: adapter_config.json is missing")
    if not adapter and adapted:
        raise DataError(f"{folder} holds an adapter, not a whole model: pass it as --adapter")
    if base is None and adapter:
        base = _trained_on(folder)
        if not isinstance(base, str) or not base:
            raise DataError(f"the adapter in {folder} does not say which model it is for: name that with --model")
        if not Path(base).is_dir():
            raise DataError(f"the adapter in {folder} was trained on {base}, which is not here: name its place with --model")
    base = Path(base or TINY)
    read_config(base)  # says so if there is no model
    if run and not (config.template or (run.get("template") and isinstance(run["template"], str))):
        raise DataError(f"{folder / 'run.json'} does not say which template was trained: name it with --template")
    template, _ = load_template(config.template or run.get("template", "llama2"))
    folders = [place for place in (folder, base) if (place / "tokenizer.model").is_file()]
    tokenizer = Tokenizer(config.tokenizer or (folders or [base])[0] / "tokenizer.model")
    if not run and (added := tokenizer.added_in(template.system, template.user, template.assistant)):
        print(f"the template holds {added}, one token each for the model in {base}, here spelt in pieces", file=sys.stderr)
    settings = run.get("settings")
    quantize = config.quantize or (settings.get("quantize", "none") if isinstance(settings, dict) else "none")
    if quantize not in QUANTIZERS:
        raise DataError(f"{folder / 'run.json'}: quantize is {quantize!r}; known are {', '.join(QUANTIZERS)}")
    return base, quantize, tokenizer, template
