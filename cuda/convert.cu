// Whole tensors of our types to f32, f16 or bf16: the getters of conversion kernels that upstream's CUDA backend calls.
// For other types they ask upstream's own, which turbokv-convert.h has renamed.
//
// The kernels write y densely. x is dense, or strided (_nc): ne values, and s01, s02, s03 blocks from row to row, plane
// to plane, ..; y is aligned to a pair of values. Each warp decodes BLOCKS neighbouring blocks, whose loads are in
// flight together: prefill does this with the whole cache, and memory bandwidth should be its limit. Truth:
// dequantize_row_<type>; the floats are equal, f16 and bf16 are those floats rounded to nearest.

#include "ggml-cuda/convert.cuh"

#include "codec.cuh"
#include "view.cuh"

to_fp16_cuda_t    turbokv_upstream_to_fp16_cuda(ggml_type type);
to_fp32_cuda_t    turbokv_upstream_to_fp32_cuda(ggml_type type);
to_fp16_nc_cuda_t turbokv_upstream_to_fp16_nc_cuda(ggml_type type);
to_fp32_nc_cuda_t turbokv_upstream_to_fp32_nc_cuda(ggml_type type);
to_bf16_nc_cuda_t turbokv_upstream_to_bf16_nc_cuda(ggml_type type);

static constexpr int BLOCKS = 4;  // per warp

// dense: x is, and view is not looked at.
template <bool dense, typename codec, typename T>
static __global__ void __launch_bounds__(TURBOKV_WARPS * WARP_SIZE)
    k_convert(const uint8_t * __restrict__ x, T * __restrict__ y, const turbokv_view view, const int64_t n) {
    const int64_t first = BLOCKS * turbokv_warp();
    const auto    load  = [&](int64_t i) {
        return turbokv_load_indices<codec>(x + (dense ? i * codec::block_bytes : view.offset(view.position(i))));
    };
    if (first + BLOCKS <= n) {
        turbokv_indices<codec> in[BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            in[b] = load(first + b);
        }
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            turbokv_store_values<true>(in[b], y + (first + b) * codec::qk);
        }
        return;
    }
    for (int64_t i = first; i < n; ++i) {
        turbokv_store_values<true>(load(i), y + i * codec::qk);
    }
}

template <bool dense, typename codec, typename T>
static void launch(const void * x, T * y, const turbokv_view & view, int64_t n, cudaStream_t stream) {
    GGML_ASSERT(n <= INT32_MAX && (uintptr_t) y % (2 * sizeof(T)) == 0);
    const int64_t grid = turbokv_grid((n + BLOCKS - 1) / BLOCKS);
    k_convert<dense, codec, T><<<grid, TURBOKV_WARPS * WARP_SIZE, 0, stream>>>((const uint8_t *) x, y, view, n);
    CUDA_CHECK(cudaGetLastError());
}

template <typename codec, typename T>
static void convert_nc(const void * x, T * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03, int64_t s01,
                       int64_t s02, int64_t s03, cudaStream_t stream) {
    GGML_ASSERT(ne00 % codec::qk == 0);
    constexpr int64_t bytes = codec::block_bytes;
    const int64_t     n     = ne00 / codec::qk * ne01 * ne02 * ne03;
    if (n > 0) {
        const turbokv_view view = { init_fastdiv_values(ne00 / codec::qk),
                                    init_fastdiv_values(ne01),
                                    init_fastdiv_values(ne02),
                                    bytes,
                                    s01 * bytes,
                                    s02 * bytes,
                                    s03 * bytes };
        launch<false, codec>(x, y, view, n, stream);
    }
}

template <typename codec, typename T>
static void convert(const void * x, T * y, int64_t k, cudaStream_t stream) {
    GGML_ASSERT(k % codec::qk == 0);
    if (k > 0) {
        launch<true, codec>(x, y, {}, k / codec::qk, stream);
    }
}

template <typename T>
static to_t_cuda_t<T> getter(ggml_type type) {
    return turbokv_with_codec(type, [](auto codec) -> to_t_cuda_t<T> { return convert<decltype(codec), T>; });
}

template <typename T>
static to_t_nc_cuda_t<T> getter_nc(ggml_type type) {
    return turbokv_with_codec(type, [](auto codec) -> to_t_nc_cuda_t<T> { return convert_nc<decltype(codec), T>; });
}

to_fp16_cuda_t ggml_get_to_fp16_cuda(ggml_type type) {
    return turbokv_is_ours(type) ? getter<half>(type) : turbokv_upstream_to_fp16_cuda(type);
}

to_fp32_cuda_t ggml_get_to_fp32_cuda(ggml_type type) {
    return turbokv_is_ours(type) ? getter<float>(type) : turbokv_upstream_to_fp32_cuda(type);
}

to_fp16_nc_cuda_t ggml_get_to_fp16_nc_cuda(ggml_type type) {
    return turbokv_is_ours(type) ? getter_nc<half>(type) : turbokv_upstream_to_fp16_nc_cuda(type);
}

to_fp32_nc_cuda_t ggml_get_to_fp32_nc_cuda(ggml_type type) {
    return turbokv_is_ours(type) ? getter_nc<float>(type) : turbokv_upstream_to_fp32_nc_cuda(type);
}

to_bf16_nc_cuda_t ggml_get_to_bf16_nc_cuda(ggml_type type) {
    return turbokv_is_ours(type) ? getter_nc<nv_bfloat16>(type) : turbokv_upstream_to_bf16_nc_cuda(type);
}
