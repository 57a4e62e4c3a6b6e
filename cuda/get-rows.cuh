// GET_ROWS of a tensor of one of our types.

#pragma once

#include "common.cuh"

bool turbokv_cuda_get_rows_supported(const ggml_tensor * dst);
void turbokv_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
