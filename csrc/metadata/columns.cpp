#include "metadata/columns.h"

#include <algorithm>

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

bool Columns::add_row_to_table(uint32_t row) {
  const uint32_t fqn = rows.fqn[row];
  const uint32_t dims = rows.dims[row];
  const int64_t* offset = numbers.data() + rows.chunk_offset[row];
  return row_table.find_or_add(hash_key(fqn, offset, dims), row, [&](uint32_t other) {
    return row_equals(other, fqn, offset, dims);
  }) == HashTable::kNone;
}

}  // namespace dcp_fast::metadata
