// Tensors of PyTorch's stable ABI: the same binary serves every torch from 2.10 on, and its headers are
// a fraction of ATen's. What the ops need beside the class stands here.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace adacomcat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// As Python prints them: [2, 3], cuda:0.
std::ostream& operator<<(std::ostream& out, Sizes sizes);
std::ostream& operator<<(std::ostream& out, const torch::stable::Device& device);

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws where `condition` does not hold; RuntimeError in Python, ValueError with REQUIRE_VALUE. The
// message is put together only then.
#define REQUIRE(condition, ...) \
  if (!(condition)) throw std::runtime_error(::adacomcat::message(__VA_ARGS__))
#define REQUIRE_VALUE(condition, ...) \
  if (!(condition)) throw std::invalid_argument(::adacomcat::message(__VA_ARGS__))

// PyTorch's number of the dtype of t, and of a dtype. Tensor::scalar_type() asks for two dozen numbers.
int32_t dtype_code(const Tensor& t);
int32_t dtype_code(ScalarType dtype);

bool on_same_device(const Tensor& a, const Tensor& b);

// The product of sizes.
int64_t count_of(Sizes sizes);

// An uninitialised tensor on the CPU, and one on the device of x, of its dtype where none is given.
Tensor empty(Sizes sizes, ScalarType dtype);
Tensor empty_beside(const Tensor& x, Sizes sizes);
Tensor empty_beside(const Tensor& x, Sizes sizes, ScalarType dtype);

// The strides of t where it is broadcast to `sizes`.
std::vector<int64_t> broadcast_strides(const Tensor& t, Sizes sizes);

// body(T()) for the T of float32 and float64; refuses others in the name of an op.
template <typename Body>
void for_floating(ScalarType dtype, const char* op, const Body& body) {
  if (dtype == ScalarType::Float) return body(float());
  REQUIRE(dtype == ScalarType::Double, op, " takes float32 and float64; got ", dtype);
  body(double());
}

}  // namespace adacomcat
