// y = act(x W1ᵀ + b1) W2ᵀ + b2 + residual in two launches. A block that kept the hidden layer to itself
// would read all of both weights for its few rows, which takes longer than the hidden layer does.
#include "kernels.h"

namespace adacomcat::cuda {

const char* dense_mlp(Dtype dtype, const DenseMlp& p, Stream stream) {
  const char* error = project(
      dtype,
      {p.rows, p.in, p.x, {}, {p.w1, p.b1, p.hidden, p.width}, {}, {}, p.activation, p.epsilon},
      stream);
  if (error) return error;
  return project(dtype,
                 {p.rows,
                  p.width,
                  {p.hidden, p.width},
                  p.residual,
                  {p.w2, p.b2, p.y, p.out},
                  {},
                  {},
                  Activation::none,
                  kNoNorm},
                 stream);
}

}  // namespace adacomcat::cuda
