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

void normalize_rows(int64_t m, int64_t k, Rows x, float epsilon, void* out, int64_t stride) {
  for (int64_t i = 0; i < m; ++i) {
    const int64_t from = i * x.stride;
    Vector sums{};
    for (int64_t j = 0; j < k; j += kLanes) {
      sums += load_some(x.data, from + j, x.dtype, least(kLanes, k - j));
    }
    const float mean = sum_of(sums) / k;
    Vector squares{};
    for (int64_t j = 0; j < k; j += kLanes) {
      const int64_t count = least(kLanes, k - j);
      Vector centred = load_some(x.data, from + j, x.dtype, count) - mean;
      for (int64_t lane = count; lane < kLanes; ++lane) centred[lane] = 0;
      squares += centred * centred;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / k + epsilon);
    char* row = static_cast<char*>(out) + i * stride * kOperandSize;
    for (int64_t j = 0; j < k; j += kLanes) {
      const int64_t count = least(kLanes, k - j);
      const Vector value = load_some(x.data, from + j, x.dtype, count);
      store_some(row, j, kOperand, (value - mean) * scale, count);
    }
    pad_row(row, k);
  }
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

void softmax_rows(int64_t m, int64_t n, float* logits, int64_t stride, float scale, Mask mask,
                  void* out, int64_t out_stride, float* inverse_sum) {
  const float infinity = __builtin_inff();
  for (int64_t i = 0; i < m; ++i) {
    float* row = logits + i * stride;
    Vector most = broadcast(-infinity);
    for (int64_t j = 0; j < n; j += kLanes) {  // logits have room for whole vectors
      const int64_t count = least(kLanes, n - j);
      Vector x = load(row + j) * scale;
      if (mask.data) x = masked(x, mask, i, j, count);
      for (int64_t lane = count; lane < kLanes; ++lane) x[lane] = -infinity;
      store(row + j, x);
      most = maximum(most, x);
    }
    float peak = maximum_of(most);
    if (peak == -infinity) peak = 0;  // masked entirely: every exponential is zero
    Vector sums{};
    char* to = static_cast<char*>(out) + i * out_stride * kOperandSize;
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vector x = decay(load(row + j) - peak);
      sums += x;
      store(to, j, kOperand, x);
    }
    const float sum = sum_of(sums);
    inverse_sum[i] = sum == 0 ? 0 : 1.0f / sum;
  }
}
