// y = act(x̂ W1ᵀ + b1) W2ᵀ + b2, W1 = U1 V1ᵀ and W2 = U2 V2ᵀ or dense: of the hidden layer a block of
// rows sees a few columns at a time.
#include <torch/library.h>

#include <tuple>

#include "shell.h"

namespace adacomcat {
namespace {

constexpr int64_t kHiddenPanels = 8;

// x̂ → in → up → activation → down → out → y; dense weights need neither `in` nor `out`.
struct Weights {
  Packed in, up, down, out;

  bool low_rank() const { return in.data != nullptr; }
};

struct Options {
  const OptionalTensor &b1, &b2;
  std::optional<std::string_view> activation;
  std::optional<double> epsilon;
  const OptionalTensor& residual;
};

// Into y, and what lies between `in` and `up`, `down` and `out` into the middles that have elements.
void run(const Engine& e, const at::Tensor& x, const Weights& w, const Options& options,
         const at::Tensor& y, const at::Tensor& middle1 = {}, const at::Tensor& middle2 = {}) {
  const int64_t in = x.size(-1), out = y.size(-1), hidden = w.up.n, rows = row_count(x);
  const int64_t inner1 = w.up.k, inner2 = w.down.n;
  const RowsOf xs(x), rs(options.residual ? *options.residual : x);
  const Bias bias1(options.b1), bias2(options.b2);
  const Activation act = parse_activation(options.activation);
  const int64_t size = e.operand_size(), block = block_rows(e, rows);
  const int64_t kx = e.padded_k(in), k1 = e.padded_k(inner1), k2 = e.padded_k(inner2);
  const int64_t n2 = e.padded_n(inner2);
  const int64_t chunk = kHiddenPanels * 2 * e.width;
  const Dtype dtype = dtype_of(y);
  char* result = static_cast<char*>(y.mutable_data_ptr());
  const int64_t bytes1 = w.low_rank() ? block * k1 * size : 0;
  const int64_t bytes2 = w.low_rank() ? block * k2 * size : 0;
  const int64_t bytes = Scratch::aligned(block * kx * size) + Scratch::aligned(bytes1) +
                        Scratch::aligned(block * chunk * size) + Scratch::aligned(block * n2 * 4) +
                        Scratch::aligned(bytes2);

  for_each_block(e, rows, [&](int64_t row, int64_t m, bool fresh) {
    Scratch scratch(bytes);
    Left left = left_operand(e, m, in, rows_from(xs.rows, row), options.epsilon,
                             scratch.take(block * kx * size));
    void* t1 = scratch.take(bytes1);
    char* h = scratch.take<char>(block * chunk * size);
    float* sum = scratch.take<float>(block * n2 * 4);
    void* t2 = scratch.take(bytes2);
    // A thread's first rows see every weight for the first time: each product fetches what the next
    // needs.
    const auto ahead = [&](Ahead memory) { return fresh ? memory : Ahead{}; };
    const auto part_of_up = [&](int64_t first) {
      const int64_t columns = std::min(chunk, hidden - first);
      return Ahead{w.up.from(e, first), e.packed_bytes(inner1, columns)};
    };
    const auto part_of_down = [&](int64_t first, int64_t columns) {
      const int64_t lanes = std::min(2 * e.width, n2) * e.packed_size;
      const int64_t panels = lanes ? ceil_div(n2 * e.packed_size, lanes) : 0;
      return Ahead{static_cast<const char*>(w.down.data.get()) + first * lanes,
                   panels * columns * lanes, columns * lanes, w.down.rows * lanes};
    };
    Finish last{result + row * out * dtype_size(dtype), out, dtype, bias2.rows};
    if (options.residual) last.residual = rows_from(rs.rows, row);

    if (w.low_rank()) {
      if (k1 != inner1) std::memset(t1, 0, m * k1 * size);
      if (k2 != inner2) std::memset(t2, 0, m * k2 * size);
      e.multiply({m, inner1, in, left.data, left.stride, w.in.data.get(), w.in.rows, 0,
                  ahead(part_of_up(0))},
                 {t1, k1, e.operand});
      left = {t1, k1};
    }
    for (int64_t first = 0; first == 0 || first < hidden; first += chunk) {
      const int64_t columns = std::min(chunk, hidden - first), following = first + columns;
      if (columns % e.group) std::memset(h, 0, m * chunk * size);
      e.multiply({m, columns, inner1, left.data, left.stride, part_of_up(first).data, w.up.rows, 0,
                  ahead(part_of_down(first, columns))},
                 {h, chunk, e.operand, bias1.from(first), act});
      Product down{m, inner2, columns, h, chunk, w.down.data.get(), w.down.rows, first};
      if (following < hidden) {
        down.ahead = ahead(part_of_up(following));
        e.accumulate(down, sum, n2, first > 0);
        continue;
      }
      down.ahead = ahead(w.low_rank() ? w.out.all() : w.down.follower());
      Finish finish = w.low_rank() ? Finish{t2, k2, e.operand} : last;
      if (first) finish.sum = sum, finish.sum_stride = n2;
      e.multiply(down, finish);
    }
    if (!w.low_rank()) return;
    if (middle1.numel()) keep_rows(m, inner1, t1, k1, e.operand, middle1, row);
    if (middle2.numel()) keep_rows(m, inner2, t2, k2, e.operand, middle2, row);
    e.multiply({m, out, inner2, t2, k2, w.out.data.get(), w.out.rows, 0, ahead(w.out.follower())}, last);
  });
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
  const Weights weights{packed(e, v1, false), packed(e, u1, true), packed(e, v2, false),
                        packed(e, u2, true)};
  run(e, x, weights, {b1, b2, activation, epsilon, residual}, y, middle1, middle2);
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
  run(e, x, {{}, packed(e, w1, true), packed(e, w2, true), {}},
      {b1, b2, activation, epsilon, residual}, y);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("low_rank_mlp_cpu", &low_rank_mlp);
  m.impl("dense_mlp_cpu", &dense_mlp);
}

}  // namespace adacomcat
