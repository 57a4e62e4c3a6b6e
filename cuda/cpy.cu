// CPY: f32 or f16 -> ours and back, elements in order, shapes may differ. Any strides but dense rows; rows of both are
// whole blocks. The K-shift decodes a permuted view of the cache to f32 with it, and encodes it back. One warp per
// block. Truth: ggml_compute_forward_dup on the CPU, for contiguous destinations; bytes and floats are equal.

#include "cpy.cuh"

#include "codec.cuh"
#include "view.cuh"

template <typename codec, typename src_t>
static __global__ void __launch_bounds__(TURBOKV_WARPS * WARP_SIZE)
    k_cpy_encode(const char * __restrict__ src, char * __restrict__ dst, const turbokv_view src_view,
                 const turbokv_view dst_view, const int64_t n) {
    const int64_t i = turbokv_warp();
    if (i >= n) {
        return;
    }
    const src_t * row = (const src_t *) (src + src_view.offset(src_view.position(i)));
    turbokv_encode_block<codec>(row, (uint8_t *) dst + dst_view.offset(dst_view.position(i)));
}

template <typename codec, typename dst_t>
static __global__ void __launch_bounds__(TURBOKV_WARPS * WARP_SIZE)
    k_cpy_decode(const char * __restrict__ src, char * __restrict__ dst, const turbokv_view src_view,
                 const turbokv_view dst_view, const int64_t n) {
    const int64_t i = turbokv_warp();
    if (i >= n) {
        return;
    }
    const uint8_t * x = (const uint8_t *) src + src_view.offset(src_view.position(i));
    dst_t *         y = (dst_t *) (dst + dst_view.offset(dst_view.position(i)));
    turbokv_store_values(turbokv_load_indices<codec>(x), y);
}

template <typename codec, typename float_t, bool encode>
static void cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    const int64_t n      = ggml_nelements(src) / codec::qk;
    const auto    kernel = encode ? k_cpy_encode<codec, float_t> : k_cpy_decode<codec, float_t>;
    kernel<<<turbokv_grid(n), TURBOKV_WARPS * WARP_SIZE, 0, ctx.stream()>>>(
        (const char *) src->data, (char *) dst->data, turbokv_view_of(src, codec::qk), turbokv_view_of(dst, codec::qk),
        n);
    CUDA_CHECK(cudaGetLastError());
}

bool turbokv_cuda_cpy_supported(const ggml_tensor * src, const ggml_tensor * dst) {
    const bool          encode = turbokv_is_ours(dst->type);
    const ggml_tensor * ours   = encode ? dst : src;
    const ggml_tensor * floats = encode ? src : dst;
    const int64_t       qk     = ggml_blck_size(ours->type);
    return turbokv_is_ours(ours->type) && (floats->type == GGML_TYPE_F32 || floats->type == GGML_TYPE_F16) &&
           ours->nb[0] == ggml_type_size(ours->type) && floats->nb[0] == ggml_type_size(floats->type) &&
           ours->ne[0] % qk == 0 && floats->ne[0] % qk == 0;
}

void turbokv_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    const bool encode = turbokv_is_ours(dst->type);
    turbokv_with_codec(encode ? dst->type : src->type, [&](auto codec) {
        using codec_t = decltype(codec);
        if (encode) {
            src->type == GGML_TYPE_F32 ? cpy<codec_t, float, true>(ctx, src, dst)
                                       : cpy<codec_t, half, true>(ctx, src, dst);
        } else {
            dst->type == GGML_TYPE_F32 ? cpy<codec_t, float, false>(ctx, src, dst)
                                       : cpy<codec_t, half, false>(ctx, src, dst);
        }
    });
}
