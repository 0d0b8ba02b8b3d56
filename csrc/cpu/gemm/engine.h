// What an op asks of the CPU: matrix products with a packed right-hand side, and operations on rows.
//
// An engine is one instruction set with one operand format. Its left-hand side (lhs) is row-major in
// the operand format: float32, or bfloat16 where the CPU multiplies that. Its right-hand side (rhs) is
// packed once, into panels. Sums are float32. cpu/README.md draws one product.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace adacomcat {

// Splits `total` into as few equal shares of at most `most` as possible. Returns the size of a share,
// rounded up to whole steps.
inline int64_t even_share(int64_t total, int64_t most, int64_t step) {
  const int64_t shares = (total + most - 1) / most;
  const int64_t share = shares ? (total + shares - 1) / shares : most;
  return (share + step - 1) / step * step;
}

// Dense rows of any dtype, `stride` elements apart.
struct Rows {
  const void* data;
  int64_t stride;
  Dtype dtype;
};

// Memory that a product prefetches while it runs, because the next step reads it: usually the next
// weight. Pieces of `piece` bytes lie `stride` bytes apart; `piece` 0 means one piece.
struct PrefetchHint {
  const void* data = nullptr;
  int64_t bytes = 0, piece = 0, stride = 0;
};

// C (m, n) = A (m, k) · B (k, n), A = lhs. B is packed: rows rhs_first … rhs_first + k - 1 of the
// rhs_rows rows that were packed.
struct Gemm {
  int64_t m, n, k;
  const void* lhs;
  int64_t lhs_stride;
  const void* rhs;
  int64_t rhs_rows, rhs_first;
  PrefetchHint prefetch{};
};

// What is done to a tile of C while it is in cache:
//   out = act((C + sum) · row_scale + bias) · factor + residual.
// With `gradient`, which has the dtype of out, instead
//   out = act'(C + bias) · gradient, and activated = act(C + bias) if that is wanted.
struct Epilogue {
  void* out;
  int64_t stride;
  Dtype dtype;
  Rows bias{nullptr, 0, Dtype::f32};  // (n)
  Activation activation = Activation::none;
  Rows residual{nullptr, 0, Dtype::f32};
  const float* row_scale = nullptr;  // (m)
  const float* sum = nullptr;        // (m, sum_stride), from accumulate()
  int64_t sum_stride = 0;
  Rows factor{nullptr, 0, Dtype::f32};  // may be `out` itself
  Rows gradient{nullptr, 0, Dtype::f32};
  void* activated = nullptr;  // laid out as out
};

// An attention mask of one head, added to its logits: element (i, j) stands at i * row + j * column.
// A boolean one is bytes: logits stay where it is true and become -infinity where it is false.
struct Mask {
  const void* data = nullptr;
  int64_t row = 0, column = 0;
  bool boolean = false;
  Dtype dtype = Dtype::f32;
};

struct Engine {
  const char* name;
  Dtype operand;         // the format of the lhs
  int64_t tile_rows;     // mr: rows of a full tile of C
  int64_t row_step;      // fewer rows than these cost as much as these
  int64_t block_rows;    // mc: rows that an op takes through all its products at a time
  int64_t lanes;         // nr is one or two times this; packed columns are padded to a multiple
  int64_t k_group;       // columns of the lhs are padded with zeros to a multiple of this
  int64_t k_multiple;    // rows of the packed rhs are padded with zeros to a multiple of this
  int64_t packed_size;   // bytes of an element of the packed rhs
  int64_t packed_group;  // rows of the packed rhs that are adjacent in each column
  int64_t packed_zero;   // what is added to the integers of the packed rhs
  int64_t scale_rows;    // rows of the packed rhs that hold the scales of its columns

  // Packs the rhs B (k, n), whose element (i, j) stands at b + i * row + j * column. Engines of int8 read
  // the scales (n) of its columns.
  void (*pack)(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
               void* packed, const float* scales);
  void (*multiply)(const Gemm&, const Epilogue&);
  // sum (m, stride) = C, or += C. Columns up to the padded n are written.
  void (*accumulate)(const Gemm&, float* sum, int64_t stride, bool add);
  // Converts rows (m, k) to the operand format, padded with zeros up to k_group.
  void (*load)(int64_t m, int64_t k, Rows x, void* out, int64_t stride);
  // The same for the rows' layer norm without affine, (x - mean) / sqrt(variance + epsilon).
  void (*normalize)(int64_t m, int64_t k, Rows x, float epsilon, void* out, int64_t stride);
  // out = exp(logits * scale + mask - maximum) in the operand format, and inverse_sum = 1 / its row
  // sums. A row that is masked entirely gives zeros. `out` may be the logits themselves.
  void (*softmax)(int64_t m, int64_t n, float* logits, int64_t stride, float scale, Mask mask,
                  void* out, int64_t out_stride, float* inverse_sum);
  // Turns pairs of elements in rows x (m, n), n even, of the operand format, in place: the pair (a, b) of
  // columns i and j becomes (a cos_i - b sin_i, b cos_j + a sin_j). With `half` j = i + n / 2, else
  // i is even and j = i + 1.
  void (*rotate)(int64_t m, int64_t n, void* x, int64_t stride, Rows sin, Rows cos, bool half);
  // gemv for `count` vectors at once, with rows x (m, k) of any dtype.
  // inner_products: out (count, m) = vectors (count, k) · xᵀ.
  void (*inner_products)(int64_t m, int64_t k, Rows x, int64_t count, const float* vectors,
                         int64_t stride, float* out, int64_t out_stride);
  // weighted_sums: out (count, k) = weights (count, m) · x.
  void (*weighted_sums)(int64_t m, int64_t k, Rows x, int64_t count, const float* weights,
                        int64_t stride, float* out, int64_t out_stride);

  // Around all products of one thread in one op: AMX keeps its tile registers configured between them.
  void (*begin)();
  void (*end)();

  int64_t operand_size() const { return dtype_size(operand); }
  int64_t padded_k(int64_t k) const { return (k + k_group - 1) / k_group * k_group; }
  int64_t packed_k(int64_t k) const {
    return (k + k_multiple - 1) / k_multiple * k_multiple + scale_rows;
  }
  int64_t packed_bytes(int64_t k, int64_t n) const {
    return packed_k(k) * padded_n(n) * packed_size;
  }
  int64_t padded_n(int64_t n) const { return (n + lanes - 1) / lanes * lanes; }
  int64_t panel_columns() const { return 2 * lanes; }
};

// Every engine's k_multiple divides this: a rhs may be cut at multiples of it.
constexpr int64_t kKStep = 32;

// The engine of the current instruction set for products of this dtype with weights.
const Engine& engine(Dtype dtype);

// Whether products of float32 may lose digits from now on, in the whole process.
void reduce_float32(bool reduce);
// The one for products of activations with activations. It has the same operand format.
const Engine& activation_engine(Dtype dtype);
// The one whose operands are those of `weights`, which multiplied x of this dtype.
const Engine& activation_engine(Dtype dtype, const Engine& weights);
// The engine for weights of 8 bits, whatever the dtype of x.
const Engine& int8_engine();

}  // namespace adacomcat
