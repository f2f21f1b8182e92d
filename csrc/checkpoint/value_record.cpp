#include "checkpoint/value_record.h"

#include "checkpoint/archive.h"

namespace dcp_fast::checkpoint {

std::optional<Bytes> find_value_pickle(Bytes record) {
  const std::optional<Archive> archive = find_archive(record);
  if (!archive || !archive->storages.empty() || !archive->has_checksums) return std::nullopt;
  return archive->pickle;
}

}  // namespace dcp_fast::checkpoint
