// MUL_MAT: src0 of our types (a permuted view of the cache, its rows dense) times src1 (f32), to a dense f32 dst. Plane
// (i2, i3) of src1 meets plane (i2 / r2, i3 / r3) of src0. src0 is decoded to f32 once, then cuBLAS multiplies, one
// call for the planes of src1 that share one of src0. The slow path: with flash attention nobody comes here. Truth:
// ggml_compute_forward_mul_mat on the CPU, within the rounding of TF32.

#include "mul-mat.cuh"

#include "ggml-cuda/convert.cuh"

#include "view.cuh"

bool turbokv_cuda_mul_mat_supported(const ggml_tensor * dst) {
    const ggml_tensor * a = dst->src[0];
    const ggml_tensor * b = dst->src[1];
    return turbokv_is_ours(a->type) && b->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 &&
           a->nb[0] == ggml_type_size(a->type) && b->nb[0] == sizeof(float) && ggml_is_contiguous(dst);
}

void turbokv_cuda_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    GGML_TENSOR_BINARY_OP_LOCALS

    const int64_t               bytes = ggml_type_size(src0->type);
    ggml_cuda_pool_alloc<float> decoded(ctx.pool(), ggml_nelements(src0));
    ggml_get_to_fp32_nc_cuda(src0->type)(src0->data, decoded.get(), ne00, ne01, ne02, ne03, nb01 / bytes, nb02 / bytes,
                                         nb03 / bytes, ctx.stream());

    const cublasHandle_t handle = ctx.cublas_handle();
    CUBLAS_CHECK(cublasSetStream(handle, ctx.stream()));
    const float   one = 1.0f, zero = 0.0f;
    const int64_t r2  = ne12 / ne02;
    const int64_t r3  = ne13 / ne03;
    const int64_t ldb = std::max<int64_t>(nb11 / sizeof(float), ne10);
    for (int64_t i13 = 0; i13 < ne13; ++i13) {
        for (int64_t i02 = 0; i02 < ne02; ++i02) {
            const float * a = decoded.get() + (i13 / r3 * ne02 + i02) * ne01 * ne00;
            const float * b = (const float *) ((const char *) src1->data + i13 * nb13 + i02 * r2 * nb12);
            float *       c = (float *) dst->data + (i13 * ne12 + i02 * r2) * ne11 * ne01;
            CUBLAS_CHECK(cublasSgemmStridedBatched(handle, CUBLAS_OP_T, CUBLAS_OP_N, ne01, ne11, ne00, &one, a, ne00, 0,
                                                   b, ldb, nb12 / sizeof(float), &zero, c, ne01, ne01 * ne11, r2));
        }
    }
}
