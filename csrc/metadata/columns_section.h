// What the stream of columns consists of besides plain arrays, and the checks of what came out of one.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoint/bytes.h"
#include "metadata/columns.h"

namespace dcp_fast::metadata {

// All of the columns but arrays of numbers. Throws Unsupported for what decode_first_section() would not take.
std::vector<uint8_t> encode_first_section(const Columns& columns);

// Throws Error(kCorruptMetadata) or Unsupported if that is not what the bytes hold. What refers to arrays of numbers is
// left to check_numbers().
void decode_first_section(checkpoint::Bytes bytes, Columns& columns);

// Whether no sum of two of them passes 64 bits, and none is negative.
bool numbers_are_small(const std::vector<int64_t>& numbers);

// Checks all that refers to something else, and makes the table of rows. `file_bytes`: of the file of the columns; a
// tensor has no more chunks than that. Throws Error(kCorruptMetadata).
void check_numbers(Columns& columns, uint64_t file_bytes);

}  // namespace dcp_fast::metadata
