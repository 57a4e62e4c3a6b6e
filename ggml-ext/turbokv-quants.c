// Scalar reference codecs. Readable first: speed lives in the attention kernels, which are tested against this.
// A block is treated as its bytes: level indices from byte 0, the fp16 scale behind them.

#include "turbokv-quants.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "ggml-impl.h"
#include "turbokv-tables.h"

#define TURBOKV_MAX_BLOCK 128

static const float TURBOKV_FP16_MAX = 65504.0f;

// ---- index bytes: 8-bit indices of n values <-> packed, see python/turbokv/spec.py

// Packs bits [shift, shift + bits) of n indices into a plane: field k of byte j is value j + k*bytes.
static inline void pack_plane(const uint8_t * index, int n, int bits, int shift, uint8_t * plane) {
    const int bytes = n * bits / 8;
    const int mask  = (1 << bits) - 1;
    for (int j = 0; j < bytes; ++j) {
        int packed = 0;
        for (int k = 0; k < 8 / bits; ++k) {
            packed |= ((index[j + k * bytes] >> shift) & mask) << (k * bits);
        }
        plane[j] = packed;
    }
}

static inline void pack_planes(const uint8_t * index, int n, int bits, uint8_t * qs) {
    if (bits == 3) {
        pack_plane(index, n, 2, 0, qs);
        pack_plane(index, n, 1, 2, qs + n / 4);
    } else {
        pack_plane(index, n, bits, 0, qs);
    }
}

// One plane of 2 or 4 bits, or planes of 2 and 1 bits.
static inline void unpack_planes(const uint8_t * qs, int n, int bits, uint8_t * index) {
    if (bits != 3) {
        const int bytes = n * bits / 8;
        for (int k = 0; k < 8 / bits; ++k) {
            for (int j = 0; j < bytes; ++j) {
                index[k * bytes + j] = (qs[j] >> (k * bits)) & ((1 << bits) - 1);
            }
        }
        return;
    }
    const uint8_t * qh   = qs + n / 4;
    const uint64_t  ones = 0x0101010101010101;  // eight bytes at a time: every shift stays inside its byte
    for (int j = 0; j < n / 4; j += 8) {
        uint64_t low;
        uint64_t high;
        memcpy(&low, qs + j, 8);
        memcpy(&high, qh + j % (n / 8), 8);
        high >>= j / (n / 8);  // the upper half of the low plane goes with the odd fields of the high one
        for (int k = 0; k < 4; ++k) {
            const uint64_t i = ((low >> (2 * k)) & (3 * ones)) | (((high >> (2 * k)) & ones) << 2);
            memcpy(index + k * (n / 4) + j, &i, 8);
        }
    }
}

// Eight indices are `bits` bytes of the stream.
static inline void pack_stream(const uint8_t * index, int n, int bits, uint8_t * qs) {
    for (int j = 0; j < n; j += 8, qs += bits) {
        uint32_t group = 0;
        for (int k = 0; k < 8; ++k) {
            group |= (uint32_t) index[j + k] << (k * bits);
        }
        for (int b = 0; b < bits; ++b) {
            qs[b] = group >> (8 * b);
        }
    }
}

static inline void unpack_stream(const uint8_t * qs, int n, int bits, uint8_t * index) {
    for (int j = 0; j < n; j += 8, qs += bits) {
        uint32_t group = 0;
        for (int b = 0; b < bits; ++b) {
            group |= (uint32_t) qs[b] << (8 * b);
        }
        for (int k = 0; k < 8; ++k) {
            index[j + k] = (group >> (k * bits)) & ((1 << bits) - 1);
        }
    }
}

// ---- the rotation inside tbqN

static inline bool srht_negates(int j) {
    return (turbokv_srht_signs[j / 32] >> (j % 32)) & 1;
}

// Butterflies of all pairs of values that are `half` apart.
#define TURBOKV_DEFINE_BUTTERFLIES(name, real)                                                                         \
    static inline void name(real * v, int half) {                                                                      \
        for (int i = 0; i < TURBOKV_SRHT_SIZE; i += 2 * half) {                                                        \
            for (int j = i; j < i + half; ++j) {                                                                       \
                const real low  = v[j];                                                                                \
                const real high = v[j + half];                                                                         \
                v[j]            = low + high;                                                                          \
                v[j + half]     = low - high;                                                                          \
            }                                                                                                          \
        }                                                                                                              \
    }

TURBOKV_DEFINE_BUTTERFLIES(butterflies_f32, float)
TURBOKV_DEFINE_BUTTERFLIES(butterflies_f64, double)

// Unnormalized Walsh-Hadamard transform in natural order, in place: butterflies at distance 1, 2, 4, .. 64. Additions
// only: the result is the same to the bit wherever the distances come in this order.
static inline void hadamard_f64(double * v) {
    for (int half = 1; half < TURBOKV_SRHT_SIZE; half *= 2) {
        butterflies_f64(v, half);
    }
}

// The same in float, for decoding. Compilers vectorize distances of 8 and more; so the first three are taken on the
// transposed block, where they are 16 times as long: decoding a block went from 370 to 220 ns (SSE2).
static inline void hadamard_f32(float * v) {
    enum { ROWS = TURBOKV_SRHT_SIZE / 8 };
    float t[TURBOKV_SRHT_SIZE];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < 8; ++j) {
            t[j * ROWS + i] = v[i * 8 + j];
        }
    }
    butterflies_f32(t, 1 * ROWS);
    butterflies_f32(t, 2 * ROWS);
    butterflies_f32(t, 4 * ROWS);
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < 8; ++j) {
            v[i * 8 + j] = t[j * ROWS + i];
        }
    }
    butterflies_f32(v, 8);
    butterflies_f32(v, 16);
    butterflies_f32(v, 32);
    butterflies_f32(v, 64);
}

// ---- one block

// Finds the level index of each of the n values and returns the scale d. `srht`: rotate before.
// Sums run in double from first to last: the numpy reference adds in the same order, bit for bit.
static inline ggml_half encode_block(const float * x, int n, bool srht, const float * levels, const double * thresholds,
                                     int n_levels, uint8_t * index) {
    double v[TURBOKV_MAX_BLOCK];
    double sum = 0.0;
    for (int j = 0; j < n; ++j) {
        v[j] = (double) x[j];
        sum += v[j] * v[j];
    }
    const double norm = sqrt(sum);  // finite floats cannot overflow a double here

    if (!isfinite(norm) || norm == 0.0) {
        memset(index, 0, n);
        return GGML_FP32_TO_FP16(norm == 0.0 ? 0.0f : NAN);
    }

    double gain = sqrt((double) n) / norm;
    if (srht) {
        for (int j = 0; j < n; ++j) {
            v[j] = srht_negates(j) ? -v[j] : v[j];
        }
        hadamard_f64(v);
        gain = 1.0 / norm;
    }

    double sum_levels = 0.0;
    for (int j = 0; j < n; ++j) {
        const double u = v[j] * gain;
        int          i = 0;
        for (int t = 0; t < n_levels - 1; ++t) {
            i += thresholds[t] < u;
        }
        index[j]           = i;
        const double level = (double) levels[i];
        sum_levels += level * level;
    }

    const float d = (float) (norm / sqrt(sum_levels));
    return GGML_FP32_TO_FP16(d < TURBOKV_FP16_MAX ? d : TURBOKV_FP16_MAX);
}

static inline void decode_block(const uint8_t * index, ggml_half scale, int n, bool srht, const float * levels,
                                int n_levels, float * y) {
    const float d = GGML_FP16_TO_FP32(scale);
    if (srht) {
        float v[TURBOKV_SRHT_SIZE];
        for (int j = 0; j < n; ++j) {
            v[j] = levels[index[j]];
        }
        hadamard_f32(v);
        const float factor = d * TURBOKV_SRHT_SCALE;
        for (int w = 0; w < TURBOKV_SRHT_SIZE / 32; ++w) {
            for (int j = 0; j < 32; ++j) {
                y[32 * w + j] = v[32 * w + j] * (srht_negates(32 * w + j) ? -factor : factor);
            }
        }
        return;
    }
    float scaled[16];
    for (int i = 0; i < n_levels; ++i) {
        scaled[i] = levels[i] * d;
    }
    for (int j = 0; j < n; ++j) {
        y[j] = scaled[index[j]];
    }
}

// ---- rows

// packing: planes or stream; srht: whether the codec rotates; table: of turbokv-tables.h.
#define TURBOKV_DEFINE_CODEC(name, qk, bits, packing, srht, table)                                                     \
    void quantize_row_##name##_ref(const float * GGML_RESTRICT x, block_##name * GGML_RESTRICT y, int64_t k) {         \
        assert(k % (qk) == 0);                                                                                         \
        uint8_t index[TURBOKV_MAX_BLOCK];                                                                              \
        for (int64_t i = 0; i < k / (qk); ++i) {                                                                       \
            y[i].d = encode_block(x + i * (qk), qk, srht, table, table##_thresholds, 1 << (bits), index);              \
            pack_##packing(index, qk, bits, (uint8_t *) &y[i]);                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    void dequantize_row_##name(const block_##name * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {             \
        assert(k % (qk) == 0);                                                                                         \
        uint8_t index[TURBOKV_MAX_BLOCK];                                                                              \
        for (int64_t i = 0; i < k / (qk); ++i) {                                                                       \
            unpack_##packing((const uint8_t *) &x[i], qk, bits, index);                                                \
            decode_block(index, x[i].d, qk, srht, table, 1 << (bits), y + i * (qk));                                   \
        }                                                                                                              \
    }

TURBOKV_DEFINE_CODEC(turbo2, QK_TURBO2, 2, planes, false, turbokv_lm4)
TURBOKV_DEFINE_CODEC(turbo2_64, QK_TURBO2_64, 2, planes, false, turbokv_lm4)
TURBOKV_DEFINE_CODEC(turbo3, QK_TURBO3, 3, planes, false, turbokv_lm8)
TURBOKV_DEFINE_CODEC(turbo3_64, QK_TURBO3_64, 3, planes, false, turbokv_lm8)
TURBOKV_DEFINE_CODEC(turbo4, QK_TURBO4, 4, planes, false, turbokv_lm16)
TURBOKV_DEFINE_CODEC(turbo4_64, QK_TURBO4_64, 4, planes, false, turbokv_lm16)
TURBOKV_DEFINE_CODEC(tbq2, QK_TBQ2, 2, stream, true, turbokv_lm4)
TURBOKV_DEFINE_CODEC(tbq3, QK_TBQ3, 3, stream, true, turbokv_tbq3)
TURBOKV_DEFINE_CODEC(tbq4, QK_TBQ4, 4, stream, true, turbokv_lm16)

size_t turbokv_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row) {
    ggml_get_type_traits(type)->from_float_ref(src, dst, nrows * n_per_row);
    return nrows * ggml_row_size(type, n_per_row);
}
