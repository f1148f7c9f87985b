// What attention's CUDA kernels share: views of rows, tiles in shared memory, one block of keys'
// softmax.
#pragma once

#include <limits>

#include "cuda_mma.cuh"

namespace sdfast::attention {

constexpr int kWidestNarrow = 160, kWidest = 512;  // elements of a head
constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// (B, heads, rows, D), unit stride in D; strides in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride, head_stride;
  int row_stride;

  __device__ T* of_head(int batch, int head) const {
    return data + batch * batch_stride + head * head_stride;
  }
};

// A forward call. q, k, v: rows of `dim` elements, a multiple of 8, all of them aligned to 16
// bytes.
template <typename T>
struct Forward {
  Rows<const T> q, k, v;
  Rows<T> o;           // rows of o_dim elements, at most dim
  float* lse;          // (B, heads, L), or null
  float* partial;      // (splits, B, heads, L, dim), where splits > 1
  float* partial_lse;  // (splits, B, heads, L)
  int batch, heads, queries, keys, dim, o_dim;
  int splits, split_keys;  // the keys of a split are a multiple of 16
  float factor;            // |scale| log2 e
  bool negate, is_causal;  // negate: scale < 0

  __host__ __device__ int64_t all_heads() const { return int64_t{batch} * heads; }
};

// What a block of threads computes: some queries of a head against the keys of a split.
struct Part {
  int first_query, split;
  int first_key, last_key;  // to before the latter
  int batch, head;

  template <typename T>
  __device__ Part(const Forward<T>& call, int rows) {
    const unsigned blocks = (call.queries + rows - 1) / rows;
    unsigned block = blockIdx.x % blocks;
    const unsigned rest = blockIdx.x / blocks, which = rest / call.splits;
    if (call.is_causal) block = blocks - 1 - block;  // the longest first
    first_query = block * rows;
    split = rest % call.splits;
    batch = which / call.heads;
    head = which % call.heads;
    first_key = split * call.split_keys;
    last_key = min(call.keys - first_key, call.split_keys) + first_key;
    if (call.is_causal) last_key = min(last_key, first_query + rows);
  }
};

// Elements from row to row of a tile in shared memory: an odd number of 16 bytes, so that 16 bytes
// of eight rows lie in different banks, without a swizzle to compute in every address.
constexpr int pitch_of(int columns) { return (columns / 8 | 1) * 8; }

// Starts copying rows [first, first + kRows) of a head, columns [0, kColumns); zeros from row
// `last` and from column `dim` on. kAcross threads take a row: one address each, whatever the
// number of columns.
template <int kThreads, int kRows, int kColumns, int kPitch, int kAcross = 8, typename T>
__device__ void copy_rows(T* to, const T* from, int row_stride, int first, int last, int dim) {
  constexpr int kAtOnce = kThreads / kAcross, kWidth = kAcross * 8;
  static_assert(kRows % kAtOnce == 0);
  const int mine = threadIdx.x / kAcross, column = threadIdx.x % kAcross * 8;
  to += mine * kPitch + column;
#pragma unroll
  for (int row = 0; row < kRows; row += kAtOnce) {
    const bool inside = first + mine + row < last;
    const T* const source = from + int64_t{first + mine + row} * row_stride + column;
#pragma unroll
    for (int c = 0; c < kColumns; c += kWidth) {
      if (c + kWidth > kColumns && column + c >= kColumns) break;
      const bool there = inside && column + c < dim;
      copy_async(to + row * kPitch + c, there ? source + c : from, there ? 16 : 0);
    }
  }
}

// Where lane i reads its row of four 8x8 matrices, two by two: those of the first 8 rows and then
// of the next. It suits a left factor, and transposed a right one.
template <int kPitch>
__device__ int row_major_offset() {
  const int lane = threadIdx.x % kWarp;
  return lane % 16 * kPitch + lane / 16 * 8;
}
// As above, the first 8 columns and then the next: a right factor given by its columns.
template <int kPitch>
__device__ int column_major_offset() {
  const int lane = threadIdx.x % kWarp;
  return (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The running maximum of a query's products q k, as what is subtracted from their exponents. None
// yet: -inf, and nothing is subtracted.
__device__ inline float exponent_of(float top, float factor) {
  return top == -kInfinity ? 0.0f : top * factor;
}
// By what earlier sums shrink when the maximum grows.
__device__ inline float fading_of(float top, float higher, float factor) {
  if (top == -kInfinity) return 0.0f;
  return exp2_fast(top * factor - higher * factor);
}
// 2^(s factor - exponent), 0 for a hidden key, whose s is -inf.
template <bool kMasked>
__device__ float weight_of(float s, float factor, float exponent) {
  const float weight = exp2_fast(fmaf(s, factor, -exponent));
  return kMasked && s == -kInfinity ? 0.0f : weight;
}

// Hides keys from `last` on, and in a causal call those after the query's own. The scores of a
// fragment: queries query and query + 8, keys key and key + 1.
__device__ inline void hide(float (&s)[4], int key, int last, int query, bool is_causal) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int mine = key + i % 2;
    if (mine >= last || (is_causal && mine > query + i / 2 * 8)) s[i] = -kInfinity;
  }
}

// A warp's results, (16 kTiles, 8 kCount): values of fragments, of which the first `rows` and
// `columns` are there to be stored.

// As fp32, which the results of splits are. `to`: rows of `width` elements; columns: a multiple of
// 8.
template <int kTiles, int kCount>
__device__ void store_partial(float* to, int width, int rows, int columns,
                              const float (&x)[kTiles][kCount][4]) {
  const int lane = threadIdx.x % kWarp;
  to += int64_t{lane / 4} * width + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int row = m * 16 + i * 4;
      if (row + lane / 4 >= rows) continue;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if (c * 8 >= columns) break;
        *reinterpret_cast<Vector<float, 2>*>(to + int64_t{row} * width + c * 8) = {x[m][c][i],
                                                                                   x[m][c][i + 1]};
      }
    }
  }
}

// As T, 16 bytes at a time where the tensor's rows allow (`aligned`), by way of the warp's `stage`
// in shared memory, rows of kPitch elements.
template <int kPitch, typename T, int kTiles, int kCount>
__device__ void store_results(T* to, int row_stride, int rows, int columns, bool aligned, T* stage,
                              const float (&x)[kTiles][kCount][4]) {
  const int lane = threadIdx.x % kWarp;
  T* const mine = stage + lane / 4 * kPitch + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        *reinterpret_cast<uint32_t*>(mine + (m * 16 + i * 4) * kPitch + c * 8) =
            pack<T>(x[m][c][i], x[m][c][i + 1]);
      }
    }
  }
  __syncwarp();
  if (aligned) {
#pragma unroll 4
    for (int i = lane; i < kTiles * 16 * kCount; i += kWarp) {
      const int row = i / kCount, column = i % kCount * 8;
      if (row >= rows || column >= columns) continue;
      *reinterpret_cast<Vector<T, 8>*>(to + int64_t{row} * row_stride + column) =
          *reinterpret_cast<const Vector<T, 8>*>(stage + row * kPitch + column);
    }
    return;
  }
  for (int row = 0; row < kTiles * 16 && row < rows; ++row) {
    for (int column = lane; column < min(columns, kCount * 8); column += kWarp) {
      to[int64_t{row} * row_stride + column] = stage[row * kPitch + column];
    }
  }
}

// Columns [column, column + 4) of a row of `dim`, in one access where all rows allow it.
template <typename T>
__device__ void store_columns(T* row, int column, int dim, const float (&x)[4]) {
  if (dim % 4 == 0) return store(row + column, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < dim) row[column + i] = from_float<T>(x[i]);
  }
}

// Stores a warp's results of the forward pass: rows from first_query on, columns from first_column
// on. top and total are whole in every lane of a row.
template <int kPitch, typename T, int kTiles, int kCount>
__device__ void store_rows(const Forward<T>& call, const Part& part, T* stage, int first_query,
                           int first_column, float (&o)[kTiles][kCount][4],
                           const float (&top)[kTiles][2], const float (&total)[kTiles][2]) {
  const int lane = threadIdx.x % kWarp;
  const int64_t head = int64_t{part.batch} * call.heads + part.head;
  const int64_t partial_head = part.split * call.all_heads() + head;
  const bool is_split = call.splits > 1;
  float* const lse = is_split ? call.partial_lse : call.lse;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + m * 16 + half * 8 + lane / 4;
      const float sum = total[m][half];
      const bool hidden = sum == 0;  // all keys of a split
      const float factor = hidden ? 0.0f : 1.0f / sum;
      if (lse && first_column == 0 && lane % 4 == 0 && query < call.queries) {
        lse[(is_split ? partial_head : head) * call.queries + query] =
            hidden ? -kInfinity : exponent_of(top[m][half], call.factor) + log2f(sum);
      }
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        o[m][c][2 * half] *= factor;
        o[m][c][2 * half + 1] *= factor;
      }
    }
  }
  const int rows = call.queries - first_query;
  if (is_split) {
    const int64_t first = (partial_head * call.queries + first_query) * call.dim + first_column;
    store_partial(call.partial + first, call.dim, rows, call.dim - first_column, o);
  } else {
    T* const to = call.o.of_head(part.batch, part.head) + first_column +
                  int64_t{first_query} * call.o.row_stride;
    store_results<kPitch>(to, call.o.row_stride, rows, call.o_dim - first_column,
                          call.o_dim % 8 == 0, stage, o);
  }
}

}  // namespace sdfast::attention
