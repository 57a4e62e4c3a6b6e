// What libllama asks turbokv: which cache type serves a model, and whether its values arrive rotated.

#pragma once

#include <stddef.h>

#include "ggml.h"
#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Replaces the short names in *type_k and *type_v by the types that serve this model: the 128-block where it
// divides every head size, else the 64-block, and logs each replacement. Other types pass through. Returns
// false, with the reason and the types that work in the log, when no block size fits.
LLAMA_API bool turbokv_resolve_cache_types(const struct llama_model * model, enum ggml_type * type_k,
                                           enum ggml_type * type_v);

// Bytes allocated for the cache of a context, over all its buffers.
LLAMA_API size_t turbokv_cache_bytes(const struct llama_context * ctx);

#ifdef __cplusplus
}

class llama_kv_cache;
struct llama_hparams;

// Whether the graph may rotate the values of a cache type: false for our types that rotate by themselves.
bool turbokv_graph_rotates(ggml_type type);

// For caches with a type of ours: logs effective types and bytes, where the tools show it by default. Throws
// std::runtime_error, which refuses the context, when values would be stored unrotated, or when the device that holds
// the cache cannot compute the attention: llama.cpp would copy the cache to the CPU at every step and say nothing.
// For upstream's types that happens with a warning. v_trans: whether V is transposed, that is, without flash attention.
void turbokv_check_cache(const llama_kv_cache & cache, const llama_hparams & hparams, ggml_type type_k,
                         ggml_type type_v, bool v_trans, size_t bytes_k, size_t bytes_v);

// K-shift: k is a view of the first n_rot values of every cached head, [n_rot, n_head_kv, n_cells]. Quantized blocks
// can only be rewritten whole, and the Hadamard transform runs over whole heads: returns the view with head_dim
// values where k is quantized, else k. Views that begin inside the head (MLA) are returned as they are.
ggml_tensor * turbokv_whole_heads(ggml_context * ctx, ggml_tensor * k, int64_t head_dim);
#endif
