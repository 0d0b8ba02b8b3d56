// Vectors of float and double for the decompositions. A file in linalg/targets includes this, and the
// other -inl.h files, inside its own namespace, after it has defined kVectorBytes.

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <class T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};
}

template <class T>
using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T, Index<T>... lane>
inline T sum_lanes(Vector<T> x, std::integer_sequence<Index<T>, lane...>) {
#ifndef __clang__
  // A tree of shuffles stays in registers. Clang compiles the plain sum to one by itself.
  typedef Index<T> Lanes __attribute__((vector_size(kVectorBytes)));
  if constexpr (sizeof...(lane) > 8) x += __builtin_shuffle(x, Lanes{(lane ^ 8)...});
  if constexpr (sizeof...(lane) > 4) x += __builtin_shuffle(x, Lanes{(lane ^ 4)...});
  if constexpr (sizeof...(lane) > 2) x += __builtin_shuffle(x, Lanes{(lane ^ 2)...});
  x += __builtin_shuffle(x, Lanes{(lane ^ 1)...});
  return x[0];
#else
  return (x[lane] + ...);
#endif
}

template <class T>
inline T sum_lanes(Vector<T> x) {
  return sum_lanes<T>(x, std::make_integer_sequence<Index<T>, kLanes<T>>{});
}

// Below, columns are aligned and padded with zeros, and a length is a number of vectors. `fixed` is the
// length if it is known at compile time, else 0: short loops are then unrolled completely.

// x · y
template <class T, int64_t fixed = 0>
inline T dot(const T* x, const T* y, int64_t vectors) {
  auto* a = reinterpret_cast<const Vector<T>*>(x);
  auto* b = reinterpret_cast<const Vector<T>*>(y);
  Vector<T> sum{}, other{};
  const int64_t end = fixed ? fixed : vectors;
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 1 < end; i += 2) {
    sum += a[i] * b[i];
    other += a[i + 1] * b[i + 1];
  }
  if (i < end) sum += a[i] * b[i];
  return sum_lanes<T>(sum + other);
}

// to -= w x
template <class T>
inline void subtract(T* to, const T* x, T w, int64_t vectors) {
  auto* a = reinterpret_cast<Vector<T>*>(to);
  auto* b = reinterpret_cast<const Vector<T>*>(x);
  const Vector<T> vw = splat(w);
#pragma GCC unroll 4
  for (int64_t i = 0; i < vectors; ++i) a[i] -= vw * b[i];
}

// to += Σ weights[q] · column q. Columns lie `ld` apart; four vectors of the sum stay in registers.
template <class T>
inline void add_columns(T* to, const T* columns, int64_t ld, const T* weights, int64_t count,
                        int64_t vectors) {
  constexpr int64_t kBlock = 4;
  for (int64_t first = 0; first < vectors; first += kBlock) {
    const int64_t size = vectors - first < kBlock ? vectors - first : kBlock;
    auto* a = reinterpret_cast<Vector<T>*>(to) + first;
    if (size == kBlock) {
      Vector<T> s0 = a[0], s1 = a[1], s2 = a[2], s3 = a[3];
      for (int64_t q = 0; q < count; ++q) {
        auto* b = reinterpret_cast<const Vector<T>*>(columns + q * ld) + first;
        const Vector<T> w = splat(weights[q]);
        s0 += w * b[0];
        s1 += w * b[1];
        s2 += w * b[2];
        s3 += w * b[3];
      }
      a[0] = s0, a[1] = s1, a[2] = s2, a[3] = s3;
    } else {
      for (int64_t i = 0; i < size; ++i) {
        Vector<T> sum = a[i];
        for (int64_t q = 0; q < count; ++q) {
          auto* b = reinterpret_cast<const Vector<T>*>(columns + q * ld) + first;
          sum += splat(weights[q]) * b[i];
        }
        a[i] = sum;
      }
    }
  }
}
