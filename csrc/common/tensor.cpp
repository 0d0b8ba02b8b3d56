#include "common/tensor.h"

namespace adacomcat {
namespace {

int32_t device_type(const Tensor& t) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

Tensor empty_on(Sizes sizes, int32_t dtype, int32_t device_type, int32_t device_index) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), dtype,
                                                         device_type, device_index, &made));
  return Tensor(made);
}

}  // namespace

std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  out << '[';
  for (size_t d = 0; d < sizes.size(); ++d) out << (d ? ", " : "") << sizes[d];
  return out << ']';
}

std::ostream& operator<<(std::ostream& out, const torch::stable::Device& device) {
  if (device.is_cpu()) return out << "cpu";
  return out << (device.is_cuda() ? "cuda:" : "another device:") << device.index();
}

int32_t dtype_code(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

bool on_same_device(const Tensor& a, const Tensor& b) {
  return device_type(a) == device_type(b) && a.get_device_index() == b.get_device_index();
}

int64_t count_of(Sizes sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

Tensor empty(Sizes sizes, ScalarType dtype) {
  return empty_on(sizes, dtype_code(dtype), aoti_torch_device_type_cpu(), 0);
}

Tensor empty_beside(const Tensor& x, Sizes sizes) {
  return empty_on(sizes, dtype_code(x), device_type(x), x.get_device_index());
}

Tensor empty_beside(const Tensor& x, Sizes sizes, ScalarType dtype) {
  return empty_on(sizes, dtype_code(dtype), device_type(x), x.get_device_index());
}

std::vector<int64_t> broadcast_strides(const Tensor& t, Sizes sizes) {
  const int64_t missing = static_cast<int64_t>(sizes.size()) - t.dim();
  REQUIRE(missing >= 0, "shape ", t.sizes(), " does not broadcast to ", sizes);
  std::vector<int64_t> strides(sizes.size(), 0);
  for (int64_t d = 0; d < t.dim(); ++d) {
    REQUIRE(t.size(d) == sizes[missing + d] || t.size(d) == 1, "shape ", t.sizes(),
            " does not broadcast to ", sizes);
    if (t.size(d) > 1) strides[missing + d] = t.stride(d);
  }
  return strides;
}

}  // namespace adacomcat
