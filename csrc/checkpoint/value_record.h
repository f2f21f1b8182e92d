// Where the pickle of a value lies in its record: a torch.save archive that holds no tensors.
#pragma once

#include <cstdint>
#include <optional>

#include "checkpoint/bytes.h"

namespace dcp_fast::checkpoint {

// Names of all parameters, as optimizers keep them, take less. The pickle of more is not kept beside its value.
inline constexpr int64_t kMaxValueRecord = 1 << 20;

// The content of data.pkl; nullopt if the record is anything but an archive as torch.save writes it of a value without
// tensors, all of whose checksums are right. torch must decide then what it is.
std::optional<Bytes> find_value_pickle(Bytes record);

}  // namespace dcp_fast::checkpoint
