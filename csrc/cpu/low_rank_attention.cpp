// concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo, with q, k, v projected from x̂.
//
// Three sweeps: projections by rows, attention by image and head, output projection by rows. Where
// there are images enough for all threads, each goes through the three alone, in its thread's cache.
// Of the logits a thread holds a few rows at a time.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "shell.h"

namespace adacomcat {
namespace {

constexpr int64_t kLogitBytes = 32 * 1024;

// A mask broadcast to (B, H, N, N), read in place.
struct Masks {
  at::Tensor held;
  int64_t batch = 0, head = 0;
  Mask first;

  Masks(const OptionalTensor& mask, int64_t batches, int64_t heads, int64_t tokens) {
    if (!mask) return;
    held = mask->expand({batches, heads, tokens, tokens});
    batch = held.stride(0), head = held.stride(1);
    first = {held.const_data_ptr(), held.stride(2), held.stride(3), held.scalar_type() == at::kBool};
    if (!first.boolean) first.dtype = dtype_of(held);
  }

  Mask of(int64_t b, int64_t h, int64_t row) const {
    if (!first.data) return first;
    Mask mask = first;
    const int64_t size = first.boolean ? 1 : dtype_size(first.dtype);
    mask.data = static_cast<const char*>(first.data) +
                (b * batch + h * head + row * first.row) * size;
    return mask;
  }
};

// (rows, columns) in the operand format, rows back to back.
struct Operand {
  char* data;
  int64_t rows, columns, size;

  char* at_row(int64_t row, int64_t column = 0) const {
    return data + (row * columns + column) * size;
  }
};

struct Heads {
  int64_t first_image, images, tokens, heads, rank_qk, rank_vo;
  float scale;
};

// One head of one image: context = softmax(q kᵀ) v for the rows of one share.
void attend_head(const Engine& e, const Heads& s, int64_t image, int64_t head, int64_t begin,
                 int64_t end, const Operand& q, const Operand& k, const Operand& v,
                 const Operand& context, const Masks& masks) {
  const int64_t size = e.operand_size(), n = s.tokens, width = e.padded_n(n);
  const int64_t kq = e.padded_k(s.rank_qk);
  const int64_t tiles = std::max<int64_t>(kLogitBytes / 4 / width / e.tile_rows, 1);
  const int64_t block = even_share(end - begin, tiles * e.tile_rows, e.row_step);
  const int64_t key_bytes = e.packed_bytes(s.rank_qk, n), value_bytes = e.packed_bytes(n, s.rank_vo);
  Scratch scratch(Scratch::aligned(key_bytes) + Scratch::aligned(value_bytes) +
                  Scratch::aligned(block * kq * size) + Scratch::aligned(block * width * 4) +
                  Scratch::aligned(block * 4));
  void* keys = scratch.take(key_bytes);
  void* values = scratch.take(value_bytes);
  void* queries = scratch.take(block * kq * size);
  float* logits = scratch.take<float>(block * width * 4);
  float* inverse_sum = scratch.take<float>(block * 4);

  const int64_t weights_stride = width * 4 / size;  // in place of the logits, in the first cache
  const int64_t first = image * n;
  e.pack(s.rank_qk, n, k.at_row(first, head * s.rank_qk), 1, k.columns, e.operand, keys);
  e.pack(n, s.rank_vo, v.at_row(first, head * s.rank_vo), v.columns, 1, e.operand, values);
  for (int64_t row = begin; row < end; row += block) {
    const int64_t m = std::min(block, end - row);
    const Rows rows{q.at_row(first + row, head * s.rank_qk), q.columns, e.operand};
    const Left left = left_operand(e, m, s.rank_qk, rows, {}, queries);
    e.accumulate({m, n, s.rank_qk, left.data, left.stride, keys, e.packed_k(s.rank_qk), 0}, logits, width, false);
    e.softmax(m, n, logits, width, s.scale, masks.of(s.first_image + image, head, row), logits,
              weights_stride, inverse_sum);
    Finish finish{context.at_row(first + row, head * s.rank_vo), context.columns, e.operand};
    finish.row_scale = inverse_sum;
    e.multiply({m, s.rank_vo, n, logits, weights_stride, values, e.packed_k(n), 0}, finish);
  }
}

// x̂ Wᵀ + b to be.
struct Projection {
  const Packed& weight;
  const Bias& bias;
  const Operand& to;
};

int64_t panels_of(const Engine& e, const std::array<Projection, 3>& projections) {
  int64_t sum = 0;
  for (const Projection& p : projections) sum += panels(e, p.to.columns);
  return sum;
}

// As large a part of `weight` as `part` is of `total` panels: what its thread reads of it, or nearly.
Ahead share_of(const Engine& e, const Packed& weight, const Part& part, int64_t total) {
  const int64_t all = panels(e, weight.n), first = part.panel * all / total;
  const int64_t columns = std::min(part.panels * all / total * panel_width(e),
                                   weight.n - first * panel_width(e));
  return {weight.from(e, first * panel_width(e)), e.packed_bytes(weight.k, columns)};
}

// A part of the projections, their panels counted through; `then` is the weight that comes after them.
void project(const Engine& e, const std::array<Projection, 3>& projections, const Part& part, int64_t in,
             const Left& left, bool fresh, const Packed& then) {
  int64_t begin = part.panel, end = part.panel + part.panels;
  for (size_t i = 0; i < projections.size(); ++i) {
    const Projection& p = projections[i];
    const int64_t count = panels(e, p.to.columns), first = std::max<int64_t>(begin, 0);
    const int64_t column = first * panel_width(e);
    const int64_t columns = std::min(end * panel_width(e), p.to.columns) - column;
    begin -= count, end -= count;
    if (columns <= 0) continue;
    Ahead ahead = share_of(e, then, part, panels_of(e, projections));
    if (end > 0 && i + 1 < projections.size()) {
      const Packed& next = projections[i + 1].weight;
      ahead = {next.data.get(), e.packed_bytes(in, std::min(end * panel_width(e), next.n))};
    }
    e.multiply({part.rows, columns, in, left.data, left.stride, p.weight.from(e, column),
                p.weight.rows, 0, fresh ? ahead : Ahead{}},
               {p.to.at_row(part.row, column), p.to.columns, e.operand, p.bias.from(column)});
  }
}

// Every head of every image, the rows of a head shared where there are fewer heads than threads.
void attend(const Engine& e, const Heads& s, const Operand& q, const Operand& k, const Operand& v,
            const Operand& context, const Masks& masks) {
  const int64_t heads = s.images * s.heads;
  const int64_t shares = ceil_div(at::get_num_threads(), heads);
  const int64_t rows = ceil_div(ceil_div(s.tokens, shares), e.tile_rows) * e.tile_rows;
  const int64_t parts = ceil_div(s.tokens, rows);
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Session session(e);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts, first = i % parts * rows;
      attend_head(e, s, head / s.heads, head % s.heads, first, std::min(first + rows, s.tokens),
                  q, k, v, context, masks);
    }
  });
}

// Whether images are shared out whole: a few of them would leave threads idle.
bool image_by_image(int64_t images) {
  const int64_t threads = at::get_num_threads();
  return images % threads == 0 || images >= 4 * threads;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> low_rank_attention(
    const at::Tensor& x, const at::Tensor& wq, const OptionalTensor& bq, const at::Tensor& wk,
    const at::Tensor& wv, const at::Tensor& wo, const OptionalTensor& bo, int64_t num_heads,
    double scale, const OptionalTensor& attn_mask, std::optional<double> epsilon,
    const OptionalTensor& residual, bool keep) {
  TORCH_CHECK(x.dim() == 3, "x must be (B, N, d), got ", x.sizes());
  TORCH_CHECK(wq.dim() == 2 && wv.dim() == 2 && wo.dim() == 2, "wq, wv, wo must be matrices");
  const int64_t in = x.size(2), columns_qk = wq.size(0), columns_vo = wv.size(0), out = wo.size(0);
  const int64_t rows = row_count(x);
  TORCH_CHECK(num_heads > 0 && columns_qk % num_heads == 0 && columns_vo % num_heads == 0,
              "the rows of wq and wv must split into ", num_heads, " heads");
  check(x, wq, "wq", {columns_qk, in});
  check(x, wk, "wk", {columns_qk, in});
  check(x, wv, "wv", {columns_vo, in});
  check(x, wo, "wo", {out, columns_vo});
  if (bq) check(x, *bq, "bq", {columns_qk});
  if (bo) check(x, *bo, "bo", {out});
  if (residual) check(x, *residual, "residual", with_last(x, out));

  const auto kept = [&](int64_t n) {
    return keep ? at::empty(with_last(x, n), x.options()) : at::empty({0}, x.options());
  };
  at::Tensor y = at::empty(with_last(x, out), x.options());
  const std::array<at::Tensor, 4> middles{kept(columns_qk), kept(columns_qk), kept(columns_vo),
                                          kept(columns_vo)};
  const auto results = std::tuple_cat(std::make_tuple(y), middles);
  if (!rows || !out) return results;

  const Engine& e = engine(dtype_of(x));
  const int64_t tokens = x.size(1), size = e.operand_size();
  const Masks masks(attn_mask, x.size(0), num_heads, tokens);
  const Packed pq = packed(e, wq, true), pk = packed(e, wk, true), pv = packed(e, wv, true);
  const Packed po = packed(e, wo, true);
  const RowsOf xs(x), rs(residual ? *residual : x);
  const Bias bias_q(bq), bias_o(bo), no_bias({});
  const int64_t kx = e.padded_k(in), kc = e.padded_k(columns_vo);
  const Dtype dtype = dtype_of(y);
  char* result = static_cast<char*>(y.mutable_data_ptr());

  const auto sweep = [&](int64_t image, int64_t images, Turn turn) {
    const int64_t first = image * tokens, count = images * tokens;
    Workspace workspace(count * 2 * (columns_qk + columns_vo) * size);
    const auto operand = [&](int64_t columns) {
      return Operand{workspace.take(count * columns * size), count, columns, size};
    };
    const Operand q = operand(columns_qk), k = operand(columns_qk);
    const Operand v = operand(columns_vo), z = operand(columns_vo);

    const std::array<Projection, 3> projections{
        {{pq, bias_q, q}, {pk, no_bias, k}, {pv, no_bias, v}}};
    for_each_part(e, count, panels_of(e, projections), [&](const Part& part) {
      Scratch scratch(Scratch::aligned(part.rows * kx * size));
      const Left left = left_operand(e, part.rows, in, rows_from(xs.rows, first + part.row), epsilon,
                                     scratch.take(part.rows * kx * size));
      project(e, projections, part, in, left, turn.first && part.turn.first, po);
    });
    attend(activation_engine(dtype), {image, images, tokens, num_heads, columns_qk / num_heads, columns_vo / num_heads,
               static_cast<float>(scale)}, q, k, v, z, masks);
    for_each_part(e, count, panels(e, out), [&](const Part& part) {
      Scratch scratch(Scratch::aligned(part.rows * kc * size));
      const Rows from{z.at_row(part.row), z.columns, e.operand};
      const Left left = left_operand(e, part.rows, columns_vo, from, {},
                                     scratch.take(part.rows * kc * size));
      const int64_t column = part.panel * panel_width(e), row = first + part.row;
      Finish finish{result + (row * out + column) * dtype_size(dtype), out, dtype,
                    bias_o.from(column)};
      if (residual) finish.residual = rows_from(rs.rows, row, column);
      const Ahead ahead = !part.turn.last ? Ahead{}
                          : turn.last     ? po.follower()
                                          : rows_ahead(xs.rows, first + count, count, in);
      e.multiply({part.rows, std::min(out - column, part.panels * panel_width(e)), columns_vo,
                  left.data, left.stride, po.from(e, column), po.rows, 0, ahead}, finish);
    });
    if (!keep) return;
    const Operand* operands[] = {&q, &k, &v, &z};
    for (int i = 0; i < 4; ++i) {
      const Operand& o = *operands[i];
      keep_rows(count, o.columns, o.data, o.columns, e.operand, middles[i], first);
    }
  };
  if (!image_by_image(x.size(0))) {
    sweep(0, x.size(0), {true, true});
    return results;
  }
  at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    const Session session(e);
    for (int64_t image = begin; image < end; ++image) {
      sweep(image, 1, {image == begin, image + 1 == end});
    }
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("low_rank_attention_cpu", &low_rank_attention); }

}  // namespace adacomcat
