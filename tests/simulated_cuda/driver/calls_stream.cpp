// Driver calls: streams and events.
#include <chrono>
#include <memory>
#include <utility>

#include "driver/call.h"

namespace simcuda {

namespace {

// Marks a place in a stream's queue, behind all that is in it.
std::shared_ptr<Completion> mark(Call& call, Stream& stream, Completions after = {}) {
  Operation operation;
  operation.after = std::move(after);
  std::shared_ptr<Completion> completion = operation.completion;
  call.enqueue(stream, std::move(operation));
  return completion;
}

}  // namespace

extern "C" {

CUresult CUDAAPI cuStreamCreate(CUstream* handle, unsigned int flags) {
  return call("cuStreamCreate", Needs::kContext, [&](Call& call) {
    require(handle != nullptr && (flags == CU_STREAM_DEFAULT || flags == CU_STREAM_NON_BLOCKING));
    const StreamKind kind = flags == CU_STREAM_NON_BLOCKING ? StreamKind::kNonBlocking : StreamKind::kBlocking;
    auto stream = std::make_shared<Stream>(call.simulator, call.context(), kind);
    call.context().streams.push_back(stream);
    *handle = call.simulator.streams.add(std::move(stream));
  });
}

CUresult CUDAAPI cuStreamDestroy_v2(CUstream handle) {
  return release_call("cuStreamDestroy_v2", Needs::kContext,
                      [&](Call& call) { call.simulator.streams.take(handle)->close(); });
}

CUresult CUDAAPI cuStreamSynchronize(CUstream handle) {
  return call("cuStreamSynchronize", Needs::kContext, [&](Call& call) {
    const auto stream = call.stream(handle);
    // The default stream is done when the streams that it synchronizes with are, too.
    if (stream->kind() == StreamKind::kNull) {
      stream->order(call.label());
      mark(call, *stream);
    }
    call.synchronize(stream->context(), stream->tail(), stream->clock());
  });
}

CUresult CUDAAPI cuStreamQuery(CUstream handle) {
  return call("cuStreamQuery", Needs::kContext, [&](Call& call) {
    const auto stream = call.stream(handle);
    if (!stream->idle()) throw DriverError{CUDA_ERROR_NOT_READY};
    call.synchronize(stream->context(), stream->tail(), stream->clock());
  });
}

CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return call("cuThreadExchangeStreamCaptureMode", Needs::kDriver, [&](Call&) {
    static thread_local CUstreamCaptureMode of_thread = CU_STREAM_CAPTURE_MODE_GLOBAL;
    require(mode != nullptr && *mode >= CU_STREAM_CAPTURE_MODE_GLOBAL && *mode <= CU_STREAM_CAPTURE_MODE_RELAXED);
    std::swap(of_thread, *mode);
  });
}

CUresult CUDAAPI cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return call("cuStreamIsCapturing", Needs::kContext, [&](Call& call) {
    require(status != nullptr);
    static_cast<void>(call.stream(handle));
    *status = call.simulator.settings.capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  });
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned int flags) {
  return call("cuStreamWaitEvent", Needs::kContext, [&](Call& call) {
    require(flags == CU_EVENT_WAIT_DEFAULT);
    const auto stream = call.stream(handle);
    const auto event = call.simulator.events.get(event_handle);
    if (event->completion == nullptr) return;
    stream->order(call.label());
    stream->wait_for(event->clock);
    mark(call, *stream, {event->completion});
  });
}

CUresult CUDAAPI cuEventCreate(CUevent* handle, unsigned int flags) {
  return call("cuEventCreate", Needs::kContext, [&](Call& call) {
    require(handle != nullptr && (flags & ~(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING)) == 0);
    const Timing timing = (flags & CU_EVENT_DISABLE_TIMING) != 0 ? Timing::kDisabled : Timing::kEnabled;
    *handle = call.simulator.events.add(std::make_shared<Event>(Event{call.context(), timing, nullptr, {}}));
  });
}

CUresult CUDAAPI cuEventDestroy_v2(CUevent handle) {
  return release_call("cuEventDestroy_v2", Needs::kContext, [&](Call& call) { call.simulator.events.take(handle); });
}

CUresult CUDAAPI cuEventRecord(CUevent handle, CUstream stream_handle) {
  return call("cuEventRecord", Needs::kContext, [&](Call& call) {
    const auto event = call.simulator.events.get(handle);
    const auto stream = call.stream(stream_handle);
    if (&stream->context() != &event->context) throw DriverError{CUDA_ERROR_INVALID_HANDLE};
    event->clock = stream->order(call.label())->clock;
    event->completion = mark(call, *stream);
  });
}

CUresult CUDAAPI cuEventQuery(CUevent handle) {
  return call("cuEventQuery", Needs::kContext, [&](Call& call) {
    const auto event = call.simulator.events.get(handle);
    if (event->completion == nullptr) return;
    if (!event->completion->done) throw DriverError{CUDA_ERROR_NOT_READY};
    call.synchronize(event->context, event->completion, event->clock);
  });
}

CUresult CUDAAPI cuEventSynchronize(CUevent handle) {
  return call("cuEventSynchronize", Needs::kContext, [&](Call& call) {
    const auto event = call.simulator.events.get(handle);
    if (event->completion == nullptr) return;
    // A record that comes while this waits is another one.
    const auto completion = event->completion;
    call.synchronize(event->context, completion, event->clock);
  });
}

CUresult CUDAAPI cuEventElapsedTime(float* milliseconds, CUevent start_handle, CUevent end_handle) {
  return call("cuEventElapsedTime", Needs::kContext, [&](Call& call) {
    require(milliseconds != nullptr);
    const auto start = call.simulator.events.get(start_handle);
    const auto end = call.simulator.events.get(end_handle);
    for (const auto& event : {start, end}) {
      if (event->completion == nullptr || event->timing == Timing::kDisabled || &event->context != &start->context) {
        throw DriverError{CUDA_ERROR_INVALID_HANDLE};
      }
    }
    if (!start->completion->done || !end->completion->done) throw DriverError{CUDA_ERROR_NOT_READY};
    const auto elapsed = end->completion->time - start->completion->time;
    *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count();
  });
}

}  // extern "C"

}  // namespace simcuda
