// CUDA kernels as host C++: the names of csrc/cuda/primitives.cuh and of the language, on a CPU.
//
// Each thread of a block is a fiber; blocks run one after the other. Shared memory has its exact
// size and holds NaN. Under a sanitizer only the kernels are instrumented, not shim.cpp, which
// tells it about barriers and about accesses that it makes for a kernel.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace shim {

struct Index {
  unsigned x;
};

struct Thread {
  Index thread, block, threads;
  int lane;
  char* shared;
};

extern Thread* current;

[[noreturn]] void fail(const char* message);
void block_barrier();

// What a lane gives to a collective of its whole warp. `gather` returns those of all lanes, which
// stay until the next collective.
struct Words {
  uint32_t word[6];
};
const Words* gather(const Words& own, const char* what);

// An access made on behalf of the kernel, for the sanitizers.
void touch(const void* memory, size_t size, bool writes);

void copy(void* to, const void* from, bool valid);
void commit();
void wait(int pending);

// The bytes of a kernel's parameters, one string each.
using Parameters = std::vector<std::string>;
template <class T>
std::string bytes_of(const T& parameter) {
  return {reinterpret_cast<const char*>(&parameter), sizeof parameter};
}
void launch(const void* kernel, const Parameters& parameters, unsigned blocks, int threads,
            int64_t shared, const std::function<void()>& body);

template <class T>
T shuffle(T value, int source, const char* what) {
  Words own{};
  std::memcpy(own.word, &value, sizeof(T));
  std::memcpy(&value, gather(own, what)[source].word, sizeof(T));
  return value;
}

}  // namespace shim

#define threadIdx (shim::current->thread)
#define blockIdx (shim::current->block)
#define blockDim (shim::current->threads)

inline void __syncthreads() { shim::block_barrier(); }
inline void __syncwarp() { shim::gather({}, "__syncwarp"); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::shuffle(value, shim::current->lane ^ mask, "shfl.xor");
}
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const int source = shim::current->lane + offset;
  return shim::shuffle(value, source < 32 ? source : shim::current->lane, "shfl.down");
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return shim::shuffle(value, lane, "shfl.idx");
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline float __half2float(__half x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
}
inline __half __float2half_rn(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  __half result;
  std::memcpy(&result, &half, sizeof half);
  return result;
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace adacomcat::cuda {

inline char* shared_memory() { return shim::current->shared; }
inline void copy_async(void* to, const void* from, bool valid) { shim::copy(to, from, valid); }
inline void commit_copies() { shim::commit(); }
template <int pending>
void wait_for_copies() {
  shim::wait(pending);
}

// ldmatrix: lane 8 i + j names row j of matrix i.
inline const shim::Words* gather_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) shim::fail("ldmatrix: a row off 16 bytes");
  shim::touch(row, 16, false);
  shim::Words own{};
  std::memcpy(own.word, &row, sizeof row);
  return shim::gather(own, "ldmatrix");
}
inline const char* row_of(const shim::Words* rows, int index) {
  const char* row;
  std::memcpy(&row, rows[index].word, sizeof row);
  return row;
}
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const shim::Words* rows = gather_rows(row);
  const int lane = shim::current->lane;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&to[i], row_of(rows, 8 * i + lane / 4) + 4 * (lane % 4), 4);
  }
}
inline void load_transposed(uint32_t (&to)[4], const void* row) {
  const shim::Words* rows = gather_rows(row);
  const int lane = shim::current->lane;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      std::memcpy(&pair[e], row_of(rows, 8 * i + 2 * (lane % 4) + e) + 2 * (lane / 4), 2);
    }
    std::memcpy(&to[i], pair, 4);
  }
}

inline float tensor_operand(uint32_t word, int half, const __half*) {
  return __half2float({static_cast<uint16_t>(word >> 16 * half)});
}
inline float tensor_operand(uint32_t word, int half, const __nv_bfloat16*) {
  return __bfloat162float({static_cast<uint16_t>(word >> 16 * half)});
}
inline float tensor_operand(uint32_t word, int, const float*) {
  return __uint_as_float(word & 0xffffe000u);
}

// Cut towards zero to the 24 bits of a float; below its normal numbers, rounded.
inline float truncated(double sum) {
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  bits &= ~((uint64_t{1} << 29) - 1);
  std::memcpy(&sum, &bits, sizeof bits);
  return static_cast<float>(sum);
}

// A model: the sum of an instruction's products and of what they are added to, truncated as the
// hardware does it (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores,
// 2021), so that an error grows with the number of instructions. It also drops low bits of the
// single products, by generation, and takes a few products at a time: not modelled.
//
// d (16, 8) += a (16, k) b (k, 8): lane 4 g + t holds of a rows g, g + 8 and of b column g, each at
// t-th places; and of d rows g, g + 8 in columns 2 t, 2 t + 1.
template <class T>
void multiply_model(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const shim::Words* all = shim::gather({{a[0], a[1], a[2], a[3], b0, b1}}, "mma");
  const int group = shim::current->lane / 4, place = shim::current->lane % 4;
  constexpr int per = sizeof(T) == 2 ? 2 : 1;  // elements in a word
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * place + i % 2;
    double sum = d[i];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 4 * per; ++k) {
        const uint32_t left = all[4 * group + k / per].word[i / 2 + 2 * half];
        const uint32_t right = all[4 * column + k / per].word[4 + half];
        const T* type = nullptr;
        sum += static_cast<double>(tensor_operand(left, k % per, type)) *
               tensor_operand(right, k % per, type);
      }
    }
    d[i] = truncated(sum);
  }
}
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_model<T>(d, a, b0, b1);
}
inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_model<float>(d, a, b0, b1);
}
inline uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

struct Words {
  uint32_t word[4];
};
inline void require_words(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) shim::fail("16 bytes off their alignment");
}
inline Words load_words(const void* from) {
  require_words(from);
  Words words;
  std::memcpy(&words, from, 16);
  return words;
}
inline void store_words(void* to, const Words& words) {
  require_words(to);
  std::memcpy(to, &words, 16);
}

inline uint32_t bits_of(__half x) { return x.bits; }
inline uint32_t bits_of(__nv_bfloat16 x) { return x.bits; }
template <class T>
uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return bits_of(__float2half_rn(low)) | bits_of(__float2half_rn(high)) << 16;
  } else {
    return bits_of(__float2bfloat16_rn(low)) | bits_of(__float2bfloat16_rn(high)) << 16;
  }
}

// Those of an H100, unless the environment says otherwise: few make the launchers take large tiles.
inline int multiprocessors() {
  const char* count = std::getenv("SHIM_MULTIPROCESSORS");
  return count ? std::atoi(count) : 132;
}
// That of sm_90.
inline int64_t block_shared_memory() { return 227 * 1024; }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
                   cudaStream_t, const Arguments&... arguments) {
  if (shared > block_shared_memory()) return "more shared memory than a block can have";
  shim::launch(reinterpret_cast<const void*>(kernel),
               {shim::bytes_of<Parameters>(arguments)...}, static_cast<unsigned>(blocks),
               threads, shared, [=] { kernel(arguments...); });
  return nullptr;
}

}  // namespace adacomcat::cuda
