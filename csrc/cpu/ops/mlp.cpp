// The MLP with packed weights. A block of rows meets the hidden layer in chunks of columns: each chunk is
// computed, activated and multiplied by `down` while it is in cache.
//
// Identity matrices are not multiplied. If the first rows of V2 are an identity beside zeros, the first
// hidden columns are the first columns of act(...) V2; if the last columns of U1ᵀ are one, the last hidden
// columns before the activation are columns of x V1.
#include "cpu/ops/mlp.h"

#include <cstring>

#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"

namespace adacomcat {
namespace {

constexpr int64_t kHiddenPanels = 10;  // of a chunk
static_assert(kIdentityStep == 32, "whole panels of engines of 4, 8 and 16 lanes");

// What the hidden layer prefetches. The first rows of a thread meet the weights for the first time: each
// product fetches the part of `up` or `down` that the next one reads. Later rows fetch what comes after the
// hidden layer: during the last product with `up` and the last one with `down`.
struct HiddenHints {
  bool weights_are_new;
  PrefetchHint last_up, last_down;
};

// Where the hidden layer of some rows is computed: hidden columns `begin` to `end`, a chunk of them in `h`,
// their product with `down` in `sum`.
struct HiddenRange {
  int64_t begin, end;
  char* h;
  float* sum;
};

// What all rows of a call have in common.
class Mlp {
 public:
  Mlp(const Engine& engine, const Tensor& x, const MlpWeights& weights, const MlpOptions& options,
      const Tensor& y)
      : e(engine), w(weights), xs(x), residuals(options.residual ? *options.residual : x),
        bias1(options.b1), bias2(options.b2),
        bias_gate(options.gate_bias ? *options.gate_bias : OptionalTensor{}),
        act(parse_activation(options.activation)), epsilon(options.epsilon),
        has_residual(options.residual.has_value()), in(x.size(-1)), out(y.size(-1)),
        rows(row_count(x)), hidden(weights.down.k), result(y) {}

  // The epilogue of the last product, for rows from `row` on.
  Epilogue last_epilogue(int64_t row) const {
    Epilogue epilogue = result.epilogue(row);
    epilogue.bias = bias2.rows;
    if (has_residual) epilogue.residual = rows_from(residuals.rows, row);
    return epilogue;
  }

  // The epilogue that writes the rows before `out`.
  Epilogue middle_epilogue(void* middle2) const {
    return {middle2, e.padded_k(w.down.n), e.operand};
  }

  // What `up` multiplies: x̂, or x̂ V1 in `middle`.
  LhsOperand enter(int64_t row, int64_t m, void* normed, void* middle, PrefetchHint hint) const {
    const LhsOperand lhs = lhs_operand(e, m, in, rows_from(xs.rows, row), epsilon, normed);
    if (!w.has_in()) return lhs;
    const int64_t stride = e.padded_k(w.up.k);
    if (stride != w.up.k) std::memset(middle, 0, lhs_bytes(e, m, w.up.k));
    e.multiply(w.in.product(m, lhs, hint), {middle, stride, e.operand});
    return {middle, stride};
  }

  // Takes m rows through a range of the hidden layer. Its product with `down` goes to range.sum, or through
  // the epilogue if there is one. The range that ends at `hidden` includes the columns that are not
  // multiplied by `down`.
  void multiply_hidden(int64_t m, LhsOperand lhs, const HiddenRange& range,
                       const Epilogue* epilogue, const HiddenHints& hints) const {
    const bool started = range.end == hidden && first_multiplied > 0;
    if (started) start_sum(m, lhs, range.sum);
    for (int64_t first = range.begin; first == range.begin || first < range.end; first += chunk()) {
      const int64_t columns = std::min(chunk(), range.end - first);
      const bool last = first + columns >= range.end;
      if (columns % e.k_group) std::memset(range.h, 0, m * hidden_bytes());
      compute_hidden(m, lhs, first, columns,
                     {range.h, chunk(), e.operand, rows_from(bias1.rows, 0, first), act},
                     hint_during_up(first, columns, last, hints));
      Gemm down =
          w.down.product(m, {range.h, chunk()}, hint_during_down(first, range, last, hints));
      down.k = columns, down.rhs_first = first;
      const bool add = started || first > range.begin;
      if (!last || !epilogue) {
        e.accumulate(down, range.sum, sum_stride(), add);
      } else {
        e.multiply(down, add ? with_sum(*epilogue, range.sum) : *epilogue);
      }
    }
  }

  // y from the rows before `out`.
  void leave(int64_t row, int64_t m, const void* middle2, PrefetchHint hint) const {
    e.multiply(w.out.product(m, {middle2, e.padded_k(w.down.n)}, hint), last_epilogue(row));
  }

  // A prefetch hint for the part of `up` that the chunk from `first` on reads.
  PrefetchHint hint_for_up(int64_t first, int64_t end) const {
    return {w.up.panel(e, first), e.packed_bytes(w.up.k, std::min(chunk(), end - first))};
  }

  // Columns of a chunk: equal ones of at most kHiddenPanels panels.
  int64_t chunk() const {
    const int64_t width = e.panel_columns();
    return even_share(std::max(hidden - first_multiplied, width), kHiddenPanels * width, width);
  }
  int64_t sum_stride() const { return e.padded_n(w.down.n); }
  // Bytes of a row of each buffer.
  int64_t normed_bytes() const { return lhs_bytes(e, 1, in); }
  int64_t middle1_bytes() const { return w.has_in() ? lhs_bytes(e, 1, w.up.k) : 0; }
  int64_t middle2_bytes() const { return w.has_out() ? lhs_bytes(e, 1, w.down.n) : 0; }
  int64_t hidden_bytes() const { return chunk() * e.operand_size(); }
  int64_t sum_bytes() const { return sum_stride() * sizeof(float); }

  const Engine& e;
  const MlpWeights& w;
  const TensorRows xs, residuals;
  const Bias bias1, bias2, bias_gate;
  const Activation act;
  const std::optional<double> epsilon;
  const bool has_residual;
  const int64_t in, out, rows, hidden;
  // Hidden columns before this one meet the identity in V2.
  const int64_t first_multiplied = keeps_floats() && !w.gated() ? w.down.identity_rows : 0;
  // Hidden columns from this one on come from the identity in U1.
  const int64_t first_copied = hidden - (copies() ? w.up.identity_columns : 0);
  const OutputRows result;

 private:
  // Whether intermediates stay float32, as a copy leaves them.
  bool keeps_floats() const { return e.operand == Dtype::f32; }
  // Whether the identity in U1 can be used: the columns before it end with a panel and are all multiplied.
  bool copies() const {
    return keeps_floats() && !w.gated() && hidden % e.panel_columns() == 0 &&
           first_multiplied + w.up.identity_columns <= hidden;
  }

  // Starts `sum` with the hidden columns that meet the identity in V2.
  void start_sum(int64_t m, LhsOperand lhs, float* sum) const {
    const int64_t rest = sum_stride() - first_multiplied;
    for (int64_t i = 0; rest && i < m; ++i) {
      std::memset(sum + i * sum_stride() + first_multiplied, 0, rest * sizeof(float));
    }
    compute_hidden(m, lhs, 0, first_multiplied, {sum, sum_stride(), Dtype::f32, bias1.rows, act},
                   {});
  }

  // Some hidden columns. Those from first_copied on are columns of the lhs.
  void compute_hidden(int64_t m, LhsOperand lhs, int64_t first, int64_t columns, Epilogue epilogue,
                      PrefetchHint hint) const {
    if (w.gated()) return compute_gated(m, lhs, first, columns, epilogue, hint);
    const int64_t computed = std::clamp<int64_t>(first_copied - first, 0, columns);
    if (computed || !columns) e.multiply(w.up.product(e, m, lhs, first, computed, hint), epilogue);
    if (computed == columns) return;
    const int64_t from = first + computed - first_copied;
    epilogue.out = static_cast<float*>(epilogue.out) + computed;
    epilogue.bias = rows_from(bias1.rows, 0, first + computed);
    apply_epilogue(e, m, columns - computed, static_cast<const float*>(lhs.data) + from, lhs.stride,
                   epilogue);
  }

  // The same for act(gate) · up: the gate stands where the product goes.
  void compute_gated(int64_t m, LhsOperand lhs, int64_t first, int64_t columns, Epilogue epilogue,
                     PrefetchHint hint) const {
    Epilogue gate = epilogue;
    gate.bias = rows_from(bias_gate.rows, 0, first);
    e.multiply(w.gate.product(e, m, lhs, first, columns), gate);
    epilogue.activation = Activation::none;
    epilogue.factor = {epilogue.out, epilogue.stride, epilogue.dtype};
    e.multiply(w.up.product(e, m, lhs, first, columns, hint), epilogue);
  }

  Epilogue with_sum(Epilogue epilogue, const float* sum) const {
    if (w.has_out()) {  // there is no other residual, and micro-kernels fuse a residual but not a sum
      epilogue.residual = {sum, sum_stride(), Dtype::f32};
    } else {
      epilogue.sum = sum, epilogue.sum_stride = sum_stride();
    }
    return epilogue;
  }

  PrefetchHint hint_during_up(int64_t first, int64_t columns, bool last,
                              const HiddenHints& hints) const {
    if (hints.weights_are_new) return hint_for_down(first, columns);
    return last ? hints.last_up : PrefetchHint{};
  }

  PrefetchHint hint_during_down(int64_t first, const HiddenRange& range, bool last,
                                const HiddenHints& hints) const {
    if (last) return hints.last_down;
    return hints.weights_are_new ? hint_for_up(first + chunk(), range.end) : PrefetchHint{};
  }

  // The rows of `down` that some hidden columns meet: a piece of each panel.
  PrefetchHint hint_for_down(int64_t first, int64_t columns) const {
    const int64_t n = sum_stride(), row_bytes = std::min(e.panel_columns(), n) * e.packed_size;
    const int64_t panels = row_bytes ? ceil_div(n * e.packed_size, row_bytes) : 0;
    return {static_cast<const char*>(w.down.data) + first * row_bytes, panels * columns * row_bytes,
            columns * row_bytes, w.down.rows * row_bytes};
  }
};

// Stores the intermediates of some rows in those tensors that have elements.
void store_middles(const Mlp& mlp, int64_t row, int64_t m, const void* t1, const void* t2,
                   const Tensor& middle1, const Tensor& middle2) {
  const Engine& e = mlp.e;
  const int64_t k1 = mlp.w.up.k, k2 = mlp.w.down.n;
  if (middle1.numel()) store_rows(e, m, k1, t1, e.padded_k(k1), middle1, row);
  if (middle2.numel()) store_rows(e, m, k2, t2, e.padded_k(k2), middle2, row);
}

// Threads share out the rows; each takes its rows through the whole MLP.
void share_rows(const Mlp& mlp, const Tensor& middle1, const Tensor& middle2) {
  const Engine& e = mlp.e;
  const MlpWeights& w = mlp.w;
  const int64_t block = block_rows(e, mlp.rows), begin = mlp.first_multiplied, end = mlp.hidden;

  for_each_block(e, mlp.rows, [&](int64_t row, int64_t m, Turn turn) {
    Scratch scratch({block * mlp.normed_bytes(), block * mlp.middle1_bytes(),
                     block * mlp.hidden_bytes(), block * mlp.sum_bytes(),
                     block * mlp.middle2_bytes()});
    void* normed = scratch.next();
    void* t1 = scratch.next();
    char* h = scratch.next<char>();
    float* sum = scratch.next<float>();
    void* t2 = scratch.next();

    const LhsOperand lhs =
        mlp.enter(row, m, normed, t1, turn.first ? mlp.hint_for_up(begin, end) : PrefetchHint{});
    const Epilogue last = mlp.last_epilogue(row);
    const HiddenRange range{begin, end, h, sum};
    const PrefetchHint residual = hint_for_rows(last.residual, 0, m, mlp.out);
    const int64_t following = std::min(m, mlp.rows - row - m);
    const PrefetchHint next_rows = hint_for_rows(mlp.xs.rows, row + m, following, mlp.in);
    if (!w.has_out()) {
      const PrefetchHint next = turn.last ? w.down.next_weight : next_rows;
      return mlp.multiply_hidden(m, lhs, range, &last, {turn.first, residual, next});
    }
    const PrefetchHint result = hint_for_rows({last.out, last.stride, last.dtype}, 0, m, mlp.out);
    if (e.padded_k(w.down.n) != w.down.n) std::memset(t2, 0, m * mlp.middle2_bytes());
    const Epilogue to_middle = mlp.middle_epilogue(t2);
    mlp.multiply_hidden(m, lhs, range, &to_middle,
                        {turn.first, result, turn.first ? w.out.hint() : residual});
    store_middles(mlp, row, m, t1, t2, middle1, middle2);
    mlp.leave(row, m, t2, turn.last ? w.out.next_weight : next_rows);
  });
}

// The rows before `up`, for all threads.
void enter_rows(const Mlp& mlp, char* lhs, int64_t row_bytes) {
  const Engine& e = mlp.e;
  for_each_block(e, mlp.rows, [&](int64_t row, int64_t m, Turn) {
    char* here = lhs + row * row_bytes;
    Scratch scratch({mlp.w.has_in() ? m * mlp.normed_bytes() : 0});
    void* normed = mlp.w.has_in() ? scratch.next() : here;
    const LhsOperand found = mlp.enter(row, m, normed, here, {});
    if (found.data == here) return;
    e.load(m, mlp.w.up.k, {found.data, found.stride, e.operand}, here, e.padded_k(mlp.w.up.k));
  });
}

// Adds up the sums of `parts` threads into the first.
void add_parts(int64_t parts, int64_t count, int64_t stride, float* sum) {
  for (int64_t i = 1; i < parts; ++i) {
    const float* other = sum + i * stride;
    for (int64_t j = 0; j < count; ++j) sum[j] += other[j];
  }
}

// Threads share out the hidden layer: each takes all rows through its part, and so reads only that part of
// the weights. For few rows.
void share_hidden(const Mlp& mlp, const Tensor& middle1, const Tensor& middle2) {
  const Engine& e = mlp.e;
  const MlpWeights& w = mlp.w;
  const int64_t start = mlp.first_multiplied, rows = mlp.rows;
  const int64_t panels = panel_count(e, mlp.hidden - start);
  const int64_t share = ceil_div(panels, thread_count()), parts = ceil_div(panels, share);
  const int64_t row_bytes = w.has_in() ? mlp.middle1_bytes() : mlp.normed_bytes();
  Workspace workspace({rows * row_bytes, rows * parts * mlp.sum_bytes()});
  char* lhs = workspace.next<char>();
  float* sums = workspace.next<float>();

  enter_rows(mlp, lhs, row_bytes);
  for_each_item(e, parts, [&](int64_t i, Turn turn) {
    Scratch scratch({rows * mlp.hidden_bytes()});
    const int64_t first = start + i * share * e.panel_columns();
    const int64_t last = std::min(first + share * e.panel_columns(), mlp.hidden);
    mlp.multiply_hidden(rows, {lhs, e.padded_k(w.up.k)},
                        {first, last, scratch.next<char>(), sums + i * rows * mlp.sum_stride()},
                        nullptr, {turn.first, {}, w.has_out() ? w.out.hint() : w.down.next_weight});
  });
  for_each_block(e, rows, [&](int64_t row, int64_t m, Turn turn) {
    float* sum = sums + row * mlp.sum_stride();
    add_parts(parts, m * mlp.sum_stride(), rows * mlp.sum_stride(), sum);
    Scratch scratch({m * mlp.middle2_bytes()});
    void* t2 = scratch.next();
    if (w.has_out()) std::memset(t2, 0, m * mlp.middle2_bytes());
    apply_epilogue(e, m, w.down.n, sum, mlp.sum_stride(),
                   w.has_out() ? mlp.middle_epilogue(t2) : mlp.last_epilogue(row));
    if (!w.has_out()) return;
    store_middles(mlp, row, m, lhs + row * row_bytes, t2, middle1, middle2);
    mlp.leave(row, m, t2, turn.last ? w.out.next_weight : PrefetchHint{});
  });
}

}  // namespace

void run_mlp(const Engine& e, const Tensor& x, const MlpWeights& weights, const MlpOptions& options,
             const Tensor& y, const Tensor& middle1, const Tensor& middle2) {
  const Mlp mlp(e, x, weights, options, y);
  const int64_t panels = panel_count(e, mlp.hidden - mlp.first_multiplied);
  (shares_columns(e, mlp.rows, panels) ? share_hidden : share_rows)(mlp, middle1, middle2);
}

}  // namespace adacomcat
