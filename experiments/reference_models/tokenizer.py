"""Trains the reference models' tokenizer, a byte-level BPE, on the train split of the reference text.

    python experiments/reference_models/tokenizer.py --out FOLDER

Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, for AutoTokenizer and `w4a8jax`. Any text
can be encoded and decodes to itself: there is no unknown token and no normalization.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from w4a8jax.reference import reference_documents

VOCAB_SIZE = 3840

PAD, BOS, EOS = "<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>"
START_OF_TURN, END_OF_TURN = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
SYSTEM, USER, CHATBOT = "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"
# Ids are positions in this list.
SPECIAL_TOKENS = [PAD, BOS, EOS, START_OF_TURN, END_OF_TURN, SYSTEM, USER, CHATBOT]

# As GPT-2's, but a run of spaces after a newline stays with it (one token for a line's indentation), and at most three
# digits are together.
_WORDS = r"\s*\n *(?! )|'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception("the roles of a chat are system, user and assistant, not " + message['role']) }}
{%- endif %}
{{- '<|START_OF_TURN_TOKEN|>' }}
{{- {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[message['role']] }}
{{- message['content'] | trim + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
{%- endif %}"""


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens; `encode` puts the BOS token first unless told otherwise."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    # The `test` package is two thirds of the text and unlike the rest: the words are learned from the rest.
    texts = (text for name, text in reference_documents("train") if name.split(".")[0] != "test")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes the three files; `max_length` is the model's context in tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "additional_special_tokens": SPECIAL_TOKENS[3:],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer's files")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--max-length", type=int, default=65536, help="the model's context, tokens")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.vocab_size)
    save_tokenizer(tokenizer, arguments.out, arguments.max_length)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{tokenizer.get_vocab_size()} tokens in {arguments.out}, {size} bytes")


if __name__ == "__main__":
    main()
