// The micro-kernel in vector registers: a tile of C of any size up to kTileRows by kPanelVectors
// vectors, one function for each size. It multiplies float32, or groups of bfloat16, int16 or int8.

// The lhs of a tile: `steps` lanes of each row, and if they are integers the rows' scales and sums.
struct Lhs {
  int64_t rows, steps;
  const char* data;
  int64_t stride;  // bytes
  const float* scales = nullptr;
  const int32_t* sums = nullptr;
};

#if defined(ADACOMCAT_INT8_PRODUCTS)
#include "cpu/gemm/microkernel_int8-inl.h"
#elif defined(ADACOMCAT_INT16_PRODUCTS)
#include "cpu/gemm/microkernel_int16-inl.h"
#elif defined(ADACOMCAT_BF16_OPERANDS)
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
#ifndef ADACOMCAT_INTEGER_PRODUCTS
inline Vector value_of(Sum sum, const Lhs&, int, PackedRhs, int) { return sum; }
#endif
#ifndef ADACOMCAT_INT8_PRODUCTS
typedef Vector RhsLanes;
inline RhsLanes load_rhs(const char* p) { return load(reinterpret_cast<const float*>(p)); }
#endif
constexpr int kRhsLaneBytes = kPackedSize * kPackedGroup;

inline Lane read_lane(const void* a) {
  Lane lane;
  __builtin_memcpy(&lane, a, sizeof lane);
  return lane;
}

// One address register serves three rows. The empty asm hides from the compiler that an address is a
// multiple of `stride` away from another: twelve multiples do not fit into the general registers, and
// g++ would keep some of them in vector registers, where each read takes a multiplier's port.
constexpr int kRowsPerAddress = 3;

inline const char* row_address(const char* a, int64_t stride, int row) {
  const char* address = a + row * stride;
#ifdef __GNUC__
  __asm__("" : "+r"(address));
#endif
  return address;
}

// Computes R rows by P vectors of lhs · rhs and calls store_sum(row, vector, value) for each. The packed
// rows of the rhs are P vectors long.
template <int R, int P, typename Store>
[[gnu::always_inline]] inline void multiply_rows(const Lhs& lhs, PackedRhs rhs, Prefetch prefetch,
                                                 Store store_sum) {
  const int64_t stride = lhs.stride;
  const char* left[(R + kRowsPerAddress - 1) / kRowsPerAddress];
  for (int r = 0; r < R; r += kRowsPerAddress) {
    left[r / kRowsPerAddress] = row_address(lhs.data, stride, r);
  }
  const char* rows = reinterpret_cast<const char*>(rhs.rows);
  Sum sum[R][P] = {};
  for (int64_t i = 0; i < lhs.steps; ++i) {
    __builtin_prefetch(prefetch.from, 0, 2);
    prefetch.from += prefetch.step;
    RhsLanes right[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) right[p] = load_rhs(rows + p * kLanes * kRhsLaneBytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Lane lane = read_lane(left[r / kRowsPerAddress] + r % kRowsPerAddress * stride);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[r][p] = multiply_add(sum[r][p], lane, right[p]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r += kRowsPerAddress) left[r / kRowsPerAddress] += kLhsLaneBytes;
    rows += P * kLanes * kRhsLaneBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      store_sum(r, p, value_of(sum[r][p], lhs, r, rhs, p));
    }
  }
}

// c (R, P vectors) = lhs · rhs, or += it. Rows of c are S elements apart, or `c_stride` if S is 0.
template <int R, int P, int64_t S>
void multiply_tile(const Lhs& lhs, PackedRhs rhs, float* c, int64_t c_stride, bool add,
                   Prefetch prefetch) {
  if (S) c_stride = S;
  multiply_rows<R, P>(lhs, rhs, prefetch, [=](int r, int p, Vector value) {
    float* const to = c + r * c_stride + p * kLanes;
    store(to, add ? load(to) + value : value);
  });
}

// A tile of full size whose epilogue is applied in registers.
template <Activation A, Dtype D, bool scaled, bool residual>
void multiply_full_tile(const Lhs& lhs, PackedRhs rhs, const FullTile& w, Prefetch prefetch) {
  multiply_rows<kTileRows, kPanelVectors>(lhs, rhs, prefetch, [&w](int r, int p, Vector value) {
    const float* scale = scaled ? w.scales + r : nullptr;
    const char* added = residual ? w.residual + r * w.residual_stride : nullptr;
    store(w.out + r * w.stride, p * kLanes, D,
          apply_epilogue<A, D, scaled, residual>(value, scale, w.bias[p], added, p));
  });
}

using MultiplyTile = void (*)(const Lhs&, PackedRhs, float*, int64_t, bool, Prefetch);

template <int P, int64_t S, int... R>
inline MultiplyTile tile_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr MultiplyTile tiles[] = {multiply_tile<R + 1, P, S>...};
  return tiles[rows - 1];
}

template <int64_t S>
inline MultiplyTile find_tile(int64_t rows, int64_t vectors) {
  using Sizes = std::make_integer_sequence<int, kTileRows>;
  return vectors == kPanelVectors ? tile_of<kPanelVectors, S>(rows, Sizes{})
                                  : tile_of<1, S>(rows, Sizes{});
}

void begin() {}
void end() {}

class MicroKernel {
 public:
  static constexpr bool kFusesEpilogue = true;

  // The lhs of the tiles that follow.
  void set_lhs(int64_t rows, int64_t steps, const char* a, int64_t a_stride) {
#ifdef ADACOMCAT_INTEGER_PRODUCTS
    lhs_ = integers_.convert(rows, steps, a, a_stride);
#else
    lhs_ = {rows, steps, a, a_stride};
#endif
  }

  // c (rows, `vectors` vectors) = lhs · rhs, or += it. The deferred work is done first.
  template <int64_t S>
  void multiply(int64_t vectors, PackedRhs rhs, float* c, int64_t c_stride, bool add,
                Prefetch prefetch, RowWork& deferred) const {
    deferred.all();
    find_tile<S>(lhs_.rows, vectors)(lhs_, rhs, c, c_stride, add, prefetch);
  }

  // A tile of full size and its epilogue.
  template <Activation A, Dtype D>
  void multiply_fused(PackedRhs rhs, const FullTile& full, Prefetch prefetch) const {
    if constexpr (kFused<A, D>) {
      const bool plain = A != Activation::none || (!full.residual && !full.scales);
      if (plain) return multiply_full_tile<A, D, false, false>(lhs_, rhs, full, prefetch);
      constexpr Activation none = Activation::none;
      (full.residual ? &multiply_full_tile<none, D, false, true>
                     : &multiply_full_tile<none, D, true, false>)(lhs_, rhs, full, prefetch);
    }
  }

 private:
  Lhs lhs_;
#ifdef ADACOMCAT_INTEGER_PRODUCTS
  IntegerLhs integers_;
#endif
};
