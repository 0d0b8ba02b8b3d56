// Vectors of kLanes floats, conversions, exp and the activations. Included by one engine_*.cpp per
// instruction set, inside its own namespace: nothing here may become a symbol that two share.

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
// Where one is NaN, b.
#if defined(ADACOMCAT_AVX512)
inline Vector maximum(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vector minimum(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
inline Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
#endif

// Of a conversion of vectors g++ 12 makes two of halves and puts them together.
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
#ifdef ADACOMCAT_BF16_DOT
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

// Two vectors one after the other: AVX-512 rounds two to bfloat16 in the time of one.
inline void store_two(void* p, int64_t i, Dtype dtype, Vector first, Vector second) {
#ifdef ADACOMCAT_BF16_DOT
  if (dtype == Dtype::bf16) {
    const auto both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(static_cast<uint16_t*>(p) + i, (__m512i)both);
    return;
  }
#endif
  store(p, i, dtype, first);
  store(p, i + kLanes, dtype, second);
}

// The first `count` lanes; the others read as zero, or stay unwritten.
inline Vector load_some(const void* p, int64_t i, Dtype dtype, int64_t count) {
  if (count >= kLanes) return load(p, i, dtype);
#ifdef ADACOMCAT_AVX512
  const __mmask16 lanes = lanes_of(count);
  if (dtype == Dtype::f32) return (Vector)_mm512_maskz_loadu_ps(lanes, static_cast<const float*>(p) + i);
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
  if (dtype == Dtype::f32) return _mm512_mask_storeu_ps(static_cast<float*>(p) + i, lanes, (__m512)x);
  const Halves halves = dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, lanes, (__m256i)halves);
#else
  float lanes[kLanes];
  store(lanes, 0, dtype, x);
  const int64_t size = dtype_size(dtype);
  __builtin_memcpy(static_cast<char*>(p) + i * size, lanes, count * size);
#endif
}

// Lane i becomes lane i + Distance, around.
template <int Distance>
inline Vector rotated(Vector x) {
  Integers from;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) from[i] = (i + Distance) % kLanes;
  return __builtin_shuffle(x, from);
}

// Halves onto halves: one lane after the other would wait kLanes times for an addition.
template <int Half = kLanes / 2>
[[gnu::always_inline]] inline float sum_of(Vector x) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    return sum_of<Half / 2>(x + rotated<Half>(x));
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

template <int Half = kLanes / 2>
[[gnu::always_inline]] inline float maximum_of(Vector x) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    return maximum_of<Half / 2>(maximum(x, rotated<Half>(x)));
  }
}

// A square of floats becomes its transpose: rows exchange halves of halves.
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

// 2^n · Σ r^i / i!, |r| ≤ ln2 / 2: relative error about 1e-7; 0 below -87, infinity above 88.7.
inline Vector exponential(Vector x) {
  const Vector least = broadcast(-87.3f), most = broadcast(88.72f);
  const Integers low = x < least, high = x > most;
  const Vector clamped = select(low, least, select(high, most, x));
  const float round = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const Vector shifted = clamped * 1.44269504088896f + round;
  const Vector n = shifted - round;
  const Vector r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^128 is no float: half of the exponent goes in twice.
  const Integers exponent = __builtin_convertvector(n, Integers);
  const Integers half = exponent >> 1;
  const Vector scale = (Vector)((half + 127) << 23), rest = (Vector)((exponent - half + 127) << 23);
  p = p * scale * rest;
  p = select(low, Vector{}, select(high, broadcast(__builtin_inff()), p));
  return select(x == x, p, x);
}

template <int N>
inline Vector horner(const float (&coefficients)[N], Vector s) {
  Vector p = broadcast(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = p * s + coefficients[i];
  return p;
}

// Minimax polynomials of 2^r, 0 <= r <= 1: relative error 2e-7, or 8e-5 where 16 bits are asked for.
#ifdef ADACOMCAT_16_BITS
constexpr float kPower[] = {0.999925245f, 0.695832847f, 0.226069391f, 0.0780230066f};
#else
constexpr float kPower[] = {0.99999994f,   0.693153083f,   0.240153611f,
                            0.0558263175f, 0.00898934063f, 0.00187757658f};
#endif

// 2^x for x <= 0: the softmax's. 0 below 2^-100: of denormals, and what becomes one when it is multiplied,
// some CPUs make exceptions that take as long as hundreds of other operations.
inline Vector power_of_two(Vector x) {
  constexpr float least_exponent = -100.0f;
#ifdef ADACOMCAT_AVX512
  const __mmask16 near = _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(least_exponent), _CMP_NLE_UQ);
  const Vector above_floor = (Vector)_mm512_reduce_ps((__m512)x, 9);
  return (Vector)_mm512_maskz_scalef_ps(near, (__m512)horner(kPower, above_floor), (__m512)x);
#else
  const float round = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const Vector shifted = (x - 0.5f) + round;
  const Vector p = horner(kPower, x - (shifted - round));
  const Words power = (Words)p + ((Words)shifted << 23);  // the floor in the low bits
  return (Vector)(power & (Words)~(x <= least_exponent));
#endif
}

// Minimax polynomial of (Φ(x) - ½) / x, Φ the normal distribution, in s = 2 (x / limit)² - 1; beyond
// the limit Φ is constant. Absolute error of Φ 2e-7.
constexpr float kNormalLimit = 5.09116882f;
constexpr float kNormal[] = {0.138844667f, -0.0691156453f, 0.0508475834f, -0.0402530219f,
                             0.0317170212f, -0.0238713403f, 0.0172483938f, -0.0121798316f,
                             0.00713675329f, -0.00290317622f, 0.00198536591f, -0.00204285034f,
                             0.000795360054f};

// Below that x Φ(x) is what it is there: Φ, nearly zero, times a huge x would not be.
inline Vector bounded(Vector x) { return maximum(broadcast(-kNormalLimit), x); }

// Φ(x) for bounded x.
inline Vector normal_distribution(Vector x) {
  const Vector z = minimum(broadcast(kNormalLimit), x);
  return z * horner(kNormal, z * z * (2.0f / (kNormalLimit * kNormalLimit)) - 1.0f) + 0.5f;
}

// x Φ(x). Of 16 bits max(x, 0) - t (1 - Φ(t)), t = |x| up to a limit: absolute error 2e-4, relative to
// the result at most 1.4e-3 for x > 0, in three operations and a polynomial of half the length.
#ifdef ADACOMCAT_16_BITS
constexpr float kTailLimit = 3.9f;
constexpr float kTail[] = {0.499329448f,   -0.385195136f, -0.0521836765f,  0.147275239f,
                           -0.0604671128f, 0.0104904855f, -0.000686554878f};

inline Vector gelu(Vector x) {
  const Vector t = (Vector)_mm512_range_ps((__m512)x, (__m512)broadcast(kTailLimit), 10);
  return maximum(Vector{}, x) - t * horner(kTail, t);
}
#else
inline Vector gelu(Vector x) { return bounded(x) * normal_distribution(bounded(x)); }
#endif

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vector activate(Vector x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:  // 0.5 (1 + tanh z) = sigmoid(2 z)
      return x * sigmoid(1.59576912160573071f * (x + 0.044715f * x * x * x));
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::relu:
      return select(x < 0.0f, Vector{}, x);  // keeps NaN
    case Activation::none:
      break;
  }
  return x;
}

// act(x), and act'(x) in `slope`.
inline Vector activate(Vector x, Activation activation, Vector& slope) {
  switch (activation) {
    case Activation::gelu: {
      const Vector below = normal_distribution(bounded(x));
      slope = below + 0.398942280401432678f * x * power_of_two(-0.721347520f * x * x);
      return bounded(x) * below;
    }
    case Activation::gelu_tanh: {  // far out, where x³ would overflow, the sigmoid is 0 or 1
      const Vector square = minimum(broadcast(1e6f), x * x);
      const Vector below = sigmoid(1.59576912160573071f * x * (1.0f + 0.044715f * square));
      slope = below + x * below * (1.0f - below) * 1.59576912160573071f *
                          (1.0f + 3 * 0.044715f * square);
      return x * below;
    }
    case Activation::silu: {
      const Vector below = sigmoid(x);
      slope = below * (1.0f + x * (1.0f - below));
      return x * below;
    }
    case Activation::relu:
      slope = select(x > 0.0f, broadcast(1), Vector{});
      return activate(x, Activation::relu);
    case Activation::none:
      slope = broadcast(1);
  }
  return x;
}
