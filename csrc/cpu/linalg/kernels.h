// The decompositions of one instruction set.
#pragma once

#include "cpu/linalg/batched_svd.h"
#include "cpu/linalg/spectrum.h"

namespace adacomcat {

struct LinalgKernels {
  SvdKernel<float> svd_float;
  SvdKernel<double> svd_double;
  const Spectrum* spectrum;  // null if there is none
};

}  // namespace adacomcat
