// The rotation inside tbqN, y = H (s * x) / sqrt(n) over SRHT_SIZE values, and back. Signs and size: spec.py.

#pragma once

#include <assert.h>

#include "ggml.h"
#include "turbokv-tables.h"

// hadamard_<suffix>: unnormalized Walsh-Hadamard transform of TURBOKV_SRHT_SIZE values in natural order: butterflies at
// distance 1, 2, 4, .. 64. Additions only, in that order: the result is the same to the bit at every vector width.
//
// All stages are the same loop, so that compilers vectorize the short distances as well: neighbours meet, their sum
// goes to the lower half and their difference to the upper. This moves the lowest bit of a value's place to the top.
// The next stage thus finds pairs of twice the distance side by side, and after all seven every value is in its place
// again.
#define TURBOKV_DEFINE_HADAMARD(suffix, real)                                                                          \
    static inline void hadamard_stage_##suffix(const real * GGML_RESTRICT x, real * GGML_RESTRICT y) {                 \
        enum { HALF = TURBOKV_SRHT_SIZE / 2 };                                                                         \
        for (int i = 0; i < HALF; ++i) {                                                                               \
            y[i]        = x[2 * i] + x[2 * i + 1];                                                                     \
            y[i + HALF] = x[2 * i] - x[2 * i + 1];                                                                     \
        }                                                                                                              \
    }                                                                                                                  \
    static inline void hadamard_##suffix(const real * GGML_RESTRICT x, real * GGML_RESTRICT y) {                       \
        real t[TURBOKV_SRHT_SIZE];                                                                                     \
        hadamard_stage_##suffix(x, y);                                                                                 \
        for (int i = 0; i < 3; ++i) {                                                                                  \
            hadamard_stage_##suffix(y, t);                                                                             \
            hadamard_stage_##suffix(t, y);                                                                             \
        }                                                                                                              \
    }

static_assert(TURBOKV_SRHT_SIZE == 1 << 7, "the transform has seven stages");

TURBOKV_DEFINE_HADAMARD(f32, float)
TURBOKV_DEFINE_HADAMARD(f64, double)

// In place, in float.
static inline void turbokv_srht(float * v) {
    float flipped[TURBOKV_SRHT_SIZE];
    for (int j = 0; j < TURBOKV_SRHT_SIZE; ++j) {
        flipped[j] = v[j] * (turbokv_srht_signs[j] * TURBOKV_SRHT_SCALE);
    }
    hadamard_f32(flipped, v);
}

static inline void turbokv_srht_inverse(float * v) {
    float rotated[TURBOKV_SRHT_SIZE];
    hadamard_f32(v, rotated);
    for (int j = 0; j < TURBOKV_SRHT_SIZE; ++j) {
        v[j] = rotated[j] * (turbokv_srht_signs[j] * TURBOKV_SRHT_SCALE);
    }
}
