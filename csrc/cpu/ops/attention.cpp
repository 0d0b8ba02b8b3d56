// y = concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo + residual, with q, k, v projected from x̂
// and, in rotary_attention, q and k rotated.
//
// Three sweeps: the projections, then attention by image and head, then the output projection. If there
// are enough images for all threads, each image goes through the three alone, in its thread's cache. Of
// the logits a thread holds a few rows at a time. A rotation is a sweep of its own, in place.
#include "cpu/ops/attention.h"

#include <span>

#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"

namespace adacomcat {
namespace {

constexpr int64_t kLogitBytes = 32 * 1024;  // of the rows of logits that a thread holds

// An attention mask broadcast to (B, H, N, N), read where it is.
struct Masks {
  int64_t batch = 0, head = 0;
  Mask first;

  Masks(const OptionalTensor& mask, int64_t batches, int64_t heads, int64_t tokens) {
    if (!mask) return;
    const auto strides = broadcast_strides(*mask, {batches, heads, tokens, tokens});
    batch = strides[0], head = strides[1];
    first = {mask->const_data_ptr(), strides[2], strides[3],
             mask->scalar_type() == ScalarType::Bool};
    if (!first.boolean) first.dtype = dtype_of(*mask);
  }

  // The mask of head h in batch b, from `row` on.
  Mask of(int64_t b, int64_t h, int64_t row) const {
    if (!first.data) return first;
    Mask mask = first;
    const int64_t size = first.boolean ? 1 : dtype_size(first.dtype);
    mask.data =
        static_cast<const char*>(first.data) + (b * batch + h * head + row * first.row) * size;
    return mask;
  }
};

// Sines or cosines (P, head_dim) of every image and head, broadcast to (B, H, P, head_dim).
struct Angles {
  OptionalTensor tensor;
  int64_t batch = 0, head = 0;
  Rows first{nullptr, 0, Dtype::f32};

  Angles(const OptionalTensor& angles, int64_t batches, int64_t heads) {
    if (!angles) return;
    tensor = angles->stride(-1) == 1 ? *angles : torch::stable::contiguous(*angles);
    const auto strides =
        broadcast_strides(*tensor, {batches, heads, tensor->size(-2), tensor->size(-1)});
    batch = strides[0], head = strides[1];
    first = {tensor->const_data_ptr(), strides[2], dtype_of(*tensor)};
  }

  Rows of(int64_t b, int64_t h) const {
    return {static_cast<const char*>(first.data) + (b * batch + h * head) * dtype_size(first.dtype),
            first.stride, first.dtype};
  }
};

// q, k, v, context or the middle of a low-rank projection: rows in the operand format, back to back.
struct Activations {
  char* data;
  int64_t columns, size;

  char* at_row(int64_t row, int64_t column = 0) const {
    return data + (row * columns + column) * size;
  }
};

// The images of one sweep and their activations, (images * tokens) rows each.
struct Sweep {
  int64_t first_image, images;
  Activations q, k, v, context, middle_q, middle_k;
};

// x̂ Wᵀ + b, and where it goes.
struct Projection {
  const PackedWeight& weight;
  const Bias& bias;
  const Activations& to;
};
using Projections = std::span<const Projection>;

int64_t panel_count(const Engine& e, Projections projections) {
  int64_t sum = 0;
  for (const Projection& p : projections) sum += panel_count(e, p.to.columns);
  return sum;
}

// A first factor V (d, rank) of q or k, or an empty weight.
PackedWeight read_factor(const Engine& e, const OptionalTensor& v) {
  return v ? read_weight(e, *v, false) : PackedWeight{};
}

// A prefetch hint for the share of `weight` that a thread reads next, whose part of the current product
// is `part` of `total` panels.
PrefetchHint hint_for_share(const Engine& e, const PackedWeight& weight, const Part& part,
                            int64_t total) {
  const int64_t width = e.panel_columns(), all = panel_count(e, weight.n);
  const int64_t first = part.panel * all / total;
  const int64_t columns = std::min(part.panels * all / total * width, weight.n - first * width);
  return {weight.panel(e, first * width), e.packed_bytes(weight.k, columns)};
}

// Images are shared out whole if no thread is idle for long.
bool shares_images(int64_t images) {
  const int64_t threads = thread_count();
  return images % threads == 0 || images >= 4 * threads;
}

// One call of an op.
class Attention {
 public:
  Attention(const Tensor& x, const AttentionWeights& w, const AttentionOptions& options,
            const Tensor& y)
      : e(engine_for(x, w.wq)), wq(read_weight(e, w.wq, true)), wk(read_weight(e, w.wk, true)),
        wv(read_weight(e, w.wv, true)), wo(read_weight(e, w.wo, true)),
        vq(options.rotary ? read_factor(e, options.rotary->vq) : PackedWeight{}),
        vk(options.rotary ? read_factor(e, options.rotary->vk) : PackedWeight{}), xs(x),
        residuals(options.residual ? *options.residual : x), bias_q(w.bq),
        bias_k(options.rotary ? options.rotary->bk : OptionalTensor{}), bias_o(w.bo), no_bias({}),
        masks(options.mask, x.size(0), options.num_heads, x.size(1)),
        sin(options.rotary ? options.rotary->sin : OptionalTensor{}, x.size(0), options.num_heads),
        cos(options.rotary ? options.rotary->cos : OptionalTensor{}, x.size(0), options.num_heads),
        options(options), result(y), tokens(x.size(1)), in(x.size(2)), out(y.size(2)) {}

  // All sweeps over some images.
  void run(int64_t image, int64_t images, Turn turn, const Intermediates* intermediates) const {
    const int64_t rows = images * tokens, size = e.operand_size();
    const int64_t qk_bytes = rows * wq.n * size, vo_bytes = rows * wv.n * size;
    Workspace workspace(
        {qk_bytes, qk_bytes, vo_bytes, vo_bytes, rows * vq.n * size, rows * vk.n * size});
    const auto next = [&](int64_t columns) {
      return Activations{workspace.next<char>(), columns, size};
    };
    const Activations q = next(wq.n), k = next(wq.n), v = next(wv.n), context = next(wv.n);
    const Activations middle_q = next(vq.n), middle_k = next(vk.n);
    const Sweep sweep{image, images, q, k, v, context, middle_q, middle_k};
    project_inputs(sweep, turn);
    rotate(sweep);
    attend(sweep);
    project_output(sweep, turn);
    if (!intermediates) return;
    const Activations* const activations[] = {&q, &k, &v, &context};
    for (int i = 0; i < 4; ++i) {
      const Activations& a = *activations[i];
      const Tensor& to = (*intermediates)[i];
      if (to.numel()) store_rows(e, rows, a.columns, a.data, a.columns, to, image * tokens);
    }
  }

 private:
  // q, k and v from x̂. Low-rank queries and keys go through their middles.
  void project_inputs(const Sweep& sweep, Turn turn) const {
    const Projection q{wq, bias_q, sweep.q}, k{wk, bias_k, sweep.k}, v{wv, no_bias, sweep.v};
    const Projection from_x[] = {vq.n ? Projection{vq, no_bias, sweep.middle_q} : q,
                                 vk.n ? Projection{vk, no_bias, sweep.middle_k} : k, v};
    project_all(rows_from(xs.rows, sweep.first_image * tokens), in, options.epsilon, from_x, sweep,
                turn);
    if (vq.n) project_all(rows_of(sweep.middle_q), vq.n, {}, {&q, 1}, sweep, turn);
    if (vk.n) project_all(rows_of(sweep.middle_k), vk.n, {}, {&k, 1}, sweep, turn);
  }

  Rows rows_of(const Activations& a) const { return {a.data, a.columns, e.operand}; }

  // All these projections of the sweep's rows (·, k), or of their layer norm.
  void project_all(const Rows& from, int64_t k, std::optional<double> epsilon,
                   Projections projections, const Sweep& sweep, Turn turn) const {
    for_each_part(e, sweep.images * tokens, panel_count(e, projections), [&](const Part& part) {
      Scratch scratch({lhs_bytes(e, part.rows, k)});
      const LhsOperand lhs =
          lhs_operand(e, part.rows, k, rows_from(from, part.row), epsilon, scratch.next());
      project(projections, part, lhs, turn.first && part.turn.first);
    });
  }

  // A part of the projections, whose panels are counted through all three. `fresh`: the weights are read
  // for the first time, and each product prefetches the next one's.
  void project(Projections projections, const Part& part, LhsOperand lhs, bool fresh) const {
    const int64_t width = e.panel_columns();
    int64_t begin = part.panel, end = part.panel + part.panels;
    for (size_t i = 0; i < projections.size(); ++i) {
      const Projection& p = projections[i];
      const int64_t panels = panel_count(e, p.to.columns);
      const int64_t column = std::max<int64_t>(begin, 0) * width;
      const int64_t columns = std::min(end * width, p.to.columns) - column;
      begin -= panels, end -= panels;
      if (columns <= 0) continue;
      PrefetchHint hint = hint_for_share(e, wo, part, panel_count(e, projections));
      if (end > 0 && i + 1 < projections.size()) {
        const PackedWeight& next = projections[i + 1].weight;
        hint = {next.data, e.packed_bytes(next.k, std::min(end * width, next.n))};
      }
      e.multiply(
          p.weight.product(e, part.rows, lhs, column, columns, fresh ? hint : PrefetchHint{}),
          {p.to.at_row(part.row, column), p.to.columns, e.operand,
           rows_from(p.bias.rows, 0, column)});
    }
  }

  // Turns queries and keys of the last tokens, in place.
  void rotate(const Sweep& sweep) const {
    if (!sin.first.data) return;
    const int64_t rotated = sin.tensor->size(-2), head_dim = sin.tensor->size(-1);
    for_each_item(e, sweep.images * options.num_heads, [&](int64_t i, Turn) {
      const int64_t image = i / options.num_heads, head = i % options.num_heads;
      const int64_t row = (image + 1) * tokens - rotated;
      const Rows sines = sin.of(sweep.first_image + image, head);
      const Rows cosines = cos.of(sweep.first_image + image, head);
      for (const Activations* a : {&sweep.q, &sweep.k}) {
        e.rotate(rotated, head_dim, a->at_row(row, head * head_dim), a->columns, sines, cosines,
                 options.rotary->half);
      }
    });
  }

  // Every head of every image. If there are fewer of them than threads, the rows of a head are shared.
  void attend(const Sweep& sweep) const {
    const Engine& activations = activation_engine(result.dtype, e);
    const int64_t heads = sweep.images * options.num_heads;
    const int64_t shares = ceil_div(thread_count(), heads), step = activations.tile_rows;
    const int64_t rows = ceil_div(ceil_div(tokens, shares), step) * step;
    const int64_t parts = ceil_div(tokens, rows);
    for_each_item(activations, heads * parts, [&](int64_t i, Turn) {
      const int64_t head = i / parts, first = i % parts * rows;
      attend_head(activations, sweep, head / options.num_heads, head % options.num_heads, first,
                  std::min(first + rows, tokens));
    });
  }

  // Rows `begin` to `end` of one head of one image: context = softmax(q kᵀ) v. The softmax stands in
  // place of the logits, in the first cache, and is normalised in the last epilogue.
  void attend_head(const Engine& e, const Sweep& sweep, int64_t image, int64_t head, int64_t begin,
                   int64_t end) const {
    const int64_t n = tokens, width = e.padded_n(n), first = image * n;
    const int64_t rank_qk = wq.n / options.num_heads, rank_vo = wv.n / options.num_heads;
    const int64_t tiles = std::max<int64_t>(kLogitBytes / 4 / width / e.tile_rows, 1);
    const int64_t block = even_share(end - begin, tiles * e.tile_rows, e.row_step);
    const int64_t row_bytes = width * sizeof(float), softmax_stride = row_bytes / e.operand_size();
    Scratch scratch({e.packed_bytes(rank_qk, n), e.packed_bytes(n, rank_vo),
                     lhs_bytes(e, block, rank_qk), block * row_bytes,
                     block * static_cast<int64_t>(sizeof(float))});
    void* keys = scratch.next();
    void* values = scratch.next();
    void* queries = scratch.next();
    float* logits = scratch.next<float>();
    float* inverse_sum = scratch.next<float>();

    const Activations &q = sweep.q, &k = sweep.k, &v = sweep.v;
    e.pack(rank_qk, n, k.at_row(first, head * rank_qk), 1, k.columns, e.operand, keys, nullptr);
    e.pack(n, rank_vo, v.at_row(first, head * rank_vo), v.columns, 1, e.operand, values, nullptr);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t m = std::min(block, end - row);
      const Rows rows{q.at_row(first + row, head * rank_qk), q.columns, e.operand};
      const LhsOperand lhs = lhs_operand(e, m, rank_qk, rows, {}, queries);
      e.accumulate({m, n, rank_qk, lhs.data, lhs.stride, keys, e.packed_k(rank_qk), 0}, logits,
                   width, false);
      e.softmax(m, n, logits, width, options.scale, masks.of(sweep.first_image + image, head, row),
                logits, softmax_stride, inverse_sum);
      Epilogue epilogue{sweep.context.at_row(first + row, head * rank_vo), sweep.context.columns,
                        e.operand};
      epilogue.row_scale = inverse_sum;
      e.multiply({m, rank_vo, n, logits, softmax_stride, values, e.packed_k(n), 0}, epilogue);
    }
  }

  void project_output(const Sweep& sweep, Turn turn) const {
    const int64_t rows = sweep.images * tokens, first = sweep.first_image * tokens;
    for_each_part(e, rows, panel_count(e, out), [&](const Part& part) {
      Scratch scratch({lhs_bytes(e, part.rows, wo.k)});
      const Rows from{sweep.context.at_row(part.row), sweep.context.columns, e.operand};
      const LhsOperand lhs = lhs_operand(e, part.rows, wo.k, from, {}, scratch.next());
      const int64_t column = part.panel * e.panel_columns(), row = first + part.row;
      const int64_t columns = std::min(out - column, part.panels * e.panel_columns());
      Epilogue epilogue = result.epilogue(row, column);
      epilogue.bias = rows_from(bias_o.rows, 0, column);
      if (options.residual) epilogue.residual = rows_from(residuals.rows, row, column);
      PrefetchHint hint;
      if (part.turn.last) {
        hint = turn.last ? wo.next_weight : hint_for_rows(xs.rows, first + rows, rows, in);
      }
      e.multiply(wo.product(e, part.rows, lhs, column, columns, hint), epilogue);
    });
  }

  const Engine& e;
  const PackedWeight wq, wk, wv, wo, vq, vk;
  const TensorRows xs, residuals;
  const Bias bias_q, bias_k, bias_o, no_bias;
  const Masks masks;
  const Angles sin, cos;
  const AttentionOptions& options;
  const OutputRows result;
  const int64_t tokens, in, out;
};

}  // namespace

void run_attention(const Tensor& x, const AttentionWeights& weights,
                   const AttentionOptions& options, const Tensor& y,
                   const Intermediates* intermediates) {
  const Attention call(x, weights, options, y);
  const int64_t images = x.size(0);
  if (!shares_images(images)) return call.run(0, images, {true, true}, intermediates);
  for_each_item(engine_for(x, weights.wq), images,
                [&](int64_t image, Turn turn) { call.run(image, 1, turn, intermediates); });
}

}  // namespace adacomcat
