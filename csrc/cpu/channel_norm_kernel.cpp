// Layer norm of each pixel over its channels and the activation behind it, in one pass over memory where torch's
// operators and the transposes around them make six. Compiled once per CPU level.
#include "../channel_norm.h"

#include "simd/simd.h"
#include "vector_activation.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

// Calls use(offset, count) for vectors of numbers [first, last).
template <typename Use>
void for_each_vector(int64_t first, int64_t last, Use use) {
  for (; first + kLanes <= last; first += kLanes) {
    use(first, kLanes);
  }
  if (first < last) {
    use(first, last - first);
  }
}

template <typename scalar_t, typename Activation>
class Kernel {
 public:
  Kernel(const ChannelNormParams& params, Activation activation)
      : p(params), activation_(activation), inverse_(1.0f / static_cast<float>(params.channels)) {}

  // Channels last: lanes are channels.
  void run_row(int64_t row) const {
    const auto* input = static_cast<const scalar_t*>(p.input) + row * p.channels;
    auto* out = static_cast<scalar_t*>(p.out) + row * p.channels;
    Vector sums = {};
    for_each_vector(0, p.channels, [&](int64_t c, int64_t count) { sums = sums + load_part(input + c, count); });
    const Vector mean = broadcast(sum(sums) * inverse_);
    Vector squares = {};
    for_each_vector(0, p.channels, [&](int64_t c, int64_t count) {
      const Vector difference = load_part(input + c, count) - mean;
      const Vector valid = count == kLanes ? difference : select(lanes_between(0, count), difference, Vector{});
      squares = multiply_add(valid, valid, squares);
    });
    const Vector rstd = broadcast(1.0f / __builtin_sqrtf(sum(squares) * inverse_ + p.eps));
    for_each_vector(0, p.channels, [&](int64_t c, int64_t count) {
      const Vector normal = (load_part(input + c, count) - mean) * rstd;
      const Vector value = multiply_add(normal, load_part(p.weight + c, count), load_part(p.bias + c, count));
      store_part(out + c, activation_(value, p.negative_slope), count);
    });
  }

  // Channels first: lanes are pixels, as many as a vector holds or fewer.
  void run_pixels(int64_t image, int64_t pixel, int64_t count) const {
    const int64_t offset = image * p.channels * p.pixels + pixel;
    const auto* input = static_cast<const scalar_t*>(p.input) + offset;
    auto* out = static_cast<scalar_t*>(p.out) + offset;
    const auto read = [&](int64_t c) { return load_part(input + c * p.pixels, count); };
    const Vector mean = sum_channels([&](int64_t c, Vector sum) { return sum + read(c); }) * inverse_;
    const Vector squares = sum_channels([&](int64_t c, Vector sum) {
      const Vector difference = read(c) - mean;
      return multiply_add(difference, difference, sum);
    });
    float rstds[kLanes];
    store(rstds, squares * inverse_);
    for (float& value : rstds) {
      value = 1.0f / __builtin_sqrtf(value + p.eps);
    }
    const Vector rstd = load(rstds);
    for (int64_t c = 0; c < p.channels; ++c) {
      const Vector normal = (read(c) - mean) * rstd;
      const Vector value = multiply_add(normal, broadcast(p.weight[c]), broadcast(p.bias[c]));
      store_part(out + c * p.pixels, activation_(value, p.negative_slope), count);
    }
  }

 private:
  // In runs of 16: all channels added one after another err by thrice as much as torch.
  template <typename Add>
  Vector sum_channels(Add add) const {
    Vector total = {};
    for (int64_t c = 0; c < p.channels;) {
      Vector sum = {};
      for (const int64_t end = least(c + 16, p.channels); c < end; ++c) {
        sum = add(c, sum);
      }
      total = total + sum;
    }
    return total;
  }

  const ChannelNormParams& p;
  const Activation activation_;
  const float inverse_;  // of the number of channels
};

void run(const ChannelNormParams& p, int64_t thread, int64_t threads) {
  with_element_type(p.dtype, [&](auto type) {
    with_activation(p.activation, [&](auto activation) {
      const Kernel<decltype(type), decltype(activation)> kernel(p, activation);
      if (p.channels_last) {
        const int64_t rows = p.batch * p.pixels;
        for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; ++row) {
          kernel.run_row(row);
        }
        return;
      }
      const int64_t vectors = divide_up(p.pixels, kLanes), tasks = p.batch * vectors;
      for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
        const int64_t pixel = task % vectors * kLanes;
        kernel.run_pixels(task / vectors, pixel, least(kLanes, p.pixels - pixel));
      }
    });
  });
}

}  // namespace

extern ChannelNormKernel* const channel_norm_kernel = run;

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
