"""The residual stream behind each layer."""

from typing import Any

from jaxtyping import Array, Float, Int

from .decoder import Decoder


class _Recorder:
    """A layer that remembers its last output."""

    def __init__(self, block: Any, seen: list[Array]):
        self.block, self.seen = block, seen

    def __call__(self, *arguments: Any) -> Any:
        x, cache = self.block(*arguments)
        self.seen.append(x)
        return x, cache


def residual_stream(
    decoder: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> list[Float[Array, "B T D"]]:
    """What each layer adds up to, [B, T, hidden] in the decoder's dtype, first layer first.

    Args:
        decoder: is changed; give one made by `Structure.merge` inside the jitted function.
        tokens: int32 [B, T], padded at the end; what is said of padding is arbitrary.
        lengths: int32 [B], at least 1.
    """
    seen: list[Array] = []
    decoder.layers = [_Recorder(block, seen) for block in decoder.layers]  # type: ignore[assignment]
    decoder.hidden_states(tokens, lengths=lengths)
    return seen
