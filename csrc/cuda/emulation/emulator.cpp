// Fibers, barriers and asynchronous copies. Not compiled with calls before accesses, as kernels are.
#include "emulator.h"

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include <ucontext.h>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace gpt4fast::emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;

enum class State { ready, waits_for_block, waits_for_warp, done };

struct Copy {
  void* target;
  unsigned bytes;
  char data[16];
};

struct Fiber : Thread {
  State state = State::ready;
  bool is_started = false;
  jmp_buf context;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
  std::vector<GroupProduct> uncommitted_products;
  std::deque<std::vector<GroupProduct>> product_groups;
};

struct Warp {
  void (*perform)(void* const (&lanes)[kWarpSize]) = nullptr;
  void* arguments[kWarpSize] = {};
  unsigned arrived = 0;
};

std::mutex one_launch;
std::mt19937 order;  // the same at every run
std::vector<std::unique_ptr<char[]>> stacks;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* running = nullptr;
jmp_buf scheduler;
void (*launched_kernel)(const void*);
const void* launched_arguments;
void* shared_memory;
std::string failure;

void pause() {
  if (!_setjmp(running->context)) {
    _longjmp(scheduler, 1);
  }
}

void enter() {
  launched_kernel(launched_arguments);
  running->state = State::done;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx.x = fiber.index;
  if (_setjmp(scheduler)) {
    running = nullptr;
    return;
  }
  if (fiber.is_started) {
    _longjmp(fiber.context, 1);
  }
  fiber.is_started = true;
  ucontext_t entry;
  getcontext(&entry);
  entry.uc_stack.ss_sp = stacks[fiber.index].get();
  entry.uc_stack.ss_size = kStackBytes;
  entry.uc_link = nullptr;
  makecontext(&entry, enter, 0);
  setcontext(&entry);
}

unsigned count(State state) {
  unsigned total = 0;
  for (const Fiber& fiber : fibers) {
    total += fiber.state == state;
  }
  return total;
}

// Runs the threads of a warp, in random order, until all of them wait.
bool run_warp(unsigned warp) {
  const unsigned first = warp * kWarpSize, size = std::min<unsigned>(kWarpSize, fibers.size() - first);
  bool moved = false;
  for (unsigned i = 0, start = order() % size; i < size && failure.empty(); ++i) {
    Fiber& fiber = fibers[first + (start + i) % size];
    if (fiber.state == State::ready) {
      resume(fiber);
      moved = true;
    }
  }
  return moved;
}

void release_block() {
  if (count(State::waits_for_block) + count(State::done) < fibers.size()) {
    failure = "some threads wait for others that never come: a barrier or a step of a warp is not reached by all";
    return;
  }
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::waits_for_block) {
      ++fiber.block_step;
      fiber.state = State::ready;
    }
  }
}

void run_block() {
  std::vector<unsigned> queue(warps.size());
  for (unsigned i = 0; i < queue.size(); ++i) {
    queue[i] = i;
  }
  while (failure.empty() && count(State::done) < fibers.size()) {
    std::shuffle(queue.begin(), queue.end(), order);
    bool moved = false;
    for (const unsigned warp : queue) {
      while (run_warp(warp)) {  // often far ahead of the others
        moved = true;
        if (order() % 8 == 0) {
          break;
        }
      }
    }
    if (!moved && failure.empty()) {
      release_block();
    }
  }
}

}  // namespace

void run(unsigned blocks, unsigned threads, size_t shared_bytes, void (*kernel)(const void*), const void* arguments) {
  const std::lock_guard guard(one_launch);
  if (threads % kWarpSize || threads == 0 || threads > 1024) {
    throw std::runtime_error("expected blocks of 32 to 1024 threads, whole warps");
  }
  while (stacks.size() < threads) {
    stacks.emplace_back(new char[kStackBytes]);
  }
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  launched_kernel = kernel;
  launched_arguments = arguments;
  failure.clear();
  std::vector<unsigned> sequence(blocks);
  for (unsigned i = 0; i < blocks; ++i) {
    sequence[i] = i;
  }
  std::shuffle(sequence.begin(), sequence.end(), order);
  for (const unsigned block : sequence) {
    blockIdx.x = block;
    shared_memory = begin_shared_memory(shared_bytes);
    warps.assign(threads / kWarpSize, {});
    fibers.assign(threads, {});
    for (unsigned i = 0; i < threads; ++i) {
      fibers[i].index = i;
      fibers[i].warp = i / kWarpSize;
      fibers[i].block_step = fibers[i].warp_step = 1;
    }
    run_block();
    if (!failure.empty()) {
      throw std::runtime_error("emulation of CUDA: block " + std::to_string(block) + ": " + failure);
    }
  }
}

void fault(const std::string& what) {
  std::ostringstream text;
  text << "thread " << running->index << " " << what;
  failure = text.str();
  _longjmp(scheduler, 1);
}

void wait_for_block() {
  running->state = State::waits_for_block;
  pause();
}

void take_warp_step(void (*perform)(void* const (&lanes)[kWarpSize]), void* argument) {
  Warp& warp = warps[running->warp];
  if (warp.arrived > 0 && warp.perform != perform) {
    fault("takes another step than the other threads of its warp");
  }
  warp.perform = perform;
  warp.arguments[running->index % kWarpSize] = argument;
  running->state = State::waits_for_warp;
  if (++warp.arrived < kWarpSize) {
    pause();
    return;
  }
  Fiber* const last = running;
  running = nullptr;  // what is done for all is not checked
  perform(warp.arguments);
  running = last;
  warp.arrived = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    fibers[running->warp * kWarpSize + i].state = State::ready;
  }
}

void wait_for_warp() {
  take_warp_step([](void* const(&)[kWarpSize]) {}, nullptr);
  ++running->warp_step;
}

void copy_async(void* shared, const void* global, unsigned bytes, unsigned valid) {
  check_read(global, valid);
  reserve(reinterpret_cast<uintptr_t>(shared), bytes);
  Copy copy{shared, bytes, {}};
  std::memcpy(copy.data, global, valid);
  std::memset(shared, 0xFF, bytes);
  running->uncommitted.push_back(copy);
}

void commit_copies() {
  running->groups.push_back(std::move(running->uncommitted));
  running->uncommitted.clear();
}

void wait_for_copies(unsigned groups_left) {
  for (; running->groups.size() > groups_left; running->groups.pop_front()) {
    for (const Copy& copy : running->groups.front()) {
      std::memcpy(copy.target, copy.data, copy.bytes);
      arrive(reinterpret_cast<uintptr_t>(copy.target), copy.bytes);
    }
  }
}

void start_product(GroupProduct product, size_t sums) {
  const auto gives = [&](const std::vector<GroupProduct>& group) {
    return std::any_of(group.begin(), group.end(), [&](const GroupProduct& one) { return one.sums == product.sums; });
  };
  const auto& groups = running->product_groups;
  if (!gives(running->uncommitted_products) && std::none_of(groups.begin(), groups.end(), gives)) {
    product.before.assign(product.sums, product.sums + sums);
  }
  std::fill_n(product.sums, sums, std::numeric_limits<float>::quiet_NaN());
  product.warp = running->warp;
  product.check(product);
  running->uncommitted_products.push_back(std::move(product));
}

void commit_products() {
  running->product_groups.push_back(std::move(running->uncommitted_products));
  running->uncommitted_products.clear();
}

void wait_for_products(unsigned groups_left) {
  for (; running->product_groups.size() > groups_left; running->product_groups.pop_front()) {
    for (const GroupProduct& started : running->product_groups.front()) {
      GroupProduct product = started;  // on the thread's stack, which kernels may read
      product.check(product);
      std::copy(product.before.begin(), product.before.end(), product.sums);
      take_warp_step(
          [](void* const(&arguments)[kWarpSize]) {
            const GroupProduct* lanes[kWarpSize];
            std::transform(arguments, arguments + kWarpSize, lanes,
                           [](void* argument) { return static_cast<const GroupProduct*>(argument); });
            lanes[0]->perform(lanes);
          },
          &product);
    }
  }
}

void publish_writes() {
  ++running->publications;
}

const Thread& thread_number(unsigned index) {
  return fibers[index];
}

const Thread* running_thread() {
  return running;
}

void* dynamic_shared_memory() {
  return shared_memory;
}

bool is_on_a_stack(uintptr_t address) {
  const auto begin = reinterpret_cast<uintptr_t>(stacks[running->index].get());
  return begin <= address && address < begin + kStackBytes;
}

}  // namespace gpt4fast::emulation
