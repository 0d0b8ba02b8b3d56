// Products of 8-bit integers. The rhs is packed as integers, with a scale for each column. Each row of the
// lhs is rounded to integers times its scale, its largest magnitude / 127, when its tile begins.
//
// A lane sums up pairs: both numbers are extended to 16 bits, and no sum of two products leaves 32 bits.
// With ADACOMCAT_BYTE_DOT it sums up fours of unsigned and signed bytes: the rhs is stored with 128 added,
// and 128 times the sum of the row is subtracted from the result. Neither saturates: |sum| is below
// 255 · 127 · kMostDepth. A row with infinity or NaN gives NaN.

typedef uint32_t Lane;  // two or four consecutive k
typedef Integers Sum;

constexpr float kMostInteger = 127.0f;
// A row whose largest magnitude is below this counts as zeros: the inverse of its scale would overflow.
constexpr float kLeastMagnitude = 1e-35f;

#ifdef ADACOMCAT_BYTE_DOT
typedef int8_t LhsInteger;
typedef Vector RhsLanes;

inline RhsLanes load_rhs(const char* p) { return load(reinterpret_cast<const float*>(p)); }

inline Sum multiply_add(Sum sum, Lane a, RhsLanes b) {
#ifdef ADACOMCAT_AVX512
  return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, _mm512_set1_epi32((int)a));
#else
  return (Sum)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)b, _mm256_set1_epi32((int)a));
#endif
}
#else
typedef int16_t LhsInteger;
typedef int16_t RhsLanes __attribute__((vector_size(kLanes * 4)));

inline RhsLanes load_rhs(const char* p) {
#if defined(ADACOMCAT_AVX512)
  return (RhsLanes)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(ADACOMCAT_AVX2)
  return (RhsLanes)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes * 2), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), RhsLanes);
#endif
}

inline Sum multiply_add(Sum sum, Lane a, RhsLanes b) {
#if defined(ADACOMCAT_AVX512)
  return sum + (Sum)_mm512_madd_epi16((__m512i)b, _mm512_set1_epi32((int)a));
#elif defined(ADACOMCAT_AVX2)
  return sum + (Sum)_mm256_madd_epi16((__m256i)b, _mm256_set1_epi32((int)a));
#elif defined(__SSE2__)
  return sum + (Sum)_mm_madd_epi16((__m128i)b, _mm_set1_epi32((int)a));
#else
  const Integers both = (Integers)b, low = both << 16 >> 16;
  return sum + low * static_cast<int16_t>(a) + (both >> 16) * static_cast<int16_t>(a >> 16);
#endif
}
#endif

// To the nearest, ties to even; |x| is below 2^22.
inline Integers rounded(Vector x) {
  const Vector shift = broadcast(0x1.8p23f);
  return (Integers)(x + shift) - (Integers)shift;
}

inline void store_integers(int16_t* out, Integers x) {
#if defined(ADACOMCAT_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(ADACOMCAT_AVX2)
  const __m128i low = _mm256_castsi256_si128((__m256i)x);
  const __m128i high = _mm256_extracti128_si256((__m256i)x, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packs_epi32(low, high));
#else
  typedef int16_t Narrow __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  *reinterpret_cast<Narrow*>(out) = __builtin_convertvector(x, Narrow);
#endif
}

#ifdef ADACOMCAT_BYTE_DOT
inline void store_integers(int8_t* out, Integers x) {
#ifdef ADACOMCAT_AVX512
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)x));
#else
  const __m128i low = _mm256_castsi256_si128((__m256i)x);
  const __m128i high = _mm256_extracti128_si256((__m256i)x, 1);
  const __m128i halves = _mm_packs_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(halves, halves));
#endif
}
#endif

inline Integers larger(Integers a, Integers b) {
  const Integers first = a > b;
  return (first & a) | (~first & b);
}

template <int Half = kLanes / 2>
[[gnu::always_inline]] inline int32_t largest_of(Integers x) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    return largest_of<Half / 2>(larger(x, (Integers)rotated<Half>((Vector)x)));
  }
}

// The largest magnitude in a row. NaN if there is one: as integers, the bits of NaN are the largest.
inline float magnitude(const float* row, int64_t k) {
  const auto bits = [=](int64_t j) { return (Integers)load(row + j) & 0x7fffffff; };
  const int64_t whole = k / kLanes * kLanes;
  Integers even = (Integers)load_some(row, whole, Dtype::f32, k - whole) & 0x7fffffff, odd{};
  int64_t j = 0;
  for (; j + 2 * kLanes <= whole; j += 2 * kLanes) {
    even = larger(even, bits(j)), odd = larger(odd, bits(j + kLanes));
  }
  if (j < whole) even = larger(even, bits(j));
  const int32_t most = largest_of(larger(even, odd));
  float value;
  __builtin_memcpy(&value, &most, sizeof value);
  return value;
}

// A row as integers.
struct IntegerRow {
  float scale;
  int32_t sum;  // of the integers
};

// A row of integers is padded with zeros to four vectors.
inline int64_t padded_integers(int64_t k) { return (k + 4 * kLanes - 1) / (4 * kLanes) * 4 * kLanes; }

inline IntegerRow to_integers(const float* row, int64_t k, LhsInteger* out) {
  const float most = magnitude(row, k), infinite = most - most;  // 0, or NaN
  const int64_t whole = k / kLanes * kLanes, padded = padded_integers(k);
  if (!(most >= kLeastMagnitude && infinite == 0)) {
    __builtin_memset(out, 0, padded * kLhsSize);
    return {infinite, 0};
  }
  const Vector inverse = broadcast(kMostInteger / most);
  Integers sum{};
  const auto put = [&](int64_t j, Vector x) {
    const Integers integers = rounded(x * inverse);
    sum += integers;
    store_integers(out + j, integers);
  };
  for (int64_t j = 0; j < whole; j += kLanes) put(j, load(row + j));
  if (whole < k) put(whole, load_some(row, whole, Dtype::f32, k - whole));
  for (int64_t j = (k + kLanes - 1) / kLanes * kLanes; j < padded; j += kLanes) {
    store_integers(out + j, Integers{});
  }
  int32_t total = 0;
#ifdef ADACOMCAT_BYTE_DOT
  for (int i = 0; i < kLanes; ++i) total += sum[i];
#endif
  return {most / kMostInteger, total};
}

// The lhs of a tile as integers.
class IntegerLhs {
 public:
  Lhs convert(int64_t rows, int64_t k, const char* a, int64_t a_stride) {
    const int64_t stride = padded_integers(k);
    for (int64_t i = 0; i < rows; ++i, a += a_stride) {
      const auto* row = reinterpret_cast<const float*>(a);
      const IntegerRow integers = to_integers(row, k, integers_ + i * stride);
      scales_[i] = integers.scale, sums_[i] = integers.sum;
    }
    return {rows, (k + kPackedGroup - 1) / kPackedGroup, reinterpret_cast<const char*>(integers_),
            stride * kLhsSize, scales_, sums_};
  }

 private:
  float scales_[kTileRows];
  int32_t sums_[kTileRows];
  alignas(64) LhsInteger integers_[Blocking::kMostLhsBytes / kLhsSize];
};

inline Vector value_of(Sum sum, const Lhs& lhs, int r, PackedRhs rhs, int p) {
  const Sum whole = sum - kPackedZero * lhs.sums[r];
#if defined(ADACOMCAT_AVX512)
  const Vector value = (Vector)_mm512_cvtepi32_ps((__m512i)whole);
#elif defined(ADACOMCAT_AVX2)
  const Vector value = (Vector)_mm256_cvtepi32_ps((__m256i)whole);
#else
  const Vector value = __builtin_convertvector(whole, Vector);
#endif
  return value * load(rhs.scales + p * kLanes) * lhs.scales[r];
}
