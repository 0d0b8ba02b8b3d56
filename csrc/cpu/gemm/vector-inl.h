// Vectors of kLanes floats: loads, stores and conversions of every dtype, reductions, transposes.

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef float LooseVector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
inline Vector broadcast(float x) { return x - Vector{}; }
inline Vector load(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }
inline void store(float* p, Vector x) { *reinterpret_cast<LooseVector*>(p) = x; }
inline Vector select(Integers mask, Vector yes, Vector no) {
  return (Vector)((mask & (Integers)yes) | (~mask & (Integers)no));
}
#ifdef ADACOMCAT_AVX512
inline __mmask16 lanes_of(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1u << greatest(count, 0)) - 1);
}
#endif
// All bits of the first `count` lanes.
inline Integers first_lanes(int64_t count) {
#ifdef ADACOMCAT_AVX512
  return (Integers)_mm512_movm_epi32(lanes_of(count));
#else
  Integers lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? -1 : 0;
  return lanes;
#endif
}
// b if a or b is NaN.
#if defined(ADACOMCAT_AVX512)
inline Vector maximum(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vector minimum(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
inline Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
#endif

// Intrinsics, since g++ 12 compiles __builtin_convertvector to two conversions of half a vector each.
inline Vector from_bf16(Halves x) {
#if defined(ADACOMCAT_AVX512)
  const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(ADACOMCAT_AVX2)
  const Words words = (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  const Words words = __builtin_convertvector(x, Words);
#endif
  return (Vector)(words << 16);
}

// Round to nearest even; NaN stays NaN.
#ifdef ADACOMCAT_BF16_OPERANDS
inline Halves to_bf16(Vector x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }
#else
inline Halves to_bf16(Vector x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + (((bits >> 16) & 1u) + 0x7fffu)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;
  const Integers ordered = x == x;
  return __builtin_convertvector(((Words)ordered & rounded) | (~(Words)ordered & nan), Halves);
}
#endif

#if defined(ADACOMCAT_AVX512)
inline Vector from_f16(Halves x) { return (Vector)_mm512_cvtph_ps((__m256i)x); }
inline Halves to_f16(Vector x) { return (Halves)_mm512_cvtps_ph((__m512)x, 0); }
#elif defined(ADACOMCAT_AVX2)
inline Vector from_f16(Halves x) { return (Vector)_mm256_cvtph_ps((__m128i)x); }
inline Halves to_f16(Vector x) { return (Halves)_mm256_cvtps_ph((__m256)x, 0); }
#else
inline Vector from_f16(Halves x) {
  Vector y;
  for (int i = 0; i < kLanes; ++i) y[i] = c10::detail::fp16_ieee_to_fp32_value(x[i]);
  return y;
}
inline Halves to_f16(Vector x) {
  Halves y;
  for (int i = 0; i < kLanes; ++i) y[i] = c10::detail::fp16_ieee_from_fp32_value(x[i]);
  return y;
}
#endif

inline Vector load(const void* p, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return load(static_cast<const float*>(p) + i);
  const Halves x = *reinterpret_cast<const LooseHalves*>(static_cast<const uint16_t*>(p) + i);
  return dtype == Dtype::bf16 ? from_bf16(x) : from_f16(x);
}

inline void store(void* p, int64_t i, Dtype dtype, Vector x) {
  if (dtype == Dtype::f32) return store(static_cast<float*>(p) + i, x);
  *reinterpret_cast<LooseHalves*>(static_cast<uint16_t*>(p) + i) =
      dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x);
}

// Stores two adjacent vectors. AVX-512 BF16 rounds both to bfloat16 in the time of one.
inline void store_two(void* p, int64_t i, Dtype dtype, Vector first, Vector second) {
#ifdef ADACOMCAT_BF16_OPERANDS
  if (dtype == Dtype::bf16) {
    const auto both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(static_cast<uint16_t*>(p) + i, (__m512i)both);
    return;
  }
#endif
  store(p, i, dtype, first);
  store(p, i + kLanes, dtype, second);
}

// Loads or stores the first `count` lanes. The others are zero, or stay unwritten.
inline Vector load_some(const void* p, int64_t i, Dtype dtype, int64_t count) {
  if (count >= kLanes) return load(p, i, dtype);
#ifdef ADACOMCAT_AVX512
  const __mmask16 lanes = lanes_of(count);
  if (dtype == Dtype::f32)
    return (Vector)_mm512_maskz_loadu_ps(lanes, static_cast<const float*>(p) + i);
  const Halves x = (Halves)_mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(p) + i);
  return dtype == Dtype::bf16 ? from_bf16(x) : from_f16(x);
#else
  float lanes[kLanes] = {};
  const int64_t size = dtype_size(dtype);
  __builtin_memcpy(lanes, static_cast<const char*>(p) + i * size, count * size);
  return load(lanes, 0, dtype);
#endif
}

inline float read_one(const void* p, int64_t i, Dtype dtype) {
  return load_some(p, i, dtype, 1)[0];
}

inline void store_some(void* p, int64_t i, Dtype dtype, Vector x, int64_t count) {
  if (count >= kLanes) return store(p, i, dtype, x);
#ifdef ADACOMCAT_AVX512
  const __mmask16 lanes = lanes_of(count);
  if (dtype == Dtype::f32)
    return _mm512_mask_storeu_ps(static_cast<float*>(p) + i, lanes, (__m512)x);
  const Halves halves = dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, lanes, (__m256i)halves);
#else
  float lanes[kLanes];
  store(lanes, 0, dtype, x);
  const int64_t size = dtype_size(dtype);
  __builtin_memcpy(static_cast<char*>(p) + i * size, lanes, count * size);
#endif
}

// Lane i of the result is lane (i + Distance) % kLanes of x.
template <int Distance>
inline Vector rotated(Vector x) {
  Integers from;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) from[i] = (i + Distance) % kLanes;
  return __builtin_shuffle(x, from);
}

// The sum of all lanes, as a tree: adding lane after lane would wait kLanes times for an addition.
template <int Half = kLanes / 2>
[[gnu::always_inline]] inline float sum_of(Vector x) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    return sum_of<Half / 2>(x + rotated<Half>(x));
  }
}

// Σ term(j) for j = 0, kLanes, … < whole, in four independent sums to hide the latency of additions.
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

// The maximum of all lanes.
template <int Half = kLanes / 2>
[[gnu::always_inline]] inline float maximum_of(Vector x) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    return maximum_of<Half / 2>(maximum(x, rotated<Half>(x)));
  }
}

// Transposes kLanes vectors in place: rows `Distance` apart exchange blocks, then those of half of it.
template <int Distance = kLanes / 2>
inline void transpose(Vector* rows) {
  Integers low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & Distance ? kLanes + i - Distance : i;
    high[i] = i & Distance ? kLanes + i : i + Distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Distance) continue;
    const Vector upper = rows[i], lower = rows[i + Distance];
    rows[i] = __builtin_shuffle(upper, lower, low);
    rows[i + Distance] = __builtin_shuffle(upper, lower, high);
  }
  if constexpr (Distance > 1) transpose<Distance / 2>(rows);
}
