// AVX-512 VNNI: products of 16-bit integers, one scale for each row of the lhs and each column of the
// rhs. One engine stands in for bfloat16. The other serves float32 if the user allows less precision;
// its activations are as accurate as those of float32.
#include "cpu/gemm/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,prefer-vector-width=512")
#define ADACOMCAT_AVX512
#define ADACOMCAT_INT16_PRODUCTS

namespace adacomcat::avx512_vnni {
constexpr int kLanes = 16, kTileRows = 12, kRowStep = kTileRows;
namespace float32 {
#include "cpu/gemm/engine-inl.h"
}
#define ADACOMCAT_16_BIT_ACTIVATIONS
namespace bfloat16 {
#include "cpu/gemm/engine-inl.h"
}
}  // namespace adacomcat::avx512_vnni

const adacomcat::Engine adacomcat::kAvx512VnniFloat =
    avx512_vnni::float32::make_engine("avx512_vnni");
const adacomcat::Engine adacomcat::kAvx512Vnni = avx512_vnni::bfloat16::make_engine("avx512_vnni");
#endif
