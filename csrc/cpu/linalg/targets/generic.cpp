// Any CPU: the SVD alone.
#include "cpu/linalg/targets/prelude.h"

namespace adacomcat::generic {
constexpr int64_t kVectorBytes = 16;
namespace {
#include "cpu/linalg/simd-inl.h"
#include "cpu/linalg/jacobi-inl.h"
#include "cpu/linalg/batched_svd-inl.h"
}  // namespace
}  // namespace adacomcat::generic

const adacomcat::LinalgKernels adacomcat::kGenericLinalg{generic::batched_svd<float>,
                                                         generic::batched_svd<double>, nullptr};
