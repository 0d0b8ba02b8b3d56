// The MLP that low_rank_mlp, dense_mlp and gated_mlp share:
//
//   x̂ → in → up → activation → down → out → y
//
// x̂ is x or its layer norm. `in` and `up` are the factors V1 and U1 of W1, `down` and `out` the factors V2
// and U2 of W2. With a dense W1 there is no `in`, with a dense W2 no `out`. In a gated MLP the activation
// is that of `gate`, which multiplies what `up` does, and h = act(gate) · up.
#pragma once

#include <optional>

#include "cpu/runtime/gemv.h"
#include "cpu/runtime/packed_weight.h"

namespace adacomcat {

// What a call says besides x and the weights.
struct MlpOptions {
  const OptionalTensor &b1, &b2;
  std::optional<std::string_view> activation;
  std::optional<double> epsilon;  // of the layer norm, if there is one
  const OptionalTensor& residual;
  const OptionalTensor* gate_bias = nullptr;  // of a gated MLP
};

// Packed weights; those that an MLP does not have are empty.
struct MlpWeights {
  PackedWeight in, up, down, out, gate{};

  bool has_in() const { return in.data != nullptr; }
  bool has_out() const { return out.data != nullptr; }
  bool gated() const { return gate.data != nullptr; }
};

// Products of packed weights. x V1 and act(...) V2 are stored in middle1 and middle2 if these have
// elements.
void run_mlp(const Engine& e, const Tensor& x, const MlpWeights& weights, const MlpOptions& options,
             const Tensor& y, const Tensor& middle1 = {}, const Tensor& middle2 = {});

// Weights that are not packed, and the columns of in, up and down.
struct MlpGemvWeights {
  std::optional<GemvWeight> in;
  GemvWeight up, down;
  std::optional<GemvWeight> out;
  int64_t inner, hidden, middle;
};

// The same for a few rows.
void run_mlp_gemv(const Engine& e, const Tensor& x, const MlpGemvWeights& weights,
                  const MlpOptions& options, const Tensor& y);

}  // namespace adacomcat
