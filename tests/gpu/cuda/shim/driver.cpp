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
const char* next_argument() {
  if (!*arguments) std::exit(96);
  return *arguments++;
}
int64_t next_number() { return std::atoll(next_argument()); }
float next_float() { return static_cast<float>(std::atof(next_argument())); }

struct Array {
  char* data;
  int64_t size;

  explicit Array(int64_t bytes) : data(static_cast<char*>(std::malloc(bytes))), size(bytes) {
    std::memset(data, 0xff, bytes);
    std::fprintf(stderr, "array %llx %lld\n",
                 static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(data)),
                 static_cast<long long>(bytes));
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

// dtype, rows, in, rank, out, activation, whether x V is wanted, epsilon, the strides of x, V, U and the
// residual; then bytes of x, V, gate, U, bias and residual, 0 for one that is absent.
int run_low_rank_linear() {
  const Dtype dtype = static_cast<Dtype>(next_number());
  const int64_t size = dtype_size(dtype);
  LowRankLinear p{};
  p.rows = next_number();
  p.in = next_number(), p.rank = next_number(), p.out = next_number();
  p.activation = static_cast<Activation>(next_number());
  const bool keep = next_number();
  p.epsilon = next_float();
  for (Matrix* rows : {&p.x, &p.v, &p.u, &p.residual}) rows->stride = next_number();
  const Input x(next_number()), v(next_number()), gate(next_number()), u(next_number());
  const Input bias(next_number()), residual(next_number());
  const Array y(p.rows * p.out * size), middle(keep ? p.rows * p.rank * size : 0);
  p.x.data = x.data, p.v.data = v.data, p.u.data = u.data;
  p.gate = gate.pointer(), p.bias = bias.pointer(), p.residual.data = residual.pointer();
  p.y = y.data, p.middle = keep ? middle.data : nullptr;
  const char* error = low_rank_linear(dtype, p, nullptr);
  y.write();
  middle.write();
  return finish(error);
}

// dtype, rows, in, ranks, hidden, out, activation, whether x V1 and h V2 are wanted, epsilon, the strides
// of x, V1, U1, V2, U2 and the residual; then bytes of x, V1, U1, b1, V2, U2, b2 and residual.
int run_low_rank_mlp() {
  const Dtype dtype = static_cast<Dtype>(next_number());
  const int64_t size = dtype_size(dtype);
  LowRankMlp p{};
  p.rows = next_number();
  p.in = next_number(), p.rank1 = next_number(), p.hidden = next_number();
  p.rank2 = next_number(), p.out = next_number();
  p.activation = static_cast<Activation>(next_number());
  const bool keep = next_number();
  p.epsilon = next_float();
  for (Matrix* rows : {&p.x, &p.v1, &p.u1, &p.v2, &p.u2, &p.residual}) rows->stride = next_number();
  const Input x(next_number()), v1(next_number()), u1(next_number()), b1(next_number());
  const Input v2(next_number()), u2(next_number()), b2(next_number()), residual(next_number());
  const Array y(p.rows * p.out * size), middle1(keep ? p.rows * p.rank1 * size : 0);
  const Array middle2(keep ? p.rows * p.rank2 * size : 0);
  p.parts = low_rank_mlp_parts(dtype, p);
  const Array partial(p.parts > 1 ? p.parts * p.rows * p.rank2 * sizeof(float) : 0);
  const bool fits = low_rank_mlp_fits(dtype, p.rank1, p.rank2);
  const Array layer(fits ? 0 : p.rows * p.hidden * size);
  p.x.data = x.data, p.v1.data = v1.data, p.u1.data = u1.data;
  p.v2.data = v2.data, p.u2.data = u2.data, p.residual.data = residual.pointer();
  p.b1 = b1.pointer(), p.b2 = b2.pointer(), p.y = y.data, p.partial = partial.as<float>();
  p.layer = layer.data;
  if (keep) p.middle1 = middle1.data, p.middle2 = middle2.data;
  const char* error = low_rank_mlp(dtype, p, nullptr);
  for (const Array* array : {&y, &middle1, &middle2}) array->write();
  return finish(error);
}

// dtype, rows, in, hidden, out, activation, epsilon, the strides of x, W1, W2 and the residual; then
// bytes of x, W1, b1, W2, b2 and residual.
int run_dense_mlp() {
  const Dtype dtype = static_cast<Dtype>(next_number());
  const int64_t size = dtype_size(dtype);
  DenseMlp p{};
  p.rows = next_number();
  p.in = next_number(), p.width = next_number(), p.out = next_number();
  p.activation = static_cast<Activation>(next_number());
  p.epsilon = next_float();
  for (Matrix* rows : {&p.x, &p.w1, &p.w2, &p.residual}) rows->stride = next_number();
  const Input x(next_number()), w1(next_number()), b1(next_number());
  const Input w2(next_number()), b2(next_number()), residual(next_number());
  const Array y(p.rows * p.out * size), hidden(p.rows * p.width * size);
  p.x.data = x.data, p.w1.data = w1.data, p.w2.data = w2.data;
  p.residual.data = residual.pointer(), p.b1 = b1.pointer(), p.b2 = b2.pointer();
  p.hidden = hidden.data, p.y = y.data;
  const char* error = dense_mlp(dtype, p, nullptr);
  y.write();
  return finish(error);
}

// dtype, batch, tokens, in, heads, ranks, out, scale, epsilon, the kind of mask and its strides, the
// strides of x, Wq, Wk, Wv, Wo and the residual; then bytes of x, Wq, bq, Wk, Wv, Wo, bo, mask and
// residual.
int run_low_rank_attention() {
  const Dtype dtype = static_cast<Dtype>(next_number());
  const int64_t size = dtype_size(dtype);
  LowRankAttention p{};
  p.batch = next_number();
  p.tokens = next_number(), p.in = next_number(), p.heads = next_number();
  p.rank_qk = next_number(), p.rank_vo = next_number(), p.out = next_number();
  p.scale = next_float(), p.epsilon = next_float();
  p.mask_kind = static_cast<Mask>(next_number());
  for (int64_t& stride : p.mask_strides) stride = next_number();
  for (Matrix* rows : {&p.x, &p.wq, &p.wk, &p.wv, &p.wo, &p.residual}) rows->stride = next_number();
  const Input x(next_number()), wq(next_number()), bq(next_number()), wk(next_number());
  const Input wv(next_number()), wo(next_number()), bo(next_number()), mask(next_number());
  const Input residual(next_number());
  const int64_t rows = p.batch * p.tokens;
  const Array y(rows * p.out * size), q(rows * p.heads * p.rank_qk * size);
  const Array k(q.size), v(rows * p.heads * p.rank_vo * size), context(v.size);
  p.x.data = x.data, p.wq.data = wq.data, p.wk.data = wk.data, p.wv.data = wv.data;
  p.wo.data = wo.data, p.residual.data = residual.pointer();
  p.bq = bq.pointer(), p.bo = bo.pointer(), p.mask = mask.pointer();
  p.q = q.data, p.k = k.data, p.v = v.data, p.context = context.data, p.y = y.data;
  const char* error = low_rank_attention(dtype, p, nullptr);
  for (const Array* array : {&y, &q, &k, &v, &context}) array->write();
  return finish(error);
}

}  // namespace

int main(int, char** argv) {
  const char* op = argv[1];
  arguments = argv + 2;
  if (!std::strcmp(op, "low_rank_linear")) return run_low_rank_linear();
  if (!std::strcmp(op, "low_rank_mlp")) return run_low_rank_mlp();
  if (!std::strcmp(op, "dense_mlp")) return run_dense_mlp();
  if (!std::strcmp(op, "low_rank_attention")) return run_low_rank_attention();
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
