// SET_ROWS into a tensor of one of our types: this is how keys and values reach the cache.

#pragma once

#include "common.cuh"

bool turbokv_cuda_set_rows_supported(const ggml_tensor * dst);
void turbokv_cuda_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
