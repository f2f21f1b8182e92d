// A torch.save archive that is in memory as a whole, as torch.save writes it and in no other form.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>
#include <vector>

#include "checkpoint/bytes.h"

namespace dcp_fast::checkpoint {

struct Archive {
  struct Storage {
    std::string_view key;  // as pickles name it
    size_t begin = 0;      // of its bytes, in the archive
    size_t size = 0;
  };

  Bytes pickle;
  std::vector<Storage> storages;
  bool has_checksums = true;  // false: the writer computed none, at least for some entry
};

// nullopt if the record is anything but an archive as torch.save writes it on a little-endian machine, all of whose
// checksums are right but for those of storages, which are not looked at. torch must decide then what it is.
std::optional<Archive> find_archive(Bytes record);

}  // namespace dcp_fast::checkpoint
