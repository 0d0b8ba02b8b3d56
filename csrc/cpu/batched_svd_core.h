// One-sided Jacobi SVD with a pivoted QR before it (Drmač and Veselić, SIAM J. Matrix Anal. 29,
// 2008): A P = Q R, then rotations J make the columns of X = P Rᵀ orthogonal, so X J = V Σ and
// A = (Q J) Σ Vᵀ. J is not accumulated: it is R Pᵀ V Σ⁻¹, made orthonormal from the largest singular
// value down. Of matrices graded by columns small ones keep their relative accuracy.
//
// Included by one file for each instruction set, which sets ISA (a namespace) and VECTOR_BYTES.
#include "batched_svd.h"
#include "lanes.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <utility>

namespace adacomcat::ISA {
namespace {

// (c x - s y, s x + c y), c = 1 - s τ, to (first, second), which are x and y in one order or the
// other. Written as corrections, so that small angles round little.
template <class T, int64_t fixed>
inline void rotate(const T* x, const T* y, T* first, T* second, int64_t vectors, T s, T tau) {
  auto* a = reinterpret_cast<const Vector<T>*>(x);
  auto* b = reinterpret_cast<const Vector<T>*>(y);
  auto* c = reinterpret_cast<Vector<T>*>(first);
  auto* d = reinterpret_cast<Vector<T>*>(second);
  const Vector<T> vs = splat(s), vtau = splat(tau);
  const int64_t end = fixed ? fixed : vectors;
#pragma GCC unroll 4
  for (int64_t i = 0; i < end; ++i) {
    const Vector<T> p = a[i], q = b[i];
    c[i] = p - vs * (q + vtau * p);
    d[i] = q + vs * (p - vtau * q);
  }
}

template <class T>
class Svd {
 public:
  explicit Svd(const SvdProblem<T>& problem) : p(problem) {
    wide = p.columns > p.rows;
    m = wide ? p.columns : p.rows;
    n = wide ? p.rows : p.columns;
    ldm = padded<T>(m);
    ldn = padded<T>(n);
    T* next = p.workspace;
    const auto take = [&next](int64_t size) { return std::exchange(next, next + size); };
    a = take(n * ldm);
    x = take(n * ldn);
    factor = take(n * ldn);
    left = take(n * ldm);
    for (T** array : {&squares, &inner, &sines, &taus, &values}) *array = take(ldn);
    pivots = reinterpret_cast<int32_t*>(take(ldn));
    order = reinterpret_cast<int32_t*>(take(ldn));
    std::memset(p.workspace, 0, sizeof(T) * svd_workspace<T>(m, n));
  }

  SvdStatus run() {
    if (!load()) return SvdStatus::not_finite;
    factorize();
    if (!orthogonalize()) return SvdStatus::not_converged;
    sort();
    for (int64_t i = 0; i < p.rank; ++i) p.s[i] = std::ldexp(values[order[i]], exponent);
    if (!p.u) return SvdStatus::ok;
    for (int64_t i = 0; i < p.rank; ++i) finish_right(i);
    for (int64_t i = 0; i < p.rank; ++i) finish_left(i);
    apply_reflections();
    store();
    return SvdStatus::ok;
  }

 private:
  static constexpr int kMaxSweeps = 40;
  // Cosines below this are rounding.
  static constexpr T kTolerance = 2 * std::numeric_limits<T>::epsilon();

  T* column_a(int64_t j) const { return a + j * ldm; }
  T* column_x(int64_t j) const { return x + j * ldn; }
  T* column_r(int64_t j) const { return factor + j * ldn; }
  T* column_left(int64_t j) const { return left + j * ldm; }
  int64_t vectors_m(int64_t begin = 0) const { return (ldm - begin) / kLanes<T>; }
  int64_t vectors_n() const { return ldn / kLanes<T>; }

  // The matrix, transposed if it is wide, scaled by a power of two to a largest element in [1, 2).
  bool load() {
    const int64_t step_m = wide ? p.column_stride : p.row_stride;
    const int64_t step_n = wide ? p.row_stride : p.column_stride;
    for (int64_t j = 0; j < n; ++j) {
      T* to = column_a(j);
      const T* from = p.a + j * step_n;
      for (int64_t i = 0; i < m; ++i) to[i] = from[i * step_m];
    }
    const auto* all = reinterpret_cast<const Vector<T>*>(a);
    Vector<T> extremes{}, poisons{};
    for (int64_t i = 0; i < n * vectors_m(); ++i) {
      const Vector<T> size = all[i] < 0 ? -all[i] : all[i];
      extremes = size > extremes ? size : extremes;
      poisons += all[i] * 0;  // NaN for NaN and infinity
    }
    if (sum_lanes<T>(poisons) != 0) return false;
    const T largest = largest_lane(extremes);
    if (largest == 0) return true;
    exponent = std::ilogb(largest);
    // Two factors: 2^-exponent alone overflows where the matrix is denormal.
    const T half = std::ldexp(T(1), -exponent / 2);
    const T rest = std::ldexp(T(1), -exponent - (-exponent / 2));
    for (int64_t i = 0; i < n * ldm; ++i) a[i] = a[i] * half * rest;
    return true;
  }

  // Householder reflections I - h hᵀ, |h|² = 2, the longest remaining column first. R is kept by
  // columns, and by rows at the places of the columns that they belong to: X = P Rᵀ.
  void factorize() {
    for (int64_t j = 0; j < n; ++j) squares[j] = dot(column_a(j), column_a(j), vectors_m());
    for (int64_t j = 0; j < n; ++j) order[j] = static_cast<int32_t>(j);
    for (r = 0; r < n; ++r) {
      int64_t best = r;
      for (int64_t c = r + 1; c < n; ++c) {
        if (squares[order[c]] > squares[order[best]]) best = c;
      }
      const int32_t pivot = order[best];
      if (!(squares[pivot] > 0)) return;
      order[best] = order[r];
      order[r] = pivot;
      pivots[r] = pivot;
      // Rows above r are zero already in every remaining column.
      const int64_t begin = r / kLanes<T> * kLanes<T>;
      T* h = column_a(pivot);
      const T length = std::sqrt(squares[pivot]);
      const T head = h[r] < 0 ? -length : length;
      column_x(r)[pivot] = column_r(pivot)[r] = -head;
      // h = (a + head e) / sqrt(length (length + |a_r|))
      const T scale = T(1) / std::sqrt(length * (length + std::fabs(h[r])));
      h[r] += head;
      for (int64_t i = begin; i < ldm; ++i) h[i] *= scale;
      Vector<T> keep = splat(T(1));
      keep[r - begin] = 0;
      for (int64_t c = r + 1; c < n; ++c) reflect(h, begin, order[c], keep);
    }
  }

  void reflect(const T* h, int64_t begin, int32_t c, Vector<T> keep) {
    T* to = column_a(c);
    const Vector<T> w = splat(dot(h + begin, to + begin, vectors_m(begin)));
    auto* vh = reinterpret_cast<const Vector<T>*>(h + begin);
    auto* vt = reinterpret_cast<Vector<T>*>(to + begin);
    Vector<T> first = vt[0] - w * vh[0];
    vt[0] = first;
    column_x(r)[c] = column_r(c)[r] = to[r];
    // Row r becomes zero in the register: one element written to memory would stall the next load.
    first *= keep;
    vt[0] = first;
    Vector<T> sum = first * first;
    for (int64_t i = 1; i < vectors_m(begin); ++i) {
      vt[i] -= w * vh[i];
      sum += vt[i] * vt[i];
    }
    squares[c] = sum_lanes<T>(sum);
  }

  bool orthogonalize() {
    switch (vectors_n()) {
      case 1: return orthogonalize<1>();
      case 2: return orthogonalize<2>();
      case 4: return orthogonalize<4>();
      case 8: return orthogonalize<8>();
      case 16: return orthogonalize<16>();
      default: return orthogonalize<0>();
    }
  }

  // Sweeps over all pairs of columns, until all cosines are rounding. Where far more columns than the
  // first cache holds would pass through it in every round, blocks of them are paired, two of which
  // it holds.
  template <int64_t fixed>
  bool orthogonalize() {
    constexpr int64_t kMost = 32 << 10, kBlock = 16 << 10;  // bytes
    const int64_t size = ldn * sizeof(T), most = kBlock / size / kLanes<T> * kLanes<T>;
    const int64_t block = r * size <= kMost || most == 0 ? r : most;
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      for (int64_t j = 0; j < r; ++j) {
        squares[j] = dot<T, fixed>(column_x(j), column_x(j), vectors_n());
      }
      bool rotated = false;
      for (int64_t begin = 0; begin < r; begin += block) {
        rotated |= rotate_block<fixed>(begin, begin + block < r ? begin + block : r);
        for (int64_t other = begin + block; other < r; other += block) {
          rotated |= rotate_blocks<fixed>(begin, other, block);
        }
      }
      if (!rotated) return true;
    }
    return false;
  }

  // All pairs of columns begin … end: those with the same i + j modulo their number are disjoint.
  template <int64_t fixed>
  bool rotate_block(int64_t begin, int64_t end) {
    bool rotated = false;
    const int64_t size = end - begin;
    for (int64_t sum = 0; sum < size; ++sum) {
      // i + j = sum, and i + j = sum + size
      const int64_t low = (sum + 1) / 2, high = (size - sum - 1) / 2, middle = begin + sum;
      rotated |= rotate_round<fixed>(low + high, [=](int64_t k) {
        return k < low ? std::pair(begin + k, middle - k)
                       : std::pair(middle + 1 + (k - low), end - 1 - (k - low));
      });
    }
    return rotated;
  }

  // All pairs of a column of one block and a column of another behind it, which may be shorter.
  template <int64_t fixed>
  bool rotate_blocks(int64_t begin, int64_t other, int64_t block) {
    bool rotated = false;
    for (int64_t shift = 0; shift < block; ++shift) {
      rotated |= rotate_round<fixed>(other + block < r ? block : r - other, [=](int64_t k) {
        return std::pair(begin + k + shift - (k + shift < block ? 0 : block), other + k);
      });
    }
    return rotated;
  }

  // Rotates `count` disjoint pairs (i, j) of columns, i < j.
  template <int64_t fixed, class Pair>
  bool rotate_round(int64_t count, Pair pair) {
    for (int64_t k = 0; k < count; ++k) {
      const auto [i, j] = pair(k);
      inner[k] = dot<T, fixed>(column_x(i), column_x(j), vectors_n());
      sines[k] = squares[i];
      taus[k] = squares[j];
    }
    for (int64_t k = 0; k < count; k += kLanes<T>) angles(inner + k, sines + k, taus + k);
    bool rotated = false;
    for (int64_t k = 0; k < count; ++k) {
      const T sine = sines[k], tau = taus[k], change = inner[k];
      if (sine == 0) continue;
      rotated = true;
      const auto [i, j] = pair(k);
      T *one = column_x(i), *two = column_x(j);
      const T square_one = squares[i] - change, square_two = squares[j] + change;
      // The longer column goes first: it takes fewer sweeps.
      const bool swap = square_one < square_two;
      rotate<T, fixed>(one, two, swap ? two : one, swap ? one : two, vectors_n(), sine, tau);
      squares[i] = swap ? square_two : square_one;
      squares[j] = swap ? square_one : square_two;
    }
    return rotated;
  }

  // x·y, |x|², |y|² → tan θ · x·y, sin θ, tan θ/2 for one vector of pairs; tan θ is the smaller
  // root, so |θ| ≤ π/4. Zeros where the cosine is below the tolerance.
  static void angles(T* inner, T* sines, T* taus) {
    constexpr T limit = std::numeric_limits<T>::max_exponent > 200 ? T(1e150) : T(1e18);
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      const T g = inner[i], one = sines[i], two = taus[i];
      const bool small = std::fabs(g) <= kTolerance * std::sqrt(one) * std::sqrt(two);
      T zeta = (two - one) / (g + g);
      zeta = zeta > limit ? limit : zeta;
      zeta = zeta < -limit ? -limit : zeta;
      const T root = std::fabs(zeta) + std::sqrt(1 + zeta * zeta);
      const T tangent = zeta < 0 ? -1 / root : 1 / root;
      const T cosine = 1 / std::sqrt(1 + tangent * tangent);
      const T sine = tangent * cosine;
      inner[i] = small ? T(0) : tangent * g;
      sines[i] = small ? T(0) : sine;
      taus[i] = small ? T(0) : sine / (1 + cosine);
    }
  }

  void sort() {
    for (int64_t j = 0; j < n; ++j) {
      values[j] = j < r ? std::sqrt(dot(column_x(j), column_x(j), vectors_n())) : T(0);
      int64_t at = j;
      for (; at > 0 && values[order[at - 1]] < values[j]; --at) order[at] = order[at - 1];
      order[at] = static_cast<int32_t>(j);
    }
  }

  // Right vector i: column order[i] of X J = V Σ over its length.
  void finish_right(int64_t i) {
    const int64_t j = order[i];
    T* right = column_x(j);
    if (values[j] > 0) {
      for (int64_t k = 0; k < ldn; ++k) right[k] /= values[j];
    } else {
      complete(right, i, [this](int64_t q) { return column_x(order[q]); });
    }
  }

  // Column i of J, which is R Pᵀ v / σ. What rounding puts in there of the columns before, whose
  // values are larger, is projected out; the rest of its error is small.
  void finish_left(int64_t i) {
    T* y = column_left(i);
    add_columns(y, factor, ldn, column_x(order[i]), n, vectors_n());
    if (!project(y, i)) complete(y, i, [this](int64_t q) { return column_left(q); });
  }

  // Makes y a unit vector orthogonal to the left vectors before; false where nothing is left of it.
  bool project(T* y, int64_t i) {
    T before = std::sqrt(dot(y, y, vectors_n()));
    if (!(before > 0)) return false;
    for (int pass = 0; pass < 3; ++pass) {
      for (int64_t q = 0; q < i; ++q) squares[q] = -dot(column_left(q), y, vectors_n());
      add_columns(y, left, ldm, squares, i, vectors_n());
      const T after = std::sqrt(dot(y, y, vectors_n()));
      if (!(after > 0)) return false;
      for (int64_t k = 0; k < ldn; ++k) y[k] /= after;
      if (after > T(0.9) * before) return true;
      before = 1;
    }
    return false;
  }

  // U = Q J. The columns come innermost, for they do not depend on each other.
  void apply_reflections() {
    for (int64_t k = r - 1; k >= 0; --k) {
      const int64_t begin = k / kLanes<T> * kLanes<T>, vectors = vectors_m(begin);
      const T* h = column_a(pivots[k]) + begin;
      for (int64_t i = 0; i < p.rank; ++i) {
        T* u = column_left(i) + begin;
        subtract(u, h, dot(h, u, vectors), vectors);
      }
    }
  }

  // A unit vector orthogonal to the `count` unit vectors before: the axis that they cover least,
  // made orthogonal twice.
  template <class Before>
  void complete(T* vector, int64_t count, Before before) {
    int64_t least = 0;
    T covered = std::numeric_limits<T>::max();
    for (int64_t k = 0; k < n; ++k) {
      T sum = 0;
      for (int64_t q = 0; q < count; ++q) sum += before(q)[k] * before(q)[k];
      if (sum < covered) {
        covered = sum;
        least = k;
      }
    }
    for (int64_t k = 0; k < ldn; ++k) vector[k] = 0;
    vector[least] = 1;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t q = 0; q < count; ++q) {
        subtract(vector, before(q), dot(vector, before(q), vectors_n()), vectors_n());
      }
      const T length = std::sqrt(dot(vector, vector, vectors_n()));
      for (int64_t k = 0; k < ldn; ++k) vector[k] /= length;
    }
  }

  // The largest element (the first of equals) of every left vector becomes positive.
  void store() {
    for (int64_t i = 0; i < p.rank; ++i) {
      const bool negative = wide ? is_negative(column_x(order[i]), ldn)
                                 : is_negative(column_left(i), ldm);
      squares[i] = negative ? T(-1) : T(1);  // the squares have done their work
    }
    store([this](int64_t i) { return column_left(i); }, wide ? p.v : p.u, m);
    store([this](int64_t i) { return column_x(order[i]); }, wide ? p.u : p.v, n);
  }

  // Sixteen columns at a time, row by row: columns of the result written one by one would share
  // few sets of the first cache.
  template <class Column>
  void store(Column column, T* to, int64_t rows) const {
    constexpr int64_t kBlock = 16;
    for (int64_t begin = 0; begin < p.rank; begin += kBlock) {
      const int64_t count = p.rank - begin < kBlock ? p.rank - begin : kBlock;
      const T* from[kBlock];
      for (int64_t i = 0; i < count; ++i) from[i] = column(begin + i);
      for (int64_t k = 0; k < rows; ++k) {
        T* row = to + k * p.rank + begin;
        for (int64_t i = 0; i < count; ++i) row[i] = squares[begin + i] * from[i][k];
      }
    }
  }

  // Whether the largest element is, the first of equals.
  static bool is_negative(const T* x, int64_t length) {
    auto* vectors = reinterpret_cast<const Vector<T>*>(x);
    Vector<T> extremes{};
    for (int64_t i = 0; i < length / kLanes<T>; ++i) {
      const Vector<T> size = vectors[i] < 0 ? -vectors[i] : vectors[i];
      extremes = size > extremes ? size : extremes;
    }
    const T largest = largest_lane(extremes);
    for (int64_t i = 0; i < length; ++i) {
      if (std::fabs(x[i]) == largest) return x[i] < 0;
    }
    return false;
  }

  static T largest_lane(Vector<T> x) {
    T largest = x[0];
    for (int64_t i = 1; i < kLanes<T>; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
  }

  const SvdProblem<T>& p;
  bool wide;
  int64_t m, n, ldm, ldn;
  int64_t r = 0;  // columns that are not zero
  int exponent = 0;
  T *a, *x, *factor, *left, *squares, *inner, *sines, *taus, *values;
  int32_t *pivots, *order;
};

}  // namespace
}  // namespace adacomcat::ISA
