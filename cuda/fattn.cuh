// FLASH_ATTN_EXT where K or V is of one of our types.

#pragma once

#include "common.cuh"

bool   turbokv_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst);
void   turbokv_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
// Bytes of dst's data and of the scratch behind it. dst may not have an address yet.
size_t turbokv_cuda_flash_attn_ext_alloc_size(int device, const ggml_tensor * dst);
