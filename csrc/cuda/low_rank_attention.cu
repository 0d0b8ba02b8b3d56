// Attention in three launches: the projections of all heads, context = softmax(q kᵀ · scale + mask) v, and
// the output projection. A single kernel would project the keys and values of all tokens again for each
// tile of queries.
//
// A block takes kQueries queries of one head, and kKeys keys at a time. The softmax is online: sums are
// rescaled where a tile of keys raises the maximum of a row. The logits are never written. Values of more
// ranks than kColumns take several passes over the keys.
#include "chain.cuh"
#include "tiles.cuh"

namespace adacomcat::cuda {
namespace {

constexpr int kQueries = 64, kKeys = 32;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNothing = -std::numeric_limits<float>::infinity();  // the logit of a masked key

template <class T>
struct Heads {
  using Tile = cuda::Tile<T, kQueries>;

  // The distance of rows of queries and keys in shared memory.
  __host__ __device__ static int pitch(int rank) {
    return static_cast<int>(round_up(rank, Tile::kStep)) + Tile::kChunk;
  }
  __host__ __device__ static int stage(int rank) {
    return kKeys * (pitch(rank) + Tile::kWidePitch);
  }
  static int64_t bytes(int rank) {
    const int64_t elements = kQueries * pitch(rank) + Tile::kStages * stage(rank);
    return std::max<int64_t>(elements * sizeof(T), Tile::kStaging);
  }
};

// -∞ where a key is masked or beyond the last one, else logit · factor + the additive mask.
template <class T>
__device__ __forceinline__ float masked(float logit, float factor, const LowRankAttention& p,
                                        int64_t mask_row, bool inside, int key) {
  if (key >= p.tokens) return kNothing;
  if (p.mask_kind == Mask::none || !inside) return logit * factor;
  const int64_t at = mask_row + key * p.mask_strides[3];
  if (p.mask_kind == Mask::boolean) {
    return static_cast<const uint8_t*>(p.mask)[at] ? logit * factor : kNothing;
  }
  return logit * factor + to_float(static_cast<const T*>(p.mask)[at]);
}

// What a lane knows of two of its warp's rows, g and g + 8.
struct OnlineSoftmax {
  float maximum[2], total[2];
  float to_exponent;  // from the unit of the logits to that of exp2

  // Puts probabilities, up to their total, in the place of logits, and rescales the sums.
  template <int keys, int groups>
  __device__ __forceinline__ void update(float (&logits)[keys][4], float (&sums)[groups][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float higher = maximum[half];
#pragma unroll
      for (int at = 0; at < 2 * keys; ++at) {
        higher = fmaxf(higher, logits[at / 2][2 * half + at % 2]);
      }
      higher = max_lanes<4>(higher);
      // A row that is masked up to here has 0 for its maximum: -∞ - -∞ is NaN.
      const float base = higher == kNothing ? 0.0f : higher;
      const float shrink = exp2f((maximum[half] - base) * to_exponent);
      maximum[half] = higher;
      float sum = 0;
#pragma unroll
      for (int at = 0; at < 2 * keys; ++at) {
        float& value = logits[at / 2][2 * half + at % 2];
        value = exp2f((value - base) * to_exponent);
        sum += value;
      }
      total[half] = total[half] * shrink + sum;
#pragma unroll
      for (int at = 0; at < 2 * groups; ++at) sums[at / 2][2 * half + at % 2] *= shrink;
    }
  }

  // Divides the sums by the totals; a row that is masked entirely stays zero.
  template <int groups>
  __device__ __forceinline__ void finish(float (&sums)[groups][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = sum_lanes<4>(total[half]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int at = 0; at < 2 * groups; ++at) sums[at / 2][2 * half + at % 2] *= inverse;
    }
  }
};

// The block's part of the context in the ranks of values from `first` on: sums = softmax(...) v.
template <class T>
__device__ __forceinline__ void attend(ChainedSums<typename Heads<T>::Tile>& sums, T* memory,
                                       const LowRankAttention& p, int64_t head, int first_query,
                                       int first) {
  using H = Heads<T>;
  using Tile = typename H::Tile;
  const int64_t image = head / p.heads, h = head % p.heads;
  const int64_t stride_qk = int64_t{p.heads} * p.rank_qk, stride_vo = int64_t{p.heads} * p.rank_vo;
  const int64_t at_qk = image * p.tokens * stride_qk + h * p.rank_qk;
  const int64_t at_vo = image * p.tokens * stride_vo + h * p.rank_vo;
  const Source<T> q(static_cast<const T*>(p.q) + at_qk, stride_qk, p.tokens, p.rank_qk);
  const Source<T> k(static_cast<const T*>(p.k) + at_qk, stride_qk, p.tokens, p.rank_qk);
  const Source<T> v(static_cast<const T*>(p.v) + at_vo, stride_vo, p.tokens, p.rank_vo);
  const int pitch = H::pitch(p.rank_qk), padded = pitch - Tile::kChunk;
  const int columns = min(p.rank_vo - first, kColumns);
  T* const queries = memory;
  T* const stages = memory + kQueries * pitch;
  const int lane = threadIdx.x % kWarp;
  const int own_query = first_query + warp_row<Tile>() + lane / 4;
  const int64_t mask_head = image * p.mask_strides[0] + h * p.mask_strides[1];
  // In the unit ln 2 an additive mask's largest numbers would be infinite.
  const bool natural = p.mask_kind == Mask::additive;
  const float factor = natural ? p.scale : p.scale * kLog2E;
  OnlineSoftmax softmax{{kNothing, kNothing}, {0, 0}, natural ? kLog2E : 1.0f};

  pipeline<Tile::kStages>(
      (p.tokens + kKeys - 1) / kKeys,
      [&](int step, int stage) {
        T* to = stages + stage * H::stage(p.rank_qk);
        if (step == 0) load_tile(queries, pitch, q, first_query, 0, kQueries, padded);
        load_tile(to, pitch, k, step * kKeys, 0, kKeys, padded);
        load_tile(to + kKeys * pitch, Tile::kWidePitch, v, step * kKeys, first, kKeys,
                  (columns + 15) / 16 * 16);
      },
      [&](int step, int stage) {
        const T* from = stages + stage * H::stage(p.rank_qk);
        float logits[1][kKeys / 8][4] = {};
        multiply_warp<false>(logits, queries + warp_row<Tile>() * pitch, pitch, from, pitch,
                             padded);
#pragma unroll
        for (int at = 0; at < kKeys / 2; ++at) {
          const int query = own_query + at / 2 % 2 * 8;
          const int key = step * kKeys + at / 4 * 8 + lane % 4 * 2 + at % 2;
          float& logit = logits[0][at / 4][at % 4];
          logit = masked<T>(logit, factor, p, mask_head + query * p.mask_strides[2],
                            query < p.tokens, key);
        }
        softmax.update(logits[0], sums[0]);
        multiply_chained(sums, logits, from + kKeys * pitch, Tile::kWidePitch, columns);
      });
  softmax.finish(sums[0]);
}

// Blocks that follow each other take the queries of one head.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const LowRankAttention p, const int query_blocks) {
  using Tile = typename Heads<T>::Tile;
  T* const memory = reinterpret_cast<T*>(shared_memory());
  const int64_t head = blockIdx.x / query_blocks;
  const int first_query = blockIdx.x % query_blocks * kQueries;
  const int64_t stride = int64_t{p.heads} * p.rank_vo;
  T* const context = static_cast<T*>(p.context) + head / p.heads * p.tokens * stride +
                     head % p.heads * p.rank_vo;
  for (int first = 0; first < p.rank_vo; first += kColumns) {
    ChainedSums<Tile> sums = {};
    attend<T>(sums, memory, p, head, first_query, first);
    drain<Tile>(sums, reinterpret_cast<float*>(memory),
                [&](int row, int column, const float (&values)[Tile::kChunk]) {
                  const int query = first_query + row, r = first + column;
                  if (query < p.tokens) {
                    store_elements(context + query * stride + r, values, p.rank_vo - r);
                  }
                });
  }
}

template <class T>
const char* attend_all(const LowRankAttention& p, Stream stream) {
  const int query_blocks = (p.tokens + kQueries - 1) / kQueries;
  return launch(attention_kernel<T>, p.batch * p.heads * query_blocks, kThreads,
                Heads<T>::bytes(p.rank_qk), stream, p, query_blocks);
}

}  // namespace

int64_t low_rank_attention_shared_memory(Dtype dtype, int rank_qk) {
  return dtype == Dtype::f32 ? Heads<float>::bytes(rank_qk) : Heads<__half>::bytes(rank_qk);
}

const char* low_rank_attention(Dtype dtype, const LowRankAttention& p, Stream stream) {
  const int64_t rows = p.batch * p.tokens;
  const int qk = p.heads * p.rank_qk, vo = p.heads * p.rank_vo;
  const char* error = project(dtype,
                              {rows,
                               p.in,
                               p.x,
                               {},
                               {p.wq, p.bq, p.q, qk},
                               {p.wk, nullptr, p.k, qk},
                               {p.wv, nullptr, p.v, vo},
                               Activation::none,
                               p.epsilon},
                              stream);
  if (error) return error;
  error = dtype == Dtype::f32   ? attend_all<float>(p, stream)
          : dtype == Dtype::f16 ? attend_all<__half>(p, stream)
                                : attend_all<__nv_bfloat16>(p, stream);
  if (error) return error;
  return project(dtype,
                 {rows,
                  vo,
                  {p.context, vo},
                  p.residual,
                  {p.wo, p.bo, p.y, p.out},
                  {},
                  {},
                  Activation::none,
                  kNoNorm},
                 stream);
}

}  // namespace adacomcat::cuda
