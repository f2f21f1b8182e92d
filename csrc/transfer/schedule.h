// From copies to tasks: which bytes are read by which request, in which order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "box/box.h"
#include "copy/convert.h"
#include "io/byte_source.h"
#include "transfer/node.h"
#include "transfer/options.h"

namespace dcp_fast::transfer {

// A part of a box that is small enough for one task.
struct Piece {
  size_t file = 0;
  int64_t source = 0;  // of the first byte, in the file
  std::byte* destination = nullptr;
  size_t item = 0;  // for error messages
  box::Loops loops;
  const copy::Conversion* conversion = nullptr;  // of a destination of another dtype; else the bytes are copied
  bool owns_pages = false;  // the rest of the pages that its destination touches may be overwritten
};

struct Range {
  size_t file = 0;
  int64_t begin = 0;
  int64_t end = 0;
};

// One unit of work: a single item, or neighbours that one request brings.
struct Task {
  Range range;
  size_t first = 0;  // item
  size_t count = 0;
};

struct Schedule {
  std::vector<Piece> pieces;
  std::vector<Task> tasks;
};

// How the boxes of one file are read.
//
// A strided box can be read run by run, which costs a request each, or through, which costs the gaps. Each loop of a
// box compares its gap with what a request costs, in bytes.
struct Policy {
  int64_t request_cost = 0;
  int64_t block_bytes = 0;   // the most that one request reads
  bool whole_pages = false;  // of io::Access: every read goes through a bounce buffer
  // The most that one request reads of a contiguous box. This may be more than a block, as for slots: where many
  // threads share the bounce buffers, blocks are small, but contiguous boxes need none.
  int64_t run_bytes = 0;
  // Contiguous boxes are cut where a block is full, so that neighbours share blocks and few requests are small. Else
  // each box is cut on its own.
  bool fills_blocks = false;
  // The most that one request reads of a box that is converted.
  int64_t converted_bytes = 0;
  bool mapped = false;  // of io::Access: what lies close together is copied from a mapping, if it is much
  bool shared = false;  // of io::Access

  // Whether loops[level..] are read as one span, gaps included.
  bool reads_through(const box::Loops& loops, size_t level) const;
};

// Not `mapped`: what is read is used soon, and should stay in the processor's cache.
std::vector<Policy> policies_for(const io::ByteSources& sources, const Limits& limits, bool mapped);

// Makes tasks of items that ascend by file and begin, in the same order. `range_of(item)` is what an item needs. An
// item joins the task before it if the gap costs less than a request, all together fit into a block, and `joins(range
// of the task, item)` is true.
template <typename RangeOf, typename Joins>
std::vector<Task> join_neighbours(size_t items, const std::vector<Policy>& policies, const RangeOf& range_of,
                                  const Joins& joins) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < items; ++i) {
    const Range range = range_of(i);
    if (!tasks.empty() && tasks.back().range.file == range.file) {
      Task& last = tasks.back();
      const Policy& policy = policies[range.file];
      const int64_t end = std::max(last.range.end, range.end);
      if (range.begin >= last.range.begin && range.begin - last.range.end <= policy.request_cost &&
          end - last.range.begin <= policy.block_bytes && joins(last.range, i)) {
        last.range.end = end;
        ++last.count;
        continue;
      }
    }
    tasks.push_back({range, i, 1});
  }
  return tasks;
}

// Turns tasks around so that each rank of a node begins at a place of its own, and goes on from the end to the
// beginning. `bytes_of`: how much of the files a task covers. Ranks that want the same divide it evenly: when each has
// come to where the next one began, all of it is in the page cache.
template <typename AnyTask, typename BytesOf>
void begin_at_own_place(std::vector<AnyTask>& tasks, const Node& node, const BytesOf& bytes_of) {
  int64_t all = 0;
  for (const AnyTask& task : tasks) all += bytes_of(task);
  const double place = static_cast<double>(all) * node.rank / node.ranks;
  const auto begin = std::find_if(tasks.begin(), tasks.end(), [&, passed = 0.0](const AnyTask& task) mutable {
    const auto bytes = static_cast<double>(bytes_of(task));
    const bool is_behind = passed + bytes / 2 >= place;  // its middle is, so that it begins near there
    passed += bytes;
    return is_behind;
  });
  std::rotate(tasks.begin(), begin, tasks.end());
}

// Splits boxes into pieces of at most a block, which ascend by file and offset.
std::vector<Piece> split_boxes(std::vector<Piece> boxes, const std::vector<Policy>& policies);

// Makes tasks of such pieces, in the same order: small neighbours share one.
Schedule join_pieces(std::vector<Piece> pieces, const std::vector<Policy>& policies);

}  // namespace dcp_fast::transfer
