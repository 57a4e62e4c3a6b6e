// Reads tests/golden/<type>.bin, which python/turbokv/golden.py writes: inputs, their bytes, and what those decode to.

#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct golden_file {
    int       n_blocks;
    float *   x;  // [n_blocks][block]
    uint8_t * q;  // [n_blocks][block bytes]
    float *   y;  // [n_blocks][block]
};

static void golden_free(struct golden_file * g) {
    free(g->x);
    free(g->q);
    free(g->y);
    memset(g, 0, sizeof(*g));
}

// False: `error` says what is wrong with the file.
static bool golden_read(const char * folder, const char * type_name, int type, int block, size_t block_bytes,
                        struct golden_file * g, char * error, size_t error_size) {
    memset(g, 0, sizeof(*g));
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s.bin", folder, type_name);
    FILE * file = fopen(path, "rb");
    if (file == NULL) {
        snprintf(error, error_size, "cannot open %s; scripts/generate.py writes it", path);
        return false;
    }
    char     magic[4]  = { 0 };
    uint32_t header[5] = { 0 };  // version, type id, block, block bytes, blocks; the file is little-endian
    size_t   n_read    = fread(magic, sizeof(magic), 1, file) + fread(header, sizeof(header), 1, file);
    if (n_read != 2 || memcmp(magic, "TKVG", 4) != 0 || header[0] != 1 || header[4] == 0 || header[4] > 1 << 20 ||
        header[1] != (uint32_t) type || header[2] != (uint32_t) block || header[3] != block_bytes) {
        snprintf(
            error, error_size,
            "header of %s: version %u, id %u, block %u, %u bytes, %u blocks; compiled: version 1, id %d, block %d, "
            "%zu bytes. Regenerate with scripts/generate.py",
            path, header[0], header[1], header[2], header[3], header[4], type, block, block_bytes);
        fclose(file);
        return false;
    }
    const size_t n = header[4], n_x = (size_t) block * sizeof(float);
    g->n_blocks = (int) n;
    g->x        = (float *) malloc(n * n_x);
    g->q        = (uint8_t *) malloc(n * block_bytes);
    g->y        = (float *) malloc(n * n_x);
    bool ok     = g->x != NULL && g->q != NULL && g->y != NULL;
    for (size_t i = 0; ok && i < n; ++i) {
        ok = fread(g->x + i * block, n_x, 1, file) + fread(g->q + i * block_bytes, block_bytes, 1, file) +
                 fread(g->y + i * block, n_x, 1, file) ==
             3;
    }
    if (!ok || fgetc(file) != EOF) {
        snprintf(error, error_size, "%s is not as long as its header says; regenerate with scripts/generate.py", path);
        golden_free(g);
        ok = false;
    }
    fclose(file);
    return ok;
}
