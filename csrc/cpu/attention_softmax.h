#pragma once

// What happens to the scores of one query row and one block of keys between attention's two matrix products.

#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../common/dtypes.h"
#include "attention_tiles.h"

namespace gpt4fast::cpu {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Reads one row of the mask. Returns whether it leaves any key visible.
template <typename mask_t>
bool read_mask(const mask_t* mask, int64_t stride, int64_t first, int64_t last, float* bias) {
  bool any = false;
  for (int64_t k = first; k < last; ++k) {
    if constexpr (std::is_same_v<mask_t, uint8_t>) {
      bias[k] = mask[k * stride] ? 0.0f : -kInfinity;
    } else {
      bias[k] = static_cast<float>(mask[k * stride]);
    }
    any |= !(bias[k] == -kInfinity);
  }
  return any;
}

inline bool read_mask(const AttentionForwardParams& p, int64_t batch, const Row& row, int64_t key, float* bias) {
  const int64_t offset = batch * p.mask_strides[0] + row.head * p.mask_strides[1] + row.query * p.mask_strides[2] +
                         key * p.mask_strides[3];
  const auto read = [&](const auto* mask) {
    return read_mask(mask + offset, p.mask_strides[3], row.first, row.last, bias);
  };
  switch (p.mask_kind) {
    case MaskKind::boolean: return read(static_cast<const uint8_t*>(p.mask));
    case MaskKind::float32: return read(static_cast<const float*>(p.mask));
    case MaskKind::bfloat16: return read(static_cast<const torch::headeronly::BFloat16*>(p.mask));
    case MaskKind::float16: return read(static_cast<const torch::headeronly::Half*>(p.mask));
    default: return true;
  }
}

// Turns the scores of one row into probabilities relative to the running maximum; returns the factor for what was
// summed before.
inline float soften(const AttentionForwardParams& p, Row& row, int64_t key, int64_t keys, const float* bias,
                    float* scores) {
  const int64_t width = round_up(keys);
  if (p.softcap != 0.0f) {
    for (int64_t k = 0; k < width; k += kLanes) {
      store(scores + k, simd::tanh(load(scores + k) / p.softcap) * p.softcap);
    }
  }
  if (bias) {
    for (int64_t k = row.first; k < row.last; ++k) {
      scores[k] = bias[k] == -kInfinity ? -kInfinity : scores[k] + bias[k];
    }
  }
  if (p.alibi_slopes) {
    const float distance = static_cast<float>(row.position - key);
    for (int k = static_cast<int>(row.first); k < row.last; ++k) {
      scores[k] -= row.slope * std::fabs(distance - static_cast<float>(k));
    }
  }
  std::fill(scores, scores + row.first, -kInfinity);
  std::fill(scores + row.last, scores + width, -kInfinity);

  Vector maxima = broadcast(row.maximum);
  for (int64_t k = 0; k < width; k += kLanes) {
    maxima = simd::maximum(maxima, load(scores + k));
  }
  const float before = row.maximum;
  row.maximum = simd::largest(maxima);
  const Vector level = broadcast(row.maximum == -kInfinity ? 0.0f : row.maximum);
  Vector totals = {};
  for (int64_t k = 0; k < width; k += kLanes) {
    const Vector probability = simd::exp(load(scores + k) - level);
    totals += probability;
    store(scores + k, probability);
  }
  const float rescale = before == row.maximum ? 1.0f : simd::exp(broadcast(before) - level)[0];
  row.total = row.total * rescale + simd::sum(totals);
  return rescale;
}

}  // namespace gpt4fast::cpu
