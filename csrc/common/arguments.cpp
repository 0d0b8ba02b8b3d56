#include "common/arguments.h"

#include <ATen/ops/empty.h>

namespace adacomcat {

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK(false, "the compiled kernels take float32, bfloat16 and float16; got ",
                  t.scalar_type());
  }
}

Activation parse_activation(const std::optional<std::string_view>& name) {
  if (!name) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "silu") return Activation::silu;
  TORCH_CHECK(*name == "relu", "unknown activation '", *name, "'");
  return Activation::relu;
}

void check_like(const at::Tensor& x, const at::Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " is ", t.scalar_type(), " and x is ",
              x.scalar_type(), ": cast one of them");
  TORCH_CHECK(t.device() == x.device(), name, " is on ", t.device(), " and x is on ", x.device());
  TORCH_CHECK(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

std::vector<int64_t> join_sizes(at::IntArrayRef lead, std::initializer_list<int64_t> last) {
  std::vector<int64_t> sizes = lead.vec();
  sizes.insert(sizes.end(), last);
  return sizes;
}

std::vector<int64_t> with_last(const at::Tensor& x, int64_t size) {
  return join_sizes(x.sizes().slice(0, x.dim() - 1), {size});
}

int64_t row_count(const at::Tensor& x) {
  return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
}

at::Tensor empty_rows(const at::Tensor& x, int64_t size, bool wanted) {
  return at::empty(wanted ? with_last(x, size) : std::vector<int64_t>{0}, x.options());
}

DenseRows::DenseRows(const at::Tensor& x) : tensor(x) {
  bool regular = x.stride(-1) == 1 || x.size(-1) <= 1;
  for (int64_t d = 0; d + 2 < x.dim(); ++d) {
    regular = regular && x.stride(d) == x.stride(d + 1) * x.size(d + 1);
  }
  if (!regular) tensor = x.contiguous();
  stride = tensor.dim() > 1 ? tensor.stride(-2) : tensor.size(-1);
}

}  // namespace adacomcat
