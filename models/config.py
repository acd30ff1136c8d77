"""`DecoderConfig`: everything that tells one decoder-only model from another."""

import dataclasses
from typing import Any, Literal

from pallas_kernels.moe import Selection

LayerType = Literal["full", "sliding"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        interleaved: pairs are (0, 1), (2, 3), ... (Cohere) rather than (0, D/2), (1, D/2 + 1), ... (Llama).
        kind: Hugging Face's `rope_type`: "default", "linear", "dynamic", "yarn", "longrope" or "llama3". "dynamic"
            scales only beyond the model's `max_context`, so that generation, which ends there, never meets it.
        scaling: the other keys of Hugging Face's `rope_parameters`, sorted, lists as tuples.
    """

    theta: float = 10000.0
    interleaved: bool = False
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP.

    Attributes:
        num_experts: E; top_k: experts that each token is sent to, at most E.
        intermediate_size: of one expert.
        sparse_layers: for each layer, whether it has experts; the others keep a dense MLP.
        selection: what turns router logits into weights, a softmax over all experts or a sigmoid of each.
        normalize: the weights of the chosen experts are divided by their sum.
        shared_intermediate_size: of the MLP that every token passes beside its experts; 0 if there is none.
        shared_combination: the result is "sum", routed + shared, or "average", half of that.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    sparse_layers: tuple[bool, ...]
    selection: Selection = "softmax"
    normalize: bool = True
    shared_intermediate_size: int = 0
    shared_combination: Literal["sum", "average"] = "sum"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Hashable, so that it can be a static argument of jit.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: dimensions;
            intermediate_size is that of layers without experts.
        max_context: the longest sequence, prompt and continuation together, in tokens.
        layer_types: for each layer, attention to all earlier tokens ("full") or to the last `sliding_window`.
        sliding_window: tokens that a "sliding" layer attends to, the current one included; None if there is none.
        rope: rotary embedding; rope_on_full: whether "full" layers use it too; rope_on_dense: whether those of them do
            that have no experts.
        norm: "rmsnorm", or "layernorm" without bias; norm_eps its epsilon.
        parallel_block: attention and MLP read the same norm and are added together, rather than in sequence.
        qk_norm: RMSNorm over each head's queries and keys.
        attention_bias: bias of q, k, v; output_bias: of o; mlp_bias: of gate, up, down.
        tie_embeddings: the output projection is the embedding.
        logit_scale: factor on the logits.
        moe: experts; None if no layer has any.
        bos_token_id, eos_token_ids, pad_token_id: from the checkpoint's config.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None = None
    rope: RopeConfig = RopeConfig()
    rope_on_full: bool = True
    rope_on_dense: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    parallel_block: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    logit_scale: float = 1.0
    moe: MoEConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def window(self, layer: int) -> int | None:
        """The attention window of a layer in tokens, or None if it attends to all."""
        return self.sliding_window if self.layer_types[layer] == "sliding" else None

    def uses_rope(self, layer: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        forced = self.rope_on_full or (self.rope_on_dense and self.experts(layer) is None)
        return forced or self.layer_types[layer] == "sliding"

    def experts(self, layer: int) -> MoEConfig | None:
        """The experts of a layer, or None if its MLP is dense."""
        return self.moe if self.moe is not None and self.moe.sparse_layers[layer] else None
