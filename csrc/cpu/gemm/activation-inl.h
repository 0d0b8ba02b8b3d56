// exp, 2^x, the activations and their derivatives, on vectors.

// exp(x), x = n ln 2 + r, as 2^n · Σ r^i / i! with |r| ≤ ln(2) / 2. Relative error about 1e-7. 0 below
// -87.3, infinity above 88.72, NaN for NaN.
inline Vector exponential(Vector x) {
  const Vector least = broadcast(-87.3f), most = broadcast(88.72f);
  const Integers low = x < least;
  const Integers high = x > most;
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
  // In two factors, since 2^128 is no float.
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

// Minimax polynomials of 2^r for 0 <= r <= 1. Relative error 2e-7, or 8e-5 for 16-bit activations.
#ifdef ADACOMCAT_16_BIT_ACTIVATIONS
constexpr float kPower[] = {0.999925245f, 0.695832847f, 0.226069391f, 0.0780230066f};
#else
constexpr float kPower[] = {0.99999994f,   0.693153083f,   0.240153611f,
                            0.0558263175f, 0.00898934063f, 0.00187757658f};
#endif

// 2^x for x <= 0, as softmax needs it. Results below 2^-100 become 0: some CPUs take hundreds of cycles
// for an operation on a denormal, and a product of such small numbers is one.
inline Vector power_of_two(Vector x) {
  constexpr float least_exponent = -100.0f;
#ifdef ADACOMCAT_AVX512
  const __mmask16 near =
      _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(least_exponent), _CMP_NLE_UQ);
  const Vector above_floor = (Vector)_mm512_reduce_ps((__m512)x, 9);
  return (Vector)_mm512_maskz_scalef_ps(near, (__m512)horner(kPower, above_floor), (__m512)x);
#else
  const float round = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const Vector shifted = (x - 0.5f) + round;
  const Vector p = horner(kPower, x - (shifted - round));
  const Words power = (Words)p + ((Words)shifted << 23);  // the floor in the low bits
  return (Vector)(power & (Words) ~(x <= least_exponent));
#endif
}

// Minimax polynomial of (Φ(x) - ½) / x in s = 2 (x / limit)² - 1, Φ the cumulative distribution function
// of the normal distribution. Above the limit Φ is taken as constant, from -limit down as 0. Absolute
// error of Φ: 2e-7.
constexpr float kNormalLimit = 5.09116882f;
constexpr float kNormal[] = {0.138844667f,   -0.0691156453f,  0.0508475834f,  -0.0402530219f,
                             0.0317170212f,  -0.0238713403f,  0.0172483938f,  -0.0121798316f,
                             0.00713675329f, -0.00290317622f, 0.00198536591f, -0.00204285034f,
                             0.000795360054f};

// Φ(x). Zero far below: any other constant there, times a large negative x, would be no GELU.
inline Vector normal_distribution(Vector x) {
  const Vector z = minimum(broadcast(kNormalLimit), maximum(broadcast(-kNormalLimit), x));
  const Vector p = horner(kNormal, z * z * (2.0f / (kNormalLimit * kNormalLimit)) - 1.0f);
  return maximum(Vector{}, z * p + 0.5f);  // a little below 0 at -limit
}

// GELU: x Φ(x). For 16-bit activations it is computed as max(x, 0) - t (1 - Φ(t)), t = min(|x|, limit),
// with a polynomial of half the length: absolute error 2e-4, relative error at most 1.4e-3 for x > 0. From
// the limit on, the product is 0.
#ifdef ADACOMCAT_16_BIT_ACTIVATIONS
constexpr float kTailLimit = 3.9f;
constexpr float kTail[] = {0.499329448f,   -0.385195136f, -0.0521836765f,  0.147275239f,
                           -0.0604671128f, 0.0104904855f, -0.000686554878f};

inline Vector gelu(Vector x) {
#ifdef ADACOMCAT_AVX512
  const Vector t = (Vector)_mm512_range_ps((__m512)x, (__m512)broadcast(kTailLimit), 10);
  const __mmask16 inside = _mm512_cmp_ps_mask((__m512)t, (__m512)broadcast(kTailLimit), _CMP_NEQ_UQ);
  const auto tail = _mm512_maskz_mul_ps(inside, (__m512)t, (__m512)horner(kTail, t));
#else
  const Vector t = minimum(broadcast(kTailLimit), (Vector)((Integers)x & 0x7fffffff));
  const Vector tail = select(t < kTailLimit, t * horner(kTail, t), Vector{});
#endif
  return maximum(Vector{}, x) - (Vector)tail;
}
#else
inline Vector gelu(Vector x) { return x * normal_distribution(x); }
#endif

constexpr float kQuick = 1.702f;  // of quick_gelu: x sigmoid(1.702 x)

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
    case Activation::quick_gelu:
      return x * sigmoid(kQuick * x);
    case Activation::none:
      break;
  }
  return x;
}

// Returns act(x) and sets grad = act'(x).
inline Vector activate(Vector x, Activation activation, Vector& grad) {
  switch (activation) {
    case Activation::gelu: {
      const Vector below = normal_distribution(x);
      grad = below + 0.398942280401432678f * x * power_of_two(-0.721347520f * x * x);
      return x * below;
    }
    case Activation::gelu_tanh: {  // far out, where x³ would overflow, the sigmoid is 0 or 1
      const Vector square = minimum(broadcast(1e6f), x * x);
      const Vector below = sigmoid(1.59576912160573071f * x * (1.0f + 0.044715f * square));
      grad = below +
             x * below * (1.0f - below) * 1.59576912160573071f * (1.0f + 3 * 0.044715f * square);
      return x * below;
    }
    case Activation::silu: {
      const Vector below = sigmoid(x);
      grad = below * (1.0f + x * (1.0f - below));
      return x * below;
    }
    case Activation::relu:
      grad = select(x > 0.0f, broadcast(1), Vector{});
      return activate(x, Activation::relu);
    case Activation::quick_gelu: {  // far out, where 1.702 x would overflow, the sigmoid is 0 or 1
      const Vector inner = minimum(broadcast(1e30f), maximum(broadcast(-1e30f), kQuick * x));
      const Vector below = sigmoid(inner);
      grad = below * (1.0f + inner * (1.0f - below));
      return x * below;
    }
    case Activation::none:
      grad = broadcast(1);
  }
  return x;
}
