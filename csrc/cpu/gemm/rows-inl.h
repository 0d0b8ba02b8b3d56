// Operations on rows: conversion to the operand format, layer norm without affine, softmax.

// Zeros behind the first k elements of the row that starts at `out`, up to a multiple of kGroup.
inline void pad_row(char* out, int64_t k) {
  for (int64_t j = k; j % kGroup; ++j) __builtin_memset(out + j * kOperandSize, 0, kOperandSize);
}

// A row that is in the operand format already: `bytes` bytes, without their padding.
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
      copy_row(row, static_cast<const char*>(x.data) + i * x.stride * kOperandSize,
               k * kOperandSize);
    } else {
      for (int64_t j = 0; j < k; j += kLanes) {
        const int64_t count = least(kLanes, k - j);
        store_some(row, j, kOperand, load_some(x.data, i * x.stride + j, x.dtype, count), count);
      }
    }
    pad_row(row, k);
  }
}

// Normalises `count` rows at once, so that their additions overlap: the sum of one row is a single
// dependency chain. `held`: find_means() keeps the whole vectors of the rows as floats in `values`,
// and later passes read them there.
template <Dtype D, bool held, int count>
class Normalizer {
 public:
  [[gnu::always_inline]] Normalizer(int64_t k, const void* x, int64_t x_stride, float* values)
      : k_(k), whole_(k / kLanes * kLanes), tail_(k - whole_), x_(x), x_stride_(x_stride),
        values_(values), tail_lanes_(first_lanes(tail_)) {}

  [[gnu::always_inline]] void find_means() {
    Vector sums[count];
    for (int r = 0; r < count; ++r) {
      sums[r] = last_[r] = tail_ ? load_some(x_, r * x_stride_ + whole_, D, tail_) : Vector{};
    }
    for (int64_t j = 0; j < whole_; j += kLanes) {
      for (int r = 0; r < count; ++r) {
        const Vector one = load_vector(r, j);
        if (held) store(values_ + r * whole_ + j, one);
        sums[r] += one;
      }
    }
    for (int r = 0; r < count; ++r) {
      mean_[r] = sum_of(sums[r]) / k_;
      last_[r] = select(tail_lanes_, last_[r] - mean_[r], Vector{});
    }
  }

  [[gnu::always_inline]] void find_scales(float epsilon) {
    Vector squares[count] = {};
    for (int64_t j = 0; j < whole_; j += kLanes) {
      for (int r = 0; r < count; ++r) {
        const Vector centred = value(r, j) - mean_[r];
        squares[r] += centred * centred;
      }
    }
    for (int r = 0; r < count; ++r) {
      const float variance = sum_of(squares[r] + last_[r] * last_[r]) / k_;
      scale_[r] = 1.0f / __builtin_sqrtf(variance + epsilon);
    }
  }

  [[gnu::always_inline]] void store_to(char* out, int64_t stride) const {
    for (int r = 0; r < count; ++r) {
      char* row = out + r * stride * kOperandSize;
      const auto normalized = [&](int64_t j) { return (value(r, j) - mean_[r]) * scale_[r]; };
      int64_t j = 0;
      for (; j + 2 * kLanes <= whole_; j += 2 * kLanes) {
        store_two(row, j, kOperand, normalized(j), normalized(j + kLanes));
      }
      if (j < whole_) store(row, j, kOperand, normalized(j));
      if (tail_) store_some(row, whole_, kOperand, last_[r] * scale_[r], tail_);
      pad_row(row, k_);
    }
  }

 private:
  [[gnu::always_inline]] Vector load_vector(int r, int64_t j) const {
    return load(x_, r * x_stride_ + j, D);
  }
  [[gnu::always_inline]] Vector value(int r, int64_t j) const {
    return held ? load(values_ + r * whole_ + j) : load_vector(r, j);
  }

  int64_t k_, whole_, tail_;
  const void* x_;
  int64_t x_stride_;
  float* values_;
  Integers tail_lanes_;
  Vector last_[count];  // the incomplete last vector of each row; find_means() centres it
  float mean_[count], scale_[count];
};

template <Dtype D, bool held, int count>
void normalize_together(int64_t k, const void* x, int64_t x_stride, float epsilon, char* out,
                        int64_t stride, float* values) {
  Normalizer<D, held, count> rows(k, x, x_stride, values);
  rows.find_means();
  rows.find_scales(epsilon);
  rows.store_to(out, stride);
}

template <Dtype D>
void normalize_rows_of(int64_t m, int64_t k, Rows x, float epsilon, void* out, int64_t stride) {
  constexpr int kTogether = 4;
  constexpr int64_t kMostHeld = 2048;
  alignas(64) float values[kTogether * kMostHeld];
  const bool held = D != Dtype::f32 && k <= kMostHeld;
  const auto together =
      held ? &normalize_together<D, true, kTogether> : &normalize_together<D, false, kTogether>;
  const auto alone = held ? &normalize_together<D, true, 1> : &normalize_together<D, false, 1>;
  for (int64_t i = 0; i < m;) {
    const bool four = i + kTogether <= m;
    (four ? together : alone)(k, static_cast<const char*>(x.data) + i * x.stride * dtype_size(D),
                              x.stride, epsilon,
                              static_cast<char*>(out) + i * stride * kOperandSize, stride, values);
    i += four ? kTogether : 1;
  }
}

void normalize_rows(int64_t m, int64_t k, Rows x, float epsilon, void* out, int64_t stride) {
  if (x.dtype == Dtype::f32) return normalize_rows_of<Dtype::f32>(m, k, x, epsilon, out, stride);
  if (x.dtype == Dtype::bf16) return normalize_rows_of<Dtype::bf16>(m, k, x, epsilon, out, stride);
  normalize_rows_of<Dtype::f16>(m, k, x, epsilon, out, stride);
}

// logit + mask, for `count` columns from j on.
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

// Scales and masks one row, and pads it with -infinity to whole vectors.
inline void prepare_row(int64_t i, int64_t n, float* row, float scale, const Mask& mask) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t count = least(kLanes, n - j);
    Vector x = load(row + j) * scale;
    if (mask.data) x = masked(x, mask, i, j, count);
    for (int64_t lane = count; lane < kLanes; ++lane) x[lane] = -__builtin_inff();
    store(row + j, x);
  }
}

// Beyond this, rounding of scale · maximum costs digits of the softmax. With a fused multiply-add it is
// the same for the whole row, and matters only where it is an exponent of its own.
#if defined(ADACOMCAT_AVX2) || defined(ADACOMCAT_AVX512)
constexpr float kFarPeak = 4096.0f;
#else
constexpr float kFarPeak = 16.0f;
#endif

// Subtracts `most` from the first `whole` elements of a row.
inline void shift_row(float* row, int64_t whole, float most) {
  for (int64_t j = 0; j < whole; j += kLanes) store(row + j, load(row + j) - most);
}

// The softmax of `count` rows at once, so that their maxima and sums overlap. `scale` is positive,
// so the maximum is taken before scaling; scale · log2(e) then goes into the exponent of 2. From a row
// whose maximum is large, it is subtracted before that.
template <int count>
void softmax_together(int64_t n, float* logits, int64_t stride, float scale, char* out,
                      int64_t out_stride, float* inverse_sum) {
  const float infinity = __builtin_inff();
  scale *= 1.44269504088896f;
  // The caller pads each row of `logits` to whole vectors, so the load at `whole` stays inside.
  const int64_t whole = n / kLanes * kLanes;
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
    const float most = maximum_of(peaks[r]);
    peak[r] = most * scale;
    if (most == -infinity) peak[r] = 0;  // masked entirely: every power is zero
    if (__builtin_fabsf(peak[r]) < kFarPeak) continue;
    shift_row(logits + r * stride, whole, most);
    last[r] -= most;
    peak[r] = 0;
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
      store_two(out + r * out_stride * kOperandSize, j, kOperand, first_power,
                power(r, load(row + kLanes)));
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
  constexpr int kTogether = kLanes == 16 ? 4 : 2;  // what the registers hold
  const bool prepared = mask.data || scale <= 0;
  for (int64_t i = 0; prepared && i < m; ++i) prepare_row(i, n, logits + i * stride, scale, mask);
  for (int64_t i = 0; i < m;) {
    const int64_t count = i + kTogether <= m ? kTogether : 1;
#ifdef ADACOMCAT_AMX
    if (i % 8 == 0) stay_awake();  // keeps the tile multiplier powered (amx-inl.h)
#endif
    (count == 1
         ? &softmax_together<1>
         : &softmax_together<kTogether>)(n, logits + i * stride, stride, prepared ? 1.0f : scale,
                                         static_cast<char*>(out) + i * out_stride * kOperandSize,
                                         out_stride, inverse_sum + i);
    i += count;
  }
}
