// One-sided Jacobi SVD: rotations V make the columns of X = A V orthogonal, so X = U Σ. A wide
// matrix is transposed first. X stays in shared memory, and V where there is room for both.
//
// All pairs of columns of one round are disjoint. A matrix of up to 32 columns belongs to one warp, with
// two lanes for each pair; a larger one belongs to a block, with one warp for each pair.
#include "kernels.h"
#include "primitives.cuh"

namespace adacomcat::cuda {
namespace {

constexpr int kWarp = 32, kMostWarps = 16, kWarpsOfSmall = 4, kMaxSweeps = 40;

__host__ __device__ constexpr int long_side(int rows, int columns) {
  return rows > columns ? rows : columns;
}
__host__ __device__ constexpr int short_side(int rows, int columns) {
  return rows > columns ? columns : rows;
}
// The distance of columns. An odd one puts equal rows of neighbouring columns into different banks.
__host__ __device__ constexpr int pitch(int length) { return length | 1; }

// Bytes of X, of V if it is in shared memory, of the value and sign of each column, of one slot for each
// warp, and of the order.
__host__ __device__ constexpr int64_t bytes_of(int rows, int columns, int element_size,
                                               bool rotations) {
  const int m = long_side(rows, columns), n = short_side(rows, columns);
  const int64_t elements = n * pitch(m) + (rotations ? n * pitch(n) : 0) + 2 * n + kMostWarps;
  return (elements * element_size + n * sizeof(int) + 15) / 16 * 16;
}

template <class T, bool small, bool scratch>
class Svd {
 public:
  static constexpr int kLanes = small ? 2 : kWarp;

  __device__ Svd(const SvdBatch<T>& problem, int64_t index, char* memory)
      : p(problem), index(index), wide(p.columns > p.rows), m(long_side(p.rows, p.columns)),
        n(short_side(p.rows, p.columns)), thread(small ? threadIdx.x % kWarp : threadIdx.x),
        size(small ? kWarp : blockDim.x), lane(threadIdx.x % kLanes) {
    T* next = reinterpret_cast<T*>(memory);
    x = next, next += n * pitch(m);
    values = next, next += n;
    signs = next, next += n;
    slots = next, next += kMostWarps;
    if constexpr (scratch) {
      v = p.rotations + index * n * pitch(n);
    } else {
      v = next, next += n * pitch(n);
    }
    order = reinterpret_cast<int*>(next);
  }

  __device__ void run() {
    const T largest = load();
    const bool finite = largest <= kLargest;
    if (thread == 0) p.status[index] = finite ? kSvdDone : kSvdNotFinite;
    if (!finite) return;
    const int exponent = largest > 0 ? ilogb(largest) : 0;
    scale(exponent);
    if (!orthogonalize() && thread == 0) p.status[index] = kSvdNotConverged;
    sort();
    for (int i = 0; i < p.rank; ++i) complete(i);
    if (wide) {
      choose_signs(v, pitch(n));
    } else {
      choose_signs(x, pitch(m));
    }
    store(exponent);
  }

 private:
  static constexpr T kEpsilon = std::numeric_limits<T>::epsilon();
  static constexpr T kLargest = std::numeric_limits<T>::max();
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  // A column with a smaller square counts as zero: its products would lose digits to underflow.
  static constexpr T kNegligible = std::numeric_limits<T>::min() / kEpsilon;
  // Beyond this, zeta² overflows, and 1 + zeta² equals it.
  static constexpr T kLimit = sizeof(T) == 4 ? T(1e18) : T(1e150);

  __device__ void sync() const {
    if constexpr (small) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The maximum over all threads of the matrix. It is also a barrier: what they wrote before is visible
  // after it. The barriers of a round lie between two uses of the slots.
  __device__ T maximum(T value) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      value = fmax(value, __shfl_xor_sync(kWholeWarp, value, step));
    }
    if constexpr (!small) {
      if (thread % kWarp == 0) slots[thread / kWarp] = value;
    }
    sync();
    if constexpr (!small) {
      for (int i = 0; i < size / kWarp; ++i) value = fmax(value, slots[i]);
    }
    return value;
  }

  // Sets X = A or its transpose, V = I. Returns the largest absolute value, or infinity if an element
  // is not finite.
  __device__ T load() const {
    const T* a = p.a + index * p.batch_stride;
    T largest = 0;
    for (int i = thread; i < m * n; i += size) {
      const int row = i / p.columns, column = i % p.columns;
      const T value = a[row * p.row_stride + column * p.column_stride];
      x[wide ? row * pitch(m) + column : column * pitch(m) + row] = value;
      largest = fabs(value) <= kLargest ? fmax(largest, fabs(value)) : kInfinity;
    }
    for (int i = thread; i < n * n; i += size) {
      v[i / n * pitch(n) + i % n] = i / n == i % n ? T(1) : T(0);
    }
    return maximum(largest);
  }

  // Scales by a power of two, so that the largest element lies in [1, 2). In two factors, since 2^-exponent
  // overflows if the matrix is denormal.
  __device__ void scale(int exponent) const {
    const int half = exponent / 2;
    const T first = ldexp(T(1), -half), second = ldexp(T(1), half - exponent);
    for (int i = thread; i < m * n; i += size) {
      T& value = x[i / m * pitch(m) + i % m];
      value = value * first * second;
    }
    sync();
  }

  // Sweeps over all pairs, until every cosine is a rounding error.
  __device__ bool orthogonalize() const {
    const T tolerance = kEpsilon * sqrt(T(m));
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      bool rotated = false;
      for (int round = 0; round + 1 < n + n % 2; ++round) {
        rotated |= rotate_round(round, tolerance);
        sync();
      }
      if (maximum(rotated ? T(1) : T(0)) == 0) return true;
    }
    return false;
  }

  // A round of a tournament: the last player stays, the others go round a circle. All threads take
  // part in each exchange between lanes, with or without a pair.
  __device__ bool rotate_round(int round, T tolerance) const {
    const int players = n + n % 2, circle = players - 1, groups = size / kLanes;
    bool rotated = false;
    for (int first = 0; first < players / 2; first += groups) {
      const int place = first + thread / kLanes;
      const int left = place == 0 ? circle : (round + place) % circle;
      const int right = (round + circle - place) % circle;
      const int low = min(left, right), high = max(left, right);
      rotated |= rotate_pair(low, high, place < players / 2 && high < n, tolerance);
    }
    return rotated;
  }

  __device__ bool rotate_pair(int low, int high, bool active, T tolerance) const {
    T *one = x + low * pitch(m), *two = x + high * pitch(m);
    T square_one = 0, square_two = 0, inner = 0;
    for (int i = lane; active && i < m; i += kLanes) {
      square_one += one[i] * one[i];
      square_two += two[i] * two[i];
      inner += one[i] * two[i];
    }
    square_one = sum_lanes<kLanes>(square_one);
    square_two = sum_lanes<kLanes>(square_two);
    inner = sum_lanes<kLanes>(inner);
    if (!active || fmin(square_one, square_two) < kNegligible) return false;
    if (fabs(inner) <= tolerance * sqrt(square_one) * sqrt(square_two)) return false;
    // The smaller root of the tangent's equation, so that |θ| ≤ π/4.
    const T zeta = (square_two - square_one) / (inner + inner), steep = fabs(zeta);
    const T bounded = fmin(steep, kLimit);
    const T tangent = copysign(T(1), zeta) / (steep + fmax(steep, sqrt(1 + bounded * bounded)));
    const T cosine = 1 / sqrt(1 + tangent * tangent);
    const T sine = tangent * cosine;
    // The longer column goes first: it takes fewer sweeps.
    const bool swap = square_one - tangent * inner < square_two + tangent * inner;
    rotate(one, two, m, sine, sine / (1 + cosine), swap);
    rotate(v + low * pitch(n), v + high * pitch(n), n, sine, sine / (1 + cosine), swap);
    return true;
  }

  // (c a - s b, s a + c b), c = 1 - s τ: written as corrections, so that small angles round little.
  __device__ void rotate(T* one, T* two, int length, T sine, T tau, bool swap) const {
    for (int i = lane; i < length; i += kLanes) {
      const T a = one[i], b = two[i];
      const T c = a - sine * (b + tau * a), d = b + sine * (a - tau * b);
      one[i] = swap ? d : c;
      two[i] = swap ? c : d;
    }
  }

  // Inner product of two columns of X, which each lane of the group gets; all threads take part,
  // and those that are not active touch nothing.
  __device__ T dot(int one, int two, bool active) const {
    T sum = 0;
    for (int i = lane; active && i < m; i += kLanes) {
      sum += x[one * pitch(m) + i] * x[two * pitch(m) + i];
    }
    return sum_lanes<kLanes>(sum);
  }

  // Finds the lengths of the columns and their order, and makes the columns unit vectors. Negligible
  // columns become zero.
  __device__ void sort() const {
    const int groups = size / kLanes;
    for (int first = 0; first < n; first += groups) {
      const int column = first + thread / kLanes;
      const T square = dot(column, column, column < n);
      const T length = square < kNegligible ? T(0) : sqrt(square);
      if (column < n && lane == 0) values[column] = length;
      for (int i = lane; column < n && i < m; i += kLanes) {
        T& value = x[column * pitch(m) + i];
        value = length > 0 ? value / length : T(0);
      }
    }
    sync();
    for (int column = thread; column < n; column += size) {
      int place = 0;
      for (int other = 0; other < n; ++other) {
        place +=
            values[other] > values[column] || (values[other] == values[column] && other < column);
      }
      order[place] = column;
    }
    sync();
  }

  // If the column at place i is zero, gives it a direction orthogonal to all before it: the coordinate axis
  // that they cover least, orthogonalised twice.
  __device__ void complete(int i) const {
    const int column = order[i];
    if (values[column] > 0) return;
    T* y = x + column * pitch(m);
    for (int row = thread; row < m; row += size) {
      T covered = 0;
      for (int q = 0; q < i; ++q) {
        const T element = x[order[q] * pitch(m) + row];
        covered += element * element;
      }
      y[row] = covered;
    }
    sync();
    int least = 0;
    for (int row = 1; row < m; ++row) least = y[row] < y[least] ? row : least;
    sync();
    for (int row = thread; row < m; row += size) y[row] = row == least ? T(1) : T(0);
    sync();
    for (int pass = 0; pass < 2; ++pass) project(y, column, i);
    const T length = sqrt(dot(column, column, true));
    sync();
    for (int row = thread; row < m; row += size) y[row] /= length;
    sync();
  }

  // Subtracts from y its projection onto the first `count` columns. `signs` holds the weights.
  __device__ void project(T* y, int column, int count) const {
    for (int first = 0; first < count; first += size / kLanes) {
      const int q = first + thread / kLanes;
      const T weight = dot(q < count ? order[q] : column, column, q < count);
      if (q < count && lane == 0) signs[q] = weight;
    }
    sync();
    for (int row = thread; row < m; row += size) {
      T value = y[row];
      for (int q = 0; q < count; ++q) value -= signs[q] * x[order[q] * pitch(m) + row];
      y[row] = value;
    }
    sync();
  }

  // The largest element of each left vector, the first of equals, becomes positive.
  __device__ void choose_signs(const T* left, int step) const {
    for (int i = thread; i < p.rank; i += size) {
      T extreme = 0;
      for (int row = 0; row < p.rows; ++row) {
        const T value = left[order[i] * step + row];
        extreme = fabs(value) > fabs(extreme) ? value : extreme;
      }
      signs[i] = extreme < 0 ? T(-1) : T(1);
    }
    sync();
  }

  __device__ void store(int exponent) const {
    for (int i = thread; i < p.rank; i += size) {
      p.s[index * p.rank + i] = ldexp(values[order[i]], exponent);
    }
    store_vectors(wide ? p.v : p.u, x, m, pitch(m));
    store_vectors(wide ? p.u : p.v, v, n, pitch(n));
  }

  __device__ void store_vectors(T* to, const T* columns, int length, int step) const {
    to += index * length * p.rank;
    for (int i = thread; i < length * p.rank; i += size) {
      const int place = i % p.rank;
      to[i] = columns[order[place] * step + i / p.rank] * signs[place];
    }
  }

  const SvdBatch<T>& p;
  const int64_t index;
  const bool wide;
  const int m, n, thread, size, lane;
  T *x, *v, *values, *signs, *slots;
  int* order;
};

// `stride` bytes of shared memory for each matrix of the block.
template <class T, bool small, bool scratch>
__global__ void __launch_bounds__(kWarp*(small ? kWarpsOfSmall : kMostWarps), 1)
    batched_svd_kernel(const SvdBatch<T> problem, int stride) {
  const int team = small ? threadIdx.x / kWarp : 0, teams = small ? blockDim.x / kWarp : 1;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * teams + team;
  if (index < problem.count) {
    Svd<T, small, scratch>(problem, index, shared_memory() + team * stride).run();
  }
}

template <class T>
const char* run(const SvdBatch<T>& p, Stream stream) {
  const int n = short_side(p.rows, p.columns);
  const int64_t bytes = bytes_of(p.rows, p.columns, sizeof(T), !p.rotations);
  if (n > kWarp) {
    const int pairs = (n + 1) / 2, warps = pairs < kMostWarps ? pairs : kMostWarps;
    auto* kernel =
        p.rotations ? batched_svd_kernel<T, false, true> : batched_svd_kernel<T, false, false>;
    return launch(kernel, p.count, kWarp * warps, bytes, stream, p, static_cast<int>(bytes));
  }
  // Few enough matrices a block that several blocks fit on a multiprocessor.
  int teams = kWarpsOfSmall;
  while (teams > 1 && teams * bytes > 48 * 1024) teams /= 2;
  return launch(batched_svd_kernel<T, true, false>, (p.count + teams - 1) / teams, kWarp * teams,
                teams * bytes, stream, p, static_cast<int>(bytes));
}

}  // namespace

int64_t svd_shared_memory(int rows, int columns, int element_size) {
  return bytes_of(rows, columns, element_size, false);
}

bool svd_needs_scratch(int rows, int columns, int element_size, int64_t available) {
  return bytes_of(rows, columns, element_size, true) > available;
}

int64_t svd_rotations(int rows, int columns) {
  const int n = short_side(rows, columns);
  return static_cast<int64_t>(n) * pitch(n);
}

int64_t shared_memory_limit() { return block_shared_memory(); }

const char* batched_svd(const SvdBatch<float>& problem, Stream stream) {
  return run(problem, stream);
}
const char* batched_svd(const SvdBatch<double>& problem, Stream stream) {
  return run(problem, stream);
}

}  // namespace adacomcat::cuda
