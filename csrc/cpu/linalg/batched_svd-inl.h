// One-sided Jacobi SVD with a pivoted QR before it (Drmač and Veselić, SIAM J. Matrix Anal. 29,
// 2008): A P = Q R, then rotations J make the columns of X = P Rᵀ orthogonal, so X J = V Σ and
// A = (Q J) Σ Vᵀ. J is not accumulated: it is R Pᵀ V Σ⁻¹, made orthonormal from the largest singular
// value down. The small singular values of a matrix graded by columns mask their relative accuracy.

template <class T>
class Svd {
 public:
  explicit Svd(const SvdProblem<T>& problem)
      : p(problem), wide(p.columns > p.rows), m(wide ? p.columns : p.rows),
        n(wide ? p.rows : p.columns), ldm(padded<T>(m)), ldn(padded<T>(n)),
        x(n, p.workspace, p.workers) {
    T* next = p.workspace + svd_blocks<T>(n) * svd_block_stride<T>(n);
    const auto take = [&next](int64_t size) { return std::exchange(next, next + size); };
    a = take(n * ldm);
    factor = take(n * ldn);
    left = take(n * ldm);
    squares = take(ldn);
    values = take(ldn);
    pivots = reinterpret_cast<int32_t*>(take(ldn));
    order = reinterpret_cast<int32_t*>(take(ldn));
    std::memset(p.workspace, 0, sizeof(T) * svd_workspace<T>(m, n));
  }

  SvdStatus run() {
    if (!load()) return SvdStatus::not_finite;
    factorize();
    if (!x.orthogonalize(r)) return SvdStatus::not_converged;
    sort();
    if (std::is_same_v<T, float> && lost) return SvdStatus::out_of_range;
    for (int64_t i = 0; i < p.rank; ++i) p.s[i] = std::ldexp(values[order[i]], exponent);
    if (!p.u) return SvdStatus::ok;
    for (int64_t i = 0; i < p.rank; ++i) compute_right(i);
    for (int64_t i = 0; i < p.rank; i += kVectorBlock) {
      compute_left(i, std::min(i + kVectorBlock, p.rank));
    }
    each((p.rank + kVectorBlock - 1) / kVectorBlock, [this](int64_t k) {
      apply_reflections(k * kVectorBlock, std::min((k + 1) * kVectorBlock, p.rank));
    });
    store();
    return SvdStatus::ok;
  }

 private:
  static constexpr int64_t kVectorBlock = 32;  // left vectors that are worked on together

  // On one thread if the matrix fits into the first cache: that takes less time than waking a thread.
  template <class Body>
  void each(int64_t count, Body body) const {
    if (svd_blocks<T>(n) > 1) return p.workers.each(count, body);
    for (int64_t i = 0; i < count; ++i) body(i);
  }

  T* column_a(int64_t j) const { return a + j * ldm; }
  T* column_x(int64_t j) const { return x.column(j); }
  T* column_r(int64_t j) const { return factor + j * ldn; }
  T* column_left(int64_t j) const { return left + j * ldm; }
  int64_t vectors_m(int64_t begin = 0) const { return (ldm - begin) / kLanes<T>; }
  int64_t vectors_n() const { return ldn / kLanes<T>; }

  // Reads the matrix, transposed if it is wide, and scales it by a power of two so that its largest
  // element lies in [1, 2). False if an element is not finite.
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
    // In two factors, since 2^-exponent overflows if the matrix is denormal.
    const T half = std::ldexp(T(1), -exponent / 2);
    const T rest = std::ldexp(T(1), -exponent - (-exponent / 2));
    for (int64_t i = 0; i < n * ldm; ++i) a[i] = a[i] * half * rest;
    return true;
  }

  // QR with column pivoting, by Householder reflections I - h hᵀ, |h|² = 2: the longest remaining column
  // comes first. R is stored by columns in `factor`, and as X = P Rᵀ in x. Columns whose squares have no
  // digits left count as zero.
  void factorize() {
    for (int64_t j = 0; j < n; ++j) squares[j] = dot(column_a(j), column_a(j), vectors_m());
    for (int64_t j = 0; j < n; ++j) order[j] = static_cast<int32_t>(j);
    for (r = 0; r < n; ++r) {
      int64_t best = r;
      for (int64_t c = r + 1; c < n; ++c) {
        if (squares[order[c]] > squares[order[best]]) best = c;
      }
      const int32_t pivot = order[best];
      if (squares[pivot] < kLeastSquare<T>) {
        for (int64_t c = r; c < n; ++c) lost |= !is_zero(column_a(order[c]), vectors_m());
        return;
      }
      order[best] = order[r];
      order[r] = pivot;
      pivots[r] = pivot;
      // Rows above r are zero already in every remaining column.
      const int64_t begin = r / kLanes<T> * kLanes<T>;
      T *h = column_a(pivot), *row = column_x(r);
      const T length = std::sqrt(squares[pivot]);
      const T head = h[r] < 0 ? -length : length;
      row[pivot] = column_r(pivot)[r] = -head;
      // h = (a + head e) / sqrt(length (length + |a_r|))
      const T scale = T(1) / std::sqrt(length * (length + std::fabs(h[r])));
      h[r] += head;
      for (int64_t i = begin; i < ldm; ++i) h[i] *= scale;
      Vector<T> mask = splat(T(1));
      mask[r - begin] = 0;
      for (int64_t c = r + 1; c < n; ++c) reflect(h, begin, row, order[c], mask);
    }
  }

  void reflect(const T* h, int64_t begin, T* row, int32_t c, Vector<T> mask) {
    T* to = column_a(c);
    const Vector<T> w = splat(dot(h + begin, to + begin, vectors_m(begin)));
    auto* vh = reinterpret_cast<const Vector<T>*>(h + begin);
    auto* vt = reinterpret_cast<Vector<T>*>(to + begin);
    Vector<T> first = vt[0] - w * vh[0];
    vt[0] = first;
    row[c] = column_r(c)[r] = to[r];
    // Element r becomes zero in the register. Writing one element to memory would stall the next load.
    first *= mask;
    vt[0] = first;
    Vector<T> sum = first * first;
    for (int64_t i = 1; i < vectors_m(begin); ++i) {
      vt[i] -= w * vh[i];
      sum += vt[i] * vt[i];
    }
    squares[c] = sum_lanes<T>(sum);
  }

  static bool is_zero(const T* x, int64_t vectors) {
    for (int64_t i = 0; i < vectors * kLanes<T>; ++i) {
      if (x[i] != 0) return false;
    }
    return true;
  }

  // Singular values, the lengths of the columns of X J, and their order.
  void sort() {
    for (int64_t j = 0; j < n; ++j) {
      const T square = j < r ? dot(column_x(j), column_x(j), vectors_n()) : T(0);
      const bool fine = square >= kLeastSquare<T>;
      values[j] = fine ? std::sqrt(square) : T(0);
      lost |= !fine && j < r;
      int64_t at = j;
      for (; at > 0 && values[order[at - 1]] < values[j]; --at) order[at] = order[at - 1];
      order[at] = static_cast<int32_t>(j);
    }
  }

  // Right vector i: column order[i] of X J = V Σ over its length.
  void compute_right(int64_t i) {
    const int64_t j = order[i];
    T* right = column_x(j);
    if (values[j] > 0) {
      for (int64_t k = 0; k < ldn; ++k) right[k] /= values[j];
    } else {
      complete(right, i, [this](int64_t q) { return column_x(order[q]); });
    }
  }

  // Columns of J, which are R Pᵀ v / σ. Rounding leaves in them parts of the columns before, whose
  // singular values are larger: these are projected out. The rest of the error is small.
  void compute_left(int64_t begin, int64_t end) {
    each(end - begin, [=, this](int64_t k) {
      T* y = column_left(begin + k);
      add_columns(y, factor, ldn, column_x(order[begin + k]), n, vectors_n());
      values[begin + k] = length(y);  // the singular values have been stored in p.s
      project(y, 0, begin);
    });
    for (int64_t i = begin; i < end; ++i) {
      T* y = column_left(i);
      project(y, begin, i);
      if (!normalize(y, values[i], i)) {
        complete(y, i, [this](int64_t q) { return column_left(q); });
      }
    }
  }

  T length(const T* y) const { return std::sqrt(dot(y, y, vectors_n())); }

  // Subtracts from y its projections onto the left vectors begin … end - 1.
  void project(T* y, int64_t begin, int64_t end) const {
    T weights[kVectorBlock];
    for (int64_t first = begin; first < end; first += kVectorBlock) {
      const int64_t count = std::min(kVectorBlock, end - first);
      for (int64_t q = 0; q < count; ++q) weights[q] = -dot(column_left(first + q), y, vectors_n());
      add_columns(y, column_left(first), ldm, weights, count, vectors_n());
    }
  }

  // Makes y a unit vector orthogonal to the left vectors before i. `before` is its length before it was
  // projected; if little is left of that, y is projected again. False if nothing is left whose length could
  // be told.
  bool normalize(T* y, T before, int64_t i) const {
    for (int pass = 0; pass < 3; ++pass) {
      if (pass > 0) project(y, 0, i);
      const T after = length(y);
      if (!(after * after >= kLeastSquare<T>)) return false;
      for (int64_t k = 0; k < ldn; ++k) y[k] /= after;
      if (after > T(0.9) * before) return true;
      before = 1;
    }
    return false;
  }

  // Columns begin … end - 1 of U = Q J. The loop over them is innermost, since they are independent.
  void apply_reflections(int64_t begin, int64_t end) {
    for (int64_t k = r - 1; k >= 0; --k) {
      const int64_t top = k / kLanes<T> * kLanes<T>, vectors = vectors_m(top);
      const T* h = column_a(pivots[k]) + top;
      for (int64_t i = begin; i < end; ++i) {
        T* u = column_left(i) + top;
        subtract(u, h, dot(h, u, vectors), vectors);
      }
    }
  }

  // Sets `vector` to a unit vector orthogonal to `count` given unit vectors: the coordinate axis that they
  // cover least, orthogonalised twice.
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

  // Stores u and v, signed so that the largest element (the first of equals) of each u is positive.
  void store() {
    for (int64_t i = 0; i < p.rank; ++i) {
      const bool negative =
          wide ? is_negative(column_x(order[i]), ldn) : is_negative(column_left(i), ldm);
      squares[i] = negative ? T(-1) : T(1);  // the memory of the squares is free
    }
    store([this](int64_t i) { return column_left(i); }, wide ? p.v : p.u, m);
    store([this](int64_t i) { return column_x(order[i]); }, wide ? p.u : p.v, n);
  }

  // Writes sixteen columns at a time, row by row: a column of the result maps to few sets of the first
  // cache.
  template <class Column>
  void store(Column column, T* to, int64_t rows) const {
    constexpr int64_t kBlock = 16;
    each((p.rank + kBlock - 1) / kBlock, [=, this](int64_t b) {
      const int64_t begin = b * kBlock, count = std::min(kBlock, p.rank - begin);
      const T* from[kBlock];
      for (int64_t i = 0; i < count; ++i) from[i] = column(begin + i);
      for (int64_t k = 0; k < rows; ++k) {
        T* row = to + k * p.rank + begin;
        for (int64_t i = 0; i < count; ++i) row[i] = squares[begin + i] * from[i][k];
      }
    });
  }

  // Whether the largest element (the first of equals) is negative.
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
  Jacobi<T> x;
  int64_t r = 0;      // columns that are not zero
  bool lost = false;  // whether one counts as zero and is not
  int exponent = 0;
  T *a, *factor, *left, *squares, *values;
  int32_t *pivots, *order;
};

template <class T>
SvdStatus batched_svd(const SvdProblem<T>& problem) {
  return Svd<T>(problem).run();
}
