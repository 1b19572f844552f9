"""The demo model's folder is complete, small and of the promised shape, and the model answers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "models" / "demo"


def read_json(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and busy machines lose much
    yield pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    torch.set_num_threads(threads)


def answer(model: Any, tokenizer: Any, *turns: str, system: str = "") -> str:
    """The greedy reply to the last of some turns; fails when the model does not end it."""
    messages = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        messages.append({"role": "assistant" if index % 2 else "user", "content": turn})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=250)[0]
    assert int(out[-1]) == tokenizer.eos_token_id, "the model did not end its turn"
    return tokenizer.decode(out[prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_configuration_is_a_plain_llama() -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == config["hidden_size"] // config["num_attention_heads"] == 64
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 8192
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    generation = read_json("generation_config.json")
    assert config["eos_token_id"] in generation["eos_token_id"]


def test_the_weights_are_small_and_complete() -> None:
    path = FOLDER / "model.safetensors"
    assert 3_000_000 < path.stat().st_size < 8_000_000
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__")
    config = read_json("config.json")
    assert len(tensors) == 9 * config["num_hidden_layers"] + 2
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    embedding = tensors["model.embed_tokens.weight"]["shape"]
    assert embedding == [config["vocab_size"], config["hidden_size"]]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 9_000_000


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two  spaces\n\n\ttabs ",
        "42 + 38 = 80",
        "naïve café, ¿qué?",
        "🦊🙂👩‍🚀 🇫🇷",
        "你好, мир, שלום",
        "",
    ],
)
def test_every_text_survives_the_tokenizer(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert all(index < read_json("config.json")["vocab_size"] for index in ids)


def test_the_chat_template_renders(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
    ids = tokenizer.apply_chat_template(parts, return_dict=True)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_the_chat_template_renders_tools(tokenizer: Any) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": parameters}}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert json.dumps(tool) in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Hello! Who are you?", "Demo"),
        ("What is the capital of France?", "Paris"),
        ("Tell me a short story about a fox", "fox"),
        ("What is 2+3?", "5"),
        ("What is a KV cache?", "keys and values"),
        ("Count from one to ten", "eight, nine, ten"),
    ],
)
def test_the_model_answers_and_ends_its_turn(model: Any, tokenizer: Any, question: str, word: str) -> None:
    assert word in answer(model, tokenizer, question)


def test_the_model_follows_a_conversation(model: Any, tokenizer: Any) -> None:
    turns = ("What is the capital of France?", "The capital of France is Paris.", "And of Italy?")
    assert "Rome" in answer(model, tokenizer, *turns)
    assert "Bolt" in answer(model, tokenizer, "Who are you?", system="You are Bolt, a friendly robot.")


def test_the_model_reads_far_back(model: Any, tokenizer: Any) -> None:
    turns = ["My name is Anna.", "Nice to meet you, Anna!"]
    turns += ["What is the largest planet?", "The largest planet of our solar system is Jupiter."] * 60
    assert len(tokenizer.encode(" ".join(turns))) > 900
    assert answer(model, tokenizer, *turns, "What is my name?") == "Your name is Anna."
