// What the hooks in ggml-cuda.cu call: operations of llama.cpp's CUDA backend on our types.
// "Ours" is an operation with a tensor of one of our types among its sources, or as its result.

#pragma once

#include <stddef.h>

struct ggml_backend_cuda_context;
struct ggml_tensor;

// 1: our kernels do `op`; 0: nobody on this device does; -1: not ours, upstream decides.
int turbokv_cuda_supports_op(int device, const ggml_tensor * op);

// Enqueues the kernels of `dst` on the context's stream. False: not ours, upstream goes on.
bool turbokv_cuda_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Bytes of a tensor's allocation: its data and the scratch of its operation. 0: not ours, upstream decides.
size_t turbokv_cuda_alloc_size(int device, const ggml_tensor * tensor);
