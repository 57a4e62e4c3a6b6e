// FLASH_ATTN_EXT: not here yet; llama.cpp runs it on the CPU.

#include "fattn.cuh"

bool turbokv_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst) {
    GGML_UNUSED(device);
    GGML_UNUSED(dst);
    return false;
}

void turbokv_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    GGML_UNUSED(ctx);
    GGML_UNUSED(dst);
    GGML_ABORT("not supported");
}

size_t turbokv_cuda_flash_attn_ext_alloc_size(int device, const ggml_tensor * dst) {
    GGML_UNUSED(device);
    return ggml_nbytes(dst);
}
