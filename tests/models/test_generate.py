"""Generation against full recomputation, and what it promises: batches, chunks, seeds, stops, no recompilation."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CONFIGS, CONTEXT, VOCAB, tiny_decoder

from models import batching, generate
from models.functional import split
from models.generate import Generator
from models.sampling import SamplingParams
from models.scoring import chunked_logits, token_logprobs
from pallas_kernels import W4A8Error

FAMILIES = list(CONFIGS)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + 1000 * length).integers(3, VOCAB, length).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _whole(structure, leaves, tokens):
    return structure.merge(leaves)(tokens)[0]


def whole_logits(decoder, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] without a cache."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_whole(*split(decoder), padded))[0, : len(tokens)]


def by_recomputation(decoder, tokens: list[int], count: int) -> tuple[int, ...]:
    """Greedy continuation, the whole sequence computed anew, without a cache, for every token."""
    sequence = list(tokens)
    for _ in range(count):
        sequence.append(int(np.argmax(whole_logits(decoder, sequence)[-1])))
    return tuple(sequence[len(tokens) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_full_recomputation_for_a_batch_of_different_lengths(family):
    decoder = tiny_decoder(family)
    prompts = [prompt(n) for n in (3, 21, 12)]
    found, timings = Generator(decoder).generate(prompts, max_new_tokens=30)
    for tokens, generation in zip(prompts, found, strict=True):
        assert generation.tokens == by_recomputation(decoder, tokens, 30)
        assert generation.finish_reason == "length"
        assert len(set(generation.tokens)) > 3  # a constant would show little
    assert timings.prompt_tokens == 36
    assert timings.new_tokens == 90


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_each_prompt_gives_alone(family):
    generator = Generator(tiny_decoder(family))
    prompts = [prompt(n) for n in (9, 2, 30)]
    params = [SamplingParams(temperature=t, top_k=k, seed=s) for t, k, s in ((1.0, 0, 3), (0.0, 0, 0), (0.8, 20, 3))]
    stops = [(), (5, 6), (7,)]
    together, _ = generator.generate(prompts, max_new_tokens=34, sampling=params, stop_tokens=stops)
    for i in range(3):
        alone, _ = generator.generate([prompts[i]], max_new_tokens=34, sampling=[params[i]], stop_tokens=stops[i])
        assert alone[0] == together[i]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks_changes_nothing(family):
    decoder = tiny_decoder(family)
    prompts = [prompt(n) for n in (50, 16, 33)]
    options = {"max_new_tokens": 11, "sampling": SamplingParams(temperature=0.7, seed=1)}
    whole, _ = Generator(decoder).generate(prompts, **options)
    assert Generator(decoder, chunk=16).generate(prompts, **options)[0] == whole
    assert Generator(decoder, chunk=32).generate(prompts, **options)[0] == whole


def test_steps_per_dispatch_and_streaming_change_nothing():
    decoder = tiny_decoder("cohere2")
    generator, prompts = Generator(decoder), [prompt(5), prompt(9), prompt(7)]
    whole, _ = generator.generate(prompts, max_new_tokens=30)
    assert Generator(decoder, steps_per_dispatch=5).generate(prompts, max_new_tokens=30)[0] == whole
    for latency in (1e-9, 1e-3, 10.0):
        run = generator.start(prompts, max_new_tokens=30, latency=latency)
        pieces = list(run)
        for row, generation in enumerate(whole):
            assert tuple(itertools.chain.from_iterable(piece[row] for piece in pieces)) == generation.tokens
        assert run.generations == whole
        assert pieces[0] == [[generation.tokens[0]] for generation in whole]
        assert len(pieces) == 30 or latency > 1e-9


def compilations() -> dict[str, int]:
    return {name: getattr(generate, name)._cache_size() for name in ("_create_cache", "_prefill", "_first", "_decode")}


def test_nothing_is_compiled_within_a_bucket():
    generator = Generator(tiny_decoder("llama"), chunk=32)
    _, timings = generator.generate([prompt(40), prompt(9)], max_new_tokens=20)
    assert timings.compile_seconds > 0
    before = compilations()
    for first, second, new, sampling, stops in [
        (33, 60, 5, SamplingParams(), ()),
        (41, 3, 24, SamplingParams(temperature=0.5, top_k=7, top_p=0.9, seed=8), (4, 5, 6)),
        (61, 50, 4, [SamplingParams(), SamplingParams(temperature=2.0)], [(1,), (2, 3)]),
    ]:
        _, timings = generator.generate(
            [prompt(first), prompt(second)], max_new_tokens=new, sampling=sampling, stop_tokens=stops
        )
        assert timings.compile_seconds == 0
    assert compilations() == before
    # Another generator of the same model, and changed weights, compile nothing either; another bucket does.
    Generator(tiny_decoder("llama"), chunk=32).generate([prompt(40), prompt(9)], max_new_tokens=20)
    assert compilations() == before
    generator.generate([prompt(70), prompt(9)], max_new_tokens=20)
    assert compilations() != before


def test_weights_are_arguments_and_not_constants():
    decoder = tiny_decoder.__wrapped__("llama")
    generator = Generator(decoder)
    first, _ = generator.generate([prompt(8)], max_new_tokens=40)
    before = compilations()
    weight = decoder.layers[0].mlp.down.weight
    weight.set_value(-weight.get_value())
    second, _ = generator.generate([prompt(8)], max_new_tokens=40)
    assert second[0].tokens == by_recomputation(decoder, prompt(8), 40)
    assert second[0].tokens != first[0].tokens
    assert compilations() == before


def test_the_cache_is_donated(monkeypatch):
    given = {"_prefill": [], "_decode": []}
    for name, log in given.items():
        function = getattr(generate, name)

        def spy(structure, leaves, cache, *rest, _function=function, _log=log, **options):
            result = _function(structure, leaves, cache, *rest, **options)
            _log.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(cache)))
            return result

        monkeypatch.setattr(generate, name, spy)
    Generator(tiny_decoder("cohere2"), chunk=16).generate([prompt(34)], max_new_tokens=30)
    assert len(given["_prefill"]) >= 3
    assert len(given["_decode"]) >= 2
    assert all(given["_prefill"] + given["_decode"])


def test_seeds():
    generator = Generator(tiny_decoder("qwen3"))

    def tokens(prompts, seed):
        return generator.generate(prompts, max_new_tokens=40, sampling=SamplingParams(temperature=1.0, seed=seed))[0]

    first = tokens([prompt(6)], 7)
    assert tokens([prompt(6)], 7) == first
    assert tokens([prompt(6)], 8)[0].tokens != first[0].tokens
    # One parameter set for several prompts: prompt i has seed + i, so that a prompt given twice goes two ways.
    three = tokens([prompt(6)] * 3, 5)
    assert [g.seed for g in three] == [5, 6, 7]
    assert three[2] == first[0]
    assert len({g.tokens for g in three}) == 3
    # Without a seed one is drawn and told.
    free = generator.generate([prompt(6)], max_new_tokens=40, sampling=SamplingParams(temperature=1.0))[0]
    assert tokens([prompt(6)], free[0].seed) == free


def test_stop_tokens_end_their_sequence_alone():
    generator = Generator(tiny_decoder("cohere2"), steps_per_dispatch=5)
    prompts = [prompt(33), prompt(11), prompt(7)]
    free, _ = generator.generate(prompts, max_new_tokens=24)
    at = 9
    stop = free[0].tokens[at]
    where = free[0].tokens.index(stop)
    found, _ = generator.generate(prompts, max_new_tokens=24, stop_tokens=[(90, 91, 92, 93, 94, stop), (), ()])
    assert found[0].tokens == free[0].tokens[: where + 1]
    assert found[0].finish_reason == "stop"
    assert found[1:] == free[1:]
    first, timings = generator.generate([prompt(33)], max_new_tokens=24, stop_tokens=[free[0].tokens[0]])
    assert first[0].tokens == free[0].tokens[:1]
    assert first[0].finish_reason == "stop"
    assert timings.tpot == timings.tokens_per_second == 0
    last, _ = generator.generate([prompt(33)], max_new_tokens=where + 1, stop_tokens=[stop])
    assert last[0].finish_reason == "stop"  # a stop at the limit is a stop


def test_a_caller_can_stop_a_sequence():
    run = Generator(tiny_decoder("cohere2"), steps_per_dispatch=5).start(
        [prompt(4), prompt(5), prompt(6)], max_new_tokens=30
    )
    for new in run:
        if len(new[0]) > 1:
            run.stop(0)
    assert [g.finish_reason for g in run.generations] == ["stop", "length", "length"]
    assert [len(g.tokens) for g in run.generations] == [6, 30, 30]


def test_one_new_token():
    found, timings = Generator(tiny_decoder("llama")).generate([prompt(40)], max_new_tokens=1)
    assert found[0].tokens == by_recomputation(tiny_decoder("llama"), prompt(40), 1)
    assert timings.new_tokens == 1


def test_generation_ends_at_the_context():
    decoder = tiny_decoder("cohere2")
    prompts = [prompt(CONTEXT - 1), prompt(CONTEXT - 9), prompt(10)]
    found, _ = Generator(decoder).generate(prompts, max_new_tokens=20)
    assert [len(g.tokens) for g in found] == [1, 9, 20]
    assert [g.finish_reason for g in found] == ["length"] * 3
    whole = whole_logits(decoder, prompts[1] + list(found[1].tokens))
    np.testing.assert_array_equal(jnp.argmax(whole[CONTEXT - 10 : -1], axis=-1), found[1].tokens)


def test_a_smaller_context_can_be_asked_for():
    generator = Generator(tiny_decoder("llama"), max_context=20)
    assert [len(g.tokens) for g in generator.generate([prompt(15), prompt(2)])[0]] == [5, 18]
    with pytest.raises(W4A8Error, match=r"^prompt 0: has 20 tokens, but the context of 20 tokens takes 19 and one"):
        generator.generate([prompt(20)])


def test_an_empty_prompt_is_the_bos_token():
    generator = Generator(tiny_decoder("llama"))
    assert generator.generate([[]], max_new_tokens=40)[0] == generator.generate([[1]], max_new_tokens=40)[0]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: expected at least one, found none"),
        ([[5], [3] * 128], {}, "prompt 1: has 128 tokens, but the context of 128 tokens takes 127 and one to generate; "
         "shorten it"),
        ([[5, 97]], {}, "prompt 0: token 1 has id 97, but the model's vocabulary is 0 .. 96; tokenizer and model may "
         "not belong together"),
        ([[-1]], {}, "prompt 0: token 0 has id -1, but the model's vocabulary is 0 .. 96; tokenizer and model may not "
         "belong together"),
        ([[5.0]], {}, "prompt 0: expected a list of token ids, found float64[1]"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ([[5]], {"sampling": [SamplingParams()] * 2}, "sampling: expected one or 1, as many as prompts, found 2"),
        ([[5]], {"stop_tokens": [[1], [2]]}, "stop_tokens: expected one list for all or 1, as many as "
         "prompts, found 2"),
    ],
)  # fmt: skip
def test_bad_requests(prompts, options, message):
    with pytest.raises(W4A8Error) as e:
        Generator(tiny_decoder("llama")).generate(prompts, **options)
    assert str(e.value) == message


def test_bad_generators():
    decoder = tiny_decoder("llama")
    with pytest.raises(W4A8Error, match=r"^max_context: expected 2 \.\. 128, the model's own, found 129$"):
        Generator(decoder, max_context=129)
    with pytest.raises(W4A8Error, match=r"^chunk: expected a power of two of at least 16, found 100$"):
        Generator(decoder, chunk=100)
    with pytest.raises(W4A8Error, match=r"^steps_per_dispatch: expected at least 1, found 0$"):
        Generator(decoder, steps_per_dispatch=0)
    with pytest.raises(W4A8Error, match=r"^prompt 0: is empty, and the model has no bos token"):
        Generator(tiny_decoder("llama", bos_token_id=None)).generate([[]])


def test_nan_logits_are_an_error():
    decoder = tiny_decoder.__wrapped__("llama")
    decoder.final_norm.weight.set_value(decoder.final_norm.weight.get_value().at[0].set(jnp.nan))
    with pytest.raises(W4A8Error, match=r"^prompt 0: the logits after 0 new tokens are NaN"):
        Generator(decoder).generate([prompt(4)])


def test_chunks_shrink_where_scores_would_be_large():
    config = tiny_decoder("llama").config
    assert batching.chunk_size(config, 1, 2048) == 2048
    big = dataclasses.replace(config, num_heads=96)
    chunk = batching.chunk_size(big, 1, 2048)
    assert 4 * 96 * chunk**2 <= batching.SCORE_BYTES < 4 * 96 * (2 * chunk) ** 2
    assert batching.chunk_size(big, 10**6, 2048) == 32


def test_buckets():
    assert [batching.bucket(n, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]


@pytest.mark.parametrize("family", ["cohere2", "llama"])
def test_scores_in_chunks_are_those_of_the_whole(family, monkeypatch):
    decoder = tiny_decoder(family)
    sequences = [prompt(61), prompt(50)[:17]]
    whole = np.zeros((2, 60), np.float32)
    for row, tokens in enumerate(sequences):
        logits = jax.nn.log_softmax(whole_logits(decoder, tokens))
        whole[row, : len(tokens) - 1] = np.asarray(logits)[np.arange(len(tokens) - 1), tokens[1:]]
    for chunk in (2048, 16):
        found = token_logprobs(decoder, sequences, chunk=chunk)
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
        assert (found[1, 16:] == 0).all()
        pieces = list(chunked_logits(decoder, sequences, chunk=chunk))
        assert [start for start, _ in pieces] == list(range(0, 61, 16 if chunk == 16 else 64))
        logits = np.concatenate([piece for _, piece in pieces], axis=1)
        assert logits.shape == (2, 61, VOCAB)
        np.testing.assert_allclose(logits[0], whole_logits(decoder, sequences[0]), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr("models.scoring.LOGIT_BYTES", 4 * 2 * VOCAB * 24)  # 16 positions at once
    np.testing.assert_allclose(token_logprobs(decoder, sequences), whole, rtol=1e-4, atol=1e-5)
    assert [piece.shape[1] for _, piece in chunked_logits(decoder, sequences)] == [16, 16, 16, 13]


def test_a_sequence_of_one_chunk_exactly():
    decoder = tiny_decoder("llama")
    tokens = [prompt(17)]
    np.testing.assert_allclose(
        token_logprobs(decoder, tokens, chunk=16), token_logprobs(decoder, tokens), rtol=1e-4, atol=1e-5
    )
    assert token_logprobs(decoder, [prompt(16)], chunk=16).shape == (1, 15)
    assert token_logprobs(decoder, [prompt(1)]).shape == (1, 0)
