"""Reads a checkpoint with its tokenizer by transformers: read_reference.py FOLDER

FOLDER/job.json: "checkpoint", "texts", "conversations". It writes

    FOLDER/read.json           "ids" of each text with and without special tokens, "decoded" texts without and with
                               them, "chats" as text and "chat_ids", "vocab_size" and "special" ids
    FOLDER/logits.safetensors  fp32 "logits" [S, V] of the first text
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"])
    both = (True, False)
    ids = [[tokenizer(text, add_special_tokens=special)["input_ids"] for special in both] for text in job["texts"]]
    chats = [tokenizer.apply_chat_template(chat, tokenize=False, **options) for chat, options in job["conversations"]]
    result = {
        "ids": ids,
        "decoded": [[tokenizer.decode(found[0], skip_special_tokens=skip) for skip in both] for found in ids],
        "chats": chats,
        "chat_ids": [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats],
        "vocab_size": len(tokenizer),
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    (folder / "read.json").write_text(json.dumps(result))
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32).eval()
    logits = model(torch.tensor([ids[0][0]])).logits[0]
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
