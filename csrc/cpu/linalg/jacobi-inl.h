// One-sided Jacobi: rotates pairs of columns until all columns are orthogonal to each other.

// The rotation (c x - s y, s x + c y), c = 1 - s τ, into (first, second), which are x and y in one order
// or the other. Written as corrections to x and y, so that small angles round little.
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

// The disjoint pairs i < j of 0 … size - 1 with i + j = sum modulo size.
struct Pairs {
  int64_t size, sum;
  int64_t low() const { return (sum + 1) / 2; }
  int64_t count() const { return low() + (size - sum - 1) / 2; }
  std::pair<int64_t, int64_t> operator[](int64_t k) const {
    if (k < low()) return {k, sum - k};
    return {sum + 1 + (k - low()), size - 1 - (k - low())};
  }
};

// Columns of n elements, stored in blocks of svd_block(). Each block also holds the numbers that its
// rotations need: threads work on different blocks and must not share cache lines.
template <class T>
class Jacobi {
 public:
  Jacobi(int64_t n, T* memory, Workers& workers)
      : memory(memory), workers(workers), ld(padded<T>(n)), block(svd_block<T>(n)),
        stride(svd_block_stride<T>(n)) {}

  T* column(int64_t j) const {
    return j < block ? memory + j * ld : columns(j / block) + j % block * ld;
  }

  // Rotates the first r columns, all pairs in every sweep, until every cosine is below the tolerance.
  // False if that takes too many sweeps. Disjoint pairs of blocks go to several threads.
  bool orthogonalize(int64_t r) {
    rank = r;
    switch (ld / kLanes<T>) {
      case 1:
        return orthogonalize<1>();
      case 2:
        return orthogonalize<2>();
      case 4:
        return orthogonalize<4>();
      case 8:
        return orthogonalize<8>();
      case 16:
        return orthogonalize<16>();
      default:
        return orthogonalize<0>();
    }
  }

 private:
  static constexpr int kMaxSweeps = 40;
  // Cosines below this are rounding errors.
  static constexpr T kTolerance = 2 * std::numeric_limits<T>::epsilon();

  T* columns(int64_t b) const { return memory + b * stride; }
  T* squares(int64_t b) const { return columns(b) + block * ld; }  // of the columns' lengths
  int64_t width(int64_t b) const { return b * block + block < rank ? block : rank - b * block; }

  template <int64_t fixed>
  bool orthogonalize() {
    const int64_t blocks = (rank + block - 1) / block;
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t j = 0; j < width(b); ++j) {
          const T* x = columns(b) + j * ld;
          squares(b)[j] = dot<T, fixed>(x, x, ld / kLanes<T>);
        }
      }
      std::atomic<bool> rotated{false};
      const auto note = [&](bool some) {
        if (some) rotated.store(true, std::memory_order_relaxed);
      };
      for (int64_t sum = 0; sum < blocks; ++sum) {
        const Pairs pairs{blocks, sum};
        // Blocks b with 2 b = sum have no partner: two of them, which make one piece of work, one or none.
        const bool left_over = sum % 2 == 0 || blocks % 2 == 1;
        workers.each(pairs.count() + left_over, [&](int64_t k) {
          if (k < pairs.count()) return note(rotate_two<fixed>(pairs[k].first, pairs[k].second));
          if (sum % 2 == 0) note(rotate_one<fixed>(sum / 2));
          if ((sum + blocks) % 2 == 0) note(rotate_one<fixed>((sum + blocks) / 2));
        });
      }
      if (!rotated) return true;
    }
    return false;
  }

  // All pairs of columns of a block.
  template <int64_t fixed>
  bool rotate_one(int64_t b) {
    bool rotated = false;
    prefetch(b);
    for (int64_t sum = 0; sum < width(b); ++sum) {
      const Pairs pairs{width(b), sum};
      rotated |= rotate_round<fixed>(b, b, pairs.count(), [=](int64_t k) { return pairs[k]; });
    }
    return rotated;
  }

  // All pairs of a column of one block and a column of another behind it, which may be shorter.
  template <int64_t fixed>
  bool rotate_two(int64_t b, int64_t other) {
    bool rotated = false;
    prefetch(b);
    prefetch(other);
    for (int64_t shift = 0; shift < block; ++shift) {
      rotated |= rotate_round<fixed>(b, other, width(other), [=, this](int64_t k) {
        return std::pair(k + shift - (k + shift < block ? 0 : block), k);
      });
    }
    return rotated;
  }

  // Another core may have these columns in its cache: this fetches them ahead.
  void prefetch(int64_t b) const {
    if (rank <= block) return;
    const char* from = reinterpret_cast<const char*>(columns(b));
    const int64_t size = width(b) * ld * sizeof(T);
    for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(from + at, 1);
  }

  // Rotates `count` disjoint pairs: column i of block b and column j of another.
  template <int64_t fixed, class Pair>
  bool rotate_round(int64_t b, int64_t other, int64_t count, Pair pair) {
    const int64_t vectors = ld / kLanes<T>;
    T *first = columns(b), *second = columns(other);
    T *squares_first = squares(b), *squares_second = squares(other);
    T* inner = squares_first + padded<T>(block);
    T *sines = inner + padded<T>(block), *taus = sines + padded<T>(block);
    for (int64_t k = 0; k < count; ++k) {
      const auto [i, j] = pair(k);
      inner[k] = dot<T, fixed>(first + i * ld, second + j * ld, vectors);
      sines[k] = squares_first[i];
      taus[k] = squares_second[j];
    }
    for (int64_t k = 0; k < count; k += kLanes<T>) angles(inner + k, sines + k, taus + k);
    bool rotated = false;
    for (int64_t k = 0; k < count; ++k) {
      const T sine = sines[k], tau = taus[k], change = inner[k];
      if (sine == 0) continue;
      rotated = true;
      const auto [i, j] = pair(k);
      T *one = first + i * ld, *two = second + j * ld;
      const T square_one = squares_first[i] - change, square_two = squares_second[j] + change;
      // The longer column goes first: it takes fewer sweeps.
      const bool swap = square_one < square_two;
      rotate<T, fixed>(one, two, swap ? two : one, swap ? one : two, vectors, sine, tau);
      squares_first[i] = swap ? square_two : square_one;
      squares_second[j] = swap ? square_one : square_two;
    }
    return rotated;
  }

  // The angles θ that make one vector of pairs orthogonal: from x·y, |x|² and |y|², in place, to
  // tan θ · x·y, sin θ and tan θ/2. tan θ is the smaller root, so |θ| ≤ π/4. All are zero if the cosine is
  // below the tolerance, or if a square has too few digits to tell.
  static void angles(T* inner, T* sines, T* taus) {
    constexpr T limit = std::numeric_limits<T>::max_exponent > 200 ? T(1e150) : T(1e18);
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      const T g = inner[i], one = sines[i], two = taus[i];
      const bool small = (std::fabs(g) <= kTolerance * std::sqrt(one) * std::sqrt(two)) |
                         (one < kLeastSquare<T>) | (two < kLeastSquare<T>);
      const T zeta = (two - one) / (g + g), size = std::fabs(zeta);
      const T bounded = size < limit ? size : limit;  // its square is a number
      const T hypotenuse = std::sqrt(1 + bounded * bounded);
      const T root = size + (size > hypotenuse ? size : hypotenuse);
      const T tangent = zeta < 0 ? -1 / root : 1 / root;
      const T cosine = 1 / std::sqrt(1 + tangent * tangent);
      const T sine = tangent * cosine;
      inner[i] = small ? T(0) : tangent * g;
      sines[i] = small ? T(0) : sine;
      taus[i] = small ? T(0) : sine / (1 + cosine);
    }
  }

  T* memory;
  Workers& workers;
  int64_t ld, block, stride;
  int64_t rank = 0;
};
