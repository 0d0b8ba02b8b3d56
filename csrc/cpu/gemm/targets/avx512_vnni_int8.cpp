// AVX-512 VNNI: sums of four products of 8-bit integers.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_INT8_PRODUCTS
#define ADACOMCAT_16_BIT_ACTIVATIONS
#define ADACOMCAT_BYTE_DOT

namespace adacomcat::avx512_vnni_int8 {
constexpr int kLanes = 16, kTileRows = 12, kRowStep = kTileRows;
#include "cpu/gemm/engine-inl.h"
}  // namespace adacomcat::avx512_vnni_int8

const adacomcat::Engine adacomcat::kAvx512VnniInt8 = avx512_vnni_int8::make_engine("avx512_vnni_int8");
#endif
