"""The loss: Kullback-Leibler divergence from teacher to student at temperature 1
(Hinton et al., 2015, arXiv:1503.02531).

Logits are made for one chunk of positions at a time, and again in the backward pass, so that memory does not grow with
tokens times vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.decoder import Decoder

LOGITS = {"cpu": 2**22, "gpu": 2**27}  # of one chunk


class TopK(NamedTuple):
    """A teacher's likeliest tokens at each position: log probabilities fp32 and ids int32, [..., k] each."""

    log_p: Float[Array, "... k"]
    ids: Int[Array, "... k"]


def kl(teacher: Float[Array, "... V"], student: Float[Array, "... V"]) -> Float[Array, "..."]:
    """KL(teacher || student) in nats, fp32 [...], of logits [..., V]."""
    log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in (teacher, student))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def top_k_kl(teacher: TopK, student: Float[Array, "... V"]) -> Float[Array, "..."]:
    """The same with all tokens but the teacher's k likeliest taken together as one: a lower bound, exact for k = V."""
    log_q = jax.nn.log_softmax(student.astype(jnp.float32), axis=-1)
    log_q = jnp.take_along_axis(log_q, teacher.ids, axis=-1)
    p = jnp.exp(teacher.log_p)
    rest_p, rest_q = (jnp.clip(1 - jnp.sum(x, axis=-1), 1e-7) for x in (p, jnp.exp(log_q)))
    rest = rest_p * (jnp.log(rest_p) - jnp.log(rest_q))
    rest = jnp.where(teacher.ids.shape[-1] == student.shape[-1], 0, rest)
    return jnp.sum(p * (teacher.log_p - log_q), axis=-1) + rest


def chunk_length(config_vocab: int, batch: int, steps: int) -> int:
    """Positions of which logits are made together."""
    budget = LOGITS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    return max(1, min(steps, budget // (batch * config_vocab)))


def over_chunks[R](body: Callable[..., R], chunk: int, *arrays: Array) -> R:
    """`body` of pieces [B, chunk, ...] of arrays [B, T, ...], padded with zeros at the end; its results are added."""

    def pieces(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    results = jax.lax.map(jax.checkpoint(lambda args: body(*args)), tuple(map(pieces, arrays)))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), results)


def hidden_states(decoder: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B T-1 D"]:
    """Of all positions that predict a token."""
    # Padding is at the end, where causal attention hides it; only "longrope" looks at a sequence's length.
    known = lengths if decoder.config.rope.kind == "longrope" else None
    return decoder.hidden_states(tokens, lengths=known)[0][:, :-1]


def masked_kl(
    student: Decoder,
    teacher: Decoder | TopK,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    loss_mask: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The sum of KL(teacher || student) over the predictions of tokens that count.

    Args:
        student, teacher: decoders; or for the teacher what it said, [B, T - 1, k].
        tokens: int32 [B, T], padded at the end.
        lengths: int32 [B].
        loss_mask: [B, T], 1 where a token counts; the first is predicted by nothing and counts never.

    Returns:
        fp32 [], to be divided by the number of tokens that count.
    """
    hidden, mask = hidden_states(student, tokens, lengths), loss_mask[:, 1:].astype(jnp.float32)
    chunk = chunk_length(student.config.vocab_size, *tokens.shape)
    if isinstance(teacher, TopK):
        return over_chunks(
            lambda h, m, log_p, ids: jnp.sum(m * top_k_kl(TopK(log_p, ids), student.logits(h))),
            chunk, hidden, mask, *teacher,
        )  # fmt: skip
    given = jax.lax.stop_gradient(hidden_states(teacher, tokens, lengths))
    return over_chunks(
        lambda h, t, m: jnp.sum(m * kl(teacher.logits(t), student.logits(h))), chunk, hidden, given, mask
    )


class Scores(NamedTuple):
    """Sums over the tokens that count: the tokens, KL, negative log likelihoods, right next tokens."""

    tokens: Array
    kl: Array
    student_nll: Array
    teacher_nll: Array
    student_right: Array
    teacher_right: Array


def scores(
    student: Decoder,
    teacher: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    loss_mask: Float[Array, "B T"],
) -> Scores:
    """How well student and teacher predict; arguments as of `masked_kl`."""

    def body(h: Array, t: Array, target: Array, m: Array) -> Scores:
        logits = student.logits(h), teacher.logits(t)
        log_p = [jnp.take_along_axis(jax.nn.log_softmax(x), target[..., None], axis=-1)[..., 0] for x in logits]
        right = [(jnp.argmax(x, axis=-1) == target).astype(jnp.float32) for x in logits]
        columns = jnp.ones_like(m), kl(logits[1], logits[0]), -log_p[0], -log_p[1], *right
        return Scores(*(jnp.sum(m * column) for column in columns))

    hidden = hidden_states(student, tokens, lengths), hidden_states(teacher, tokens, lengths)
    chunk = chunk_length(student.config.vocab_size, *tokens.shape)
    return over_chunks(body, chunk, *hidden, tokens[:, 1:], loss_mask[:, 1:].astype(jnp.float32))
