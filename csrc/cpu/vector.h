// Vectors of kLanes floats, conversions, exp and the activations. Included by one engine_*.cpp per
// instruction set, inside its own namespace: nothing here may become a symbol that two share.

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef float LooseVector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline Vector broadcast(float x) { return x - Vector{}; }
inline Vector load(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }
inline void store(float* p, Vector x) { *reinterpret_cast<LooseVector*>(p) = x; }
inline Vector select(Integers mask, Vector yes, Vector no) {
  return (Vector)((mask & (Integers)yes) | (~mask & (Integers)no));
}
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

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

#if defined(__F16C__) && defined(__AVX512F__)
inline Vector from_f16(Halves x) { return (Vector)_mm512_cvtph_ps((__m256i)x); }
inline Halves to_f16(Vector x) { return (Halves)_mm512_cvtps_ph((__m512)x, 0); }
#elif defined(__F16C__)
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

inline void store_some(void* p, int64_t i, Dtype dtype, Vector x, int64_t count) {
  if (count >= kLanes) return store(p, i, dtype, x);
  float lanes[kLanes];
  store(lanes, 0, dtype, x);
  const int64_t size = dtype_size(dtype);
  __builtin_memcpy(static_cast<char*>(p) + i * size, lanes, count * size);
}

inline float sum_of(Vector x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

inline float maximum_of(Vector x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
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

// exp(x) for x <= 0: the softmax's. 0 below -87; relative error about 1e-7, or 2e-5 where the result
// becomes bfloat16.
inline Vector decay(Vector x) {
  const Vector clamped = maximum(x, broadcast(-87.3f));
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
  // The integer n stands in the low bits of `shifted`; it moves into the exponent.
  p = (Vector)((Integers)p + ((Integers)shifted << 23));
  return select(x < -87.3f, Vector{}, p);
}

// Minimax polynomials of erf(z) / z in s = 2 z² / 3.9² - 1, |z| <= 3.9 (beyond, erf is 1 to 4e-8):
// absolute error of erf 3e-7 in fp32, and 9e-5 where a result of 16 bits is asked for.
constexpr float kErf[] = {0.362583995f,   -0.181011453f, 0.134689063f,   -0.109516501f,
                          0.0907082185f,  -0.0739961267f, 0.0576511919f, -0.0417783521f,
                          0.0299289729f,  -0.022178771f,  0.0123189595f, -0.003447111f,
                          0.0028952607f,  -0.00405585626f, 0.00161876739f};
constexpr float kShortErf[] = {0.362615883f,   -0.180948049f,  0.132945478f, -0.109977536f,
                               0.105556101f,   -0.075670734f,  0.0150556369f, -0.0295003615f,
                               0.0759493336f, -0.0396387316f};

template <int N>
inline Vector horner(const float (&coefficients)[N], Vector s) {
  Vector p = broadcast(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = p * s + coefficients[i];
  return p;
}

inline Vector error_function(Vector x) {
  const Vector s = x * x * (2.0f / (3.9f * 3.9f)) - 1.0f;
#ifdef ADACOMCAT_BF16_DOT
  const Vector inside = x * horner(kShortErf, s);
#else
  const Vector inside = x * horner(kErf, s);
#endif
  const Vector low = select(x < -3.9f, broadcast(-1.0f), inside);
  return select(x > 3.9f, broadcast(1.0f), low);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vector activate(Vector x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f));
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
