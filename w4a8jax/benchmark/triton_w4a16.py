"""W4A16 as one would write it in plain Triton. Importing this needs triton; `triton_peer` calls it.

Programs make tiles of the product transposed: the tensor core then takes weights from the registers in which they are
dequantized, and few tokens are few columns of its tile, which has 64 rows at least.
"""

import triton
import triton.language as tl


@triton.jit
def w4a16_kernel(
    x,
    words,
    scale,
    M,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums one tile [BLOCK_M, BLOCK_N] over the groups of one split; the grid is (tiles, splits).

    Args:
        x: bf16 [M, K].
        words: int32 [N, K/8], as checkpoints have them: code + 8, lowest nibble first.
        scale: bf16 [K/128, N].
        M: tokens. N and K are constants, so that rows are known to be aligned.
        out: bf16 or fp32 [splits, M, N], each split's own sums. After all inputs, since jax-triton passes it last.
        SPLIT_GROUPS: groups of 128 columns in a split.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0), tl.program_id(1)
    # Programs that run together share rows of both operands.
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column, word = tl.arange(0, 128), tl.arange(0, 16)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(split * SPLIT_GROUPS, (split + 1) * SPLIT_GROUPS):
        tokens = tl.load(x + m[None, :] * K + group * 128 + column[:, None], mask=m[None, :] < M, other=0.0)
        packed = tl.load(words + n[:, None] * (K // 8) + group * 16 + word[None, :], mask=n[:, None] < N, other=0)
        scales = tl.load(scale + group * N + n, mask=n < N, other=0.0)
        # A word's nibbles stay in one thread, in their order: shifts of 0, 4, ..., 28 along three axes of two.
        shifted = tl.join(packed, packed >> 16)
        shifted = tl.join(shifted, shifted >> 8)
        shifted = tl.join(shifted, shifted >> 4)
        nibbles = tl.reshape(shifted, (BLOCK_N, 128)) & 15
        # 0x4300 is 128 in bf16, whose lowest bit counts 1 there: cheaper than a conversion, and exact.
        codes = (nibbles | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0
        # The product is rounded to bf16 once, as the reference's is.
        sums = tl.dot(codes * scales[:, None], tokens, sums)
    out += split * M * N + m[None, :] * N + n[:, None]
    tl.store(out, sums.to(out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))
