// Runs one kernel on arrays from stdin and writes its results to stdout: the op's name, its numbers
// as arguments, then binary arrays in the order of csrc/cuda/kernels.h. Every array is an
// allocation of its exact size; results start as NaN.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

using namespace adacomcat;
using namespace adacomcat::cuda;

char** arguments;
int64_t next_number() {
  if (!*arguments) std::exit(96);
  return std::atoll(*arguments++);
}

struct Array {
  char* data;
  int64_t size;

  explicit Array(int64_t bytes) : data(static_cast<char*>(std::malloc(bytes))), size(bytes) {
    std::memset(data, 0xff, bytes);
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  void read() const {
    if (static_cast<int64_t>(std::fread(data, 1, size, stdin)) != size) std::exit(95);
  }
  void write() const { std::fwrite(data, 1, size, stdout); }
};

int finish(const char* error) {
  if (error) std::fprintf(stderr, "%s\n", error);
  return error ? 94 : 0;
}

// count, rows, columns, rank, stride of a batch, of rows and of columns, elements of a, and the
// shared memory that is available.
template <class T>
int run_batched_svd() {
  SvdBatch<T> p{};
  p.count = next_number();
  p.rows = next_number(), p.columns = next_number(), p.rank = next_number();
  p.batch_stride = next_number(), p.row_stride = next_number(), p.column_stride = next_number();
  const Array a(next_number() * sizeof(T));
  a.read();
  const int64_t available = next_number();
  const bool scratch = svd_needs_scratch(p.rows, p.columns, sizeof(T), available);
  const Array u(p.count * p.rows * p.rank * sizeof(T)), s(p.count * p.rank * sizeof(T));
  const Array v(p.count * p.columns * p.rank * sizeof(T)), status(p.count * sizeof(int));
  const Array rotations(scratch ? p.count * svd_rotations(p.rows, p.columns) * sizeof(T) : 0);
  p.a = a.as<T>(), p.u = u.as<T>(), p.s = s.as<T>(), p.v = v.as<T>(), p.status = status.as<int>();
  p.rotations = scratch ? rotations.as<T>() : nullptr;
  const char* error = batched_svd(p, nullptr);
  for (const Array* array : {&u, &s, &v, &status}) array->write();
  return finish(error);
}

// rows, columns, and the shared memory that is available.
template <class T>
int run_svd_needs_scratch() {
  const int64_t rows = next_number(), columns = next_number();
  const Array answer(sizeof(int));
  *answer.as<int>() = svd_needs_scratch(rows, columns, sizeof(T), next_number());
  answer.write();
  return 0;
}

// count, heads, ranks
template <class T>
int run_truncation_errors() {
  const int64_t count = next_number(), heads = next_number(), ranks = next_number();
  const Array s(count * heads * ranks * sizeof(T)), errors(count * (ranks + 1) * sizeof(T));
  s.read();
  const char* error = truncation_errors(s.as<T>(), errors.as<T>(), count, heads, ranks, nullptr);
  errors.write();
  return finish(error);
}

// Input `bytes` of memory, of which nothing is read for 0.
struct Input : Array {
  explicit Input(int64_t bytes) : Array(bytes) { read(); }

  const void* pointer() const { return size ? data : nullptr; }
};

// dtype, rows, in, rank, out, activation, whether x V is wanted, the strides of x, V, U and the
// residual; then bytes of x, V, U, bias and residual, 0 for one that is absent.
int run_low_rank_linear() {
  const Dtype dtype = static_cast<Dtype>(next_number());
  const int64_t size = dtype_size(dtype);
  LowRankLinear p{};
  p.rows = next_number();
  p.in = next_number(), p.rank = next_number(), p.out = next_number();
  p.activation = static_cast<Activation>(next_number());
  const bool keep = next_number();
  for (Matrix* rows : {&p.x, &p.v, &p.u, &p.residual}) rows->stride = next_number();
  const Input x(next_number()), v(next_number()), u(next_number());
  const Input bias(next_number()), residual(next_number());
  const Array y(p.rows * p.out * size), middle(keep ? p.rows * p.rank * size : 0);
  p.x.data = x.data, p.v.data = v.data, p.u.data = u.data;
  p.bias = bias.pointer(), p.residual.data = residual.pointer();
  p.y = y.data, p.middle = keep ? middle.data : nullptr;
  const char* error = low_rank_linear(dtype, p, nullptr);
  y.write();
  middle.write();
  return finish(error);
}

}  // namespace

int main(int, char** argv) {
  const char* op = argv[1];
  arguments = argv + 2;
  if (!std::strcmp(op, "low_rank_linear")) return run_low_rank_linear();
  const bool wide = next_number() == 8;
  if (!std::strcmp(op, "batched_svd")) {
    return wide ? run_batched_svd<double>() : run_batched_svd<float>();
  }
  if (!std::strcmp(op, "svd_needs_scratch")) {
    return wide ? run_svd_needs_scratch<double>() : run_svd_needs_scratch<float>();
  }
  if (!std::strcmp(op, "truncation_errors")) {
    return wide ? run_truncation_errors<double>() : run_truncation_errors<float>();
  }
  return 96;
}
