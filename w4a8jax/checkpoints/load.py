"""From a checkpoint directory to a `LanguageModel`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from jax.sharding import Mesh

from models.families import family
from models.layers.linear import Scheme
from models.sharding import Sharding
from models.weights import load_decoder
from pallas_kernels.errors import W4A8Error
from pallas_kernels.weight_format import Numerics

from ..language_model import LanguageModel
from ..tokenizer import Tokenizer
from .compressed_tensors import parse, quantized_modules
from .reader import CONFIG, CheckpointReader

_DTYPES = ("bfloat16", "float16", "float32")


def load(
    path: str | Path,
    *,
    scheme: Scheme | None = None,
    numerics: Numerics | None = None,
    dtype: str = "bfloat16",
    max_context: int | None = None,
    kernels: bool = True,
    mesh: Mesh | None = None,
) -> LanguageModel:
    """Loads a Hugging Face checkpoint, quantized or not, onto the default device, a module at a time.

    Args:
        path: a directory, or a Hub name such as "org/name".
        scheme: how quantized layers compute: "w4a8" or "w4a16"; by default as the checkpoint says.
        numerics: "lut", the arithmetic of vLLM's W4A8 kernel, or "exact", without its scale and product roundings;
            by default "lut" for w4a8 and "exact" for w4a16, whose kernels round neither.
        dtype: of activations and unquantized parameters: "bfloat16", "float16" or "float32". Quantized layers round
            activations to FP8 (w4a8) or bf16 (w4a16) whatever it is.
        max_context: the longest prompt and continuation together, in tokens; by default what the model allows.
        kernels: run on this device's kernels where it has any (see `w4a8jax.backend`); False: the reference in jnp.
        mesh: devices to divide the model among: its axis "tensor" divides heads, MLPs and the vocabulary, its axis
            "expert" the experts. Each receives its part only, and runs its kernels on it.

    Returns:
        The model; its tokenizer is None if the checkpoint has none.

    Raises:
        W4A8Error: the checkpoint is damaged, of an unknown family, contradicts its config, or an option does not fit.
    """
    if dtype not in _DTYPES:
        raise W4A8Error(f"dtype: expected one of {', '.join(_DTYPES)}, found {dtype!r}")
    if numerics not in (None, *get_args(Numerics)):
        raise W4A8Error(f"numerics: expected lut or exact, found {numerics!r}")
    reader = CheckpointReader(path)
    members = family(reader.config)
    scheme = _scheme(reader, scheme)
    config = members.decoder_config(reader.config)
    decoder = load_decoder(
        config,
        members.names,
        reader,
        dtype=dtype,
        scheme=scheme,
        numerics=numerics or ("lut" if scheme == "w4a8" else "exact"),
        kernels=kernels,
        sharding=None if mesh is None else Sharding(mesh, config),
    )
    return LanguageModel(
        decoder,
        Tokenizer.from_directory(reader.path) if reader.has_tokenizer() else None,
        name=str(path),
        generation_config=_generation_config(reader.path),
        scheme=scheme,
        max_context=max_context,
    )


def _scheme(reader: CheckpointReader, asked: Scheme | None) -> Scheme:
    if asked not in (None, *get_args(Scheme)):
        raise W4A8Error(f"scheme: expected {', '.join(get_args(Scheme))}, found {asked!r}")
    config = parse(reader.config, str(reader.path / CONFIG))
    if config is None or not quantized_modules(reader):
        if asked not in (None, "bf16"):
            raise W4A8Error(f"scheme: {reader.path} is not quantized; run `w4a8jax quantize` on it to use {asked}")
        return "bf16"
    if asked == "bf16":
        raise W4A8Error(f"scheme: {reader.path} is quantized and can run as w4a8 or w4a16, not as bf16")
    return asked or config.scheme


def _generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise W4A8Error(f"{file}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise W4A8Error(f"{file}: must be an object, found {type(found).__name__}")
    return found
