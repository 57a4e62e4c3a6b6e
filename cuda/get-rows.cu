// GET_ROWS: the rows of src0 that src1 (i32) names, decoded to f32. Any strides; row i1 of plane (i2, i3) of dst is row
// ids[i1, i2, i3] of the same plane of src0. One warp per block.
// Truth: ggml_compute_forward_get_rows with dequantize_row_<type>; the floats are equal.

#include "get-rows.cuh"

#include "codec.cuh"
#include "view.cuh"

template <typename codec>
static __global__ void __launch_bounds__(TURBOKV_WARPS * WARP_SIZE)
    k_get_rows(const char * __restrict__ src, const char * __restrict__ ids, char * __restrict__ dst, const int64_t nb1,
               const int64_t nb2, const int64_t nb3, const int64_t ids_nb0, const int64_t ids_nb1,
               const int64_t ids_nb2, const turbokv_view dst_view, const int64_t n) {
    const int64_t i = turbokv_warp();
    if (i >= n) {
        return;
    }
    const turbokv_position p   = dst_view.position(i);
    const int64_t          row = *(const int32_t *) (ids + p.i1 * ids_nb0 + p.i2 * ids_nb1 + p.i3 * ids_nb2);
    const char *           x   = src + p.i0 * codec::block_bytes + row * nb1 + p.i2 * nb2 + p.i3 * nb3;
    turbokv_store_values(turbokv_load_indices<codec>((const uint8_t *) x), (float *) (dst + dst_view.offset(p)));
}

template <typename codec>
static void get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * ids = dst->src[1];
    const int64_t       n   = ggml_nelements(dst) / codec::qk;
    k_get_rows<codec><<<turbokv_grid(n), TURBOKV_WARPS * WARP_SIZE, 0, ctx.stream()>>>(
        (const char *) src->data, (const char *) ids->data, (char *) dst->data, src->nb[1], src->nb[2], src->nb[3],
        ids->nb[0], ids->nb[1], ids->nb[2], turbokv_view_of(dst, codec::qk), n);
    CUDA_CHECK(cudaGetLastError());
}

bool turbokv_cuda_get_rows_supported(const ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    return turbokv_is_ours(src->type) && dst->type == GGML_TYPE_F32 && dst->src[1]->type == GGML_TYPE_I32 &&
           src->nb[0] == ggml_type_size(src->type) && dst->nb[0] == sizeof(float);
}

void turbokv_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    turbokv_with_codec(dst->src[0]->type, [&](auto codec) { get_rows<decltype(codec)>(ctx, dst); });
}
