// The reference codecs: encoding is that of turbokv-encode.h, decoding stands here. Readable first: the speed of
// decoding lives in the attention kernels, which are tested against this.
// A block is treated as its bytes: level indices from byte 0, the fp16 scale behind them.

#include "turbokv-quants.h"

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "ggml-impl.h"
#include "turbokv-encode.h"
#include "turbokv-srht.h"
#include "turbokv-tables.h"

// ---- index bytes: packed -> 8-bit indices of n values, see python/turbokv/spec.py

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

// ---- one block

static inline void decode_block(const uint8_t * index, ggml_half scale, int n, bool srht, const float * levels,
                                int n_levels, float * y) {
    const float d = GGML_FP16_TO_FP32(scale);
    if (srht) {
        float chosen[TURBOKV_SRHT_SIZE];
        float rotated[TURBOKV_SRHT_SIZE];
        for (int j = 0; j < TURBOKV_SRHT_SIZE; ++j) {
            chosen[j] = levels[index[j]];
        }
        hadamard_f32(chosen, rotated);
        const float factor = d * TURBOKV_SRHT_SCALE;
        for (int j = 0; j < TURBOKV_SRHT_SIZE; ++j) {
            y[j] = rotated[j] * (factor * turbokv_srht_signs[j]);
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

#define TURBOKV_CODEC(name, qk, bits, packing, srht, table)                                                            \
    void quantize_row_##name##_ref(const float * GGML_RESTRICT x, block_##name * GGML_RESTRICT y, int64_t k) {         \
        TURBOKV_ENCODE_ROW(x, y, k, qk, bits, packing, srht, table);                                                   \
    }                                                                                                                  \
    void dequantize_row_##name(const block_##name * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {             \
        assert(k % (qk) == 0);                                                                                         \
        uint8_t index[qk];                                                                                             \
        for (int64_t i = 0; i < k / (qk); ++i) {                                                                       \
            unpack_##packing((const uint8_t *) &x[i], qk, bits, index);                                                \
            decode_block(index, x[i].d, qk, srht, table, 1 << (bits), y + i * (qk));                                   \
        }                                                                                                              \
    }
#include "turbokv-codec-list.inc"

size_t turbokv_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row) {
    ggml_get_type_traits(type)->from_float_ref(src, dst, nrows * n_per_row);
    return nrows * ggml_row_size(type, n_per_row);
}
