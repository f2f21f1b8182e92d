#include "transfer/reader.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "copy/populate.h"
#include "io/file.h"
#include "trace/recorder.h"

namespace dcp_fast::transfer {

namespace {

// Runs shorter than this are cheaper to copy out of a bounce buffer than to hand to the kernel one by one.
constexpr int64_t kMinScatteredRun = 64;

bool all_scatter(const Piece* begin, const Piece* end) {
  for (const Piece* piece = begin; piece != end; ++piece) {
    if (piece->conversion != nullptr) return false;
    if (piece->loops.size() > 1 && piece->loops.back().size < kMinScatteredRun) return false;
  }
  return true;
}

// Lists where the bytes of a span go, in their order in the file: runs into place, gaps into a small buffer that nobody
// looks at. The source then does the slicing.
class ScatterList {
 public:
  ScatterList(std::vector<iovec>& vectors, io::AlignedBuffer& gaps, int64_t max_gap, int64_t begin)
      : vectors_(vectors), gaps_(gaps.reserve(static_cast<size_t>(max_gap))), end_(begin) {
    vectors_.clear();
  }

  void add(const box::Dim* loops, size_t depth, int64_t source, std::byte* destination) {
    if (depth == 1) {
      if (source > end_) vectors_.push_back({gaps_, static_cast<size_t>(source - end_)});
      vectors_.push_back({destination, static_cast<size_t>(loops->size)});
      end_ = source + loops->size;
      return;
    }
    for (int64_t i = 0; i < loops->size; ++i) {
      add(loops + 1, depth - 1, source + i * loops->source_stride, destination + i * loops->destination_stride);
    }
  }

 private:
  std::vector<iovec>& vectors_;
  std::byte* gaps_;
  int64_t end_;
};

// Copies or converts a piece from where its first byte lies in memory.
void place(const Piece& piece, const std::byte* data) {
  if (piece.conversion != nullptr) {
    copy::convert_box(*piece.conversion, piece.destination, data, piece.loops.data(), piece.loops.size());
  } else {
    box::copy(piece.destination, data, piece.loops.data(), piece.loops.size());
  }
}

// A mapping takes some microseconds to make, to fill and to undo. From so many bytes on that is less than what it
// saves.
constexpr int64_t kMinMapped = 256 << 10;

// Runs are copied from a mapping one by one across gaps that no request would read through: from a mapping, a gap costs
// at most a fault, which brings 16 pages or more. Measured with gaps of 9 to 31 KiB: 2 to 3 times as fast as a request
// each.
constexpr int64_t kMaxMappedGap = 32 << 10;

// What ranks of a node read together is brought into the page cache across gaps that are cheaper for a disk than
// another request. There are ranks that want what lies in these gaps, or neighbours of it.
constexpr int64_t kMaxSharedGap = io::kDirectAccess.request_cost;

bool lie_close(const box::Loops& loops, int64_t max_gap) {
  for (size_t i = 0; i + 1 < loops.size(); ++i) {
    if (loops[i].source_stride - box::source_span(loops, i + 1) > max_gap) return false;
  }
  return true;
}

// From the first byte of its destination to the last.
int64_t span_of_destination(const Piece& piece) {
  const int64_t span = box::destination_span(piece.loops);
  // The last loop is over the bytes of an element on the source side.
  return piece.conversion == nullptr ? span : span + piece.conversion->to_bytes - piece.conversion->from_bytes;
}

int64_t bytes_written(const Piece& piece) {
  const int64_t bytes = box::volume(piece.loops);
  return piece.conversion == nullptr ? bytes : bytes / piece.conversion->from_bytes * piece.conversion->to_bytes;
}

io::MemoryRange destination_of(const Piece* pieces, const Piece* end) {
  io::MemoryRange range{pieces->destination, pieces->destination};
  for (const Piece* piece = pieces; piece != end; ++piece) {
    range.begin = std::min<const std::byte*>(range.begin, piece->destination);
    range.end = std::max<const std::byte*>(range.end, piece->destination + span_of_destination(*piece));
  }
  return range;
}

// For less, asking the system costs as much as it saves.
constexpr int64_t kMinPopulated = 256 << 10;

void populate_destinations(const Piece* piece, const Piece* end) {
  for (; piece != end; ++piece) {
    const int64_t span = span_of_destination(*piece);
    if (span >= kMinPopulated && span == bytes_written(*piece)) {
      copy::populate(piece->destination, static_cast<size_t>(span));
    }
  }
}

// Copies pieces that lie close together from a mapping. False if they are to be read.
bool copy_mapped(const Policy& policy, const io::ByteSource& source, Worker& worker, const Piece* pieces,
                 size_t count) {
  const Piece* end = pieces + count;
  const int64_t begin = pieces->source;
  const int64_t size = (end - 1)->source + box::source_span((end - 1)->loops) - begin;
  if (!policy.mapped) return false;
  if (size < kMinMapped) {
    const bool never = policy.block_bytes < kMinMapped && policy.run_bytes < kMinMapped;
    if (never) worker.counters->unmapped.store(io::kSmallBlocks, std::memory_order_relaxed);
    return false;
  }
  int64_t needed = 0;
  for (const Piece* piece = pieces; piece != end; ++piece) needed += box::volume(piece->loops);
  const auto copy = [=](const std::byte* data) {
    for (const Piece* piece = pieces; piece != end; ++piece) {
      place(*piece, data + (piece->source - begin));
    }
  };
  return source.copy_mapped(
      {begin, static_cast<size_t>(size), static_cast<size_t>(needed), destination_of(pieces, end), copy}, worker.window,
      *worker.counters);
}

// One request for all pieces and what lies between them.
void read_through(const Policy& policy, const io::ByteSource& source, Worker& worker, const Piece* pieces,
                  size_t count) {
  if (copy_mapped(policy, source, worker, pieces, count)) return;
  const Piece* end = pieces + count;
  const int64_t begin = pieces->source;
  if (!policy.whole_pages && all_scatter(pieces, end)) {
    ScatterList list(worker.vectors, worker.buffer, policy.request_cost, begin);
    for (const Piece* piece = pieces; piece != end; ++piece) {
      list.add(piece->loops.data(), piece->loops.size(), piece->source, piece->destination);
    }
    source.read_scattered(worker.vectors, begin, *worker.counters);
    return;
  }
  if (count == 1 && pieces->owns_pages) {
    source.read_pages(pieces->destination, static_cast<size_t>(pieces->loops[0].size), begin, *worker.counters);
    return;
  }
  const Piece& last = *(end - 1);
  const int64_t size = last.source + box::source_span(last.loops) - begin;
  const std::byte* data = source.view(worker.buffer, static_cast<size_t>(size), begin, *worker.counters);
  for (const Piece* piece = pieces; piece != end;) {
    const bool converts = piece->conversion != nullptr;
    trace::Span span(worker.counters->recorder, converts ? "convert" : "slice");
    for (; piece != end && (piece->conversion != nullptr) == converts; ++piece) {
      span.add_bytes(box::volume(piece->loops));
      place(*piece, data + (piece->source - begin));
    }
  }
}

// One request for each step of the loops whose gaps are not worth reading.
void read_runs(const Policy& policy, const io::ByteSource& source, Worker& worker, const Piece& piece) {
  const box::Dim& outer = piece.loops[0];
  if (piece.loops.size() == 1) {
    if (piece.conversion != nullptr) return read_through(policy, source, worker, &piece, 1);
    if (copy_mapped(policy, source, worker, &piece, 1)) return;
    source.read_exactly(piece.destination, static_cast<size_t>(outer.size), piece.source, *worker.counters);
    return;
  }
  if (lie_close(piece.loops, kMaxMappedGap) && copy_mapped(policy, source, worker, &piece, 1)) return;
  Piece inner = piece;
  inner.loops.erase(inner.loops.begin());
  const bool through = policy.reads_through(inner.loops, 0);
  for (int64_t i = 0; i < outer.size; ++i) {
    worker.stop_if_cancelled();
    inner.source = piece.source + i * outer.source_stride;
    inner.destination = piece.destination + i * outer.destination_stride;
    if (through) {
      read_through(policy, source, worker, &inner, 1);
    } else {
      read_runs(policy, source, worker, inner);
    }
  }
}

}  // namespace

void Reader::run(const Schedule& schedule, const Task& task, Worker& worker) {
  const Piece* piece = &schedule.pieces[task.first];
  try {
    with_memory_errors([&] {
      const io::ByteSource& source = worker.open(*sources_[task.range.file]);
      const Policy& policy = policies_[task.range.file];
      if (policy.shared && lie_close(piece->loops, kMaxSharedGap)) {
        source.read_ahead(static_cast<size_t>(task.range.end - task.range.begin), task.range.begin);
      }
      populate_destinations(piece, piece + task.count);
      if (task.count > 1 || policy.reads_through(piece->loops, 0)) {
        read_through(policy, source, worker, piece, task.count);
      } else {
        read_runs(policy, source, worker, *piece);
      }
    });
  } catch (Error& error) {
    const Piece* end = piece + task.count;
    while (piece + 1 != end && (piece + 1)->source <= error.offset) ++piece;
    attribute(error, piece->item);
    throw;
  }
}

}  // namespace dcp_fast::transfer
