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

// (rows, columns) in the operand format, rows back to back: a part of the calling thread's memory.
struct Operand {
  char* data;
  int64_t rows, columns, size;

  char* at_row(int64_t row, int64_t column = 0) const {
    return data + (row * columns + column) * size;
  }
};

// q, k, v and the context between two sweeps, reused from call to call: fresh memory of this size
// would come from the system page by page.
class Workspace {
 public:
  Workspace(const Engine& e, int64_t rows, int64_t columns) : size_(e.operand_size()) {
    thread_local std::vector<char> memory;
    grow(memory, rows * columns * size_ + 5 * 64);
    next_ = memory.data();
  }

  Operand take(int64_t rows, int64_t columns) {
    const Operand operand{next_, rows, columns, size_};
    next_ += Scratch::aligned(rows * columns * size_);
    return operand;
  }

 private:
  char* next_;
  int64_t size_;
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
                  Scratch::aligned(block * width * size) + Scratch::aligned(block * 4));
  void* keys = scratch.take(key_bytes);
  void* values = scratch.take(value_bytes);
  void* queries = scratch.take(block * kq * size);
  float* logits = scratch.take<float>(block * width * 4);
  void* weights = e.operand == Dtype::f32 ? logits : scratch.take(block * width * size);
  float* inverse_sum = scratch.take<float>(block * 4);

  const int64_t first = image * n;
  e.pack(s.rank_qk, n, k.at_row(first, head * s.rank_qk), 1, k.columns, e.operand, keys);
  e.pack(n, s.rank_vo, v.at_row(first, head * s.rank_vo), v.columns, 1, e.operand, values);
  for (int64_t row = begin; row < end; row += block) {
    const int64_t m = std::min(block, end - row);
    const Rows rows{q.at_row(first + row, head * s.rank_qk), q.columns, e.operand};
    const Left left = left_operand(e, m, s.rank_qk, rows, {}, queries);
    e.accumulate({m, n, s.rank_qk, left.data, left.stride, keys, e.packed_k(s.rank_qk), 0}, logits, width, false);
    e.softmax(m, n, logits, width, s.scale, masks.of(s.first_image + image, head, row), weights, width,
              inverse_sum);
    Finish finish{context.at_row(first + row, head * s.rank_vo), context.columns, e.operand};
    finish.row_scale = inverse_sum;
    e.multiply({m, s.rank_vo, n, weights, width, values, e.packed_k(n), 0}, finish);
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
  const Bias bias_q(bq), bias_o(bo);
  const int64_t kx = e.padded_k(in), kc = e.padded_k(columns_vo);
  const Dtype dtype = dtype_of(y);
  char* result = static_cast<char*>(y.mutable_data_ptr());

  // `fresh`: this thread's first.
  const auto sweep = [&](int64_t image, int64_t images, bool fresh) {
    const int64_t first = image * tokens, count = images * tokens, block = block_rows(e, count);
    Workspace workspace(e, count, 2 * (columns_qk + columns_vo));
    const Operand q = workspace.take(count, columns_qk), k = workspace.take(count, columns_qk);
    const Operand v = workspace.take(count, columns_vo), z = workspace.take(count, columns_vo);

    for_each_block(e, count, [&](int64_t row, int64_t m, bool fresh_rows) {
      Scratch scratch(Scratch::aligned(block * kx * size));
      const Left left = left_operand(e, m, in, rows_from(xs.rows, first + row), epsilon,
                                     scratch.take(block * kx * size));
      const auto project = [&](const Packed& weight, const Operand& to, Rows bias, Ahead ahead) {
        e.multiply({m, to.columns, in, left.data, left.stride, weight.data.get(), weight.rows, 0,
                    fresh && fresh_rows ? ahead : Ahead{}},
                   {to.at_row(row), to.columns, e.operand, bias});
      };
      project(pq, q, bias_q.rows, pk.all());
      project(pk, k, {nullptr, 0, Dtype::f32}, pv.all());
      project(pv, v, {nullptr, 0, Dtype::f32}, po.all());
    });
    attend(e, {image, images, tokens, num_heads, columns_qk / num_heads, columns_vo / num_heads,
               static_cast<float>(scale)}, q, k, v, z, masks);
    for_each_block(e, count, [&](int64_t row, int64_t m, bool fresh_rows) {
      Scratch scratch(Scratch::aligned(block * kc * size));
      const Rows from{z.at_row(row), z.columns, e.operand};
      const Left left = left_operand(e, m, columns_vo, from, {}, scratch.take(block * kc * size));
      Finish finish{result + (first + row) * out * dtype_size(dtype), out, dtype, bias_o.rows};
      if (residual) finish.residual = rows_from(rs.rows, first + row);
      const Ahead ahead = fresh && fresh_rows ? po.follower() : Ahead{};
      e.multiply({m, out, columns_vo, left.data, left.stride, po.data.get(), po.rows, 0, ahead}, finish);
    });
    if (!keep) return;
    const Operand* operands[] = {&q, &k, &v, &z};
    for (int i = 0; i < 4; ++i) {
      const Operand& o = *operands[i];
      keep_rows(count, o.columns, o.data, o.columns, e.operand, middles[i], first);
    }
  };
  if (!image_by_image(x.size(0))) {
    sweep(0, x.size(0), true);
    return results;
  }
  at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) sweep(image, 1, image == begin);
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("low_rank_attention_cpu", &low_rank_attention); }

}  // namespace adacomcat
