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

// Throws std::runtime_error, which refuses the context, when a cache of ours would hold unrotated values.
void turbokv_check_rotation(ggml_type type_k, bool rotated_k, ggml_type type_v, bool rotated_v);
#endif
