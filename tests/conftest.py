"""What the tests share: a small random Llama, and Meta's way of cutting a checkpoint into shards."""

import io
import json
import os
import sys
from functools import partial

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch: for models this small threads cost more than they bring, here and in subprocesses
)

import pytest
import sentencepiece
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before quant.py is imported: its kernels then run without a GPU, slowly

from data import Template, Tokenizer, encode_dialog
from generate import GenerateConfig, Sampling, generate, main, text_stream
from lora import add_lora, lora_parameters, save_adapter
from model import Llama, ModelConfig, load_model, save_hf, save_meta, to_hf
from talking.voices import load_voices


def load(config: GenerateConfig) -> tuple[Llama, Tokenizer, Template]:
    """The model that the flags name, with its adapter, and its tokenizer and template."""
    return load_voices(config)[-1][1:]


def answer(model: Llama, tokenizer: Tokenizer, template: Template, dialog: list[dict], sampling: Sampling) -> str:
    """The reply to a dialog that ends on a user's turn, alone: what every other way of asking must say as well."""
    prompt, _ = encode_dialog(dialog, tokenizer, template)
    tokens = generate(model, prompt, sampling, stop_tokens=(tokenizer.eos_id,))
    return "".join(text_stream(tokenizer, tokens, (*template.stop, *sampling.stop)))


@pytest.fixture
def tiny_llama():
    """A maker of small random models: two layers, grouped-query attention. Any size of ModelConfig can be given.

    The weights are ten times those of a fresh model, and the norms not all ones: otherwise every block is nearly
    the identity, and a test that compares logits would pass whatever the blocks do."""

    def make(seed=0, attention="sdpa", **sizes) -> Llama:
        defaults = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 56, "vocab_size": 96}
        torch.manual_seed(seed)
        model = Llama(ModelConfig(**defaults | sizes), attention)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.2) if weight.dim() > 1 else weight.normal_(1, 0.2)
        return model

    return make


@pytest.fixture
def write_meta_shards():
    """A writer of Meta's folder in N shards, cut as model parallelism cuts it."""
    by_rows = ("wq", "wk", "wv", "w1", "w3", "output")
    by_columns = ("wo", "w2", "tok_embeddings")

    def write(model: Llama, path, n: int):
        save_meta(model, path)
        whole = torch.load(path / "consolidated.00.pth", weights_only=True)
        for i in range(n):
            shard = {}
            for name, weight in whole.items():
                layer = name.split(".")[-2]
                if layer in by_rows or layer in by_columns:
                    weight = weight.chunk(n, dim=0 if layer in by_rows else 1)[i].clone()
                shard[name] = weight
            torch.save(shard, path / f"consolidated.{i:02d}.pth")
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A SentencePiece model like Llama 2's, only smaller: BPE with byte fallback, <unk> 0, <s> 1, </s> 2 and no pad."""
    sentences = [
        "The ferry leaves at nine and returns before dark.",
        "Mira lives in Oakford and mends clocks; where does she live?",
        "[INST] <<SYS>> Below is an instruction that describes a task. <</SYS>> [/INST]",
        "### Instruction: ### Input: ### Response:",
    ]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 3),
        model_writer=written,
        model_type="bpe",
        vocab_size=340,  # 3 special, 256 bytes, 81 pieces
        byte_fallback=True,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return Tokenizer(tokenizer_file)


@pytest.fixture
def base(tiny_llama, tokenizer_file, tmp_path):
    """A folder with a whole model and its tokenizer."""
    folder = tmp_path / "base"
    save_hf(tiny_llama(vocab_size=340), folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of a LoRA run over `base`: an adapter that changes the answers, and a run.json."""
    options = {"rank": 2, "alpha": 4, "dropout": 0.0, "rslora": False}
    model = add_lora(load_model(base), **options)
    torch.manual_seed(1)
    for weight in lora_parameters(model).values():
        weight.data.normal_(std=0.3)
    folder = tmp_path / "run"
    save_adapter(model, folder, partial(to_hf, config=model.config), base_model=str(base), **options)
    (folder / "run.json").write_text(json.dumps({"base_model": str(base), "template": "alpaca"}))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*argv) -> (exit code, stdout, stderr) of the program."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run
