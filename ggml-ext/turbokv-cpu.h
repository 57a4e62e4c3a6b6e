// CPU-backend side of the turbokv types: the rows of type_traits_cpu[].
//
// from_float: k values of x, k a multiple of the block, to blocks y; the bytes of quantize_row_<type>_ref, only faster.
// vec_dot: s[0] = sum over n values of x (a row of ours) times y (a q8_0 row); n a multiple of the block.
// The other arguments are ggml's vec_dot signature; only nrc == 1 is supported (traits say nrows = 1).

#pragma once

#include <stddef.h>

#include "turbokv-attention.h"
#include "turbokv-quants.h"

#ifdef __cplusplus
extern "C" {
#endif

#include "turbokv-cpu-codecs.inc"

#ifdef __cplusplus
}
#endif
