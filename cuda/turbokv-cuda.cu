// Which operations on our types run here, and where; see turbokv-cuda.h.

#include "turbokv-cuda.h"

#include "cpy.cuh"
#include "flash-attn.cuh"
#include "get-rows.cuh"
#include "mul-mat.cuh"
#include "set-rows.cuh"
#include "view.cuh"

static bool is_ours(const ggml_tensor * t) {
    return t != nullptr && turbokv_is_ours(t->type);
}

static bool has_ours(const ggml_tensor * op) {
    for (const ggml_tensor * src : op->src) {
        if (is_ours(src)) {
            return true;
        }
    }
    return is_ours(op);
}

// Upstream's memcpy does it.
static bool is_plain_copy(const ggml_tensor * src, const ggml_tensor * dst) {
    return src->type == dst->type && ggml_is_contiguous(src) && ggml_is_contiguous(dst);
}

int turbokv_cuda_supports_op(int device, const ggml_tensor * op) {
    if (!has_ours(op)) {
        return -1;
    }
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return -1;
        case GGML_OP_SET_ROWS:
            return turbokv_cuda_set_rows_supported(op);
        case GGML_OP_GET_ROWS:
            return turbokv_cuda_get_rows_supported(op);
        case GGML_OP_CPY:
            return is_plain_copy(op->src[0], op) || turbokv_cuda_cpy_supported(op->src[0], op);
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            return is_plain_copy(op->src[0], op);
        case GGML_OP_MUL_MAT:
            return turbokv_cuda_mul_mat_supported(op);
        case GGML_OP_FLASH_ATTN_EXT:
            return turbokv_cuda_flash_attn_ext_supported(device, op);
        default:
            return 0;
    }
}

bool turbokv_cuda_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!has_ours(dst)) {
        return false;
    }
    if (ggml_is_empty(dst)) {
        return true;
    }
    switch (dst->op) {
        case GGML_OP_SET_ROWS:
            turbokv_cuda_set_rows(ctx, dst);
            return true;
        case GGML_OP_GET_ROWS:
            turbokv_cuda_get_rows(ctx, dst);
            return true;
        case GGML_OP_CPY:
            if (is_plain_copy(dst->src[0], dst)) {
                return false;
            }
            turbokv_cuda_cpy(ctx, dst->src[0], dst);
            return true;
        case GGML_OP_MUL_MAT:
            turbokv_cuda_mul_mat(ctx, dst);
            return true;
        case GGML_OP_FLASH_ATTN_EXT:
            turbokv_cuda_flash_attn_ext(ctx, dst);
            return true;
        default:
            return false;
    }
}

size_t turbokv_cuda_alloc_size(int device, const ggml_tensor * tensor) {
    if (tensor->op != GGML_OP_FLASH_ATTN_EXT || !(is_ours(tensor->src[1]) || is_ours(tensor->src[2]))) {
        return 0;
    }
    return turbokv_cuda_flash_attn_ext_alloc_size(device, tensor);
}
