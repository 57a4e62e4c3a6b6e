// FLASH_ATTN_EXT where K or V is of one of our types. Two ways:
//   decode   up to TURBOKV_DECODE_MAX_QUERIES query tokens, and whatever upstream's kernels cannot do, on the packed
//            values: flash-attn-decode.cu
//   convert  all else: some KV heads at a time are dequantized to fp16, and upstream's kernel does the rest

#pragma once

#include "common.cuh"

#define TURBOKV_DECODE_MAX_QUERIES 16

bool   turbokv_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst);
void   turbokv_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
// Bytes of dst's data and of the scratch behind it. dst may not have an address yet.
size_t turbokv_cuda_flash_attn_ext_alloc_size(int device, const ggml_tensor * dst);

// The first way, for any number of queries. 0 bytes and false: it cannot.
size_t turbokv_cuda_decode_alloc_size(int device, const ggml_tensor * dst);
bool   turbokv_cuda_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
