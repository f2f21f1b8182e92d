// The layout stage: where do the payloads of the needed records lie? Reads both ends of every record, neighbours in one
// request, and verifies all of them before the first destination byte is written.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "checkpoint/record.h"
#include "error.h"
#include "io/byte_source.h"
#include "transfer/options.h"
#include "transfer/schedule.h"

namespace dcp_fast::transfer {

struct Record {
  size_t file = 0;  // index into the sources
  int64_t offset = 0;
  int64_t length = 0;
  bool fallback = false;  // a transform was applied to it, or it is quantized: only its range is checked
};

// What a source was when it was opened first.
struct FileState {
  int64_t size = 0;
  int64_t version = 0;  // as of ByteSource
};

struct Layouts {
  io::ByteSources sources;       // whose access is chosen
  std::vector<FileState> files;  // by source, of those that have records
  std::vector<Record> records;
  std::vector<checkpoint::ParsedRecord> parsed;  // one for each record: kTensor or kUnknown
  bool are_payloads = false;                     // of safetensors files, whose boxes torch takes as they are
  int64_t requests = 0;
  int64_t bytes = 0;

  // How many sources are read together with other ranks of the node.
  int64_t shared_files() const;

  // Adds to an error which record it concerns, and where that is stored, unless the error tells.
  void attribute(Error& error, size_t record) const;
};

// Opens every file once: chooses how to access it, and checks that it has the records. `payloads`: what each record
// holds if it is a mere payload, as in a safetensors file; empty if records are archives. Throws Error with `record`
// set (kTruncated, kIo), Interrupted, std::bad_alloc.
Layouts open_files(io::ByteSources sources, std::vector<Record> records, std::vector<checkpoint::TensorLayout> payloads,
                   const Options& options, const std::function<bool()>& interrupted);

// What is read of the files to find where payloads lie, in ascending order.
std::vector<Range> header_ranges(const Layouts& layouts, const Options& options);

// As if the files had been opened by `readers`. Nobody has them open.
void be_read_by(Layouts& layouts, io::Readers readers, const Options& options,
                const std::function<bool()>& interrupted);

// Finds where payloads lie. Of records that are mere payloads nothing is read. Throws Error with `record` set
// (kTruncated, kCorrupt, kIo), Interrupted, std::bad_alloc.
void read_headers(Layouts& layouts, const Options& options, const std::function<bool()>& interrupted);

}  // namespace dcp_fast::transfer
