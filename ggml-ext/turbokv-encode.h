// Encoding of rows: float values -> block bytes. One source, compiled twice: for the baseline architecture in ggml-base
// (turbokv-quants.c, the reference) and for the CPU variant in ggml-cpu (turbokv-cpu.c).
//
// Contract: both give the same bytes for every input, those of python/turbokv/codec.py. So all arithmetic is in double,
// sums have a fixed order, and both files are compiled without contraction to fused multiply-adds.
// The loops are written for the compiler to vectorize: constant trip counts, no branches, one width of numbers in each.

#pragma once

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "ggml-impl.h"
#include "turbokv-inline.h"
#include "turbokv-quants.h"
#include "turbokv-srht.h"
#include "turbokv-tables.h"

#define TURBOKV_MAX_BLOCK  128
#define TURBOKV_MAX_LEVELS 16
#define TURBOKV_SUM_LANES  16
#define TURBOKV_FP16_MAX   65504.0f

// ---- index bytes: 8-bit indices of n values -> packed, see python/turbokv/spec.py

// Packs bits [shift, shift + bits) of n indices into a plane: field k of byte j is value j + k*bytes.
TURBOKV_INLINE void pack_plane(const uint8_t * index, int n, int bits, int shift, uint8_t * plane) {
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

TURBOKV_INLINE void pack_planes(const uint8_t * index, int n, int bits, uint8_t * qs) {
    if (bits == 3) {
        pack_plane(index, n, 2, 0, qs);
        pack_plane(index, n, 1, 2, qs + n / 4);
    } else {
        pack_plane(index, n, bits, 0, qs);
    }
}

// Eight indices are `bits` bytes of the stream.
TURBOKV_INLINE void pack_stream(const uint8_t * index, int n, int bits, uint8_t * qs) {
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

// ---- level indices
//
// The index of a value v is #{thresholds < v * gain}, the product rounded to double. Tables are symmetric about zero,
// so half the comparisons are enough: of magnitudes with the positive thresholds. Only ties are not symmetric, they go
// to the lower level: inwards for a positive value, outwards for a negative one. Hence the sign becomes the lowest bit
// of what is compared, and of equal magnitudes the negative one is the greater.

// Of the value whose magnitude is above m positive thresholds.
TURBOKV_INLINE uint8_t level_index(int m, bool positive, int n_levels) {
    return n_levels / 2 + (positive ? m : ~m);
}

TURBOKV_INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

// Makes an unsigned key signed, in the same order: SSE2 and AVX2 compare no unsigned numbers.
TURBOKV_INLINE int32_t signed_key(uint32_t key) {
    return (int32_t) (key ^ 0x80000000);
}

// The greatest key of a float that is not above threshold t > 0. With it, comparing the 32-bit keys of floats says what
// comparing the products in double would, in half the registers. Only the float nearest to t / gain needs a look: its
// neighbours are too far from t for the rounding of their products to matter.
TURBOKV_INLINE int32_t threshold_key(double t, double gain, double inverse_gain) {
    const float  nearest = (float) (t * inverse_gain);
    const double product = (double) nearest * gain;
    return signed_key(2 * float_bits(nearest) + 1 - (product >= t) - (product > t));
}

TURBOKV_INLINE void find_indices_f32(const float * x, int n, double gain, double inverse_gain,
                                     const double * thresholds, int n_levels, uint8_t * index) {
    const int n_positive = n_levels / 2 - 1;
    int32_t   keys[TURBOKV_MAX_LEVELS / 2];
    for (int t = 0; t < n_positive; ++t) {
        keys[t] = threshold_key(thresholds[n_levels / 2 + t], gain, inverse_gain);
    }
    for (int j = 0; j < n; ++j) {
        const uint32_t bits = float_bits(x[j]);
        const int32_t  key  = signed_key(bits << 1 | bits >> 31);
        int            m    = 0;
        for (int t = 0; t < n_positive; ++t) {
            m += keys[t] < key;
        }
        index[j] = level_index(m, x[j] > 0.0f, n_levels);
    }
}

TURBOKV_INLINE void find_indices_f64(const double * x, int n, double gain, const double * thresholds, int n_levels,
                                     uint8_t * index) {
    const int n_positive = n_levels / 2 - 1;
    for (int j = 0; j < n; ++j) {
        const double u = x[j] * gain;
        uint64_t     bits;
        double       key;  // |u|, of a negative u the next number above it
        memcpy(&bits, &u, sizeof(bits));
        bits = (bits & ~(UINT64_C(1) << 63)) + (bits >> 63);
        memcpy(&key, &bits, sizeof(key));
        int64_t m = 0;  // as wide as u
        for (int t = 0; t < n_positive; ++t) {
            m += thresholds[n_levels / 2 + t] < key;
        }
        index[j] = level_index((int) m, u > 0.0, n_levels);
    }
}

// ---- norms

// Lane l sums the squares of values l, l + 16, ..; then the upper half of the lanes is added to the lower one until one
// is left. Finite floats cannot overflow a double here.
TURBOKV_INLINE double norm_of_values(const float * x, int n) {
    double lanes[TURBOKV_SUM_LANES] = { 0.0 };
    for (int j = 0; j < n; j += TURBOKV_SUM_LANES) {
        for (int l = 0; l < TURBOKV_SUM_LANES; ++l) {
            lanes[l] += (double) x[j + l] * (double) x[j + l];
        }
    }
    for (int half = TURBOKV_SUM_LANES / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) {
            lanes[l] += lanes[half + l];
        }
    }
    return sqrt(lanes[0]);
}

// Count times square, summed from the smallest magnitude to the greatest.
TURBOKV_INLINE double norm_of_levels(const uint8_t * index, int n, const float * levels, int n_levels) {
    const int half = n_levels / 2;
    uint8_t   magnitudes[TURBOKV_MAX_BLOCK];
    for (int j = 0; j < n; ++j) {
        magnitudes[j] = (index[j] & half ? index[j] : ~index[j]) & (half - 1);
    }
    double sum = 0.0;
    for (int m = 0; m < half; ++m) {
        const uint8_t magnitude = m;  // a byte like the count, which a block of 128 cannot overflow
        uint8_t       count     = 0;
        for (int j = 0; j < n; ++j) {
            count += magnitudes[j] == magnitude;
        }
        const double level = (double) levels[half + m];
        sum += count * (level * level);
    }
    return sqrt(sum);
}

// ---- one block

// Finds the level index of each of the n values and returns the scale d. `srht`: rotate before.
TURBOKV_INLINE ggml_half encode_block(const float * x, int n, bool srht, const float * levels,
                                      const double * thresholds, int n_levels, uint8_t * index) {
    const double norm = norm_of_values(x, n);
    if (!isfinite(norm) || norm == 0.0) {
        memset(index, 0, n);
        return GGML_FP32_TO_FP16(norm == 0.0 ? 0.0f : NAN);
    }
    if (srht) {
        double flipped[TURBOKV_SRHT_SIZE];
        double rotated[TURBOKV_SRHT_SIZE];
        for (int j = 0; j < TURBOKV_SRHT_SIZE; ++j) {
            flipped[j] = (double) (x[j] * turbokv_srht_signs[j]);
        }
        hadamard_f64(flipped, rotated);
        find_indices_f64(rotated, n, 1.0 / norm, thresholds, n_levels, index);
    } else {
        const double root = sqrt((double) n);
        find_indices_f32(x, n, root / norm, norm / root, thresholds, n_levels, index);
    }
    const float d = (float) (norm / norm_of_levels(index, n, levels, n_levels));
    return GGML_FP32_TO_FP16(d < TURBOKV_FP16_MAX ? d : TURBOKV_FP16_MAX);
}

// ---- rows

// The body of a quantize_row function: k values x to blocks y, k a multiple of the block. The other arguments are those
// of turbokv-codec-list.inc.
#define TURBOKV_ENCODE_ROW(x, y, k, qk, bits, packing, srht, table)                                                    \
    do {                                                                                                               \
        assert((k) % (qk) == 0);                                                                                       \
        for (int64_t i = 0; i < (k) / (qk); ++i) {                                                                     \
            uint8_t index[qk];                                                                                         \
            (y)[i].d = encode_block((x) + i * (qk), qk, srht, table, table##_thresholds, 1 << (bits), index);          \
            pack_##packing(index, qk, bits, (uint8_t *) &(y)[i]);                                                      \
        }                                                                                                              \
    } while (0)
