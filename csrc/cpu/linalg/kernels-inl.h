// All decompositions of one instruction set.
namespace {

#include "cpu/linalg/simd-inl.h"
#include "cpu/linalg/jacobi-inl.h"
#include "cpu/linalg/batched_svd-inl.h"
#include "cpu/linalg/spectrum-inl.h"

constexpr LinalgKernels kKernels{batched_svd<float>, batched_svd<double>, &kSpectrum};

}  // namespace
