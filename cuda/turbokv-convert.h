// Included by upstream's convert.cu, and only there: what it defines gets another name, and cuda/convert.cu defines
// the getters that everybody else calls. They return a kernel for our types and ask upstream's for all others.

#pragma once

#define ggml_get_to_fp16_cuda    turbokv_upstream_to_fp16_cuda
#define ggml_get_to_fp32_cuda    turbokv_upstream_to_fp32_cuda
#define ggml_get_to_fp16_nc_cuda turbokv_upstream_to_fp16_nc_cuda
#define ggml_get_to_fp32_nc_cuda turbokv_upstream_to_fp32_nc_cuda
#define ggml_get_to_bf16_nc_cuda turbokv_upstream_to_bf16_nc_cuda
