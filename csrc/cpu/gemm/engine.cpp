#include "cpu/gemm/engine.h"

#include <atomic>

#include "cpu/isa.h"

namespace adacomcat {
namespace {

std::atomic<bool> precision_reduced{false};

}  // namespace

void reduce_float32(bool reduce) { precision_reduced.store(reduce, std::memory_order_relaxed); }

const Engine& engine(Dtype dtype) {
  const InstructionSet& set = instruction_set();
  if (dtype == Dtype::bf16) return *set.bf16;
  const bool reduced = dtype == Dtype::f32 && precision_reduced.load(std::memory_order_relaxed);
  return reduced ? *set.reduced : *set.full;
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
