#pragma once

// How the work of attention's backward pass is divided into tasks. Any division gives the same bits.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

#include "attention_backward.h"
#include "attention_rows.h"

namespace gpt4fast::cpu {

// Matrix products that each pair of a query row and a key takes: for all gradients at once, and, where a head is split
// among threads, for those of keys and values and for those of queries, which both need weights and scores' gradients.
inline constexpr double kAllProducts = 5, kKeyProducts = 4, kQueryProducts = 3;

// One sequence and key/value head.
struct BackwardHead {
  int64_t sequence, kv_head;
  std::vector<double> block_pairs;  // about how many keys the rows of each block see
  std::vector<double> tile_pairs;   // about how many rows see the keys of each tile
  double pairs;
};

inline BackwardHead describe_head(const AttentionBackwardParams& p, int64_t b) {
  const simd::Sequence sequence(p, b);
  const int64_t rows = sequence.queries * (p.query_heads / p.kv_heads);
  BackwardHead head{b, 0, {}, std::vector<double>((sequence.keys + kBackwardTileKeys - 1) / kBackwardTileKeys), 0};
  for (int64_t row = 0; row < rows; row += kBackwardBlockRows) {
    const int64_t count = std::min(kBackwardBlockRows, rows - row);
    const simd::Row ends[2] = {{p, sequence, 0, row}, {p, sequence, 0, row + count - 1}};
    double pairs = 0;
    for (const simd::Row& end : ends) {
      pairs += double(count) / 2 * double(std::max<int64_t>(end.end - end.begin, 0));
    }
    const simd::Range tiles = simd::visible_tiles(ends, 2);
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      head.tile_pairs[tile] += pairs / double(tiles.last - tiles.first);
    }
    head.block_pairs.push_back(pairs);
    head.pairs += pairs;
  }
  head.pairs += double(rows + sequence.keys);  // what reading and writing them costs
  return head;
}

// About when the last of the threads would finish if the first heads were split and each of the others had one thread.
inline double finishing_time(const std::vector<BackwardHead>& heads, size_t split, int64_t threads) {
  std::priority_queue<double, std::vector<double>, std::greater<>> times;
  for (int64_t thread = 0; thread < threads; ++thread) {
    times.push(0);
  }
  double total = 0, latest = 0;
  for (size_t i = 0; i < heads.size(); ++i) {
    if (i < split) {
      total += heads[i].pairs * (kKeyProducts + kQueryProducts);
      continue;
    }
    const double time = times.top() + heads[i].pairs * kAllProducts;
    times.pop();
    times.push(time);
    latest = std::max(latest, time);
    total += heads[i].pairs * kAllProducts;
  }
  return std::max(latest, total / double(threads));
}

// Ranges of neighbours, each of about `share` or of one.
inline std::vector<simd::Range> split_evenly(const std::vector<double>& costs, double share) {
  std::vector<simd::Range> ranges;
  double before = 0;
  for (size_t i = 0; i < costs.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    if (ranges.empty() || before + costs[i] / 2 > share * double(ranges.size())) {
      ranges.push_back({index, index});
    }
    ranges.back().last = index + 1;
    before += costs[i];
  }
  return ranges;
}

inline std::vector<AttentionBackwardTask> plan_backward(const AttentionBackwardParams& p, int64_t threads) {
  std::vector<BackwardHead> heads;
  for (int64_t b = 0; p.kv_heads > 0 && b < p.batch; ++b) {
    BackwardHead head = describe_head(p, b);
    for (head.kv_head = 0; head.kv_head < p.kv_heads; ++head.kv_head) {
      heads.push_back(head);
    }
  }
  std::stable_sort(heads.begin(), heads.end(),
                   [](const BackwardHead& a, const BackwardHead& b) { return a.pairs > b.pairs; });
  size_t split = 0;
  double finish = finishing_time(heads, 0, threads);
  for (size_t i = 1; heads.size() < size_t(8 * threads) && i <= std::min(heads.size(), size_t(threads)); ++i) {
    const double time = finishing_time(heads, i, threads);
    if (time < finish) {
      split = i;
      finish = time;
    }
  }

  std::vector<std::pair<double, AttentionBackwardTask>> tasks;
  for (size_t i = 0; i < heads.size(); ++i) {
    const BackwardHead& head = heads[i];
    const simd::Sequence sequence(p, head.sequence);
    const int64_t rows = sequence.queries * (p.query_heads / p.kv_heads), tiles = int64_t(head.tile_pairs.size());
    const AttentionBackwardTask all = {head.sequence, head.kv_head, 0, rows, 0, tiles, true, true};
    if (i >= split) {
      tasks.push_back({head.pairs * kAllProducts, all});
      continue;
    }
    const double piece = finish / 4;  // so that threads finish at about the same time
    const auto cost_of = [](const std::vector<double>& costs, simd::Range range) {
      return std::accumulate(costs.begin() + range.first, costs.begin() + range.last, 0.0);
    };
    for (const simd::Range& range : split_evenly(head.tile_pairs, piece / kKeyProducts)) {
      AttentionBackwardTask task = all;
      task.first_tile = range.first;
      task.last_tile = range.last;
      task.gradient_of_queries = false;
      tasks.push_back({kKeyProducts * cost_of(head.tile_pairs, range), task});
    }
    for (const simd::Range& range : split_evenly(head.block_pairs, piece / kQueryProducts)) {
      AttentionBackwardTask task = all;
      task.first_row = range.first * kBackwardBlockRows;
      task.last_row = std::min(range.last * kBackwardBlockRows, rows);
      task.gradient_of_keys = false;
      tasks.push_back({kQueryProducts * cost_of(head.block_pairs, range), task});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<AttentionBackwardTask> ordered;
  for (const auto& [cost, task] : tasks) {
    ordered.push_back(task);
  }
  return ordered;
}

// An axis of the mask's gradient in pieces of step, or, where it is broadcast, in one piece.
inline std::vector<simd::Range> pieces_of(int64_t length, int64_t step, bool is_broadcast) {
  std::vector<simd::Range> pieces;
  if (is_broadcast) {
    pieces.push_back({0, length});
  }
  for (int64_t first = 0; !is_broadcast && first < length; first += step) {
    pieces.push_back({first, std::min(first + step, length)});
  }
  return pieces;
}

inline std::vector<MaskGradientTask> plan_mask(const AttentionBackwardParams& p, int64_t batches, int64_t heads) {
  const int64_t tiles = (p.kv_length + kBackwardTileKeys - 1) / kBackwardTileKeys;
  std::vector<MaskGradientTask> tasks;
  for (int64_t batch = 0; batch < batches; ++batch) {
    for (int64_t head = 0; head < heads; ++head) {
      for (const auto& queries : pieces_of(p.query_length, kBackwardBlockRows, p.grad_mask_strides[2] == 0)) {
        for (const auto& range : pieces_of(tiles, 1, p.grad_mask_strides[3] == 0)) {
          tasks.push_back({batch, head, queries.first, queries.last, range.first, range.last});
        }
      }
    }
  }
  return tasks;
}

}  // namespace gpt4fast::cpu
