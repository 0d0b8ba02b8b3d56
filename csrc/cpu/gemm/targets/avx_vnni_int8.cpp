// AVX-VNNI: sums of four products of 8-bit integers, in vectors of 256 bits.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx2,avxvnni,fma,f16c")
#define ADACOMCAT_AVX2
#define ADACOMCAT_INT8_PRODUCTS
#define ADACOMCAT_16_BIT_ACTIVATIONS
#define ADACOMCAT_BYTE_DOT

namespace adacomcat::avx_vnni_int8 {
constexpr int kLanes = 8, kTileRows = 6, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::avx_vnni_int8

const adacomcat::Engine adacomcat::kAvxVnniInt8 = avx_vnni_int8::make_engine("avx_vnni_int8");
#endif
