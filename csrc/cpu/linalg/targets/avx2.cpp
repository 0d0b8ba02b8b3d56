// AVX2.
#include "cpu/linalg/targets/prelude.h"

#ifdef ADACOMCAT_X86
#pragma GCC target("avx2,fma")

namespace adacomcat::avx2 {
constexpr int64_t kVectorBytes = 32;
#include "cpu/linalg/kernels-inl.h"
}  // namespace adacomcat::avx2

const adacomcat::LinalgKernels adacomcat::kAvx2Linalg = avx2::kKernels;
#endif
