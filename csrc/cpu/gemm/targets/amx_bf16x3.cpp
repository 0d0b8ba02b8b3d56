// AMX for float32, each float split into three bfloat16. All else is AVX-512.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_AMX
#define ADACOMCAT_BF16X3_PRODUCTS

namespace adacomcat::amx_bf16x3 {
constexpr int kLanes = 16, kTileRows = 32, kRowStep = 16;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::amx_bf16x3

const adacomcat::Engine adacomcat::kAmxBf16x3 = amx_bf16x3::make_engine("amx");
#endif
