"""A tiny kernel with faults that compile: what the audit is there to find."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F8 = jnp.float8_e4m3fn


def kernel(fault: str) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """`out[block] = sum over steps of (w[block] ^ 128) @ x.T` with w through registers; `fault` is one of

    - "none": two row blocks in turn, one wgmma always in flight;
    - "race": one row block, so that weights are written to registers that the wgmma in flight reads;
    - "no overlap": each wgmma is waited for;
    - "registers": accumulators that do not fit, which ptxas spills, and serializes for.
    """
    blocks = 1 if fault == "race" else 2
    tokens = 256 if fault == "registers" else 8
    pending = 0 if fault == "no overlap" else 1

    def body(steps_gmem: Any, w_gmem: Any, x_gmem: Any, out_gmem: Any, w_smem: Any, x_smem: Any, loaded: Any) -> None:
        steps = steps_gmem[0]  # not known to the compiler, which would unroll the loop
        plgpu.copy_gmem_to_smem(w_gmem, w_smem, loaded)
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, loaded)
        plgpu.barrier_wait(loaded)

        def accumulate(*accumulators: Any) -> list[jax.Array]:
            @pl.loop(0, steps)
            def _(k: Any) -> None:
                for block, accumulator in enumerate(accumulators):
                    w = plgpu.load(w_smem.at[lax.rem(k, 4), block], layout=plgpu.Layout.WGMMA_8BIT)
                    plgpu.wgmma(accumulator, lax.bitcast_convert_type(w ^ jnp.uint8(128), F8), x_smem.T)
                    plgpu.wgmma_wait(pending)

            plgpu.wgmma_wait(0)
            return [accumulator[...] for accumulator in accumulators]

        for block, result in enumerate(pl.run_scoped(accumulate, *[plgpu.ACC((64, tokens))] * blocks)):
            out_gmem[block] = result

    shape = jax.ShapeDtypeStruct
    call = plgpu.kernel(
        body,
        out_type=shape((blocks, 64, tokens), jnp.float32),
        grid=(1,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types={
            "w_smem": plgpu.SMEM((4, blocks, 64, 128), jnp.uint8),
            "x_smem": plgpu.SMEM(
                (tokens, 128), F8, transforms=(plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
            ),
            "loaded": plgpu.Barrier(num_arrivals=2),
        },
    )
    return call, (shape((1,), jnp.int32), shape((4, blocks, 64, 128), jnp.uint8), shape((tokens, 128), F8))
