// AMX: products of tiles of bfloat16 pairs with float32 sums. All else is AVX-512.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_AMX
#define ADACOMCAT_BF16_OPERANDS
#define ADACOMCAT_16_BIT_ACTIVATIONS

namespace adacomcat::amx {
constexpr int kLanes = 16, kTileRows = 32, kRowStep = 16;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::amx

const adacomcat::Engine adacomcat::kAmx = amx::make_engine("amx");
#endif
