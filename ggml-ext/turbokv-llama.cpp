#include "turbokv-llama.h"

#include <numeric>
#include <stdexcept>
#include <string>

#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory.h"
#include "llama-model.h"

namespace {

// The types behind one short name: the one that users name, and the one for heads that 128 does not divide.
struct type_family {
    ggml_type block_128;
    ggml_type block_64;       // GGML_TYPE_COUNT: there is none
    bool      graph_rotates;  // else the codec rotates, and the graph must not
};

const type_family families[] = {
#include "turbokv-families.inc"
};

const type_family * family_of(ggml_type type) {
    for (const auto & family : families) {
        if (type == family.block_128 || type == family.block_64) {
            return &family;
        }
    }
    return nullptr;
}

// What a block has to divide on one side of the cache.
struct head_sizes {
    uint32_t common = 0;  // greatest common divisor over the layers
    bool     differ = false;

    void add(uint32_t head_dim) {
        differ = differ || (common != 0 && head_dim != common);
        common = std::gcd(common, head_dim);
    }
};

bool resolve(const char * side, const head_sizes & heads, ggml_type * type) {
    const uint32_t      head_dim = heads.common;
    const type_family * family   = family_of(*type);
    if (family == nullptr || head_dim % ggml_blck_size(*type) == 0) {
        return true;
    }
    if (family->block_64 != GGML_TYPE_COUNT && head_dim % ggml_blck_size(family->block_64) == 0) {
        LLAMA_LOG_WARN("turbokv: %s %s -> %s (head_dim %u)\n", side, ggml_type_name(*type),
                       ggml_type_name(family->block_64), head_dim);
        *type = family->block_64;
        return true;
    }
    const bool turbo_fits = head_dim % 64 == 0 && !heads.differ;  // else llama.cpp may not rotate
    LLAMA_LOG_ERROR(
        "turbokv: %s cache type %s needs heads of a multiple of %d values%s; "
        "this model has head_dim %u%s. Types that work here: %s%sf16, bf16\n",
        side, ggml_type_name(*type), family->graph_rotates ? 64 : 128,
        family->graph_rotates ? ", because llama.cpp rotates no others" : ", its block", head_dim,
        heads.differ ? " (common divisor of its layers)" : "", turbo_fits ? "turbo4, turbo3, turbo2, " : "",
        head_dim % 32 == 0 ? "q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, " : "");
    return false;
}

// Asked of the method that makes the rotation's input: the flags behind it are private, and change their names.
bool rotates(const llama_kv_cache & cache, ggml_tensor * (llama_kv_cache::*build_input_rot)(ggml_context *) const) {
    ggml_context * scratch = ggml_init({ ggml_tensor_overhead(), nullptr, /*no_alloc*/ true });
    const bool     rotated = (cache.*build_input_rot)(scratch) != nullptr;
    ggml_free(scratch);
    return rotated;
}

void require_rotation(const char * side, ggml_type type, bool rotated, size_t bytes) {
    const type_family * family = family_of(type);
    if (family != nullptr && family->graph_rotates && !rotated && bytes > 0) {  // some models store no V
        throw std::runtime_error(std::string("turbokv: ") + side + " cache type " + ggml_type_name(type) +
                                 " stores rotated values, but llama.cpp does not rotate " + side +
                                 " here (LLAMA_ATTN_ROT_DISABLE is set, or the head size differs between layers). "
                                 "Unset the variable, or use a type that rotates by itself (tbq4, tbq3, tbq2; heads "
                                 "of a multiple of 128 values), q8_0 or f16");
    }
}

// The operation that reads the keys of a layer, laid out as llama.cpp's graph does it, for n_tokens queries; without
// flash attention the product of keys and queries alone. Tensors have no memory.
ggml_tensor * attention(ggml_context * ctx, const llama_hparams & hparams, uint32_t il, ggml_type type_k,
                        ggml_type type_v, bool flash, int64_t n_tokens) {
    const int64_t n_kv    = 256;
    const int64_t dim_k   = hparams.n_embd_head_k(il);
    const int64_t dim_v   = hparams.n_embd_head_v(il);
    const int64_t heads   = hparams.n_head(il);
    const int64_t kv_head = hparams.n_head_kv(il);
    auto          rows    = [&](ggml_type type, int64_t dim, int64_t n_head, int64_t n) {
        return ggml_permute(ctx, ggml_new_tensor_4d(ctx, type, dim, n_head, n, 1), 0, 2, 1, 3);
    };
    ggml_tensor * q = rows(GGML_TYPE_F32, dim_k, heads, n_tokens);
    ggml_tensor * k = rows(type_k, dim_k, kv_head, n_kv);
    if (!flash) {
        return ggml_mul_mat(ctx, k, q);
    }
    ggml_tensor * v    = rows(type_v, dim_v, kv_head, n_kv);
    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_kv, n_tokens, 1, 1);
    return ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, hparams.f_max_alibi_bias,
                               hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);
}

// The first layer whose attention `device` does not compute, -1 if there is none.
int first_without_attention(ggml_backend_dev_t device, const llama_hparams & hparams, ggml_type type_k,
                            ggml_type type_v, bool flash) {
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || hparams.n_head_kv(il) == 0 ||
            hparams.n_embd_head_k(il) % ggml_blck_size(type_k) != 0 ||
            hparams.n_embd_head_v(il) % ggml_blck_size(type_v) != 0) {
            continue;  // no attention there, or none that a tensor of its own can stand for
        }
        for (const int64_t n_tokens : { 1, 512 }) {
            ggml_context * ctx = ggml_init({ 16 * ggml_tensor_overhead(), nullptr, /*no_alloc*/ true });
            const bool     computes =
                ggml_backend_dev_supports_op(device, attention(ctx, hparams, il, type_k, type_v, flash, n_tokens));
            ggml_free(ctx);
            if (!computes) {
                return int(il);
            }
        }
    }
    return -1;
}

void require_attention(const llama_kv_cache & cache, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v,
                       bool flash) {
    for (const auto & [buft, bytes] : cache.memory_breakdown()) {
        ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
        if (bytes == 0 || device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            continue;
        }
        const int il = first_without_attention(device, hparams, type_k, type_v, flash);
        if (il < 0) {
            continue;
        }
        const std::string what = std::string(ggml_backend_dev_name(device)) + " has no " + (flash ? "" : "plain ") +
                                 "attention for K " + ggml_type_name(type_k) + " with V " + ggml_type_name(type_v) +
                                 " and heads of " + std::to_string(hparams.n_embd_head_k(il)) + " values";
        if (family_of(type_k) != nullptr || family_of(type_v) != nullptr) {
            throw std::runtime_error("turbokv: " + what + ". Use " +
                                     (flash ? "another type for K or V" : "flash attention (--flash-attn on)") +
                                     ", or the CPU (--gpu-layers 0)");
        }
        if (flash) {
            LLAMA_LOG_WARN("turbokv: %s: llama.cpp falls back to something slower\n", what.c_str());
        }
    }
}

}  // namespace

bool turbokv_resolve_cache_types(const llama_model * model, ggml_type * type_k, ggml_type * type_v) {
    const auto & hparams = model->hparams;
    if (family_of(*type_k) == nullptr && family_of(*type_v) == nullptr) {
        return true;
    }
    if (hparams.is_mla() || model->arch == LLM_ARCH_DEEPSEEK4) {
        LLAMA_LOG_ERROR(
            "turbokv: this model caches a latent vector (MLA), which the turbokv types do not serve; "
            "use q8_0, f16 or bf16 for K and V\n");
        return false;
    }
    head_sizes k;
    head_sizes v;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (hparams.has_kv(il)) {
            k.add(hparams.n_embd_head_k(il));
            v.add(hparams.n_embd_head_v(il));
        }
    }
    if (hparams.indexer_head_size > 0) {
        k.add(hparams.indexer_head_size);
        const type_family * family = family_of(*type_k);
        if (family != nullptr && family->graph_rotates) {
            LLAMA_LOG_ERROR(
                "turbokv: K cache type %s stores rotated values, but this model also caches the keys of an indexer, "
                "which "
                "llama.cpp does not rotate; use q8_0, f16 or bf16 for K\n",
                ggml_type_name(*type_k));
            return false;
        }
    }
    return resolve("K", k, type_k) && resolve("V", v, type_v);
}

bool turbokv_graph_rotates(ggml_type type) {
    const type_family * family = family_of(type);
    return family == nullptr || family->graph_rotates;
}

void turbokv_check_cache(const llama_kv_cache & cache, const llama_hparams & hparams, ggml_type type_k,
                         ggml_type type_v, bool v_trans, size_t bytes_k, size_t bytes_v) {
    require_rotation("K", type_k, rotates(cache, &llama_kv_cache::build_input_k_rot), bytes_k);
    require_rotation("V", type_v, rotates(cache, &llama_kv_cache::build_input_v_rot), bytes_v);
    if (bytes_v > 0 && (ggml_is_quantized(type_k) || ggml_is_quantized(type_v))) {  // the keys of an indexer have no V
        require_attention(cache, hparams, type_k, type_v, !v_trans);
    }
    if (bytes_k + bytes_v > 0 && (family_of(type_k) != nullptr || family_of(type_v) != nullptr)) {
        // a warning only in level: the tools hide libllama's info lines
        LLAMA_LOG_WARN("turbokv: cache K %s %zu bytes, V %s %zu bytes\n", ggml_type_name(type_k), bytes_k,
                       ggml_type_name(type_v), bytes_v);
    }
}

ggml_tensor * turbokv_whole_heads(ggml_context * ctx, ggml_tensor * k, int64_t head_dim) {
    if (!ggml_is_quantized(k->type) || k->ne[0] == head_dim || k->view_offs % k->nb[1] != 0) {
        return k;
    }
    return ggml_view_3d(ctx, k->view_src, head_dim, k->ne[1], k->ne[2], k->nb[1], k->nb[2], k->view_offs);
}

size_t turbokv_cache_bytes(const llama_context * ctx) {
    size_t     bytes  = 0;
    const auto memory = llama_get_memory(ctx);
    if (memory != nullptr) {
        for (const auto & [buft, size] : memory->memory_breakdown()) {
            bytes += size;
        }
    }
    return bytes;
}
