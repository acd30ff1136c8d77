"""One optimizer update: the loss over a batch in parts, AdamW on the master weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from models.functional import Structure

from .loss import TopK, masked_kl
from .options import DistillationOptions
from .student import Arrays, Student


class State(NamedTuple):
    """What a snapshot holds: trained parameters, scales, the optimizer's state."""

    trainable: Arrays
    scales: Arrays
    optimizer: Any


def schedule(options: DistillationOptions) -> optax.Schedule:
    """Linear warmup, then a cosine to zero."""
    warmup = min(options.warmup, options.steps // 2)
    return optax.warmup_cosine_decay_schedule(
        options.learning_rate / (warmup + 1), options.learning_rate, warmup, options.steps + 1
    )


def optimizer(options: DistillationOptions) -> optax.GradientTransformation:
    """AdamW with clipped gradients."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(schedule(options), b1=options.b1, b2=options.b2, weight_decay=options.weight_decay),
    )


def initial_state(student: Student, options: DistillationOptions) -> State:
    """Before the first step; moments are fp32 whatever the master weights are."""
    wide = {name: value.astype(jnp.float32) for name, value in student.trainable.items()}
    return State(student.trainable, student.scales, optimizer(options).init(wide))


def loss_and_gradient(
    student: Student,
    trainable: Arrays,
    scales: Arrays,
    frozen: Arrays,
    teacher: Any,
    tokens: Int[Array, "A B T"],
    lengths: Int[Array, "A B"],
    loss_mask: Float[Array, "A B T"],
    top_k: TopK | None = None,
) -> tuple[Array, Arrays]:
    """The mean KL over all tokens of the A parts that count, and its straight-through gradient in fp32.

    Args:
        teacher: the teacher as `merge` of its arrays, called in the trace; unused with `top_k`.
        top_k: what the teacher said, [A, B, T - 1, k].
    """
    count = jnp.maximum(jnp.sum(loss_mask[..., 1:].astype(jnp.float32)), 1)

    def part(carry: Any, inputs: Any) -> tuple[Any, None]:
        tokens, lengths, mask, given = inputs

        def loss(trainable: Arrays) -> Array:
            decoder = student.merge(trainable, scales, frozen)
            return masked_kl(decoder, teacher() if given is None else given, tokens, lengths, mask)

        value, gradient = jax.value_and_grad(loss)(trainable)
        total, summed = carry
        return (total + value, jax.tree.map(lambda s, g: s + g.astype(jnp.float32), summed, gradient)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    (total, gradient), _ = jax.lax.scan(part, (jnp.float32(0), zeros), (tokens, lengths, loss_mask, top_k))
    return total / count, jax.tree.map(lambda g: g / count, gradient)


def make_update(
    student: Student, teacher: Structure, options: DistillationOptions
) -> Callable[..., tuple[State, Float[Array, ""]]]:
    """The compiled `(state, frozen, teacher leaves, step, batch..., top_k) -> state, loss`; it donates the state."""
    transformation = optimizer(options)

    def update(
        state: State, frozen: Arrays, leaves: list[Array], step: Array, tokens: Array, lengths: Array, mask: Array,
        top_k: TopK | None,
    ) -> tuple[State, Array]:  # fmt: skip
        loss, gradient = loss_and_gradient(
            student, state.trainable, state.scales, frozen, lambda: teacher.merge(leaves), tokens, lengths, mask, top_k
        )
        wide = {name: value.astype(jnp.float32) for name, value in state.trainable.items()}
        changes, moments = transformation.update(gradient, state.optimizer, wide)
        key = jax.random.fold_in(jax.random.key(options.seed), step)
        trained = {}
        for i, (name, value) in enumerate(sorted(wide.items())):
            new = value + changes[name]
            narrow = state.trainable[name].dtype == jnp.bfloat16
            trained[name] = stochastic_bf16(new, jax.random.fold_in(key, i)) if narrow else new
        return State(trained, state.scales, moments), loss

    return jax.jit(update, donate_argnums=0)


def stochastic_bf16(x: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
    """Rounds fp32 to one of the two bf16 next to it, so that the mean is x: small updates are not lost."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
