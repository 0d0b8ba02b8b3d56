// AVX-512: 32 registers of sixteen floats hold a tile of 12 by 32.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512

namespace adacomcat::avx512 {
constexpr int kLanes = 16, kTileRows = 12, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::avx512

const adacomcat::Engine adacomcat::kAvx512 = avx512::make_engine("avx512");
#endif
