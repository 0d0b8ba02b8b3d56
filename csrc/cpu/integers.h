// Products of integers of 16 bits, which AVX-512 VNNI adds up at twice the rate of floats. The right side's
// columns and the left side's rows are integers times a scale, the 32767th part of their norm: by Cauchy
// and Schwarz no sum, however long, leaves 32 bits. The error, 2^-15 · √k / 3.5 of |a| |b|, is below what
// bfloat16 loses; infinity and what overflows in its norm give NaN.

typedef uint32_t Lane;  // two consecutive k
typedef Integers Sum;

constexpr float kMostInteger = 32767.0f;

inline Sum multiply_add(Sum sum, Lane a, Vector b) {
  return (Sum)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32((int)a), (__m512i)b);
}

// The product of two norms could overflow or vanish: one after the other they meet the sum.
inline Vector value_of(Sum sum, const float* left, int r, const float* right, int p) {
  constexpr float kUnit = 1 / (kMostInteger * kMostInteger);
  const Vector cosine = (Vector)_mm512_cvtepi32_ps((__m512i)sum) * kUnit;
  return cosine * load(right + p * kLanes) * left[r];
}

// Squares of numbers that are small or large are no floats; these powers of two bring them back.
constexpr float kLift = 0x1p80f, kLeastSquare = 1e-20f, kMostSquare = 1e30f;

inline Vector some_of(const float* row, int64_t k, int64_t j) {
  return (Vector)_mm512_maskz_loadu_ps(lanes_of(k - j), row + j);
}

inline Integers rounded(Vector x) { return (Integers)_mm512_cvtps_epi32((__m512)x); }

// Of two vectors of 32 bits the lower 16.
inline __m512i low_halves(__m512i first, __m512i second) {
  typedef uint16_t Indices __attribute__((vector_size(64)));
  Indices even;
#pragma GCC unroll 32
  for (int i = 0; i < 2 * kLanes; ++i) even[i] = 2 * i;
  return _mm512_permutex2var_epi16(first, (__m512i)even, second);
}

inline float norm_square(const float* row, int64_t k, float lift) {
  const int64_t whole = k / kLanes * kLanes;
  const auto square = [=](Vector x) { return x * lift * (x * lift); };
  const Vector tail = square(some_of(row, k, whole));
  return sum_of(tail + sum_terms(whole, [=](int64_t j) { return square(load(row + j)); }));
}

// A row as integers, closed with zeros up to whole vectors of them; returns its norm.
inline float to_integers(const float* row, int64_t k, int16_t* out) {
  float lift = 1, square = norm_square(row, k, 1);
  if (!(square >= kLeastSquare && square <= kMostSquare)) {
    lift = square > 1 ? 1 / kLift : kLift;
    square = norm_square(row, k, lift);
  }
  const float norm = __builtin_sqrtf(square);
  const float scale = square == 0 ? 0 : kMostInteger / norm;
  const auto integers = [=](int64_t j) {
    return (__m512i)rounded(some_of(row, k, j) * lift * scale);
  };
  for (int64_t j = 0; j < k; j += 2 * kLanes) {
    _mm512_storeu_si512(out + j, low_halves(integers(j), integers(j + kLanes)));
  }
  return norm / lift;
}

class LeftIntegers {
 public:
  Held of(int64_t rows, int64_t k, const char* a, int64_t a_stride) {
    const int64_t stride = (k + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes;
    for (int64_t i = 0; i < rows; ++i, a += a_stride) {
      scales_[i] = to_integers(reinterpret_cast<const float*>(a), k, integers_ + i * stride);
    }
    return {rows, (k + 1) / 2, reinterpret_cast<const char*>(integers_), stride * 2, scales_};
  }

 private:
  float scales_[kTileRows];
  alignas(64) int16_t integers_[Order::kMostRowBytes / 2];
};
