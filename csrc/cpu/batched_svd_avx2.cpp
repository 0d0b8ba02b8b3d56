// The SVD for CPUs with AVX2.
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
#pragma GCC target("avx2,fma")
#define ISA avx2
#define VECTOR_BYTES 32
#include "batched_svd_core.h"

namespace adacomcat::avx2 {
SvdStatus batched_svd(const SvdProblem<float>& p) { return Svd<float>(p).run(); }
SvdStatus batched_svd(const SvdProblem<double>& p) { return Svd<double>(p).run(); }
}  // namespace adacomcat::avx2
#endif
