#pragma once

// What happens to scores beyond their product with the scale: soft cap, mask, ALiBi; and dropout of the weights.

#include <cstdint>

#include "attention_rows.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Reads what the mask adds to one row's scores in a tile, for columns in whole vectors: -inf is invisible. Returns
// whether it leaves any key visible.
inline bool read_mask(const AttentionParams& p, const Sequence& sequence, const Row& row, int64_t key, Range columns,
                      float* bias) {
  const int64_t stride = p.mask_strides[3];
  const int64_t offset =
      sequence.index * p.mask_strides[0] + row.head * p.mask_strides[1] + row.query * p.mask_strides[2] + key * stride;
  const auto read = [&](const auto* mask, auto convert) {
    const Vector hidden = broadcast(-kInfinity);
    bool visible = false;
    for (int64_t k = columns.first; k < columns.last; k += kLanes) {
      const Vector values = convert(read_vector(mask + offset + k * stride, stride, sequence.keys - key - k));
      visible = visible || any(greater(values, hidden)) || sum(values) != sum(values);
      store(bias + k, values);
    }
    return visible;
  };
  const auto same = [](Vector values) { return values; };
  switch (p.mask_kind) {
    case MaskKind::boolean:
      return read(static_cast<const int8_t*>(p.mask),
                  [](Vector values) { return select(equal(values, Vector{}), broadcast(-kInfinity), Vector{}); });
    case MaskKind::float32: return read(static_cast<const float*>(p.mask), same);
    case MaskKind::bfloat16: return read(static_cast<const BFloat16*>(p.mask), same);
    case MaskKind::float16: return read(static_cast<const Half*>(p.mask), same);
    default: return true;
  }
}

// Whether scores need adjust_scores, or only a factor.
inline bool has_adjustments(const AttentionParams& p) {
  return p.softcap != 0.0f || p.mask || p.alibi_slopes;
}

// Turns products query . key into scores, for columns in whole vectors. cap_slopes, where not null, receives the
// derivative of the soft cap.
inline void adjust_scores(const AttentionParams& p, const Row& row, int64_t key, Range columns, const float* bias,
                          float* scores, float* cap_slopes) {
  const Vector one = broadcast(1.0f);
  for (int64_t k = columns.first; k < columns.last; k += kLanes) {
    Vector score = load(scores + k) * p.scale;
    if (p.softcap != 0.0f) {
      const Vector capped = tanh(score / p.softcap);
      score = capped * p.softcap;
      if (cap_slopes) {
        store(cap_slopes + k, one - capped * capped);
      }
    }
    if (bias) {
      const Vector addend = load(bias + k), hidden = broadcast(-kInfinity);
      score = select(equal(addend, hidden), hidden, score + addend);
    }
    if (p.alibi_slopes) {
      const Vector away = broadcast(static_cast<float>(row.position - key - k)) - load(kRamp);
      score = score - broadcast(row.slope) * maximum(away, Vector{} - away);
    }
    store(scores + k, score);
  }
}

// Makes scores exponents of 2, relative to a maximum: the factor is log2(e), times the scale where scores are still
// products query . key. It is positive, and in two floats, since the rounding of one would err by the score times
// 2^-25. The maximum is taken away first: of equal scores, however large (a mask of -1e30), the exponent is 0.
struct Exponent {
  double factor;
  float high, low;  // both positive, so that a score of -inf stays that

  explicit Exponent(double positive) : factor(positive), high(static_cast<float>(positive)) {
    high = static_cast<double>(high) < factor ? high : __builtin_nextafterf(high, 0.0f);
    low = static_cast<float>(factor - static_cast<double>(high));
  }

  Vector operator()(Vector score, Vector maximum) const {
    const Vector below = score - maximum;
    return multiply_add(below, broadcast(high), below * broadcast(low));
  }

  // Logarithm of the sum of exponentials, of which total is relative to maximum.
  float lse(float maximum, float total) const {
    return static_cast<float>((maximum * factor + static_cast<double>(__builtin_log2f(total))) * kLn2);
  }
};

// Hides the columns of a row's scores, which are whole vectors, that lie outside `visible`.
inline void hide_scores(Range visible, Range columns, float* scores) {
  for (int64_t k = columns.first; k < columns.last; k += kLanes) {
    if (k < visible.first || k + kLanes > visible.last) {
      const Mask inside = lanes_between(visible.first - k, visible.last - k);
      store(scores + k, select(inside, load(scores + k), broadcast(-kInfinity)));
    }
  }
}

// Which weights dropout keeps: Philox4x32-10 (Salmon et al., 2011), so that any kernel in any order drops the same.
// Key: the seed. Counter of the weight of key j: (j / 64 * 16 + j % 16, query, query head, batch); the weight takes
// word j % 64 / 16 of the result.
class Dropout {
 public:
  explicit Dropout(const AttentionParams& p) : seed_(p.dropout_seed) {
    const double threshold = p.dropout_p * 4294967296.0;
    none_kept_ = threshold >= 4294967296.0;
    threshold_ = none_kept_ ? 0 : static_cast<uint32_t>(threshold);
    scale = none_kept_ ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
  }

  float scale;  // of the weights that are kept

  // Zeroes the dropped ones of a row's kKeyBlock weights.
  void drop(const Sequence& sequence, const Row& row, int64_t key, float* weights) const {
    for (int64_t lane = 0; lane < 16; lane += kLanes) {
      const uint32_t first = static_cast<uint32_t>(key / kKeyBlock * 16 + lane);
      UintVector words[4] = {ramp() + first, UintVector{} + static_cast<uint32_t>(row.query),
                             UintVector{} + static_cast<uint32_t>(row.head),
                             UintVector{} + static_cast<uint32_t>(sequence.index)};
      randomize(words);
      for (int64_t word = 0; word < 4; ++word) {
        float* target = weights + 16 * word + lane;
        store(target, none_kept_ ? Vector{} : select(at_least(words[word], threshold_), load(target), Vector{}));
      }
    }
  }

 private:
  static UintVector ramp() {
    UintVector result;
    for (uint32_t i = 0; i < kLanes; ++i) {
      result[i] = i;
    }
    return result;
  }

  void randomize(UintVector (&words)[4]) const {
    uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    const UintVector factor0 = UintVector{} + 0xD2511F53u, factor1 = UintVector{} + 0xCD9E8D57u;
    for (int round = 0; round < 10; ++round) {
      const UintVector high0 = multiply_high(words[0], factor0), low0 = words[0] * factor0;
      const UintVector high1 = multiply_high(words[2], factor1), low1 = words[2] * factor1;
      words[0] = high1 ^ words[1] ^ key0;
      words[1] = low1;
      words[2] = high0 ^ words[3] ^ key1;
      words[3] = low0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }

  uint64_t seed_;
  uint32_t threshold_;
  bool none_kept_;
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
