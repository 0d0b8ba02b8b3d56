// y = act(x̂ W1ᵀ + b1) W2ᵀ + b2, W1 = U1 V1ᵀ and W2 = U2 V2ᵀ or dense: of the hidden layer a block of
// rows sees a few columns at a time. Of a U1 whose last rows are the identity, and a V2 whose first ones
// are, these are not multiplied.
#include <torch/library.h>

#include <tuple>

#include "few_rows_mlp.h"

namespace adacomcat {
namespace {

constexpr int64_t kHiddenPanels = 10;
static_assert(kIdentity == 32, "whole panels of engines of 4, 8 and 16 lanes");

// x̂ → in → up → activation → down → out → y; dense weights need neither `in` nor `out`.
struct Weights {
  Packed in, up, down, out;

  bool low_rank() const { return in.data != nullptr; }
};

// What products of the hidden layer fetch for those that follow: a thread's first rows `weights`, which
// they see for the first time; else the last `up` and the last `down` what is given here.
struct Fetches {
  bool weights;
  Ahead up, down;
};

// One call: what all its rows have in common.
class Call {
 public:
  Call(const Engine& engine, const at::Tensor& x, const Weights& weights, const MlpOptions& options,
       const at::Tensor& y)
      : e(engine), w(weights), xs(x), rs(options.residual ? *options.residual : x),
        bias1(options.b1), bias2(options.b2), act(parse_activation(options.activation)),
        epsilon(options.epsilon), has_residual(options.residual.has_value()), in(x.size(-1)),
        out(y.size(-1)), rows(row_count(x)), hidden(weights.down.k), dtype(dtype_of(y)),
        result(static_cast<char*>(y.mutable_data_ptr())) {}

  // The last product's finish, for rows from `row` on.
  Finish last(int64_t row) const {
    Finish finish{result + row * out * dtype_size(dtype), out, dtype, bias2.rows};
    if (has_residual) finish.residual = rows_from(rs.rows, row);
    return finish;
  }

  // x̂ of some rows, or x̂ V1 in `middle`: what `up` multiplies. `ahead`: what comes next.
  Left enter(int64_t row, int64_t m, void* normed, void* middle, Ahead ahead) const {
    const Left left = left_operand(e, m, in, rows_from(xs.rows, row), epsilon, normed);
    if (!w.low_rank()) return left;
    const int64_t inner = w.up.k, stride = e.padded_k(inner);
    if (stride != inner) std::memset(middle, 0, m * stride * e.operand_size());
    e.multiply({m, inner, in, left.data, left.stride, w.in.data.get(), w.in.rows, 0, ahead},
               {middle, stride, e.operand});
    return {middle, stride};
  }

  // Some rows through the hidden columns from `begin` to `end`, a chunk at a time in `h`: their part of
  // act(...) down in `sum`, or as `finish` says if there is one. Who has the last column takes those
  // before first_hidden too.
  void through(int64_t m, const Left& left, int64_t begin, int64_t end, char* h, float* sum,
               const Finish* finish, const Fetches& fetches) const {
    const int64_t size = chunk();
    const bool started = end == hidden && first_hidden > 0;
    if (started) start(m, left, sum);
    for (int64_t first = begin; first == begin || first < end; first += size) {
      const int64_t columns = std::min(size, end - first), following = first + columns;
      const bool last = following >= end;
      if (columns % e.group) std::memset(h, 0, m * size * e.operand_size());
      hide(m, left, first, columns, {h, size, e.operand, bias1.from(first), act},
           fetches.weights ? part_of_down(first, columns) : last ? fetches.up : Ahead{});
      Product down{m, w.down.n, columns, h, size, w.down.data.get(), w.down.rows, first};
      down.ahead = last ? fetches.down : fetches.weights ? part_of_up(following, end) : Ahead{};
      const bool add = started || first > begin;
      if (!last || !finish) {
        e.accumulate(down, sum, sum_stride(), add);
        continue;
      }
      Finish whole = *finish;
      if (add && w.low_rank()) {  // a middle has no residual, and tiles with one are finished in registers
        whole.residual = {sum, sum_stride(), Dtype::f32};
      } else if (add) {
        whole.sum = sum, whole.sum_stride = sum_stride();
      }
      e.multiply(down, whole);
    }
  }

  // Out of the second middle into y.
  void leave(int64_t row, int64_t m, const void* middle, Ahead ahead) const {
    e.multiply({m, out, w.down.n, middle, e.padded_k(w.down.n), w.out.data.get(), w.out.rows, 0, ahead},
               last(row));
  }

  // Hidden columns that meet the identity in V2: what they become is where `sum` begins.
  void start(int64_t m, const Left& left, float* sum) const {
    const int64_t rest = sum_stride() - first_hidden;
    for (int64_t i = 0; rest && i < m; ++i) {
      std::memset(sum + i * sum_stride() + first_hidden, 0, rest * sizeof(float));
    }
    hide(m, left, 0, first_hidden, {sum, sum_stride(), Dtype::f32, bias1.rows, act}, {});
  }

  // Some columns of the hidden layer; those that the identity in U1 gives are columns of `left`.
  void hide(int64_t m, const Left& left, int64_t first, int64_t columns, Finish finish,
            Ahead ahead) const {
    const int64_t computed = std::clamp<int64_t>(first_copied - first, 0, columns);
    if (computed || !columns) {
      e.multiply({m, computed, w.up.k, left.data, left.stride, w.up.from(e, first), w.up.rows, 0, ahead},
                 finish);
    }
    if (computed == columns) return;
    const int64_t from = first + computed - first_copied;
    finish.out = static_cast<float*>(finish.out) + computed;
    finish.bias = bias1.from(first + computed);
    finish_sums(e, m, columns - computed, static_cast<const float*>(left.data) + from, left.stride, finish);
  }

  Ahead part_of_up(int64_t first, int64_t end) const {
    return {w.up.from(e, first), e.packed_bytes(w.up.k, std::min(chunk(), end - first))};
  }

  // Equal ones, of about so many panels.
  int64_t chunk() const {
    const int64_t width = panel_width(e);
    return even_share(std::max(hidden - first_hidden, width), kHiddenPanels * width, width);
  }
  int64_t sum_stride() const { return e.padded_n(w.down.n); }
  // Bytes of a row of what lies between, in the operand format.
  int64_t normed_bytes() const { return e.padded_k(in) * e.operand_size(); }
  int64_t middle1_bytes() const { return w.low_rank() ? e.padded_k(w.up.k) * e.operand_size() : 0; }
  int64_t middle2_bytes() const { return w.low_rank() ? e.padded_k(w.down.n) * e.operand_size() : 0; }
  int64_t hidden_bytes() const { return chunk() * e.operand_size(); }
  int64_t sum_bytes() const { return sum_stride() * 4; }

  const Engine& e;
  const Weights& w;
  const RowsOf xs, rs;
  const Bias bias1, bias2;
  const Activation act;
  const std::optional<double> epsilon;
  const bool has_residual;
  const int64_t in, out, rows, hidden;
  // Hidden columns before this one are summed up without a product, those from the other on come
  // without one.
  const int64_t first_hidden = floats() ? w.down.identity_rows : 0;
  const int64_t first_copied = hidden - (copies() ? w.up.identity_columns : 0);
  const Dtype dtype;
  char* const result;

 private:
  // Whether what an identity gives is left as it is, not rounded first.
  bool floats() const { return e.operand == Dtype::f32; }
  // Whether products of the columns before end with a panel.
  bool copies() const {
    return floats() && hidden % panel_width(e) == 0 && first_hidden + w.up.identity_columns <= hidden;
  }

  Ahead part_of_down(int64_t first, int64_t columns) const {
    const int64_t n = sum_stride(), lanes = std::min(panel_width(e), n) * e.packed_size;
    const int64_t panels = lanes ? ceil_div(n * e.packed_size, lanes) : 0;
    return {static_cast<const char*>(w.down.data.get()) + first * lanes, panels * columns * lanes,
            columns * lanes, w.down.rows * lanes};
  }
};

// What lies between `in` and `up`, `down` and `out`, of some rows, into the middles that have elements.
void keep_middles(const Call& c, int64_t row, int64_t m, const void* t1, const void* t2,
                  const at::Tensor& middle1, const at::Tensor& middle2) {
  const Engine& e = c.e;
  if (middle1.numel()) keep_rows(m, c.w.up.k, t1, e.padded_k(c.w.up.k), e.operand, middle1, row);
  if (middle2.numel()) keep_rows(m, c.w.down.n, t2, e.padded_k(c.w.down.n), e.operand, middle2, row);
}

// Every thread takes rows through all of it.
void by_rows(const Call& c, const at::Tensor& middle1, const at::Tensor& middle2) {
  const Engine& e = c.e;
  const int64_t block = block_rows(e, c.rows), begin = c.first_hidden, hidden = c.hidden;
  const int64_t bytes = Scratch::aligned(block * c.normed_bytes()) +
                        Scratch::aligned(block * c.middle1_bytes()) +
                        Scratch::aligned(block * c.hidden_bytes()) +
                        Scratch::aligned(block * c.sum_bytes()) +
                        Scratch::aligned(block * c.middle2_bytes());

  for_each_block(e, c.rows, [&](int64_t row, int64_t m, Turn turn) {
    Scratch scratch(bytes);
    void* normed = scratch.take(block * c.normed_bytes());
    void* t1 = scratch.take(block * c.middle1_bytes());
    char* h = scratch.take<char>(block * c.hidden_bytes());
    float* sum = scratch.take<float>(block * c.sum_bytes());
    void* t2 = scratch.take(block * c.middle2_bytes());

    const Left left = c.enter(row, m, normed, t1, turn.first ? c.part_of_up(begin, hidden) : Ahead{});
    const Finish last = c.last(row);
    const Ahead residual = rows_ahead(last.residual, 0, m, c.out);
    const Ahead next = rows_ahead(c.xs.rows, row + m, std::min(m, c.rows - row - m), c.in);
    if (!c.w.low_rank()) {
      const Ahead then = turn.last ? c.w.down.follower() : next;
      return c.through(m, left, begin, hidden, h, sum, &last, {turn.first, residual, then});
    }
    const Ahead result = rows_ahead({last.out, last.stride, last.dtype}, 0, m, c.out);
    if (c.middle2_bytes() != c.w.down.n * e.operand_size()) {
      std::memset(t2, 0, m * c.middle2_bytes());
    }
    const Finish inner{t2, e.padded_k(c.w.down.n), e.operand};
    c.through(m, left, begin, hidden, h, sum, &inner,
              {turn.first, result, turn.first ? c.w.out.all() : residual});
    keep_middles(c, row, m, t1, t2, middle1, middle2);
    c.leave(row, m, t2, turn.last ? c.w.out.follower() : next);
  });
}

// Of few rows: every thread takes all of them through its part of the hidden layer, so that it reads
// only that part of its weights.
void by_hidden(const Call& c, const at::Tensor& middle1, const at::Tensor& middle2) {
  const Engine& e = c.e;
  const int64_t start = c.first_hidden, hidden = c.hidden, width = panel_width(e);
  const int64_t all = panels(e, hidden - start), share = ceil_div(all, at::get_num_threads());
  const int64_t parts = ceil_div(all, share);
  const int64_t left_bytes = c.w.low_rank() ? c.middle1_bytes() : c.normed_bytes();
  const int64_t left_stride = e.padded_k(c.w.up.k);
  Workspace workspace(c.rows * (left_bytes + parts * c.sum_bytes()));
  char* left = workspace.take(c.rows * left_bytes);
  float* sums = reinterpret_cast<float*>(workspace.take(c.rows * parts * c.sum_bytes()));

  for_each_block(e, c.rows, [&](int64_t row, int64_t m, Turn) {
    char* here = left + row * left_bytes;
    Scratch scratch(c.w.low_rank() ? m * c.normed_bytes() : 0);
    void* normed = c.w.low_rank() ? scratch.take(m * c.normed_bytes()) : here;
    const Left found = c.enter(row, m, normed, here, {});
    if (found.data != here) e.load(m, c.w.up.k, {found.data, found.stride, e.operand}, here, left_stride);
  });
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Session session(e);
    for (int64_t i = begin; i < end; ++i) {
      Scratch scratch(c.rows * c.hidden_bytes());
      c.through(c.rows, {left, left_stride}, start + i * share * width,
                std::min(start + (i + 1) * share * width, hidden), scratch.take<char>(c.rows * c.hidden_bytes()),
                sums + i * c.rows * c.sum_stride(), nullptr,
                {i == begin, {}, c.w.low_rank() ? c.w.out.all() : c.w.down.follower()});
    }
  });
  for_each_block(e, c.rows, [&](int64_t row, int64_t m, Turn turn) {
    const int64_t count = m * c.sum_stride();
    float* sum = sums + row * c.sum_stride();
    for (int64_t i = 1; i < parts; ++i) {
      const float* other = sum + i * c.rows * c.sum_stride();
      for (int64_t j = 0; j < count; ++j) sum[j] += other[j];
    }
    Scratch scratch(m * c.middle2_bytes());
    void* t2 = scratch.take(m * c.middle2_bytes());
    Finish finish = c.last(row);
    if (c.w.low_rank()) {
      std::memset(t2, 0, m * c.middle2_bytes());
      finish = {t2, e.padded_k(c.w.down.n), e.operand};
    }
    finish_sums(e, m, c.w.down.n, sum, c.sum_stride(), finish);
    if (!c.w.low_rank()) return;
    keep_middles(c, row, m, left + row * left_bytes, t2, middle1, middle2);
    c.leave(row, m, t2, turn.last ? c.w.out.follower() : Ahead{});
  });
}

void run(const Engine& e, const at::Tensor& x, const Weights& w, const MlpOptions& options,
         const at::Tensor& y, const at::Tensor& middle1 = {}, const at::Tensor& middle2 = {}) {
  const Call call(e, x, w, options, y);
  const int64_t columns = panels(e, call.hidden - call.first_hidden);
  (by_columns(e, call.rows, columns) ? by_hidden : by_rows)(call, middle1, middle2);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> low_rank_mlp(
    const at::Tensor& x, const at::Tensor& v1, const at::Tensor& u1, const OptionalTensor& b1,
    const at::Tensor& v2, const at::Tensor& u2, const OptionalTensor& b2,
    std::optional<std::string_view> activation, std::optional<double> epsilon,
    const OptionalTensor& residual, bool keep) {
  TORCH_CHECK(x.dim() > 0 && v1.dim() == 2 && u1.dim() == 2 && v2.dim() == 2 && u2.dim() == 2,
              "x (..., in) and matrices v1, u1, v2, u2 expected");
  const int64_t rank1 = v1.size(1), hidden = u1.size(0), rank2 = v2.size(1), out = u2.size(0);
  check(x, v1, "v1", {x.size(-1), rank1});
  check(x, u1, "u1", {hidden, rank1});
  check(x, v2, "v2", {hidden, rank2});
  check(x, u2, "u2", {out, rank2});
  if (b1) check(x, *b1, "b1", {hidden});
  if (b2) check(x, *b2, "b2", {out});
  if (residual) check(x, *residual, "residual", with_last(x, out));

  const auto kept = [&](int64_t n) {
    return keep ? at::empty(with_last(x, n), x.options()) : at::empty({0}, x.options());
  };
  at::Tensor y = at::empty(with_last(x, out), x.options());
  at::Tensor middle1 = kept(rank1), middle2 = kept(rank2);
  if (!row_count(x) || !out) return {y, middle1, middle2};

  const Engine& e = engine(dtype_of(x));
  const MlpOptions options{b1, b2, activation, epsilon, residual};
  if (are_vectors(x) && !keep) {
    by_vectors(e, x, {Matrix(v1, false), Matrix(u1, true), Matrix(v2, false), Matrix(u2, true), rank1,
                      hidden, rank2}, options, y);
    return {y, middle1, middle2};
  }
  const Weights weights{packed(e, v1, false), packed(e, u1, true), packed(e, v2, false),
                        packed(e, u2, true)};
  run(e, x, weights, options, y, middle1, middle2);
  return {y, middle1, middle2};
}

// `keep` is there for the other ops: this one keeps nothing.
at::Tensor dense_mlp(const at::Tensor& x, const at::Tensor& w1, const OptionalTensor& b1,
                     const at::Tensor& w2, const OptionalTensor& b2,
                     std::optional<std::string_view> activation, std::optional<double> epsilon,
                     const OptionalTensor& residual, bool keep) {
  TORCH_CHECK(x.dim() > 0 && w1.dim() == 2 && w2.dim() == 2,
              "x (..., in) and matrices w1, w2 expected");
  const int64_t hidden = w1.size(0), out = w2.size(0);
  check(x, w1, "w1", {hidden, x.size(-1)});
  check(x, w2, "w2", {out, hidden});
  if (b1) check(x, *b1, "b1", {hidden});
  if (b2) check(x, *b2, "b2", {out});
  if (residual) check(x, *residual, "residual", with_last(x, out));

  at::Tensor y = at::empty(with_last(x, out), x.options());
  if (!row_count(x) || !out) return y;

  const Engine& e = engine(dtype_of(x));
  const MlpOptions options{b1, b2, activation, epsilon, residual};
  if (are_vectors(x)) {
    by_vectors(e, x, {{}, Matrix(w1, true), Matrix(w2, true), {}, x.size(-1), hidden, out}, options, y);
  } else {
    run(e, x, {{}, packed(e, w1, true), packed(e, w2, true), {}}, options, y);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("low_rank_mlp_cpu", &low_rank_mlp);
  m.impl("dense_mlp_cpu", &dense_mlp);
}

}  // namespace adacomcat
