#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "box/box.h"
#include "checkpoint/dtype.h"
#include "error.h"
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

int64_t bytes_of(const Range& range) { return range.end - range.begin; }

// A range that is received into memory of the need's own, and a record in it, which errors name.
struct Wanted {
  Range range;
  size_t record = 0;
};

// Ranges that touch or overlap become one, so that whoever reads across their border finds all of it.
std::vector<Wanted> joined(std::vector<Wanted> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Wanted& a, const Wanted& b) {
    return std::tie(a.range.file, a.range.begin) < std::tie(b.range.file, b.range.begin);
  });
  std::vector<Wanted> result;
  for (const Wanted& wanted : ranges) {
    const Range& range = wanted.range;
    if (!result.empty() && result.back().range.file == range.file && range.begin <= result.back().range.end) {
      result.back().range.end = std::max(result.back().range.end, range.end);
    } else {
      result.push_back(wanted);
    }
  }
  return result;
}

void add_kept(LocalNeed& local, const Layouts& layouts, std::vector<Wanted> wanted) {
  const std::vector<Wanted> ranges = joined(std::move(wanted));
  if (ranges.empty()) return;
  int64_t bytes = 0;
  for (const Wanted& each : ranges) bytes += bytes_of(each.range);
  try {
    with_memory_errors(
        [&] { local.memory.reset(new std::byte[static_cast<size_t>(bytes)], std::default_delete<std::byte[]>()); });
  } catch (Error& error) {
    layouts.attribute(error, ranges.front().record);
    throw;
  }
  local.kept.resize(layouts.sources.size());
  std::byte* data = local.memory.get();
  for (const auto& [range, record] : ranges) {
    const int64_t size = bytes_of(range);
    const box::Loops run = {{size, 1, 1}};
    local.need.add(static_cast<uint32_t>(range.file), range.begin, run, 1);
    local.boxes.push_back({transfer::kHost, data, run, std::nullopt, record, std::nullopt});
    local.kept[range.file].push_back({range.begin, range.end, data});
    data += size;
  }
}

Range range_of(const transfer::Record& record) { return {record.file, record.offset, record.offset + record.length}; }

}  // namespace

bool LocalNeed::is_on(int device) const {
  return std::all_of(boxes.begin(), boxes.end(), [=](const LocalBox& box) { return box.device == device; });
}

LocalNeed need_of(const transfer::Program& program, int32_t wave, const std::vector<std::string>& names) {
  const Layouts& layouts = program.layouts();
  LocalNeed local{Need(files_of(layouts, names))};
  for (const size_t item : program.items_in_wave(wave)) {
    const Transfer& transfer = program.transfers()[item];
    if (transfer.kind != Transfer::Kind::kDirect || transfer.loops.empty()) continue;
    const size_t record = program.items()[item].record;
    const auto grain = static_cast<int32_t>(checkpoint::info(layouts.parsed[record].layout.dtype).itemsize);
    local.need.add(static_cast<uint32_t>(layouts.records[record].file), transfer.source, transfer.loops, grain);
    local.boxes.push_back(
        {transfer.device, transfer.destination, transfer.loops, transfer.conversion, record, std::nullopt});
    if (transfer.conversion && !transfer.conversion->same_dtype) ++local.converted_items;
  }
  return local;
}

LocalNeed need_of_headers(const Layouts& layouts, const std::vector<size_t>& records, int64_t most_bytes,
                          const std::vector<std::string>& names, const transfer::Options& options) {
  constexpr size_t kNoRecord = std::numeric_limits<size_t>::max();
  std::vector<size_t> first_record(layouts.sources.size(), 0);  // by source
  for (size_t i = layouts.records.size(); i-- > 0;) first_record[layouts.records[i].file] = i;
  std::vector<std::pair<Wanted, size_t>> ranges;  // and the record that they are, if they are one
  for (const Range& range : transfer::header_ranges(layouts, options)) {
    ranges.push_back({{range, first_record[range.file]}, kNoRecord});
  }
  for (const size_t record : records) ranges.push_back({{range_of(layouts.records.at(record)), record}, record});
  // Small ones come first: of the rest each takes a request of its own.
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) {
    const Range& left = a.first.range;
    const Range& right = b.first.range;
    return std::tuple(bytes_of(left), left.file, left.begin) < std::tuple(bytes_of(right), right.file, right.begin);
  });
  LocalNeed local{Need(files_of(layouts, names))};
  std::vector<Wanted> wanted;
  int64_t room = most_bytes;
  for (auto& [each, record] : ranges) {
    const int64_t bytes = bytes_of(each.range);
    if (bytes > room && record != kNoRecord) {
      local.left_out.push_back(record);
      continue;
    }
    const int64_t fits = std::min(bytes, room);
    local.bytes_left_out += bytes - fits;
    each.range.end = each.range.begin + fits;
    room -= fits;
    if (fits > 0) wanted.push_back(each);
  }
  add_kept(local, layouts, std::move(wanted));
  return local;
}

LocalNeed need_of_records(const Layouts& layouts, const std::vector<size_t>& records,
                          const std::vector<std::string>& names) {
  LocalNeed local{Need(files_of(layouts, names))};
  std::vector<Wanted> wanted;
  for (const size_t record : records) {
    const Range range = range_of(layouts.records.at(record));
    if (bytes_of(range) > 0) wanted.push_back({range, record});
  }
  add_kept(local, layouts, std::move(wanted));
  return local;
}

LocalNeed need_of_quantized(const Layouts& layouts, const std::vector<QuantizedElements>& elements,
                            const std::vector<std::string>& names) {
  LocalNeed local{Need(files_of(layouts, names))};
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
  for (size_t i = 0; i < local.kept.size(); ++i) {
    if (local.kept[i].empty()) continue;
    layouts.sources.at(i) =
        std::make_unique<io::KeptSource>(std::move(layouts.sources.at(i)), std::move(local.kept[i]), local.memory);
  }
  local.kept.clear();
}

void drop(Layouts& layouts, LocalNeed& local) {
  for (auto& top : layouts.sources) {
    std::unique_ptr<io::ByteSource>* source = &top;
    while (auto* kept = dynamic_cast<io::KeptSource*>(source->get())) {
      if (kept->memory() != local.memory.get()) {
        source = &kept->source();
        continue;
      }
      std::unique_ptr<io::ByteSource> itself = std::move(kept->source());
      *source = std::move(itself);
    }
  }
  local.memory.reset();
}

}  // namespace dcp_fast::exchange
