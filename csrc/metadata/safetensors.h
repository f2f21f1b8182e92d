// Headers of safetensors files.
//
//   | size of the header: 8 bytes | header: a JSON object | payload | payload | ...
//
// The header says of each tensor its dtype, its sizes, and where its payload lies behind the header. Payloads follow
// one another without holes and end where the file does. torch's writer adds which chunk of a global tensor each one
// is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "io/byte_source.h"

namespace dcp_fast::metadata {

struct HeaderTensor {
  std::string name;
  uint8_t dtype = 0;  // of kDTypeNames
  uint32_t dims = 0;
  size_t numbers = 0;  // where in Header::numbers the offsets of the chunk are, and behind them its sizes
  int64_t begin = 0;   // of the payload, in the file
  int64_t end = 0;
};

struct Header {
  std::vector<HeaderTensor> tensors;  // by name, as bytes are ordered
  std::vector<int64_t> numbers;

  // nullptr if there is none of this name.
  const HeaderTensor* find(std::string_view name) const;
};

// Reads the header of an open source. Nothing is allocated before the sizes are checked. Throws Error(kCorruptHeader)
// for all that the safetensors project refuses, and for names that come twice; Error(kIo); std::bad_alloc.
Header read_header(const io::ByteSource& source, io::IoCounters& counters);

// The same for a header in memory. `file_size`: of the whole file.
Header parse_header(std::string_view text, int64_t file_size);

// All of a file that is JSON, or a part of it. Errors as above.
std::string read_json(const io::ByteSource& source, int64_t offset, int64_t size, io::IoCounters& counters);

}  // namespace dcp_fast::metadata
