// Attention over our types: which way, and the way through upstream's kernels.
// Truth: tests/c/test-turbokv-ops.cpp (float64).

#include "flash-attn.cuh"

#include "convert.cuh"
#include "ggml-cuda/fattn.cuh"

// Of K and V in fp16, as many KV heads as fit in here are converted at a time, at least one.
#define SCRATCH_BYTES ((size_t) 64 << 20)

// The operation over n_head_kv KV heads of one stream, as upstream's kernels see it: K and V in fp16.
struct part {
    ggml_tensor q, k, v, mask, sinks, dst;
};

struct convert_plan {
    int64_t n_head_kv;       // at a time; all of them have the same
    size_t  k, v, dst, end;  // bytes from dst->data; k, v = 0: is fp16 already
};

// `head` counts KV heads.
static void make_part(const ggml_tensor * dst, const convert_plan & plan, int64_t stream, int64_t head, part & x) {
    const ggml_tensor * q   = dst->src[0];
    const int64_t       gqa = q->ne[2] / dst->src[1]->ne[2];
    const int64_t       n   = plan.n_head_kv;

    x.q       = *q;
    x.q.ne[2] = n * gqa;
    x.q.ne[3] = 1;
    x.q.data  = (char *) q->data + head * gqa * q->nb[2] + stream * q->nb[3];

    const int64_t kv_stream = stream / (q->ne[3] / dst->src[1]->ne[3]);
    const auto    kv        = [&](const ggml_tensor * from, size_t scratch, ggml_tensor & to) {
        to       = *from;
        to.ne[2] = n;
        to.ne[3] = 1;
        to.data  = (char *) from->data + head * from->nb[2] + kv_stream * from->nb[3];
        if (scratch) {
            to.type  = GGML_TYPE_F16;
            to.nb[0] = sizeof(half);
            to.nb[1] = to.nb[0] * to.ne[0];
            to.nb[2] = to.nb[1] * to.ne[1];
            to.nb[3] = to.nb[2] * to.ne[2];
            to.data  = (char *) dst->data + scratch;
        }
        to.view_src = nullptr;
    };
    kv(dst->src[1], plan.k, x.k);
    kv(dst->src[2], plan.v, x.v);

    x.dst        = *dst;
    x.dst.ne[1]  = n * gqa;
    x.dst.ne[3]  = 1;
    x.dst.nb[2]  = x.dst.nb[1] * x.dst.ne[1];
    x.dst.nb[3]  = x.dst.nb[2] * x.dst.ne[2];
    x.dst.data   = (char *) dst->data + plan.dst;
    x.dst.src[0] = &x.q;
    x.dst.src[1] = &x.k;
    x.dst.src[2] = &x.v;
    if (const ggml_tensor * mask = dst->src[3]) {
        x.mask       = *mask;
        x.mask.ne[3] = 1;
        x.mask.data  = (char *) mask->data + stream % mask->ne[3] * mask->nb[3];
        if (mask->ne[2] > 1) {
            x.mask.ne[2] = n * gqa;
            x.mask.data  = (char *) x.mask.data + head * gqa * mask->nb[2];
        }
        x.dst.src[3] = &x.mask;
    }
    if (const ggml_tensor * sinks = dst->src[4]) {
        x.sinks       = *sinks;
        x.sinks.ne[0] = n * gqa;
        x.sinks.data  = (char *) sinks->data + head * gqa * sinks->nb[0];
        x.dst.src[4]  = &x.sinks;
    }
}

static convert_plan make_convert_plan(const ggml_tensor * dst) {
    const ggml_tensor * k      = dst->src[1];
    const ggml_tensor * v      = dst->src[2];
    const size_t        k_head = k->type == GGML_TYPE_F16 ? 0 : k->ne[0] * k->ne[1] * sizeof(half);
    const size_t        v_head = v->type == GGML_TYPE_F16 ? 0 : v->ne[0] * v->ne[1] * sizeof(half);

    convert_plan plan = {};
    plan.n_head_kv    = k->ne[2];
    float max_bias;
    memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
    if (max_bias == 0.0f) {  // ALiBi counts all heads
        while (plan.n_head_kv > 1 &&
               (k->ne[2] % plan.n_head_kv != 0 || plan.n_head_kv * (k_head + v_head) > SCRATCH_BYTES)) {
            plan.n_head_kv--;
        }
    }
    plan.end            = GGML_PAD(ggml_nbytes(dst), 128);
    const auto allocate = [&](size_t bytes) {
        const size_t at = bytes ? plan.end : 0;
        plan.end        = GGML_PAD(plan.end + bytes, 128);
        return at;
    };
    plan.k   = allocate(plan.n_head_kv * k_head);
    plan.v   = allocate(plan.n_head_kv * v_head);
    // upstream's kernels write whole tensors
    plan.dst = plan.n_head_kv < k->ne[2] ? allocate(ggml_nbytes(dst) / (k->ne[2] / plan.n_head_kv) / dst->ne[3]) : 0;
    return plan;
}

static bool can_convert(int device, const ggml_tensor * dst) {
    for (const ggml_tensor * x : { dst->src[1], dst->src[2] }) {
        if (x->type != GGML_TYPE_F16 &&
            (ggml_get_to_fp16_nc_cuda(x->type) == nullptr || x->nb[0] != ggml_type_size(x->type))) {
            return false;
        }
    }
    // Upstream's kernels are compiled with a softcap for these heads only, which its check does not say.
    float softcap;
    memcpy(&softcap, (const float *) dst->op_params + 2, sizeof(float));
    const int64_t head_size = dst->src[1]->ne[0];
    if (softcap != 0.0f && head_size != 128 && head_size != 256 && head_size != 512) {
        return false;
    }
    part x;
    make_part(dst, make_convert_plan(dst), 0, 0, x);
    return ggml_cuda_flash_attn_ext_supported(device, &x.dst);
}

static void convert(const ggml_tensor * from, int64_t stream, int64_t head, ggml_tensor & to, cudaStream_t s) {
    if (from->type == GGML_TYPE_F16) {
        return;
    }
    const size_t size = ggml_type_size(from->type);
    ggml_get_to_fp16_nc_cuda(from->type)((const char *) from->data + head * from->nb[2] + stream * from->nb[3],
                                         (half *) to.data, to.ne[0], to.ne[1], to.ne[2], 1, from->nb[1] / size,
                                         from->nb[2] / size, from->nb[3] / size, s);
}

static void flash_attn_converted(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const convert_plan  plan = make_convert_plan(dst);
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    for (int64_t stream = 0; stream < q->ne[3]; ++stream) {
        for (int64_t head = 0; head < k->ne[2]; head += plan.n_head_kv) {
            part x;
            make_part(dst, plan, stream, head, x);
            char * out = (char *) dst->data + stream * dst->nb[3] + head * (q->ne[2] / k->ne[2]) * dst->nb[1];
            if (!plan.dst) {
                x.dst.data = out;
            }
            const int64_t kv_stream = stream / (q->ne[3] / k->ne[3]);
            convert(k, kv_stream, head, x.k, ctx.stream());
            convert(dst->src[2], kv_stream, head, x.v, ctx.stream());
            ggml_cuda_flash_attn_ext(ctx, &x.dst);
            if (plan.dst) {
                CUDA_CHECK(cudaMemcpy2DAsync(out, dst->nb[2], x.dst.data, x.dst.nb[2], x.dst.nb[2], dst->ne[2],
                                             cudaMemcpyDeviceToDevice, ctx.stream()));
            }
        }
    }
}

// The first way, if it can.
static bool shall_decode(int device, const ggml_tensor * dst) {
    return dst->src[0]->ne[1] <= TURBOKV_DECODE_MAX_QUERIES || !can_convert(device, dst);
}

bool turbokv_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || (dst->src[3] && dst->src[3]->type != GGML_TYPE_F16) ||
        k->ne[2] != v->ne[2] || q->ne[2] % k->ne[2] != 0 || k->ne[3] != v->ne[3] || q->ne[3] % k->ne[3] != 0) {
        return false;
    }
    return turbokv_cuda_decode_alloc_size(device, dst) > 0 || can_convert(device, dst);
}

size_t turbokv_cuda_flash_attn_ext_alloc_size(int device, const ggml_tensor * dst) {
    const size_t decode = shall_decode(device, dst) ? turbokv_cuda_decode_alloc_size(device, dst) : 0;
    return decode ? decode : make_convert_plan(dst).end;
}

void turbokv_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!shall_decode(ctx.device, dst) || !turbokv_cuda_decode(ctx, dst)) {
        flash_attn_converted(ctx, dst);
    }
}
