#include "exchange/exchange.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "box/box.h"
#include "box/cut.h"
#include "error.h"
#include "io/memory_source.h"
#include "transfer/schedule.h"
#include "transfer/workers.h"

namespace dcp_fast::exchange {

namespace {

using transfer::Layouts;
using transfer::Options;

// Gives each file the number that all ranks have for it: its place among `names`. Returns what hinders that; empty if
// nothing does.
std::string number_files(std::vector<Need>& needs, std::vector<std::string>& names) {
  struct Known {
    const NeededFile* file;
    uint32_t number;
  };
  std::map<std::string, Known> files;
  for (const Need& need : needs) {
    for (const NeededFile& file : need.files()) {
      const auto [entry, is_new] = files.try_emplace(file.name, Known{&file, 0});
      const NeededFile& other = *entry->second.file;
      if (is_new || (other.size == file.size && other.version == file.version)) continue;
      if (other.size == file.size) return "ranks see different files: " + file.name + " was not written at one time";
      return "ranks see different files: " + file.name + " has " + std::to_string(file.size) + " bytes on one, and " +
             std::to_string(other.size) + " on another";
    }
  }
  for (auto& [name, known] : files) {
    known.number = static_cast<uint32_t>(names.size());
    names.push_back(name);
  }
  for (Need& need : needs) {
    std::vector<uint32_t> numbers;
    numbers.reserve(need.files().size());
    for (const NeededFile& file : need.files()) numbers.push_back(files.at(file.name).number);
    need.number_files(numbers);
  }
  return "";
}

// Segments begin where headers can be looked at in place.
void align(std::vector<int64_t>& segments) {
  for (int64_t& bytes : segments) bytes = (bytes + kHeaderBytes - 1) / kHeaderBytes * kHeaderBytes;
}

// Changes the strides of one side so that bytes lie one after another.
void pack_side(box::Loops& loops, int64_t box::Dim::* stride_of) {
  int64_t stride = 1;
  for (auto loop = loops.rbegin(); loop != loops.rend(); ++loop) {
    (*loop).*stride_of = stride;
    stride *= loop->size;
  }
}

// The index of a record that has a byte of a file, or nothing.
std::optional<size_t> record_at(const Layouts& layouts, size_t source, int64_t offset) {
  for (size_t i = 0; i < layouts.records.size(); ++i) {
    const transfer::Record& record = layouts.records[i];
    if (record.file == source && offset >= record.offset && offset < record.offset + record.length) return i;
  }
  return std::nullopt;
}

}  // namespace

// Bytes that are read at once, of units of this rank.
struct Exchange::Span {
  uint32_t file = 0;
  int64_t begin = 0;
  int64_t end = 0;
  size_t first_unit = 0;  // among those of this rank in the round
  size_t last_unit = 0;
};

Exchange::Exchange(std::vector<Need> needs, Ranks ranks, uint32_t rank, const RoundLimits& limits)
    : needs_(std::move(needs)), ranks_of_job_(std::move(ranks)), rank_(rank), ranks_of_need_(needs_.size()) {
  for (size_t i = 0; i < ranks_of_job_.needs.size(); ++i) {
    ranks_of_need_.at(ranks_of_job_.needs[i]).push_back(static_cast<uint32_t>(i));
  }
  std::vector<std::string> names;
  obstacle_ = number_files(needs_, names);
  if (!obstacle_.empty()) return;
  assignment_ = std::make_unique<Assignment>(needs_, ranks_of_job_, limits);
  obstacle_ = assignment_->obstacle();
  std::map<std::string, size_t> own;
  for (const NeededFile& file : own_need().files()) own.emplace(file.name, own.size());
  for (const std::string& name : names) {
    const auto found = own.find(name);
    sources_.push_back(found == own.end() ? own.size() : found->second);  // past the end: only others need it
  }
}

const Assignment& Exchange::assignment() const {
  if (!obstacle_.empty()) throw std::logic_error("nothing is assigned: " + obstacle_);
  return *assignment_;
}

std::pair<const uint32_t*, const uint32_t*> Exchange::units_of(uint32_t round, uint32_t owner) const {
  if (round >= rounds()) throw std::out_of_range("no such round");
  const auto [begin, end] = assignment_->units_of_round(round);
  const std::vector<Unit>& units = assignment_->units();
  return {std::partition_point(begin, end, [&](uint32_t unit) { return units[unit].owner < owner; }),
          std::partition_point(begin, end, [&](uint32_t unit) { return units[unit].owner <= owner; })};
}

int64_t Exchange::share_of(size_t unit, uint32_t need) const {
  const auto [begin, end] = assignment_->shares(unit);
  for (const Share* share = begin; share != end; ++share) {
    if (share->need == need) return share->bytes;
  }
  return 0;
}

std::vector<int64_t> Exchange::bytes_to_send(uint32_t round) const {
  std::vector<int64_t> bytes(ranks_of_job_.needs.size(), kHeaderBytes);
  const auto [begin, end] = units_of(round, rank_);
  for (const uint32_t* unit = begin; unit != end; ++unit) {
    const auto [first, last] = assignment_->shares(*unit);
    for (const Share* share = first; share != last; ++share) {
      for (const uint32_t rank : ranks_of_need_[share->need]) bytes[rank] += share->bytes;
    }
  }
  align(bytes);
  return bytes;
}

std::vector<int64_t> Exchange::bytes_to_receive(uint32_t round) const {
  if (round >= rounds()) throw std::out_of_range("no such round");
  std::vector<int64_t> bytes(ranks_of_job_.needs.size(), kHeaderBytes);
  const auto [begin, end] = assignment_->units_of_round(round);
  for (const uint32_t* unit = begin; unit != end; ++unit) {
    bytes[assignment_->units()[*unit].owner] += share_of(*unit, ranks_of_job_.needs[rank_]);
  }
  align(bytes);
  return bytes;
}

std::vector<Exchange::Span> Exchange::spans_to_read(uint32_t round, uint32_t owner, const Layouts& layouts,
                                                    const transfer::Limits& limits) const {
  const std::vector<transfer::Policy> policies = transfer::policies_for(layouts.sources, limits, false);
  const auto [begin, end] = units_of(round, owner);
  std::vector<Span> spans;
  std::vector<std::pair<int64_t, int64_t>> ranges;  // of one unit
  for (const uint32_t* at = begin; at != end; ++at) {
    const Unit& unit = assignment_->units()[*at];
    const transfer::Policy& policy = policies[sources_[unit.file]];
    ranges.clear();
    const auto [first, last] = assignment_->shares(*at);
    for (const Share* share = first; share != last; ++share) {
      const Need& need = needs_[share->need];
      need.each_within(unit.file, unit.begin, unit.end, [&](const NeededBox& box) {
        const box::Dim* loops = need.loops(box);
        for (const box::Part& part : box::cut(loops, box.depth, unit.begin - box.begin, unit.end - box.begin)) {
          transfer::each_request(policy, part.loops, 0, box.begin + part.source,
                                 [&](int64_t from, int64_t to) { ranges.emplace_back(from, to); });
        }
      });
    }
    std::sort(ranges.begin(), ranges.end());
    const auto number = static_cast<size_t>(at - begin);
    for (auto [from, to] : ranges) {
      if (!spans.empty() && spans.back().file == unit.file && from - spans.back().end <= policy.request_cost) {
        Span& before = spans.back();
        from = std::max(from, before.end);
        if (from >= to) continue;
        // The gap before it is read too, if there is room in the block.
        if (to - before.begin <= policy.block_bytes) {
          before.end = to;
          before.last_unit = number;
          continue;
        }
      }
      for (; to - from > policy.block_bytes; from += policy.block_bytes) {
        spans.push_back({unit.file, from, from + policy.block_bytes, number, number});
      }
      spans.push_back({unit.file, from, to, number, number});
    }
  }
  return spans;
}

std::vector<int64_t> Exchange::bytes_to_read(const Layouts& layouts, const Options& options) const {
  std::vector<int64_t> sizes;
  for (const size_t source : sources_) {
    if (source >= layouts.sources.size()) throw std::invalid_argument("the layouts lack a file that is needed");
    const io::OpenSource open(*layouts.sources[source]);
    sizes.push_back(open.get()->size());
  }
  const transfer::Limits limits = transfer::limits_of(options, io::access_of(layouts.sources));
  const std::vector<transfer::Policy> policies = transfer::policies_for(layouts.sources, limits, false);
  std::vector<int64_t> bytes(ranks_of_job_.needs.size(), 0);
  for (uint32_t rank = 0; rank < bytes.size(); ++rank) {
    for (uint32_t round = 0; round < rounds(); ++round) {
      for (const Span& span : spans_to_read(round, rank, layouts, limits)) {
        bytes[rank] += policies[sources_[span.file]].bytes_of_request(span.begin, span.end, sizes[span.file]);
      }
    }
  }
  return bytes;
}

void Exchange::pack(uint32_t round, std::byte* memory, const Layouts& layouts, const Options& options,
                    const std::function<bool()>& interrupted, RoundStats& stats) const {
  const transfer::Limits limits = transfer::limits_of(options, io::access_of(layouts.sources));
  const auto own_units = units_of(round, rank_);
  const uint32_t* begin = own_units.first;
  const auto count = static_cast<size_t>(own_units.second - begin);
  const size_t ranks = ranks_of_job_.needs.size();

  // Where each unit's bytes for each rank begin.
  std::vector<int64_t> segments(ranks, kHeaderBytes);
  const std::vector<int64_t> sizes = bytes_to_send(round);
  for (size_t rank = 1; rank < ranks; ++rank) segments[rank] += segments[rank - 1] - kHeaderBytes + sizes[rank - 1];
  std::vector<std::vector<int64_t>> begins(count);
  for (size_t i = 0; i < count; ++i) {
    begins[i] = segments;
    const auto [first, last] = assignment_->shares(begin[i]);
    for (const Share* share = first; share != last; ++share) {
      for (const uint32_t rank : ranks_of_need_[share->need]) segments[rank] += share->bytes;
    }
  }

  const auto copy_unit = [&](size_t index, const Span& span, const std::byte* data) {
    const Unit& unit = assignment_->units()[begin[index]];
    const auto [first, last] = assignment_->shares(begin[index]);
    const int64_t from = std::max(span.begin, unit.begin);
    const int64_t to = std::min(span.end, unit.end);
    for (const Share* share = first; share != last; ++share) {
      const Need& need = needs_[share->need];
      int64_t position = 0;
      need.each_within(unit.file, unit.begin, unit.end, [&](const NeededBox& box) {
        const int64_t before = need.bytes_within(box, unit.begin, from);
        for (box::Part& part : box::cut(need.loops(box), box.depth, from - box.begin, to - box.begin)) {
          pack_side(part.loops, &box::Dim::destination_stride);
          const std::byte* source = data + (box.begin + part.source - span.begin);
          for (const uint32_t rank : ranks_of_need_[share->need]) {
            box::copy(memory + begins[index][rank] + position + before + part.packed, source, part.loops.data(),
                      part.loops.size());
          }
        }
        position += need.bytes_within(box, unit.begin, unit.end);
      });
    }
  };

  const std::vector<Span> spans = spans_to_read(round, rank_, layouts, limits);
  io::IoCounters counters = options.counters();
  transfer::run_parallel(
      spans.size(), limits.threads, counters, interrupted, [&](size_t task, transfer::Worker& worker) {
        const Span& span = spans[task];
        const size_t file = sources_[span.file];
        try {
          with_memory_errors([&] {
            const io::ByteSource& source = worker.open(*layouts.sources[file]);
            const std::byte* data =
                source.view(worker.buffer, static_cast<size_t>(span.end - span.begin), span.begin, *worker.counters);
            for (size_t unit = span.first_unit; unit <= span.last_unit; ++unit) copy_unit(unit, span, data);
          });
        } catch (Error& error) {
          const auto record = record_at(layouts, file, std::max(error.offset, span.begin));
          if (record) layouts.attribute(error, *record);
          throw;
        }
      });
  stats.requests = counters.requests;
  stats.bytes_read = counters.bytes;
}

transfer::Stats Exchange::place(uint32_t round, const std::byte* memory, const Layouts& layouts, const LocalNeed& local,
                                const Options& options, const transfer::CudaTargets& cuda,
                                const std::function<bool()>& interrupted) const {
  const Need& need = own_need();
  if (local.boxes.size() != need.boxes().size()) throw std::invalid_argument("the exchange is of another need");
  const uint32_t own = ranks_of_job_.needs[rank_];
  const std::vector<int64_t> sizes = bytes_to_receive(round);
  transfer::Boxes boxes;
  int64_t segment = 0;
  for (uint32_t owner = 0; owner < sizes.size(); ++owner) {
    int64_t position = segment + kHeaderBytes;
    const auto [begin, end] = units_of(round, owner);
    for (const uint32_t* at = begin; at != end; ++at) {
      const Unit& unit = assignment_->units()[*at];
      if (share_of(*at, own) == 0) continue;
      need.each_within(unit.file, unit.begin, unit.end, [&](const NeededBox& box) {
        const LocalBox& to = local.boxes[box.number];
        const copy::Conversion* conversion = to.conversion ? &*to.conversion : nullptr;
        for (box::Part& part :
             box::cut(to.loops.data(), to.loops.size(), unit.begin - box.begin, unit.end - box.begin)) {
          pack_side(part.loops, &box::Dim::source_stride);
          boxes.add(to.device, {0, position + part.packed, to.destination + part.destination, box.number,
                                std::move(part.loops), conversion});
        }
        position += need.bytes_within(box, unit.begin, unit.end);
      });
    }
    segment += sizes[owner];
  }
  // Pieces of one box are converted in rounds, but it is one item that is converted.
  boxes.converted = 0;
  io::ByteSources sources;
  sources.push_back(std::make_unique<io::MemorySource>("what other ranks read", memory, static_cast<size_t>(segment)));
  const auto attribute = [&](Error& error, size_t box) {
    error.path.clear();
    error.offset = -1;
    layouts.attribute(error, local.boxes[box].record);
  };
  return transfer::run_boxes(std::move(boxes), sources, attribute, options, cuda, interrupted);
}

}  // namespace dcp_fast::exchange
