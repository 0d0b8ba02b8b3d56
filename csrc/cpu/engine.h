// What the ops ask of a CPU: products with a packed right side, and operations on rows.
//
// An engine is one instruction set and one operand format. Left operands are row-major in the
// operand format (float, or bfloat16 where the CPU multiplies it); right operands are packed once
// into panels; sums are fp32.
#pragma once

#include <cstdint>

namespace adacomcat {

enum class Dtype { f32, bf16, f16 };
enum class Activation { none, gelu, gelu_tanh, silu, relu };

// The size of shares of `total`, as many as shares of `most` and about equal, in whole steps.
inline int64_t even_share(int64_t total, int64_t most, int64_t step) {
  const int64_t shares = (total + most - 1) / most;
  const int64_t share = shares ? (total + shares - 1) / shares : most;
  return (share + step - 1) / step * step;
}

inline int64_t dtype_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Rows of any dtype; `stride` in elements.
struct Rows {
  const void* data;
  int64_t stride;
  Dtype dtype;
};

// Memory that is needed next, brought nearer while a product runs: of small batches the weights come
// from DRAM, and the first rows would wait for them. In pieces `stride` bytes apart, or in one.
struct Ahead {
  const void* data = nullptr;
  int64_t bytes = 0, piece = 0, stride = 0;
};

// C (m, n) = A (m, k) · B (k, n). B is packed; of its `b_rows` rows those from `b_first` on count.
struct Product {
  int64_t m, n, k;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_rows, b_first;
  Ahead ahead{};
};

// What becomes of a tile of C while it is in cache:
// out = act((C + sum) · row_scale + bias) + residual.
struct Finish {
  void* out;
  int64_t stride;
  Dtype dtype;
  Rows bias{nullptr, 0, Dtype::f32};  // (n)
  Activation activation = Activation::none;
  Rows residual{nullptr, 0, Dtype::f32};
  const float* row_scale = nullptr;  // (m)
  const float* sum = nullptr;        // of accumulate(), (m, sum_stride)
  int64_t sum_stride = 0;
  // Where there is one, of out's dtype: out = act'(C + bias) · gradient and, if it is wanted,
  // activated = act(C + bias), laid out as out; nothing else of the above.
  Rows gradient{nullptr, 0, Dtype::f32};
  void* activated = nullptr;
};

// Added to the logits of one head: element (i, j) at i * row + j * column; bytes where boolean.
struct Mask {
  const void* data = nullptr;
  int64_t row = 0, column = 0;
  bool boolean = false;
  Dtype dtype = Dtype::f32;
};

struct Engine {
  const char* name;
  Dtype operand;
  int64_t tile_rows;  // rows of one tile of C
  int64_t row_step;   // fewer rows than this cost as much
  int64_t block_rows;  // so many go through an op together: their middles stay in the second cache
  int64_t width;      // lanes: packed columns are padded to a multiple
  int64_t group;      // columns of A come in multiples of it, odd tails padded with zeros
  int64_t depth;      // as rows of packed B do
  int64_t packed_size;  // bytes of an element of packed B
  int64_t scale_rows;   // rows of packed B that are not its own: they hold the scales of its columns

  // Packed element (i, j) comes from b + i * row + j * column.
  void (*pack)(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
               void* packed);
  void (*multiply)(const Product&, const Finish&);
  // sum (m, stride) = or += C; columns up to the padded n are written.
  void (*accumulate)(const Product&, float* sum, int64_t stride, bool add);
  // Rows to the operand format, `k` columns, padded with zeros up to the group.
  void (*load)(int64_t m, int64_t k, Rows x, void* out, int64_t stride);
  // The same after (x - mean) / sqrt(variance + epsilon) of each row.
  void (*normalize)(int64_t m, int64_t k, Rows x, float epsilon, void* out, int64_t stride);
  // Unnormalised softmax of logits * scale + mask in the operand format, and 1 / its row sums;
  // rows that are masked entirely give zeros. `out` may be the logits themselves.
  void (*softmax)(int64_t m, int64_t n, float* logits, int64_t stride, float scale, Mask mask,
                  void* out, int64_t out_stride, float* inverse_sum);
  // Of rows x_i (m, k) of any dtype with `count` vectors: out (count, m) = vectors · xᵀ, and
  // out (count, k) = weights · x for weights (count, m). One weight of 1 copies a row to floats.
  void (*inner_products)(int64_t m, int64_t k, Rows x, int64_t count, const float* vectors,
                         int64_t stride, float* out, int64_t out_stride);
  void (*weighted_sums)(int64_t m, int64_t k, Rows x, int64_t count, const float* weights,
                        int64_t stride, float* out, int64_t out_stride);

  // Between the two a thread's products may leave tile registers set up for the next one.
  void (*begin)();
  void (*end)();

  int64_t operand_size() const { return dtype_size(operand); }
  int64_t padded_k(int64_t k) const { return (k + group - 1) / group * group; }
  int64_t packed_k(int64_t k) const { return (k + depth - 1) / depth * depth + scale_rows; }
  int64_t packed_bytes(int64_t k, int64_t n) const {
    return packed_k(k) * padded_n(n) * packed_size;
  }
  int64_t padded_n(int64_t n) const { return (n + width - 1) / width * width; }
};

// The engine of this CPU for tensors of this dtype, and one of the same operand format for products of
// activations with activations.
const Engine& engine(Dtype dtype);
const Engine& activation_engine(Dtype dtype);

// What engine() chooses from, as far as this CPU goes: "generic", "avx2", "avx512", "avx512_bf16",
// "avx512_vnni", "amx".
const char* instruction_set();
// Whether it has AVX-512.
bool has_avx512();
// Takes another one, for tests; false where this CPU lacks it, unless its instructions are emulated.
bool use_instruction_set(const char* name, bool emulated = false);

}  // namespace adacomcat
