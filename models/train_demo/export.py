"""Write a trained model in the Hugging Face format, and talk to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from . import tokenizer as demo_tokenizer
from .network import Llama, hf_config
from .tokenizer import END_OF_TEXT_ID, IM_END_ID

SAMPLES = [
    ["Hello! Who are you?", "What can you do?"],
    ["What is the capital of France?", "And of Italy?"],
    ["Tell me a short story about a fox."],
    ["What is 2+3?", "What is 47 + 38?"],
    ["What is a KV cache?"],
    ["Give me a tip for cooking", "Another one?"],
    ["Count from one to ten"],
    ["My name is Anna.", "What is 6 times 7?", "What is my name?"],
    ["Who are you?"],
    ["What is disaggregated prefill on Kubernetes?"],
    ["Repeat after me: good morning 🙂 你好"],
    ["I feel sad today.", "Thanks!"],
    ["Explain how airplanes fly", "Write a poem about the sea", "What do owls eat?"],
]


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, weights (bfloat16), generation config and tokenizer."""
    demo_tokenizer.save(tokenizer, folder)
    state = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": [IM_END_ID, END_OF_TEXT_ID],
        "pad_token_id": END_OF_TEXT_ID,
    }
    for name, value in (("config.json", hf_config()), ("generation_config.json", generation)):
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def chat(folder: Path, temperature: float = 0.0) -> None:
    """Print replies to a few dialogues, to see how good the model is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    for questions in SAMPLES:
        messages: list[dict[str, str]] = []
        if questions == SAMPLES[8]:
            messages.append({"role": "system", "content": "You are Bolt, a friendly robot."})
        for question in questions:
            messages.append({"role": "user", "content": question})
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            options = {"temperature": temperature} if temperature else {}
            out = model.generate(**ids, do_sample=bool(temperature), max_new_tokens=400, **options)
            new = out[0, ids["input_ids"].shape[1] :]
            reply = tokenizer.decode(new, skip_special_tokens=True)
            ended = "" if int(new[-1]) == IM_END_ID else "  [DID NOT END]"
            print(f"> {question}\n{reply}{ended}", flush=True)
            messages.append({"role": "assistant", "content": reply})
        print()
