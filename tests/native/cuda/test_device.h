// What the tests ask of a driver beyond what the engine does, and of the simulator where it is one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/resources.h"

namespace dcp_fast::testing {

// The simulator's controls; see tests/simulated_cuda/README.md.
struct Simulator {
  int (*set)(const char* key, double value) = nullptr;
  void (*fault)(const char* function, int nth_from_now, int error, int asynchronous) = nullptr;
  long (*calls)(const char* function) = nullptr;
  int (*reports)(const char* containing, char* buffer, int capacity, int clear) = nullptr;
  int (*leaks)(char* buffer, int capacity) = nullptr;
  long (*statistic)(const char* name, int device, int reset) = nullptr;
  double (*busy_seconds)(int device, const char* kind, int reset) = nullptr;
  void (*reset)() = nullptr;
};

// Null if the driver is a real one.
const Simulator* simulator();

// All reports so far as text, which are forgotten: "" is what a test wants to see.
std::string take_reports();
// What was not given back, as text; "" on a real driver.
std::string leaks();

// Whether there is a driver with a device at all.
bool has_device(int ordinal);

// Memory on a device, filled with what torch would have there.
class DeviceBytes {
 public:
  DeviceBytes(int ordinal, const std::string& contents);
  ~DeviceBytes();
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;

  std::byte* address() const { return reinterpret_cast<std::byte*>(memory_.get()); }  // NOLINT
  std::string download() const;
  void upload(const std::string& contents);

 private:
  cuda::PrimaryContext context_;
  size_t size_;
  cuda::DeviceMemory memory_;
};

// A stream that plays torch's current one.
class TorchStream {
 public:
  explicit TorchStream(int ordinal);
  ~TorchStream();
  TorchStream(const TorchStream&) = delete;
  TorchStream& operator=(const TorchStream&) = delete;

  cuda::StreamHandle get() const { return stream_.get(); }
  // Work on the stream, enqueued and not waited for.
  void fill(const DeviceBytes& memory, size_t bytes, char value) const;
  void copy(const DeviceBytes& to, const DeviceBytes& from, size_t bytes) const;
  void download(void* pinned, const DeviceBytes& memory, size_t bytes) const;
  void synchronize() const;

 private:
  cuda::PrimaryContext context_;
  cuda::Stream stream_;
};

}  // namespace dcp_fast::testing
