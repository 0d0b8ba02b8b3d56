// Operations on rows: conversion to the operand format, layer norm without affine, softmax.

inline void pad_row(char* out, int64_t k) {
  for (int64_t j = k; j % kGroup; ++j) __builtin_memset(out + j * kOperandSize, 0, kOperandSize);
}

void load_rows(int64_t m, int64_t k, Rows x, void* out, int64_t stride) {
  for (int64_t i = 0; i < m; ++i) {
    char* row = static_cast<char*>(out) + i * stride * kOperandSize;
    for (int64_t j = 0; j < k; j += kLanes) {
      const int64_t count = least(kLanes, k - j);
      store_some(row, j, kOperand, load_some(x.data, i * x.stride + j, x.dtype, count), count);
    }
    pad_row(row, k);
  }
}

// Σ term(j) over whole vectors: four sums, so that each addition waits for the fourth before it.
template <class Term>
inline Vector sum_terms(int64_t whole, Term term) {
  Vector a{}, b{}, c{}, d{};
  int64_t j = 0;
  for (; j + 4 * kLanes <= whole; j += 4 * kLanes) {
    a += term(j);
    b += term(j + kLanes);
    c += term(j + 2 * kLanes);
    d += term(j + 3 * kLanes);
  }
  for (; j < whole; j += kLanes) a += term(j);
  return (a + b) + (c + d);
}

// `held`: the row fits into `values` and is converted once.
template <Dtype D, bool held>
void normalize_row(int64_t k, const void* x, int64_t from, float epsilon, Integers first, char* out,
                   float* values) {
  const int64_t whole = k / kLanes * kLanes, tail = k - whole;
  const auto value = [=](int64_t j) { return held ? load(values + j) : load(x, from + j, D); };
  const Vector last = tail ? load_some(x, from + whole, D, tail) : Vector{};
  const Vector sums = sum_terms(whole, [=](int64_t j) {
    const Vector loaded = load(x, from + j, D);
    if (held) store(values + j, loaded);
    return loaded;
  });
  const float mean = sum_of(sums + last) / k;
  const Vector centred = tail ? select(first, last - mean, Vector{}) : Vector{};
  const Vector squares = sum_terms(whole, [=](int64_t j) {
    const Vector apart = value(j) - mean;
    return apart * apart;
  });
  const float scale = 1.0f / __builtin_sqrtf(sum_of(squares + centred * centred) / k + epsilon);
  for (int64_t j = 0; j < whole; j += kLanes) store(out, j, kOperand, (value(j) - mean) * scale);
  if (tail) store_some(out, whole, kOperand, centred * scale, tail);
  pad_row(out, k);
}

template <Dtype D>
void normalize_rows_of(int64_t m, int64_t k, Rows x, float epsilon, void* out, int64_t stride) {
  constexpr int64_t kMost = 2048;
  alignas(64) float values[kMost];
  const bool held = D != Dtype::f32 && k <= kMost;
  const Integers first = first_lanes(k % kLanes);
  for (int64_t i = 0; i < m; ++i) {
    char* row = static_cast<char*>(out) + i * stride * kOperandSize;
    (held ? normalize_row<D, true> : normalize_row<D, false>)(k, x.data, i * x.stride, epsilon,
                                                              first, row, values);
  }
}

void normalize_rows(int64_t m, int64_t k, Rows x, float epsilon, void* out, int64_t stride) {
  if (x.dtype == Dtype::f32) return normalize_rows_of<Dtype::f32>(m, k, x, epsilon, out, stride);
  if (x.dtype == Dtype::bf16) return normalize_rows_of<Dtype::bf16>(m, k, x, epsilon, out, stride);
  normalize_rows_of<Dtype::f16>(m, k, x, epsilon, out, stride);
}

inline Vector masked(Vector logit, const Mask& mask, int64_t i, int64_t j, int64_t count) {
  const int64_t at = i * mask.row + j * mask.column;
  if (!mask.boolean && mask.column == 1) return logit + load_some(mask.data, at, mask.dtype, count);
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t one = at + lane * mask.column;
    if (!mask.boolean) {
      logit[lane] += read_one(mask.data, one, mask.dtype);
    } else if (!static_cast<const bool*>(mask.data)[one]) {
      logit[lane] = -__builtin_inff();
    }
  }
  return logit;
}

// Scales, masks and closes one row with -infinity up to whole vectors.
inline void prepare_row(int64_t i, int64_t n, float* row, float scale, const Mask& mask) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t count = least(kLanes, n - j);
    Vector x = load(row + j) * scale;
    if (mask.data) x = masked(x, mask, i, j, count);
    for (int64_t lane = count; lane < kLanes; ++lane) x[lane] = -__builtin_inff();
    store(row + j, x);
  }
}

void softmax_rows(int64_t m, int64_t n, float* logits, int64_t stride, float scale, Mask mask,
                  void* out, int64_t out_stride, float* inverse_sum) {
  const float infinity = __builtin_inff();
  // Without a mask and with a positive scale the scale waits for the exponential.
  const bool prepared = mask.data || scale <= 0;
  const float rest = prepared ? 1.0f : scale;
  const int64_t whole = n / kLanes * kLanes;  // there is room for one vector more
  const Integers first = first_lanes(n - whole);
  for (int64_t i = 0; i < m; ++i) {
    float* row = logits + i * stride;
    if (prepared) prepare_row(i, n, row, scale, mask);
    const Vector last = whole < n ? select(first, load(row + whole), broadcast(-infinity))
                                  : broadcast(-infinity);
    // Two at a time: each waits for itself only.
    Vector even = last, odd = last;
    int64_t place = 0;
    for (; place + kLanes < whole; place += 2 * kLanes) {
      even = maximum(even, load(row + place));
      odd = maximum(odd, load(row + place + kLanes));
    }
    if (place < whole) even = maximum(even, load(row + place));
    float peak = maximum_of(maximum(even, odd)) * rest;
    if (peak == -infinity) peak = 0;  // masked entirely: every exponential is zero
    char* to = static_cast<char*>(out) + i * out_stride * kOperandSize;
    Vector sums{};
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vector x = decay(load(row + j) * rest - peak);
      sums += x;
      store(to, j, kOperand, x);
    }
    if (whole < n) {
      const Vector x = decay(last * rest - peak);
      sums += x;
      store(to, whole, kOperand, x);
    }
    const float sum = sum_of(sums);
    inverse_sum[i] = sum == 0 ? 0 : 1.0f / sum;
  }
}
