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

// One side of a KV cache as llama.cpp has set it up.
struct turbokv_side {
    const char * name;  // "K" or "V"
    ggml_type    type;
    bool         rotated;  // by the graph, before values are stored
    size_t       bytes;    // allocated
};

// For caches with a type of ours: logs effective types and bytes, where the tools show it by default. Throws
// std::runtime_error, which refuses the context, when values would be stored unrotated.
void turbokv_check_cache(const turbokv_side & k, const turbokv_side & v);
#endif
