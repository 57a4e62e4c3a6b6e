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
        PACKING_INT8,
        QK8_0,
        sizeof(block_q8_0),
        offsetof(block_q8_0, qs),
        32,
        offsetof(block_q8_0, d),
        32,
        false,
        false,
        false,
        1.0f,
        NULL,
    };
    static const struct int8_format q4_0 = {
        PACKING_PLANE4,
        QK4_0,
        sizeof(block_q4_0),
        offsetof(block_q4_0, qs),
        16,
        offsetof(block_q4_0, d),
        16,
        false,
        false,
        true,
        1.0f,
        levels_q4_0,
    };
    switch ((int) type) {
        case GGML_TYPE_Q8_0:
            return &q8_0;
        case GGML_TYPE_Q4_0:
            return &q4_0;
#include "turbokv-int8-formats.inc"
        default:
            return NULL;
    }
}

// ---- packed bytes side by side

// Where the indices of one block of every key are: in place, or, where they have to be split or are no multiple of 16
// bytes, in `copies`. Returns the bytes per row, a multiple of 16.
static int index_rows(const struct tile_source * src, int block, const uint8_t ** row, uint8_t * copies) {
    static const uint8_t       zeros[MAX_INDEX_BYTES] = { 0 };
    const struct int8_format * f                      = src->format;

    const uint8_t * data = (const uint8_t *) src->data + (size_t) block * f->block_bytes + f->indices;
    for (int key = 0; key < src->n_keys; ++key) {
        row[key] = data + key * src->stride;
    }
    for (int key = src->n_keys; key < TILE; ++key) {
        row[key] = zeros;
    }
    if (f->packing == PACKING_STREAM3) {
        for (int key = 0; key < src->n_keys; ++key, copies += MAX_INDEX_BYTES) {
            split_triples(row[key], copies);
            row[key] = copies;
        }
    } else if (f->index_bytes % 16 != 0) {
        for (int key = 0; key < src->n_keys; ++key, copies += MAX_INDEX_BYTES) {
            memcpy(copies, row[key], f->index_bytes);
            row[key] = copies;
        }
    }
    return (f->index_bytes + 15) / 16 * 16;
}

static void block_scales(const struct tile_source * src, int block, float * scales) {
    const struct int8_format * f    = src->format;
    const char *               data = src->data + (size_t) block * f->block_bytes + f->scale;

    ggml_half d[TILE];
    for (int key = 0; key < src->n_keys; ++key) {
        memcpy(&d[key], data + key * src->stride, sizeof(ggml_half));
    }
    for (int key = src->n_keys; key < TILE; ++key) {
        d[key] = 0;
    }
    for (int key = 0; key < TILE; key += VEC_LANES) {
        vf_store(scales + key, vf_mul(vf_half(d + key), vf_set1(f->step)));
    }
}

// Sets scales that are infinite or NaN to zero; returns a bit for each of them.
static uint64_t drop_bad_scales(float * scales) {
    uint32_t any = 0;
    for (int key = 0; key < TILE; ++key) {
        uint32_t bits;
        memcpy(&bits, scales + key, sizeof(bits));
        any |= (bits & 0x7f800000) == 0x7f800000;
    }
    uint64_t bad = 0;
    for (int key = 0; any && key < TILE; ++key) {
        if (!isfinite(scales[key])) {
            bad |= (uint64_t) 1 << key;
            scales[key] = 0.0f;
        }
    }
    return bad;
}

// ---- unpacking

// Packed words, and where their fields go. There are `groups` of `n` words each; field f of word i of a group goes to
// out[f * field_stride + i]. The second and third plane of PLANE21 and STREAM3 start plane_stride words behind the
// last.
struct unpacking {
    const uint32_t * in;
    uint32_t *       out;
    int              groups, in_group_stride, out_group_stride;
    int              n, plane_stride, field_stride;
};

TURBOKV_INLINE void unpack_group(enum packing packing, vt table, uint32_t offset, const struct unpacking * u,
                                 int group) {
    const uint32_t * in           = u->in + group * u->in_group_stride;
    uint32_t *       out          = u->out + group * u->out_group_stride;
    const int        n            = u->n;
    const int        plane_stride = u->plane_stride;
    const int        field_stride = u->field_stride;

    const vi ones = vi_set1(0x01010101);
    const vi low2 = vi_set1(0x03030303);
    const vi low3 = vi_set1(0x07070707);
    const vi low4 = vi_set1(0x0f0f0f0f);
    const vi four = vi_set1(0x04040404);
    const vi six  = vi_set1(0x06060606);

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

// One branch per tile, not per group.
static void unpack(enum packing packing, vt table, uint32_t offset, const struct unpacking * u) {
#define UNPACK(name)                                                                                                   \
    case name:                                                                                                         \
        for (int group = 0; group < u->groups; ++group) {                                                              \
            unpack_group(name, table, offset, u, group);                                                               \
        }                                                                                                              \
        break
    switch (packing) {
        UNPACK(PACKING_INT8);
        UNPACK(PACKING_PLANE2);
        UNPACK(PACKING_PLANE21);
        UNPACK(PACKING_PLANE4);
        UNPACK(PACKING_STREAM3);
    }
#undef UNPACK
}

static vt level_table(const struct int8_format * f, int offset, int8_t * buffer) {
    for (int i = 0; i < 16; ++i) {
        buffer[i] = (int8_t) (f->level ? f->level[i] + offset : 0);
    }
    return vt_load(buffer);
}

// The plane of 1-bit fields has half as many bytes as that of 2-bit fields: its second half continues in the odd bits.
// Of a short plane the last vector reaches behind its end, where nothing stands yet.
static void extend_high_plane(uint32_t * high, int n_words) {
    for (int i = 0; i < n_words; i += VEC_LANES) {
        vi_store(high + n_words + i, vi_shr(vi_load(high + i), 1));
    }
}

void turbokv_k_tile_int8(const struct tile_source * src, uint32_t * tile, float * scales) {
    const struct int8_format * f = src->format;
    const uint8_t *            row[TILE];
    _Alignas(64) uint8_t       copies[TILE * MAX_INDEX_BYTES];
    _Alignas(64) uint32_t      packed[MAX_INDEX_BYTES / 4 * TILE];
    int8_t                     levels[16];
    const vt                   table = level_table(f, TURBOKV_K_OFFSET, levels);

    assert(src->n % f->block == 0);
    for (int block = 0; block < src->n / f->block; ++block) {
        block_scales(src, block, scales + block * TILE);
        const int bytes = index_rows(src, block, row, copies);
        for (int column = 0; column < bytes; column += 16) {
            for (int key = 0; key < TILE; key += 4) {
                transpose_words(row + key, column, packed + column / 4 * TILE + key, TILE);
            }
        }
        const int plane_words = f->plane / 4;
        if (f->packing == PACKING_PLANE21) {
            extend_high_plane(packed + plane_words * TILE, plane_words / 2 * TILE);
        }
        const struct unpacking u = {
            .in           = packed,
            .out          = tile + block * (f->block / 4) * TILE,
            .groups       = 1,
            .n            = plane_words * TILE,
            .plane_stride = plane_words * TILE,
            .field_stride = plane_words * TILE,
        };
        unpack(f->packing, table, TURBOKV_K_OFFSET * 0x01010101u, &u);
    }
}

void turbokv_v_tile_int8(const struct tile_source * src, uint32_t * tile, float * scales, uint64_t * bad) {
    const struct int8_format * f = src->format;
    const uint8_t *            row[TILE];
    _Alignas(64) uint8_t       copies[TILE * MAX_INDEX_BYTES];
    _Alignas(64) uint32_t      packed[TILE / 4 * MAX_INDEX_BYTES];
    int8_t                     levels[16];
    const vt                   table = level_table(f, 0, levels);

    assert(src->n % f->block == 0);
    for (int block = 0; block < src->n / f->block; ++block) {
        block_scales(src, block, scales + block * TILE);
        bad[block]      = drop_bad_scales(scales + block * TILE);
        const int bytes = index_rows(src, block, row, copies);
        for (int quad = 0; quad < TILE / 4; ++quad) {
            uint32_t * words = packed + quad * MAX_INDEX_BYTES;
            for (int column = 0; column < bytes; column += 16) {
                interleave_bytes(row + 4 * quad, column, words + column);
            }
        }
        // In a second pass: a wide load right behind the narrow stores would wait for them.
        for (int quad = 0; f->packing == PACKING_PLANE21 && quad < TILE / 4; ++quad) {
            extend_high_plane(packed + quad * MAX_INDEX_BYTES + f->plane, f->plane / 2);
        }
        const struct unpacking u = {
            .in               = packed,
            .out              = tile + block * f->block,
            .groups           = TILE / 4,
            .in_group_stride  = MAX_INDEX_BYTES,
            .out_group_stride = src->n,
            .n                = f->plane,
            .plane_stride     = f->plane,
            .field_stride     = f->plane,
        };
        unpack(f->packing, table, 0, &u);
    }
}

static void float_row(const struct tile_source * src, int key, float * row) {
    const void * data = src->data + key * src->stride;
    if (key >= src->n_keys) {
        memset(row, 0, src->n * sizeof(float));
    } else if (src->type == GGML_TYPE_F32) {
        memcpy(row, data, src->n * sizeof(float));
    } else {
        ggml_get_type_traits(src->type)->to_float(data, row, src->n);
    }
}

void turbokv_k_tile_float(const struct tile_source * src, float * tile, float * row) {
    for (int key = 0; key < TILE; ++key) {
        float_row(src, key, row);
        for (int d = 0; d < src->n; ++d) {
            tile[d * TILE + key] = row[d];
        }
    }
}

void turbokv_v_tile_float(const struct tile_source * src, float * tile) {
    for (int key = 0; key < TILE; ++key) {
        float_row(src, key, tile + key * src->n);
    }
}
