// gemv for a few vectors at once, on rows of any dtype: each row is read once and serves all vectors.

template <Dtype D>
void inner_products_of(int64_t m, int64_t k, Rows x, int64_t count, const float* vectors,
                       int64_t stride, float* out, int64_t out_stride) {
  const int64_t whole = k / kLanes * kLanes, tail = k - whole;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t row = i * x.stride;
    for (int64_t v = 0; v < count; ++v) {
      const float* vector = vectors + v * stride;
      Vector sums =
          sum_terms(whole, [=](int64_t j) { return load(x.data, row + j, D) * load(vector + j); });
      if (tail) {
        sums +=
            load_some(x.data, row + whole, D, tail) * load_some(vector, whole, Dtype::f32, tail);
      }
      out[v * out_stride + i] = sum_of(sums);
    }
  }
}

void inner_products(int64_t m, int64_t k, Rows x, int64_t count, const float* vectors,
                    int64_t stride, float* out, int64_t out_stride) {
  const auto run = x.dtype == Dtype::f32    ? &inner_products_of<Dtype::f32>
                   : x.dtype == Dtype::bf16 ? &inner_products_of<Dtype::bf16>
                                            : &inner_products_of<Dtype::f16>;
  run(m, k, x, count, vectors, stride, out, out_stride);
}

// As many columns at a time as registers hold sums of, so that a row is read in long pieces.
template <Dtype D, int count>
void weighted_sums_of(int64_t m, int64_t k, Rows x, const float* weights, int64_t stride,
                      float* out, int64_t out_stride) {
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

void weighted_sums(int64_t m, int64_t k, Rows x, int64_t count, const float* weights,
                   int64_t stride, float* out, int64_t out_stride) {
  if (x.dtype == Dtype::f32) {
    weighted_sums_of<Dtype::f32>(m, k, x, count, weights, stride, out, out_stride);
  } else if (x.dtype == Dtype::bf16) {
    weighted_sums_of<Dtype::bf16>(m, k, x, count, weights, stride, out, out_stride);
  } else {
    weighted_sums_of<Dtype::f16>(m, k, x, count, weights, stride, out, out_stride);
  }
}
