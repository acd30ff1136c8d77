"""Makes agentic traces from real text: a long system prompt with a block of tools, repeated in all, then turns.

    python experiments/agentic_traces.py traces.jsonl --count 16 --seed 0

Users ask for functions of Python's standard library, or send a file's excerpt as a tool's result; the assistant answers
with the source. The tools are functions of the library, described as JSON. The reference model's chat template knows no
tools, so their block stands in the system message, as agents without a tool template do it. The system prompt is the
same for every seed; the turns are drawn without replacement from the split of the reference text that is asked for.
"""

import argparse
import ast
import functools
import importlib
import inspect
import json
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from w4a8jax.reference import Split, reference_documents

TOOL_MODULES = ("json", "textwrap", "shutil", "glob", "fnmatch", "difflib", "heapq", "bisect", "shlex", "struct")
TOOLS = 36
INSTRUCTIONS = """You are a careful programmer who works on the source of Python's standard library with a user.
Answer with source code that runs, without comments on it. When a file is needed, call a tool and wait for its result;
never invent one. Give arguments as JSON, in the order of the description. Keep functions short, name things after what
they are, and raise the exceptions that the documentation of the library promises. If a question cannot be answered from
the files at hand, say which file is missing."""


@functools.cache
def system_prompt() -> str:
    """The instructions and the tools, the same for all traces."""
    tools = []
    for name in TOOL_MODULES:
        module = importlib.import_module(name)
        for attribute in sorted(getattr(module, "__all__", dir(module))):
            function = getattr(module, attribute)
            if inspect.isfunction(function) and (text := inspect.getdoc(function)):
                parameters = {p.name: {"type": "string"} for p in inspect.signature(function).parameters.values()}
                description = text.split("\n\n")[0].replace("\n", " ")
                tools.append({"name": f"{name}.{attribute}", "description": description, "parameters": parameters})
    return "\n".join([INSTRUCTIONS, "", "Tools:", *(json.dumps(tool) for tool in tools[:TOOLS])])


def traces(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations, as lines of calibration data.

    Args:
        split: of the reference text, from which the turns are.
        count: how many; fewer come where the split has no more functions.
        seed: which, and in what order.
    """
    draw = random.Random(seed)
    answers = list(_answers(split))
    draw.shuffle(answers)
    made = []
    while len(made) < count and answers:
        messages = [{"role": "system", "content": system_prompt()}]
        for question, context, answer in (answers.pop() for _ in range(min(draw.randint(1, 3), len(answers)))):
            if draw.random() < 0.5:
                call = json.dumps({"name": "read_file", "arguments": {"around": question.split("`")[1]}})
                messages += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": call},
                    {"role": "user", "content": f"Result of read_file:\n{context}"},
                ]
            else:
                messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        made.append({"messages": messages})
    return made


@functools.cache
def _answers(split: Split) -> tuple[tuple[str, str, str], ...]:
    return tuple(_functions(split))


def _functions(split: Split) -> Iterator[tuple[str, str, str]]:
    """Question, what stands before the function in its file, and the function, for documented ones of middle length."""
    for name, text in reference_documents(split):
        if ":" in name or name.split(".")[0] == "test":
            continue
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (documentation := ast.get_docstring(node)):
                continue
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).strip()
            if 200 <= len(source) <= 1500:
                question = f"Write the function `{node.name}`. {documentation.strip().splitlines()[0]}"
                yield question, "\n".join(lines[max(0, node.lineno - 13) : node.lineno - 1]), source


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    arguments = parser.parse_args()
    records = traces(arguments.split, arguments.count, arguments.seed)
    arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(records)} traces")
