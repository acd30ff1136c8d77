"""Errors of the residual stream: of the real layers' outputs, each token's own ratio, padding left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_checkpoint import text_checkpoint

import w4a8jax
from models.functional import split
from models.residual import residual_stream
from w4a8jax.residual_errors import residual_errors

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("residual")
    source = text_checkpoint(folder / "source")
    w4a8jax.quantize(source, folder / "model", search="none", progress=False)
    return tuple(w4a8jax.load(path, kernels=False, dtype="float32") for path in (folder / "model", source))


def _run(model):
    """The stream behind each layer, what the final norm makes of the last, and the decoder's own states."""
    structure, leaves = split(model.decoder)
    tokens = jnp.asarray([model.tokenizer.encode(TEXT)], jnp.int32)

    @jax.jit
    def run(leaves):
        decoder = structure.merge(leaves)
        hidden, _ = decoder.hidden_states(tokens)
        stream = residual_stream(decoder, tokens, jnp.array([tokens.shape[1]]))
        return stream, decoder.final_norm(stream[-1]), hidden

    return run(leaves)


def test_errors_are_those_of_numpy(pair):
    model, original = pair
    (ours, last, hidden), (theirs, _, _) = _run(model), _run(original)
    assert len(ours) == model.decoder.config.num_layers
    np.testing.assert_allclose(last, hidden, rtol=1e-5, atol=1e-5)
    expected = []
    for pair_of_layer in zip(ours, theirs, strict=True):
        a, b = (np.asarray(x, np.float64)[0, :-1] for x in pair_of_layer)  # the last token predicts nothing
        expected.append(np.mean(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))
    found = residual_errors(model, original, TEXT)  # padded to a window
    # Where fp32 sums fall otherwise, FP8 activations may round to a neighbour.
    np.testing.assert_allclose(found, expected, rtol=5e-3)
    assert min(found) > 0.01
    assert residual_errors(original, original, TEXT) == (0.0,) * len(found)


def test_models_of_other_shapes(pair):
    other = w4a8jax.load(w4a8jax.reference_model("dense"))
    with pytest.raises(w4a8jax.W4A8Error, match="cannot compare: num_layers is 2 in the model, 4 in its original"):
        residual_errors(pair[0], other, TEXT)
