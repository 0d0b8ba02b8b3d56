#include "common/arguments.h"

#include <torch/csrc/stable/ops.h>

namespace adacomcat {

Dtype dtype_of(const Tensor& t) {
  static const int32_t f32 = dtype_code(ScalarType::Float), bf16 = dtype_code(ScalarType::BFloat16);
  const int32_t code = dtype_code(t);
  if (code == f32) return Dtype::f32;
  if (code == bf16) return Dtype::bf16;
  REQUIRE(t.scalar_type() == ScalarType::Half,
          "the compiled kernels take float32, bfloat16 and float16; got ", t.scalar_type());
  return Dtype::f16;
}

Activation parse_activation(const std::optional<std::string_view>& name) {
  if (!name) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "silu") return Activation::silu;
  if (*name == "relu") return Activation::relu;
  REQUIRE(*name == "quick_gelu", "unknown activation '", *name, "'");
  return Activation::quick_gelu;
}

void check_like(const Tensor& x, const Tensor& t, const char* name, Sizes shape) {
  REQUIRE(dtype_code(t) == dtype_code(x), name, " is ", t.scalar_type(), " and x is ",
          x.scalar_type(), ": cast one of them");
  REQUIRE(on_same_device(t, x), name, " is on ", t.device(), " and x is on ", x.device());
  REQUIRE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

std::vector<int64_t> join_sizes(Sizes lead, std::initializer_list<int64_t> last) {
  std::vector<int64_t> sizes = lead.vec();
  sizes.insert(sizes.end(), last);
  return sizes;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t size) {
  return join_sizes(x.sizes().slice(0, x.dim() - 1), {size});
}

int64_t row_count(const Tensor& x) { return count_of(x.sizes().slice(0, x.dim() - 1)); }

Tensor empty_rows(const Tensor& x, int64_t size, bool wanted) {
  return empty_beside(x, wanted ? with_last(x, size) : std::vector<int64_t>{0});
}

DenseRows::DenseRows(const Tensor& x) : tensor(x) {
  bool regular = x.stride(-1) == 1 || x.size(-1) <= 1;
  for (int64_t d = 0; d + 2 < x.dim(); ++d) {
    regular = regular && x.stride(d) == x.stride(d + 1) * x.size(d + 1);
  }
  if (!regular) tensor = torch::stable::contiguous(x);
  stride = tensor.dim() > 1 ? tensor.stride(-2) : tensor.size(-1);
}

}  // namespace adacomcat
