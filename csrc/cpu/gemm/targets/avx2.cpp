// AVX2 with FMA and F16C: 16 registers of eight floats hold a tile of 6 by 16.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx2,fma,f16c")
#define ADACOMCAT_AVX2

namespace adacomcat::avx2 {
constexpr int kLanes = 8, kTileRows = 6, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::avx2

const adacomcat::Engine adacomcat::kAvx2 = avx2::make_engine("avx2");
#endif
