// Packed K and V rows -> operands of the tensor cores' int8 products.
//
// A slice is the part of a block that one lane decodes: eight slices to a block. Of a table format, slice g of a block
// of B values is B / 64 words of eight 4-bit indices; place(g, w, n) says which value nibble n of word w is. The order
// inside a slice is the one that costs the fewest instructions: the query is permuted to fit K once, the output is put
// in order once, and no packed value is ever moved.
//
// Truth: dequantize_row_<type> (ggml-ext/turbokv-quants.c) with the int8 levels of python/turbokv/spec.py.

#pragma once

#include "flash-attn-mma.cuh"

enum kv_format {
    KV_PLANE2,   // turbo2, tbq2
    KV_PLANE21,  // turbo3
    KV_STREAM3,  // tbq3
    KV_PLANE4,   // turbo4, tbq4
    KV_Q8_0,
    KV_Q4_0,
    KV_F16,
};

// The bytes of int8 levels 0-15, of which 8-15 are one greater. A kernel parameter, so that lookups read it from the
// constant bank.
struct level_table {
    uint32_t bytes[4];
};

// Words of which only 2-byte alignment is known.
static __device__ __forceinline__ uint32_t load_u16(const uint8_t * p) {
    return *(const uint16_t *) p;
}

static __device__ __forceinline__ uint32_t load_u32(const uint8_t * p) {
    return multiply_add(load_u16(p + 2), 0x10000, load_u16(p));
}

static __device__ __forceinline__ float load_half(const uint8_t * p) {
    return __half2float(*(const half *) p);
}

// mask ? a : b, bit by bit
static __device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}

// The levels of four indices: nibbles 0-3 of x, or 4-7. Of 16 levels, which are more than a permutation knows, the
// negative ones are term 0 and the others term 1, and both are multiplied: an index of the other term has the sign of
// what it would be here, which is -1 in term 0, and 0 in term 1 (a table of levels + 1).
template <int term, bool upper>
static __device__ __forceinline__ uint32_t look_up(const level_table & table, uint32_t x) {
    x = term == 0 ? x : x ^ 0x88888888;
    return permute_bytes(table.bytes[2 * term], table.bytes[2 * term + 1], upper ? x >> 16 : x);
}

// ---- table formats: indices into 4, 8 or 16 levels

template <kv_format format, int B>
struct table_codec {
    static_assert(B == 128 || (B == 64 && format != KV_STREAM3), "no such type");

    static constexpr int BITS  = format == KV_PLANE2 ? 2 : format == KV_PLANE4 ? 4 : 3;
    static constexpr int BLOCK = B;
    static constexpr int BYTES = B * BITS / 8 + 2;
    static constexpr int SCALE = B * BITS / 8;
    static constexpr int WORDS = B / 64;  // of a slice
    static constexpr int PARTS = WORDS;   // of a V slice, of so many values each:
    static constexpr int PART  = 8;
    static constexpr int TERMS = BITS == 4 ? 2 : 1;  // a level is a sum of so many

    struct raw {
        uint32_t low, high;
    };

    // The packed bytes of a slice.
    static __device__ __forceinline__ raw load(const uint8_t * block, int g) {
        if constexpr (format == KV_PLANE2) {
            return { load_u32(block + 4 * (g % (B / 16))), 0 };
        } else if constexpr (format == KV_PLANE21) {
            // Of the 1-bit plane the upper half of the words uses the odd bits.
            const uint32_t odd = B == 128 ? g >> 2 : (g >> 1) & 1;
            return { load_u32(block + 4 * (g % (B / 16))),
                     (load_u32(block + B / 4 + 4 * (g % (B / 32))) >> odd) & 0x55555555 };
        } else if constexpr (format == KV_STREAM3) {
            return { load_u32(block + 6 * g), load_u16(block + 6 * g + 4) };
        } else if constexpr (B == 128) {
            return { load_u32(block + 4 * g), load_u32(block + 4 * g + 32) };  // lanes side by side: no bank conflicts
        } else {
            return { load_u32(block + 4 * g), 0 };
        }
    }

    // Word w of a slice.
    static __device__ __forceinline__ uint32_t nibbles(const raw & r, int g, int w) {
        if constexpr (format == KV_PLANE4) {
            return w == 0 ? r.low : r.high;
        } else if constexpr (format == KV_STREAM3) {
            uint32_t x = w == 0 ? r.low : r.low >> 24 | r.high << 8;
            x          = (x & 0x00000fff) | (x & 0x00fff000) << 4;
            x          = (x & 0x003f003f) | (x & 0x0fc00fc0) << 2;
            return (x & 0x07070707) | (x & 0x38383838) << 1;
        } else {
            // Fields w' and w' + 2 of the 2-bit plane; r.high has their third bits at distances of 2.
            const int field = B == 128 ? w : g >> 2;
            if constexpr (format == KV_PLANE2) {
                return (r.low >> 2 * field) & 0x33333333;
            } else {
                return select_bits(0x33333333, r.low >> 2 * field, r.high >> 2 * field << 2);
            }
        }
    }

    // `interleaved`: neighbouring fields are neighbouring values (tbqN), not values a plane apart (turboN).
    static constexpr __host__ __device__ int place(int g, int w, int n, bool interleaved) {
        const int byte = n >> 1;
        if constexpr (format == KV_STREAM3) {
            return 16 * g + 8 * w + n;
        } else if constexpr (format == KV_PLANE4) {
            const int j = 4 * (g + 8 * w) + byte;
            return interleaved ? 2 * j + (n & 1) : j + B / 2 * (n & 1);
        } else {
            const int j     = 4 * (g % (B / 16)) + byte;
            const int field = 2 * (n & 1) + (B == 128 ? w : g >> 2);
            return interleaved ? 4 * j + field : j + B / 4 * field;
        }
    }

    // K: the operands of step s of B / 32, for lane t of four. Value i of half h is k_place(s, t, h, i).
    static __device__ __forceinline__ void k_operands(const uint8_t * block, int t, const level_table & table,
                                                      uint32_t (&b)[B / 32][TERMS][2]) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            const int g = t + 4 * upper;
            const raw r = load(block, g);
#pragma unroll
            for (int w = 0; w < WORDS; ++w) {
                const uint32_t x           = nibbles(r, g, w);
                b[upper * WORDS + w][0][0] = look_up<0, false>(table, x);
                b[upper * WORDS + w][0][1] = look_up<0, true>(table, x);
                if constexpr (TERMS == 2) {
                    b[upper * WORDS + w][1][0] = look_up<1, false>(table, x);
                    b[upper * WORDS + w][1][1] = look_up<1, true>(table, x);
                }
            }
        }
    }

    static constexpr __host__ __device__ int k_place(int s, int t, int h, int i, bool interleaved) {
        return place(t + 4 * (s / WORDS), s % WORDS, 4 * h + i, interleaved);
    }

    // V: part w of slice g of four keys: value n of the part, a byte per key.
    static __device__ __forceinline__ void v_operands(const raw (&r)[4], int g, int w, const level_table & table,
                                                      uint32_t (&b)[TERMS][PART]) {
        const uint32_t x0 = nibbles(r[0], g, w), x1 = nibbles(r[1], g, w);
        const uint32_t x2 = nibbles(r[2], g, w), x3 = nibbles(r[3], g, w);
        // Transposed while packed: byte j of even01 is nibble 2j of keys 0 and 1, of odd01 nibble 2j + 1.
        const uint32_t even01 = select_bits(0x0f0f0f0f, x0, x1 << 4), odd01 = select_bits(0x0f0f0f0f, x0 >> 4, x1);
        const uint32_t even23 = select_bits(0x0f0f0f0f, x2, x3 << 4), odd23 = select_bits(0x0f0f0f0f, x2 >> 4, x3);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t even = permute_bytes(even01, even23, j == 0 ? 0x5140 : 0x7362);
            const uint32_t odd  = permute_bytes(odd01, odd23, j == 0 ? 0x5140 : 0x7362);
            b[0][4 * j]         = look_up<0, false>(table, even);
            b[0][4 * j + 1]     = look_up<0, false>(table, odd);
            b[0][4 * j + 2]     = look_up<0, true>(table, even);
            b[0][4 * j + 3]     = look_up<0, true>(table, odd);
            if constexpr (TERMS == 2) {
                b[1][4 * j]     = look_up<1, false>(table, even);
                b[1][4 * j + 1] = look_up<1, false>(table, odd);
                b[1][4 * j + 2] = look_up<1, true>(table, even);
                b[1][4 * j + 3] = look_up<1, true>(table, odd);
            }
        }
    }
};

// ---- byte formats: q8_0, q4_0

template <kv_format format>
struct byte_codec {
    static constexpr int BLOCK = 32;
    static constexpr int BYTES = format == KV_Q8_0 ? 34 : 18;
    static constexpr int SCALE = 0;
    static constexpr int PARTS = 1;
    static constexpr int PART  = 4;
    static constexpr int TERMS = 1;

    struct raw {
        uint32_t bytes;
    };

    static __device__ __forceinline__ uint32_t minus_8(uint32_t x) {  // of each byte; x is 0 .. 15
        return ((x | 0x80808080) - 0x08080808) ^ 0x80808080;
    }

    static __device__ __forceinline__ void k_operands(const uint8_t * block, int t, const level_table &,
                                                      uint32_t (&b)[1][1][2]) {
        const uint32_t x = load_u32(block + 2 + 4 * t);
        if constexpr (format == KV_Q8_0) {
            b[0][0][0] = x;
            b[0][0][1] = load_u32(block + 2 + 16 + 4 * t);
        } else {
            b[0][0][0] = minus_8(x & 0x0f0f0f0f);
            b[0][0][1] = minus_8((x >> 4) & 0x0f0f0f0f);
        }
    }

    static constexpr __host__ __device__ int k_place(int, int t, int h, int i, bool) { return 16 * h + 4 * t + i; }

    static __device__ __forceinline__ raw load(const uint8_t * block, int g) {
        if constexpr (format == KV_Q8_0) {
            return { load_u32(block + 2 + 4 * g) };
        } else {
            return { minus_8((load_u32(block + 2 + 4 * (g & 3)) >> (g & 4)) & 0x0f0f0f0f) };
        }
    }

    static __device__ __forceinline__ void v_operands(const raw (&r)[4], int, int, const level_table &,
                                                      uint32_t (&b)[1][PART]) {
        const uint32_t low01 = permute_bytes(r[0].bytes, r[1].bytes, 0x5140);
        const uint32_t low23 = permute_bytes(r[2].bytes, r[3].bytes, 0x5140);
        const uint32_t top01 = permute_bytes(r[0].bytes, r[1].bytes, 0x7362);
        const uint32_t top23 = permute_bytes(r[2].bytes, r[3].bytes, 0x7362);
        b[0][0]              = permute_bytes(low01, low23, 0x5410);
        b[0][1]              = permute_bytes(low01, low23, 0x7632);
        b[0][2]              = permute_bytes(top01, top23, 0x5410);
        b[0][3]              = permute_bytes(top01, top23, 0x7632);
    }

    static constexpr __host__ __device__ int place(int g, int, int n, bool) { return 4 * g + n; }
};

// ---- fp16: no codec, but sizes

struct f16_codec {
    static constexpr int BLOCK = 1;
    static constexpr int BYTES = 2;
};

template <kv_format format, int D>
struct kv_codec_of {
    using type = table_codec<format, D == 64 ? 64 : 128>;
};

template <int D>
struct kv_codec_of<KV_Q8_0, D> {
    using type = byte_codec<KV_Q8_0>;
};

template <int D>
struct kv_codec_of<KV_Q4_0, D> {
    using type = byte_codec<KV_Q4_0>;
};

template <int D>
struct kv_codec_of<KV_F16, D> {
    using type = f16_codec;
};

template <kv_format format, int D>
using kv_codec = typename kv_codec_of<format, D>::type;
