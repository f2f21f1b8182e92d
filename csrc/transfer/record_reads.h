// Reads whole records into host memory, ahead of whoever takes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "transfer/engine.h"
#include "transfer/layouts.h"
#include "transfer/options.h"

namespace dcp_fast::transfer {

// The bytes of a record. They stay as long as anybody holds them; then their memory serves another record.
struct RecordBytes {
  std::shared_ptr<std::byte> data;
  size_t size = 0;
};

// Where the bytes of a record begin in memory, as torch aligns its own allocations: what torch.save aligns in an
// archive is then aligned in memory as well.
inline constexpr size_t kRecordAlignment = 64;

// Calls `take(index of records, its bytes)` for each of `records`, which are indices into those of the layouts, in
// order and on the calling thread. Meanwhile threads read what comes next.
//
// What is read and not yet taken has at most `most_bytes` of memory. A record that is larger is read when all before it
// have been taken. The one that is taken, with its neighbours where it is small, comes on top, as do those that the
// caller keeps.
//
// Throws Error with `record` set (kTruncated, kIo), Interrupted, std::bad_alloc, and whatever `take` throws. No thread
// reads any more then.
Stats read_records(const Layouts& layouts, const std::vector<size_t>& records, int64_t most_bytes,
                   const Options& options, const std::function<bool()>& interrupted,
                   const std::function<void(size_t, RecordBytes)>& take);

}  // namespace dcp_fast::transfer
