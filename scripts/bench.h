// What the benchmarks of an operation share: options, cache types by name, times. Included once, by a program that
// defines HELP and PROGRAM before.

#pragma once

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "ggml.h"

[[noreturn]] static void fail(int code, const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "%s: ", PROGRAM);
    vfprintf(stderr, fmt, args);
    fputs(code == 2 ? "\n--help shows the options.\n" : "\n", stderr);
    va_end(args);
    exit(code);
}

static std::string format(const char * fmt, ...) {
    char    text[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    return text;
}

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return (x[(x.size() - 1) / 2] + x[x.size() / 2]) / 2;
}

static std::vector<float> gaussian(int64_t n) {
    static std::mt19937             rng(42);
    std::normal_distribution<float> normal;
    std::vector<float>              x(n);
    std::generate(x.begin(), x.end(), [&] { return normal(rng); });
    return x;
}

// ---- options

struct number_option {
    const char * name;
    int64_t *    value;
    int64_t      max;  // from 1 on
};

struct text_option {
    const char *  name;
    std::string * value;
};

struct flag_option {
    const char * name;
    bool *       value;
};

static void parse_options(int argc, char ** argv, const std::vector<number_option> & numbers,
                          const std::vector<text_option> & texts, const std::vector<flag_option> & flags) {
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "--help" || arg == "-h") {
            fputs(HELP, stdout);
            exit(0);
        }
        const auto named = [&](const auto & option) { return arg == option.name; };
        const auto flag  = std::find_if(flags.begin(), flags.end(), named);
        if (flag != flags.end()) {
            *flag->value = true;
            continue;
        }
        const auto number = std::find_if(numbers.begin(), numbers.end(), named);
        const auto text   = std::find_if(texts.begin(), texts.end(), named);
        if (number == numbers.end() && text == texts.end()) {
            fail(2, "unknown argument '%s'", argv[i]);
        }
        if (++i == argc) {
            fail(2, "%s needs a value", arg.c_str());
        }
        if (text != texts.end()) {
            *text->value = argv[i];
            continue;
        }
        char * end;
        *number->value = strtoll(argv[i], &end, 10);
        if (end == argv[i] || *end != '\0' || *number->value < 1 || *number->value > number->max) {
            fail(2, "%s takes a whole number from 1 to %lld, not '%s'", number->name, (long long) number->max, argv[i]);
        }
    }
}

// Of attention over a cache.
struct shape_options {
    int64_t n_head, n_head_kv;
    int64_t head_size = 128;
    int64_t depth;
    int64_t batch = 1;

    // The options of all these, and more.
    std::vector<number_option> numbers(const std::vector<number_option> & more) {
        std::vector<number_option> all = {
            { "--heads", &n_head, 1024 },   { "--kv-heads", &n_head_kv, 1024 }, { "--head-size", &head_size, 1024 },
            { "--depth", &depth, 1 << 22 }, { "--batch", &batch, 1 << 16 },
        };
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }

    void check() const {
        if (n_head % n_head_kv != 0) {
            fail(2, "--heads %d is no multiple of --kv-heads %d", (int) n_head, (int) n_head_kv);
        }
        if (batch > depth) {
            fail(2, "--batch %d is more than --depth %d, which includes it", (int) batch, (int) depth);
        }
    }
};

// ---- caches

// As in llama.cpp's tools a short name stands for the block size that fits the heads; of the types there are.
static ggml_type cache_type(const std::string & name, int64_t head_size, const std::vector<ggml_type> & types) {
    std::string names, blocks;
    for (ggml_type t : types) {
        if (name == ggml_type_name(t) || name + "_64" == ggml_type_name(t)) {
            if (head_size % ggml_blck_size(t) == 0) {
                return t;
            }
            blocks += format(blocks.empty() ? "%d" : " or %d", (int) ggml_blck_size(t));
        }
        names += std::string(" ") + ggml_type_name(t);
    }
    if (blocks.empty()) {
        fail(2, "'%s' is no cache type. There are:%s", name.c_str(), names.c_str());
    }
    fail(2, "%s has blocks of %s values, which do not divide heads of %d", name.c_str(), blocks.c_str(),
         (int) head_size);
}

// K/V, or one name for both.
struct cache_pair {
    ggml_type   type_k = GGML_TYPE_F32, type_v = GGML_TYPE_F32;
    std::string name;

    cache_pair() = default;

    cache_pair(const std::string & pair, int64_t head_size, const std::vector<ggml_type> & types) {
        const size_t slash = pair.find('/');
        type_k             = cache_type(pair.substr(0, slash), head_size, types);
        type_v             = cache_type(pair.substr(slash == std::string::npos ? 0 : slash + 1), head_size, types);
        name               = ggml_type_name(type_k);
        if (type_k != type_v) {
            name += std::string("/") + ggml_type_name(type_v);
        }
    }
};
