// A device and its primary context.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver/device_memory.h"
#include "driver/streams.h"

namespace simcuda {

// One direction of the way between host and device. All copies of a device in this direction share it.
struct Link {
  Clock::time_point free_at;
  // What a byte costs the host that does the copying: the modelled time is not to come on top of it.
  double host_seconds_per_byte = 1 / 8e9;
};

struct Context {
  explicit Context(int ordinal) : device(ordinal), memory(ordinal) { reset_statistics(); }

  const int device;
  int references = 0;
  // The error that all calls return since some work failed.
  CUresult sticky = CUDA_SUCCESS;
  DeviceMemory memory;
  std::shared_ptr<Stream> null_stream;
  std::vector<std::shared_ptr<Stream>> streams;  // that programs can name, or that have work left
  Link to_device;
  Link to_host;
  std::mutex compute;  // held while a kernel runs: one at a time
  double copy_seconds = 0;
  double kernel_seconds = 0;
  std::map<std::string, long> statistics;  // only of the names that there are

  void reset_statistics() {
    for (const char* name : {"copies", "bytes_to_device", "copies_to_host", "bytes_to_host", "copies_on_device",
                             "bytes_on_device", "fills", "launches", "blocks"}) {
      statistics[name] = 0;
    }
  }
};

}  // namespace simcuda
