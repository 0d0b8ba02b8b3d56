// Operations on rows: conversion to the operand format, layer norm without affine, softmax, and products
// with single vectors.

inline void pad_row(char* out, int64_t k) {
  for (int64_t j = k; j % kGroup; ++j) __builtin_memset(out + j * kOperandSize, 0, kOperandSize);
}

inline void copy_row(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kPiece = sizeof(Halves);
  for (; bytes >= kPiece; bytes -= kPiece, to += kPiece, from += kPiece) {
    *reinterpret_cast<LooseHalves*>(to) = *reinterpret_cast<const LooseHalves*>(from);
  }
  if (bytes) __builtin_memcpy(to, from, bytes);
}

void load_rows(int64_t m, int64_t k, Rows x, void* out, int64_t stride) {
  for (int64_t i = 0; i < m; ++i) {
    char* row = static_cast<char*>(out) + i * stride * kOperandSize;
    if (x.dtype == kOperand) {
      copy_row(row, static_cast<const char*>(x.data) + i * x.stride * kOperandSize, k * kOperandSize);
    } else {
      for (int64_t j = 0; j < k; j += kLanes) {
        const int64_t count = least(kLanes, k - j);
        store_some(row, j, kOperand, load_some(x.data, i * x.stride + j, x.dtype, count), count);
      }
    }
    pad_row(row, k);
  }
}

// `count` rows from `x` on, together: alone each would wait for its own sums. `held`: they fit into
// `values` and are converted once.
template <Dtype D, bool held, int count>
void normalize_together(int64_t k, const void* x, int64_t x_stride, float epsilon, char* out,
                        int64_t stride, float* values) {
  const int64_t whole = k / kLanes * kLanes, tail = k - whole;
  const Integers first = first_lanes(tail);
  const auto loaded = [=](int r, int64_t j) {
    return load(x, r * x_stride + j, D);
  };
  const auto value = [=](int r, int64_t j) {
    return held ? load(values + r * whole + j) : loaded(r, j);
  };
  Vector last[count], sums[count], squares[count] = {};
  float mean[count], scale[count];
  for (int r = 0; r < count; ++r) {
    sums[r] = last[r] = tail ? load_some(x, r * x_stride + whole, D, tail) : Vector{};
  }
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int r = 0; r < count; ++r) {
      const Vector one = loaded(r, j);
      if (held) store(values + r * whole + j, one);
      sums[r] += one;
    }
  }
  for (int r = 0; r < count; ++r) {
    mean[r] = sum_of(sums[r]) / k;
    last[r] = select(first, last[r] - mean[r], Vector{});
  }
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int r = 0; r < count; ++r) {
      const Vector apart = value(r, j) - mean[r];
      squares[r] += apart * apart;
    }
  }
  for (int r = 0; r < count; ++r) {
    const float variance = sum_of(squares[r] + last[r] * last[r]) / k;
    scale[r] = 1.0f / __builtin_sqrtf(variance + epsilon);
  }
  for (int r = 0; r < count; ++r) {
    char* row = out + r * stride * kOperandSize;
    const auto normalized = [&](int64_t j) { return (value(r, j) - mean[r]) * scale[r]; };
    int64_t j = 0;
    for (; j + 2 * kLanes <= whole; j += 2 * kLanes) {
      store_two(row, j, kOperand, normalized(j), normalized(j + kLanes));
    }
    if (j < whole) store(row, j, kOperand, normalized(j));
    if (tail) store_some(row, whole, kOperand, last[r] * scale[r], tail);
    pad_row(row, k);
  }
}

template <Dtype D>
void normalize_rows_of(int64_t m, int64_t k, Rows x, float epsilon, void* out, int64_t stride) {
  constexpr int kTogether = 4;
  constexpr int64_t kMost = 2048;
  alignas(64) float values[kTogether * kMost];
  const bool held = D != Dtype::f32 && k <= kMost;
  const auto together = held ? &normalize_together<D, true, kTogether>
                             : &normalize_together<D, false, kTogether>;
  const auto alone = held ? &normalize_together<D, true, 1> : &normalize_together<D, false, 1>;
  for (int64_t i = 0; i < m;) {
    const bool four = i + kTogether <= m;
    (four ? together : alone)(k, static_cast<const char*>(x.data) + i * x.stride * dtype_size(D),
                              x.stride, epsilon, static_cast<char*>(out) + i * stride * kOperandSize,
                              stride, values);
    i += four ? kTogether : 1;
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

// `count` rows together: alone each would wait for its own maximum and sum. `scale` is positive, and
// waits for the exponential, which is one of two.
template <int count>
void softmax_together(int64_t n, const float* logits, int64_t stride, float scale, char* out,
                      int64_t out_stride, float* inverse_sum) {
  const float infinity = __builtin_inff();
  scale *= 1.44269504088896f;
  const int64_t whole = n / kLanes * kLanes;  // there is room for one vector more
  const Integers first = first_lanes(n - whole);
  Vector last[count], peaks[count], sums[count] = {};
  float peak[count];
  for (int r = 0; r < count; ++r) {
    last[r] = whole < n ? select(first, load(logits + r * stride + whole), broadcast(-infinity))
                        : broadcast(-infinity);
    peaks[r] = last[r];
  }
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int r = 0; r < count; ++r) peaks[r] = maximum(peaks[r], load(logits + r * stride + j));
  }
  for (int r = 0; r < count; ++r) {
    peak[r] = maximum_of(peaks[r]) * scale;
    if (peak[r] == -infinity) peak[r] = 0;  // masked entirely: every power is zero
  }
  const auto power = [&](int r, Vector logit) {
    const Vector x = power_of_two(logit * scale - peak[r]);
    sums[r] += x;
    return x;
  };
  int64_t j = 0;
  for (; j + 2 * kLanes <= whole; j += 2 * kLanes) {
    for (int r = 0; r < count; ++r) {
      const float* row = logits + r * stride + j;
      const Vector first_power = power(r, load(row));
      store_two(out + r * out_stride * kOperandSize, j, kOperand, first_power, power(r, load(row + kLanes)));
    }
  }
  for (int r = 0; r < count; ++r) {
    char* row = out + r * out_stride * kOperandSize;
    if (j < whole) store(row, j, kOperand, power(r, load(logits + r * stride + j)));
    if (whole < n) store(row, whole, kOperand, power(r, last[r]));
    const float sum = sum_of(sums[r]);
    inverse_sum[r] = sum == 0 ? 0 : 1.0f / sum;
  }
}

void softmax_rows(int64_t m, int64_t n, float* logits, int64_t stride, float scale, Mask mask,
                  void* out, int64_t out_stride, float* inverse_sum) {
  constexpr int kTogether = kLanes == 16 ? 4 : 2;  // as registers allow
  const bool prepared = mask.data || scale <= 0;
  for (int64_t i = 0; prepared && i < m; ++i) prepare_row(i, n, logits + i * stride, scale, mask);
  for (int64_t i = 0; i < m;) {
    const int64_t count = i + kTogether <= m ? kTogether : 1;
#ifdef ADACOMCAT_AMX
    if (i % 8 == 0) stay_awake();
#endif
    (count == 1 ? &softmax_together<1> : &softmax_together<kTogether>)(
        n, logits + i * stride, stride, prepared ? 1.0f : scale,
        static_cast<char*>(out) + i * out_stride * kOperandSize, out_stride, inverse_sum + i);
    i += count;
  }
}

template <Dtype D>
void inner_products_of(int64_t m, int64_t k, Rows x, int64_t count, const float* vectors,
                       int64_t stride, float* out, int64_t out_stride) {
  const int64_t whole = k / kLanes * kLanes, tail = k - whole;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t row = i * x.stride;
    for (int64_t v = 0; v < count; ++v) {
      const float* vector = vectors + v * stride;
      Vector sums = sum_terms(whole, [=](int64_t j) {
        return load(x.data, row + j, D) * load(vector + j);
      });
      if (tail) {
        sums += load_some(x.data, row + whole, D, tail) *
                load_some(vector, whole, Dtype::f32, tail);
      }
      out[v * out_stride + i] = sum_of(sums);
    }
  }
}

void inner_products(int64_t m, int64_t k, Rows x, int64_t count, const float* vectors, int64_t stride,
                    float* out, int64_t out_stride) {
  const auto run = x.dtype == Dtype::f32    ? &inner_products_of<Dtype::f32>
                   : x.dtype == Dtype::bf16 ? &inner_products_of<Dtype::bf16>
                                            : &inner_products_of<Dtype::f16>;
  run(m, k, x, count, vectors, stride, out, out_stride);
}

// So many columns at a time as have sums in registers: a row's are read together.
template <Dtype D, int count>
void weighted_sums_of(int64_t m, int64_t k, Rows x, const float* weights, int64_t stride, float* out,
                      int64_t out_stride) {
  constexpr int kTogether = (count == 1 ? 8 : 4) * kLanes / 16;
  int64_t j = 0;
  for (; j + kTogether * kLanes <= k; j += kTogether * kLanes) {
    Vector sums[count][kTogether] = {};
    for (int64_t i = 0; i < m; ++i) {
      for (int c = 0; c < kTogether; ++c) {
        const Vector part = load(x.data, i * x.stride + j + c * kLanes, D);
        for (int v = 0; v < count; ++v) sums[v][c] += part * weights[v * stride + i];
      }
    }
    for (int v = 0; v < count; ++v) {
      for (int c = 0; c < kTogether; ++c) store(out + v * out_stride + j + c * kLanes, sums[v][c]);
    }
  }
  for (; j < k; j += kLanes) {
    const int64_t lanes = least(kLanes, k - j);
    Vector sums[count] = {};
    for (int64_t i = 0; i < m; ++i) {
      const Vector part = load_some(x.data, i * x.stride + j, D, lanes);
      for (int v = 0; v < count; ++v) sums[v] += part * weights[v * stride + i];
    }
    for (int v = 0; v < count; ++v) store_some(out, v * out_stride + j, Dtype::f32, sums[v], lanes);
  }
}

template <Dtype D>
void weighted_sums_of(int64_t m, int64_t k, Rows x, int64_t count, const float* weights,
                      int64_t stride, float* out, int64_t out_stride) {
  int64_t v = 0;
  for (; v + 4 <= count; v += 4) {
    weighted_sums_of<D, 4>(m, k, x, weights + v * stride, stride, out + v * out_stride, out_stride);
  }
  for (; v < count; ++v) {
    weighted_sums_of<D, 1>(m, k, x, weights + v * stride, stride, out + v * out_stride, out_stride);
  }
}

void weighted_sums(int64_t m, int64_t k, Rows x, int64_t count, const float* weights, int64_t stride,
                   float* out, int64_t out_stride) {
  if (x.dtype == Dtype::f32) {
    weighted_sums_of<Dtype::f32>(m, k, x, count, weights, stride, out, out_stride);
  } else if (x.dtype == Dtype::bf16) {
    weighted_sums_of<Dtype::bf16>(m, k, x, count, weights, stride, out, out_stride);
  } else {
    weighted_sums_of<Dtype::f16>(m, k, x, count, weights, stride, out, out_stride);
  }
}
