// AVX2, products of 8-bit integers, which are extended to 16 bits.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx2,fma,f16c")
#define ADACOMCAT_AVX2
#define ADACOMCAT_INT8_PRODUCTS
#define ADACOMCAT_16_BIT_ACTIVATIONS

namespace adacomcat::avx2_int8 {
constexpr int kLanes = 8, kTileRows = 6, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::avx2_int8

const adacomcat::Engine adacomcat::kAvx2Int8 = avx2_int8::make_engine("avx2_int8");
#endif
