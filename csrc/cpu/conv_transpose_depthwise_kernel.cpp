// Depthwise transposed convolution: every channel by itself. Lanes are channels, so that both operands of a sum are
// whole vectors whatever the stride. Compiled once per CPU level.
#include "../conv_transpose.h"

#include <algorithm>

#include "conv_transpose_blocks.h"
#include "conv_transpose_inputs.h"
#include "conv_transpose_write.h"
#include "scratch.h"
#include "with_constant.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

constexpr int64_t kMostOutputs = 512;           // of a block
constexpr int64_t kMostInputBytes = 256 << 10;  // of its inputs
constexpr int64_t kMostVectors = 4;             // of channels that are written as neighbours
constexpr int kMostAddends = 4;                 // whose weights stay in registers

// (vectors of channels, taps, kLanes)
template <typename scalar_t>
void pack(const ConvTransposeParams& p, float* packed, int64_t thread, int64_t threads) {
  const int64_t vectors = divide_up(p.out_channels, kLanes), taps = taps_of(p);
  for (int64_t vector = vectors * thread / threads; vector < vectors * (thread + 1) / threads; ++vector) {
    const int64_t first = vector * kLanes, lanes = least(kLanes, p.out_channels - first);
    const auto* source = static_cast<const scalar_t*>(p.weight) + first * p.weight_strides[0];
    for (int64_t tap = 0; tap < taps; ++tap) {
      store(packed + (vector * taps + tap) * kLanes,
            read_vector(source + tap_offset(p, tap), p.weight_strides[0], lanes));
    }
  }
}

// A tap along one dimension, and the input, counted from the block's first, that it multiplies.
struct Meeting {
  int64_t tap, input;
};

// Outputs of a line, a stride apart, that are reached by the same columns of taps.
struct Segment {
  int64_t first, count;               // of the line's outputs
  int64_t first_column, last_column;  // in columns, whose inputs are those of the first output
};

// Where the inputs of one tap begin, and its weight.
struct Addend {
  int64_t inputs, weight;
};

template <typename scalar_t>
struct Plan : Scratch {
  int64_t width;  // channels of a block
  int64_t channel_blocks;
  Blocks blocks;
  float* inputs;      // (images, D, H, W, width)
  float* sums;        // (a line of outputs, width)
  float* lines;       // (kLanes, line_step of the block)
  Meeting* meetings;  // (rows of outputs, kernel): along D, then along H
  int64_t* counts;    // (rows of outputs): how many there are
  Segment* segments;
  Meeting* columns;
  Addend* addends;  // (taps)

  Plan(const ConvTransposeParams& p, int64_t threads, void* memory) : Scratch(memory), blocks(p, kMostOutputs) {
    const int64_t vectors = divide_up(p.out_channels, kLanes);
    channel_blocks = divide_up(vectors, kMostVectors);
    width = divide_up(vectors, channel_blocks) * kLanes;
    const auto bytes = [&] { return blocks.most_inputs() * width * static_cast<int64_t>(sizeof(float)); };
    for (int64_t outputs = kMostOutputs;
         outputs > 16 &&
         (bytes() > kMostInputBytes || (outputs > 64 && blocks.count() * channel_blocks < 2 * threads));) {
      outputs /= 2;
      blocks = Blocks(p, outputs);
    }
    const Block largest = blocks.largest();
    take(inputs, blocks.most_inputs() * width);
    take(sums, largest.count[3] * width);
    take(lines, p.channels_last ? 0 : kLanes * line_step(largest));
    take(meetings, largest.count[1] * p.kernel[0] + largest.count[2] * p.kernel[1]);
    take(counts, largest.count[1] + largest.count[2]);
    // A column begins and ends once in a line, and each phase has outputs before its first.
    const int64_t most_segments = 2 * p.kernel[2] + least(p.stride[2], largest.count[3]);
    take(segments, most_segments);
    take(columns, most_segments * p.kernel[2]);
    take(addends, taps_of(p));
  }
};

// Calls store(output, begin(output) + the addends), for so many outputs, whose inputs are `width` apart.
template <int kCount, typename Begin, typename Store>
void add(const Addend* addends, const float* inputs, const float* weights, int64_t width, int64_t outputs, Begin begin,
         Store store) {
  const float* from[kCount + 1];
  Vector weight[kCount + 1];
  for (int i = 0; i < kCount; ++i) {
    from[i] = inputs + addends[i].inputs;
    weight[i] = load(weights + addends[i].weight);
  }
  for (int64_t output = 0; output < outputs; ++output) {
    Vector sum = begin(output);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      sum = multiply_add(load(from[i] + output * width), weight[i], sum);
    }
    store(output, sum);
  }
}

template <typename scalar_t>
class Kernel {
 public:
  Kernel(const ConvTransposeParams& params, int64_t threads, const void* packed, void* memory)
      : p(params), plan(params, threads, memory), packed_(static_cast<const float*>(packed)) {}

  void run(int64_t thread, int64_t threads) {
    for_each_task(
        plan.blocks, 1, plan.channel_blocks, thread, threads, [&](const Block& outputs) { begin(outputs); },
        [&](int64_t, int64_t block) { compute(block); });
  }

 private:
  void begin(const Block& outputs) {
    outputs_ = outputs;
    inputs_ = inputs_of(p, outputs);
    rows_ = plan.meetings + outputs.count[1] * p.kernel[0];
    find_meetings(0, plan.meetings, plan.counts);
    find_meetings(1, rows_, plan.counts + outputs.count[1]);
    find_segments();
  }

  void find_meetings(int axis, Meeting* meetings, int64_t* counts) {
    std::memset(counts, 0, static_cast<size_t>(outputs_.count[axis + 1]) * sizeof(*counts));
    for (int64_t tap = 0; tap < p.kernel[axis]; ++tap) {
      const Reached reached = reached_by(p, outputs_, inputs_, axis, tap);
      for (int64_t i = 0; i < reached.count; ++i) {
        const int64_t row = reached.out + i * reached.out_step;
        meetings[row * p.kernel[axis] + counts[row]++] = {tap, reached.in + i};
      }
    }
  }

  void find_segments() {
    segments_ = 0;
    const int64_t stride = p.stride[2], count = outputs_.count[3];
    Meeting* column = plan.columns;
    for (int64_t phase = 0; phase < least(stride, count); ++phase) {
      const int64_t outputs = divide_up(count - phase, stride);
      for (int64_t first = 0, last; first < outputs; first = last) {
        Segment& segment = plan.segments[segments_++];
        segment.first_column = column - plan.columns;
        last = outputs;
        for (int64_t tap = 0; tap < p.kernel[2]; ++tap) {
          const Reached reached = reached_by(p, outputs_, inputs_, 2, tap);
          if (reached.count == 0 || reached.out % stride != phase) {
            continue;
          }
          const int64_t begin = reached.out / stride, end = begin + reached.count;
          if (begin > first) {
            last = least(last, begin);
          } else if (first < end) {
            last = least(last, end);
            *column++ = {tap, reached.in + first - begin};
          }
        }
        segment.first = phase + first * stride;
        segment.count = last - first;
        segment.last_column = column - plan.columns;
      }
    }
  }

  void compute(int64_t block) {
    first_ = block * plan.width;
    channels_ = least(plan.width, p.out_channels - first_);
    copy_inputs();
    with_activation(p.activation, [&](auto activation) {
      Block line = outputs_;
      std::fill_n(line.count, 3, 1);
      for (int64_t image = 0; image < outputs_.count[0]; ++image) {
        for (int64_t d = 0; d < outputs_.count[1]; ++d) {
          for (int64_t h = 0; h < outputs_.count[2]; ++h) {
            line.first[0] = outputs_.first[0] + image;
            line.first[1] = outputs_.first[1] + d;
            line.first[2] = outputs_.first[2] + h;
            for (int64_t i = 0; i < segments_; ++i) {
              const int64_t count = list_addends(image, d, h, plan.segments[i]);
              for (int64_t c = 0; c < channels_; c += kLanes) {
                add_segment(plan.segments[i], count, c, line, activation);
              }
            }
            if (!p.channels_last) {
              write_outputs<scalar_t>(p, line, plan.sums, plan.width, first_, channels_, plan.lines);
            }
          }
        }
      }
    });
  }

  // Brings the block's inputs, of kLanes channels, together: a cache would hold few that lie all channels apart.
  void copy_inputs() {
    const auto* input = static_cast<const scalar_t*>(p.input) + first_ * p.input_strides[1];
    for_each_run(inputs_, p.in_size, p.input_strides, [&](int64_t offset, int64_t pixel, int64_t count) {
      copy_pixels<float>(p, input + offset, count, channels_, plan.width,
                         [&](int64_t i) { return plan.inputs + (pixel + i) * plan.width; });
    });
  }

  // Lists what a segment of a line is the sum of.
  int64_t list_addends(int64_t image, int64_t d, int64_t h, const Segment& segment) {
    Addend* addend = plan.addends;
    const Meeting *depths = plan.meetings + d * p.kernel[0], *rows = rows_ + h * p.kernel[1];
    for (int64_t i = 0; i < plan.counts[d]; ++i) {
      for (int64_t j = 0; j < plan.counts[outputs_.count[1] + h]; ++j) {
        const int64_t line = (image * inputs_.count[1] + depths[i].input) * inputs_.count[2] + rows[j].input;
        const int64_t tap = (depths[i].tap * p.kernel[1] + rows[j].tap) * p.kernel[2];
        for (int64_t k = segment.first_column; k < segment.last_column; ++k) {
          const Meeting& column = plan.columns[k];
          *addend++ = {(line * inputs_.count[3] + column.input) * plan.width, (tap + column.tap) * kLanes};
        }
      }
    }
    return addend - plan.addends;
  }

  // Channels last are finished and written at once; others are collected for a line, of which write_outputs then takes
  // a whole square of pixels and channels.
  template <typename Activation>
  void add_segment(const Segment& segment, int64_t count, int64_t channel, const Block& line, Activation activation) {
    const float *inputs = plan.inputs + channel, *weights = packed_ + (first_ + channel) * taps_of(p);
    float* sums = plan.sums + segment.first * plan.width + channel;
    const int64_t step = p.stride[2] * plan.width;
    bool begun = false;
    const auto keep = [&](int64_t output, Vector sum) { store(sums + output * step, sum); };
    const auto begin = [&](int64_t output) { return begun ? load(sums + output * step) : Vector{}; };
    const Addend* addends = plan.addends;
    for (; count > kMostAddends; count -= kMostAddends, addends += kMostAddends, begun = true) {
      add<kMostAddends>(addends, inputs, weights, plan.width, segment.count, begin, keep);
    }
    with_constant<0, kMostAddends>(count, [&](auto constant) {
      if (!p.channels_last) {
        add<constant()>(addends, inputs, weights, plan.width, segment.count, begin, keep);
        return;
      }
      const Vector scale = load(p.scale + first_ + channel), offset = load(p.offset + first_ + channel);
      const float slope = p.negative_slope;
      const int64_t lanes = channels_ - channel, pixels = p.stride[2] * p.out_channels;
      const int64_t pixel =
          ((line.first[0] * p.out_size[0] + line.first[1]) * p.out_size[1] + line.first[2]) * p.out_size[2] +
          line.first[3] + segment.first;
      scalar_t* out = static_cast<scalar_t*>(p.out) + pixel * p.out_channels + first_ + channel;
      add<constant()>(addends, inputs, weights, plan.width, segment.count, begin, [=](int64_t output, Vector sum) {
        store_part(out + output * pixels, activation(multiply_add(sum, scale, offset), slope), lanes);
      });
    });
  }

  const ConvTransposeParams& p;
  Plan<scalar_t> plan;
  const float* packed_;
  Block outputs_, inputs_;
  Meeting* rows_;                        // meetings along H
  int64_t segments_, first_, channels_;  // of the block: channels [first_, first_ + channels_)
};

int64_t packed_bytes(const ConvTransposeParams& p) {
  return round_up(p.out_channels, kLanes) * taps_of(p) * static_cast<int64_t>(sizeof(float));
}

void pack(const ConvTransposeParams& p, void* packed, int64_t thread, int64_t threads) {
  with_element_type(p.dtype, [&](auto type) { pack<decltype(type)>(p, static_cast<float*>(packed), thread, threads); });
}

int64_t workspace(const ConvTransposeParams& p, int64_t threads) {
  return with_element_type(p.dtype, [&](auto type) { return Plan<decltype(type)>(p, threads, nullptr).bytes; });
}

void run(const ConvTransposeParams& p, const void* packed, void* memory, int64_t thread, int64_t threads) {
  with_element_type(p.dtype,
                    [&](auto type) { Kernel<decltype(type)>(p, threads, packed, memory).run(thread, threads); });
}

}  // namespace

extern const ConvTransposeKernel conv_transpose_depthwise_kernel = {packed_bytes, pack, workspace, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
