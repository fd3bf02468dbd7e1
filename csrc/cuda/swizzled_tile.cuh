#pragma once

// Rows of 16-bit numbers in shared memory, as wgmma reads them without conflicts of banks (PTX ISA, "Shared Memory
// Matrix Layout", 128-byte swizzle): panels of 64 columns, in which 8 rows of 128 bytes lie one after the other, and
// the 16 bytes number c of row r at number c ^ r % 8.

#include "ptx.cuh"

namespace gpt4fast {

inline constexpr int kSwizzleBytes = 1024;  // of 8 rows, which begin at a multiple of them

template <int kTileRows>
struct SwizzledTile {
  static constexpr int kPeriod = 8;  // rows so many apart are kStride elements apart for each of them
  static constexpr int kStride = 64, kPanel = kTileRows * kStride;
  static_assert(kTileRows % kPeriod == 0);

  __device__ __forceinline__ static int place(int row, int column) {
    return column / 64 * kPanel + row * kStride + ((column / 8 ^ row) % 8 * 8 + column % 8);
  }

  // Of a part of the tile from a row that is a multiple of 8 on, and a column that is one of 16: whether rows are to be
  // those of the product, or are summed over, is said by the instruction.
  __device__ __forceinline__ static uint64_t descriptor(const void* tile, int row, int column) {
    const unsigned begin = shared_address(tile) + 2 * (column / 64 * kPanel + row * kStride + column % 64);
    return uint64_t{1} << 62 |                   // 128-byte swizzle
           uint64_t{kSwizzleBytes / 16} << 32 |  // from 8 rows to the next 8
           uint64_t{2 * kPanel / 16} << 16 |     // from 64 columns to the next 64
           static_cast<uint64_t>((begin & 0x3FFFFu) >> 4);
  }
};

}  // namespace gpt4fast
