"""What the benchmark multiplies, and how it is encoded for vLLM."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import W4A8Error, pack_codes, w4a8_matmul
from w4a8jax.benchmark import moe_marlin, moe_operands, moe_peers, operands, peers
from w4a8jax.benchmark.moe_points import MODELS, Point


class TestOperands:
    def test_weights_are_the_same_each_time(self) -> None:
        w = operands.Weights(64, 256)
        (a, scale), (b, _), (c, _) = w.quantized(0), w.quantized(0), w.quantized(1)
        assert jnp.array_equal(a.packed, b.packed)
        assert not jnp.array_equal(a.packed, c.packed)
        assert scale.shape == (64, 2)
        assert scale.dtype == jnp.bfloat16

    @pytest.mark.parametrize("code_min", [-7, -8])
    def test_codes(self, code_min: int) -> None:
        codes = np.asarray(operands.Weights(256, 512, code_min).quantized(0)[0].codes)
        assert codes.min() == code_min
        assert codes.max() == 7
        share = np.bincount(codes.ravel() + 8, minlength=16) / codes.size
        assert share[1:8] == pytest.approx(1 / 16, rel=0.1)
        assert share[8] == pytest.approx(2 / 16 if code_min == -7 else 1 / 16, rel=0.1)

    @pytest.mark.parametrize("m", [3, 300])
    def test_expected_is_the_ops_product(self, m: int) -> None:
        weights, tokens = operands.Weights(128, 256), operands.Tokens(operands.Activations(256, m), m, 1)
        rows, columns = operands.sample_indices(m, 128)
        assert rows[-1] == m - 1
        assert len(columns) <= 64
        w, scale = weights.quantized(0)
        found = np.asarray(w4a8_matmul(tokens.bf16[0], w, out_dtype=jnp.float32))[rows][:, columns]
        wanted = operands.expected("w4a8", weights, tokens, rows, columns)
        assert operands.relative_error(found, wanted) < 1e-5
        plain = np.asarray(w.codes, np.float64) * np.repeat(np.asarray(scale, np.float64), 128, axis=1)
        product = (np.asarray(tokens.bf16[0], np.float64) @ plain.T)[rows][:, columns]
        assert operands.relative_error(operands.expected("w4a16", weights, tokens, rows, columns), product) < 1e-12
        exact, _ = weights.quantized(0, "exact")
        found = np.asarray(w4a8_matmul(tokens.bf16[0], exact, out_dtype=jnp.float32))[rows][:, columns]
        assert operands.relative_error(found, operands.expected("exact", weights, tokens, rows, columns)) < 1e-5

    def test_errors(self) -> None:
        assert operands.relative_error(np.array([[3.0, 4.0]]), np.array([[3.0, 0.0]])) == pytest.approx(4 / 3)
        assert operands.relative_error(np.array([np.nan]), np.array([1.0])) == math.inf


class TestPeers:
    """What needs no torch: how weights are encoded for vLLM."""

    def test_words_in_twos_complement(self) -> None:
        codes = jnp.asarray([[-8, -7, -1, 0, 1, 2, 6, 7]])
        word = int(np.asarray(peers.signed_words(pack_codes(codes))).view(np.uint32)[0, 0])
        assert [(word >> 4 * i & 15) for i in range(8)] == [c % 16 for c in codes[0].tolist()]

    def test_marlin_scales(self) -> None:
        # vLLM's marlin_permute_scales: columns of each 64 taken in this order.
        order = [i + 8 * j for i in range(8) for j in range(8)]
        scale = np.arange(3 * 128).reshape(3, 128)
        wanted = scale.reshape(-1, 64)[:, order].reshape(3, 128)
        np.testing.assert_array_equal(peers.marlin_scales(jnp.asarray(scale)), wanted)
        experts = jnp.asarray(np.stack([scale, 2 * scale]))
        np.testing.assert_array_equal(peers.marlin_scales(experts), np.stack([wanted, 2 * wanted]))

    def test_experts_that_vllm_would_reorder_wrongly(self) -> None:
        kernel = moe_peers.VllmW4A8Experts("vllm cutlass w4a8", "w4a8", 0.5 + 1 / 128, 1)
        with pytest.raises(W4A8Error, match="K 384 wrongly: K must be a multiple of 256"):
            kernel.weight([moe_operands.ExpertWeights(2, 128, 384)], 0)

    @pytest.mark.parametrize(("tokens", "size"), [(1, 8), (64, 8), (128, 16), (1024, 64), (16384, 64)])
    def test_marlin_blocks(self, tokens: int, size: int) -> None:
        # vLLM's choice: the first size of which an expert's rows fill less than 0.9.
        assert moe_marlin.block_size(Point(MODELS["qwen3-30b-a3b"], "down", tokens, "uniform")) == size

    def test_uint4b8(self) -> None:
        assert peers.UINT4B8 == 1125899907892224

    def test_vllm_folder_without_libraries(self, tmp_path: Path) -> None:
        message = "has no _C_stable" if peers.torch_available() else "needs torch"
        with pytest.raises(W4A8Error, match=message):
            peers.vllm_kernels(tmp_path)
