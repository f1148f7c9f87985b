// Products with a weight on AMX tiles: y = x Wᵀ for W (rows, taps x channels) as it lies, in bf16,
// or in fp32 as sums of two bf16.
//
// Algorithm. Tokens are the rows of the left operand and are read where they lie, or in a copy of
// a block of them; so sums come out token by token. W is what the tiles want in pairs of K: each
// panel of 32 of its rows is transposed, once for all calls (pack_all), or once a call: into a
// scratch that all threads share where tokens are many, else by the thread that multiplies all
// tokens by it. Sums of two by two tiles stay in tile registers over a chunk of K, whose operands
// fit in L2. Bytes: x and W read, y written. Limit: TDPBF16PS.
// A value of fp32 is split into its upper 8 bits and the 8 after them, each a bf16, and multiplied
// three times instead of four ("bf16x3"): a product is off by at most 2^-15, by 2^-18 in the mean,
// and sums of many by less. Steps of upper and of lower parts alternate, in the copy of the tokens
// and in the panels of W.
// Every element is one chain of additions over K in one order: the result does not depend on the
// number of threads.
#pragma once

#include <vector>

#include "cpu_gemm.h"
#include "cpu_scratch.h"
#include "cpu_transpose.h"

#if defined(SDFAST_TILES)

namespace sdfast::gemm::tiles {

using amx::kTileRows;
using simd::BFloat16;

constexpr int64_t kStep = 32;                   // values of K that a tile holds
constexpr int64_t kPanelRows = 2 * kTileRows;   // of W, beside two tiles of tokens
constexpr int64_t kGroupRows = 2 * kPanelRows;  // of W, whose sums are finished together
constexpr int64_t kPanelStep = kPanelRows * kStep;
constexpr int64_t kChunkSteps = 90;          // of K: a panel of W and the tokens share L2
constexpr int64_t kSplitSteps = 20;          // the same where values are split and tokens lie apart
constexpr int64_t kSumsBytes = 512 << 10;    // of sums that wait for the next chunk
constexpr int64_t kGroupsBytes = 512 << 10;  // of groups of W that tokens meet from L2
constexpr int64_t kManyTokens = 1024;        // beyond which W is transposed by all threads

// Tokens that lie evenly apart. Tiles may reach beyond the last one of a line, into memory that is
// there.
struct Lines {
  const BFloat16* first;        // under the first tap
  int64_t count, length;        // lines; tokens of each
  int64_t line_stride, stride;  // values from a line, from a token to the next
  int64_t pitch, width;         // the first `width` of each `pitch` tokens of a line are there
  int64_t token;                // the number of the first

  int64_t line_tiles() const { return (length + kTileRows - 1) / kTileRows; }
  int64_t all_tiles() const { return count * line_tiles(); }
  const BFloat16* tile(int64_t index) const {
    return first + index / line_tiles() * line_stride + index % line_tiles() * kTileRows * stride;
  }
  // Calls work(token, count, row of the tile) for each run of tokens of a tile that are there.
  template <typename Work>
  void for_each_run(int64_t index, const Work& work) const {
    const int64_t line = index / line_tiles(), begin = index % line_tiles() * kTileRows;
    const int64_t end = std::min<int64_t>(begin + kTileRows, length);
    const int64_t line_tokens = (length + pitch - 1) / pitch * width;
    for (int64_t i = begin; i < end;) {
      const int64_t column = i % pitch, run = std::min(width - column, end - i);
      if (run > 0) work(token + line * line_tokens + i / pitch * width + column, run, i - begin);
      i += run > 0 ? run : pitch - column;
    }
  }
};

// Whether y is written past the caches: more than L2 holds.
template <typename T>
bool streams(const T* y, int64_t tokens, int64_t width) {
  return simd::streams(y, tokens, width, 4 << 20);
}

// How many bf16 a value is multiplied as.
template <typename T>
constexpr int64_t kParts = std::is_same_v<T, float> ? 2 : 1;

// What a row of `values` takes in a copy: whole cache lines, an odd number of them, so that rows of
// a tile do not crowd a set.
template <typename T>
int64_t copied_values(int64_t values) {
  return ((values + kStep - 1) / kStep * kParts<T> | 1) * kStep;
}

// The values of a row, completed with zeros.
inline void copy_values(const BFloat16* from, int64_t values, BFloat16* to) {
  std::memcpy(to, from, values * sizeof *to);
  std::fill(to + values, to + copied_values<BFloat16>(values), BFloat16{});
}
// Steps of upper parts and of lower parts in turns.
inline void copy_values(const float* from, int64_t values, BFloat16* to) {
  for (int64_t step = 0; step < values; step += kStep) {
    for (int64_t i = step; i < step + kStep; i += kLanes, to += kLanes) {
      const int64_t there = std::clamp<int64_t>(values - i, 0, kLanes);
      const Vec v =
          there == kLanes ? simd::load(from + i) : simd::load(from + i, static_cast<int>(there));
      const simd::Parts parts = simd::split(v);
      std::memcpy(static_cast<void*>(to), &parts.upper, sizeof parts.upper);
      std::memcpy(static_cast<void*>(to + kStep), &parts.lower, sizeof parts.lower);
    }
    to += kStep;
  }
}

// What is multiplied. A gated product pairs row i of W with row i + rows: W has twice the rows.
struct Product {
  int64_t rows, channels;  // of W, of a tap
  int64_t tap_rows = 1, tap_columns = 1;
  // Values from a token to where its channels begin under each tap.
  int64_t tap_row_stride = 0, tap_stride = 0;
  bool gated = false;
  bool split = false;  // whether values are sums of two bf16
  // Whether neighbouring tokens read the same lines, so that a panel meets them all while it is
  // near.
  bool overlaps = false;
  int64_t chunk_steps = kChunkSteps;

  // The same of fp32.
  Product splits() const {
    Product p = *this;
    p.split = true;
    p.chunk_steps = overlaps ? kChunkSteps : kSplitSteps;
    return p;
  }

  int64_t taps() const { return tap_rows * tap_columns; }
  int64_t dim() const { return taps() * channels; }
  int64_t steps() const { return (channels + kStep - 1) / kStep; }  // of a tap
  int64_t halves() const { return gated ? 2 : 1; }
  int64_t parts() const { return split ? 2 : 1; }  // of a value
  int64_t groups() const { return (rows + kGroupRows - 1) / kGroupRows; }
  int64_t group_rows(int64_t group) const {
    return std::min(kGroupRows, rows - group * kGroupRows);
  }
  int64_t group_panels(int64_t group) const {  // of a half
    return (group_rows(group) + kPanelRows - 1) / kPanelRows;
  }
  // K is cut where it is long: so many steps of each tap make a chunk.
  int64_t chunks() const {
    return std::min(steps(), (steps() * taps() + chunk_steps - 1) / chunk_steps);
  }
  int64_t first_step(int64_t chunk) const { return chunk * steps() / chunks(); }
  // Values of a group of W, transposed, of so many steps of each tap.
  int64_t packed(int64_t count) const { return halves() * 2 * panel(count); }
  int64_t panel(int64_t count) const { return taps() * count * parts() * kPanelStep; }
  int64_t packed_at(int64_t group, int64_t chunk) const {
    return group * packed(steps()) + packed(first_step(chunk));
  }
  int64_t packed() const { return groups() * packed(steps()); }
  // Whether a pair's sums wait while other pairs are multiplied; else those of one are in use.
  bool sums_wait() const { return overlaps || chunks() > 1; }
  // Values of the sums of pairs of tiles with a group of W.
  int64_t sums(int64_t pairs) const {
    return (sums_wait() ? pairs : 1) * halves() * kPanelRows * kGroupRows;
  }
};

// kTileRows rows of W, `stride` apart, kStep values of each: as pairs by rows, columns of a panel.
// `there` of the rows and `values` exist, the others are zeros. What lies `ahead` is fetched.
inline void transpose_tile(const BFloat16* from, int64_t stride, int64_t there, int64_t values,
                           int64_t ahead, BFloat16* to) {
  Vec rows[kLanes];
  if (there == kTileRows && values >= kStep) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      std::memcpy(&rows[i], from + i * stride, sizeof(Vec));
      simd::prefetch(from + i * stride + ahead);
    }
  } else {
    std::memset(rows, 0, sizeof rows);
    for (int i = 0; i < there; ++i) {
      std::memcpy(&rows[i], from + i * stride, std::min(values, kStep) * sizeof(BFloat16));
    }
  }
  simd::transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(to + i * kPanelRows * 2, &rows[i], sizeof(Vec));
}

inline void transpose_parts(const BFloat16* from, int64_t stride, int64_t there, int64_t values,
                            int64_t ahead, BFloat16* to) {
  transpose_tile(from, stride, there, values, ahead, to);
}
// Upper parts, then lower ones.
inline void transpose_parts(const float* from, int64_t stride, int64_t there, int64_t values,
                            int64_t, BFloat16* to) {
  BFloat16 parts[kTileRows][2 * kStep];
  for (int64_t i = 0; i < there; ++i) {
    copy_values(from + i * stride, std::min(values, kStep), parts[i]);
  }
  for (int64_t part = 0; part < 2; ++part) {
    transpose_tile(parts[0] + part * kStep, 2 * kStep, there, kStep, 0, to + part * kPanelStep);
  }
}

// W: its rows as they lie, or packed by pack_all.
template <typename T>
struct Weight {
  const T* values;
  const BFloat16* packed = nullptr;

  const BFloat16* all_packed() const { return packed; }

  // A chunk of a group of W: for each half and panel (tap rows, steps, tap columns, parts,
  // kPanelStep).
  void pack(const Product& p, int64_t group, int64_t chunk, BFloat16* to) const {
    const int64_t first = p.first_step(chunk), last = p.first_step(chunk + 1);
    // A row of taps, or of a matrix some steps, before they are read.
    const int64_t ahead = p.tap_rows > 1 ? p.tap_columns * p.channels : 8 * kStep;
    for (int64_t half = 0; half < p.halves(); ++half) {
      for (int64_t panel = 0; panel < 2; ++panel) {
        const int64_t row = group * kGroupRows + panel * kPanelRows;
        const T* rows = values + (half * p.rows + row) * p.dim();
        for (int64_t y = 0; y < p.tap_rows; ++y) {
          for (int64_t step = first; step < last; ++step) {
            for (int64_t x = 0; x < p.tap_columns; ++x, to += p.parts() * kPanelStep) {
              const int64_t value = (y * p.tap_columns + x) * p.channels + step * kStep;
              for (int64_t i = 0; i < kPanelRows; i += kTileRows) {
                transpose_parts(rows + i * p.dim() + value, p.dim(),
                                std::clamp<int64_t>(p.rows - row - i, 0, kTileRows),
                                p.channels - step * kStep, ahead, to + 2 * i);
              }
            }
          }
        }
      }
    }
  }
};

template <typename W>
void pack_all(const Product& p, const W& weight, BFloat16* to) {
  const int64_t chunks = p.chunks();
  torch::stable::parallel_for(0, p.groups() * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      weight.pack(p, i / chunks, i % chunks, to + p.packed_at(i / chunks, i % chunks));
    }
  });
}

// c (kTileRows or twice as many, kPanelRows), kGroupRows apart, (+)= a b over taps and steps: a at
// `first` and at `second`.
template <bool kTwo, bool kSplit>
inline __attribute__((noinline)) void multiply_tiles(const Product& p, const BFloat16* first,
                                                     const BFloat16* second, int64_t stride,
                                                     int64_t steps, const BFloat16* b, float* c,
                                                     bool accumulate) {
  constexpr int64_t kSums = kGroupRows * sizeof(float), kPairs = kPanelRows * 4;
  constexpr int64_t kStepParts = kSplit ? 2 : 1;
  // GCC's tile loads do not say that they read memory.
  __asm__ volatile("" ::: "memory");
  if (accumulate) {
    amx::load_sums(c, kSums, kTwo);
  } else {
    amx::zero_sums();
  }
  const int64_t apart = stride * sizeof(BFloat16);
  for (int64_t y = 0; y < p.tap_rows; ++y) {
    for (int64_t step = 0; step < steps; ++step) {
      // Neighbouring taps read the same lines, but of one token.
      const BFloat16* from = first + y * p.tap_row_stride + step * kStepParts * kStep;
      const BFloat16* other = second + y * p.tap_row_stride + step * kStepParts * kStep;
      for (int64_t x = 0; x < p.tap_columns; ++x) {
        if constexpr (kSplit) {
          amx::multiply_split_step<true>(from, other, apart, kStep, b, b + 2 * kTileRows, kPairs,
                                         kPanelStep, kTwo);
        } else {
          amx::multiply_step<true>(from, other, apart, b, b + 2 * kTileRows, kPairs, kTwo);
        }
        b += kStepParts * kPanelStep;
        from += p.tap_stride;
        other += p.tap_stride;
      }
    }
  }
  amx::store_sums(c, kSums, kTwo);
  __asm__ volatile("" ::: "memory");
}

// Two tiles of tokens, or the last one.
struct Pair {
  const Lines* lines;
  int64_t index;  // of the first in its lines
  const BFloat16 *first, *second;
  bool two;

  // Calls work(token, count, row of the pair's sums) for the tokens that are there.
  template <typename Work>
  void for_each_run(const Work& work) const {
    for (int64_t i = 0; i < (two ? 2 : 1); ++i) {
      lines->for_each_run(index + i, [&](int64_t token, int64_t count, int64_t row) {
        work(token, count, i * kTileRows + row);
      });
    }
  }
};

inline std::vector<Pair> pairs_of(const std::vector<Lines>& blocks) {
  std::vector<Pair> pairs;
  for (const Lines& lines : blocks) {
    const int64_t count = lines.all_tiles();
    for (int64_t i = 0; i < count; i += 2) {
      const bool two = i + 1 < count;
      pairs.push_back({&lines, i, lines.tile(i), lines.tile(two ? i + 1 : i), two});
    }
  }
  return pairs;
}

// Groups [first, end) of W, a chunk of each: that of the first at `packed`, of others as packed_at.
struct Groups {
  int64_t first, end, chunk;
  const BFloat16* packed;
};

// sums (+)= the pairs' products with a chunk of groups of W; finished after the last chunk. Tokens
// that overlap meet a panel one after another; else each pair meets all panels of all groups, which
// come from L2, while it stays in L1, and writes neighbouring values of its tokens. sums:
// p.sums(pairs) of each group, where they wait, `group_sums` from one to the next.
template <typename Finish>
void multiply_groups(const Product& p, const std::vector<Pair>& pairs, const Groups& groups,
                     float* sums, int64_t group_sums, const Finish& finish) {
  constexpr int64_t kHalfSums = kPanelRows * kGroupRows;
  const int64_t first_step = p.first_step(groups.chunk);
  const int64_t steps = p.first_step(groups.chunk + 1) - first_step;
  const int64_t count = static_cast<int64_t>(pairs.size()), before = first_step * p.parts() * kStep;
  const auto multiply = [&](int64_t group, int64_t i, int64_t j) {
    const int64_t row = group * kGroupRows, rows = p.group_rows(group);
    const int64_t panels = p.group_panels(group), half = i / panels, panel = i % panels;
    const Pair& pair = pairs[j];
    const BFloat16* b = groups.packed + (group - groups.first) * p.packed(p.steps()) +
                        (half * 2 + panel) * p.panel(steps);
    float* c = sums;
    if (p.sums_wait()) c += (group - groups.first) * group_sums + j * p.halves() * kHalfSums;
    const bool finishes = groups.chunk + 1 == p.chunks() && i + 1 == p.halves() * panels;
    if (finishes) {
      pair.for_each_run(
          [&](int64_t token, int64_t there, int64_t) { finish.fetch(token, there, row, rows); });
    }
    const auto tile = p.split
                          ? pair.two ? &multiply_tiles<true, true> : &multiply_tiles<false, true>
                      : pair.two ? &multiply_tiles<true, false>
                                 : &multiply_tiles<false, false>;
    tile(p, pair.first + before, pair.second + before, pair.lines->stride, steps, b,
         c + half * kHalfSums + panel * kPanelRows, groups.chunk > 0);
    if (finishes) {
      pair.for_each_run([&](int64_t token, int64_t there, int64_t r) {
        const float* values = c + r * kGroupRows;
        finish(token, there, row, rows, Sums{values, values + kHalfSums, kGroupRows});
      });
    }
  };
  if (p.overlaps) {
    for (int64_t group = groups.first; group < groups.end; ++group) {
      for (int64_t i = 0; i < p.halves() * p.group_panels(group); ++i) {
        for (int64_t j = 0; j < count; ++j) multiply(group, i, j);
      }
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t group = groups.first; group < groups.end; ++group) {
        for (int64_t i = 0; i < p.halves() * p.group_panels(group); ++i) multiply(group, i, j);
      }
    }
  }
}

// source: tokens() and blocks() of them, which depend on the shape alone; copied(), values of the
// copy of a block; most_tiles() of a block; lines(block, copy) gives a block, where it lies or
// copied. weight: (rows, taps, channels), twice the rows where gated; or packed. finish(token,
// count, row, rows, sums) takes Sums of rows [row, row + rows), finish.fetch what it will touch.
template <typename W, typename Source, typename Finish>
void multiply_weights(const Product& p, const W& weight, const Source& source,
                      const Finish& finish) {
  const bool many = source.tokens() > kManyTokens;
  const BFloat16* packed = weight.all_packed();
  const bool pack_first = many && !packed, pack_here = !many && !packed;
  const int64_t blocks = source.blocks(), groups = p.groups(), chunks = p.chunks();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t item_blocks = many ? 1 : blocks;
  const int64_t group_sums = p.sums(item_blocks * ((source.most_tiles() + 1) / 2));
  // A block of many is multiplied by all of W, where there are blocks enough.
  const int64_t enough = threads == 1 ? 1 : (4 * threads + blocks - 1) / blocks;
  // Groups whose sums wait together for the next chunk, or that many tokens meet together.
  const int64_t sums_fit = kSumsBytes / (group_sums * static_cast<int64_t>(sizeof(float)));
  const int64_t fit = kGroupsBytes / (p.packed(p.steps()) * static_cast<int64_t>(sizeof(BFloat16)));
  int64_t together = 1;
  if (chunks > 1) {
    together = sums_fit;
  } else if (many && !p.overlaps) {
    together = std::min(fit, groups / enough);
  }
  const int64_t span = std::clamp<int64_t>(together, 1, groups);
  const int64_t spans = (groups + span - 1) / span;

  const Scratch<BFloat16> packed_here(pack_first ? p.packed() : 0);
  if (pack_first) pack_all(p, weight, packed_here.get());
  if (!packed) packed = packed_here.get();
  // Few tokens are made ready once for all threads.
  const Scratch<BFloat16> copies(many ? 0 : blocks * source.copied());
  std::vector<Lines> all(many ? 0 : blocks);
  torch::stable::parallel_for(0, static_cast<int64_t>(all.size()), 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) all[i] = source.lines(i, copies.get() + i * source.copied());
  });
  const std::vector<Pair> all_pairs = pairs_of(all);
  const int64_t splits = many ? std::min(enough, spans) : spans;
  share((many ? blocks : 1) * splits, [&](const auto& next) {
    const amx::Tiles tiles;
    const Scratch<BFloat16> copy(many ? source.copied() : 0);
    const Scratch<BFloat16> panels(pack_here ? p.packed((p.steps() + chunks - 1) / chunks) : 0);
    const Scratch<float> sums(group_sums * span);
    std::vector<Lines> block;
    std::vector<Pair> own_pairs;
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t split = item % splits;
      if (many) {
        block.assign(1, source.lines(item / splits, copy.get()));
        own_pairs = pairs_of(block);
      }
      const std::vector<Pair>& pairs = many ? own_pairs : all_pairs;
      for (int64_t s = split * spans / splits; s < (split + 1) * spans / splits; ++s) {
        const int64_t first = s * span, end = std::min(first + span, groups);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          if (!pack_here) {
            const BFloat16* b = packed + p.packed_at(first, chunk);
            multiply_groups(p, pairs, {first, end, chunk, b}, sums.get(), group_sums, finish);
            continue;
          }
          for (int64_t group = first; group < end; ++group) {
            weight.pack(p, group, chunk, panels.get());
            multiply_groups(p, pairs, {group, group + 1, chunk, panels.get()},
                            sums.get() + (group - first) * group_sums, group_sums, finish);
          }
        }
      }
    }
    simd::finish_streams();
  });
}

// Rows of a matrix as tokens, their values adjacent.
template <typename T>
struct Tokens {
  const T* x;
  int64_t count, stride, channels;

  int64_t tokens() const { return count; }
  int64_t block() const {
    return std::clamp<int64_t>(kBlockBytes / sizeof(T) / channels, 128, 512) / kPanelRows *
           kPanelRows;
  }
  int64_t blocks() const { return (count + block() - 1) / block(); }
  int64_t most_tiles() const { return (std::min(block(), count) + kTileRows - 1) / kTileRows; }
  int64_t copy_stride() const { return copied_values<T>(channels); }
  bool lies_ready(int64_t tokens) const {
    return std::is_same_v<T, BFloat16> && channels % kStep == 0 && tokens % kTileRows == 0 &&
           !crowds(stride * sizeof *x);
  }
  int64_t copied() const {
    if (lies_ready(count)) return 0;
    return most_tiles() * kTileRows * copy_stride();
  }
  Lines lines(int64_t index, BFloat16* copy) const {
    const int64_t first = index * block(), size = std::min(block(), count - first);
    const T* from = x + first * stride;
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (lies_ready(size)) return {from, 1, size, 0, stride, size, size, first};
    }
    const int64_t apart = copy_stride();
    for (int64_t t = 0; t < size; ++t) {
      copy_values(from + t * stride, channels, copy + t * apart);
    }
    return {copy, 1, size, 0, apart, size, size, first};
  }
};

}  // namespace sdfast::gemm::tiles

#endif
