// Packed rows -> tiles. Bytes of several keys are first brought side by side, while they are still packed; after that
// unpacking is one shift and one mask for all lanes, and the same code for K, whose lanes are keys, and V, whose lanes
// are places in a row. Truth: dequantize_row_<type>, compared in tests/c/test-turbokv-attention.c.

#include "turbokv-tile.h"

#include <assert.h>

#include "turbokv-quants.h"
#include "turbokv-simd.h"
#include "turbokv-tables.h"

enum { MAX_INDEX_BYTES = 64 };

static const int8_t levels_q4_0[16] = { -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7 };

const struct int8_format * turbokv_int8_format(enum ggml_type type) {
    static const struct int8_format q8_0 = {
        PACKING_INT8, QK8_0, sizeof(block_q8_0), offsetof(block_q8_0, qs), 32, offsetof(block_q8_0, d), 32, false, false,
        false, 1.0f, NULL,
    };
    static const struct int8_format q4_0 = {
        PACKING_PLANE4, QK4_0, sizeof(block_q4_0), offsetof(block_q4_0, qs), 16, offsetof(block_q4_0, d), 16, false, false,
        true, 1.0f, levels_q4_0,
    };
    switch ((int) type) {
        case GGML_TYPE_Q8_0: return &q8_0;
        case GGML_TYPE_Q4_0: return &q4_0;
#include "turbokv-int8-formats.inc"
        default: return NULL;
    }
}

// ---- packed bytes side by side

// The indices of one block of every key, as rows of a multiple of 16 bytes: in place, or copied to `copies`.
static int index_rows(const struct tile_source * src, int block, const uint8_t ** row, uint8_t * copies) {
    static const uint8_t       zeros[MAX_INDEX_BYTES] = { 0 };
    const struct int8_format * f                      = src->format;

    const bool split = f->packing == PACKING_STREAM3;
    const bool pad   = f->index_bytes % 16 != 0;
    const int  bytes = (f->index_bytes + 15) / 16 * 16;
    for (int key = 0; key < TILE; ++key) {
        if (key >= src->n_keys) {
            row[key] = zeros;
            continue;
        }
        row[key] = (const uint8_t *) src->data + key * src->stride + (size_t) block * f->block_bytes + f->indices;
        if (split || pad) {
            uint8_t * copy = copies + key * MAX_INDEX_BYTES;
            if (split) {
                split_triples(row[key], copy);
            } else {
                memcpy(copy, row[key], f->index_bytes);
            }
            row[key] = copy;
        }
    }
    return bytes;
}

static void block_scales(const struct tile_source * src, int block, float * scales) {
    const struct int8_format * f = src->format;

    ggml_half d[TILE] = { 0 };
    for (int key = 0; key < src->n_keys; ++key) {
        memcpy(&d[key], src->data + key * src->stride + (size_t) block * f->block_bytes + f->scale, sizeof(ggml_half));
    }
    for (int key = 0; key < TILE; key += VEC_LANES) {
        vf_store(scales + key, vf_mul(vf_half(d + key), vf_set1(f->step)));
    }
}

// ---- unpacking

// Unpacks `n` words of packed bytes. Field f of word i goes to out[f * field_stride + i]; for PLANE21 and STREAM3 the
// second and third plane of bytes start at plane_stride and 2 * plane_stride.
static inline void unpack(enum packing packing, vt table, uint32_t offset, const uint32_t * in, int plane_stride,
                          int n, uint32_t * out, int field_stride) {
    const vi ones  = vi_set1(0x01010101);
    const vi low2  = vi_set1(0x03030303);
    const vi low3  = vi_set1(0x07070707);
    const vi low4  = vi_set1(0x0f0f0f0f);
    const vi four  = vi_set1(0x04040404);
    const vi six   = vi_set1(0x06060606);

#define PUT(field, index) vi_store(out + (field) * field_stride + i, vi_lookup(table, index))
    switch (packing) {
        case PACKING_INT8:
            for (int i = 0; i < n; i += VEC_LANES) {
                vi_store(out + i, vi_xor(vi_load(in + i), vi_set1(offset)));
            }
            break;
        case PACKING_PLANE2:
            for (int i = 0; i < n; i += VEC_LANES) {
                const vi x = vi_load(in + i);
                PUT(0, vi_and(x, low2));
                PUT(1, vi_and(vi_shr(x, 2), low2));
                PUT(2, vi_and(vi_shr(x, 4), low2));
                PUT(3, vi_and(vi_shr(x, 6), low2));
            }
            break;
        case PACKING_PLANE21:
            for (int i = 0; i < n; i += VEC_LANES) {
                const vi x = vi_load(in + i);
                const vi h = vi_load(in + plane_stride + i);
                PUT(0, vi_or(vi_and(x, low2), vi_and(vi_shl(h, 2), four)));
                PUT(1, vi_or(vi_and(vi_shr(x, 2), low2), vi_and(h, four)));
                PUT(2, vi_or(vi_and(vi_shr(x, 4), low2), vi_and(vi_shr(h, 2), four)));
                PUT(3, vi_or(vi_and(vi_shr(x, 6), low2), vi_and(vi_shr(h, 4), four)));
            }
            break;
        case PACKING_PLANE4:
            for (int i = 0; i < n; i += VEC_LANES) {
                const vi x = vi_load(in + i);
                PUT(0, vi_and(x, low4));
                PUT(1, vi_and(vi_shr(x, 4), low4));
            }
            break;
        case PACKING_STREAM3:  // index k is bits 3k .. 3k+2 of the 24 bits of a, b, c
            for (int i = 0; i < n; i += VEC_LANES) {
                const vi a = vi_load(in + i);
                const vi b = vi_load(in + plane_stride + i);
                const vi c = vi_load(in + 2 * plane_stride + i);
                PUT(0, vi_and(a, low3));
                PUT(1, vi_and(vi_shr(a, 3), low3));
                PUT(2, vi_or(vi_and(vi_shr(a, 6), low2), vi_and(vi_shl(b, 2), four)));
                PUT(3, vi_and(vi_shr(b, 1), low3));
                PUT(4, vi_and(vi_shr(b, 4), low3));
                PUT(5, vi_or(vi_and(vi_shr(b, 7), ones), vi_and(vi_shl(c, 1), six)));
                PUT(6, vi_and(vi_shr(c, 2), low3));
                PUT(7, vi_and(vi_shr(c, 5), low3));
            }
            break;
    }
#undef PUT
}

static vt level_table(const struct int8_format * f, int offset, int8_t * buffer) {
    for (int i = 0; i < 16; ++i) {
        buffer[i] = (int8_t) (f->level ? f->level[i] + offset : 0);
    }
    return vt_load(buffer);
}

// The plane of 1-bit fields has half as many bytes as that of 2-bit fields: its second half continues in the odd bits.
static void extend_high_plane(uint32_t * high, int n_words) {
    for (int i = 0; i < n_words; ++i) {
        high[n_words + i] = high[i] >> 1;
    }
}

void turbokv_k_tile_int8(const struct tile_source * src, uint32_t * tile, float * scales) {
    const struct int8_format * f = src->format;
    const uint8_t *            row[TILE];
    uint8_t                    copies[TILE * MAX_INDEX_BYTES];
    uint32_t                   packed[MAX_INDEX_BYTES / 4 * TILE];
    int8_t                     levels[16];
    const vt                   table = level_table(f, TURBOKV_K_OFFSET, levels);

    assert(src->n % f->block == 0);
    for (int block = 0; block < src->n / f->block; ++block) {
        block_scales(src, block, scales + block * TILE);
        const int bytes = index_rows(src, block, row, copies);
        for (int column = 0; column < bytes; column += 16) {
            for (int key = 0; key < TILE; key += 4) {
                const uint8_t * at[4];
                for (int r = 0; r < 4; ++r) {
                    at[r] = row[key + r] + column;
                }
                transpose_words(at, packed + column / 4 * TILE + key, TILE);
            }
        }
        const int plane_words = f->plane / 4;
        if (f->packing == PACKING_PLANE21) {
            extend_high_plane(packed + plane_words * TILE, plane_words / 2 * TILE);
        }
        unpack(f->packing, table, TURBOKV_K_OFFSET * 0x01010101u, packed, plane_words * TILE, plane_words * TILE,
               tile + block * (f->block / 4) * TILE, plane_words * TILE);
    }
}

void turbokv_v_tile_int8(const struct tile_source * src, uint32_t * tile, float * scales, uint64_t * bad) {
    const struct int8_format * f = src->format;
    const uint8_t *            row[TILE];
    uint8_t                    copies[TILE * MAX_INDEX_BYTES];
    uint32_t                   packed[MAX_INDEX_BYTES];
    int8_t                     levels[16];
    const vt                   table = level_table(f, 0, levels);

    assert(src->n % f->block == 0);
    for (int block = 0; block < src->n / f->block; ++block) {
        float * d = scales + block * TILE;
        block_scales(src, block, d);
        bad[block] = 0;
        for (int key = 0; key < TILE; ++key) {
            if (!isfinite(d[key])) {
                bad[block] |= (uint64_t) 1 << key;
                d[key] = 0.0f;
            }
        }
        const int bytes = index_rows(src, block, row, copies);
        for (int quad = 0; quad < TILE / 4; ++quad) {
            for (int column = 0; column < bytes; column += 16) {
                const uint8_t * at[4];
                for (int r = 0; r < 4; ++r) {
                    at[r] = row[4 * quad + r] + column;
                }
                interleave_bytes(at, packed + column);
            }
            if (f->packing == PACKING_PLANE21) {
                extend_high_plane(packed + f->plane, f->plane / 2);
            }
            unpack(f->packing, table, 0, packed, f->plane, f->plane, tile + quad * src->n + block * f->block, f->plane);
        }
    }
}

void turbokv_k_tile_float(const struct tile_source * src, float * tile, float * row) {
    const ggml_to_float_t to_float = ggml_get_type_traits(src->type)->to_float;
    for (int key = 0; key < TILE; ++key) {
        const void * data = src->data + key * src->stride;
        if (key >= src->n_keys) {
            memset(row, 0, src->n * sizeof(float));
        } else if (src->type == GGML_TYPE_F32) {
            memcpy(row, data, src->n * sizeof(float));
        } else {
            to_float(data, row, src->n);
        }
        for (int d = 0; d < src->n; ++d) {
            tile[d * TILE + key] = row[d];
        }
    }
}

void turbokv_v_tile_float(const struct tile_source * src, float * tile) {
    const ggml_to_float_t to_float = ggml_get_type_traits(src->type)->to_float;
    for (int key = 0; key < TILE; ++key) {
        const void * data = src->data + key * src->stride;
        float *      row  = tile + key * src->n;
        if (key >= src->n_keys) {
            memset(row, 0, src->n * sizeof(float));
        } else if (src->type == GGML_TYPE_F32) {
            memcpy(row, data, src->n * sizeof(float));
        } else {
            to_float(data, row, src->n);
        }
    }
}
