// Where a stored tensor's payload lies in its record. A record is a torch.save archive: data.pkl describes the tensor,
// data/<key> holds its storage. Only the archive's first and last bytes are needed to find it, never the payload.
//
//   head                                      tail
//   | data.pkl | ... | byteorder | data/0 header | payload ... | version | directory | end |
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/bytes.h"
#include "checkpoint/dtype.h"
#include "checkpoint/pickle_cache.h"

namespace dcp_fast::checkpoint {

// So many bytes at either end of a record are nearly always enough.
inline constexpr int64_t kHeadBytes = 1024;
inline constexpr int64_t kTailBytes = 768;
// torch.save never needs more than this at either end.
inline constexpr int64_t kMaxWindowBytes = 1 << 20;

struct TensorLayout {
  DType dtype = kUnknownDType;
  int64_t begin = 0;             // the tensor's first element, in bytes from the record's start
  std::vector<int64_t> sizes;    // elements
  std::vector<int64_t> strides;  // elements
};

struct ParsedRecord {
  enum class Status {
    kTensor,         // `layout` holds it
    kUnknown,        // torch.load must decide what it is; `reason` says why
    kCorrupt,        // the record contradicts itself; `reason` says how
    kCorruptPickle,  // its description of the tensor is corrupt; `reason` says how
    kNeedsMore,      // parse again with `head` and `tail` first and last bytes
  };
  Status status = Status::kUnknown;
  std::string reason;
  int64_t head = 0;
  int64_t tail = 0;
  TensorLayout layout;
};

// Parses a record of `length` bytes, of which the first and the last are given; the two may overlap. `pickles` may hold
// the pickles of other records.
ParsedRecord parse_record(Bytes head, Bytes tail, int64_t length, PickleCache& pickles);

}  // namespace dcp_fast::checkpoint
