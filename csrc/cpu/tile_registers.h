// A tile of C in vector registers, each size a function of its own.

// Rows of the left side: `steps` lanes of each, and the scales of integers.
struct Held {
  int64_t rows, steps;
  const char* data;
  int64_t stride;  // bytes
  const float* scales;
};

#if defined(ADACOMCAT_INTEGERS)
#include "integers.h"
#elif defined(ADACOMCAT_BF16_DOT)
typedef uint32_t Lane;  // two consecutive k
typedef Vector Sum;
inline Sum multiply_add(Sum sum, Lane a, Vector b) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#else
typedef float Lane;
typedef Vector Sum;
inline Sum multiply_add(Sum sum, Lane a, Vector b) { return sum + a * b; }
#endif
#ifndef ADACOMCAT_INTEGERS
inline Vector value_of(Sum sum, const float*, int, const float*, int) { return sum; }
#endif

inline Lane read_lane(const void* a) {
  Lane lane;
  __builtin_memcpy(&lane, a, sizeof lane);
  return lane;
}

// From one address three rows are reached; the compiler must not know that it is a multiple of `stride` away
// from others: twelve rows' multiples are more than there are registers, and g++ keeps the rest of them in
// vector registers, to read each anew takes a multiplier's port for a cycle.
constexpr int kReach = 3;

inline const char* row_address(const char* a, int64_t stride, int row) {
  const char* address = a + row * stride;
#ifdef __GNUC__
  __asm__("" : "+r"(address));
#endif
  return address;
}

// close(row, vector, sum) for R rows by P vectors of a · b; the packed rows of b are P vectors apart.
template <int R, int P, typename Close>
[[gnu::always_inline]] inline void multiply_rows(const Held& a, Right b, Prefetch ahead, Close close) {
  const int64_t stride = a.stride;
  const char* left[(R + kReach - 1) / kReach];
  for (int r = 0; r < R; r += kReach) left[r / kReach] = row_address(a.data, stride, r);
  const float* rows = b.rows;
  Sum sum[R][P] = {};
  for (int64_t i = 0; i < a.steps; ++i) {
    __builtin_prefetch(ahead.from, 0, 2);
    ahead.from += ahead.step;
    Vector right[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) right[p] = load(rows + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Lane lane = read_lane(left[r / kReach] + r % kReach * stride);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[r][p] = multiply_add(sum[r][p], lane, right[p]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r += kReach) left[r / kReach] += kStep;
    rows += P * kLanes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) close(r, p, value_of(sum[r][p], a.scales, r, b.scales, p));
  }
}

// c (R, P vectors) = or += a · b. Rows of c are S elements apart, or `c_stride` where S is 0.
template <int R, int P, int64_t S>
void multiply_tile(const Held& a, Right b, float* c, int64_t c_stride, bool add, Prefetch ahead) {
  if (S) c_stride = S;
  multiply_rows<R, P>(a, b, ahead, [=](int r, int p, Vector value) {
    float* const to = c + r * c_stride + p * kLanes;
    store(to, add ? load(to) + value : value);
  });
}

// A tile of full size, finished before it leaves the registers.
template <Activation A, Dtype D, bool scaled, bool residual>
void multiply_whole(const Held& a, Right b, const Whole& w, Prefetch ahead) {
  multiply_rows<kTileRows, kPanel>(a, b, ahead, [&w](int r, int p, Vector value) {
    const float* scale = scaled ? w.scales + r : nullptr;
    const char* added = residual ? w.added + r * w.added_stride : nullptr;
    store(w.out + r * w.stride, p * kLanes, D,
          finish_vector<A, D, scaled, residual>(value, scale, w.bias[p], added, p));
  });
}

using MultiplyTile = void (*)(const Held&, Right, float*, int64_t, bool, Prefetch);

template <int P, int64_t S, int... R>
inline MultiplyTile tile_of(int64_t rows, Sequence<R...>) {
  static constexpr MultiplyTile tiles[] = {multiply_tile<R + 1, P, S>...};
  return tiles[rows - 1];
}

template <int64_t S>
inline MultiplyTile find_tile(int64_t rows, int64_t vectors) {
  using Tiles = typename MakeSequence<kTileRows>::type;
  return vectors == kPanel ? tile_of<kPanel, S>(rows, Tiles{}) : tile_of<1, S>(rows, Tiles{});
}

void begin() {}
void end() {}

// Tiles of any size that fits, in vector registers. hold() takes the left side, `steps` lanes of each
// row; multiply() gives c (rows, `vectors` vectors) = or += that times b.
class TileUnit {
 public:
  static constexpr bool kFinishes = true;

  void hold(int64_t rows, int64_t steps, const char* a, int64_t a_stride) {
#ifdef ADACOMCAT_INTEGERS
    held_ = integers_.of(rows, steps, a, a_stride);
#else
    held_ = {rows, steps, a, a_stride, nullptr};
#endif
  }

  template <int64_t S>
  void multiply(int64_t vectors, Right b, float* c, int64_t c_stride, bool add, Prefetch ahead,
                Work& meanwhile) const {
    meanwhile.all();
    find_tile<S>(held_.rows, vectors)(held_, b, c, c_stride, add, ahead);
  }

  // A tile that fills the registers, finished there.
  template <Activation A, Dtype D>
  void finish(Right b, const Whole& whole, Prefetch ahead) const {
    if constexpr (kFrequent<A, D>) {
      const bool plain = A != Activation::none || (!whole.added && !whole.scales);
      if (plain) return multiply_whole<A, D, false, false>(held_, b, whole, ahead);
      constexpr Activation none = Activation::none;
      (whole.added ? &multiply_whole<none, D, false, true>
                   : &multiply_whole<none, D, true, false>)(held_, b, whole, ahead);
    }
  }

 private:
  Held held_;
#ifdef ADACOMCAT_INTEGERS
  LeftIntegers integers_;
#endif
};
