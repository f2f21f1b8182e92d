// Every call of the driver that a load makes fails once, and so does every read while the ring is in use. Each time the
// load must end with an error that names call and device, and leave nothing behind: no work under way, no object, no
// other context on the calling thread.

#include <array>
#include <cerrno>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "child.h"
#include "device_load.h"
#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"
#include "test_device.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using cuda::PinnedRing;

namespace {

enum class Timing { kCall, kWork };  // the call itself fails, or what it enqueued does when it is executed

// What a caller sees of a fault.
enum class Seen {
  kError,
  // Gives something back, or is about the end of a load alone: there is nobody who could be told.
  kNothing,
  // Also gives the calling thread its own context back, when nobody can be told any more.
  kErrorOrNothing,
  // The load does without, or says that it cannot.
  kRefusalOrNothing,
};

struct Function {
  const char* name;
  Seen seen = Seen::kError;
};

constexpr int kOutOfMemory = 2;
constexpr int kUnknown = 999;
constexpr int kIllegalAddress = 700;
constexpr int kLaunchFailed = 719;

constexpr Function kFunctions[] = {
    {"cuDeviceGet"},
    {"cuDeviceGetAttribute"},
    {"cuDeviceGetPCIBusId", Seen::kNothing},
    {"cuDevicePrimaryCtxRetain"},
    {"cuDevicePrimaryCtxRelease_v2", Seen::kNothing},
    {"cuCtxGetCurrent"},
    {"cuCtxSetCurrent", Seen::kErrorOrNothing},
    {"cuMemAlloc_v2"},
    {"cuMemFree_v2", Seen::kNothing},
    {"cuMemHostRegister_v2", Seen::kNothing},
    {"cuMemHostUnregister", Seen::kNothing},
    {"cuMemcpyHtoDAsync_v2"},
    {"cuStreamCreate"},
    {"cuStreamDestroy_v2", Seen::kNothing},
    {"cuStreamSynchronize"},
    {"cuStreamWaitEvent"},
    {"cuEventCreate"},
    {"cuEventDestroy_v2", Seen::kNothing},
    {"cuEventRecord"},
    {"cuEventQuery"},
    {"cuEventSynchronize"},
    {"cuEventElapsedTime"},
    {"cuModuleLoadData", Seen::kRefusalOrNothing},
    {"cuModuleUnload", Seen::kNothing},
    {"cuModuleGetFunction"},
    {"cuFuncGetAttribute"},
    {"cuThreadExchangeStreamCaptureMode", Seen::kNothing},
    {"cuLaunchKernel"},
};

bool allocates(const std::string& function) {
  return function == "cuMemAlloc_v2" || function == "cuMemHostRegister_v2" || function == "cuDevicePrimaryCtxRetain" ||
         function == "cuStreamCreate" || function == "cuEventCreate" || function == "cuModuleLoadData";
}

// Of a ring with three of the smallest slots.
constexpr int64_t kPinnedBytes = 3 * (80 << 10);

// A load to two devices, straight and by the kernel, that fills every slot several times.
class Load {
 public:
  Load() : matrix_(512, 128) {
    constexpr int64_t kPadding = 16;  // leaves the kernel its widest vectors: it is interpreted
    const int64_t rows = (256 << 10) / 128 / matrix_.itemsize;
    matrix_.want(0, {0, 0}, {rows / 2, 128}, kPadding);
    matrix_.want(other_device(), {0, 0}, {rows / 2, 128}, kPadding);
    matrix_.want(0, {0, 0}, {rows, 128});
    matrix_.want(other_device(), {0, 0}, {rows / 2, 128});
    options_.threads = 4;
  }

  void run(PinnedRing& ring) {
    const transfer::Layouts layouts = matrix_.files.layouts(options_);
    const transfer::Program program(layouts, matrix_.items, matrix_.destinations);
    const transfer::CudaTargets targets = torch_.targets(ring);
    transfer::run_wave(program, 0, options_, targets, never);
    ring.synchronize(targets.torch_streams, never);
  }

  bool arrived() const { return matrix_.arrived(); }

 private:
  Matrix matrix_;
  TorchStreams torch_;
  transfer::Options options_;
};

// What is wrong after a load that failed or did not, if anything is.
class Inspection {
 public:
  explicit Inspection(const std::string& what) : what_(what) {}

  void expect(bool condition, const std::string& complaint) {
    if (!condition) complaints_ += (complaints_.empty() ? what_ + ": " : "; ") + complaint;
  }
  const std::string& complaints() const { return complaints_; }

 private:
  std::string what_;
  std::string complaints_;
};

cuda::ContextHandle current_context() {
  cuda::ContextHandle handle = nullptr;
  static_cast<void>(cuda::driver().cuCtxGetCurrent(&handle));
  return handle;
}

std::optional<Error> error_of(Load& load, PinnedRing& ring) {
  try {
    load.run(ring);
  } catch (const Error& error) {
    return error;
  }
  return {};
}

int live_objects() {
  std::array<char, 256> buffer{};
  return simulator()->leaks(buffer.data(), buffer.size());
}

// The answer of a child: whether the fault was met at all, then what is wrong.
constexpr char kMet = '+';
constexpr char kNotMet = '-';

struct DriverFault {
  Function function;
  int nth = 0;
  int result = 0;
  Timing timing = Timing::kCall;
};

void expect_named(Inspection& inspection, const Error& error, const DriverFault& fault) {
  const std::string text = error.what();
  // Work that failed is noticed by whatever asks next.
  const std::string call = fault.timing == Timing::kCall ? fault.function.name + std::string(" failed") : "cu";
  inspection.expect(text.rfind("cuda:0: " + call, 0) == 0 || text.rfind("cuda:1: " + call, 0) == 0, text);
  ErrorKind kind = fault.result == kOutOfMemory ? ErrorKind::kCudaOutOfMemory : ErrorKind::kCuda;
  if (fault.function.seen == Seen::kRefusalOrNothing) kind = ErrorKind::kCudaRefused;
  inspection.expect(error.kind == kind, "an error of the wrong kind");
}

std::string load_with(const DriverFault& fault) {
  const std::string name = fault.function.name;
  Inspection inspection(name + " #" + std::to_string(fault.nth));
  simulator()->set("latency_us", 200);  // something is under way when the fault comes
  Load load;
  const cuda::ContextHandle context = current_context();
  const int objects = live_objects();
  const long calls = simulator()->calls(fault.function.name);
  const auto met = [&] { return simulator()->calls(fault.function.name) - calls >= fault.nth; };
  simulator()->fault(fault.function.name, fault.nth, fault.result, fault.timing == Timing::kWork ? 1 : 0);
  std::optional<Error> error;
  bool met_in_load = false;
  {
    PinnedRing ring(kPinnedBytes, kPinnedBytes, 1);
    error = error_of(load, ring);
    met_in_load = met();
  }
  const bool met_at_all = met();
  const std::string reports = take_reports();
  if (fault.timing == Timing::kCall) simulator()->reset();  // a fault that was not met

  const bool may_fail = met_in_load && fault.function.seen != Seen::kNothing;
  const bool must_fail = met_in_load && fault.function.seen == Seen::kError;
  inspection.expect(error ? may_fail : !must_fail, error ? error->what() : "no error");
  if (error && may_fail) expect_named(inspection, *error, fault);
  const bool sets_context = fault.function.seen == Seen::kErrorOrNothing;
  if (!sets_context) inspection.expect(current_context() == context, "another context is current");
  // Without a context nothing can be given back.
  const bool helpless = met_at_all && !met_in_load && name.rfind("cuCtx", 0) == 0;
  if (helpless) return kMet + inspection.complaints();

  inspection.expect(reports.empty(), reports);
  inspection.expect(live_objects() == objects, "left behind: " + leaks());
  if (fault.timing == Timing::kCall) {
    inspection.expect(error.has_value() || load.arrived(), "the wrong bytes arrived");
    PinnedRing ring(kPinnedBytes, kPinnedBytes, 1);
    const std::optional<Error> again = error_of(load, ring);
    inspection.expect(!again, std::string("again: ") + (again ? again->what() : ""));
    inspection.expect(load.arrived(), "the wrong bytes arrived with the next load");
  }
  return (met_at_all ? kMet : kNotMet) + inspection.complaints();
}

std::string load_with_read_fault(int64_t nth, int64_t pinned_bytes) {
  Inspection inspection("read #" + std::to_string(nth));
  simulator()->set("latency_us", 200);
  Load load;
  const int objects = live_objects();
  int64_t reads = 0;
  {
    io::FaultySystemCalls calls(fault(io::FaultFunction::kPread, nth, EIO));
    const ScopedCalls scope(calls);
    PinnedRing ring(pinned_bytes, pinned_bytes, 1);
    const std::optional<Error> error = error_of(load, ring);
    reads = calls.calls();
    inspection.expect(error.has_value() == (reads > nth), "an error, or none, that is not the read's");
    if (error) inspection.expect(error->kind == ErrorKind::kIo && error->error_number == EIO, error->what());
  }
  const std::string reports = take_reports();
  inspection.expect(reports.empty(), reports);
  inspection.expect(live_objects() == objects, "left behind: " + leaks());
  PinnedRing ring(pinned_bytes, pinned_bytes, 1);
  inspection.expect(!error_of(load, ring) && load.arrived(), "the next load failed");
  return (reads > nth ? kMet : kNotMet) + inspection.complaints();
}

// The driver refuses to pin what the process has, from the nth time on, and perhaps what it has itself. What the load
// comes to.
std::string load_with_refusals(int registered, bool allocates) {
  Inspection inspection(std::to_string(registered) + " slots registered");
  Load load;
  const int objects = live_objects();
  for (int i = registered + 1; i < 20; ++i) {
    simulator()->fault("cuMemHostRegister_v2", i, kOutOfMemory, 0);
    if (!allocates) simulator()->fault("cuMemHostAlloc", i - registered, kOutOfMemory, 0);
  }
  {
    PinnedRing ring(kPinnedBytes, kPinnedBytes, 1);
    const std::optional<Error> error = error_of(load, ring);
    const bool refused = registered == 0 && !allocates;
    inspection.expect(error.has_value() == refused, error ? error->what() : "no error");
    if (error) {
      inspection.expect(error->kind == ErrorKind::kCudaRefused, "an error of the wrong kind");
      inspection.expect(std::string(error->what()).find("cuMemHostRegister_v2 failed") != std::string::npos,
                        error->what());
    }
    inspection.expect(error.has_value() || load.arrived(), "the wrong bytes arrived");
    const auto slots = static_cast<int64_t>(allocates ? ring.slots() : static_cast<size_t>(registered));
    inspection.expect(ring.pinned_bytes() <= slots * static_cast<int64_t>(ring.slot_bytes()), "too many slots");
    simulator()->reset();
  }
  const std::string reports = take_reports();
  inspection.expect(reports.empty(), reports);
  inspection.expect(live_objects() == objects, "left behind: " + leaks());
  return inspection.complaints();
}

// Runs case after case until one does not meet its fault any more. Returns how many did.
template <typename Case>
int sweep(const Case& run) {
  for (int nth = 0;; ++nth) {
    const std::string answer = in_child([&] { return run(nth); }, 20);
    const bool complete = !answer.empty() && (answer[0] == kMet || answer[0] == kNotMet);
    CHECK_MESSAGE((complete && answer.size() == 1), answer);
    if (!complete || answer[0] == kNotMet) return nth;
  }
}

}  // namespace

TEST_CASE("fault: every call of every function fails once") {
  if (simulator() == nullptr) return;
  int met = 0;
  for (const Function& function : kFunctions) {
    const int result = allocates(function.name) ? kOutOfMemory : kUnknown;
    int of_function = sweep([&](int nth) { return load_with({function, nth + 1, result, Timing::kCall}); });
    // What breaks the context is an error where less could be done without.
    if (function.name == std::string("cuMemHostRegister_v2") || function.name == std::string("cuModuleLoadData")) {
      const Function breaking{function.name, Seen::kError};
      of_function += sweep([&](int nth) { return load_with({breaking, nth + 1, kUnknown, Timing::kCall}); });
    }
    // The last resort of draining, and for timelines: no plain load calls it.
    const bool called = std::string(function.name) != "cuStreamSynchronize";
    CHECK_MESSAGE((of_function > 0) == called, std::string(function.name));
    met += of_function;
  }
  CHECK(met > 250);
}

TEST_CASE("fault: memory that cannot be registered is the driver's, or the ring is smaller, or it is an error") {
  if (simulator() == nullptr) return;
  for (const int registered : {0, 1, 2}) {
    for (const bool allocates : {true, false}) {
      CHECK(in_child([=] { return load_with_refusals(registered, allocates); }, 20) == "");
    }
  }
}

TEST_CASE("fault: a stream under capture is an error before anything is enqueued") {
  if (simulator() == nullptr) return;
  const std::string answer = in_child([] {
    const TorchStreams torch;
    simulator()->set("capturing", 1);
    const long records = simulator()->calls("cuEventRecord");
    try {
      cuda::require_not_capturing({{0, torch[0].get()}, {other_device(), nullptr}});
    } catch (const Error& error) {
      return error.what() + std::string(simulator()->calls("cuEventRecord") == records ? "" : "; work was enqueued");
    }
    return std::string("no error");
  });
  CHECK_MESSAGE(answer.rfind("cuda:0: torch's current stream is being captured into a CUDA graph", 0) == 0, answer);
  CHECK_MESSAGE(answer.find("enqueued") == std::string::npos, answer);
}

TEST_CASE("fault: the work of every copy and launch fails once") {
  if (simulator() == nullptr) return;
  for (const Function function : {Function{"cuMemcpyHtoDAsync_v2"}, Function{"cuLaunchKernel"}}) {
    for (const int result : {kIllegalAddress, kLaunchFailed}) {
      CHECK(sweep([&](int nth) { return load_with({function, nth + 1, result, Timing::kWork}); }) > 2);
    }
  }
}

TEST_CASE("fault: every read fails once while the ring is in use") {
  if (simulator() == nullptr) return;
  // Also with a single slot, so that all threads but one wait for it.
  for (const int64_t pinned_bytes : {kPinnedBytes, int64_t{0}}) {
    CHECK(sweep([=](int nth) { return load_with_read_fault(nth, pinned_bytes); }) > 5);
  }
}
