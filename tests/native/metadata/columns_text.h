// Parses metadata in different ways, and says what came of it in a text, so that two ways can be compared.
#pragma once

#include <string>

#include "error.h"
#include "exact.h"
#include "metadata/failure.h"
#include "metadata/parse.h"

namespace dcp_fast::testing {

inline std::string text_of(const metadata::Columns& columns) {
  std::string text;
  const auto numbers = [&](uint64_t at, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) text += std::to_string(columns.numbers.at(at + i)) + ',';
    text += ' ';
  };
  for (size_t i = 0; i < columns.entries.size(); ++i) {
    const metadata::Entry& entry = columns.entries[i];
    text += std::string(columns.fqns[i]) + (entry.kind == metadata::EntryKind::kBytes ? " bytes " : " tensor ");
    numbers(entry.size, entry.dims);
    numbers(entry.chunks, uint64_t{2} * entry.dims * entry.chunk_count);
    text += std::to_string(entry.chunk_count) + '\n';
  }
  const metadata::StorageRows& rows = columns.rows;
  for (size_t row = 0; row < rows.size(); ++row) {
    text += std::string(columns.fqns[rows.fqn[row]]) + " in " + std::string(columns.files[rows.file[row]]) + ' ';
    if (rows.dims[row] != metadata::StorageRows::kNoOffset) numbers(rows.chunk_offset[row], rows.dims[row]);
    for (const int64_t number : {int64_t{rows.dims[row]}, rows.index[row], rows.offset[row], rows.length[row]}) {
      text += std::to_string(number) + ' ';
    }
    if (!rows.transforms.empty()) {
      for (const std::string& name : columns.transforms.at(rows.transforms.at(row)).names) text += name + ' ';
    }
    text += '\n';
  }
  for (const metadata::LeftOut& field : columns.left_out) {
    text += std::string(metadata::name_of(field.type)) + " without " + field.name + '\n';
  }
  return text + columns.planner_data + columns.storage_meta + columns.version;
}

// The columns, or the error.
inline std::string parsed(metadata::Source& source, metadata::Batches batches) {
  try {
    return text_of(metadata::parse(source, batches));
  } catch (const Error& error) {
    return error.what() + std::string(" at ") + std::to_string(error.offset) + " for " + std::to_string(error.length);
  } catch (const metadata::Unsupported& reason) {
    return reason.what();
  }
}

inline std::string parsed(const std::string& pickle, metadata::Batches batches) {
  const Exact bytes(pickle);
  metadata::MemorySource source(bytes.view());
  return parsed(source, batches);
}

}  // namespace dcp_fast::testing
