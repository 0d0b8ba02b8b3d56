// Products of 16-bit integers, which AVX-512 VNNI sums up at twice the rate of floats.
//
// Each row of the lhs and each column of the rhs is rounded to integers times a scale, its norm / 32767.
// By the Cauchy-Schwarz inequality no sum of products, however long, then exceeds 32 bits. The error is
// 2^-15 √k / 3.5 relative to |a| |b|, which is below that of bfloat16. A row with infinity, or whose norm
// overflows, gives NaN.

typedef uint32_t Lane;  // two consecutive k
typedef Integers Sum;

constexpr float kMostInteger = 32767.0f;

inline Sum multiply_add(Sum sum, Lane a, Vector b) {
  return (Sum)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32((int)a), (__m512i)b);
}

// The value of an integer sum. It is multiplied by one norm after the other, since the product of both
// could overflow or vanish.
inline Vector value_of(Sum sum, const Lhs& lhs, int r, PackedRhs rhs, int p) {
  constexpr float kUnit = 1 / (kMostInteger * kMostInteger);
  const Vector cosine = (Vector)_mm512_cvtepi32_ps((__m512i)sum) * kUnit;
  return cosine * load(rhs.scales + p * kLanes) * lhs.scales[r];
}

// Squares of very small or very large numbers are no floats. If a norm's square leaves these bounds, the
// numbers are multiplied by a power of two first.
constexpr float kLift = 0x1p80f, kLeastSquare = 1e-20f, kMostSquare = 1e30f;

inline Vector some_of(const float* row, int64_t k, int64_t j) {
  return (Vector)_mm512_maskz_loadu_ps(lanes_of(k - j), row + j);
}

inline Integers rounded(Vector x) { return (Integers)_mm512_cvtps_epi32((__m512)x); }

// The lower 16 bits of each lane of two vectors.
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

// Rounds a row to integers, padded with zeros to whole vectors. Returns its norm.
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

// The lhs of a tile as integers.
class IntegerLhs {
 public:
  Lhs convert(int64_t rows, int64_t k, const char* a, int64_t a_stride) {
    const int64_t stride = (k + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes;
    for (int64_t i = 0; i < rows; ++i, a += a_stride) {
      scales_[i] = to_integers(reinterpret_cast<const float*>(a), k, integers_ + i * stride);
    }
    return {rows, (k + 1) / 2, reinterpret_cast<const char*>(integers_), stride * 2, scales_};
  }

 private:
  float scales_[kTileRows];
  alignas(64) int16_t integers_[Blocking::kMostLhsBytes / 2];
};
