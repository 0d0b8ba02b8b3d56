// Gram matrices and eigenvalues for CPUs with AVX2.
#include "spectrum.h"

#ifdef ADACOMCAT_X86_KERNELS
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
// After the standard headers: what they define must run on every CPU.
#pragma GCC target("avx2,fma")
#define ISA avx2
#define VECTOR_BYTES 32
#include "spectrum_core.h"

namespace adacomcat::avx2 {
const Spectrum kSpectrum{kPanel, pack<float>, pack<double>, add_products, eigenvalues};
}
#endif
