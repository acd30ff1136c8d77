"""W4A8 language models in JAX: quantize, run, evaluate and export them.

    import w4a8jax

    w4a8jax.quantize("path/to/bf16", "path/to/w4a8")
    model = w4a8jax.load("path/to/w4a8")
    print(w4a8jax.evaluate(model, text).perplexity)

Names are imported when they are first used: `import w4a8jax` itself loads no JAX and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.sampling import SamplingParams as SamplingParams
    from pallas_kernels import W4A8Error as W4A8Error
    from pallas_kernels import W4Weight as W4Weight
    from pallas_kernels import backend as backend
    from pallas_kernels import quantize_activations as quantize_activations
    from pallas_kernels import w4a8_matmul as w4a8_matmul
    from pallas_kernels import w4a8_moe_mlp as w4a8_moe_mlp
    from pallas_kernels import w4a8_ragged_matmul as w4a8_ragged_matmul
    from pallas_kernels import w4a16_matmul as w4a16_matmul

    from .calibration.load import load_calibration as load_calibration
    from .checkpoints.load import load as load
    from .checkpoints.reader import CheckpointReader as CheckpointReader
    from .distillation.options import DistillationOptions as DistillationOptions
    from .distillation.record import DistillationRecord as DistillationRecord
    from .distillation.training import distill as distill
    from .evaluation import Comparison as Comparison
    from .evaluation import Evaluation as Evaluation
    from .evaluation import compare as compare
    from .evaluation import evaluate as evaluate
    from .inspection import Inspection as Inspection
    from .inspection import inspect as inspect
    from .language_model import GenerationResult as GenerationResult
    from .language_model import LanguageModel as LanguageModel
    from .plots import plot_inspection as plot_inspection
    from .quantization.pipeline import quantize as quantize
    from .quantization.rtn import quantize_weight as quantize_weight
    from .reference import reference_model as reference_model
    from .reference import reference_text as reference_text
    from .reporting import Report as Report
    from .reporting import report as report
    from .tokenizer import Tokenizer as Tokenizer
    from .verification import Verification as Verification
    from .verification import verify as verify

# Public name -> the module that defines it. No submodule may have a public name: importing it would replace the object.
_EXPORTS = {
    "CheckpointReader": "w4a8jax.checkpoints.reader",
    "Comparison": "w4a8jax.evaluation",
    "DistillationOptions": "w4a8jax.distillation.options",
    "DistillationRecord": "w4a8jax.distillation.record",
    "Evaluation": "w4a8jax.evaluation",
    "GenerationResult": "w4a8jax.language_model",
    "Inspection": "w4a8jax.inspection",
    "LanguageModel": "w4a8jax.language_model",
    "Report": "w4a8jax.reporting.record",
    "SamplingParams": "models.sampling",
    "Tokenizer": "w4a8jax.tokenizer",
    "Verification": "w4a8jax.verification",
    "W4A8Error": "pallas_kernels.errors",
    "W4Weight": "pallas_kernels",
    "backend": "pallas_kernels",
    "compare": "w4a8jax.evaluation",
    "distill": "w4a8jax.distillation.training",
    "evaluate": "w4a8jax.evaluation",
    "inspect": "w4a8jax.inspection",
    "load": "w4a8jax.checkpoints.load",
    "load_calibration": "w4a8jax.calibration.load",
    "plot_inspection": "w4a8jax.plots",
    "quantize": "w4a8jax.quantization.pipeline",
    "quantize_activations": "pallas_kernels",
    "quantize_weight": "w4a8jax.quantization.rtn",
    "reference_model": "w4a8jax.reference",
    "reference_text": "w4a8jax.reference",
    "report": "w4a8jax.reporting.runner",
    "verify": "w4a8jax.verification",
    "w4a8_matmul": "pallas_kernels",
    "w4a8_moe_mlp": "pallas_kernels",
    "w4a8_ragged_matmul": "pallas_kernels",
    "w4a16_matmul": "pallas_kernels",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("w4a8jax")
    elif name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
