// Batch norm with the batch's statistics and the activation behind it, forward and backward. A channel at a time (with
// channels last: a vector of them): its statistics and then its outputs, while its numbers are in the cache. Torch's
// separate operators read and write memory eight times for what takes three, and backward ten for four. Compiled once
// per CPU level.
#include "../batch_norm.h"

#include "simd/simd.h"
#include "vector_activation.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

// Sums of two vectors per number, in double; float32 runs are short, as torch's are.
class Sums {
 public:
  void add(Vector first, Vector second) {
    first_ = first_ + first;
    second_ = second_ + second;
    if (++count_ == kRun) {
      flush();
    }
  }

  // Of each lane; flush first.
  double first[kLanes] = {}, second[kLanes] = {};

  void flush() {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      first[lane] += static_cast<double>(first_[lane]);
      second[lane] += static_cast<double>(second_[lane]);
    }
    first_ = second_ = Vector{};
    count_ = 0;
  }

  // One channel fills all lanes: each then has the sum of all.
  void merge_lanes() {
    double totals[2] = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      totals[0] += first[lane];
      totals[1] += second[lane];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      first[lane] = totals[0];
      second[lane] = totals[1];
    }
  }

 private:
  static constexpr int kRun = 64;

  Vector first_ = {}, second_ = {};
  int count_ = 0;
};

template <typename scalar_t>
class Kernel {
 public:
  explicit Kernel(const BatchNormParams& params) : p(params) {}

  void forward(int64_t unit) {
    const auto* input = static_cast<const scalar_t*>(p.input);
    auto* out = static_cast<scalar_t*>(p.out);
    // Sums of differences from the first number: of the numbers themselves they would cancel out.
    const Vector origin = p.channels_last ? load_part(input + unit * kLanes, channels_of(unit))
                                          : broadcast(to_float(input + unit * p.pixels));
    Sums sums;
    for_each_vector(unit, [&](int64_t offset, int64_t count) {
      const Vector difference = load_part(input + offset, count) - origin;
      const Vector valid = count == kLanes ? difference : select(lanes_between(0, count), difference, Vector{});
      sums.add(valid, valid * valid);
    });
    finish(sums);
    const auto total = static_cast<double>(p.batch * p.pixels);
    float scales[kLanes], offsets[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t c = channel_of(unit, lane);
      const double shift = sums.first[lane] / total;
      const double mean = static_cast<double>(origin[lane]) + shift;
      const double variance = most(sums.second[lane] / total - shift * shift, 0.0);
      const double rstd = 1.0 / __builtin_sqrt(variance + p.eps);
      scales[lane] = offsets[lane] = 0.0f;
      if (c < p.channels) {
        p.mean[c] = static_cast<float>(mean);
        p.variance[c] = static_cast<float>(variance);
        p.rstd[c] = static_cast<float>(rstd);
        scales[lane] = static_cast<float>(rstd * static_cast<double>(p.weight[c]));
        offsets[lane] = static_cast<float>(static_cast<double>(p.bias[c]) - mean * rstd * static_cast<double>(p.weight[c]));
      }
    }
    const Vector scale = load(scales), offset = load(offsets);
    with_activation(p.activation, [&](auto activation) {
      for_each_vector(unit, [&](int64_t at, int64_t count) {
        const Vector value = multiply_add(load_part(input + at, count), scale, offset);
        store_part(out + at, activation(value, p.negative_slope), count);
      });
    });
  }

  void backward(int64_t unit) {
    const auto* input = static_cast<const scalar_t*>(p.input);
    const auto* grad_out = static_cast<const scalar_t*>(p.grad_out);
    auto* grad_input = static_cast<scalar_t*>(p.grad_input);
    float values[4][kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t c = channel_of(unit, lane);
      const bool valid = c < p.channels;
      values[0][lane] = valid ? p.mean[c] : 0.0f;
      values[1][lane] = valid ? p.rstd[c] : 0.0f;
      values[2][lane] = valid ? p.weight[c] : 0.0f;
      values[3][lane] = valid ? p.bias[c] : 0.0f;
    }
    const Vector mean = load(values[0]), rstd = load(values[1]), weight = load(values[2]), bias = load(values[3]);
    with_activation_slope(p.activation, [&](auto slope) {
      // The gradient before the activation, and the normalised input.
      const auto read = [&](int64_t at, int64_t count, Vector& normal) {
        normal = (load_part(input + at, count) - mean) * rstd;
        return load_part(grad_out + at, count) * slope(multiply_add(normal, weight, bias), p.negative_slope);
      };
      Sums sums;
      for_each_vector(unit, [&](int64_t at, int64_t count) {
        Vector normal;
        const Vector grad = read(at, count, normal);  // 0 where there is no number
        sums.add(grad, grad * normal);
      });
      finish(sums);
      const double total = static_cast<double>(p.batch * p.pixels);
      float means[2][kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t c = channel_of(unit, lane);
        means[0][lane] = static_cast<float>(sums.first[lane] / total);
        means[1][lane] = static_cast<float>(sums.second[lane] / total);
        if (c < p.channels) {
          p.grad_bias[c] = static_cast<float>(sums.first[lane]);
          p.grad_weight[c] = static_cast<float>(sums.second[lane]);
        }
      }
      const Vector mean_grad = load(means[0]), mean_product = load(means[1]), factor = weight * rstd;
      for_each_vector(unit, [&](int64_t at, int64_t count) {
        Vector normal;
        const Vector grad = read(at, count, normal);
        store_part(grad_input + at, (grad - mean_grad - normal * mean_product) * factor, count);
      });
    });
  }

  // A unit is what one pass of vectors covers: a channel, or with channels last kLanes of them.
  int64_t units() const { return p.channels_last ? divide_up(p.channels, kLanes) : p.channels; }

 private:
  int64_t channel_of(int64_t unit, int64_t lane) const { return p.channels_last ? unit * kLanes + lane : unit; }
  int64_t channels_of(int64_t unit) const { return least(kLanes, p.channels - unit * kLanes); }

  void finish(Sums& sums) const {
    sums.flush();
    if (!p.channels_last) {
      sums.merge_lanes();
    }
  }

  // Calls use(offset, count) for the unit's numbers.
  template <typename Use>
  void for_each_vector(int64_t unit, Use use) const {
    if (p.channels_last) {
      const int64_t count = channels_of(unit);
      for (int64_t row = 0; row < p.batch * p.pixels; ++row) {
        use(row * p.channels + unit * kLanes, count);
      }
      return;
    }
    for (int64_t image = 0; image < p.batch; ++image) {
      const int64_t plane = (image * p.channels + unit) * p.pixels;
      int64_t i = 0;
      for (; i + kLanes <= p.pixels; i += kLanes) {
        use(plane + i, kLanes);
      }
      if (i < p.pixels) {
        use(plane + i, p.pixels - i);
      }
    }
  }

  const BatchNormParams& p;
};

template <typename Use>
void for_each_unit(const BatchNormParams& p, int64_t thread, int64_t threads, Use use) {
  const auto with = [&](auto type) {
    Kernel<decltype(type)> kernel(p);
    for (int64_t i = kernel.units() * thread / threads; i < kernel.units() * (thread + 1) / threads; ++i) {
      use(kernel, i);
    }
  };
  switch (p.dtype) {
    case ElementType::bfloat16: return with(BFloat16{});
    case ElementType::float16: return with(Half{});
    default: return with(float{});
  }
}

void forward(const BatchNormParams& p, int64_t thread, int64_t threads) {
  for_each_unit(p, thread, threads, [](auto& kernel, int64_t unit) { kernel.forward(unit); });
}

void backward(const BatchNormParams& p, int64_t thread, int64_t threads) {
  for_each_unit(p, thread, threads, [](auto& kernel, int64_t unit) { kernel.backward(unit); });
}

}  // namespace

extern const BatchNormKernel batch_norm_kernel = {forward, backward};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
