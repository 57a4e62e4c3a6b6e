// Attention in float64 over dequantized rows, and how far the CPU attention may be from it.
//
// The bound. Let a query block have the step t = max|q| / 127, and let int8 levels times their step be at most `off`
// from the codec's. With q = t Q + e, |e| <= t / 2, a score moves by at most
//     ds = scale * sum over blocks of t / 2 * ||k||_1 + (||q||_1 + n * t / 2) * off * d
// where d is the scale of K's block of n values; softcap only makes it smaller. Weights p_j e^(+-ds_j) in place of p_j
// move an output by at most
//     sum p_j (e^ds_j - 1) |v_j - out| / sum p_j e^-ds_j
// V adds off * sum p_j d_j and, per tile and key, half a unit of its integer probabilities, max(p_j d_j) / 16383, times
// the largest level; where V rotates, sqrt(block) times that. The terms of float32 rounding are marked below, and are
// all there is for float tiles.
//
// A bound lets all errors conspire. In truth those of rounding to steps are independent with a variance of t^2 / 12,
// which gives an output's error the expected square
//     sum p_j^2 var_j (v_j - out)^2
//     var_j = scale^2 * sum over blocks of t^2 / 12 * ||k||_2^2 + ||q||_2^2 * off_rms^2 * d^2
// A row's ratio is its sum of squared errors over their expectation.

#pragma once

#include <math.h>

#include "attention-op.h"
#include "turbokv-tables.h"

// Of a type in int8: the largest value, and how far levels are from the codec's, at most and in the mean square; all
// as multiples of the block's scale.
struct codebook {
    double largest, off, off_rms;
};

static struct codebook codebook_of(enum ggml_type type) {
    switch ((int) type) {
        case GGML_TYPE_TURBO2:
        case GGML_TYPE_TURBO2_64:
        case GGML_TYPE_TBQ2:
            return (struct codebook) { 1.511, 3.0e-4, 2.5e-4 };
        case GGML_TYPE_TURBO3:
        case GGML_TYPE_TURBO3_64:
        case GGML_TYPE_TBQ3:
            return (struct codebook) { 2.152, 1.7e-3, 1.2e-3 };
        case GGML_TYPE_TURBO4:
        case GGML_TYPE_TURBO4_64:
        case GGML_TYPE_TBQ4:
            return (struct codebook) { 2.733, 1.11e-2, 4.8e-3 };
        default:
            return (struct codebook) { 128.0, 0.0, 0.0 };
    }
}

static void decode(enum ggml_type type, const char * row, float * x, int n) {
    if (type == GGML_TYPE_F32) {
        memcpy(x, row, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(row, x, n);
    }
}

// To the basis of tbqN's levels: signs, then a Hadamard transform, in float64.
static void rotate(const float * x, double * y, int n) {
    for (int b = 0; b < n; b += TURBOKV_SRHT_SIZE) {
        for (int i = 0; i < TURBOKV_SRHT_SIZE; ++i) {
            y[b + i] = x[b + i] * (turbokv_srht_signs[i] / sqrt(TURBOKV_SRHT_SIZE));
        }
        for (int h = 1; h < TURBOKV_SRHT_SIZE; h *= 2) {
            for (int i = 0; i < TURBOKV_SRHT_SIZE; ++i) {
                if (!(i & h)) {
                    const double u = y[b + i], v = y[b + i + h];
                    y[b + i]     = u + v;
                    y[b + i + h] = u - v;
                }
            }
        }
    }
}

static void to_levels(const struct int8_format * f, const float * x, double * y, int n) {
    if (f && f->rotates) {
        rotate(x, y, n);
        return;
    }
    for (int i = 0; i < n; ++i) {
        y[i] = x[i];
    }
}

static double block_scale(const struct int8_format * f, const char * row, int block) {
    ggml_fp16_t d;
    memcpy(&d, row + (size_t) block * f->block_bytes + f->scale, sizeof(d));
    return fabs((double) ggml_fp16_to_fp32(d));
}

// A cache, decoded: per row its values, and per block what the bounds need.
struct decoded {
    const struct int8_format * f;
    int                        block, n_blocks;
    float *                    x;
    double *                   l1, *l2, *d;  // of the levels: sum of magnitudes, of squares; the block's scale
};

static struct decoded decode_rows(enum ggml_type type, bool is_v, const char * rows, int n, size_t n_rows) {
    struct decoded out = { .f = format_of(type, is_v) };
    out.block          = out.f ? out.f->block : n;
    out.n_blocks       = n / out.block;
    out.x              = allocate(n_rows * n * sizeof(float));
    out.l1             = allocate(n_rows * out.n_blocks * sizeof(double));
    out.l2             = allocate(n_rows * out.n_blocks * sizeof(double));
    out.d              = allocate(n_rows * out.n_blocks * sizeof(double));
    double * level     = allocate(n * sizeof(double));
    for (size_t r = 0; r < n_rows; ++r) {
        const char * row = rows + r * ggml_row_size(type, n);
        decode(type, row, out.x + r * n, n);
        to_levels(out.f, out.x + r * n, level, n);
        for (int b = 0; b < out.n_blocks; ++b) {
            double l1 = 0.0, l2 = 0.0;
            for (int i = b * out.block; i < (b + 1) * out.block; ++i) {
                l1 += fabs(level[i]);
                l2 += level[i] * level[i];
            }
            out.l1[r * out.n_blocks + b] = l1;
            out.l2[r * out.n_blocks + b] = l2;
            out.d[r * out.n_blocks + b]  = out.f ? block_scale(out.f, row, b) : 0.0;
        }
    }
    free(level);
    return out;
}

static void free_decoded(struct decoded * t) {
    free(t->x);
    free(t->l1);
    free(t->l2);
    free(t->d);
}

struct tally {
    double error, power;  // sums of squares
    double ratio;         // sum over rows
    int    n_rows;
    double worst;  // error of an element over its bound
};

static double slope_of(const struct shape * c, int head) {
    const int n = 1 << (int) floor(log2(n_head(c)));
    return c->max_bias <= 0.0f ? 1.0
           : head < n          ? exp2(-c->max_bias * (head + 1) / n)
                               : exp2(-c->max_bias / 2 * (2 * (head - n) + 1) / n);
}

// One row of the output against float64, element by element.
static void check_row(const struct shape * c, const struct inputs * in, const struct decoded * k,
                      const struct decoded * v, int seq, int pos, int head, const float * out, struct tally * t) {
    const double          u       = 0x1p-24;
    const struct codebook kc      = codebook_of(c->type_k);
    const struct codebook vc      = codebook_of(c->type_v);
    const ggml_fp16_t *   mask    = c->mask != NO_MASK ? mask_row(c, in, seq, head, pos) : NULL;
    const float *         q       = in->q + (((size_t) seq * c->n_q + pos) * n_head(c) + head) * c->dk;
    const size_t          row0    = (size_t) (seq % c->n_seq_kv) * c->n_kv * c->n_head_kv + head / c->group;
    const int             n_tiles = (c->n_kv + TILE - 1) / TILE;

    double   level[576], step[576 / 32], q1[576 / 32], q2[576 / 32], q_norm = 0.0;
    double * score = allocate(3 * c->n_kv * sizeof(double));  // then probabilities
    double * eps   = score + c->n_kv;                         // how far it may be off
    double * var   = eps + c->n_kv;                           // the expected square of that
    to_levels(k->f, q, level, c->dk);
    for (int b = 0; b < k->n_blocks; ++b) {
        step[b] = q1[b] = q2[b] = 0.0;
        for (int i = b * k->block; i < (b + 1) * k->block; ++i) {
            step[b] = fmax(step[b], k->f ? fabs(level[i]) / 127.0 : 0.0);
            q1[b] += fabs(level[i]);
            q2[b] += level[i] * level[i];
        }
        q_norm += q2[b];
    }
    q_norm = sqrt(q_norm);

    double top = c->sinks ? in->sinks[head] : -INFINITY;
    for (int j = 0; j < c->n_kv; ++j) {
        const size_t  row = row0 + (size_t) j * c->n_head_kv;
        const float * x   = k->x + row * c->dk;
        const double  m   = mask ? slope_of(c, head) * ggml_fp16_to_fp32(mask[j]) : 0.0;
        score[j]          = -INFINITY;
        eps[j]            = 0.0;
        if (m == -INFINITY) {
            continue;
        }
        double dot = 0.0, magnitude = 0.0, k_norm = 0.0, ds = 0.0;
        for (int i = 0; i < c->dk; ++i) {
            dot += (double) q[i] * x[i];
            magnitude += fabs((double) q[i] * x[i]);
        }
        var[j] = 0.0;
        for (int b = 0; b < k->n_blocks; ++b) {
            const size_t at = row * k->n_blocks + b;
            ds += 0.5001 * step[b] * k->l1[at] + (q1[b] + k->block * step[b]) * kc.off * k->d[at];
            var[j] += step[b] * step[b] / 12.0 * k->l2[at] + q2[b] * kc.off_rms * kc.off_rms * k->d[at] * k->d[at];
            k_norm += k->l2[at];
        }
        // float32: the sum, and for tbqN seven stages of additions on both sides
        ds += (c->dk + 16) * u * magnitude + 24 * u * q_norm * sqrt(k_norm);
        double s     = c->scale * dot;
        double slope = 1.0;  // of softcap
        if (c->softcap != 0.0f) {
            s     = c->softcap * tanh(s / c->softcap);
            slope = 1.0 - s * s / c->softcap / c->softcap;
        }
        score[j] = s + m;
        eps[j]   = c->scale * ds + 1e-6 * c->softcap + 8 * u * (fabs(s) + fabs(m));
        var[j] *= c->scale * c->scale * slope * slope;
        top = fmax(top, score[j]);
    }

    // 2^x has a relative error of 2e-7, and is applied again whenever a tile has a new maximum
    const double exp_error = 3e-7 * (n_tiles + 4);
    double       sum = 0.0, sum_low = 0.0, sink = 0.0, sink_eps = 0.0, worst_eps = 0.0;
    if (c->sinks) {
        sink_eps = exp_error + 8 * u * (fabs(in->sinks[head]) + fabs(top));
        sink     = exp(in->sinks[head] - top);
        sum += sink;
        sum_low += sink * exp(-sink_eps);
    }
    for (int j = 0; j < c->n_kv; ++j) {
        if (score[j] > -INFINITY) {
            eps[j] += exp_error + 8 * u * (fabs(score[j]) + fabs(top));
            worst_eps = fmax(worst_eps, eps[j]);
        }
        score[j] = exp(score[j] - top);
        score[j] = score[j] >= 0.0 ? score[j] : 0.0;  // NaN where nothing is seen
        sum += score[j];
        sum_low += score[j] > 0.0 ? score[j] * exp(-eps[j]) : 0.0;
    }

    // What V adds, the same for all places of a block: its levels, the integer probabilities of each tile.
    double v_bound[576 / 32] = { 0.0 }, v_expected[576 / 32] = { 0.0 }, v_norm[576 / 32] = { 0.0 };
    for (int b = 0; b < v->n_blocks; ++b) {
        for (int tile = 0; v->f && tile < n_tiles; ++tile) {
            double largest = 0.0;
            int    n_seen  = 0;
            for (int j = tile * TILE; j < (tile + 1) * TILE && j < c->n_kv; ++j) {
                const double w = score[j] * v->d[(row0 + (size_t) j * c->n_head_kv) * v->n_blocks + b];
                largest        = fmax(largest, w);
                v_bound[b] += vc.off * w;
                v_expected[b] += vc.off_rms * vc.off_rms * w * w;
                n_seen += w > 0.0;
            }
            const double unit = largest * vc.largest / 16383.0;
            v_bound[b] += 0.51 * unit * n_seen;
            v_expected[b] += unit * unit / 12.0 * n_seen;
        }
        for (int j = 0; j < c->n_kv; ++j) {
            v_norm[b] += score[j] * sqrt(v->l2[(row0 + (size_t) j * c->n_head_kv) * v->n_blocks + b]);
        }
    }

    double ref[512] = { 0.0 }, magnitude[512] = { 0.0 }, moved[512] = { 0.0 }, expected[512] = { 0.0 };
    for (int j = 0; j < c->n_kv; ++j) {
        const float * x = v->x + (row0 + (size_t) j * c->n_head_kv) * c->dv;
        for (int e = 0; e < c->dv && score[j] > 0.0; ++e) {
            ref[e] += score[j] * x[e];
            magnitude[e] += score[j] * fabs(x[e]);
        }
    }
    for (int e = 0; e < c->dv; ++e) {
        ref[e] = sum > 0.0 ? ref[e] / sum : 0.0;
    }
    for (int j = 0; j < c->n_kv; ++j) {
        const float * x    = v->x + (row0 + (size_t) j * c->n_head_kv) * c->dv;
        const double  more = expm1(eps[j]);
        for (int e = 0; e < c->dv && score[j] > 0.0; ++e) {
            const double w = score[j] * fabs(x[e] - ref[e]);
            moved[e] += w * more;
            expected[e] += w * w * var[j];
        }
    }
    const bool   rotates   = v->f && v->f->rotates;
    const double rounding  = (96 + 4 * n_tiles) * u;  // float32: sums over keys, tiles and chunks
    double       row_error = 0.0, row_expected = 0.0;
    for (int e = 0; e < c->dv; ++e) {
        double bound = 0.0;  // nothing is seen: exactly zero
        if (sum > 0.0) {
            const int    b = e / v->block;
            const double from_v =
                rotates ? v_bound[b] * sqrt(v->block) + rounding * v_norm[b] : v_bound[b] + rounding * magnitude[e];
            bound = (moved[e] + sink * expm1(sink_eps) * fabs(ref[e])) / sum_low + exp(2.0 * worst_eps) * from_v / sum +
                    2 * rounding * fabs(ref[e]) + 1e-26;
            row_expected += (expected[e] + v_expected[b]) / sum / sum + 2e-12 * ref[e] * ref[e];
        }
        const double error = fabs(out[e] - ref[e]);
        if (!(error <= bound)) {
            fail("%s: sequence %d, position %d, head %d, value %d: %.9g, float64 %.9g, bound %.3g", c->name, seq, pos,
                 head, e, out[e], ref[e], bound);
            break;
        }
        row_error += error * error;
        t->power += ref[e] * ref[e];
        t->worst = bound > 0.0 ? fmax(t->worst, error / bound) : t->worst;
    }
    if (row_expected > 0.0) {
        t->error += row_error;
        t->ratio += row_error / row_expected;
        t->n_rows++;
    }
    free(score);
}
