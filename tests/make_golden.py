"""Make tests/golden/: what transformers and PEFT say about one small random model, so that tests can check it without them.

    python tests/make_golden.py

It needs requirements-extra.txt and is run by hand; the files are committed. Nothing of nanotune is imported.

    golden/model/           a random Llama with grouped-query attention, as transformers saves it
    golden/greedy.json      {"prompt": ids, "tokens": the 64 ids that greedy decoding adds}
    golden/adapter_linear/  a PEFT adapter on all seven linears of the blocks
    golden/adapter_wide/    the same with rsLoRA, and the embedding and the head too
    golden/logits.safetensors  the prompt's logits: "model", "adapter_linear", "adapter_wide"
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "golden"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = [1, 17, 4, 93, 58, 21, 21, 70, 8, 44, 3, 66]


def random_model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=56,
        vocab_size=96,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():  # large enough that logits are far apart
            weight.normal_(std=0.4) if weight.dim() > 1 else weight.normal_(1, 0.2)
    return model


def greedy(model, prompt: list[int], n: int) -> tuple[list[int], float]:
    """n tokens, each the most likely one, by full forward passes; and the smallest lead that a winner had."""
    tokens, lead = list(prompt), float("inf")
    for _ in range(n):
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        lead = min(lead, (best.values[0] - best.values[1]).item())
        tokens.append(best.indices[0].item())
    return tokens[len(prompt) :], lead


def adapter(model, **options):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, lora_dropout=0.05, **options)
    model = get_peft_model(model, config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.15)
    return model


@torch.no_grad()
def main():
    seed = 0
    prompt = torch.tensor([PROMPT])
    while (
        True
    ):  # a model whose continuation has no near tie, is not one token over and over, and avoids 0, 1, 2 (pad, begin, end)
        model = random_model(seed)
        tokens, lead = greedy(model, PROMPT, 64)
        if lead > 0.02 and len(set(tokens)) > 24 and min(tokens) > 2:
            break
        seed += 1
    again = model.generate(
        prompt, do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(prompt)
    )
    assert again[0, len(PROMPT) :].tolist() == tokens, "transformers' cache disagrees with its full pass"
    print(f"seed {seed}: {len(set(tokens))} different tokens, smallest lead {lead:.3f}")

    model.save_pretrained(HERE / "model")
    (HERE / "model" / "generation_config.json").unlink(missing_ok=True)
    (HERE / "greedy.json").write_text(json.dumps({"prompt": PROMPT, "tokens": tokens}) + "\n")
    logits = {"model": model(prompt).logits[0].contiguous()}
    for name, options in {
        "adapter_linear": {"target_modules": LINEARS},
        "adapter_wide": {"target_modules": [*LINEARS, "embed_tokens", "lm_head"], "use_rslora": True},
    }.items():
        tuned = adapter(random_model(seed), **options)
        logits[name] = tuned(prompt).logits[0].contiguous()
        tuned.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink(missing_ok=True)
    save_file(logits, HERE / "logits.safetensors")


if __name__ == "__main__":
    main()
