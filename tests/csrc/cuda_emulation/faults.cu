// A kernel with one fault of each kind that the emulation finds, and one with the instructions of ptx.cuh.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace gpt4fast {
namespace {

using torch::stable::Tensor;

enum Fault {
  none,
  no_barrier_before_read,
  no_barrier_before_write,
  no_wait,
  no_barrier_after_wait,
  unwritten,
  outside_input,
  outside_shared_memory,
  writes_input,
  misaligned,
  barrier_of_some,
  shuffle_of_some,
  no_warp_barrier,
  two_steps,
};

struct alignas(16) Shared {
  float copies[64 * 4];
  float sums[64];
};

// output[i] = the sum of the four numbers of input row 63 - i, twice
__global__ void faulty(Fault fault, const float* input, float* output) {
  Shared& shared = shared_memory<Shared>();
  const unsigned i = threadIdx.x, other = 63 - i;
  copy_async<16>(&shared.copies[fault == misaligned ? 4 * i + 1 : 4 * i],
                 input + 4 * (fault == outside_input ? i + 1 : i), true);
  commit_copies();
  if (fault != no_wait) {
    wait_for_copies<0>();
  }
  if (fault != no_barrier_after_wait) {
    __syncthreads();
  }
  float sum = 0.0f;
  for (int k = 0; k < 4; ++k) {
    sum += shared.copies[4 * other + k];
  }
  if (fault == unwritten) {
    sum += shared.sums[i];
  }
  shared.sums[fault == outside_shared_memory ? i + 1 : i] = sum;
  if (fault == barrier_of_some && i >= 32) {
    sum = __shfl_xor_sync(0xFFFFFFFFu, sum, 0);
    __syncwarp();
    return;
  }
  if (fault == shuffle_of_some) {
    if (i % 32 < 16) {
      sum = __shfl_xor_sync(0xFFFFFFFFu, sum, 0);
    }
  }
  if (fault == two_steps) {
    if (i % 32 < 16) {
      __syncwarp();
    } else {
      sum = __shfl_xor_sync(0xFFFFFFFFu, sum, 0);
    }
  }
  if (fault != no_barrier_before_read) {
    __syncthreads();
  }
  const float read = shared.sums[i ^ 33];
  if (fault != no_barrier_before_write) {
    __syncthreads();
  }
  shared.sums[i] = read;
  if (fault != no_warp_barrier) {
    __syncwarp();
  }
  const float again = shared.sums[i ^ 1];
  output[i ^ 32] = again * 2.0f;
  if (fault == writes_input) {
    const_cast<float*>(input)[i] = 0.0f;
  }
}

// c = a @ b.T, a (16, 32 bytes) and b (8, 32 bytes)
template <typename scalar_t>
__global__ void product(const scalar_t* a, const scalar_t* b, float* c) {
  constexpr unsigned kWidth = 32 / sizeof(scalar_t), kHalf = kWidth / 2;
  struct alignas(16) Operands {
    scalar_t a[16 * kWidth], b[16 * kWidth];
  };
  Operands& shared = shared_memory<Operands>();
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 16 * kWidth; i += 32) {
    shared.a[i] = a[i];
    shared.b[i] = b[i % (8 * kWidth)];
  }
  __syncwarp();
  uint32_t left[4], right[4];
  load_matrices(left, &shared.a[lane % 16 * kWidth + lane / 16 * kHalf]);
  load_matrices(right, &shared.b[lane % 16 * kWidth + lane / 16 * kHalf]);
  float sums[4] = {};
  multiply_add<scalar_t>(sums, left, right[0], right[2]);
  for (unsigned i = 0; i < 4; ++i) {
    c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

void run_faulty(int64_t fault, const Tensor& input, const Tensor& output) {
  const Device device(input);
  allow_access(input, false);
  allow_access(output, true);
  device.launch(faulty, 1, 64, sizeof(Shared), static_cast<Fault>(fault), input.const_data_ptr<float>(),
                output.mutable_data_ptr<float>());
}

void run_product(const Tensor& a, const Tensor& b, const Tensor& c) {
  const Device device(a);
  allow_access(a, false);
  allow_access(b, false);
  allow_access(c, true);
  const auto run = [&]<typename scalar_t>(void (*kernel)(const scalar_t*, const scalar_t*, float*)) {
    device.launch(kernel, 1, 32, 2048, static_cast<const scalar_t*>(a.const_data_ptr()),
                  static_cast<const scalar_t*>(b.const_data_ptr()), c.mutable_data_ptr<float>());
  };
  switch (a.scalar_type()) {
    case torch::headeronly::ScalarType::Half: return run(product<Half>);
    case torch::headeronly::ScalarType::BFloat16: return run(product<BFloat16>);
    default: return run(product<float>);
  }
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_FRAGMENT(gpt4fast, m) {
  m.def("faulty(int fault, Tensor input, Tensor(a!) output) -> ()");
  m.def("product(Tensor a, Tensor b, Tensor(a!) c) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("faulty", TORCH_BOX(&gpt4fast::run_faulty));
  m.impl("product", TORCH_BOX(&gpt4fast::run_product));
}
