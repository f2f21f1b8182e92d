#include "transfer/value_pickles.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "checkpoint/value_record.h"
#include "transfer/schedule.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

ValuePickles read_value_pickles(const Layouts& layouts, const std::vector<size_t>& records, const Options& options,
                                const std::function<bool()>& interrupted) {
  ValuePickles result;
  result.pickles.resize(records.size());
  std::vector<size_t> order;  // of `records`
  order.reserve(records.size());
  for (size_t i = 0; i < records.size(); ++i) {
    if (layouts.records.at(records[i]).length <= checkpoint::kMaxValueRecord) order.push_back(i);
  }
  const auto record_at = [&](size_t i) -> const Record& { return layouts.records[records[order[i]]]; };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const Record& x = layouts.records[records[a]];
    const Record& y = layouts.records[records[b]];
    return std::tie(x.file, x.offset, a) < std::tie(y.file, y.offset, b);
  });
  const Limits limits = limits_of(options, io::access_of(layouts.sources));
  const std::vector<Policy> policies = policies_for(layouts.sources, limits, false);
  const std::vector<Task> tasks = join_neighbours(
      order.size(), policies,
      [&](size_t i) {
        const Record& record = record_at(i);
        return Range{record.file, record.offset, record.offset + record.length};
      },
      [](const Range&, size_t) { return true; });
  io::IoCounters counters = options.counters();
  run_parallel(tasks.size(), limits.threads, counters, interrupted, [&](size_t index, Worker& worker) {
    const Task& task = tasks[index];
    try {
      with_memory_errors([&] {
        const std::byte* data = worker.open(*layouts.sources[task.range.file])
                                    .view(worker.buffer, static_cast<size_t>(task.range.end - task.range.begin),
                                          task.range.begin, *worker.counters);
        for (size_t i = task.first; i < task.first + task.count; ++i) {
          const Record& record = record_at(i);
          const auto pickle = checkpoint::find_value_pickle(
              {data + (record.offset - task.range.begin), static_cast<size_t>(record.length)});
          if (!pickle) continue;
          result.pickles[order[i]].assign(reinterpret_cast<const char*>(pickle->data()), pickle->size());
        }
      });
    } catch (Error& error) {
      layouts.attribute(error, records[order[task.first]]);
      throw;
    }
  });
  result.requests = counters.requests;
  result.bytes = counters.bytes;
  return result;
}

}  // namespace dcp_fast::transfer
