// Tiles: TILE keys of one KV head, brought into the form in which the CPU attention multiplies them.
//
// A tile holds either int8 values with one float scale per key and block, or floats. int8 is for types that are an
// index into a table of 16 int8 levels, or int8 themselves, times a scale; everything else becomes floats.
//
// K tile   int8: word (c, key) at [c * TILE + key] holds values 4c .. 4c+3 of the key, plus TURBOKV_K_OFFSET
//          float: value d of a key at [d * TILE + key]
// V tile   int8: word (quad, d) at [quad * n + d] holds value d of keys 4*quad .. 4*quad+3
//          float: value d of a key at [key * n + d]
//
// Places in an int8 tile: of an interleaved format, place p of a block holds value turbokv_tile_order(format, p), so
// that unpacking needs no shuffle. Of all others, value p.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { TILE = 64 };

enum packing {
    PACKING_INT8,     // one int8 per value
    PACKING_PLANE2,   // a plane of 2-bit fields
    PACKING_PLANE21,  // a plane of 2-bit fields for the low bits, one of 1-bit fields for the high bit
    PACKING_PLANE4,   // a plane of 4-bit fields
    PACKING_STREAM3,  // eight indices in three bytes
};

// A type that fits into an int8 tile. value = scale of the block * step * level[index]
struct int8_format {
    enum packing   packing;
    int            block;         // values per block
    int            block_bytes;   // of which
    int            indices;       //   the indices start here,
    int            index_bytes;   //   are so many bytes,
    int            scale;         //   and the fp16 scale stands here
    int            plane;         // bytes of the (first) plane
    bool           interleaved;   // neighbouring fields are neighbouring values, not values `plane` apart
    bool           rotates;       // the codec rotates (SRHT)
    bool           signed_scale;  // scales may be negative: then V needs a float tile
    float          step;
    const int8_t * level;  // 16 of them; PACKING_INT8 has none
};

static inline int turbokv_tile_order(const struct int8_format * f, int place) {
    return f->interleaved ? place % f->plane * (f->block / f->plane) + place / f->plane : place;
}

// NULL: the type goes into a float tile.
const struct int8_format * turbokv_int8_format(enum ggml_type type);

// Rows of `n` values of `type`, n_keys (1 .. TILE) of them from `data`, `stride` bytes apart; of a short tile the rest
// is zero. n is a multiple of 32.
struct tile_source {
    enum ggml_type             type;
    const struct int8_format * format;
    const char *               data;
    size_t                     stride;
    int                        n;
    int                        n_keys;
};

// int8: writes n * TILE bytes, and for each block TILE scales, step included. Keys whose scale is not finite get
// scale 0 in a V tile, and `bad` gets a bit for each of them: bad[block]; in a K tile the scale stays as it is.
void turbokv_k_tile_int8(const struct tile_source * src, uint32_t * tile, float * scales);
void turbokv_v_tile_int8(const struct tile_source * src, uint32_t * tile, float * scales, uint64_t * bad);

// float: writes n * TILE floats; `row` is scratch of n floats.
void turbokv_k_tile_float(const struct tile_source * src, float * tile, float * row);
void turbokv_v_tile_float(const struct tile_source * src, float * tile);

#ifdef __cplusplus
}
#endif
