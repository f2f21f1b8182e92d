#include "transfer/record_reads.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <utility>

#include "box/box.h"
#include "error.h"
#include "io/buffer.h"
#include "transfer/reader.h"
#include "transfer/schedule.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

namespace {

// Small records have their memory together: as much as a request is worth, or less where memory is short.
constexpr int64_t kMaxChunkBytes = 1 << 20;
constexpr int64_t kLeastChunks = 8;

size_t aligned(size_t size) { return (size + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment; }

// Memory that is used again, as the first touch of a page costs as much as reading it.
class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  // `limit`: memory that nobody holds is freed where there would be more bytes than this in all.
  explicit MemoryPool(size_t limit) : limit_(limit) {}

  // It comes back when nobody holds it any more, or is freed if the pool is gone then. Throws std::bad_alloc.
  std::shared_ptr<std::byte> take(size_t size) {
    std::shared_ptr<Memory> memory = find(size);
    if (!memory) {
      memory = std::make_shared<Memory>();
      memory->data = memory->buffer.reserve(size);
      memory->capacity = size;
      const std::scoped_lock lock(mutex_);
      free_.reserve(++count_);  // so that put() needs no memory
      held_ += size;
    }
    std::byte* data = memory->data;
    return {data, [pool = weak_from_this(), memory = std::move(memory)](std::byte*) {
              if (const auto alive = pool.lock()) alive->put(memory);
            }};
  }

 private:
  struct Memory {
    io::AlignedBuffer buffer;
    std::byte* data = nullptr;
    size_t capacity = 0;
  };

  // Memory of about that size, or nullptr, with room for it under the limit as far as that can be had.
  std::shared_ptr<Memory> find(size_t size) {
    const std::scoped_lock lock(mutex_);
    const auto fits = [size](const auto& memory) {
      return memory->capacity >= size && memory->capacity - size <= size / 4;
    };
    const auto found = std::find_if(free_.begin(), free_.end(), fits);
    if (found != free_.end()) {
      std::shared_ptr<Memory> memory = std::move(*found);
      free_.erase(found);
      return memory;
    }
    while (!free_.empty() && held_ + size > limit_) {
      held_ -= free_.front()->capacity;
      --count_;
      free_.erase(free_.begin());
    }
    return nullptr;
  }

  void put(const std::shared_ptr<Memory>& memory) {
    const std::scoped_lock lock(mutex_);
    free_.push_back(memory);
  }

  const size_t limit_;
  std::mutex mutex_;
  size_t held_ = 0;   // bytes, of all memory
  size_t count_ = 0;  // of all memory
  std::vector<std::shared_ptr<Memory>> free_;
};

// Records that have their memory together.
struct Chunk {
  size_t first = 0;             // among the records
  std::vector<size_t> offsets;  // of each, in memory
  size_t size = 0;
  Schedule schedule;  // whose destinations are set when there is memory
  std::once_flag allocated;
  std::shared_ptr<std::byte> memory;
};

class Reads {
 public:
  Reads(const Layouts& layouts, const std::vector<size_t>& records, int64_t most_bytes, const Limits& limits)
      : layouts_(layouts),
        records_(records),
        policies_(policies_for(layouts.sources, limits, false)),
        reader_(layouts.sources, policies_,
                [&layouts, &records](Error& error, size_t item) {
                  error.item = static_cast<int64_t>(item);
                  layouts.attribute(error, records[item]);
                }),
        pool_(std::make_shared<MemoryPool>(static_cast<size_t>(most_bytes))) {
    const int64_t most = std::min(kMaxChunkBytes, most_bytes / kLeastChunks);
    for (size_t i = 0; i < records.size(); ++i) {
      const size_t size = aligned(static_cast<size_t>(layouts.records.at(records[i]).length));
      if (chunks_.empty() || chunks_.back().size + size > static_cast<size_t>(most)) chunks_.emplace_back().first = i;
      Chunk& chunk = chunks_.back();
      chunk.offsets.push_back(chunk.size);
      chunk.size += size;
    }
    for (Chunk& chunk : chunks_) plan(chunk);
  }

  Groups groups(size_t most_bytes) const {
    Groups groups;
    size_t ahead = 0;  // bytes of the chunks behind `taken`, up to the one that is looked at
    size_t taken = 0;
    for (size_t i = 0; i < chunks_.size(); ++i) {
      groups.tasks.push_back(chunks_[i].schedule.tasks.size());
      if (i > 0) ahead += chunks_[i].size;
      while (taken < i && ahead > most_bytes) ahead -= chunks_[++taken].size;
      groups.after.push_back(taken);
    }
    return groups;
  }

  void read(size_t index, size_t task, Worker& worker) {
    Chunk& chunk = chunks_[index];
    try {
      with_memory_errors([&] { std::call_once(chunk.allocated, [&] { allocate(chunk); }); });
    } catch (Error& error) {
      layouts_.attribute(error, records_[chunk.first]);
      throw;
    }
    reader_.run(chunk.schedule, chunk.schedule.tasks[task], worker);
  }

  void give(size_t index, const std::function<void(size_t, RecordBytes)>& take) {
    Chunk& chunk = chunks_[index];
    const std::shared_ptr<std::byte> memory = std::move(chunk.memory);
    chunk.schedule = {};
    for (size_t i = 0; i < chunk.offsets.size(); ++i) {
      const size_t record = chunk.first + i;
      const auto size = static_cast<size_t>(layouts_.records[records_[record]].length);
      take(record, {std::shared_ptr<std::byte>(memory, memory.get() + chunk.offsets[i]), size});
    }
  }

  int64_t bytes() const {
    int64_t total = 0;
    for (const size_t record : records_) total += layouts_.records[record].length;
    return total;
  }

 private:
  void plan(Chunk& chunk) {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < chunk.offsets.size(); ++i) {
      const Record& record = layouts_.records[records_[chunk.first + i]];
      if (record.length == 0) continue;
      Piece piece;
      piece.file = record.file;
      piece.source = record.offset;
      // An offset until there is memory.
      piece.destination = reinterpret_cast<std::byte*>(chunk.offsets[i]);  // NOLINT(performance-no-int-to-ptr)
      piece.item = chunk.first + i;
      piece.loops = {{record.length, 1, 1}};
      pieces.push_back(std::move(piece));
    }
    chunk.schedule = join_pieces(split_boxes(std::move(pieces), policies_), policies_);
  }

  void allocate(Chunk& chunk) {
    chunk.memory = pool_->take(chunk.size);
    for (Piece& piece : chunk.schedule.pieces) {
      piece.destination = chunk.memory.get() + reinterpret_cast<uint64_t>(piece.destination);
    }
  }

  const Layouts& layouts_;
  const std::vector<size_t>& records_;
  const std::vector<Policy> policies_;
  Reader reader_;
  const std::shared_ptr<MemoryPool> pool_;
  std::deque<Chunk> chunks_;
};

}  // namespace

Stats read_records(const Layouts& layouts, const std::vector<size_t>& records, int64_t most_bytes,
                   const Options& options, const std::function<bool()>& interrupted,
                   const std::function<void(size_t, RecordBytes)>& take) {
  const Limits limits = limits_of(options, io::access_of(layouts.sources));
  Reads reads(layouts, records, most_bytes, limits);
  Groups groups = reads.groups(static_cast<size_t>(most_bytes));
  groups.finish = [&](size_t chunk) { reads.give(chunk, take); };
  io::IoCounters counters = options.counters();
  run_parallel(groups, limits.threads, counters, interrupted,
               [&reads](size_t chunk, size_t task, Worker& worker) { reads.read(chunk, task, worker); });
  return {counters.requests, counters.bytes, reads.bytes()};
}

}  // namespace dcp_fast::transfer
