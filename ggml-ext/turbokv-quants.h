// Codecs of the turbokv KV-cache types: float rows <-> block bytes, and their dot product with q8_0.
//
// A row has k values, k a multiple of the type's block. Encoding keeps the norm of every block (norm
// correction), stores NaN as scale when a value is not finite, and writes zeros for a block of zeros.
// turboN: no rotation in here, llama.cpp's graph has already applied the Hadamard transform. tbqN rotates by itself.
// Truth for all of it: python/turbokv/codec.py, held together by tests/golden/*.bin.

#pragma once

#ifndef GGML_COMMON_DECL
#    define GGML_COMMON_DECL_C
#    include "ggml-common.h"
#endif

#include "ggml.h"
#include "turbokv-types.h"

#ifdef __cplusplus
extern "C" {
#endif

// void quantize_row_<type>_ref(const float * x, block_<type> * y, int64_t k);
// void dequantize_row_<type>(const block_<type> * x, float * y, int64_t k);
#include "turbokv-codecs.inc"

// Quantizes rows of any type of ours; the shape of ggml's quantize_*() functions, without an importance matrix.
// Returns the number of bytes written.
GGML_API size_t turbokv_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row);

#ifdef __cplusplus
}
#endif
