#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "box/box.h"
#include "checkpoint/dtype.h"
#include "exchange/exchange.h"
#include "io/kept_source.h"

namespace dcp_fast::exchange {

namespace {

using transfer::Layouts;
using transfer::Range;
using transfer::Transfer;

std::vector<NeededFile> files_of(const Layouts& layouts, const std::vector<std::string>& names) {
  std::vector<NeededFile> files;
  files.reserve(layouts.sources.size());
  for (size_t i = 0; i < layouts.sources.size(); ++i) {
    files.push_back({names.at(i), layouts.files[i].size, layouts.files[i].version});
  }
  return files;
}

bool ascends(const Range& a, const Range& b) { return std::tie(a.file, a.begin) < std::tie(b.file, b.begin); }

// Ranges that touch or overlap become one, so that whoever reads across their border finds all of it.
std::vector<Range> joined(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(), ascends);
  std::vector<Range> result;
  for (const Range& range : ranges) {
    if (!result.empty() && result.back().file == range.file && range.begin <= result.back().end) {
      result.back().end = std::max(result.back().end, range.end);
    } else {
      result.push_back(range);
    }
  }
  return result;
}

// Those that fit into memory, joined. Small ones come first: of the rest each is a request of this rank alone. The one
// that does not fit as a whole is cut. `left_out`: bytes that do not.
std::vector<Range> fitting(std::vector<Range> ranges, int64_t most_bytes, int64_t& left_out) {
  ranges.erase(
      std::remove_if(ranges.begin(), ranges.end(), [](const Range& range) { return range.begin == range.end; }),
      ranges.end());
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::tuple(a.end - a.begin, a.file, a.begin) < std::tuple(b.end - b.begin, b.file, b.begin);
  });
  int64_t room = most_bytes;
  size_t count = 0;
  for (Range& range : ranges) {
    const int64_t fits = std::min(range.end - range.begin, room);
    left_out += range.end - range.begin - fits;
    range.end = range.begin + fits;
    room -= fits;
    if (fits > 0) ++count;
  }
  ranges.resize(count);
  return joined(std::move(ranges));
}

// Adds ranges that are received into memory of the need's own, as far as that goes.
void add_kept(LocalNeed& local, const Layouts& layouts, std::vector<Range> wanted, int64_t most_bytes) {
  const std::vector<Range> ranges = fitting(std::move(wanted), most_bytes, local.bytes_left_out);
  int64_t bytes = 0;
  for (const Range& range : ranges) bytes += range.end - range.begin;
  local.memory.reset(new std::byte[static_cast<size_t>(bytes)], std::default_delete<std::byte[]>());
  local.kept.resize(layouts.sources.size());
  std::vector<size_t> first_record(layouts.sources.size(), 0);  // by source: errors name it
  for (size_t i = layouts.records.size(); i-- > 0;) first_record[layouts.records[i].file] = i;
  std::byte* data = local.memory.get();
  for (const Range& range : ranges) {
    const int64_t size = range.end - range.begin;
    const box::Loops run = {{size, 1, 1}};
    local.need.add(static_cast<uint32_t>(range.file), range.begin, run, 1);
    local.boxes.push_back({transfer::kHost, data, run, std::nullopt, first_record[range.file], std::nullopt});
    local.kept[range.file].push_back({range.begin, range.end, data});
    data += size;
  }
}

Range range_of(const transfer::Record& record) { return {record.file, record.offset, record.offset + record.length}; }

}  // namespace

bool LocalNeed::is_on(int device) const {
  return std::all_of(boxes.begin(), boxes.end(), [=](const LocalBox& box) { return box.device == device; });
}

LocalNeed need_of(const transfer::Program& program, int32_t wave, int64_t most_bytes,
                  const std::vector<std::string>& names) {
  const Layouts& layouts = program.layouts();
  LocalNeed local{Need(files_of(layouts, names)), {}, 0, 0, nullptr, {}};
  std::vector<Range> whole;
  for (const size_t item : program.items_in_wave(wave)) {
    const Transfer& transfer = program.transfers()[item];
    const size_t record = program.items()[item].record;
    const transfer::Record& where = layouts.records[record];
    if (transfer.kind == Transfer::Kind::kFallback && !where.fallback) whole.push_back(range_of(where));
    if (transfer.kind != Transfer::Kind::kDirect || transfer.loops.empty()) continue;
    const auto grain = static_cast<int32_t>(checkpoint::info(layouts.parsed[record].layout.dtype).itemsize);
    local.need.add(static_cast<uint32_t>(where.file), transfer.source, transfer.loops, grain);
    local.boxes.push_back(
        {transfer.device, transfer.destination, transfer.loops, transfer.conversion, record, std::nullopt});
    if (transfer.conversion) ++local.converted_items;
  }
  add_kept(local, layouts, std::move(whole), most_bytes);
  return local;
}

LocalNeed need_of_records(const Layouts& layouts, const std::vector<size_t>& records, int64_t most_bytes,
                          const std::vector<std::string>& names, const transfer::Options& options) {
  std::vector<Range> ranges = transfer::header_ranges(layouts, options);
  for (const size_t index : records) {
    const transfer::Record& record = layouts.records.at(index);
    if (record.length > 0) ranges.push_back(range_of(record));
  }
  LocalNeed local{Need(files_of(layouts, names)), {}, 0, 0, nullptr, {}};
  add_kept(local, layouts, std::move(ranges), most_bytes);
  return local;
}

LocalNeed need_of_quantized(const Layouts& layouts, const std::vector<QuantizedElements>& elements,
                            const std::vector<std::string>& names) {
  LocalNeed local{Need(files_of(layouts, names)), {}, 0, 0, nullptr, {}};
  for (const auto& [record, begin, stored_row_bytes, target] : elements) {
    const transfer::Record& where = layouts.records.at(record);
    const int64_t rows = target.box.rows;
    if (target.unit_bytes < 1 || target.unit_bytes > kMostGrain || target.unit_columns < 1 || rows < 1 ||
        target.box.columns < 1 || target.row_bytes < target.unit_bytes || target.row_bytes % target.unit_bytes != 0 ||
        (rows > 1 && (stored_row_bytes < target.row_bytes || (where.length - begin) / stored_row_bytes < rows - 1)) ||
        begin < 0 || begin + (rows - 1) * stored_row_bytes + target.row_bytes > where.length) {
      throw std::invalid_argument("quantized elements do not lie in their record");
    }
    const box::Loops loops = target.loops(stored_row_bytes);
    local.need.add(static_cast<uint32_t>(where.file), where.offset + begin, loops,
                   static_cast<int32_t>(target.unit_bytes));
    local.boxes.push_back({transfer::kHost, nullptr, loops, std::nullopt, record, target});
  }
  return local;
}

void keep(Layouts& layouts, LocalNeed& local) {
  for (size_t i = 0; i < layouts.sources.size(); ++i) {
    if (local.kept.at(i).empty()) continue;
    layouts.sources[i] =
        std::make_unique<io::KeptSource>(std::move(layouts.sources[i]), std::move(local.kept[i]), local.memory);
  }
}

}  // namespace dcp_fast::exchange
