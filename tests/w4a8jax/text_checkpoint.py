"""Toy checkpoints that take text: with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from toy import save_checkpoint, toy_config, toy_tensors

SPECIAL = ["<pad>", "<bos>", "<eos>"]
VOCABULARY = 320  # 259 of them are tokens
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def text_checkpoint(path: Path, *, model_type: str = "cohere2", add_bos: bool = True, seed: int = 0) -> Path:
    """A bf16 checkpoint in `path`, one token a byte, context 512."""
    config = toy_config(model_type) | {"vocab_size": VOCABULARY}
    if model_type.startswith("cohere2"):
        config["logit_scale"] = 1.0
    tensors = toy_tensors(config, seed=seed)
    save_checkpoint(path, config, tensors)
    save_byte_tokenizer(path, add_bos=add_bos)
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    return path


def save_byte_tokenizer(path: Path, *, add_bos: bool = True) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(TEMPLATE)
