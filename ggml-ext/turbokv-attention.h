// GGML_OP_FLASH_ATTN_EXT on the CPU for K/V pairs with a type of ours: called by hooks in ggml's CPU backend.

#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "ggml.h"

struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// Computes `dst`, called by all threads of `params`. Returns false, having done nothing, when the op is not for us:
// then upstream's kernel goes on. Shapes, masks, ALiBi, softcap and sinks are those of ggml_flash_attn_ext().
//
// A query row gives the same bits whatever the number of rows, threads and streams beside it, so that token by token
// equals one batch. It gives the same bits on every instruction set, too, where K is a type of ours, q8_0 or q4_0 and V
// one of ours or q8_0: the types that have integer tiles (turbokv-tile.h).
bool turbokv_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Bytes of params->wdata that it needs with up to n_threads; 0 when the op is not for us.
size_t turbokv_flash_attn_ext_work_size(const struct ggml_tensor * dst, int n_threads);

#ifdef __cplusplus
}
#endif
