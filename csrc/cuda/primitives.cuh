// What the kernels ask of a GPU: PTX, shared memory, launches. Nothing here is particular to an op.
// Without nvcc, tests/gpu/cuda/shim provides the same names as a model on the CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#ifndef __CUDACC__
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace adacomcat::cuda {

// The memory that is sized at the launch.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, zeros where not `valid`; they arrive at a wait.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups of copies but the last `pending`.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane 8 i + j has the address of row j of matrix i, and
// lane 4 g + t gets 32-bit word t of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, the matrices transposed as of 16-bit elements.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b on tensor cores: a (16, 16), b (16, 8) of 16-bit elements.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d += a b on tensor cores: a (16, 8), b (8, 8) of float32 with 10 bits of mantissa.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The bits of x rounded to 10 bits of mantissa.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// 16 bytes at once, from or to an address that is a multiple of 16.
struct Words {
  uint32_t word[4];
};
__device__ __forceinline__ Words load_words(const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  return {{words.x, words.y, words.z, words.w}};
}
__device__ __forceinline__ void store_words(void* to, const Words& words) {
  *static_cast<uint4*>(to) = {words.word[0], words.word[1], words.word[2], words.word[3]};
}

// Two numbers in 16 bits each, the first one in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline int64_t block_shared_memory() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Runs a kernel; the error's text, or null.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > std::numeric_limits<int>::max()) return "the batch is too large for one launch";
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace adacomcat::cuda
#endif

namespace adacomcat::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over neighbouring lanes, `lanes` of them a power of two; each gets the same.
template <int lanes, class T>
__device__ __forceinline__ T sum_lanes(T x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

// The largest, likewise; NaN loses against numbers.
template <int lanes>
__device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, step));
  }
  return x;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Element i of 16 bytes of T.
template <class T>
__device__ __forceinline__ float element(const Words& words, int i) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(words.word[i]);
  } else {
    const uint16_t bits = static_cast<uint16_t>(words.word[i / 2] >> 16 * (i % 2));
    if constexpr (std::is_same_v<T, __half>) {
      return to_float(__ushort_as_half(bits));
    } else {
      return to_float(__ushort_as_bfloat16(bits));
    }
  }
}

// 16 bytes of T, the inverse of `element`.
template <class T>
__device__ __forceinline__ Words words_of(const float (&values)[16 / sizeof(T)]) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words.word[i] = __float_as_uint(values[i]);
    } else {
      words.word[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return words;
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// The first `count` of the elements that 16 bytes hold, at once where that is possible; zeros beyond.
template <class T>
__device__ __forceinline__ void load_elements(float (&values)[16 / sizeof(T)], const T* from,
                                              int count) {
  constexpr int chunk = 16 / sizeof(T);
  if (count >= chunk && is_aligned(from)) {
    const Words words = load_words(from);
#pragma unroll
    for (int i = 0; i < chunk; ++i) values[i] = element<T>(words, i);
  } else {
#pragma unroll
    for (int i = 0; i < chunk; ++i) values[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void store_elements(T* to, const float (&values)[16 / sizeof(T)],
                                               int count) {
  constexpr int chunk = 16 / sizeof(T);
  if (count >= chunk && is_aligned(to)) {
    store_words(to, words_of<T>(values));
  } else {
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      if (i < count) to[i] = from_float<T>(values[i]);
    }
  }
}

}  // namespace adacomcat::cuda
