"""A model to use: text in, text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.config import DecoderConfig
from models.decoder import Decoder
from models.generate import FinishReason, Generator, Timings
from models.sampling import SamplingParams
from models.scoring import chunked_logits
from pallas_kernels.errors import W4A8Error

from .tokenizer import Tokenizer

# Seconds between deliveries of streamed text to aim for: what a reader sees as steady.
_LATENCY = 0.05

Stop = str | int | Sequence[str | int]
Stream = bool | Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """One prompt's continuation.

    Attributes:
        text: of the new tokens, without special tokens, the stop token and the stop string; "" without a tokenizer.
        tokens: new token ids; a stop token that ended them, or the token that completed a stop string, is the last.
        finish_reason: "stop" at a stop token or string, "length" at max_new_tokens or at the context's end.
        prompt_tokens: how many tokens the prompt had.
        seed: of the random stream; generating with it again gives the same tokens.
        timings: of the whole batch.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    timings: Timings


class LanguageModel:
    """A decoder with its tokenizer; `w4a8jax.load` makes one from a checkpoint.

    Args:
        decoder: the model.
        tokenizer: None if the checkpoint has none; then prompts must be token ids.
        name: what the model is called in messages, such as its path.
        generation_config: generation_config.json, for stop tokens and default sampling.
        scheme: "bf16", "w4a8" or "w4a16"; what the checkpoint's weights are run as.
        max_context: the longest prompt and continuation together, in tokens; the model's own by default.

    Raises:
        W4A8Error: max_context is more than the model's own, or generation_config.json is not as expected.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        name: str = "model",
        generation_config: Mapping[str, Any] | None = None,
        scheme: str = "bf16",
        max_context: int | None = None,
    ):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.name = name
        self.generation_config = dict(generation_config or {})
        self.scheme = scheme
        self.generator = Generator(decoder, max_context=max_context)
        self.stop_token_ids = self._stop_token_ids()
        self.default_sampling = _default_sampling(self.generation_config)

    @property
    def config(self) -> DecoderConfig:
        """Of the decoder."""
        return self.decoder.config

    def __repr__(self) -> str:
        config = self.config
        size = f"{config.num_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}"
        return f"LanguageModel({self.name!r}, {self.scheme}, {size}, context {self.generator.max_context})"

    @overload
    def generate(
        self,
        prompt: str | list[int] | np.ndarray,
        *,
        max_new_tokens: int = ...,
        sampling: SamplingParams | Sequence[SamplingParams] | None = ...,
        stop: Stop = ...,
        stream: Stream = ...,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        max_new_tokens: int = ...,
        sampling: SamplingParams | Sequence[SamplingParams] | None = ...,
        stop: Stop = ...,
        stream: Stream = ...,
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Stop = (),
        stream: Stream = False,
    ) -> GenerationResult | list[GenerationResult]:
        """Continues a prompt, or a list of prompts as one batch.

        Args:
            prompt: text or token ids, or a list of either.
            max_new_tokens: fewer come where the context ends before, or at a stop.
            sampling: by default what generation_config.json says, which is greedy unless it has `do_sample`. If prompts
                share one, prompt i draws with seed + i.
            stop: texts and token ids at which to stop, beside the model's own `stop_token_ids`.
            stream: called with each piece of text as it comes; True prints it. For one prompt.

        Returns:
            A result for a prompt, a list of them for a list.

        Raises:
            W4A8Error: a prompt is too long or empty, a text comes without a tokenizer, or an option does not fit.
        """
        many = isinstance(prompt, list | tuple) and len(prompt) > 0 and not isinstance(prompt[0], int | np.integer)
        prompts = [self._encode(p) for p in (prompt if many else [prompt])]
        if stream and len(prompts) != 1:
            raise W4A8Error(f"stream: expected one prompt, found {len(prompts)}")
        results = self._generate(prompts, max_new_tokens, sampling, stop, stream)
        return results if many else results[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        max_new_tokens: int = 256,
        sampling: SamplingParams | None = None,
        stop: Stop = (),
        stream: Stream = False,
    ) -> GenerationResult:
        """The model's answer to a conversation.

        Args:
            messages: dicts with "role" ("system", "user", "assistant", ...) and "content".
            tools: JSON schemas of functions that the model may call.
            template_variables: further names that the chat template sees.
            max_new_tokens, sampling, stop, stream: as for `generate`.

        Raises:
            W4A8Error: there is no tokenizer or chat template, it refuses the messages, or as `generate`.
        """
        tokenizer = self._need_tokenizer()
        text = tokenizer.apply_chat_template(messages, tools=tools, **(template_variables or {}))
        prompt = tokenizer.encode(text, add_special_tokens=False)
        return self._generate([prompt], max_new_tokens, sampling, stop, stream)[0]

    def logits(self, tokens: Any) -> Float[Array, "*B T V"]:
        """fp32 logits [T, V] of token ids [T], or [B, T, V] of [B, T]; entry t predicts token t + 1.

        For long sequences, `models.scoring.chunked_logits` gives them piece by piece.

        Raises:
            W4A8Error: a sequence is empty or longer than the context, or an id is outside the vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.ndim not in (1, 2):
            raise W4A8Error(f"tokens: expected ids [T] or [B, T], found shape {list(ids.shape)}")
        pieces = [piece for _, piece in chunked_logits(self.decoder, np.atleast_2d(ids))]
        logits = jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]
        return logits if ids.ndim == 2 else logits[0]

    def _generate(
        self,
        prompts: list[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        stop: Stop,
        stream: Stream,
    ) -> list[GenerationResult]:
        texts, ids = _split_stops(stop)
        stop_ids = [*self.stop_token_ids, *ids]
        if texts:
            self._need_tokenizer()
        show = (lambda piece: print(piece, end="", flush=True)) if stream is True else stream or (lambda piece: None)
        writers = [_Writer(self.tokenizer, texts, show) for _ in prompts]
        run = self.generator.start(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=self.default_sampling if sampling is None else sampling,
            stop_tokens=stop_ids,
            latency=_LATENCY if stream else None,
        )
        for new in run:
            for row, tokens in enumerate(new):
                if any(writers[row].add(token, silent=token in stop_ids) for token in tokens):
                    run.stop(row)
        for writer in writers:
            writer.finish()
        if stream is True:
            print()
        return [
            GenerationResult(
                text=writer.text,
                tokens=tuple(writer.tokens),
                finish_reason="stop" if writer.stopped else generation.finish_reason,
                prompt_tokens=len(prompt) or 1,
                seed=generation.seed,
                timings=run.timings,
            )
            for prompt, writer, generation in zip(prompts, writers, run.generations, strict=True)
        ]

    def _encode(self, prompt: Any) -> Sequence[int]:
        return self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise W4A8Error(f"{self.name}: has no tokenizer; put its tokenizer.json there, or give token ids")
        return self.tokenizer

    def _stop_token_ids(self) -> tuple[int, ...]:
        """From generation_config.json, else config.json, else the tokenizer's EOS."""
        found = self.generation_config.get("eos_token_id")
        ids = list(self.config.eos_token_ids) if found is None else found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) for i in ids):
            raise W4A8Error(f"{self.name}: generation_config.json: eos_token_id: expected ids, found {found!r}")
        if not ids and self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids = [self.tokenizer.eos_token_id]
        return tuple(ids)


class _Writer:
    """Collects one sequence's tokens and text, and cuts it at a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], show: Callable[[str], None]):
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._stops, self._show = stops, show
        self._held = ""
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def add(self, token: int, *, silent: bool) -> bool:
        """Takes a token, whose text does not count if it is silent; true once a stop string is complete."""
        self.tokens.append(token)
        if self._stream is not None and not silent:
            self._push(self._stream.add([token]))
        return self.stopped

    def finish(self) -> None:
        """Writes what was held back."""
        if self._stream is not None and not self.stopped:
            self._push(self._stream.finish())
            if not self.stopped:
                self._write(self._held)

    def _push(self, piece: str) -> None:
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._write(self._held[: min(found)])
            return
        ready = len(self._held) - _partial_stop(self._held, self._stops)
        piece, self._held = self._held[:ready], self._held[ready:]
        self._write(piece)

    def _write(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._show(piece)


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of a text with which a stop string begins."""
    longest = min(len(text), max(map(len, stops), default=0))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


def _split_stops(stop: Stop) -> tuple[list[str], list[int]]:
    given = [stop] if isinstance(stop, str | int) else list(stop)
    texts = [s for s in given if isinstance(s, str)]
    ids = [int(s) for s in given if isinstance(s, int | np.integer) and not isinstance(s, bool)]
    if "" in texts or len(texts) + len(ids) != len(given):
        raise W4A8Error(f"stop: expected texts that are not empty and token ids, found {stop!r}")
    return texts, ids


def _default_sampling(config: Mapping[str, Any]) -> SamplingParams:
    """What generation_config.json says; greedy unless it has `do_sample`."""
    if not config.get("do_sample"):
        return SamplingParams()

    def value(name: str, default: Any) -> Any:
        return default if config.get(name) is None else config[name]

    try:
        return SamplingParams(
            temperature=value("temperature", 1.0), top_k=max(0, value("top_k", 0)), top_p=value("top_p", 1.0)
        )
    except (W4A8Error, TypeError) as e:
        raise W4A8Error(f"generation_config.json: {e}") from None
