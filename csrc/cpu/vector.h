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
// All bits of the first `count` lanes.
inline Integers first_lanes(int64_t count) {
  Integers lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? -1 : 0;
  return lanes;
}
// Where one is NaN, b.
#if defined(ADACOMCAT_AVX512)
inline Vector maximum(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vector minimum(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
inline Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
#endif

inline Vector from_bf16(Halves x) {
  return (Vector)(__builtin_convertvector(x, Words) << 16);
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

// The first `count` lanes; the others read as zero, or stay unwritten.
inline Vector load_some(const void* p, int64_t i, Dtype dtype, int64_t count) {
  if (count >= kLanes) return load(p, i, dtype);
  float lanes[kLanes] = {};
  const int64_t size = dtype_size(dtype);
  __builtin_memcpy(lanes, static_cast<const char*>(p) + i * size, count * size);
  return load(lanes, 0, dtype);
}

inline float read_one(const void* p, int64_t i, Dtype dtype) {
  return load_some(p, i, dtype, 1)[0];
}

inline void store_some(void* p, int64_t i, Dtype dtype, Vector x, int64_t count) {
  if (count >= kLanes) return store(p, i, dtype, x);
  float lanes[kLanes];
  store(lanes, 0, dtype, x);
  const int64_t size = dtype_size(dtype);
  __builtin_memcpy(static_cast<char*>(p) + i * size, lanes, count * size);
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
inline float sum_of(Vector x) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    return sum_of<Half / 2>(x + rotated<Half>(x));
  }
}

template <int Half = kLanes / 2>
inline float maximum_of(Vector x) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    return maximum_of<Half / 2>(maximum(x, rotated<Half>(x)));
  }
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

// exp(x) for x <= 0: the softmax's. 0 far below; relative error about 1e-7, or 2e-5 where the result
// becomes bfloat16.
inline Vector decay(Vector x) {
  const Vector clamped = maximum(broadcast(-88.0f), x);
  const float round = 12582912.0f;
  const Vector shifted = clamped * 1.44269504088896f + round;
  const Vector n = shifted - round;
#ifdef ADACOMCAT_BF16_DOT
  const Vector r = clamped - n * 0.693147181f;
  Vector p = r * (1.0f / 24) + (1.0f / 6);
#else
  const Vector r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
#endif
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // n stands in the low bits of `shifted`. Denormal results, of which some CPUs make an exception that
  // takes as long as hundreds of others, are zero.
  const Vector scaled = (Vector)((Integers)p + ((Integers)shifted << 23));
  return select(n <= -126.0f, Vector{}, scaled);
}

// Minimax polynomials of (Φ(x) - ½) / x, Φ the normal distribution, in s = 2 (x / limit)² - 1; beyond
// it Φ is constant. Absolute error of Φ 2e-7 in fp32, and 4e-5 where a result of 16 bits is asked for.
#ifdef ADACOMCAT_BF16_DOT
constexpr float kNormalLimit = 4.24264069f;
constexpr float kNormal[] = {0.166204198f, -0.0809274561f, 0.0561444662f, -0.0386968227f,
                             0.0230816364f, -0.0154842683f, 0.012874901f, -0.00535762172f};
#else
constexpr float kNormalLimit = 5.09116882f;
constexpr float kNormal[] = {0.138844667f, -0.0691156453f, 0.0508475834f, -0.0402530219f,
                             0.0317170212f, -0.0238713403f, 0.0172483938f, -0.0121798316f,
                             0.00713675329f, -0.00290317622f, 0.00198536591f, -0.00204285034f,
                             0.000795360054f};
#endif

template <int N>
inline Vector horner(const float (&coefficients)[N], Vector s) {
  Vector p = broadcast(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = p * s + coefficients[i];
  return p;
}

// Below that x Φ(x) is what it is there: Φ, nearly zero, times a huge x would not be.
inline Vector bounded(Vector x) { return maximum(broadcast(-kNormalLimit), x); }

// Φ(x) for bounded x.
inline Vector normal_distribution(Vector x) {
  const Vector z = minimum(broadcast(kNormalLimit), x);
  return z * horner(kNormal, z * z * (2.0f / (kNormalLimit * kNormalLimit)) - 1.0f) + 0.5f;
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vector activate(Vector x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return bounded(x) * normal_distribution(bounded(x));
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
      slope = below + 0.398942280401432678f * x * decay(-0.5f * x * x);
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
