"""A byte-level BPE tokenizer trained on a few sentences, written as a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXT = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "for i in range(10):\n    print(i, end=' ')\n",
]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|model|>", "<|end|>"]
TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m['role'] not in ['user', 'assistant', 'system'] %}
        {{ raise_exception("unknown role " + m['role']) }}
    {% endif %}
<|{{ 'user' if m['role'] == 'user' else 'model' }}|>{{ m['content'] }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|model|>
{%- endif %}"""
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": "<bos>", "lstrip": False, "rstrip": False, "special": True},
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "chat_template": TEMPLATE,
}


def write_tokenizer(path: Path, *, config: dict[str, Any] | None = None, post_processor: bool = True) -> Path:
    """Writes tokenizer.json, and tokenizer_config.json with `config`, by default `CONFIG`; returns the directory."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.enable_truncation(8)  # what a training script may leave behind
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(CONFIG if config is None else config))
    return path
