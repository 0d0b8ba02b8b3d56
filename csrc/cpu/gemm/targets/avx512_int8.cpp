// AVX-512 without VNNI, products of 8-bit integers, which are extended to 16 bits.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_INT8_PRODUCTS
#define ADACOMCAT_16_BIT_ACTIVATIONS

namespace adacomcat::avx512_int8 {
constexpr int kLanes = 16, kTileRows = 12, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::avx512_int8

const adacomcat::Engine adacomcat::kAvx512Int8 = avx512_int8::make_engine("avx512_int8");
#endif
