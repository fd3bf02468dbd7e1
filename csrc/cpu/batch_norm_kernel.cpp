// Batch norm with the batch's statistics and the activation behind it, forward and backward. A channel at a time: its
// statistics and then its outputs, while its numbers are in the cache. Torch's separate operators read and write memory
// eight times for what takes three, and backward ten for four. Compiled once per CPU level.
#include "../batch_norm.h"

#include "simd/simd.h"
#include "vector_activation.h"
#include "with_element_type.h"

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

  double first = 0.0, second = 0.0;  // after flush

  void flush() {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      first += static_cast<double>(first_[lane]);
      second += static_cast<double>(second_[lane]);
    }
    first_ = second_ = Vector{};
    count_ = 0;
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

  void forward(int64_t channel) {
    const auto* input = static_cast<const scalar_t*>(p.input);
    auto* out = static_cast<scalar_t*>(p.out);
    // Sums of differences from the first number: of the numbers themselves they would cancel out.
    const float first = to_float(input + channel * p.pixels);
    const Vector origin = broadcast(first);
    Sums sums;
    for_each_vector(channel, [&](int64_t at, int64_t count) {
      const Vector difference = load_part(input + at, count) - origin;
      const Vector valid = count == kLanes ? difference : select(lanes_between(0, count), difference, Vector{});
      sums.add(valid, valid * valid);
    });
    sums.flush();
    const double total = static_cast<double>(p.batch * p.pixels), shift = sums.first / total;
    const double mean = static_cast<double>(first) + shift;
    const double variance = most(sums.second / total - shift * shift, 0.0),
                 rstd = 1.0 / __builtin_sqrt(variance + p.eps);
    p.mean[channel] = static_cast<float>(mean);
    p.variance[channel] = static_cast<float>(variance);
    p.rstd[channel] = static_cast<float>(rstd);
    const double factor = rstd * static_cast<double>(p.weight[channel]);
    const Vector scale = broadcast(static_cast<float>(factor));
    const Vector offset = broadcast(static_cast<float>(static_cast<double>(p.bias[channel]) - mean * factor));
    with_activation(p.activation, [&](auto activation) {
      for_each_vector(channel, [&](int64_t at, int64_t count) {
        const Vector value = multiply_add(load_part(input + at, count), scale, offset);
        store_part(out + at, activation(value, p.negative_slope), count);
      });
    });
  }

  void backward(int64_t channel) {
    const auto* input = static_cast<const scalar_t*>(p.input);
    const auto* grad_out = static_cast<const scalar_t*>(p.grad_out);
    auto* grad_input = static_cast<scalar_t*>(p.grad_input);
    const Vector mean = broadcast(p.mean[channel]), rstd = broadcast(p.rstd[channel]);
    const Vector weight = broadcast(p.weight[channel]), bias = broadcast(p.bias[channel]);
    with_activation_slope(p.activation, [&](auto slope) {
      // The gradient before the activation, and the normalised input.
      const auto read = [&](int64_t at, int64_t count, Vector& normal) {
        normal = (load_part(input + at, count) - mean) * rstd;
        return load_part(grad_out + at, count) * slope(multiply_add(normal, weight, bias), p.negative_slope);
      };
      Sums sums;
      for_each_vector(channel, [&](int64_t at, int64_t count) {
        Vector normal;
        const Vector grad = read(at, count, normal);  // 0 where there is no number
        sums.add(grad, grad * normal);
      });
      sums.flush();
      p.grad_bias[channel] = static_cast<float>(sums.first);
      p.grad_weight[channel] = static_cast<float>(sums.second);
      const double total = static_cast<double>(p.batch * p.pixels);
      const Vector mean_grad = broadcast(static_cast<float>(sums.first / total));
      const Vector mean_product = broadcast(static_cast<float>(sums.second / total)), factor = weight * rstd;
      for_each_vector(channel, [&](int64_t at, int64_t count) {
        Vector normal;
        const Vector grad = read(at, count, normal);
        store_part(grad_input + at, (grad - mean_grad - normal * mean_product) * factor, count);
      });
    });
  }

 private:
  // Calls use(offset, count) for the channel's numbers.
  template <typename Use>
  void for_each_vector(int64_t channel, Use use) const {
    for (int64_t image = 0; image < p.batch; ++image) {
      const int64_t plane = (image * p.channels + channel) * p.pixels;
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
void for_each_channel(const BatchNormParams& p, int64_t thread, int64_t threads, Use use) {
  with_element_type(p.dtype, [&](auto type) {
    Kernel<decltype(type)> kernel(p);
    for (int64_t i = p.channels * thread / threads; i < p.channels * (thread + 1) / threads; ++i) {
      use(kernel, i);
    }
  });
}

void forward(const BatchNormParams& p, int64_t thread, int64_t threads) {
  for_each_channel(p, thread, threads, [](auto& kernel, int64_t channel) { kernel.forward(channel); });
}

void backward(const BatchNormParams& p, int64_t thread, int64_t threads) {
  for_each_channel(p, thread, threads, [](auto& kernel, int64_t channel) { kernel.backward(channel); });
}

}  // namespace

extern const BatchNormKernel batch_norm_kernel = {forward, backward};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
