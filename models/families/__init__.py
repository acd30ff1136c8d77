"""Model families: from a Hugging Face config to a `DecoderConfig`, and from its tensor names to our parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pallas_kernels import W4A8Error

from ..config import DecoderConfig
from . import cohere2, cohere2_moe, llama, mixtral, qwen3, qwen3_moe
from .common import Names


class Family(NamedTuple):
    """What a family is made of.

    Attributes:
        decoder_config: Hugging Face's config.json as a dict -> `DecoderConfig`.
        names: our module paths, `{i}` for the layer -> the Hugging Face modules whose rows make them up, in order; one
            for each expert where they have an `{e}`.
    """

    decoder_config: Callable[[Mapping[str, Any]], DecoderConfig]
    names: Names


FAMILIES: dict[str, Family] = {
    "cohere2": Family(cohere2.decoder_config, cohere2.NAMES),
    "cohere2_moe": Family(cohere2_moe.decoder_config, cohere2_moe.NAMES),
    "llama": Family(llama.decoder_config, llama.NAMES),
    "mixtral": Family(mixtral.decoder_config, mixtral.NAMES),
    "qwen3": Family(qwen3.decoder_config, qwen3.NAMES),
    "qwen3_moe": Family(qwen3_moe.decoder_config, qwen3_moe.NAMES),
}


def family(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.

    Raises:
        W4A8Error: its `model_type` is none that we know.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise W4A8Error(f"config.json: model_type {kind!r} is unknown; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a Hugging Face config.

    Raises:
        W4A8Error: the model_type is unknown, a value is missing, or one asks for what the decoder cannot do.
    """
    return family(config).decoder_config(config)
