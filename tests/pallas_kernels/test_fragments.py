"""The kernels' layout, decoded as each thread of the warpgroup decodes it, instruction by instruction."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_weights import random_checkpoint, weight_of

from pallas_kernels import W4A8Error, W4Weight, prepare_weight, register_dequantize, tuning
from pallas_kernels.fragments import FragmentWeight
from pallas_kernels.rounding import round_to


def prmt(low: int, high: int, selector: int) -> int:
    """PTX's `prmt.b32` in its default mode: bit 3 of a selector replicates the byte's sign."""
    source = (high << 32) | low
    result = 0
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = (source >> (8 * (nibble & 7))) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << (8 * i)
    return result


def decode_sign_magnitude(word: int, tables: list[int]) -> list[int]:
    index = word & 0x77777777
    first = prmt(tables[0], tables[1], index & 0xFFFF) ^ (word & 0x80808080)
    second = prmt(tables[2], tables[3], index >> 16) ^ ((word << 4) & 0x80808080)
    return [first, second]


def decode_two_tables(word: int, tables: list[int]) -> list[int]:
    results = []
    for low, high, half in ((*tables[:2], word & 0xFFFF), (*tables[2:], word >> 16)):
        s = prmt((low & 0xFFFFFF00) ^ high, low ^ high, half)
        results.append(s ^ prmt(high, high ^ 0x80808080, half & 0x7777))
    return results


def table_of(scale: np.uint8, code_min: int) -> list[int]:
    """As `build_tables`: exact products in fp16, rounded once to e4m3, saturating."""
    s = np.uint8(scale).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    codes = np.array([0 if code_min == -7 else 8, 1, 2, 3, 4, 5, 6, 7], np.float16)
    levels = np.clip(s * codes, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return [int(word) for word in levels.view(np.uint32)]


def decode_subnormal(word: int, code_min: int) -> list[int]:
    rotated = (word << 4 | word >> 28) & 0xFFFFFFFF
    if code_min == -7:
        return [word & 0x87878787, rotated & 0x87878787]
    return [((w & 0x80808080) >> 7) + (w & 0x87878787) for w in (word, rotated)]


@pytest.mark.parametrize("code_min", [-7, -8])
def test_threads_find_exact_codes(code_min: int) -> None:
    codes, scale = random_checkpoint(4, 64, 128, code_min=code_min)
    w = weight_of(codes, scale, numerics="exact", code_min=code_min)
    f = FragmentWeight.from_weight(w)
    np.testing.assert_array_equal(np.asarray(f.scales)[0, 0] / 512, np.asarray(scale, np.float32)[:, 0])
    flat = np.asarray(f.words)[0, 0].astype(object).reshape(2, 128, 4)
    codes = np.asarray(w.codes)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for c in range(8):
            for half, bytes_ in enumerate(decode_subnormal(flat[c // 4, thread, c % 4], code_min)):
                row, column = 16 * warp + lane // 4 + 8 * half, 16 * c + 4 * (lane % 4)
                found = np.frombuffer(int(bytes_).to_bytes(4, "little"), ml_dtypes.float8_e4m3fn)
                np.testing.assert_array_equal(512 * found.astype(np.float32), codes[row, column : column + 4])


@pytest.mark.parametrize(("code_min", "scales"), [(-7, "plain"), (-8, "plain"), (-7, "signed"), (-8, "minus zero")])
def test_threads_find_their_operands(code_min: int, scales: str) -> None:
    w = weight_of(*random_checkpoint(3, 128, 256, code_min=code_min), code_min=code_min)
    if scales != "plain":
        # Every third scale negative, or each zero of either sign.
        some = jnp.arange(w.group_scale.size).reshape(w.group_scale.shape) % 3 == 0
        signed = jnp.where(some, -w.group_scale.astype(jnp.float32), w.group_scale.astype(jnp.float32))
        group_scale = (signed if scales == "signed" else 0 * signed).astype(jnp.float8_e4m3fn)
        assert np.signbit(np.asarray(group_scale, np.float32)).any()
        w = dataclasses.replace(w, group_scale=group_scale)
    f = FragmentWeight.from_weight(w)
    decode = {-7: decode_sign_magnitude, -8: decode_two_tables}[code_min]
    words, scales = np.asarray(f.words).astype(object), np.asarray(f.scales)
    expected = np.asarray(w.operand()).view(np.uint8)
    for tile in range(2):
        for group in range(2):
            flat = words[tile, group].reshape(2, 128, 4)  # a thread's two loads of four words
            for thread in range(128):
                warp, lane = divmod(thread, 32)
                pair = scales[tile, group, 16 * warp + 2 * (lane // 4) :][:2]
                table = [word for scale in pair for word in table_of(scale, code_min)]
                for c in range(8):
                    pair = decode(flat[c // 4, thread, c % 4], table)
                    for half, bytes_ in enumerate(pair):
                        row = 64 * tile + 16 * warp + lane // 4 + 8 * half
                        column = 128 * group + 16 * c + 4 * (lane % 4)
                        found = np.frombuffer(int(bytes_).to_bytes(4, "little"), np.uint8)
                        wanted = expected[row, column : column + 4]
                        # A zero may have either sign.
                        np.testing.assert_array_equal(found * (found != 0x80), wanted * (wanted != 0x80))


def on_pairs(operation: np.ufunc) -> Callable[..., np.ndarray]:
    """A bf16x2 instruction: rounds each of two results to bf16."""

    def instruction(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return operation(*(word[:, None].view(ml_dtypes.bfloat16) for word in (a, b))).view(np.uint32)[:, 0]

    return instruction


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    terms = [x & y & z for x in (~a, a) for y in (~b, b) for z in (~c, c)]
    return sum(term for i, term in enumerate(terms) if table[0] >> i & 1)


INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "prmt.b32": np.vectorize(lambda *operands: prmt(*map(int, operands)), otypes=[np.uint32]),
    "add.rn.bf16x2": on_pairs(np.add),
    "mul.rn.bf16x2": on_pairs(np.multiply),
}


def execute(ptx: str, results: int, operands: list[np.ndarray]) -> list[np.ndarray]:
    """What inline PTX of the above instructions computes: uint32 [T] of T threads."""
    registers = {f"${results + i}": operand for i, operand in enumerate(operands)}
    for line in ptx.strip("{} ").split(";")[:-1]:
        name, result, *arguments = line.replace(",", " ").split()
        if name != ".reg":
            values = [registers[a] if a in registers else np.array([int(a, 0)], np.uint32) for a in arguments]
            registers[result] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(results)]


def decode_bf16(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint32 [T], and bf16 [T, 2] of rows r and r + 8 -> bf16 bits [T, 4, 2]: pairs of rows r and r + 8 in turn."""
    rows = execute(register_dequantize._SCALE_PAIRS, 2, [np.ascontiguousarray(scales).view(np.uint32)[:, 0]])
    return np.stack(execute(register_dequantize._WORD["bf16"], 4, [words, *rows]), axis=1)[..., None].view(np.uint16)


@pytest.mark.parametrize("code_min", [-7, -8])
def test_threads_find_bf16_operands(code_min: int) -> None:
    codes, scale = random_checkpoint(5, 128, 256, code_min=code_min)
    w = weight_of(codes, scale, numerics="exact", code_min=code_min)
    f = FragmentWeight.from_weight(w, "w4a16")
    assert (f.form, f.scheme) == ("bf16", "w4a16")
    words, scales = np.asarray(f.words), np.asarray(f.scales)
    expected = np.asarray(round_to(w.operand(), jnp.bfloat16)).view(np.uint16)
    warp, lane = np.divmod(np.arange(128), 32)
    for tile, group in np.ndindex(2, 2):
        flat = words[tile, group].reshape(2, 128, 4)  # a thread's two loads of four words
        pairs = scales[tile, group].reshape(32, 2)[8 * warp + lane // 4]
        for c in range(8):
            found = decode_bf16(flat[c // 4, :, c % 4], pairs)
            for i, e in np.ndindex(4, 2):
                row = 64 * tile + 16 * warp + lane // 4 + 8 * (i % 2)
                column = 128 * group + 16 * c + 8 * (i // 2) + 2 * (lane % 4) + e
                np.testing.assert_array_equal(found[:, i, e], expected[row, column])


@pytest.mark.parametrize("word", [0x76543210, 0xFEDCBA98])
def test_bf16_operands_are_right_for_every_normal_scale(word: int) -> None:
    """All codes with all finite scales that are not subnormal, of either sign."""
    scales = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    magnitude = np.abs(scales.astype(np.float32))
    scales = scales[np.isfinite(magnitude) & ((magnitude >= 2.0**-126) | (magnitude == 0))]
    assert len(scales) == 2 * (254 * 128 + 1)
    found = decode_bf16(np.full(len(scales), word, np.uint32), np.stack([scales, scales], axis=1))
    for i, e in np.ndindex(4, 2):
        code = (word >> 4 * (4 * e + i) & 15) - 8
        with np.errstate(over="ignore"):
            expected = (code * scales.astype(np.float32)).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found[:, i, e], expected.view(np.uint16))


@pytest.mark.parametrize(("numerics", "dtype"), [("lut", jnp.bfloat16), ("exact", jnp.float16), ("exact", jnp.float32)])
def test_w4a16_refuses_scales_that_bf16_cannot_hold(numerics: str, dtype: jnp.dtype) -> None:
    w = W4Weight.from_checkpoint(jnp.zeros((64, 16), jnp.int32), jnp.ones((64, 1), dtype), numerics=numerics)
    with pytest.raises(W4A8Error, match=f"w4a16 takes exact numerics with bf16 scales, found {numerics}"):
        FragmentWeight.from_weight(w, "w4a16")


@pytest.mark.parametrize("value", [-0.5, np.nan])
@pytest.mark.parametrize("experts", [(), (2,)])
def test_scales_that_two_tables_cannot_take(
    experts: tuple[int, ...], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused; `prepare_weight` leaves the weight to the reference. Other forms take any scale."""
    w = weight_of(*random_checkpoint(4, *experts, 128, 256))
    w = dataclasses.replace(w, group_scale=w.group_scale.at[..., 5, 1].set(value))
    exact = weight_of(*random_checkpoint(4, *experts, 128, 256), numerics="exact")
    exact = dataclasses.replace(exact, group_scale=exact.group_scale.at[..., 5, 1].set(value))
    monkeypatch.setattr(tuning, "hopper", lambda: True)
    with pytest.raises(W4A8Error, match=r'with code -8, "lut" numerics take no group scale that is negative or NaN'):
        FragmentWeight.from_weight(w)
    assert prepare_weight(w) is w
    jax.jit(lambda: prepare_weight(w) is w or pytest.fail("prepared"))()
    for other, scheme in ((dataclasses.replace(w, code_min=-7), "w4a8"), (exact, "w4a8"), (exact, "w4a16")):
        assert isinstance(prepare_weight(other, scheme), FragmentWeight)


@pytest.mark.parametrize(("scale", "right"), [(0x38, True), (0xB8, False), (0x80, False)])  # 1, -1, -0
def test_why_two_tables_cannot_take_them(scale: int, right: bool) -> None:
    """Of code 4, whose nibble is 8, the bytes would be wrong; and so with -0, which `from_weight` makes 0."""
    found = int(decode_two_tables(0x88888888, 2 * table_of(np.uint8(scale), -8))[0]).to_bytes(4, "little")
    found, s = (np.frombuffer(b, ml_dtypes.float8_e4m3fn).astype(np.float32) for b in (found, bytes([scale])))
    assert np.array_equal(found, np.repeat(4 * s, 4)) == right


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [((64, 256), 4, "groups of 128; found"), ((96, 256), 2, "N must be a multiple of 64")],
)
def test_what_the_kernel_cannot_take_is_refused(shape: tuple[int, int], groups: int, message: str) -> None:
    packed = jnp.zeros((shape[0], shape[1] // 8), jnp.int32)
    scale = jnp.ones((shape[0], groups), jnp.bfloat16)
    with pytest.raises(W4A8Error, match=message):
        FragmentWeight.from_weight(W4Weight.from_checkpoint(packed, scale))
