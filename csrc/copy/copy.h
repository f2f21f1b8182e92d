// Copies between two places in memory, at any alignment of both.
//
// What is larger than the cache is written past it, by streaming stores: a plain store first reads the line that it
// overwrites, which costs half as much again as the copy itself. Source and destination must not overlap.
//
// All of these return with their stores visible to other threads in the usual order, and hold no lock meanwhile.
#pragma once

#include <cstddef>

#include "copy/cpu.h"

namespace dcp_fast::copy {

// Bytes of a cache line. Streaming stores are fast where they fill whole ones.
inline constexpr std::size_t kLine = 64;

// From so many bytes on, a destination is written past the cache.
inline constexpr std::size_t kStreamedBytes = std::size_t{256} << 10;

void copy_bytes(void* to, const void* from, std::size_t size);

// Copies `rows` runs of `size` bytes, whose begins are so many bytes apart on either side. All of them together count
// for whether they are written past the cache.
void copy_rows(void* to, std::ptrdiff_t to_stride, const void* from, std::ptrdiff_t from_stride, std::size_t rows,
               std::size_t size);

// The same by streaming stores, whatever the size, with certain instructions: one of runnable_vectors().
void stream_rows(Vectors vectors, void* to, std::ptrdiff_t to_stride, const void* from, std::ptrdiff_t from_stride,
                 std::size_t rows, std::size_t size);

// For loops over short runs: streaming stores, which are ordered before later ones by the fence that follows the loop.
void stream_unfenced(Vectors vectors, void* to, const void* from, std::size_t size);
void fence_streams();

}  // namespace dcp_fast::copy
