"""What the contestants of step.py from other projects do in a step.

Each function makes a model from the weights in options.folder and returns step(turn) -> (mean loss, real tokens). rows: ours, a
PackedBatches, whose documents the others arrange anew."""

from itertools import chain, repeat
from pathlib import Path

import torch
from safetensors.torch import load_file

from generate import DTYPES
from model import PRESETS


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


def their_step(options, rows):
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


def trl_step(options, rows):
    """TRL's SFTTrainer as its documentation shows it, packing by its own rule: best fit, longest first."""
    model, adapters = their_model(options)
    return trainer_step(options, rows, model, packing=True, peft_config=adapters)


def unsloth_step(options, rows):
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
    return trainer_step(options, rows, model, packing=options.device == "cuda")


def trainer_step(options, rows, model, packing: bool, peft_config=None):
    """A step of SFTTrainer's own: its next batch, its training_step, clipping and AdamW as its train() does them."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

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


def torchtune_step(options, rows):
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
    device, config = torch.device(options.device), PRESETS[options.preset]
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
