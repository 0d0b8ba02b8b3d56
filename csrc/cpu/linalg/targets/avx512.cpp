// AVX-512.
#include "cpu/linalg/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")

namespace adacomcat::avx512 {
constexpr int64_t kVectorBytes = 64;
#include "cpu/linalg/kernels-inl.h"
}  // namespace adacomcat::avx512

const adacomcat::LinalgKernels adacomcat::kAvx512Linalg = avx512::kKernels;
#endif
