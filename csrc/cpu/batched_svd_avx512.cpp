// The SVD for CPUs with AVX512.
#include "batched_svd.h"

#ifdef ADACOMCAT_X86_KERNELS
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>
// After the standard headers: what they define must run on every CPU.
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#define ISA avx512
#define VECTOR_BYTES 64
#include "batched_svd_core.h"

namespace adacomcat::avx512 {
SvdStatus batched_svd(const SvdProblem<float>& p) { return Svd<float>(p).run(); }
SvdStatus batched_svd(const SvdProblem<double>& p) { return Svd<double>(p).run(); }
}  // namespace adacomcat::avx512
#endif
