// SET_ROWS: rows of src0 (f32 or f16) are encoded into the rows of dst that src1 (i64 or i32) names. One warp per
// block. Any strides; the ids are shared by planes as on the CPU: row i1 of plane (i2, i3) goes to row ids[i1, i2 %
// ne11, i3 % ne12] of the same plane of dst. Ids out of range are the caller's fault, as upstream. Truth:
// ggml_compute_forward_set_rows with quantize_row_<type>; the bytes are equal.

#include "set-rows.cuh"

#include "codec.cuh"
#include "view.cuh"

struct turbokv_ids {
    const char * data;
    int64_t      nb0, nb1, nb2;
    uint3        n1, n2;
    bool         is_i64;

    __device__ __forceinline__ int64_t row(const turbokv_position & p) const {
        const char * id = data + p.i1 * nb0 + fastmodulo(p.i2, n1) * nb1 + fastmodulo(p.i3, n2) * nb2;
        return is_i64 ? *(const int64_t *) id : *(const int32_t *) id;
    }
};

template <typename codec, typename src_t>
static __global__ void __launch_bounds__(TURBOKV_WARPS * WARP_SIZE)
    k_set_rows(const char * __restrict__ src, char * __restrict__ dst, const turbokv_view src_view,
               const turbokv_ids ids, const int64_t nb1, const int64_t nb2, const int64_t nb3, const int64_t n) {
    const int64_t i = turbokv_warp();
    if (i >= n) {
        return;
    }
    const turbokv_position p   = src_view.position(i);
    const src_t *          row = (const src_t *) (src + src_view.offset(p));
    char *                 y   = dst + p.i0 * codec::block_bytes + ids.row(p) * nb1 + p.i2 * nb2 + p.i3 * nb3;
    turbokv_encode_block<codec>(row, (uint8_t *) y);
}

template <typename codec, typename src_t>
static void set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * ids = dst->src[1];
    const int64_t       n   = ggml_nelements(src) / codec::qk;
    if (n == 0) {
        return;
    }
    const turbokv_ids rows = {
        (const char *) ids->data,
        (int64_t) ids->nb[0],
        (int64_t) ids->nb[1],
        (int64_t) ids->nb[2],
        init_fastdiv_values(ids->ne[1]),
        init_fastdiv_values(ids->ne[2]),
        ids->type == GGML_TYPE_I64,
    };
    k_set_rows<codec, src_t><<<turbokv_grid(n), TURBOKV_WARPS * WARP_SIZE, 0, ctx.stream()>>>(
        (const char *) src->data, (char *) dst->data, turbokv_view_of(src, codec::qk), rows, dst->nb[1], dst->nb[2],
        dst->nb[3], n);
    CUDA_CHECK(cudaGetLastError());
}

bool turbokv_cuda_set_rows_supported(const ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * ids = dst->src[1];
    return (src->type == GGML_TYPE_F32 || src->type == GGML_TYPE_F16) &&
           (ids->type == GGML_TYPE_I64 || ids->type == GGML_TYPE_I32) && src->nb[0] == ggml_type_size(src->type) &&
           dst->nb[0] == ggml_type_size(dst->type);
}

void turbokv_cuda_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    turbokv_with_codec(dst->type, [&](auto codec) {
        if (dst->src[0]->type == GGML_TYPE_F32) {
            set_rows<decltype(codec), float>(ctx, dst);
        } else {
            set_rows<decltype(codec), half>(ctx, dst);
        }
    });
}
