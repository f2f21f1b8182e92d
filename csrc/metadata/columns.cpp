#include "metadata/columns.h"

#include <algorithm>
#include <array>

#include "metadata/hash.h"

namespace dcp_fast::metadata {

namespace {

uint64_t hash_key(uint32_t fqn, const int64_t* offset, uint32_t dims) {
  uint64_t value = mix(hash_seed() + dims, fqn);
  if (dims == StorageRows::kNoOffset) return value;
  for (uint32_t i = 0; i < dims; ++i) value = mix(value, static_cast<uint64_t>(offset[i]));
  return value;
}

}  // namespace

bool Columns::row_equals(uint32_t row, uint32_t fqn, const int64_t* offset, uint32_t dims) const {
  if (rows.fqn[row] != fqn || rows.dims[row] != dims) return false;
  return dims == StorageRows::kNoOffset || std::equal(offset, offset + dims, numbers.data() + rows.chunk_offset[row]);
}

uint32_t Columns::find_row(uint32_t fqn, const int64_t* offset, uint32_t dims) const {
  return row_table.find(hash_key(fqn, offset, dims), [&](uint32_t row) { return row_equals(row, fqn, offset, dims); });
}

bool Columns::make_row_table() {
  // The table is too large for the fastest caches: while some rows are added, what the next need is on its way.
  constexpr uint32_t kAhead = 16;
  std::array<uint64_t, kAhead> hashes{};
  const auto count = static_cast<uint32_t>(rows.size());
  row_table.reserve(count);
  const auto announce = [&](uint32_t row) {
    if (row >= count) return;
    hashes[row % kAhead] = hash_key(rows.fqn[row], numbers.data() + rows.chunk_offset[row], rows.dims[row]);
    row_table.prefetch(hashes[row % kAhead]);
  };
  for (uint32_t row = 0; row < kAhead; ++row) announce(row);
  for (uint32_t row = 0; row < count; ++row) {
    const uint32_t dims = rows.dims[row];
    const int64_t* offset = numbers.data() + rows.chunk_offset[row];
    const auto equals = [&](uint32_t other) { return row_equals(other, rows.fqn[row], offset, dims); };
    if (row_table.find_or_add(hashes[row % kAhead], row, equals) != HashTable::kNone) return false;
    announce(row + kAhead);
  }
  return true;
}

uint32_t Columns::index_row(uint32_t row) {
  const uint32_t fqn = rows.fqn[row];
  const uint32_t dims = rows.dims[row];
  const int64_t* offset = numbers.data() + rows.chunk_offset[row];
  return row_table.find_or_add(hash_key(fqn, offset, dims), row,
                               [&](uint32_t other) { return row_equals(other, fqn, offset, dims); });
}

}  // namespace dcp_fast::metadata
