// CPU-backend side of the turbokv types: the rows of type_traits_cpu[].
//
// vec_dot: s[0] = sum over n values of x (a row of ours) times y (a q8_0 row); n a multiple of the block.
// The other arguments are ggml's vec_dot signature; only nrc == 1 is supported (traits say nrows = 1).

#pragma once

#include <stddef.h>

#include "turbokv-quants.h"

#ifdef __cplusplus
extern "C" {
#endif

void ggml_vec_dot_turbo3_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                              int nrc);
void ggml_vec_dot_turbo3_64_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                                 int nrc);
void ggml_vec_dot_turbo4_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                              int nrc);
void ggml_vec_dot_turbo4_64_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                                 int nrc);

#ifdef __cplusplus
}
#endif
