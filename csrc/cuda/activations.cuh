// The activations, elementwise in float32, to the precision of the type that their results go to.
//
// For 16-bit results GELU evaluates a polynomial instead of erf, the one of kernels/activations.py: at
// rank 128 erf takes the scalar units as long as the tensor cores need for the same hidden unit.
#pragma once

#include "kernels.h"
#include "primitives.cuh"

namespace adacomcat::cuda {

// 1 - Φ(t) for t of 0 to 4.04 (bfloat16) or 4.5 (float16), where it is 0; the absolute errors of it and
// of t (1 - Φ(t)) are 4e-4 and 3e-5.
template <class T>
__device__ __forceinline__ float normal_tail(float t) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    float tail = -0.000628408918f * t + 0.00975703727f;
    tail = tail * t - 0.0569022484f;
    tail = tail * t + 0.138959393f;
    tail = tail * t - 0.0428474285f;
    tail = tail * t - 0.389427632f;
    return tail * t + 0.499654442f;
  } else {
    const float s = t * (2.0f / 4.5f) - 1.0f;  // in [-1, 1]: powers of t up to 4.5⁹ would cancel
    float tail = -0.0195002463f * s + 0.0296074655f;
    tail = tail * s + 0.0500208102f;
    tail = tail * s - 0.129262939f;
    tail = tail * s + 0.0373090096f;
    tail = tail * s + 0.156511366f;
    tail = tail * s - 0.246483967f;
    tail = tail * s + 0.180919319f;
    tail = tail * s - 0.0713419616f;
    return tail * s + 0.012221152f;
  }
}

__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays

template <class T>
__device__ __forceinline__ float gelu(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else {
    const float t = fminf(fabsf(x), std::is_same_v<T, __nv_bfloat16> ? 4.04f : 4.5f);
    return relu(x) - t * normal_tail<T>(t);
  }
}

__device__ __forceinline__ float times_sigmoid(float x, float of) { return x / (1.0f + expf(-of)); }

// 0.5 (1 + tanh z) = sigmoid(2 z)
__device__ __forceinline__ float gelu_tanh(float x) {
  return times_sigmoid(x, x * 1.5957691216057308f * (1.0f + x * x * 0.044715f));
}

// Applies it to every one of the values.
template <class T, int count>
__device__ __forceinline__ void activate(float* values, Activation activation) {
  const auto each = [&](auto function) {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = function(values[i]);
  };
  switch (activation) {
    case Activation::gelu:
      return each([](float x) { return gelu<T>(x); });
    case Activation::gelu_tanh:
      return each([](float x) { return gelu_tanh(x); });
    case Activation::silu:
      return each([](float x) { return times_sigmoid(x, x); });
    case Activation::relu:
      return each([](float x) { return relu(x); });
    case Activation::quick_gelu:
      return each([](float x) { return times_sigmoid(x, 1.702f * x); });
    default:
      return;
  }
}

}  // namespace adacomcat::cuda
