// A tile of C in vector registers, each size a function of its own.

// c (R, P vectors) = or += a · b over `steps` lanes of k; the packed rows of b are P vectors apart.
// Rows of c are S elements apart, or `c_stride` where S is 0.
template <int R, int P, int64_t S>
void multiply_tile(int64_t steps, const char* a, int64_t a_stride, const float* b, float* c,
                   int64_t c_stride, bool add, Prefetch ahead) {
  if (S) c_stride = S;
  Vector sum[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[r][p] = add ? load(c + r * c_stride + p * kLanes) : Vector{};
  }
  for (int64_t i = 0; i < steps; ++i) {
    __builtin_prefetch(ahead.from, 0, 2);
    ahead.from += ahead.step;
    Vector right[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) right[p] = load(b + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto left = read_lane(a + r * a_stride);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[r][p] = multiply_add(sum[r][p], left, right[p]);
    }
    a += kStep;
    b += P * kLanes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) store(c + r * c_stride + p * kLanes, sum[r][p]);
  }
}

using MultiplyTile = void (*)(int64_t, const char*, int64_t, const float*, float*, int64_t, bool,
                              Prefetch);

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
  void hold(int64_t rows, int64_t steps, const char* a, int64_t a_stride) {
    rows_ = rows, steps_ = steps, a_ = a, a_stride_ = a_stride;
  }

  template <int64_t S>
  void multiply(int64_t vectors, const float* b, float* c, int64_t c_stride, bool add,
                Prefetch ahead, Work& meanwhile) const {
    meanwhile.all();
    find_tile<S>(rows_, vectors)(steps_, a_, a_stride_, b, c, c_stride, add, ahead);
  }

 private:
  int64_t rows_, steps_, a_stride_;
  const char* a_;
};
