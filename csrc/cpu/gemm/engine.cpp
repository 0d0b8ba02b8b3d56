#include "cpu/gemm/engine.h"

#include <ATen/Context.h>
#include <torch/version.h>

#include "cpu/isa.h"

namespace adacomcat {
namespace {

// Whether float32 products may lose precision. Torch before 2.14 is not asked.
bool precision_reduced() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 || precision == at::Float32Precision::BF16;
#else
  return false;
#endif
}

}  // namespace

const Engine& engine(Dtype dtype) {
  const InstructionSet& set = instruction_set();
  if (dtype == Dtype::bf16) return *set.bf16;
  return dtype == Dtype::f32 && precision_reduced() ? *set.reduced : *set.full;
}

const Engine& activation_engine(Dtype dtype) {
  const InstructionSet& set = instruction_set();
  return dtype == Dtype::bf16 ? *set.bf16_activations : *set.full;
}

const Engine& activation_engine(Dtype dtype, const Engine& weights) {
  return activation_engine(&weights == &int8_engine() ? weights.operand : dtype);
}

const Engine& int8_engine() { return *instruction_set().int8; }

}  // namespace adacomcat
