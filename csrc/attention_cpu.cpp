// attention on CPU: o = softmax(scale q kᵀ) v per batch element and head, fp32, bf16 and fp16.
//
// Algorithm (Dao 2023, "FlashAttention-2", eq. 1-4 and algorithm 1, transposed). The lanes of the
// vectors are queries: a tile of kColumns of them goes over all keys a block at a time, scores
// (keys, kColumns) = k qᵀ, weights = exp(scores - a maximum), o (D, kColumns) += vᵀ weights.
// So maximum and sum need no reduction across lanes, and neither keys nor D are padded, but for AMX
// (attention_tiles_cpu.h). k and v of a head are copied once into the micro-kernel's operands and
// shared by all its tiles.
// bf16 multiplies pairs with AMX or AVX512-BF16; elsewhere bf16 and fp16 are widened to fp32. fp32
// may be split into sums of two bf16, for AMX.
// Bytes: q, k and v read, o written. Limit: 4 L S D fused multiply-add flops, L S exponentials.
// The steps are in attention_cpu.h.
#include "attention_cpu.h"

#include <cmath>
#include <memory>

#include "attention_narrow_tiles_cpu.h"
#include "attention_tensors_cpu.h"

namespace sdfast {
namespace {

using attention::Sizes;
using attention::Tile;
using attention::View;
using gemm::kColumns;
using gemm::OperandOf;

constexpr int64_t kMostKeys = 192;  // in a block
constexpr int64_t kMostTiles = 4;   // of queries, that share a block of keys while it is in L2
constexpr int64_t kFewQueries = 256;
constexpr int64_t kScratchBytes = 24 << 20;  // of copied keys and values at a time

template <typename T, typename Operand = typename OperandOf<T>::Type>
struct Attention {
  Sizes sizes;
  View<const T> q, k, v;
  View<T> o;
  float* lse;  // (B, heads, L), base 2; or null
  bool is_causal;
  double scale;

  static constexpr bool kInTiles = attention::kInTiles<Operand>;
  // Whether values of fp32 are multiplied as sums of two bf16.
  static constexpr bool kSplit = std::is_same_v<T, float> && Operand::kDepth == 2;
  static constexpr int64_t kParts = kSplit ? 2 : 1;
  static int64_t whole(int64_t size) { return attention::whole<Operand>(size); }

  // Keys in a block, whole steps of them: their operands and the tiles' share L2.
  int64_t block_keys() const {
    constexpr int64_t kStep = kInTiles ? 2 * simd::kLanes : 2;
    const int64_t most = kInTiles && sizes.dim <= 128 ? kMostKeys / 2 : kMostKeys;
    return std::clamp<int64_t>(32768 / sizes.dim, 32, most) / kStep * kStep;
  }

  // Of a row of q or k as it is multiplied.
  int64_t depth() const { return (kSplit ? 3 : 1) * sizes.dim; }
  int64_t depth_steps() const { return attention::whole_steps<Operand>(depth()); }
  static int64_t key_steps(int64_t keys) { return attention::whole_steps<Operand>(keys); }

  // Keys and values of one head: (keys, steps of D) and (steps of keys, D), or both in tiles.
  int64_t packed_keys() const { return Operand::kDepth * key_steps(sizes.keys) * depth_steps(); }
  int64_t packed_head() const {
    return packed_keys() + value_at(Operand::kDepth * key_steps(sizes.keys));
  }
  // Where the values of keys from this on begin.
  int64_t value_at(int64_t key) const { return key / Operand::kDepth * kParts * whole(sizes.dim); }

  // fp32 lies in memory as it is multiplied; so few queries do not pay for a denser copy.
  bool in_place() const {
    return std::is_same_v<Operand, gemm::Float32> && std::is_same_v<T, float> &&
           sizes.queries <= kFewQueries;
  }

  // The operands of one head; strides from one row in memory to the next.
  struct Head {
    const Operand *keys, *values;
    int64_t key_stride, value_stride;
  };
  Head head_of(int64_t head, const Operand* packed) const {
    const int64_t batch = head / sizes.heads, h = head % sizes.heads;
    if (in_place()) {
      return {reinterpret_cast<const Operand*>(k.row(batch, h, 0)),
              reinterpret_cast<const Operand*>(v.row(batch, h, 0)), k.row_stride, v.row_stride};
    }
    return {packed, packed + packed_keys(), depth_steps(), sizes.dim};
  }

  void pack(int64_t head, int64_t first, int64_t last, Operand* to) const {
    const int64_t batch = head / sizes.heads, h = head % sizes.heads;
    Operand* values = to + packed_keys();
#if defined(SDFAST_TILES)
    if constexpr (kSplit) {
      pack_split(batch, h, first, last, to);
    } else if constexpr (kInTiles) {
      for (int64_t key = first; key < last; ++key) {
        attention::pack_key_in_tiles(k.row(batch, h, key), sizes.dim, key, to);
      }
      attention::pack_values_in_tiles(v.row(batch, h, first), v.row_stride, last - first, sizes.dim,
                                      values + value_at(first));
    } else
#endif
    {
      for (int64_t key = first; key < last; ++key) {
        attention::pack_key(k.row(batch, h, key), sizes.dim, to + key * depth_steps());
      }
      for (int64_t key = first; key < last; key += Operand::kDepth) {
        attention::pack_value(v.row(batch, h, key), v.row_stride, last - key, sizes.dim,
                              values + value_at(key));
      }
    }
  }

#if defined(SDFAST_TILES)
  void pack_split(int64_t batch, int64_t head, int64_t first, int64_t last, Operand* to) const {
    constexpr int64_t kStep = 2 * simd::kLanes;
    const int64_t dim = sizes.dim;
    Scratch<simd::BFloat16> rows(kStep * 3 * dim);
    simd::BFloat16* parts = rows.get();
    for (int64_t key = first; key < last; key += kStep) {
      const int64_t count = std::min(kStep, last - key);
      attention::split_rows<true, true, false>(k.row(batch, head, key), k.row_stride, count, dim,
                                               parts);
      for (int64_t i = 0; i < count; ++i) {
        attention::pack_key_in_tiles(parts + i * depth(), depth(), key + i, to);
      }
      attention::split_rows<true, false>(v.row(batch, head, key), v.row_stride, count, dim, parts);
      Operand* values = to + packed_keys() + value_at(key);
      for (int64_t part = 0; part < 2; ++part) {
        attention::pack_values_in_tiles(parts + part * dim, 2 * dim, count, dim,
                                        values + part * whole(dim) * simd::kLanes);
      }
    }
  }
  void pack_split_queries(const float* rows, const Tile<Operand>& tile) const {
    const Scratch<simd::BFloat16> parts(kColumns * depth());
    attention::split_rows<true, false, true>(rows, q.row_stride, tile.count, sizes.dim,
                                             parts.get());
    attention::pack_queries(parts.get(), depth(), tile.count, depth(), scale < 0, tile.q);
  }
#endif

  // Not zero: hidden keys have a score of -inf.
  float to_log2() const {
    return std::max(static_cast<float>(std::fabs(scale) * 1.4426950408889634),
                    std::numeric_limits<float>::min());
  }

  // How many keys a tile of queries sees.
  int64_t keys_of(const Tile<Operand>& tile) const {
    return is_causal ? std::min(sizes.keys, tile.first + tile.count) : sizes.keys;
  }

  // The lines of a tile of q or o, for multiply_rows to fetch in a product of `rows` rows: a head's
  // rows do not lie side by side, and no hardware sees where the next one begins.
  template <typename U>
  gemm::Ahead tile_ahead(const View<U>& from, int64_t head, int64_t first, int64_t rows,
                         int64_t steps) const {
    if (first >= sizes.queries) return {};
    constexpr int64_t kLine = 64, kSize = sizeof(U);
    return {from.row(head / sizes.heads, head % sizes.heads, first), sizes.dim * kSize / kLine + 1,
            std::min(steps, attention::kChain) * from.row_stride * kSize, kLine,
            attention::fetches_of(rows, steps)};
  }

  // scores: room for a block of keys.
  void attend_in_rows(int64_t head, const Tile<Operand>* tiles, int64_t count, const Head& operands,
                      float* scores) const {
    const int64_t steps = depth_steps(), most = block_keys();
    for (int64_t key = 0; key < sizes.keys; key += most) {
      for (int64_t t = 0; t < count; ++t) {
        const Tile<Operand>& tile = tiles[t];
        const int64_t keys = std::min(most, keys_of(tile) - key);
        if (keys <= 0) continue;
        const bool last = key + keys == keys_of(tile);
        attention::multiply_rows<Operand, false>(
            keys, steps, operands.keys + key * operands.key_stride, operands.key_stride, tile.q,
            scores, false, last ? tile_ahead(o, head, tile.first, keys, steps) : gemm::Ahead());
        if (is_causal) attention::hide_later_keys(tile.first, key, keys, scores);
        attention::complete_pair(keys, scores);
        const auto shift =
            attention::reference_of(tile, keys, sizes.dim, to_log2(), key == 0, scores);
        attention::add_to_sum(
            tile, attention::weigh<Operand>((keys + 1) / 2 * 2, to_log2(), shift, scores));
        const int64_t step = key / Operand::kDepth, added = gemm::steps_of(Operand::kDepth, keys);
        const int64_t next = tile.first + count * kColumns;
        attention::multiply_rows<Operand, true>(
            sizes.dim, added, operands.values + step * operands.value_stride, operands.value_stride,
            reinterpret_cast<const Operand*>(scores), tile.o, key > 0,
            last ? tile_ahead(q, head, next, sizes.dim, added) : gemm::Ahead());
      }
    }
  }

#if defined(SDFAST_TILES)
  // scores: room for three blocks of keys.
  void attend_any_in_tiles(const Tile<Operand>* tiles, int64_t count, const Head& operands,
                           float* scores) const {
    using attention::Item;
    using attention::RowsProduct;
    const int64_t steps = depth_steps(), most = block_keys();
    attention::attend_items<kSplit>(
        attention::items_of(count, sizes.keys, most, [&](int64_t t) { return keys_of(tiles[t]); }),
        tiles, sizes.dim, to_log2(), scores, most * kColumns,
        [&](const Item& item, float* to) {
          return RowsProduct{operands.keys + item.key * steps,
                             tiles[item.tile].q,
                             amx::kTileRows * steps,
                             attention::kTile,
                             steps / simd::kLanes,
                             whole(item.keys),
                             to,
                             false};
        },
        [&](const Item& item, const Operand* weights) {
          return RowsProduct{operands.values + value_at(item.key),
                             weights,
                             attention::kTile,
                             whole(sizes.dim) * simd::kLanes,
                             key_steps(item.keys) / simd::kLanes,
                             whole(sizes.dim),
                             tiles[item.tile].o,
                             item.key > 0,
                             kSplit};
        },
        [&](const Item& item, float* to) {
          if (is_causal) {
            attention::hide_later_keys(tiles[item.tile].first, item.key, item.keys, to);
          }
          attention::complete_pair(item.keys, to);
        },
        [&](const Item& item, float* weights) {
          const int64_t there = gemm::steps_of(Operand::kDepth, item.keys);
          std::fill_n(reinterpret_cast<Operand*>(weights) + there * kParts * kColumns,
                      (key_steps(item.keys) - there) * kParts * kColumns, Operand{});
        });
  }

  template <int kOut>
  void attend_narrow(const Tile<Operand>* tiles, int64_t count, const Head& operands,
                     float* scores) const {
    attention::NarrowAttention<kOut>{operands.keys, operands.values, sizes.keys, tiles,
                                     count,         to_log2(),       scores}
        .run();
  }

  void attend_in_tiles(const Tile<Operand>* tiles, int64_t count, const Head& operands,
                       float* scores) const {
    if (kSplit || is_causal || sizes.dim > attention::kNarrow) {
      return attend_any_in_tiles(tiles, count, operands, scores);
    }
    const int64_t out = whole(sizes.dim) / amx::kTileColumns;
    if (out == 1) attend_narrow<1>(tiles, count, operands, scores);
    if (out == 2) attend_narrow<2>(tiles, count, operands, scores);
    if (out == 3) attend_narrow<3>(tiles, count, operands, scores);
    if (out == 4) attend_narrow<4>(tiles, count, operands, scores);
    for (int64_t t = 0; t < count; ++t) {
      if (!attention::are_in_range(tiles[t])) attend_any_in_tiles(tiles + t, 1, operands, scores);
    }
  }
#endif

  // `count` tiles of queries of one head over all its keys.
  void attend(int64_t head, Tile<Operand>* tiles, int64_t count, const Head& operands,
              float* scores) const {
    const int64_t batch = head / sizes.heads, h = head % sizes.heads;
    for (int64_t t = 0; t < count; ++t) {
      const T* rows = q.row(batch, h, tiles[t].first);
#if defined(SDFAST_TILES)
      if constexpr (kSplit) {
        pack_split_queries(rows, tiles[t]);
      } else
#endif
      {
        attention::pack_queries(rows, q.row_stride, tiles[t].count, sizes.dim, scale < 0,
                                tiles[t].q);
      }
    }
#if defined(SDFAST_TILES)
    if constexpr (kInTiles) {
      attend_in_tiles(tiles, count, operands, scores);
    } else
#endif
      attend_in_rows(head, tiles, count, operands, scores);
    for (int64_t t = 0; t < count; ++t) {
      const Tile<Operand>& tile = tiles[t];
      const float *reference = tile.stats, *sum = tile.stats + kColumns;
      attention::store_rows(
          tile.o, tile.count, sizes.dim,
          [&](int64_t first) { return 1.0f / simd::load(sum + first); },
          o.row(batch, h, tile.first), o.row_stride);
      for (int64_t i = 0; lse && i < tile.count; ++i) {
        lse[head * sizes.queries + tile.first + i] = reference[i] + std::log2(sum[i]);
      }
    }
  }

  void run() const {
    const int64_t all = sizes.batch * sizes.heads, threads = torch::stable::get_num_threads();
    const int64_t head_bytes = packed_head() * static_cast<int64_t>(sizeof(Operand));
    const int64_t group =
        in_place() ? all : std::clamp<int64_t>(kScratchBytes / head_bytes, 1, all);
    Scratch<Operand> packed(in_place() ? 0 : group * packed_head());
    const int64_t tiles = (sizes.queries + kColumns - 1) / kColumns;
    // A tile's result does not depend on those beside it.
    const int64_t most = std::clamp<int64_t>(tiles * group / (4 * threads), 1, kMostTiles);
    const int64_t blocks = (tiles + most - 1) / most;
    constexpr int64_t kPart = 512;  // of the keys, copied by one thread
    const int64_t parts = in_place() ? 0 : (sizes.keys + kPart - 1) / kPart;
    for (int64_t base = 0; base < all; base += group) {
      const int64_t heads = std::min(group, all - base);
      if (parts > 0) {
        torch::stable::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
          for (int64_t item = begin; item < end; ++item) {
            const int64_t head = item / parts, first = item % parts * kPart;
            pack(base + head, first, std::min(first + kPart, sizes.keys),
                 packed.get() + head * packed_head());
          }
        });
      }
      torch::stable::parallel_for(0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
        const gemm::Tiles<Operand> held;
        const int64_t q_size = depth_steps() * kColumns, o_size = whole(sizes.dim) * kColumns;
        Scratch<Operand> queries(most * q_size);
        Scratch<float> floats(most * (o_size + 2 * kColumns) + 3 * block_keys() * kColumns);
        Tile<Operand> tile[kMostTiles];
        for (int64_t t = 0; t < most; ++t) {
          float* at = floats.get() + t * (o_size + 2 * kColumns);
          tile[t] = {queries.get() + t * q_size, at, at + o_size, 0, 0};
        }
        float* scores = floats.get() + most * (o_size + 2 * kColumns);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t head = item / blocks, block = item % blocks;
          int64_t count = 0;
          for (int64_t t = block * most; t < std::min((block + 1) * most, tiles); ++t, ++count) {
            tile[count].first = t * kColumns;
            tile[count].count = std::min<int64_t>(kColumns, sizes.queries - t * kColumns);
          }
          attend(base + head, tile, count,
                 head_of(base + head, packed.get() + head * packed_head()), scores);
        }
      });
    }
  }
};

// lse: (B, heads, L), fp32, written; or null. split: see Attention.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, bool is_causal, double scale,
              bool split, float* lse) {
  const Sizes sizes = attention::sizes_of(q, k);
  const ScalarType dtype = q.scalar_type();
  const Tensor queries = attention::checked(q, "q", sizes, sizes.queries, dtype),
               keys = attention::checked(k, "k", sizes, sizes.keys, dtype),
               values = attention::checked(v, "v", sizes, sizes.keys, dtype);
  Tensor o = attention::new_by_token(sizes, sizes.queries, dtype);
  if (o.numel() == 0) return o;
  STD_TORCH_CHECK(sizes.keys > 0, "k: expected at least one key");
  const auto run = [&](auto element, auto operand) {
    using T = decltype(element);
    using attention::view_of;
    Attention<T, decltype(operand)>{sizes,
                                    view_of<const T>(queries),
                                    view_of<const T>(keys),
                                    view_of<const T>(values),
                                    view_of<T>(o),
                                    lse,
                                    is_causal,
                                    scale}
        .run();
  };
  if (split) {
    STD_TORCH_CHECK(dtype == ScalarType::Float, "q: expected fp32");
#if defined(SDFAST_TILES)
    run(float(), gemm::BFloat16Pair());
    return o;
#else
    STD_TORCH_CHECK(false, "q: is multiplied so only where there is AMX");
#endif
  }
  with_element_type(
      dtype, [&](auto element) { run(element, typename OperandOf<decltype(element)>::Type()); });
  return o;
}

// q: (B, heads, L, D). k, v: (B, heads, S, D). Returns a (B, heads, L, D) view of (B, L, heads, D).
Tensor attention_forward(Tensor q, Tensor k, Tensor v, bool is_causal, double scale) {
  return attend(q, k, v, is_causal, scale, false, nullptr);
}

// The same in fp32 on AMX tiles, whose factors are sums of two bf16.
Tensor attention_split(Tensor q, Tensor k, Tensor v, bool is_causal, double scale) {
  return attend(q, k, v, is_causal, scale, true, nullptr);
}

// Returns that and the base-2 logarithm of each query's sum of exp(scale q k): (B, heads, L), fp32.
std::tuple<Tensor, Tensor> attention_with_lse(Tensor q, Tensor k, Tensor v, bool is_causal,
                                              double scale) {
  const Sizes sizes = attention::sizes_of(q, k);
  Tensor lse = empty({sizes.batch, sizes.heads, sizes.queries}, ScalarType::Float);
  Tensor o = attend(q, k, v, is_causal, scale, false, lse.mutable_data_ptr<float>());
  if (o.numel() == 0) std::fill_n(lse.mutable_data_ptr<float>(), lse.numel(), 0.0f);
  return {o, lse};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_split", TORCH_BOX(&attention_split));
  m.impl("attention_with_lse", TORCH_BOX(&attention_with_lse));
}

}  // namespace
}  // namespace sdfast
