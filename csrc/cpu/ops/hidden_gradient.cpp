// The gradient of a hidden layer h = act(middle Uᵀ + b), which is computed anew, and of what surrounds it.
// Neither middle Uᵀ nor the gradient of h is ever stored whole: each block of rows meets the hidden layer
// in chunks of columns.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/packed_weight.h"

namespace adacomcat {
namespace {

constexpr int64_t kHiddenPanels = 8;  // of a chunk

struct Weights {
  const Tensor& u;
  const OptionalTensor &bias, &u2, &v2, &v;

  // Columns of grad U2, or of grad.
  int64_t inner2(const Tensor& grad) const { return u2 ? u2->size(1) : grad.size(-1); }
};

// Each is empty if it is not wanted.
struct Gradients {
  Tensor pre, h, middle2, middle, x;
};

void check(const Tensor& grad, const Tensor& middle, const Weights& w) {
  const int64_t inner = middle.size(-1), hidden = w.u.size(0), out = grad.size(-1);
  check_like(middle, w.u, "u", {hidden, inner});
  check_like(middle, w.bias, "bias", {hidden});
  check_like(middle, grad, "grad", with_last(middle, w.v2 ? out : hidden));
  if (w.u2) check_like(middle, *w.u2, "u2", {out, w.inner2(grad)});
  check_like(middle, w.v2, "v2", {hidden, w.inner2(grad)});
  if (w.v) check_like(middle, *w.v, "v", {w.v->size(0), inner});
}

PackedWeight pack_optional(const Engine& e, const OptionalTensor& weight, bool transposed) {
  return weight ? read_weight(e, *weight, transposed) : PackedWeight{};
}

// One call of the op.
class HiddenGradient {
 public:
  HiddenGradient(const Tensor& grad, const Tensor& middle, const Weights& w, Activation act,
                 const Gradients& to)
      : e(activation_engine(dtype_of(middle))), into2(pack_optional(e, w.u2, false)),
        out_of2(pack_optional(e, w.v2, true)), up(read_weight(e, w.u, true)),
        back(read_weight(e, w.u, false)), into_x(pack_optional(e, w.v, true)), middles(middle),
        grads(grad), bias(w.bias), act(act), to(to), rows(row_count(middle)),
        inner(middle.size(-1)), hidden(w.u.size(0)), out(grad.size(-1)), inner2(w.inner2(grad)) {}

  void run() const {
    const int64_t block = block_rows(e, rows), size = e.operand_size();
    for_each_block(e, rows, [&](int64_t row, int64_t m, Turn) {
      Scratch scratch({lhs_bytes(e, block, out), lhs_bytes(e, block, inner),
                       lhs_bytes(e, block, inner2), lhs_bytes(e, block, inner),
                       block * chunk() * kFloat, block * chunk() * size,
                       block * e.padded_n(inner) * kFloat});
      const LhsOperand incoming =
          lhs_operand(e, m, out, rows_from(grads.rows, row), {}, scratch.next());
      const LhsOperand lhs =
          lhs_operand(e, m, inner, rows_from(middles.rows, row), {}, scratch.next());
      const LhsOperand grad2 = through_u2(row, m, incoming, scratch.next());
      void* grad_middle = scratch.next();
      const Buffers buffers{scratch.next(), scratch.next(), scratch.next<float>()};
      for (int64_t first = 0; first == 0 || first < hidden; first += chunk()) {
        through_hidden(row, m, first, lhs, grad2, buffers);
      }
      store_inputs(row, m, buffers.sum, grad_middle);
    });
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);

  // The gradient of a chunk, the gradient before its activation as an lhs, and the gradient of the middle,
  // summed over chunks.
  struct Buffers {
    void *grad_h, *pre;
    float* sum;
  };

  int64_t chunk() const { return kHiddenPanels * e.panel_columns(); }

  // grad U2, or grad if there is no U2.
  LhsOperand through_u2(int64_t row, int64_t m, LhsOperand incoming, void* result) const {
    if (!into2.data) return incoming;
    const int64_t stride = e.padded_k(inner2);
    if (stride != inner2) std::memset(result, 0, lhs_bytes(e, m, inner2));
    e.multiply(into2.product(m, incoming), {result, stride, e.operand});
    store_rows(e, m, inner2, result, stride, to.middle2, row);
    return {result, stride};
  }

  // The chunk of the hidden layer that starts at column `first`.
  void through_hidden(int64_t row, int64_t m, int64_t first, LhsOperand lhs, LhsOperand grad2,
                      const Buffers& buffers) const {
    const int64_t columns = std::min(chunk(), hidden - first);
    const OutputRows pre(to.pre);
    Epilogue epilogue = pre.epilogue(row, first);
    epilogue.bias = rows_from(bias.rows, 0, first);
    epilogue.activation = act;
    if (out_of2.data) {
      e.multiply(out_of2.product(e, m, grad2, first, columns),
                 {buffers.grad_h, chunk(), pre.dtype});
      epilogue.gradient = {buffers.grad_h, chunk(), pre.dtype};
    } else {
      epilogue.gradient = rows_from(grads.rows, row, first);
    }
    if (to.h.numel()) epilogue.activated = OutputRows(to.h).at(row, first);
    e.multiply(up.product(e, m, lhs, first, columns), epilogue);
    const LhsOperand grad_pre =
        lhs_operand(e, m, columns, {epilogue.out, hidden, pre.dtype}, {}, buffers.pre);
    Gemm gemm = back.product(m, grad_pre);
    gemm.k = columns, gemm.rhs_first = first;
    e.accumulate(gemm, buffers.sum, e.padded_n(inner), first > 0);
  }

  // The gradients of the middle and of x.
  void store_inputs(int64_t row, int64_t m, const float* sum, void* grad_middle) const {
    const int64_t stride = e.padded_k(inner);
    e.load(m, inner, {sum, e.padded_n(inner), Dtype::f32}, grad_middle, stride);
    store_rows(e, m, inner, grad_middle, stride, to.middle, row);
    if (into_x.data) {
      e.multiply(into_x.product(m, {grad_middle, stride}), OutputRows(to.x).epilogue(row));
    }
  }

  const Engine& e;
  const PackedWeight into2, out_of2, up, back, into_x;
  const TensorRows middles, grads;
  const Bias bias;
  const Activation act;
  const Gradients& to;
  const int64_t rows, inner, hidden, out, inner2;
};

// The gradient of h is grad_h = (grad U2) V2ᵀ, or grad V2ᵀ without u2, or grad without both. Returns
// act'(middle Uᵀ + b) · grad_h, h if it is wanted, grad U2, and the gradients of the middle and, if there
// is a v, of x: grad_pre U and grad_pre U Vᵀ.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hidden_gradient(
    const Tensor& grad, const Tensor& middle, const Tensor& u, const OptionalTensor& bias,
    std::optional<std::string> activation, const OptionalTensor& u2, const OptionalTensor& v2,
    const OptionalTensor& v, bool want_hidden) {
  const Weights w{u, bias, u2, v2, v};
  check(grad, middle, w);
  const int64_t hidden = u.size(0), inner = middle.size(-1), in = v ? v->size(0) : 0;
  const Gradients to{empty_rows(middle, hidden), empty_rows(middle, hidden, want_hidden),
                     empty_rows(middle, w.inner2(grad), u2.has_value()), empty_rows(middle, inner),
                     empty_rows(middle, in, v.has_value())};
  if (row_count(middle)) {
    HiddenGradient(grad, middle, w, parse_activation(activation), to).run();
  }
  return {to.pre, to.h, to.middle2, to.middle, to.x};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(adacomcat, m) {
  m.def(
      "hidden_gradient_cpu(Tensor grad, Tensor middle, Tensor u, Tensor? bias, str? activation, "
      "Tensor? u2, Tensor? v2, Tensor? v, bool want_hidden) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("hidden_gradient_cpu", TORCH_BOX(&hidden_gradient));
}

}  // namespace adacomcat
