// What the tensor shells of the CPU ops share: rows of a tensor, scratch memory, work per thread.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

#include "packed.h"

namespace adacomcat {

using OptionalTensor = std::optional<at::Tensor>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Activation parse_activation(const std::optional<std::string_view>& name) {
  if (!name) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "silu") return Activation::silu;
  TORCH_CHECK(*name == "relu", "unknown activation '", *name, "'");
  return Activation::relu;
}

inline void check(const at::Tensor& x, const at::Tensor& t, const char* name,
                  at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " is ", t.scalar_type(), " and x is ",
              x.scalar_type(), ": cast one of them");
  TORCH_CHECK(t.device().is_cpu(), name, " is on ", t.device(), " and x is on the CPU");
  TORCH_CHECK(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

inline std::vector<int64_t> with_last(const at::Tensor& x, int64_t size) {
  auto shape = x.sizes().vec();
  shape.back() = size;
  return shape;
}

inline int64_t row_count(const at::Tensor& x) {
  return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
}

// x (..., k) as rows with one stride; copied only where its layout has none.
struct RowsOf {
  at::Tensor held;
  Rows rows{nullptr, 0, Dtype::f32};

  explicit RowsOf(const at::Tensor& x) : held(x) {
    const int64_t k = x.size(-1);
    bool regular = x.stride(-1) == 1 || k <= 1;
    for (int64_t d = 0; d + 2 < x.dim(); ++d) {
      regular = regular && x.stride(d) == x.stride(d + 1) * x.size(d + 1);
    }
    if (!regular) held = x.contiguous();
    rows = {held.const_data_ptr(), held.dim() > 1 ? held.stride(-2) : k, dtype_of(held)};
  }
};

inline Rows rows_from(const Rows& x, int64_t row, int64_t column = 0) {
  if (!x.data) return x;
  return {static_cast<const char*>(x.data) + (row * x.stride + column) * dtype_size(x.dtype),
          x.stride, x.dtype};
}

// Some of those rows, for products to fetch: no more than the second cache has place for.
inline Ahead rows_ahead(const Rows& x, int64_t row, int64_t count, int64_t k) {
  constexpr int64_t kMostBytes = 1 << 20;
  if (!x.data || count <= 0 || k <= 0) return {};
  const int64_t size = dtype_size(x.dtype);
  const int64_t bytes = std::min(count, std::max<int64_t>(kMostBytes / (k * size), 1)) * k * size;
  return {rows_from(x, row).data, bytes, k * size, x.stride * size};
}

// A bias, contiguous.
struct Bias {
  at::Tensor held;
  Rows rows{nullptr, 0, Dtype::f32};

  explicit Bias(const OptionalTensor& bias) {
    if (!bias) return;
    held = bias->contiguous();
    rows = {held.const_data_ptr(), 0, dtype_of(held)};
  }

  Rows from(int64_t column) const {
    if (!rows.data) return rows;
    return {static_cast<const char*>(rows.data) + column * dtype_size(rows.dtype), 0, rows.dtype};
  }
};

// What the kernels hold of such memory as follows, all threads together.
inline std::atomic<int64_t> scratch_bytes{0};

inline void grow(std::vector<char>& memory, int64_t bytes) {
  const int64_t more = bytes - static_cast<int64_t>(memory.size());
  if (more <= 0) return;
  memory.resize(bytes);
  scratch_bytes += more;
}

// Memory of this thread, reused from call to call; `get` invalidates nothing of the same frame.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    thread_local std::vector<char> memory;
    grow(memory, bytes + 64);
    next_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~63ull);
  }

  static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  template <typename T = void>
  T* take(int64_t bytes) {
    char* here = next_;
    next_ += aligned(bytes);
    return reinterpret_cast<T*>(here);
  }

 private:
  char* next_;
};

// What threads hand over to each other between two sweeps, in the calling one's memory, reused from call
// to call: fresh memory of this size would come from the system page by page.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    thread_local std::vector<char> memory;
    grow(memory, bytes + 5 * 64);
    next_ = memory.data();
  }

  char* take(int64_t bytes) {
    char* here = next_;
    next_ += Scratch::aligned(bytes);
    return here;
  }

 private:
  char* next_;
};

// Rows per block: whole steps, no more than the engine wants, and as many blocks as the threads divide
// evenly.
inline int64_t block_rows(const Engine& engine, int64_t rows) {
  const int64_t steps = ceil_div(rows, engine.row_step), threads = at::get_num_threads();
  const int64_t per_block = engine.block_rows / engine.row_step;
  const int64_t rounds = std::max<int64_t>(ceil_div(steps, threads * per_block), 1);
  return std::max<int64_t>(ceil_div(steps, threads * rounds), 1) * engine.row_step;
}

// A thread's part of an op.
class Session {
 public:
  explicit Session(const Engine& engine) : engine_(engine) { engine_.begin(); }
  ~Session() { engine_.end(); }
  Session(const Session&) = delete;

 private:
  const Engine& engine_;
};

// Whether a piece of work is the first of those that its thread gets, or the last.
struct Turn {
  bool first, last;
};

// body(first row, rows, turn).
template <typename Body>
inline void for_each_block(const Engine& engine, int64_t rows, Body body) {
  const int64_t block = block_rows(engine, rows);
  at::parallel_for(0, ceil_div(rows, block), 1, [&](int64_t begin, int64_t end) {
    const Session session(engine);
    for (int64_t i = begin; i < end; ++i) {
      body(i * block, std::min(block, rows - i * block), Turn{i == begin, i + 1 == end});
    }
  });
}

// A part of a product: rows, and of the columns whole panels.
struct Part {
  int64_t row, rows, panel, panels;
  Turn turn;
};

inline int64_t panel_width(const Engine& engine) { return 2 * engine.width; }

inline int64_t panels(const Engine& engine, int64_t columns) {
  return ceil_div(columns, panel_width(engine));
}

// Whether threads share out columns, not rows. Each then reads a part of the weights and all rows; of
// few rows weights are most of what there is to read.
inline bool by_columns(const Engine& engine, int64_t rows, int64_t panels) {
  const int64_t threads = at::get_num_threads();
  return threads > 1 && !at::in_parallel_region() && rows <= 2 * engine.block_rows &&
         panels >= 2 * threads;
}

// body(part) for every part of a product (rows, panels).
template <typename Body>
inline void for_each_part(const Engine& engine, int64_t rows, int64_t panels, Body body) {
  if (!by_columns(engine, rows, panels)) {
    for_each_block(engine, rows, [&](int64_t row, int64_t m, Turn turn) {
      body(Part{row, m, 0, panels, turn});
    });
    return;
  }
  const int64_t share = ceil_div(panels, at::get_num_threads());
  at::parallel_for(0, ceil_div(panels, share), 1, [&](int64_t begin, int64_t end) {
    const Session session(engine);
    for (int64_t i = begin; i < end; ++i) {
      body(Part{0, rows, i * share, std::min(share, panels - i * share), {i == begin, i + 1 == end}});
    }
  });
}

// Rows of x as a left operand: in place where the format is right, else in `scratch`.
struct Left {
  const void* data;
  int64_t stride;
};

inline Left left_operand(const Engine& engine, int64_t m, int64_t k, const Rows& x,
                         std::optional<double> epsilon, void* scratch) {
  const int64_t stride = engine.padded_k(k);
  if (epsilon) {
    engine.normalize(m, k, x, static_cast<float>(*epsilon), scratch, stride);
  } else if (x.dtype == engine.operand && k % engine.group == 0) {
    return {x.data, x.stride};
  } else {
    engine.load(m, k, x, scratch, stride);
  }
  return {scratch, stride};
}

// What a weight may have of the second cache while all rows of a block meet it.
constexpr int64_t kWeightBytes = 1 << 20;

// Floats per row that multiply_long() needs to add up.
inline int64_t sum_columns(const Engine& engine, int64_t k, int64_t n) {
  return engine.packed_bytes(k, n) > kWeightBytes ? engine.padded_n(n) : 0;
}

// C, of a B that is larger, some rows of B after the others; `sum` has sum_columns() a row.
inline void multiply_long(const Engine& engine, const Product& p, Finish finish, float* sum) {
  constexpr int64_t kUnit = 32;  // rows of B that no engine packs apart
  const int64_t parts = std::max<int64_t>(ceil_div(engine.packed_bytes(p.k, p.n), kWeightBytes), 1);
  const int64_t depth = std::max<int64_t>(ceil_div(ceil_div(p.k, parts), kUnit) * kUnit, 1);
  const int64_t stride = engine.padded_n(p.n);
  for (int64_t first = 0;; first += depth) {
    Product part = p;
    part.k = std::min(depth, p.k - first);
    part.a = static_cast<const char*>(p.a) + first * engine.operand_size();
    part.b_first = p.b_first + first;
    if (first) part.ahead = {};
    if (first + depth < p.k) {
      engine.accumulate(part, sum, stride, first > 0);
      continue;
    }
    if (first) finish.sum = sum, finish.sum_stride = stride;
    return engine.multiply(part, finish);
  }
}

// Rows (m, k) from operand format into a contiguous tensor's memory.
inline void keep_rows(int64_t m, int64_t k, const void* from, int64_t stride, Dtype operand,
                      const at::Tensor& to, int64_t row) {
  // The generic conversion is a product's finish; here formats are equal or fp32 to 16 bits.
  const Dtype dtype = dtype_of(to);
  char* out = static_cast<char*>(to.mutable_data_ptr()) + row * k * dtype_size(dtype);
  for (int64_t i = 0; i < m; ++i) {
    const char* in = static_cast<const char*>(from) + i * stride * dtype_size(operand);
    if (dtype == operand) {
      std::memcpy(out + i * k * dtype_size(dtype), in, k * dtype_size(dtype));
      continue;
    }
    const float* values = reinterpret_cast<const float*>(in);
    for (int64_t j = 0; j < k; ++j) {
      if (dtype == Dtype::bf16) {
        reinterpret_cast<at::BFloat16*>(out)[i * k + j] = values[j];
      } else {
        reinterpret_cast<at::Half*>(out)[i * k + j] = values[j];
      }
    }
  }
}

}  // namespace adacomcat
