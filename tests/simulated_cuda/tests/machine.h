// What the tests of the driver share: contexts on both simulated devices, and buffers that give themselves back.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "driver/control.h"

namespace simcuda::testing {

// Checks that a driver call succeeds.
#define OK(call) CHECK((call) == CUDA_SUCCESS)

inline int reports(const std::string& containing = "") { return simcuda_reports(containing.c_str(), nullptr, 0, 0); }

inline std::string report_text() {
  std::string text(10000, '\0');
  simcuda_reports("", text.data(), static_cast<int>(text.size()), 0);
  return text.c_str();
}

// Device 0 is current. At the end nothing may be left that was not reported, expected and cleared.
class Machine {
 public:
  Machine() {
    OK(cuInit(0));
    simcuda_reset();
    for (const char* key : {"copy_gbps", "latency_us", "jitter_us"}) simcuda_set(key, 0);
    OK(cuDevicePrimaryCtxRetain(&contexts_[0], 0));
    OK(cuDevicePrimaryCtxRetain(&contexts_[1], 1));
    use(0);
  }
  ~Machine() {
    CHECK_MESSAGE(reports() == 0, report_text());
    simcuda_reset();
    use(0);
    for (const int device : {0, 1}) OK(cuDevicePrimaryCtxRelease_v2(device));
    CHECK_MESSAGE(reports() == 0, report_text());
    std::string what(1000, '\0');
    CHECK_MESSAGE(simcuda_leaks(what.data(), static_cast<int>(what.size())) == 0, what);
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  CUcontext context(int device) const { return contexts_[device]; }
  void use(int device) { OK(cuCtxSetCurrent(contexts_[device])); }
  // A report of this kind is there, and is forgotten.
  static void expect(const std::string& kind) {
    CHECK_MESSAGE(reports(kind) > 0, "no ", kind, " in: ", report_text());
    simcuda_reports("", nullptr, 0, 1);
  }

 private:
  CUcontext contexts_[2] = {};
};

class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) { OK(cuMemAlloc_v2(&address_, bytes)); }
  ~DeviceBuffer() {
    cuCtxSynchronize();
    cuMemFree_v2(address_);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  operator CUdeviceptr() const { return address_; }
  size_t size() const { return bytes_; }

  std::vector<unsigned char> read() const {
    std::vector<unsigned char> bytes(bytes_);
    OK(cuMemcpyDtoH_v2(bytes.data(), address_, bytes_));
    return bytes;
  }

 private:
  size_t bytes_;
  CUdeviceptr address_ = 0;
};

class PinnedBuffer {
 public:
  explicit PinnedBuffer(size_t bytes, unsigned char value = 0) : bytes_(bytes, value) {
    OK(cuMemHostRegister_v2(bytes_.data(), bytes, CU_MEMHOSTREGISTER_PORTABLE));
  }
  ~PinnedBuffer() {
    cuCtxSynchronize();
    cuMemHostUnregister(bytes_.data());
  }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  unsigned char* data() { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }
  // As a program does that announces what it is going to do.
  void fill(unsigned char value) {
    simcuda_host_write(data(), size(), "test");
    bytes_.assign(bytes_.size(), value);
  }

 private:
  std::vector<unsigned char> bytes_;
};

class StreamHandle {
 public:
  explicit StreamHandle(unsigned int flags = CU_STREAM_NON_BLOCKING) { OK(cuStreamCreate(&stream_, flags)); }
  ~StreamHandle() { cuStreamDestroy_v2(stream_); }
  StreamHandle(const StreamHandle&) = delete;
  StreamHandle& operator=(const StreamHandle&) = delete;
  operator CUstream() const { return stream_; }

 private:
  CUstream stream_ = nullptr;
};

class EventHandle {
 public:
  explicit EventHandle(unsigned int flags = CU_EVENT_BLOCKING_SYNC) { OK(cuEventCreate(&event_, flags)); }
  ~EventHandle() { cuEventDestroy_v2(event_); }
  EventHandle(const EventHandle&) = delete;
  EventHandle& operator=(const EventHandle&) = delete;
  operator CUevent() const { return event_; }

 private:
  CUevent event_ = nullptr;
};

inline std::vector<unsigned char> bytes_of(size_t count, unsigned char value) {
  return std::vector<unsigned char>(count, value);
}

}  // namespace simcuda::testing
