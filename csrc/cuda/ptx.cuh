#pragma once

// All inline PTX: instructions of sm_80, and at the end of sm_90a, that C++ has no word for. emulation/ptx.h is the
// same for g++.

#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if !defined(__CUDACC__)
#include "emulation/ptx.h"
#else

namespace gpt4fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies 4 or 16 bytes from global to shared memory, or zeros where not valid, without the thread waiting.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    static_assert(kBytes == 4);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
  }
}

// Makes a group of the thread's copies since the last one.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for the thread's copies, but not for the latest kLeft groups. Others see them after a barrier.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 rows of 16 bytes. The address of lane i is that of row i % 8 of matrix i / 8; every lane gets from
// each matrix the 4 bytes at 4 * (lane % 4) of row lane / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for transposed matrices of 16-bit numbers.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a @ b. a is 16 rows of 32 bytes as load_matrices gives them: rows 0 to 7 and 8 to 15 of the first 16 bytes, then
// of the second; b is 8 columns of 32 bytes, {b0, b1} likewise. c is float32 (16, 8): a lane has columns 2 * (lane % 4)
// and the next of row lane / 4, and of the row 8 below. The numbers are scalar_t; float32 ones are cut to TF32.
template <typename scalar_t>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest TF32 number: products of these are exact in float32.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t number) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(number)));
  return rounded;
}

// Two numbers rounded to 16 bits each, the first in the lower half.
template <typename scalar_t>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x in one instruction, to 2 units in the last place; 0 where the result is subnormal.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// What follows is of sm_90a (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"): products
// that the four warps of a group, 128 threads from a multiple of 128 on, start together, and that go on while the
// threads do something else.

// What this thread has written to shared memory, and the copies that it waited for, are seen by products that are
// started after the next barrier.
__device__ __forceinline__ void publish_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Comes before products whose registers other instructions have written.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Makes a group of the products since the last one.
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for products, but not for the latest kLeft groups. Until then nothing may touch their registers.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Registers of products: the compiler, which knows nothing of fences and waits, moves nothing that has to do with them
// across this.
template <int kTiles>
__device__ __forceinline__ void settle(float (&sums)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])::"memory");
  }
}
template <int kTiles>
__device__ __forceinline__ void settle(uint32_t (&held)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+r"(held[i][0]), "+r"(held[i][1]), "+r"(held[i][2]), "+r"(held[i][3])::"memory");
  }
}

// sums (+)= a @ b, started. sums are float32 (64, kColumns), of which each warp of the group has 16 rows, in tiles as
// of multiply_add. b is (16, kColumns) in shared memory, as swizzled_tile.cuh describes it. The first takes a (64, 16)
// from shared memory, too, and b of which rows are contiguous there: columns of the product. The second takes a from
// registers, as multiply_add does, which nothing may touch until it was waited for, and b with contiguous columns; it
// always adds.
template <typename scalar_t, int kColumns>
__device__ __forceinline__ void start_product(float (&sums)[kColumns / 8][4], uint64_t a, uint64_t b, bool adds);
template <typename scalar_t, int kColumns>
__device__ __forceinline__ void start_product(float (&sums)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b);

// clang-format off
#define SUMS_16(I) \
  "+f"(sums[I][0]), "+f"(sums[I][1]), "+f"(sums[I][2]), "+f"(sums[I][3]), \
  "+f"(sums[I + 1][0]), "+f"(sums[I + 1][1]), "+f"(sums[I + 1][2]), "+f"(sums[I + 1][3])
#define SUMS_64 SUMS_16(0), SUMS_16(2), SUMS_16(4), SUMS_16(6)
#define SUMS_96 SUMS_64, SUMS_16(8), SUMS_16(10)
#define SUMS_128 SUMS_96, SUMS_16(12), SUMS_16(14)
#define NUMBERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_96 \
  NUMBERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NUMBERS_128 \
  NUMBERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// N0 to N5: the numbers of the operands behind the sums.
#define START_PRODUCT(SCALAR, TYPE, COLUMNS, N0, N1, N2, N3, N4) \
  template <> \
  __device__ __forceinline__ void start_product<SCALAR, COLUMNS>(float (&sums)[COLUMNS / 8][4], uint64_t a, \
                                                                 uint64_t b, bool adds) { \
    asm volatile( \
        "{.reg .pred adds; setp.ne.b32 adds, %" #N2 ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE \
        " {" NUMBERS_##COLUMNS "}, %" #N0 ", %" #N1 ", adds, 1, 1, 0, 0;}" \
        : SUMS_##COLUMNS \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds))); \
  } \
  template <> \
  __device__ __forceinline__ void start_product<SCALAR, COLUMNS>(float (&sums)[COLUMNS / 8][4], \
                                                                 const uint32_t (&a)[4], uint64_t b) { \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE \
        " {" NUMBERS_##COLUMNS "}, {%" #N0 ", %" #N1 ", %" #N2 ", %" #N3 "}, %" #N4 ", 1, 1, 1, 1;" \
        : SUMS_##COLUMNS \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }

START_PRODUCT(BFloat16, "bf16", 64, 32, 33, 34, 35, 36)
START_PRODUCT(BFloat16, "bf16", 96, 48, 49, 50, 51, 52)
START_PRODUCT(BFloat16, "bf16", 128, 64, 65, 66, 67, 68)
START_PRODUCT(Half, "f16", 64, 32, 33, 34, 35, 36)
START_PRODUCT(Half, "f16", 96, 48, 49, 50, 51, 52)
START_PRODUCT(Half, "f16", 128, 64, 65, 66, 67, 68)
#undef START_PRODUCT
#undef NUMBERS_128
#undef NUMBERS_96
#undef NUMBERS_64
#undef SUMS_128
#undef SUMS_96
#undef SUMS_64
#undef SUMS_16
// clang-format on

}  // namespace gpt4fast

#endif
