// Gram matrices on packed panels, and eigenvalues of symmetric matrices: Householder's reduction to
// tridiagonal form, reflections applied in blocks, then the square-root-free QL iteration of Pal,
// Walker and Kahan (Parlett, The Symmetric Eigenvalue Problem, 8.15). All in double.

using Doubles = Vector<double>;
constexpr int64_t kWidth = kLanes<double>;
constexpr int64_t kPanelColumns = 2 * kWidth;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline Doubles* vectors(double* p) { return reinterpret_cast<Doubles*>(p); }
inline const Doubles* vectors(const double* p) { return reinterpret_cast<const Doubles*>(p); }

// sum (kWidth, P vectors) += leftᵀ right over `steps` rows of both, which lie `stride` apart.
template <int P>
inline void multiply(Doubles (&sum)[kWidth][P], int64_t steps, const double* left,
                     const double* right, int64_t stride) {
  for (int64_t k = 0; k < steps; ++k, left += stride, right += stride) {
    Doubles b[P];
    for (int p = 0; p < P; ++p) b[p] = vectors(right)[p];
#pragma GCC unroll 8
    for (int r = 0; r < kWidth; ++r) {
      const Doubles a = splat(left[r]);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[r][p] += a * b[p];
    }
  }
}

template <class T>
void pack(int64_t rows, int64_t columns, const T* a, int64_t row, int64_t column, int64_t index,
          double* packed) {
  const int64_t first = index * kPanelColumns, filled = least(kPanelColumns, columns - first);
  packed += index * rows * kPanelColumns;
  if (filled < kPanelColumns) std::memset(packed, 0, sizeof(double) * rows * kPanelColumns);
  a += first * column;
  if (column == 1) {
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t c = 0; c < filled; ++c) packed[k * kPanelColumns + c] = a[k * row + c];
    }
  } else {
    for (int64_t c = 0; c < filled; ++c) {
      for (int64_t k = 0; k < rows; ++k) packed[k * kPanelColumns + c] = a[k * row + c * column];
    }
  }
}

void add_products(int64_t rows, int64_t columns, const double* packed, int64_t index,
                  double* gram) {
  const int64_t first = index * kPanelColumns, count = least(kPanelColumns, columns - first);
  const double* right = packed + rows * first;
  for (int64_t row = 0; row < first + count; row += kWidth) {
    const double* left = packed + row / kPanelColumns * kPanelColumns * rows + row % kPanelColumns;
    Doubles sum[kWidth][2] = {};
    multiply(sum, rows, left, right, kPanelColumns);
    for (int64_t r = 0; r < least(kWidth, columns - row); ++r) {
      double* to = gram + (row + r) * columns + first;
      const auto* from = reinterpret_cast<const double*>(sum[r]);
      for (int64_t c = 0; c < count; ++c) to[c] += from[c];
    }
  }
}

// Reduces a symmetric matrix to tridiagonal form. It holds the rows from the diagonal on, in blocks of
// kWidth rows and columns, those on the diagonal whole. Reflection i makes row i tridiagonal at once; the
// rest of the matrix is updated for kReflections reflections together: A - Σ v wᵀ + w vᵀ.
class Tridiagonal {
 public:
  Tridiagonal(int64_t n, const double* matrix, double* workspace) : n(n), ld(spread(n)) {
    std::memset(workspace, 0, sizeof(double) * eigenvalue_workspace(n));
    a = workspace;
    v = a + (n + 7) / 8 * 8 * ld;
    w = v + kReflections * ld;
    squares = w + kReflections * ld;
    weights = squares + ld;
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) {
        const double size = std::fabs(matrix[i * n + j]);
        largest = size > largest ? size : largest;
      }
    }
    // Scaled by a power of two to a largest element in [1, 2): squares neither overflow nor vanish.
    if (largest > 0) exponent = std::ilogb(largest);
    const double half = std::ldexp(1.0, -exponent / 2);
    const double rest = std::ldexp(1.0, -exponent - (-exponent / 2));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i / kWidth * kWidth; j < n; ++j) {
        row(i)[j] = matrix[i * n + j] * half * rest;
      }
    }
  }

  // Reduces to the diagonal d (n) and the squares (n - 1) of the elements beside it.
  void reduce(double* d) {
    for (int64_t begin = 0; begin < n; begin += kReflections) {
      const int64_t end = least(begin + kReflections, n);
      for (int64_t i = begin; i < end; ++i) {
        reflect(i, i - begin);
        d[i] = row(i)[i];
      }
      if (end < n) update(end, end - begin);
      std::memset(v, 0, sizeof(double) * 2 * kReflections * ld);
    }
  }

  // Replaces the diagonal d by the eigenvalues. False if the iteration does not converge.
  bool iterate(double* d) const {
    int64_t begin = 0;
    for (int64_t end = 0; end < n; ++end) {
      const bool last = end == n - 1;
      constexpr double eps = std::numeric_limits<double>::epsilon() / 2;
      if (!last && squares[end] > eps * eps * std::fabs(d[end]) * std::fabs(d[end + 1])) continue;
      if (!last) squares[end] = 0;
      if (!iterate_block(d, begin, end)) return false;
      begin = end + 1;
    }
    for (int64_t i = 0; i < n; ++i) d[i] = std::ldexp(d[i], exponent);
    return true;
  }

 private:
  double* row(int64_t i) const { return a + i * ld; }

  // Applies to row i the reflections before it in this block. Then finds its own reflection I - v vᵀ,
  // |v|² = 2, and w = u - ½ (u·v) v with u = A v: the reflection turns A into A - v wᵀ - w vᵀ.
  void reflect(int64_t i, int64_t k) {
    double* x = row(i);
    const int64_t from = i / kWidth * kWidth, length = (ld - from) / kWidth;
    combine(k, i, x + from, from);
    if (i + 1 >= n) return;
    const double head = x[i + 1];
    double tail = 0;
    for (int64_t j = i + 2; j < n; ++j) tail += x[j] * x[j];
    squares[i] = head * head + tail;
    if (tail == 0) return;
    const double norm = std::sqrt(squares[i]);
    const double scale = 1 / std::sqrt(norm * (norm + std::fabs(head)));
    double *vk = v + k * ld, *wk = w + k * ld;
    for (int64_t j = i + 2; j < n; ++j) vk[j] = x[j] * scale;
    vk[i + 1] = (head + (head < 0 ? -norm : norm)) * scale;
    multiply_vector(i + 1, vk, wk);
    correct(k, vk + from, wk + from, from, length);
    for (int64_t j = from; j <= i; ++j) wk[j] = 0;
    const double half = dot(vk + from, wk + from, length) / 2;
    subtract(wk + from, vk + from, half, length);
  }

  // to -= Σ_{q < k} v_q[i] w_q + w_q[i] v_q
  void combine(int64_t k, int64_t i, double* to, int64_t from) {
    for (int64_t q = 0; q < k; ++q) {
      weights[q] = -v[q * ld + i];
      weights[kReflections + q] = -w[q * ld + i];
    }
    const int64_t length = (ld - from) / kWidth;
    add_columns(to, w + from, ld, weights, k, length);
    add_columns(to, v + from, ld, weights + kReflections, k, length);
  }

  // to -= Σ_{q < k} v_q (w_q·x) + w_q (v_q·x)
  void correct(int64_t k, const double* x, double* to, int64_t from, int64_t length) {
    for (int64_t q = 0; q < k; ++q) {
      weights[q] = -dot(w + q * ld + from, x, length);
      weights[kReflections + q] = -dot(v + q * ld + from, x, length);
    }
    add_columns(to, v + from, ld, weights, k, length);
    add_columns(to, w + from, ld, weights + kReflections, k, length);
  }

  // y += A x for an x that is zero before `begin`. Each element above the diagonal is read once and used
  // twice.
  void multiply_vector(int64_t begin, const double* x, double* y) const {
    const int64_t rows = (n + kWidth - 1) / kWidth * kWidth;
    for (int64_t first = begin / kWidth * kWidth; first < rows; first += kWidth) {
      const double* block = row(first) + first;
      const int64_t length = (ld - first) / kWidth;
      const Doubles* xs = vectors(x + first);
      Doubles* ys = vectors(y + first);
      Doubles scale[kWidth], sums[kWidth] = {}, at = ys[0];
#pragma GCC unroll 8
      for (int r = 0; r < kWidth; ++r) {
        scale[r] = splat(x[first + r]);
        at += vectors(block + r * ld)[0] * scale[r];
      }
      for (int64_t j = 1; j < length; ++j) {
        Doubles even = ys[j], odd = {};
#pragma GCC unroll 8
        for (int r = 0; r < kWidth; r += 2) {
          const Doubles one = vectors(block + r * ld)[j], two = vectors(block + (r + 1) * ld)[j];
          even += one * scale[r];
          odd += two * scale[r + 1];
          sums[r] += one * xs[j];
          sums[r + 1] += two * xs[j];
        }
        ys[j] = even + odd;
      }
      ys[0] = at;
      for (int r = 0; r < kWidth; ++r) y[first + r] += sum_lanes<double>(sums[r]);
    }
  }

  // A -= Σ_{q < count} v_q w_qᵀ + w_q v_qᵀ for the rows from `begin` on.
  void update(int64_t begin, int64_t count) {
    for (int64_t first = begin / kWidth * kWidth; first < n; first += kWidth) {
      int64_t column = first;
      for (; column + kPanelColumns <= ld; column += kPanelColumns)
        update_tile<2>(first, column, count);
      for (; column < ld; column += kWidth) update_tile<1>(first, column, count);
    }
  }

  template <int P>
  void update_tile(int64_t first, int64_t column, int64_t count) {
    Doubles sum[kWidth][P] = {};
    multiply(sum, count, v + first, w + column, ld);
    multiply(sum, count, w + first, v + column, ld);
    for (int r = 0; r < kWidth; ++r) {
      for (int p = 0; p < P; ++p) vectors(row(first + r) + column)[p] -= sum[r][p];
    }
  }

  // Eigenvalues of d[begin … end], a part without zeros beside the diagonal. It is turned around so that
  // the small end comes first.
  bool iterate_block(double* d, int64_t begin, int64_t end) const {
    if (std::fabs(d[end]) < std::fabs(d[begin])) {
      for (int64_t i = begin, j = end; i < j; ++i, --j) std::swap(d[i], d[j]);
      for (int64_t i = begin, j = end - 1; i < j; ++i, --j) std::swap(squares[i], squares[j]);
    }
    constexpr double eps = std::numeric_limits<double>::epsilon() / 2;
    int64_t left = 30 * (end - begin + 1);
    for (int64_t first = begin; first < end;) {
      int64_t last = first;
      while (last < end &&
             squares[last] > eps * eps * std::fabs(d[last]) * std::fabs(d[last + 1])) {
        ++last;
      }
      if (last < end) squares[last] = 0;
      if (last == first) {
        ++first;
        continue;
      }
      if (left-- == 0) return false;
      sweep(d, first, last);
    }
    return true;
  }

  // One QL step on d[first … last] with Wilkinson's shift.
  void sweep(double* d, int64_t first, int64_t last) const {
    const double beside = std::sqrt(squares[first]);
    const double ratio = (d[first + 1] - d[first]) / (2 * beside);
    const double root = std::sqrt(1 + ratio * ratio);
    const double shift = d[first] - beside / (ratio + (ratio < 0 ? -root : root));
    double cosine = 1, sine = 0, gamma = d[last] - shift, p = gamma * gamma;
    for (int64_t i = last - 1; i >= first; --i) {
      const double square = squares[i], sum = p + square;
      if (i != last - 1) squares[i + 1] = sine * sum;
      const double before = cosine, gamma_before = gamma;
      // These three divisions are independent and overlap. In sequence they would take most of the time.
      const double inverse = sum / p;
      cosine = p / sum;
      sine = square / sum;
      gamma = cosine * (d[i] - shift) - sine * gamma_before;
      d[i + 1] = gamma_before + (d[i] - gamma);
      p = cosine != 0 ? gamma * gamma * inverse : before * square;
    }
    squares[first] = sine * p;
    d[first] = shift + gamma;
  }

  int64_t n, ld;
  int exponent = 0;
  double *a, *v, *w, *squares, *weights;
};

bool eigenvalues(int64_t n, const double* a, double* values, double* workspace) {
  Tridiagonal form(n, a, workspace);
  form.reduce(values);
  return form.iterate(values);
}

const Spectrum kSpectrum{kPanelColumns, pack<float>, pack<double>, add_products, eigenvalues};
