"""Which experts tokens meet."""

from typing import Any

from jaxtyping import Array, Float, Int

from .decoder import Decoder
from .layers.moe import MoE


class _Recorder:
    """A `MoE` that remembers whom its last call chose."""

    def __init__(self, moe: MoE):
        self.moe = moe
        self.experts: Any = None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        self.experts = self.moe.choose(x)[1]
        return self.moe(x)


def chosen_experts(decoder: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> dict[int, Array]:
    """The experts of each token, int32 [B, T, top_k], greatest weight first, by layer; empty without experts.

    Args:
        decoder: is changed; give one made by `Structure.merge` inside the jitted function.
        tokens: int32 [B, T], padded at the end; what is said of padding is arbitrary.
        lengths: int32 [B], at least 1.
    """
    recorders: dict[int, _Recorder] = {}
    block: Any
    for i, block in enumerate(decoder.layers):
        if isinstance(block.mlp, MoE):
            block.mlp = recorders[i] = _Recorder(block.mlp)
    if recorders:
        decoder.hidden_states(tokens, lengths=lengths)
    return {i: recorder.experts for i, recorder in recorders.items()}
