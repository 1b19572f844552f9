"""The tokenizer of the demo model: byte-level BPE with single digits, trained on the corpus."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from . import corpus
from .tasks import EMOJI

VOCAB_SIZE = 3072
MAX_POSITIONS = 8192
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, IM_START, IM_END]
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 0, 1, 2

CHAT_TEMPLATE = """\
{%- macro content(message) %}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- elif message['content'] %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}{{- part['text'] }}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set start = '<|im_start|>' %}
{%- set end = '<|im_end|>\\n' %}
{%- set first = messages[0] if messages and messages[0]['role'] in ['system', 'developer'] else none %}
{%- if first or tools %}
    {{- start + 'system\\n' }}
    {%- if first %}{{- content(first) }}{% endif %}
    {%- if tools %}
        {%- if first %}{{- '\\n\\n' }}{% endif %}
        {{- 'You may call these tools:\\n<tools>' }}
        {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
        {{- '\\n</tools>\\nTo call a tool, answer with <tool_call>\\n' }}
        {{- '{"name": ..., "arguments": ...}\\n</tool_call>' }}
    {%- endif %}
    {{- end }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and first %}
    {%- elif message['role'] == 'tool' %}
        {{- start + 'user\\n<tool_response>\\n' + content(message) + '\\n</tool_response>' + end }}
    {%- else %}
        {{- start + ('system' if message['role'] == 'developer' else message['role']) + '\\n' }}
        {{- content(message) }}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] if call['function'] else call %}
            {%- set arguments = function['arguments'] %}
            {{- '<tool_call>\\n{"name": "' + function['name'] + '", "arguments": ' }}
            {{- arguments if arguments is string else (arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- end }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- start + 'assistant\\n' }}{% endif %}
"""


def train(seed: int, documents: int) -> Tokenizer:
    """Train the tokenizer on freshly generated documents."""
    rng = Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )

    def texts() -> list[str]:
        found = []
        for _ in range(documents):
            found += [text for _, text in corpus.document(rng)]
        return found + ["system\n", "user\n", "assistant\n"] * 100 + EMOJI * 20

    tokenizer.train_from_iterator(texts(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer files in the form that every reader understands."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": END_OF_TEXT, "eos_token": IM_END, "pad_token": END_OF_TEXT}
    added = {
        str(number): {
            "content": text, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for number, text in enumerate(SPECIAL)
    }  # fmt: skip
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": added,
        **names,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
