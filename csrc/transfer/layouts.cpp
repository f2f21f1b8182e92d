#include "transfer/layouts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <tuple>
#include <utility>

#include "error.h"
#include "transfer/schedule.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

namespace {

using checkpoint::Bytes;
using checkpoint::kHeadBytes;
using checkpoint::kTailBytes;
using checkpoint::ParsedRecord;
using checkpoint::PickleCache;

enum class Part { kWhole, kHead, kTail };

// A piece of a record that the layout stage reads.
struct Window {
  size_t record = 0;
  Part part = Part::kWhole;
  int64_t begin = 0;  // in the file
  int64_t end = 0;
};

// Both ends of a record, kept until both have come: they may arrive with different requests.
struct Ends {
  std::atomic<int> missing{2};
  std::unique_ptr<std::byte[]> bytes;
};

// Opens every file once: chooses how to access it, and checks that no record reaches past its end.
void probe_files(Layouts& layouts, const std::vector<size_t>& order, const Options& options,
                 const std::function<bool()>& interrupted) {
  std::vector<std::pair<size_t, size_t>> ranges(layouts.sources.size(), {0, 0});  // of `order`, by file
  for (size_t i = 0; i < order.size(); ++i) {
    auto& [begin, end] = ranges[layouts.records[order[i]].file];
    if (begin == end) begin = i;
    end = i + 1;
  }
  layouts.files.resize(layouts.sources.size());
  io::IoCounters unused;
  run_parallel(ranges.size(), limits_of(options, {}).threads, unused, interrupted, [&](size_t file, Worker&) {
    const auto [begin, end] = ranges[file];
    if (begin == end) return;
    size_t checked = begin;
    try {
      io::ByteSource& source = *layouts.sources[file];
      const io::OpenSource open(source);
      layouts.files[file] = {source.size(), source.version()};
      for (; checked < end; ++checked) {
        const Record& record = layouts.records[order[checked]];
        source.check_range(static_cast<size_t>(record.length), record.offset);
      }
      const Record& last = layouts.records[order[end - 1]];
      const int64_t first_byte = layouts.records[order[begin]].offset;
      source.choose_access(first_byte, last.offset + last.length);
    } catch (Error& error) {
      layouts.attribute(error, order[std::min(checked, end - 1)]);
      throw;
    }
  });
}

std::vector<Window> make_windows(const Layouts& layouts, const std::vector<size_t>& order,
                                 const std::vector<Policy>& policies) {
  std::vector<Window> windows;
  windows.reserve(order.size());
  for (const size_t index : order) {
    const Record& record = layouts.records[index];
    if (record.fallback || layouts.parsed[index].status == ParsedRecord::Status::kTensor) continue;
    const int64_t end = record.offset + record.length;
    const Policy& policy = policies[record.file];
    if (record.length <= std::min(policy.block_bytes, kHeadBytes + kTailBytes + policy.request_cost)) {
      windows.push_back({index, Part::kWhole, record.offset, end});
    } else {
      windows.push_back({index, Part::kHead, record.offset, record.offset + kHeadBytes});
      windows.push_back({index, Part::kTail, end - kTailBytes, end});
    }
  }
  return windows;
}

std::vector<Task> join_windows(const Layouts& layouts, const std::vector<Window>& windows,
                               const std::vector<Policy>& policies) {
  const auto range_of = [&](size_t i) {
    return Range{layouts.records[windows[i].record].file, windows[i].begin, windows[i].end};
  };
  return join_neighbours(windows.size(), policies, range_of, [](const Range&, size_t) { return true; });
}

// Parses what is there, and reads more as long as the parser asks for more.
void parse(Layouts& layouts, size_t index, Bytes head, Bytes tail, PickleCache& pickles, const Worker& worker,
           const io::ByteSource& source) {
  const Record& record = layouts.records[index];
  ParsedRecord parsed = checkpoint::parse_record(head, tail, record.length, pickles);
  std::vector<std::byte> bytes;
  while (parsed.status == ParsedRecord::Status::kNeedsMore) {
    const auto head_size = static_cast<size_t>(parsed.head);
    const auto tail_size = static_cast<size_t>(parsed.tail);
    bytes.resize(head_size + tail_size);
    source.read_exactly(bytes.data(), head_size, record.offset, *worker.counters);
    source.read_exactly(bytes.data() + head_size, tail_size, record.offset + record.length - parsed.tail,
                        *worker.counters);
    const bool grew = head_size > head.size() || tail_size > tail.size();
    head = Bytes(bytes.data(), head_size);
    tail = Bytes(bytes.data() + head_size, tail_size);
    parsed = checkpoint::parse_record(head, tail, record.length, pickles);
    if (!grew && parsed.status == ParsedRecord::Status::kNeedsMore) {
      parsed.status = ParsedRecord::Status::kUnknown;
      parsed.reason = "header cut short";
    }
  }
  if (parsed.status == ParsedRecord::Status::kCorrupt) {
    throw Error(ErrorKind::kCorrupt, parsed.reason);
  }
  if (parsed.status == ParsedRecord::Status::kCorruptPickle) {
    throw Error(ErrorKind::kCorruptPickle, parsed.reason);
  }
  layouts.parsed[index] = std::move(parsed);
}

class LayoutReader {
 public:
  LayoutReader(Layouts& layouts, std::vector<Window> windows, std::vector<Task> tasks)
      : layouts_(layouts), windows_(std::move(windows)), tasks_(std::move(tasks)), ends_(layouts.records.size()) {}

  size_t tasks() const { return tasks_.size(); }

  void read(size_t index, Worker& worker) {
    const Task& task = tasks_[index];
    const Range& range = task.range;
    size_t record = windows_[task.first].record;
    PickleCache pickles;
    try {
      with_memory_errors([&] {
        const io::ByteSource& source = worker.open(*layouts_.sources[range.file]);
        const std::byte* data =
            source.view(worker.buffer, static_cast<size_t>(range.end - range.begin), range.begin, *worker.counters);
        for (size_t i = task.first; i < task.first + task.count; ++i) {
          worker.stop_if_cancelled();  // a record may ask for more reads
          record = windows_[i].record;
          take(windows_[i], data + (windows_[i].begin - range.begin), pickles, worker, source);
        }
      });
    } catch (Error& error) {
      layouts_.attribute(error, record);
      throw;
    }
  }

 private:
  void take(const Window& window, const std::byte* data, PickleCache& pickles, const Worker& worker,
            const io::ByteSource& source) {
    const Bytes bytes(data, static_cast<size_t>(window.end - window.begin));
    if (window.part == Part::kWhole) return parse(layouts_, window.record, bytes, bytes, pickles, worker, source);
    Ends& ends = ends_[window.record];
    {
      const std::scoped_lock lock(ends_mutex_);
      if (!ends.bytes) ends.bytes = std::make_unique<std::byte[]>(kHeadBytes + kTailBytes);
    }
    std::memcpy(ends.bytes.get() + (window.part == Part::kHead ? 0 : kHeadBytes), data, bytes.size());
    if (ends.missing.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    parse(layouts_, window.record, Bytes(ends.bytes.get(), kHeadBytes),
          Bytes(ends.bytes.get() + kHeadBytes, kTailBytes), pickles, worker, source);
    ends.bytes.reset();
  }

  Layouts& layouts_;
  std::vector<Window> windows_;
  std::vector<Task> tasks_;
  std::vector<Ends> ends_;
  std::mutex ends_mutex_;
};

std::vector<size_t> ascending(const Layouts& layouts) {
  std::vector<size_t> order(layouts.records.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&layouts](size_t a, size_t b) {
    const Record& x = layouts.records[a];
    const Record& y = layouts.records[b];
    return std::tie(x.file, x.offset, x.length) < std::tie(y.file, y.offset, y.length);
  });
  return order;
}

// Payloads that are read through on the way from header to header are read again. Past the page cache a cold load of
// records of 256 KiB took twice as long so, one of 64 KiB 1.4 times, and one of 16 KiB as long as with single requests.
constexpr int64_t kMostHeaderGap = 32 << 10;

std::vector<Policy> header_policies(const Layouts& layouts, const Options& options) {
  Limits limits = limits_of(options, io::access_of(layouts.sources));
  limits.most_gap = std::min(limits.most_gap, kMostHeaderGap);
  return policies_for(layouts.sources, limits, false);
}

}  // namespace

void Layouts::attribute(Error& error, size_t record) const {
  if (error.record < 0) error.record = static_cast<int64_t>(record);
  if (error.offset >= 0) return;
  const Record& where = records[record];
  error.path = sources[where.file]->path();
  error.offset = where.offset;
  error.length = where.length;
}

int64_t Layouts::shared_files() const {
  return std::count_if(sources.begin(), sources.end(), [](const auto& source) { return source->access().shared; });
}

Layouts open_files(io::ByteSources sources, std::vector<Record> records, std::vector<checkpoint::TensorLayout> payloads,
                   const Options& options, const std::function<bool()>& interrupted) {
  Layouts layouts;
  layouts.sources = std::move(sources);
  layouts.records = std::move(records);
  layouts.parsed.resize(layouts.records.size());
  for (size_t i = 0; i < layouts.records.size(); ++i) {
    if (layouts.records[i].fallback)
      layouts.parsed[i].reason = "a transform was applied to it, or its bytes are to be swapped";
  }
  layouts.are_payloads = !payloads.empty();
  for (size_t i = 0; i < payloads.size(); ++i) {
    if (layouts.records[i].fallback) continue;
    layouts.parsed[i].status = ParsedRecord::Status::kTensor;
    layouts.parsed[i].layout = std::move(payloads[i]);
  }
  probe_files(layouts, ascending(layouts), options, interrupted);
  return layouts;
}

void be_read_by(Layouts& layouts, io::Readers readers, const Options& options,
                const std::function<bool()>& interrupted) {
  for (const auto& source : layouts.sources) source->be_read_by(readers);
  probe_files(layouts, ascending(layouts), options, interrupted);
}

std::vector<Range> header_ranges(const Layouts& layouts, const Options& options) {
  const std::vector<Policy> policies = header_policies(layouts, options);
  std::vector<Range> ranges;
  for (const Task& task : join_windows(layouts, make_windows(layouts, ascending(layouts), policies), policies)) {
    ranges.push_back(task.range);
  }
  return ranges;
}

void read_headers(Layouts& layouts, const Options& options, const std::function<bool()>& interrupted) {
  const std::vector<Policy> policies = header_policies(layouts, options);
  std::vector<Window> windows = make_windows(layouts, ascending(layouts), policies);
  std::vector<Task> tasks = join_windows(layouts, windows, policies);
  LayoutReader reader(layouts, std::move(windows), std::move(tasks));
  io::IoCounters counters = options.counters();
  const int threads = limits_of(options, io::access_of(layouts.sources)).threads;
  run_parallel(reader.tasks(), threads, counters, interrupted,
               [&reader](size_t task, Worker& worker) { reader.read(task, worker); });
  layouts.requests = counters.requests;
  layouts.bytes = counters.bytes;
}

}  // namespace dcp_fast::transfer
