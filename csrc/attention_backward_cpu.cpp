// attention backward on CPU: dq, dk, dv of o = softmax(scale q kᵀ) v, fp32, bf16 and fp16.
//
// Algorithm (Dao 2023, "FlashAttention-2", algorithm 2). Per tile of keys and block of queries,
// with lse from the forward and delta = rowsum(do * o): P = exp(scale q kᵀ - lse), dP = do vᵀ, dS =
// P (dP - delta), dv += Pᵀ do, dk += dSᵀ q, dq += dS k; dq and dk times scale in the end. The five
// products, and no more, because dq, dk and dv are all sums that stay in memory: keys and queries
// of a head are cut into as many ranges, and in phase p range i of the keys meets range i + p of
// the queries. So no two threads add to the same sums, and their order is that of phases, which the
// shape alone decides. Of as many heads as divide among the threads one thread takes each
// through all phases. bf16 is multiplied as in the forward, on AMX too. Bytes: q, k, v, o, do read,
// dq, dk, dv written. Limit: 10 L S D fused multiply-add flops, L S exponentials. The steps are in
// attention_backward_cpu.h.
#include "attention_backward_cpu.h"

#include "attention_tensors_cpu.h"

namespace sdfast {
namespace {

using attention::Sizes;
using attention::View;
using gemm::kColumns;
using gemm::OperandOf;

constexpr int64_t kMostTiles = 256 / kColumns;  // of keys in a block
constexpr int64_t kMostQueries = 64;            // in a block
constexpr int64_t kKeyBytes = 640 << 10;        // of a block's operands and sums, in L2
constexpr int64_t kQueryBytes = 384 << 10;      // beside them
constexpr int64_t kWantedItems = 64;            // in a phase, for any number of threads
constexpr int64_t kLeastRange = 256;            // shorter ranges are packed too often

constexpr int64_t tiles_of(int64_t rows) { return (rows + kColumns - 1) / kColumns; }

// Consecutive queries or keys.
struct Block {
  int64_t first, count;
};

template <typename T>
struct AttentionBackward {
  using Operand = typename OperandOf<T>::Type;
  using Rows = attention::Rows<Operand>;
  static constexpr int64_t kDepth = Operand::kDepth;
  static constexpr bool kPairs = kDepth == 2;
  // Rows of scores are differentiated in pairs, and multiplied in whole steps.
  static constexpr int64_t kRowsUnit = attention::kInTiles<Operand> ? kDepth * simd::kLanes : 2;

  Sizes sizes;
  View<const T> q, k, v, o, d_o;
  const float* lse;  // (B, heads, L), base 2
  View<T> dq, dk, dv;
  bool is_causal;
  double scale;

  // In a block. A key takes three operands and two sums, a query four operands and a sum.
  int64_t block_tiles() const {
    const int64_t operand = sizeof(Operand) / kDepth, sum = sizeof(float);
    const int64_t tile_bytes = (3 * operand + 2 * sum) * sizes.dim * kColumns;
    return std::min(std::clamp<int64_t>(kKeyBytes / tile_bytes, 1, kMostTiles),
                    tiles_of(sizes.keys));
  }
  int64_t block_queries() const {
    const int64_t operand = sizeof(Operand) / kDepth, sum = sizeof(float);
    const int64_t fit = kQueryBytes / ((2 * operand * kDepth + sum) * sizes.dim);
    return std::min(std::clamp<int64_t>(fit, kColumns, kMostQueries) / kColumns,
                    tiles_of(sizes.queries)) *
           kColumns;
  }
  // Ranges of the keys of a head, and of its queries.
  int64_t cuts() const {
    const int64_t most = std::min(sizes.queries, sizes.keys) / kLeastRange;
    return std::clamp<int64_t>(kWantedItems / (sizes.batch * sizes.heads), 1,
                               std::max<int64_t>(most, 1));
  }
  static Block range_of(int64_t index, int64_t cuts, int64_t rows) {
    const int64_t first = index * tiles_of(rows) / cuts * kColumns;
    return {first, std::min((index + 1) * tiles_of(rows) / cuts * kColumns, rows) - first};
  }

  // Rows of D that sums and transposed operands have.
  static int64_t whole(int64_t dim) { return attention::whole<Operand>(dim); }
  static int64_t padded(int64_t rows) { return (rows + kRowsUnit - 1) / kRowsUnit * kRowsUnit; }
  int64_t sum_size(int64_t rows) const { return tiles_of(rows) * kColumns * whole(sizes.dim); }

  // What a thread needs for one block of keys and one of queries.
  struct Workspace {
    int64_t dim, tiles, queries;
    int64_t depth_steps = attention::whole_steps<Operand>(dim);
    int64_t key_steps = tiles * kColumns / kDepth;
    int64_t lanes_size = tiles * depth_steps * kColumns;
    int64_t transposed_size = key_steps * kColumns;  // of one tile of queries
    Scratch<Operand> operands{2 * lanes_size + key_steps * whole(dim) +
                              2 * Rows::size(queries, dim) + queries / kColumns * transposed_size +
                              (kPairs ? queries / 2 * kColumns : 0)};
    Scratch<float> floats{2 * queries * kColumns + 2 * queries + queries * whole(dim)};
    Operand *k_lanes = operands.get(), *v_lanes = k_lanes + lanes_size;
    Operand* transposed = v_lanes + lanes_size;
    Operand* pairs = transposed + queries / kColumns * transposed_size;
    Operand* k_along_rows = pairs + (kPairs ? queries / 2 * kColumns : 0);
    Rows q = Rows::in(k_along_rows + key_steps * whole(dim), queries, dim);
    Rows d_o = Rows::in(q.along_dim + Rows::size(queries, dim), queries, dim);
    float *scores = floats.get(), *gradients = scores + queries * kColumns;
    float *lse = gradients + queries * kColumns, *delta = lse + queries;
    float* dq = delta + queries;
  };

  // The sums of one head: tiles (whole D, kColumns) of queries and keys.
  struct Sums {
    float *dq, *dk, *dv;
  };
  // Whether a block's sums are new, and whether they are complete afterwards.
  struct Turn {
    bool first, last;
  };

  void pack_keys(int64_t batch, int64_t head, const Block& keys, Workspace& work) const {
    const int64_t tile_size = work.depth_steps * kColumns;
    for (int64_t key = 0; key < keys.count; key += kColumns) {
      const int64_t count = std::min<int64_t>(kColumns, keys.count - key);
      const int64_t to = key / kColumns * tile_size;
      // Rows of a head lie a token apart: no hardware sees where the next one begins.
      const int64_t next = key + count, next_end = std::min(next + kColumns, keys.count);
      for (int64_t row = next; row < next_end; ++row) {
        attention::prefetch_row(k.row(batch, head, keys.first + row), sizes.dim);
        attention::prefetch_row(v.row(batch, head, keys.first + row), sizes.dim);
      }
      attention::pack_queries(k.row(batch, head, keys.first + key), k.row_stride, count, sizes.dim,
                              false, work.k_lanes + to);
      attention::pack_queries(v.row(batch, head, keys.first + key), v.row_stride, count, sizes.dim,
                              false, work.v_lanes + to);
    }
    attention::pack_along_rows(k.row(batch, head, keys.first), k.row_stride, keys.count, sizes.dim,
                               work.k_along_rows);
  }

  // delta: (B, heads, L), computed with the first block of keys.
  void pack_queries(int64_t batch, int64_t head, const Block& queries, bool first_keys,
                    float* delta, Workspace& work) const {
    attention::pack_rows(q.row(batch, head, queries.first), q.row_stride, queries.count, sizes.dim,
                         work.q);
    attention::pack_rows(d_o.row(batch, head, queries.first), d_o.row_stride, queries.count,
                         sizes.dim, work.d_o);
    const int64_t from = (batch * sizes.heads + head) * sizes.queries + queries.first;
    if (first_keys) {
      attention::multiply_rowwise(o.row(batch, head, queries.first), o.row_stride,
                                  d_o.row(batch, head, queries.first), d_o.row_stride,
                                  queries.count, sizes.dim, delta + from);
    }
    for (int64_t i = 0; i < queries.count; ++i) {
      work.lse[i] = lse[from + i];
      work.delta[i] = delta[from + i];
    }
    for (int64_t i = queries.count; i < padded(queries.count); ++i) {
      work.lse[i] = work.delta[i] = 0;
    }
  }

  // One tile of keys, of which kV vectors count, against the queries of a block from `first` on.
  template <int kV>
  void add_tile(int64_t first, int64_t queries, int64_t tile, bool diagonal, bool accumulate,
                float* dk_sums, float* dv_sums, Workspace& work) const {
    using attention::multiply_block;
    const int64_t rows = queries - first, steps = work.depth_steps, dim = sizes.dim;
    const int64_t row_steps = gemm::steps_of(kDepth, rows), lanes = tile * steps * kColumns;
    float *scores = work.scores, *gradients = work.gradients;
    multiply_block<Operand, false, kV>(rows, steps, work.q.along_dim + first * steps, steps,
                                       work.k_lanes + lanes, scores, false);
    multiply_block<Operand, false, kV>(rows, steps, work.d_o.along_dim + first * steps, steps,
                                       work.v_lanes + lanes, gradients, false);
    // What is hidden has an infinite score, which 0 would make NaN.
    const float to_log2 = scale == 0 ? std::numeric_limits<float>::min()
                                     : static_cast<float>(scale * 1.4426950408889634);
    if (diagonal) attention::hide_later_keys(rows, to_log2, scores, gradients);
    std::fill(scores + rows * kColumns, scores + padded(rows) * kColumns, 0.0f);
    std::fill(gradients + rows * kColumns, gradients + padded(rows) * kColumns, 0.0f);
    attention::differentiate<kV>(padded(rows), to_log2, {work.lse + first, work.delta + first},
                                 scores, gradients, work.pairs);
    const Operand* weights = reinterpret_cast<const Operand*>(scores);
    const Operand* d_scores = kPairs ? work.pairs : reinterpret_cast<const Operand*>(gradients);
    const int64_t lda = whole(dim), from = first / kDepth * lda;
    multiply_block<Operand, true, kV>(dim, row_steps, work.d_o.along_rows + from, lda, weights,
                                      dv_sums, accumulate);
    multiply_block<Operand, true, kV>(dim, row_steps, work.q.along_rows + from, lda, d_scores,
                                      dk_sums, accumulate);
    attention::transpose_tile<kV>(rows, gradients,
                                  work.transposed + first / kColumns * work.transposed_size +
                                      tile * kColumns / kDepth * kColumns,
                                  work.transposed_size);
  }

  // All of one block of keys against one of queries. sums: of these blocks.
  void add_block(const Block& keys, const Block& queries, bool first_keys, bool first_queries,
                 const Sums& sums, Workspace& work) const {
    const int64_t tile_size = whole(sizes.dim) * kColumns;
    for (int64_t key = 0; key < keys.count; key += kColumns) {
      const int64_t tile = key / kColumns, position = keys.first + key;
      float *dk_sums = sums.dk + tile * tile_size, *dv_sums = sums.dv + tile * tile_size;
      const bool diagonal = is_causal && position >= queries.first;
      const int64_t first = diagonal ? position - queries.first : 0;
      if (first >= queries.count) {
        if (first_queries) std::fill_n(dk_sums, tile_size, 0.0f);
        if (first_queries) std::fill_n(dv_sums, tile_size, 0.0f);
      } else if (attention::kInTiles<Operand> || keys.count - key > simd::kLanes) {
        add_tile<gemm::kVecs>(first, queries.count, tile, diagonal, !first_queries, dk_sums,
                              dv_sums, work);
      } else {
        add_tile<1>(first, queries.count, tile, diagonal, !first_queries, dk_sums, dv_sums, work);
      }
    }
    for (int64_t query = 0; query < queries.count; query += kColumns) {
      const int64_t tile = query / kColumns;
      float* dq_sums = sums.dq + tile * tile_size;
      int64_t count = keys.count;
      if (is_causal) count = std::min(count, queries.first + query + kColumns - keys.first);
      if (count > 0) {
        attention::multiply_block<Operand, true>(
            sizes.dim, gemm::steps_of(kDepth, count), work.k_along_rows, whole(sizes.dim),
            work.transposed + tile * work.transposed_size, dq_sums, !first_keys);
      } else if (first_keys) {
        std::fill_n(dq_sums, tile_size, 0.0f);
      }
    }
  }

  void finish(const float* sums, int64_t batch, int64_t head, const Block& block, double factor,
              const View<T>& to) const {
    const attention::Vec factors = simd::broadcast(static_cast<float>(factor));
    for (int64_t row = 0; row < block.count; row += kColumns) {
      attention::store_rows(
          sums + row * whole(sizes.dim), std::min<int64_t>(kColumns, block.count - row), sizes.dim,
          [&](int64_t) { return factors; }, to.row(batch, head, block.first + row), to.row_stride);
    }
  }

  // A range of the keys of one head against a range of its queries.
  void add_range(int64_t head, const Block& keys, const Block& queries, const Turn& turn,
                 float* delta, const Sums& sums, Workspace& work) const {
    const int64_t batch = head / sizes.heads, h = head % sizes.heads;
    const int64_t most_keys = work.tiles * kColumns;
    for (int64_t key = 0; key < keys.count; key += most_keys) {
      const Block key_block{keys.first + key, std::min(most_keys, keys.count - key)};
      const bool first_keys = turn.first && key == 0;
      const bool last_keys = turn.last && key + key_block.count == keys.count;
      const Sums there{nullptr, sums.dk + key_block.first * whole(sizes.dim),
                       sums.dv + key_block.first * whole(sizes.dim)};
      pack_keys(batch, h, key_block, work);
      for (int64_t query = 0; query < queries.count; query += work.queries) {
        const Block block{queries.first + query, std::min(work.queries, queries.count - query)};
        pack_queries(batch, h, block, first_keys, delta, work);
        float* dq_sums =
            first_keys && last_keys ? work.dq : sums.dq + block.first * whole(sizes.dim);
        add_block(key_block, block, first_keys, turn.first && query == 0,
                  {dq_sums, there.dk, there.dv}, work);
        if (last_keys) finish(dq_sums, batch, h, block, scale, dq);
      }
      if (!turn.last) continue;
      finish(there.dk, batch, h, key_block, scale, dk);
      finish(there.dv, batch, h, key_block, 1.0, dv);
    }
  }

  void run() const {
    const int64_t all = sizes.batch * sizes.heads, ranges = cuts();
    const Scratch<float> delta(all * sizes.queries);
    const int64_t dq_size = sum_size(sizes.queries), dk_size = sum_size(sizes.keys);
    const int64_t head_size = dq_size + 2 * dk_size;
    // In a phase, one range of the keys of a head, whose sums these are.
    const auto add = [&](int64_t phase, int64_t head, int64_t range, float* sums, Workspace& work) {
      add_range(head, range_of(range, ranges, sizes.keys),
                range_of((range + phase) % ranges, ranges, sizes.queries),
                {phase == 0, phase + 1 == ranges}, delta.get(),
                {sums, sums + dq_size, sums + dq_size + dk_size}, work);
    };
    // As many heads as divide among the threads are taken through all phases by one thread each, in
    // sums that stay in cache; the ranges of the others are shared out phase by phase.
    using torch::stable::parallel_for;
    const int64_t threads = torch::stable::get_num_threads(), whole_heads = all / threads * threads;
    parallel_for(0, whole_heads, 1, [&](int64_t begin, int64_t end) {
      const gemm::Tiles<Operand> held;
      Workspace work{sizes.dim, block_tiles(), block_queries()};
      const Scratch<float> sums(head_size);
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t phase = 0; phase < ranges; ++phase) {
          for (int64_t range = 0; range < ranges; ++range) {
            add(phase, head, range, sums.get(), work);
          }
        }
      }
    });
    const int64_t others = all - whole_heads;
    const Scratch<float> sums(others * head_size);
    for (int64_t phase = 0; phase < ranges; ++phase) {
      parallel_for(0, others * ranges, 1, [&](int64_t begin, int64_t end) {
        const gemm::Tiles<Operand> held;
        Workspace work{sizes.dim, block_tiles(), block_queries()};
        for (int64_t item = begin; item < end; ++item) {
          const int64_t head = item / ranges;
          add(phase, whole_heads + head, item % ranges, sums.get() + head * head_size, work);
        }
      });
    }
  }
};

// do, o, q: (B, heads, L, D). k, v: (B, heads, S, D). lse: (B, heads, L), fp32, base 2. Returns dq,
// dk, dv, each a view of (B, rows, heads, D).
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v,
                                                      Tensor o, Tensor lse, bool is_causal,
                                                      double scale) {
  const Sizes sizes = attention::sizes_of(q, k);
  const ScalarType dtype = q.scalar_type();
  const auto of_queries = [&](const Tensor& t, const char* name) {
    return attention::checked(t, name, sizes, sizes.queries, dtype);
  };
  const auto of_keys = [&](const Tensor& t, const char* name) {
    return attention::checked(t, name, sizes, sizes.keys, dtype);
  };
  const Tensor output_gradient = of_queries(d_o, "do"), queries = of_queries(q, "q"),
               keys = of_keys(k, "k"), values = of_keys(v, "v"), output = of_queries(o, "o");
  const Values saved_lse(lse, "lse", {sizes.batch, sizes.heads, sizes.queries});
  Tensor dq = attention::new_by_token(sizes, sizes.queries, dtype),
         dk = attention::new_by_token(sizes, sizes.keys, dtype),
         dv = attention::new_by_token(sizes, sizes.keys, dtype);
  STD_TORCH_CHECK(q.numel() > 0 && k.numel() > 0, "q, k: expected elements");
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    using attention::view_of;
    AttentionBackward<T>{sizes,
                         view_of<const T>(queries),
                         view_of<const T>(keys),
                         view_of<const T>(values),
                         view_of<const T>(output),
                         view_of<const T>(output_gradient),
                         saved_lse.data(),
                         view_of<T>(dq),
                         view_of<T>(dk),
                         view_of<T>(dv),
                         is_causal,
                         scale}
        .run();
  });
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace
}  // namespace sdfast
