// CPY between f32 or f16 and one of our types; between equal types of ours upstream copies the bytes.

#pragma once

#include "common.cuh"

// The types are convertible, one of the two being ours, and the rows of both are whole blocks.
bool turbokv_cuda_cpy_supported(const ggml_tensor * src, const ggml_tensor * dst);
void turbokv_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst);
