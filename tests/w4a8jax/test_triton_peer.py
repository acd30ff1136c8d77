"""The Triton baseline: where it is missing, how it cuts products, its compiled kernel, and on a GPU its results."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import W4A8Error, W4Weight, pack_codes, reference, tuning
from w4a8jax.benchmark import gemm, kernels, operands, triton_peer
from w4a8jax.benchmark.triton_peer import BLOCKS, Blocks

ABSENT = triton_peer.unavailable()


def pretend(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Makes it look as if packages but these were installed."""
    found = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        return (None if name in missing else name) if name in ("triton", "jax_triton") else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize(("module", "package"), [("triton", "triton"), ("jax_triton", "jax-triton")])
def test_it_is_absent_with_a_reason(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    pretend(monkeypatch, module)
    reason = triton_peer.unavailable()
    assert reason == f"triton w4a16: needs {package}, which is not installed; w4a8jax[triton] has it"
    there = gemm.kernels_for(None)
    assert triton_peer.NAME not in [k.name for k in there]
    with pytest.raises(W4A8Error, match=rf"kernel 'triton': there is none.*; triton w4a16: needs {package}"):
        kernels.selected(there, ["triton"], [reason])
    with pytest.raises(W4A8Error, match=f"needs {package}"):
        triton_peer.matmul(*arguments(1, 128, 128))


def test_it_is_there_once_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    (kernel,) = kernels.selected(gemm.kernels_for(None), ["triton"])
    assert (kernel.name, kernel.reference, kernel.weight_bytes) == ("triton w4a16", "w4a16", 0.515625)
    weights = operands.Weights(128, 256)
    packed, scale = kernel.weight(weights, 0)
    w, checkpoint_scale = weights.quantized(0)
    np.testing.assert_array_equal(packed, w.packed)
    np.testing.assert_array_equal(scale, checkpoint_scale.T)
    assert kernel.config(16, 4096, 14336) == {"m": 16, "n": 64, "warps": 4, "stages": 6, "resident": 4, "splits": 8}


def test_blocks_by_tokens() -> None:
    assert [triton_peer.choose(m).m for m in (1, 16, 17, 64, 65, 128, 129, 16384)] == [
        16,
        16,
        64,
        64,
        128,
        128,
        256,
        256,
    ]


@pytest.mark.parametrize(
    ("m", "n", "k", "wanted"),
    [
        (1, 12288, 12288, 2),  # 192 programs of the 528 that run at once
        (1, 73728, 12288, 1),  # 1152
        (1, 4096, 4096, 8),  # 64
        (1, 128, 384, 1),  # three groups have no half
        (64, 4096, 14336, 8),  # 32 of 264
        (128, 4096, 14336, 4),  # 32 of 132
        (4096, 4096, 14336, 1),
    ],
)
def test_splits_by_hand(m: int, n: int, k: int, wanted: int) -> None:
    assert triton_peer.splits(m, n, k, triton_peer.choose(m)) == wanted


def arguments(m: int, n: int, k: int) -> list[Any]:
    return [jnp.zeros((m, k), jnp.bfloat16), jnp.zeros((n, k // 8), jnp.int32), jnp.zeros((k // 128, n), jnp.bfloat16)]


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, jnp.zeros((2, 256)), r"x: expected bf16 \[M, K\], K a multiple of 128, found float32\[2, 256\]"),
        (0, jnp.zeros((2, 192), jnp.bfloat16), r"x: .*found bfloat16\[2, 192\]"),
        (0, jnp.zeros((0, 256), jnp.bfloat16), r"x: .*found bfloat16\[0, 256\]"),
        (0, jnp.zeros(256, jnp.bfloat16), r"x: .*found bfloat16\[256\]"),
        (1, jnp.zeros((64, 16), jnp.int32), r"packed: expected int32\[64, 32\], found int32\[64, 16\]"),
        (1, jnp.zeros((64, 32), jnp.uint32), r"packed: expected int32\[64, 32\], found uint32\[64, 32\]"),
        (2, jnp.zeros((64, 2), jnp.bfloat16), r"scale: expected bfloat16\[2, 64\], found bfloat16\[64, 2\]"),
        (2, jnp.zeros((2, 64)), r"scale: expected bfloat16\[2, 64\], found float32\[2, 64\]"),
        (0, jax.ShapeDtypeStruct((2**23, 256), jnp.bfloat16), "M 8388608, N 64, K 256: too large"),
    ],
)
def test_wrong_arguments(position: int, wrong: Any, message: str) -> None:
    given = arguments(2, 64, 256)
    given[position] = wrong
    with pytest.raises(W4A8Error, match=message):
        triton_peer.matmul(*given)


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: str(b.m))
def test_compiled_for_hopper(blocks: Blocks) -> None:
    """Needs no GPU: the tensor core's own instruction, copies ahead, and as many programs as are counted on."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from w4a8jax.benchmark.triton_w4a16 import w4a16_kernel

    constants = {"N": 4096, "K": 4096, "SPLIT_GROUPS": 16, "BLOCK_M": blocks.m, "BLOCK_N": blocks.n}
    types = {"x": "*bf16", "words": "*i32", "scale": "*bf16", "M": "i32", "out": "*fp32"}
    # As jax-triton has it: arrays are aligned to 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
    source = ASTSource(w4a16_kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert f"wgmma.mma_async.sync.aligned.m64n{blocks.m}k16.f32.bf16.bf16" in compiled.asm["ptx"]
    assert compiled.asm["ptx"].count("cp.async.cg.shared.global") >= 3
    # 228 KiB of a multiprocessor, of which each program takes 1 KiB more than its own.
    assert (compiled.metadata.shared + 1024) * blocks.resident <= 228 * 1024


def test_lowered_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs JAX's CUDA plugin, but no GPU."""
    pytest.importorskip("jax_triton", reason="jax-triton, or JAX's CUDA plugin, is not installed", exc_type=ImportError)
    from jax_triton import triton_lib

    monkeypatch.setattr(triton_lib.triton_kernel_call_lib, "get_compute_capability", lambda device: 90)
    for m, dtype in ((3, "8x3x4096xf32"), (4096, "1x4096x4096xbf16")):
        shapes = jax.eval_shape(lambda m=m: arguments(m, 4096, 4096))
        text = jax.jit(triton_peer.matmul).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@triton_kernel_call(") == 1
        assert f"-> tensor<{dtype}>" in text


@pytest.mark.gpu
@pytest.mark.skipif(not tuning.hopper(), reason="no Hopper GPU")
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
class TestOnGpu:
    @pytest.mark.parametrize(
        ("m", "n", "k"),
        [(1, 4096, 4096), (5, 200, 384), (16, 128, 512), (33, 136, 256), (64, 4096, 2048), (100, 256, 1024),
         (300, 130, 256), (1000, 384, 512), (2048, 2048, 2048)],
    )  # fmt: skip
    def test_products(self, m: int, n: int, k: int) -> None:
        x, w, scale = weight(m, n, k)
        found, again = (np.asarray(jax.jit(triton_peer.matmul)(x, w.packed, scale), np.float64) for _ in "12")
        np.testing.assert_array_equal(found, again)
        wanted = np.asarray(reference.matmul_w4a16(x, w), np.float64)
        # The rounding of the result to bf16 alone is 1.7e-3.
        assert np.linalg.norm(found - wanted) < 2e-3 * np.linalg.norm(wanted)

    @pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: str(b.m))
    def test_operands_are_the_references_bits(self, blocks: Blocks) -> None:
        _, w, scale = weight(1, 192, 512)
        found = triton_peer.matmul(jnp.eye(512, dtype=jnp.bfloat16), w.packed, scale, blocks)
        np.testing.assert_array_equal(found.T.astype(jnp.float32), w.operand().astype(jnp.bfloat16).astype(jnp.float32))


def weight(m: int, n: int, k: int) -> tuple[Any, W4Weight, Any]:
    """Random tokens bf16 [M, K], a weight of all codes in "exact" numerics, its scales [K/128, N]."""
    rng = np.random.default_rng(m)
    codes, scale = rng.integers(-8, 8, (n, k)), jnp.asarray(rng.uniform(0.01, 0.04, (n, k // 128)), jnp.bfloat16)
    w = W4Weight.from_checkpoint(pack_codes(jnp.asarray(codes)), scale, numerics="exact")
    return jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16), w, w.group_scale.T
