"""Constants of the number formats and of the hash. The kernels and plain torch (`hf_efcp.core`) both use them.

They are plain numbers, and the file imports nothing: a compiled function sees each number as a constant.
"""

# --- bf16: the upper half of an fp32 number.
BF16_SHIFT = 16
# Half of bf16's last bit, less one, in the bits of fp32. Added before the cut, it rounds to nearest.
HALF_BF16 = 2 ** (BF16_SHIFT - 1) - 1
LOWER_16_BITS = 0xFFFF
SIGN_16 = 0x8000
NAN_16 = 0x7FC0

# --- fp32: the exponent begins at bit EXPONENT_SHIFT, and is stored with EXPONENT_BIAS added.
EXPONENT_SHIFT = 23
EXPONENT_BIAS = 127

# --- `core.codecs.BlockQuantizer`: BLOCK numbers share a scale; codes are -LARGEST ... LARGEST.
BLOCK = 256
LARGEST_INT8 = 127
LARGEST_INT4 = 7
# Two 4-bit codes to a byte, each as code + INT4_ZERO.
INT4_BITS = 4
INT4_MASK = 15
INT4_ZERO = 8

# --- `core.codecs.MinMaxQuantizer`: the largest magnitude of a bound, so that the difference of two bounds is finite in fp32.
LARGEST_BOUND = 2.0**126
# --- `core.codecs.encode_float8`: numbers are stored times this. So the range of E4M3, 2^-9 ... 448, covers numbers up to 1.
FLOAT8_SCALE = 256.0

# --- `core.codecs.SparseCodec`: 16 bits, index << VALUE_BITS | code + VALUE_ZERO, with codes -LARGEST_VALUE ... LARGEST_VALUE.
INDEX_BITS = 10
VALUE_BITS = 6
VALUE_MASK = 63
VALUE_ZERO = 32
LARGEST_VALUE = 31
# The scale of a block with a number that is not finite: all bits of the exponent are set.
NOT_FINITE = 255

# --- `core.random`: a hash of 32 bits, in 64-bit arithmetic.
HASH_MULTIPLIER = 0x045D9F3B
HASH_MASK = 0xFFFFFFFF
COUNTER_MASK = 0x7FFFFFFF
# Added to a salt: without it, the hashes of a salt and of an equal counter would cancel.
SALT_OFFSET = 0x9E3779B9
# The upper 16 bits of a hash as a number in (0, 1): (bits + 0.5) * UNIFORM_UNIT.
UNIFORM_UNIT = 2.0**-16
