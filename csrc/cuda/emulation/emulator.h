#pragma once

// Runs CUDA kernels on the CPU, to test their arithmetic, indices and barriers on machines without a GPU.
//
// The kernels are compiled by g++ against cuda_runtime.h of this folder. A block's threads are fibers, which change
// only where a thread waits for others; which of them go on first is random, and the same with every run of a process.
// The compiler calls a function before every access to memory (-fsanitize=kernel-address, see memory.cpp), which finds
//   - accesses outside the tensors of the operator and the shared memory of the block, writes to tensors that are only
//     read, and addresses that are no multiple of what is accessed;
//   - reads of shared memory that nothing was written to, or that cp.async was not waited for, and reads by wgmma of
//   what
//     was not published to it;
//   - accesses of two threads to shared memory, one of them a write, between which there is no barrier.
// Any of these ends the launch by an exception that names the thread.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gpt4fast::emulation {

inline constexpr unsigned kWarpSize = 32;

// Calls kernel(arguments) in every thread of `blocks` blocks, one block after another.
void run(unsigned blocks, unsigned threads, size_t shared_bytes, void (*kernel)(const void*), const void* arguments);

// Ends the launch.
[[noreturn]] void fault(const std::string& what);

// The kernels of an operator may read the bytes, and write them where they are writable.
void allow_access(const void* data, size_t bytes, bool writable);

// Where another operator begins.
void forget_accesses();

void wait_for_block();
void wait_for_warp();

// A step that all threads of a warp take together: the last one to come performs it with the arguments of all.
void take_warp_step(void (*perform)(void* const (&lanes)[kWarpSize]), void* argument);

// cp.async: the bytes, of which those after `valid` are zero, arrive where the thread waits for them.
void copy_async(void* shared, const void* global, unsigned bytes, unsigned valid);
void commit_copies();
void wait_for_copies(unsigned groups_left);

// For instructions that are not compiled from C++.
void check_read(const void* data, size_t bytes);
void check_write(const void* data, size_t bytes);

// wgmma, of one warp's 16 rows: performed where the thread waits for it, with what is then in the registers of a and in
// shared memory. Until then its sums are NaN.
struct GroupProduct {
  void (*check)(const GroupProduct&);  // of the lane's share of what is read
  void (*perform)(const GroupProduct* const (&lanes)[kWarpSize]);
  float* sums;
  const uint32_t (*held)[4];  // a where it is in registers
  uint64_t a, b;              // descriptors
  bool adds;
  unsigned warp = 0;
  std::vector<float> before = {};  // the sums, unless the one before this gives them
};
void start_product(GroupProduct product, size_t sums);
void commit_products();
void wait_for_products(unsigned groups_left);
void publish_writes();

// What memory.cpp knows of a thread.
struct Thread {
  unsigned index, warp;
  uint32_t block_step, warp_step;  // barriers of its block and its warp so far
  uint32_t publications;
};
const Thread& thread_number(unsigned index);

// Of the running thread's wgmma.
void check_unordered_read(const void* data, size_t bytes);

// None while no kernel runs.
const Thread* running_thread();

bool is_on_a_stack(uintptr_t address);

// The shared memory of a new block, nothing written to. Returns it.
void* begin_shared_memory(size_t bytes);

// Bytes for cp.async: reserved until they arrive.
void reserve(uintptr_t address, size_t bytes);
void arrive(uintptr_t address, size_t bytes);

}  // namespace gpt4fast::emulation
