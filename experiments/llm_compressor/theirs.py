"""llm-compressor's GPTQ in a process of its own, in its own environment: theirs.py JOB, a JSON file of compare.py.

Prints, as the last line of its output, seconds of wall and CPU time of each phase, and versions.
"""

from timing import Phases  # first: its clock starts when it is imported

phases = Phases()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import compressed_tensors  # noqa: E402
import llmcompressor  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402

phases.done("import")


def main(job: dict) -> None:
    torch.set_num_threads(job["threads"])
    options = dict(job["options"])
    dtype = getattr(torch, options.pop("dtype", "bfloat16"))
    model = transformers.AutoModelForCausalLM.from_pretrained(job["source"], dtype=dtype)
    tokens = json.loads(Path(job["tokens"]).read_text())
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(sample) for sample in tokens]})
    phases.done("load")
    recipe = GPTQModifier(targets="Linear", scheme="W4AFP8", ignore=["lm_head"], **options)
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=max(map(len, tokens)),
        num_calibration_samples=len(tokens),
    )
    phases.done("quantize")
    # By itself it takes int-quantized, which vLLM does not serve as W4A8.
    model.save_pretrained(job["target"], save_compressed=True, quantization_format="pack-quantized")
    phases.done("save")
    modules = (llmcompressor, compressed_tensors, torch, transformers)
    versions = {module.__name__: module.__version__ for module in modules}
    print("\n" + json.dumps({"phases": phases.found, "versions": versions}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
