#include "exchange/exchange.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "box/box.h"
#include "box/cut.h"
#include "copy/copy.h"
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

// Changes the strides of one side so that bytes lie one after another.
void pack_side(box::Loops& loops, int64_t box::Dim::* stride_of) {
  int64_t stride = 1;
  for (auto loop = loops.rbegin(); loop != loops.rend(); ++loop) {
    (*loop).*stride_of = stride;
    stride *= loop->size;
  }
}

// What a round has room for beside the headers of all ranks' segments, and what fills these up. Where there are so many
// ranks that this would be little, it is half.
RoundLimits without_headers(const RoundLimits& limits, size_t ranks) {
  const auto headers = static_cast<int64_t>(ranks) * (2 * kHeaderBytes - 1);
  const auto rest = [headers](int64_t bytes) { return std::max(bytes - headers, (bytes + 1) / 2); };
  return {rest(limits.send_bytes), rest(limits.receive_bytes)};
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

Exchange::Exchange(std::vector<Need> needs, const Ranks& ranks, uint32_t rank, const std::vector<NeededFile>& files,
                   const RoundLimits& limits, const Network& network)
    : rank_(rank) {
  std::vector<std::string> names;
  obstacle_ = number_files(needs, names);
  if (!obstacle_.empty()) return;
  own_boxes_ = needs.at(ranks.needs.at(rank_)).boxes().size();
  std::map<std::string, size_t> sources;
  for (const NeededFile& file : files) sources.emplace(file.name, sources.size());
  for (const std::string& name : names) {
    const auto found = sources.find(name);
    sources_.push_back(found == sources.end() ? files.size() : found->second);  // past the end: only others need it
  }
  assignment_ = std::make_unique<Assignment>(needs_of_job(std::move(needs), ranks, ranks.needs[rank_]),
                                             without_headers(limits, ranks.needs.size()), network);
  obstacle_ = assignment_->obstacle();
  for (const CommonNeed& common : assignment_->job().needs) {
    const auto found = std::find_if(common.groups.begin(), common.groups.end(), [&](const Group& group) {
      return std::binary_search(common.ranks.begin() + group.begin, common.ranks.begin() + group.end, rank_);
    });
    own_groups_.push_back(found == common.groups.end() ? nullptr : &*found);
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

template <typename Function>
void Exchange::each_own_share(uint32_t round, const Function& function) const {
  const auto [begin, end] = assignment_->units_of_round(round);
  for (const uint32_t* unit = begin; unit != end; ++unit) {
    const auto [first, last] = assignment_->shares(*unit);
    for (const Share* share = first; share != last; ++share) {
      const Group* group = own_groups_[share->need];
      if (group != nullptr)
        function(*unit, *share, assignment_->relay(assignment_->units()[*unit], common(*share), *group));
    }
  }
}

std::vector<Exchange::Parcel> Exchange::parcels_to_send(uint32_t round) const {
  std::vector<Parcel> parcels;
  const auto [begin, end] = units_of(round, rank_);
  for (const uint32_t* unit = begin; unit != end; ++unit) {
    const auto [first, last] = assignment_->shares(*unit);
    for (const Share* share = first; share != last; ++share) {
      const CommonNeed& need = common(*share);
      for (const Group& group : need.groups) {
        if (const auto relay = assignment_->relay(assignment_->units()[*unit], need, group)) {
          parcels.push_back({*unit, *relay, share});
          continue;
        }
        for (uint32_t i = group.begin; i < group.end; ++i) parcels.push_back({*unit, need.ranks[i], share});
      }
    }
  }
  if (round >= kRelayRounds) {
    each_own_share(round - kRelayRounds, [&](uint32_t unit, const Share& share, std::optional<uint32_t> relay) {
      if (relay != rank_) return;
      const Group& group = *own_groups_[share.need];
      for (uint32_t i = group.begin; i < group.end; ++i) {
        const uint32_t rank = common(share).ranks[i];
        if (rank != rank_) parcels.push_back({unit, rank, &share});
      }
    });
  }
  find_positions(parcels);
  return parcels;
}

std::vector<Exchange::Parcel> Exchange::parcels_to_receive(uint32_t round) const {
  if (round >= rounds()) throw std::out_of_range("no such round");
  std::vector<Parcel> parcels;
  each_own_share(round, [&](uint32_t unit, const Share& share, std::optional<uint32_t> relay) {
    if (!relay || relay == rank_) parcels.push_back({unit, assignment_->units()[unit].owner, &share});
  });
  if (round >= kRelayRounds) {
    each_own_share(round - kRelayRounds, [&](uint32_t unit, const Share& share, std::optional<uint32_t> relay) {
      if (relay && relay != rank_) parcels.push_back({unit, *relay, &share});
    });
  }
  find_positions(parcels);
  return parcels;
}

bool Exchange::passes_on(uint32_t round) const {
  bool passes = false;
  each_own_share(round,
                 [&](uint32_t, const Share&, std::optional<uint32_t> relay) { passes = passes || relay == rank_; });
  return passes;
}

std::vector<int64_t> Exchange::segments(const std::vector<Parcel>& parcels) const {
  std::vector<int64_t> bytes(ranks(), kHeaderBytes);
  for (const Parcel& parcel : parcels) bytes[parcel.rank] += parcel.share->bytes;
  // Segments begin where headers can be looked at in place.
  for (int64_t& of_rank : bytes) of_rank = (of_rank + kHeaderBytes - 1) / kHeaderBytes * kHeaderBytes;
  return bytes;
}

void Exchange::find_positions(std::vector<Parcel>& parcels) const {
  std::vector<int64_t> next(ranks(), kHeaderBytes);
  int64_t begin = 0;
  const std::vector<int64_t> sizes = segments(parcels);
  for (size_t rank = 0; rank < ranks(); ++rank) next[rank] += std::exchange(begin, begin + sizes[rank]);
  for (Parcel& parcel : parcels) {
    parcel.position = std::exchange(next[parcel.rank], next[parcel.rank] + parcel.share->bytes);
  }
}

std::vector<int64_t> Exchange::bytes_to_send(uint32_t round) const { return segments(parcels_to_send(round)); }

std::vector<int64_t> Exchange::bytes_to_receive(uint32_t round) const { return segments(parcels_to_receive(round)); }

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
      const Need& need = common(*share).need;
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
    if (source >= layouts.files.size()) throw std::invalid_argument("the layouts lack a file that is needed");
    sizes.push_back(layouts.files[source].size);
  }
  const transfer::Limits limits = transfer::limits_of(options, io::access_of(layouts.sources));
  const std::vector<transfer::Policy> policies = transfer::policies_for(layouts.sources, limits, false);
  std::vector<int64_t> bytes(ranks(), 0);
  for (uint32_t rank = 0; rank < bytes.size(); ++rank) {
    for (uint32_t round = 0; round < rounds(); ++round) {
      for (const Span& span : spans_to_read(round, rank, layouts, limits)) {
        bytes[rank] += policies[sources_[span.file]].bytes_of_request(span.begin, span.end, sizes[span.file]);
      }
    }
  }
  return bytes;
}

void Exchange::pack(uint32_t round, std::byte* memory, const std::byte* received, const Layouts& layouts,
                    const Options& options, const std::function<bool()>& interrupted, RoundStats& stats) const {
  const transfer::Limits limits = transfer::limits_of(options, io::access_of(layouts.sources));
  const std::vector<Parcel> parcels = parcels_to_send(round);
  const auto own_units = units_of(round, rank_);
  const auto count = static_cast<size_t>(own_units.second - own_units.first);
  std::vector<const Parcel*> of_unit = {parcels.data()};  // where those of each unit begin
  for (size_t i = 0; i < count; ++i) {
    const Parcel* next = of_unit.back();
    while (next != parcels.data() + parcels.size() && next->unit == own_units.first[i]) ++next;
    of_unit.push_back(next);
  }

  const auto copy_unit = [&](size_t index, const Span& span, const std::byte* data) {
    const Unit& unit = assignment_->units()[own_units.first[index]];
    const int64_t from = std::max(span.begin, unit.begin);
    const int64_t to = std::min(span.end, unit.end);
    for (const Parcel* first = of_unit[index]; first != of_unit[index + 1];) {
      const Parcel* last = first;  // of all ranks that get the same
      while (last != of_unit[index + 1] && last->share == first->share) ++last;
      const Need& need = common(*first->share).need;
      int64_t position = 0;
      need.each_within(unit.file, unit.begin, unit.end, [&](const NeededBox& box) {
        const int64_t before = need.bytes_within(box, unit.begin, from);
        for (box::Part& part : box::cut(need.loops(box), box.depth, from - box.begin, to - box.begin)) {
          pack_side(part.loops, &box::Dim::destination_stride);
          const std::byte* source = data + (box.begin + part.source - span.begin);
          for (const Parcel* parcel = first; parcel != last; ++parcel) {
            box::copy(memory + parcel->position + position + before + part.packed, source, part.loops.data(),
                      part.loops.size());
          }
        }
        position += need.bytes_within(box, unit.begin, unit.end);
      });
      first = last;
    }
  };

  struct Passed {
    const Parcel* parcel;
    const std::byte* data;
  };
  std::vector<Passed> passed;
  const Parcel* next = of_unit.back();
  const Parcel* const end = parcels.data() + parcels.size();
  if (next != end) {
    if (received == nullptr) throw std::invalid_argument("a relay passes on what it has received");
    for (const Parcel& parcel : parcels_to_receive(round - kRelayRounds)) {
      for (; next != end && next->share == parcel.share; ++next) passed.push_back({next, received + parcel.position});
    }
    if (next != end) throw std::logic_error("a relay has not received what it passes on");
  }

  const std::vector<Span> spans = spans_to_read(round, rank_, layouts, limits);
  io::IoCounters counters = options.counters();
  transfer::run_parallel(
      spans.size() + passed.size(), limits.threads, counters, interrupted, [&](size_t task, transfer::Worker& worker) {
        if (task >= spans.size()) {
          const auto [parcel, data] = passed[task - spans.size()];
          copy::copy_bytes(memory + parcel->position, data, parcel->share->bytes);
          return;
        }
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
  if (local.boxes.size() != own_boxes_) throw std::invalid_argument("the exchange is of another need");
  const std::vector<Parcel> parcels = parcels_to_receive(round);
  transfer::Boxes boxes;
  QuantizedPieces quantized;
  for (const Parcel& parcel : parcels) {
    const Unit& unit = assignment_->units()[parcel.unit];
    const Need& need = common(*parcel.share).need;
    int64_t position = parcel.position;
    need.each_within(unit.file, unit.begin, unit.end, [&](const NeededBox& box) {
      const LocalBox& to = local.boxes[box.number];
      const copy::Conversion* conversion = to.conversion ? &*to.conversion : nullptr;
      for (box::Part& part : box::cut(to.loops.data(), to.loops.size(), unit.begin - box.begin, unit.end - box.begin)) {
        if (to.quantized) {
          if (memory == nullptr) throw std::invalid_argument("quantized elements are needed on the host");
          quantized.add(*to.quantized, part, memory + position + part.packed);
          continue;
        }
        pack_side(part.loops, &box::Dim::source_stride);
        boxes.add(to.device, {0, position + part.packed, to.destination + part.destination, box.number,
                              std::move(part.loops), conversion});
      }
      position += need.bytes_within(box, unit.begin, unit.end);
    });
  }
  const bool is_for_host = std::any_of(boxes.devices.begin(), boxes.devices.end(),
                                       [&](const auto& of_device) { return of_device.first != cuda.received.device; });
  if (memory == nullptr && (is_for_host || !boxes.host.empty())) {
    throw std::invalid_argument("boxes need what was received on the host");
  }
  // Pieces of one box are converted in rounds, but it is one item that is converted.
  boxes.converted = 0;
  io::ByteSources sources;
  const std::vector<int64_t> sizes = segments(parcels);
  const auto size = static_cast<size_t>(std::accumulate(sizes.begin(), sizes.end(), int64_t{0}));
  sources.push_back(std::make_unique<io::MemorySource>("what other ranks read", memory, size));
  const auto attribute = [&](Error& error, size_t box) {
    error.path.clear();
    error.offset = -1;
    layouts.attribute(error, local.boxes[box].record);
  };
  transfer::Stats stats = transfer::run_boxes(std::move(boxes), sources, attribute, options, cuda, interrupted);
  stats.bytes_placed +=
      quantized.place(transfer::limits_of(options, io::access_of(layouts.sources)).threads, interrupted);
  return stats;
}

}  // namespace dcp_fast::exchange
