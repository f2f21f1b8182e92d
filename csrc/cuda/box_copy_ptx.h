// The kernel of box_copy.cu as text, which the driver compiles for the device that it finds.
#pragma once

namespace dcp_fast::cuda {

extern const char* const kBoxCopyPtx;

}  // namespace dcp_fast::cuda
