// AVX-512 BF16: products of pairs of bfloat16 with float32 sums.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_BF16_OPERANDS
#define ADACOMCAT_16_BIT_ACTIVATIONS

namespace adacomcat::avx512_bf16 {
constexpr int kLanes = 16, kTileRows = 12, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::avx512_bf16

const adacomcat::Engine adacomcat::kAvx512Bf16 = avx512_bf16::make_engine("avx512_bf16");
#endif
