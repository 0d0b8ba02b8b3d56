// The activations that the compiled kernels apply, on the CPU and in CUDA. No torch: the .cu files
// include it.
#pragma once

namespace adacomcat {

enum class Activation : int { none, gelu, gelu_tanh, silu, relu, quick_gelu };

}  // namespace adacomcat
