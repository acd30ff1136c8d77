"""LanguageModel: text in, text out; stop strings, streaming, chat, defaults of generation_config.json."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_tokenizer import write_tokenizer

from models.decoder import Decoder
from models.families import decoder_config
from models.sampling import SamplingParams
from pallas_kernels.errors import W4A8Error
from w4a8jax.language_model import GenerationResult, LanguageModel
from w4a8jax.tokenizer import Tokenizer

# Slots of the cache stay in one bucket of 64, so that few programs are compiled.
NEW = 40
FREE = SamplingParams(temperature=1.0, seed=3)
# Equal seeds draw with equal noise, and from this random model nearly equal texts. None of these meets EOS in NEW.
THREE = [FREE, SamplingParams(temperature=1.0, seed=5), SamplingParams(temperature=1.0, seed=6)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_directory(write_tokenizer(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Decoder(decoder_config(config), dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model(decoder, tokenizer) -> LanguageModel:
    return LanguageModel(decoder, tokenizer, name="toy", scheme="bf16")


@pytest.fixture(scope="module")
def free(model) -> GenerationResult:
    return model.generate("The dog", max_new_tokens=NEW, sampling=FREE)


def test_a_result(model, tokenizer, free):
    assert free.text == tokenizer.decode(free.tokens)
    assert (len(free.tokens), free.finish_reason, free.seed) == (NEW, "length", 3)
    assert free.prompt_tokens == len(tokenizer.encode("The dog"))
    assert free.timings.new_tokens == NEW
    again = model.generate(tokenizer.encode("The dog"), max_new_tokens=NEW, sampling=FREE)
    assert (again.text, again.tokens) == (free.text, free.tokens)


def test_lists_are_batches(model, free):
    prompts = ["The dog", "for i in", "def"]
    results = model.generate(prompts, max_new_tokens=NEW, sampling=THREE)
    assert results[0].tokens == free.tokens
    ids = [model.tokenizer.encode(p) for p in prompts]
    assert [r.tokens for r in model.generate(ids, max_new_tokens=NEW, sampling=THREE)] == [r.tokens for r in results]
    assert len(model.generate(["The dog"], max_new_tokens=NEW)) == 1


def test_stop_strings_cut_the_text_and_end_the_tokens(model, tokenizer, free):
    characters = free.text
    for start, length in ((5, 1), (9, 2), (20, 4), (30, 7)):
        stop = characters[start : start + length]
        pieces: list[str] = []
        result = model.generate(
            "The dog", max_new_tokens=NEW, sampling=FREE, stop=["no such text", stop], stream=pieces.append
        )
        assert result.finish_reason == "stop"
        assert result.text == characters[: characters.index(stop)] == "".join(pieces)
        count = len(result.tokens)
        assert result.tokens == free.tokens[:count]
        assert stop in tokenizer.decode(result.tokens)
        assert stop not in tokenizer.decode(result.tokens[:-1])


def test_stop_strings_end_their_sequence_alone(model, free):
    prompts = ["The dog", "for i in", "def"]
    whole = model.generate(prompts, max_new_tokens=NEW, sampling=THREE)
    assert [r.finish_reason for r in whole] == ["length"] * 3
    ends = (free.text[n : n + 3] for n in range(3, 30))
    stop = next(text for text in ends if text not in whole[1].text and text not in whole[2].text)
    found = model.generate(prompts, max_new_tokens=NEW, sampling=THREE, stop=stop)
    assert found[0].text == free.text[: free.text.index(stop)]
    assert [r.finish_reason for r in found] == ["stop", "length", "length"]
    assert [r.text for r in found[1:]] == [r.text for r in whole[1:]]


def test_the_beginning_of_a_stop_string_is_written_in_the_end(model, free):
    pieces: list[str] = []
    stop = free.text[-2:] + "\0"
    result = model.generate("The dog", max_new_tokens=NEW, sampling=FREE, stop=stop, stream=pieces.append)
    assert result.text == "".join(pieces) == free.text
    assert pieces[-1] == free.text[-2:]


def test_stop_tokens_leave_no_text(model, tokenizer, free):
    at = next(i for i in range(8, NEW) if free.tokens[i] not in free.tokens[:i])
    result = model.generate("The dog", max_new_tokens=NEW, sampling=FREE, stop=[free.tokens[at]])
    assert result.finish_reason == "stop"
    assert result.tokens == free.tokens[: at + 1]
    assert result.text == tokenizer.decode(free.tokens[:at])


def test_streaming_prints(model, free, capsys):
    result = model.generate("The dog", max_new_tokens=NEW, sampling=FREE, stream=True)
    assert capsys.readouterr().out == result.text + "\n" == free.text + "\n"


def test_chat(model, tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    result = model.chat(messages, max_new_tokens=NEW, sampling=FREE)
    ids = tokenizer.encode("<bos><|user|>Hi<|end|>\n<|model|>", add_special_tokens=False)
    assert result.tokens == model.generate(ids, max_new_tokens=NEW, sampling=FREE).tokens
    assert result.prompt_tokens == len(ids)
    with pytest.raises(W4A8Error, match=r"^chat template: unknown role robot$"):
        model.chat([{"role": "robot", "content": "Hi"}])


def test_logits(model, decoder):
    tokens = np.random.default_rng(0).integers(0, 320, (2, 20))
    whole, _ = decoder(jnp.asarray(tokens))
    np.testing.assert_allclose(model.logits(tokens), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.logits(tokens[1].tolist()), whole[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(W4A8Error, match=r"^tokens: expected ids \[T\] or \[B, T\], found shape \[\]$"):
        model.logits(3)


def test_stop_token_ids(decoder, tokenizer):
    def ids(decoder, tokenizer, **config):
        return LanguageModel(decoder, tokenizer, generation_config=config).stop_token_ids

    assert ids(decoder, tokenizer) == (2,)
    assert ids(decoder, tokenizer, eos_token_id=5) == (5,)
    assert ids(decoder, tokenizer, eos_token_id=[5, 7]) == (5, 7)
    assert ids(decoder, tokenizer, eos_token_id=None) == (2,)
    with pytest.raises(W4A8Error, match=r"^model: generation_config.json: eos_token_id: expected ids, found 'x'$"):
        ids(decoder, tokenizer, eos_token_id="x")


def test_default_sampling(decoder, tokenizer, model):
    def sampling(**config):
        return LanguageModel(decoder, tokenizer, generation_config=config).default_sampling

    assert model.default_sampling == sampling(temperature=0.5) == SamplingParams()
    assert sampling(do_sample=True) == SamplingParams(temperature=1.0)
    options = {"do_sample": True, "temperature": 0.3, "top_k": 4, "top_p": 0.8}
    assert sampling(**options) == SamplingParams(temperature=0.3, top_k=4, top_p=0.8)
    assert sampling(do_sample=True, top_k=None, top_p=None) == SamplingParams(temperature=1.0)
    with pytest.raises(W4A8Error, match=r"^generation_config.json: top_p: expected a number above 0"):
        sampling(do_sample=True, top_p=3)
    sampled = LanguageModel(decoder, tokenizer, generation_config={"do_sample": True})
    results = sampled.generate(["a", "a", "a"], max_new_tokens=NEW)
    assert len({r.tokens for r in results}) == 3


def test_without_a_tokenizer(decoder, free, tokenizer):
    model = LanguageModel(decoder, name="some/path")
    result = model.generate(tokenizer.encode("The dog"), max_new_tokens=NEW, sampling=FREE)
    assert (result.tokens, result.text) == (free.tokens, "")
    message = r"^some/path: has no tokenizer; put its tokenizer.json there, or give token ids$"
    for call in (
        lambda: model.generate("text"),
        lambda: model.chat([{"role": "user", "content": "Hi"}]),
        lambda: model.generate([1], stop="text"),
    ):
        with pytest.raises(W4A8Error, match=message):
            call()


def test_bad_requests(model):
    with pytest.raises(W4A8Error, match=r"^prompt 0: has \d+ tokens, but the context of 64 tokens takes 63 and one"):
        model.generate("x" * 100)
    with pytest.raises(W4A8Error, match=r"^stream: expected one prompt, found 2$"):
        model.generate(["a", "b"], stream=True)
    with pytest.raises(W4A8Error, match=r"^stop: expected texts that are not empty and token ids, found \['a', ''\]$"):
        model.generate("a", stop=["a", ""])
    with pytest.raises(W4A8Error, match=r"^max_new_tokens: expected at least 1, found 0$"):
        model.generate("a", max_new_tokens=0)


def test_repr(model):
    assert repr(model) == "LanguageModel('toy', bf16, 1 layers, hidden 64, vocabulary 320, context 64)"
