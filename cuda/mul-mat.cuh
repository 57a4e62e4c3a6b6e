// MUL_MAT with src0 of one of our types: keys times queries without flash attention.

#pragma once

#include "common.cuh"

bool turbokv_cuda_mul_mat_supported(const ggml_tensor * dst);
void turbokv_cuda_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
